"""What a trained network must be to be exported."""

from tf_lowbit import inspection
from tf_lowbit.core import grid as core_grid
from tf_lowbit.export.linear import ExportError


def single_network(model):
    """The one network of a model or of a trainer.

    Raises:
        ValueError: if it is not quantized, or a trainer has several students.
    """
    inspection.require_quantized(model)
    return inspection.single_network(model)


def require_exportable(model) -> None:
    """Refuses a network that is not at the end of its training.

    Raises:
        ExportError: naming a tensor above 8 bits or without a range, or a weight that
            is not finite.
    """
    for tensor in inspection.quantized_tensors(model):
        if tensor.bits > core_grid.MAX_BITS:
            raise ExportError(
                "All quantizers must be at 1 to 8 bits to be exported: finish the "
                f"stages first. Received: {tensor.name} at {tensor.bits} bits"
            )
        if not tensor.is_calibrated:
            raise ExportError(
                "All ranges must be calibrated or trained: call tf_lowbit.calibrate. "
                f"Received: {tensor.name}, which is not"
            )
    require_finite(model)


def require_finite(model) -> None:
    """Refuses a network with a weight that is NaN or infinite.

    Raises:
        ExportError: naming the weight.
    """
    spoilt = inspection.spoilt_weight(model)
    if spoilt is not None:
        raise ExportError(f"Weights must be finite. Received: NaN or inf in {spoilt}")
