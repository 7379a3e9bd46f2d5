"""Scales batch normalization to the fixed clips of the quantizers behind it."""

from tf_lowbit.compat import keras
from tf_lowbit.network import graph, inspection, layer_registry, passthrough
from tf_lowbit.network.observation import calibration_samples, without_draws
from tf_lowbit.network.variables import restored
from tf_lowbit.quantizers import sampling

# In the first pass, the layers in front do not fit yet. The normalization in between
# removes most of the error, and the second pass removes the rest.
_PASSES = 2


def fit_to_fixed_clips(model: keras.Model, batches: list) -> list[str]:
    """Scales the normalization in front of fixed clips, so that the clips fit.

    Gamma and beta are divided by the ratio of two clips: that of least squared error at
    the bits of the quantizer's rule, and the fixed one (`tf_lowbit.calibrate`). Returns
    the names of the quantizers that fit now.

    Raises:
        ValueError: If there is no batch, or an activation is NaN or infinite.
    """
    # By normalization: two quantizers behind one must not both scale it.
    found: dict[int, tuple] = {}
    for tensor in inspection.quantized_tensors(model):
        if tensor.role == "activation" and tensor.quantizer.has_fixed_clip:
            norm = _norm_in_front(model, tensor.layer)
            if norm is not None:
                found.setdefault(id(norm), (tensor, norm))
    tensors = [tensor for tensor, _ in found.values()]
    in_front = [
        (tensor.variables, tensor.ceiling)
        for tensor in inspection.quantized_tensors(model)
        if tensor.is_shortcut
        and tensor.quantizer.needs_calibration
        and tensor.role == "activation"
    ]
    for _ in range(_PASSES if found else 0):
        with (
            restored(model.non_trainable_variables),
            without_draws(model),
            sampling.opened(in_front),
        ):
            for tensor in tensors:
                tensor.assign_bits(tensor.quantizer.bits)
            samples = calibration_samples(model, tensors, batches)
        for tensor, norm in found.values():
            ratio = tensor.quantizer.misfit(samples[tensor.name])
            norm.gamma.assign(norm.gamma / ratio)
            if norm.center:
                norm.beta.assign(norm.beta / ratio)
    return [tensor.name for tensor in tensors]


def _norm_in_front(model, layer):
    """Returns the scalable batch normalization that only this layer reads, or None."""
    readers = graph.readers(model)
    outputs = {id(tensor) for tensor in model.outputs}
    while True:
        read = graph.inputs_of(model, layer)
        finer = _finer_in_front(read[0]) if len(read) == 1 else None
        if finer is not None:
            layer = finer
            continue
        if len(read) != 1 or len(readers[id(read[0])]) != 1 or id(read[0]) in outputs:
            return None
        node = graph.producer(read[0])
        layer = node.layer
        if isinstance(layer, layer_registry.BATCH_NORMS):
            is_once = len(graph.inputs_of(model, layer)) == 1
            return layer if is_once and layer.scale and layer.trainable else None
        if node.is_input or not passthrough.is_transparent(node):
            return None


def _finer_in_front(tensor):
    """Returns the quantized ReLU of a shortcut that a tensor comes from, or None."""
    node = graph.producer(tensor)
    while passthrough.is_transparent(node):
        node = graph.producer(passthrough.sources(node)[0])
    config = getattr(node.layer, "quantize_config", None)
    is_relu = getattr(config, "replaces", "linear") != "linear"
    return node.layer if is_relu and config.shortcut else None
