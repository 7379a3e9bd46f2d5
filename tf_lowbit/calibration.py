"""What is measured on data and not trained: ranges, and batch statistics."""

import contextlib
import itertools

import numpy as np

from tf_lowbit import inspection
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import grid, ratios
from tf_lowbit.scheme import graph, registry

_DROPOUT = (
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
)
# A step that float32 has put just above a ratio is of that ratio: tying twice is as
# tying once. A range that is a millionth shorter clips nothing worth mention.
_SLACK = 1.0 - 2.0**-20


def calibrate(model: keras.Model, dataset, batches: int = 8) -> list[str]:
    """Sets the clips and steps of activation quantizers from data.

    PACT and uniform: the clip whose squared error is the least at the quantizer's own
    bits (ours). LSQ: `2 mean|x| / sqrt(Q_P)` (arXiv:1902.08153). DoReFa's clip is
    fixed at 1 and left alone. While it is measured, the ranges to be set neither clip
    nor round, weights are quantized as they stand, normalisation uses each batch's
    own statistics (quantized weights have another scale than the float ones, so the
    moving averages would mislead) and dropout is off. No weight and no moving average
    is changed.

    Residual quantizers are measured as uniform ones, and then tied (`tie_residuals`).

    Args:
        model: what `tf_lowbit.quantize` made; or a `LowBitTrainer`, for its students.
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
    inspection.require_quantized(model)
    networks = inspection.networks(model)
    kept = _kept(dataset, batches, networks)
    ranges = [
        variable
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == "activation"
        for variable in tensor.variables.values()
    ]
    with _unchanged_on_error(ranges):
        return [n for network in networks for n in _calibrate(network, kept, batches)]


def _calibrate(model, dataset, batches) -> list[str]:
    tensors = [
        tensor
        for tensor in inspection.quantized_tensors(model)
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
    for tensor, kept in zip(tensors, samples, strict=True):
        try:
            tensor.quantizer.calibrate(kept, tensor.variables)
        except ValueError as error:
            raise ValueError(f"{tensor.name}: {error}") from error
    tie_residuals(model)
    return [tensor.name for tensor in tensors]


def tie_residuals(model: keras.Model) -> None:
    """Makes the steps around each Add multiples of one another (ours).

    After it, `step of an input / step of the output` is a fraction of odd denominator
    (`core.ratios`), to float32 precision: an int8 Add then meets no tie. Add by Add,
    in the graph's order:

    - the output's step is that of the quantized ReLU that alone reads it; or else what
      its residual quantizer has, moved to the nearest ratio with an input whose step
      is settled, if there is one: k-bit activations and what earlier Adds have tied;
    - the other residual quantizers on its inputs get the smallest ratio to it at
      which they clip no more than before (up to 15).

    The steps of k-bit activations are read, at the bits that they are made for, and
    never moved. So two settled steps around one Add stay as they are, though they may
    not fit: those of an input and of the ReLU behind, as in post-activation networks
    (of DoReFa quantizers they do fit), or of inputs that do not come from one another.
    Steps that are learned (LSQ, PACT) go on moving in training, away from what was
    tied to them: call it again afterwards. Calling it twice changes nothing.

    Args:
        model: what `tf_lowbit.quantize` made.
    """
    settled: dict[str, float] = {}  # Steps of residual quantizers, the latest last.

    def settle(tensor, step) -> float:
        tensor.variables["step"].assign(np.float32(step))
        settled[tensor.name] = _present_step(tensor)
        return settled[tensor.name]

    for add in inspection.residual_adds(model):
        inputs = [tensor for tensor in add.inputs if tensor is not None]
        if add.output is None:
            continue
        if add.output.is_residual:
            step = _present_step(add.output)
            known = _settled_step(inputs, settled)
            if known is not None:
                step = known / ratios.nearest_ratio(known / step)
            step = settle(add.output, step)
        else:
            step = _step_as_made(add.output)
        for tensor in inputs:
            if step and tensor.is_residual and tensor.name not in settled:
                ratio = ratios.at_least_ratio(_present_step(tensor) / step * _SLACK)
                settle(tensor, step * ratio)


def _settled_step(tensors, settled) -> float | None:
    """The latest settled step, so that it is a multiple of those before in a chain."""
    names = {tensor.name for tensor in tensors}
    residual = [step for name, step in settled.items() if name in names]
    others = [_step_as_made(tensor) for tensor in tensors if not tensor.is_residual]
    known = [step for step in (*others, *residual) if step is not None]
    return known[-1] if known else None


def _present_step(tensor) -> float:
    return float(tensor.quantizer.step(None, tensor.variables))


def _step_as_made(tensor) -> float | None:
    """The step at the bits that a quantizer is made for; None if it does not round."""
    if tensor.quantizer.bits > grid.MAX_BITS:
        return None
    if tensor.bits == tensor.quantizer.bits:
        return _present_step(tensor)
    # A stage holds other bits, and the step of some quantizers follows them.
    state = [(variable, variable.numpy()) for variable in tensor.variables.values()]
    try:
        tensor.assign_bits(tensor.quantizer.bits)
        return _present_step(tensor)
    finally:
        for variable, value in state:
            variable.assign(value)


def recalibrate_batch_norm(model, dataset, batches: int = 32) -> list[str]:
    """Measures the moving averages of batch normalisation anew.

    Each becomes the plain average, over the batches, of the statistics of the network
    as it stands, quantized at its present bits. Where training ended otherwise, as
    with stochastic precision without a tail, the moving averages are those of
    another network. Dropout is off; no weight is changed. Ours; as the re-estimation
    after averaging weights (Izmailov et al., arXiv:1803.05407).

    Args:
        model: any functional model; or a `LowBitTrainer`, for its students.
        dataset: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, at best of
            the size that training uses.
        batches: how many of them to use, at least 1.

    Returns:
        The names of the layers that were measured. Frozen ones are left alone.

    Raises:
        ValueError: if the dataset is empty, `batches` is below 1, or a statistic is
            NaN or infinite; then nothing is changed. Also if a layer is called
            several times, whose average over its calls is not known.
    """
    if batches < 1:
        raise ValueError(f"batches must be >= 1. Received: batches={batches}")
    networks = inspection.networks(model)
    dataset = _kept(dataset, batches, networks)
    state = [v for network in networks for v in network.non_trainable_variables]
    with _unchanged_on_error(state):
        return [
            name
            for network in networks
            for name in _average_batch_norm(network, dataset, batches)
        ]


def _average_batch_norm(network, dataset, batches) -> list[str]:
    with (
        without_dropout(network),
        _settings(network, registry.BATCH_NORMS, "momentum") as norms,
    ):
        norms = [layer for layer in norms if layer.trainable]
        _refuse_shared(network, norms)
        for layer in norms:
            # Weight 0 would not rid an average of a NaN that it holds.
            layer.moving_mean.assign(tf.zeros_like(layer.moving_mean))
            layer.moving_variance.assign(tf.ones_like(layer.moving_variance))
        count = 0
        for batch in itertools.islice(iter(dataset), batches):
            for layer in norms:
                # Makes the moving average that of all batches so far, this one in.
                layer.momentum = count / (count + 1)
            network(batch[0] if isinstance(batch, tuple) else batch, training=True)
            count += 1
    if not count:
        raise ValueError("dataset must hold at least one batch. Received: none")
    for layer in norms:
        for average in (layer.moving_mean, layer.moving_variance):
            if not tf.reduce_all(tf.math.is_finite(average)):
                raise ValueError(
                    "Batch statistics must be finite: look for NaN in the data. "
                    f"Received: {average.name} that is not"
                )
    return [layer.name for layer in norms]


def _refuse_shared(network, norms):
    calls = [node.layer for node in graph.calls(network)]
    shared = [layer.name for layer in norms if calls.count(layer) > 1]
    if shared:
        raise ValueError(
            "Batch normalisation must be called once in the network to be measured. "
            f"Received: {shared}, called more often"
        )


def _kept(dataset, batches, networks):
    """The dataset, or its batches in a list where several networks read them."""
    if len(networks) == 1:
        return dataset
    return list(itertools.islice(iter(dataset), batches))


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
    state = [(variable, variable.numpy()) for variable in _changing(model, tensors)]
    try:
        for tensor in tensors:
            tensor.quantizer.open_range(tensor.variables)
        with without_dropout(model):
            yield
    finally:
        for variable, value in state:
            variable.assign(value)


@contextlib.contextmanager
def _unchanged_on_error(variables):
    """Puts variables back where the block fails."""
    state = [(variable, variable.numpy()) for variable in variables]
    try:
        yield
    except Exception:
        for variable, value in state:
            variable.assign(value)
        raise


@contextlib.contextmanager
def without_dropout(model):
    """A context in which nothing is dropped out in training."""
    with _settings(model, _DROPOUT, "rate") as layers:
        for layer in layers:
            layer.rate = 0.0
        yield


@contextlib.contextmanager
def _settings(model, kinds, name):
    """Yields the layers of some kinds; puts their setting `name` back afterwards."""
    layers = [module for module in model.submodules if isinstance(module, kinds)]
    values = [getattr(layer, name) for layer in layers]
    try:
        yield layers
    finally:
        for layer, value in zip(layers, values, strict=True):
            setattr(layer, name, value)


def _changing(model, tensors):
    """The variables that measuring touches: ranges, bits and moving averages."""
    yield from model.non_trainable_variables
    for tensor in tensors:
        yield from (v for v in tensor.variables.values() if v.trainable)
