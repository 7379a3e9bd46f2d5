"""Batch normalisation and quantizers: what is measured on data and not trained."""

import itertools
import math
import warnings

import numpy as np

from tf_lowbit import inspection
from tf_lowbit.compat import keras, tf
from tf_lowbit.core.state import restored, unchanged_on_error
from tf_lowbit.observation import (
    batches_of,
    calibration_samples,
    changed_setting,
    input_batches,
    validate_batches,
    without_draws,
)
from tf_lowbit.quantizers import sampling
from tf_lowbit.scheme import graph, passing, registry
from tf_lowbit.scheme.layout import QuantizationWarning

# In standard deviations, of the worst layer. A compromise: of 2-bit networks on the
# digits, those beyond it lost 1.5 to 76 points, and one below it lost 10.
NOTABLE_LAG = 0.15
_MOST_NAMED = 5
# Fewer values in a batch give statistics that are mostly chance.
_FEW_VALUES = 8

# Each layer is measured behind layers that do not fit yet; normalisation in between
# takes most of that away, and a second look the rest.
_PASSES = 2


def fit_to_fixed_clips(model: keras.Model, batches: list) -> list[str]:
    """Scales the normalisation in front of fixed clips, so that the clips fit (ours).

    Gamma and beta are divided by the clip of least squared error at the quantizer's
    own bits, relative to the clip that it has. See `tf_lowbit.calibrate`.

    Args:
        model: a quantized network.
        batches: of the data, at least one.

    Returns:
        The names of the quantizers in question.

    Raises:
        ValueError: if there is no batch, or an activation is NaN or infinite.
    """
    found = [
        (tensor, norm)
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == "activation" and tensor.quantizer.has_fixed_clip
        for norm in [_norm_in_front(model, tensor.layer)]
        if norm is not None
    ]
    # Two quantizers behind one normalisation must not both scale it.
    found = list({id(norm): (tensor, norm) for tensor, norm in found[::-1]}.values())
    found.reverse()
    tensors = [tensor for tensor, _ in found]
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
        for tensor, norm in found:
            ratio = tensor.quantizer.misfit(samples[tensor.name])
            norm.gamma.assign(norm.gamma / ratio)
            if norm.center:
                norm.beta.assign(norm.beta / ratio)
    return [tensor.name for tensor in tensors]


def _norm_in_front(model, layer):
    """The batch normalisation that a layer alone reads and that can be scaled."""
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
        if isinstance(layer, registry.BATCH_NORMS):
            is_once = len(graph.inputs_of(model, layer)) == 1
            return layer if is_once and layer.scale and layer.trainable else None
        if node.is_input or not passing.is_transparent(node):
            return None


def _finer_in_front(tensor):
    """The quantized ReLU of a shortcut that a tensor comes from; or None."""
    node = graph.producer(tensor)
    while passing.is_transparent(node):
        node = graph.producer(passing.sources(node)[0])
    config = getattr(node.layer, "quantize_config", None)
    is_relu = getattr(config, "replaces", "linear") != "linear"
    return node.layer if is_relu and config.shortcut else None


def recalibrate_batch_norm(model, dataset, batches: int = 32) -> list[str]:
    """Measures the moving averages of batch normalisation anew.

    Each becomes the plain average, over the batches, of the statistics of the network
    as it stands, quantized at its present bits. Where training ended otherwise, as
    with stochastic precision without a tail, the moving averages are those of
    another network. Dropout, noise and augmentation are off; no weight is changed.
    Ours; as the re-estimation after averaging weights (Izmailov et al.,
    arXiv:1803.05407).

    Args:
        model: any functional model; or a `LowBitTrainer`, for its students.
        dataset: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, at best of
            the size that training uses.
        batches: how many of them to use, at least 1.

    Returns:
        The names of the layers that were measured. Frozen ones, and those that the
        network calls with `training=False`, are left alone.

    Raises:
        ValueError: if the dataset is empty, `batches` is below 1, a statistic is NaN
            or infinite, or a layer sees one value of a channel in each batch; then
            nothing is changed. Also if a layer is called several times, whose average
            over its calls is not known.
    """
    validate_batches(batches)
    networks = inspection.networks(model)
    if len(networks) > 1:  # Each reads the same batches.
        dataset = list(itertools.islice(batches_of(dataset), batches))
    state = [v for network in networks for v in network.non_trainable_variables]
    with unchanged_on_error(state):
        return [
            layer.name
            for network in networks
            for layer in _average_batch_norm(network, dataset, batches)
        ]


def lag(model, dataset, batches: int = 8) -> dict[str, float]:
    """How far moving statistics are from those that training uses, on data.

    Training normalises by each batch's own mean and variance, evaluation and a file by
    their moving averages. Those follow slowly: Keras's default momentum of 0.99 needs
    some 500 steps. This is the root mean square, over the channels, of the difference
    between the two normalised outputs, ahead of gamma and beta:
    `sqrt((m - m')^2 / v' + (sqrt(v / v') - 1)^2)`, `m` and `v` measured as
    `recalibrate_batch_norm` does, `m'` and `v'` the moving ones (ours). Nothing is
    changed.

    Args:
        model: any functional model; or a `LowBitTrainer`, for its students.
        dataset: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, at best of
            the size and the kind that training uses.
        batches: how many of them to use, at least 1.

    Returns:
        Layer name -> its lag, in standard deviations; with the student's name and a
        slash in front where there are several. 0 where both are equal. Without frozen
        layers and those that the network calls with `training=False`.

    Raises:
        ValueError: as `recalibrate_batch_norm` says.
    """
    validate_batches(batches)
    networks = _named_networks(model)
    if len(networks) > 1:  # Each reads the same batches.
        dataset = list(itertools.islice(batches_of(dataset), batches))
    found = {}
    for front, network in networks.items():
        before = {id(layer): statistics_of(layer) for layer in norms_of(network)}
        with restored(network.non_trainable_variables):
            for layer in _average_batch_norm(network, dataset, batches):
                distance = distance_between(
                    before[id(layer)], statistics_of(layer), layer.epsilon
                )
                found[front + layer.name] = distance
    return found


def warn_of_lag(model, dataset, batches: int = 8) -> None:
    """Warns where moving statistics lag behind on data.

    Data that can be read only once are left alone, as they are needed elsewhere.

    Args:
        model: as in `lag`.
        dataset: likewise.
        batches: likewise.
    """
    try:
        if batches_of(dataset) is dataset:
            return
        lags = lag(model, dataset, batches)
    except ValueError:
        return  # Not measurable: batches of one example, or a layer that is shared.
    late = {name: value for name, value in lags.items() if value > NOTABLE_LAG}
    if late:
        warnings.warn(lag_message(late, "on the data"), QuantizationWarning, 3)


def lag_message(late: dict[str, float], where: str) -> str:
    """Says which layers lag, and what helps.

    Args:
        late: layer name -> lag.
        where: what it was measured on.
    """
    worst = dict(sorted(late.items(), key=lambda item: -item[1])[:_MOST_NAMED])
    received = ", ".join(f"{name} by {value:.2f}" for name, value in worst.items())
    return (
        "Moving statistics of batch normalisation must be those of the trained "
        "network, or it evaluates worse than it trains: call "
        "tf_lowbit.recalibrate_batch_norm(model, data), train with "
        "tf_lowbit.callbacks.BatchNormReestimation, or give the layers a lower "
        f"momentum, such as 0.9. Received: {len(late)} layers that lag {where}, in "
        f"standard deviations: {received}"
    )


def named_norms(model) -> dict:
    """The layers that use the batch's own statistics in training, by name.

    Args:
        model: a network; or a `LowBitTrainer`, whose several students' names stand in
            front, with a slash.
    """
    return {
        front + layer.name: layer
        for front, network in _named_networks(model).items()
        for layer in batch_normalized(network)
    }


def _named_networks(model) -> dict:
    """The networks, by what stands in front of their layers' names."""
    networks = inspection.networks(model)
    if len(networks) == 1:
        return {"": networks[0]}
    fronts = [f"{name}/" for name in model.student_names]
    return dict(zip(fronts, networks, strict=True))


def estimated_lag(layer, start, end, steps: int) -> float:
    """The lag of one layer, by how far training still moves its averages (ours).

    An average M that follows a batch statistic B with momentum m leaves `m^k` of the
    gap after k steps. So `B - M_end = m^k / (1 - m^k) * (M_end - M_start)`, as far as
    B did not change within these steps.

    Args:
        layer: the layer, called once in each step.
        start: its (mean, variance) ahead of the steps.
        end: likewise, after them.
        steps: how many, at least 1.

    Returns:
        The lag as `lag` defines it, at the end; 0 for a momentum of 1.
    """
    left = float(layer.momentum) ** steps
    if left >= 1.0:
        return 0.0  # The averages are meant to stay as they are.
    measured = [
        m + left / (1.0 - left) * (m - s) for s, m in zip(start, end, strict=True)
    ]
    return distance_between(end, measured, layer.epsilon)


def norms_of(network) -> list:
    """The batch normalisations of a network, those of models within it too."""
    return [m for m in network.submodules if isinstance(m, registry.BATCH_NORMS)]


def statistics_of(layer) -> tuple[np.ndarray, np.ndarray]:
    """The moving mean and variance as arrays, whatever the strategy."""
    averages = (layer.moving_mean, layer.moving_variance)
    return tuple(tf.convert_to_tensor(average).numpy() for average in averages)


def distance_between(moving, measured, epsilon: float) -> float:
    """The lag of one layer; see `lag`.

    Args:
        moving: (mean, variance) that evaluation uses.
        measured: (mean, variance) of the batches.
        epsilon: of the layer.
    """
    (mean, variance), (batch_mean, batch_variance) = moving, measured
    deviation = np.sqrt(np.maximum(variance, 0.0) + epsilon)
    batch_deviation = np.sqrt(np.maximum(batch_variance, 0.0) + epsilon)
    shift = (batch_mean - mean) / deviation
    scale = batch_deviation / deviation - 1.0
    return float(np.sqrt(np.mean(shift**2 + scale**2)))


def _average_batch_norm(network, dataset, batches) -> list:
    """Measures the averages; returns the layers."""
    with (
        without_draws(network),
        changed_setting(network, registry.BATCH_NORMS, "momentum") as norms,
    ):
        norms = [layer for layer in norms if layer.trainable]
        _refuse_shared(network, norms)
        before = [layer.get_weights() for layer in norms]
        for layer in norms:
            # Weight 0 would not rid an average of a NaN that it holds.
            layer.moving_mean.assign(tf.zeros_like(layer.moving_mean))
            layer.moving_variance.assign(tf.ones_like(layer.moving_variance))
        largest = 0
        for count, inputs in enumerate(input_batches(network, dataset, batches)):
            largest = max(largest, len(tf.nest.flatten(inputs)[0]))
            for layer in norms:
                # Makes the moving average that of all batches so far, this one in.
                layer.momentum = count / (count + 1)
            network(inputs, training=True)
    moved = []
    for layer, values in zip(norms, before, strict=True):
        if _is_at_start(layer):
            layer.set_weights(values)  # Called with training=False.
        else:
            moved.append(layer)
    norms = moved
    for layer in norms:
        for average in (layer.moving_mean, layer.moving_variance):
            if not tf.reduce_all(tf.math.is_finite(average)):
                raise ValueError(
                    "Batch statistics must be finite: look for NaN in the data. "
                    f"Received: {average.name} that is not"
                )
    require_values(norms, largest)
    return norms


def require_values(norms, examples: int) -> None:
    """Refuses batches too small for statistics, and warns of small ones.

    Args:
        norms: layers that normalise by the batch's own statistics.
        examples: in the largest batch.

    Raises:
        ValueError: if a layer sees one value of a channel in each batch.
    """
    counts = {layer.name: examples * _values_of_an_example(layer) for layer in norms}
    if not counts:
        return
    name, count = min(counts.items(), key=lambda item: item[1])
    if count < 2:
        raise ValueError(
            "Batch normalisation must see several values of a channel: take "
            "batches of more than one example. "
            f"Received: {name!r}, with one value in each batch"
        )
    if count < _FEW_VALUES:
        warnings.warn(
            f"Batch normalisation should see {_FEW_VALUES} values of a channel or "
            "more, or what is measured behind it is far off: take larger batches. "
            f"Received: {name!r}, with {count} values in each batch",
            QuantizationWarning,
            stacklevel=2,
        )


def batch_normalized(network) -> list:
    """The layers that use the batch's own statistics in training."""
    fixed = {
        node.layer.name
        for node in graph.calls(network)
        if getattr(node, "call_kwargs", {}).get("training") is False
    }
    return [n for n in norms_of(network) if n.trainable and n.name not in fixed]


def _is_at_start(layer) -> bool:
    """Whether the averages are 0 and 1, to which no batch leads by itself."""
    is_mean = tf.reduce_all(tf.equal(layer.moving_mean, 0.0))
    return bool(is_mean & tf.reduce_all(tf.equal(layer.moving_variance, 1.0)))


def _values_of_an_example(layer) -> int:
    """How many values each channel has; 2 for each size that is not known."""
    try:
        sizes = enumerate(layer.get_output_shape_at(0))
    except RuntimeError:  # Within another layer, of which there is no graph.
        return 2
    return math.prod(s or 2 for axis, s in sizes if axis > 0 and axis not in layer.axis)


def _layers_called(network):
    """Each layer as often as a network calls it, those of models within it too."""
    for node in graph.calls(network):
        if getattr(node.layer, "_is_graph_network", False):
            yield from _layers_called(node.layer)
        else:
            yield node.layer


def _refuse_shared(network, norms):
    calls = list(_layers_called(network))
    shared = [layer.name for layer in norms if calls.count(layer) > 1]
    if shared:
        raise ValueError(
            "Batch normalisation must be called once in the network to be measured. "
            f"Received: {shared}, called more often"
        )
