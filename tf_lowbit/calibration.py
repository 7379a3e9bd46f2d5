"""Ranges of activations from data, before the first step of training."""

import contextlib
import itertools

from tf_lowbit import inspection
from tf_lowbit.compat import keras, tf
from tf_lowbit.scheme import graph

_DROPOUT = (
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
)


def calibrate(model: keras.Model, dataset, batches: int = 8) -> list[str]:
    """Sets the clips and steps of activation quantizers from data.

    PACT and uniform: the clip whose squared error is the least at the quantizer's own
    bits (ours). LSQ: `2 mean|x| / sqrt(Q_P)` (arXiv:1902.08153). DoReFa's clip is
    fixed at 1 and left alone. While it is measured, the ranges to be set neither clip
    nor round, weights are quantized as they stand, normalisation uses each batch's
    own statistics (quantized weights have another scale than the float ones, so the
    moving averages would mislead) and dropout is off. No weight and no moving average
    is changed.

    Args:
        model: what `tf_lowbit.quantize` made.
        dataset: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`.
        batches: how many of them to use, at least 1.

    Returns:
        The names of the quantizers whose range was set.

    Raises:
        ValueError: if the model is not quantized, the dataset is empty, `batches` is
            below 1, or an activation is NaN or infinite.
    """
    if batches < 1:
        raise ValueError(f"batches must be >= 1. Received: batches={batches}")
    tensors = [
        tensor
        for tensor in inspection.require_quantized(model)
        if tensor.role == "activation" and tensor.quantizer.needs_calibration
    ]
    if not tensors:
        return []
    read = [_inputs(model, tensor.layer) for tensor in tensors]
    observer = keras.Model(model.inputs, read)
    samples: list[list] = [[] for _ in tensors]
    with _measuring(model, tensors):
        for batch in itertools.islice(iter(dataset), batches):
            inputs = batch[0] if isinstance(batch, tuple) else batch
            seen = observer(inputs, training=True)
            for kept, values in zip(samples, seen, strict=True):
                kept.extend(tf.cast(value, tf.float32).numpy() for value in values)
    if not samples[0]:
        raise ValueError("dataset must hold at least one batch. Received: none")
    state = [(v, v.numpy()) for t in tensors for v in t.variables.values()]
    for tensor, kept in zip(tensors, samples, strict=True):
        try:
            tensor.quantizer.calibrate(kept, tensor.variables)
        except ValueError as error:
            for variable, value in state:
                variable.assign(value)
            raise ValueError(f"{tensor.name}: {error}") from error
    return [tensor.name for tensor in tensors]


def _inputs(model, layer) -> list:
    """What the layer reads, at each of its calls."""
    return [
        tensor
        for node in graph.calls(model)
        if node.layer is layer
        for tensor in node.keras_inputs
    ]


@contextlib.contextmanager
def _measuring(model, tensors):
    """Opens the ranges and turns dropout off; puts all state back afterwards."""
    layers = [inspection.wrapped_layer(layer) for layer in model.layers]
    rates = [(x, x.rate) for x in layers if isinstance(x, _DROPOUT)]
    state = [(variable, variable.numpy()) for variable in _changing(model, tensors)]
    try:
        for tensor in tensors:
            tensor.quantizer.open_range(tensor.variables)
        for layer, _ in rates:
            layer.rate = 0.0
        yield
    finally:
        for layer, rate in rates:
            layer.rate = rate
        for variable, value in state:
            variable.assign(value)


def _changing(model, tensors):
    """The variables that measuring touches: ranges, bits and moving averages."""
    yield from model.non_trainable_variables
    for tensor in tensors:
        yield from (v for v in tensor.variables.values() if v.trainable)
