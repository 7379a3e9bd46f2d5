"""Checks that a network is ready for export."""

from tf_lowbit.compat import keras
from tf_lowbit.core import grid as core_grid
from tf_lowbit.export.types import ExportError
from tf_lowbit.network import inspection


def single_network(model: keras.Model) -> keras.Model:
    """Returns a model itself, or the one student of a trainer.

    Raises:
        ValueError: If it is not quantized, or a trainer has several students.
    """
    inspection.require_quantized(model)
    return inspection.single_network(model)


def require_exportable(model: keras.Model) -> None:
    """Refuses a network whose training is not finished.

    Raises:
        ExportError: For a tensor above 8 bits or without a range, or a weight that is
            not finite.
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
                f"Received: {tensor.name}, which is not calibrated"
            )
    require_finite(model)


def require_finite(model: keras.Model) -> None:
    """Raises `ExportError` for a weight that is NaN or infinite."""
    name = inspection.nonfinite_weight(model)
    if name is not None:
        raise ExportError(f"Weights must be finite. Received: NaN or inf in {name}")
