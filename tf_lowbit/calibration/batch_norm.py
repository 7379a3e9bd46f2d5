"""Moving statistics of batch normalization: measured on data, and how far they lag."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import user_warnings
from tf_lowbit.network import graph, inspection, layer_registry
from tf_lowbit.network.observation import (
    batches_of,
    changed_setting,
    input_batches,
    validate_batches,
    without_draws,
)
from tf_lowbit.network.variables import restored, unchanged_on_error
from tf_lowbit.scheme.layout import QuantizationWarning

# Lag of the worst layer, in standard deviations. A compromise: 2-bit networks on the
# digits lost 1.5 to 76 points of accuracy above it; one below it lost 10.
NOTABLE_LAG = 0.15
_MOST_NAMED = 5
# A lag as large as this may have another cause.
_LARGE_LAG = 3.0
# Statistics of fewer values are mostly noise.
_FEW_VALUES = 8


def recalibrate_batch_norm(
    model: keras.Model, dataset: Iterable[Any], batches: int = 32
) -> list[str]:
    """Measures the moving averages of batch normalization again.

    Each becomes the plain average, over the batches, of the statistics that the network
    has now, quantized at its current bits. Moving averages lag behind the weights, and
    training with stochastic precision without a tail leaves those of another network.
    Dropout, noise and augmentation are off; no weight changes. Averaged weights need
    the same (Izmailov et al., arXiv:1803.05407).

    Args:
        model: Any functional model, or a `LowBitTrainer` for its students.
        dataset: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, preferably of
            the batch size of the training.
        batches: Number of batches to use, at least 1.

    Returns:
        The names of the layers that were measured. Layers that are frozen, or called
        with `training=False`, do not change.

    Raises:
        ValueError: If the dataset is empty, `batches` is below 1, a statistic is NaN or
            infinite, a layer sees only one value per channel in each batch, or a layer
            is called several times, so that its average over the calls is unknown. Then
            nothing is changed.
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


def lag(
    model: keras.Model, dataset: Iterable[Any], batches: int = 8
) -> dict[str, float]:
    """Measures how far moving statistics are from those that training uses.

    Training normalizes by each batch's mean and variance; evaluation and exported files
    use their moving averages. These follow slowly: with Keras's default momentum of
    0.99 they need about 500 steps. The lag is the difference between the two normalized
    outputs, before gamma and beta: the root mean square over the channels of `sqrt((m -
    m')^2 / v' + (sqrt(v / v') - 1)^2)`. `m` and `v` are measured as by
    `recalibrate_batch_norm`; `m'` and `v'` are the moving averages. Nothing is changed.

    Args:
        model: Any functional model, or a `LowBitTrainer` for its students.
        dataset: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, preferably as
            in training, also in batch size.
        batches: Number of batches to use, at least 1.

    Returns:
        Layer name -> lag in standard deviations; 0 if both are equal. With several
        students, the name has the prefix `<student's name>/`. Layers that are frozen,
        or called with `training=False`, are left out.

    Raises:
        ValueError: As `recalibrate_batch_norm`.
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


def warn_of_lag(model: keras.Model, dataset: Iterable[Any], batches: int = 8) -> None:
    """Warns if moving statistics lag behind on data.

    It does not read data that can be read only once, because others need them.
    Arguments are as in `lag`.
    """
    try:
        if batches_of(dataset) is dataset:
            return
        lags = lag(model, dataset, batches)
    except ValueError:
        return  # Not measurable: batches of one example, or a shared layer.
    late = {name: value for name, value in lags.items() if value > NOTABLE_LAG}
    if late:
        user_warnings.warn(lag_message(late, "on the data"), QuantizationWarning)


def lag_message(late: dict[str, float], where: str) -> str:
    """Returns a warning that names the worst layers and the remedies.

    Args:
        late: Layer name -> lag.
        where: Place of the measurement, such as "on the data".
    """
    worst = dict(sorted(late.items(), key=lambda item: -item[1])[:_MOST_NAMED])
    received = ", ".join(f"{name} by {value:.2f}" for name, value in worst.items())
    other = ""
    if max(late.values()) > _LARGE_LAG:
        other = (
            " So large a lag can also mean data of another scale than the float "
            "training's, such as 0 to 255 instead of 0 to 1: then pass data as there."
        )
    return (
        "Moving statistics of batch normalization must be those of the trained "
        "network, or it evaluates worse than it trains: call "
        "tf_lowbit.recalibrate_batch_norm(model, data), train with "
        "tf_lowbit.callbacks.BatchNormReestimation, or give the layers a lower "
        f"momentum, such as 0.9.{other} Received: {len(late)} layers that lag "
        f"{where}, in standard deviations: {received}"
    )


def named_norms(model: keras.Model) -> dict:
    """Returns the layers that use batch statistics in training, by name.

    With several students of a `LowBitTrainer`, the name has the prefix `<student's
    name>/`.
    """
    return {
        front + layer.name: layer
        for front, network in _named_networks(model).items()
        for layer in batch_normalized(network)
    }


def _named_networks(model) -> dict:
    """Returns the networks by the prefix of their layers' names."""
    networks = inspection.networks(model)
    if len(networks) == 1:
        return {"": networks[0]}
    fronts = [f"{name}/" for name in model.student_names]
    return dict(zip(fronts, networks, strict=True))


def estimated_lag(
    layer: keras.layers.Layer,
    start: tuple[np.ndarray, np.ndarray],
    end: tuple[np.ndarray, np.ndarray],
    steps: int,
) -> float:
    """Estimates the lag of one layer from the last changes of its moving averages.

    An average M that follows a batch statistic B with momentum m keeps `m^k` of the gap
    after k steps. So `B - M_end = m^k / (1 - m^k) * (M_end - M_start)`, if B did not
    change during these steps.

    Args:
        layer: The layer, called once in each step.
        start: Its (mean, variance) before the steps.
        end: Its (mean, variance) after the steps.
        steps: Number of steps, at least 1.

    Returns:
        The lag at the end (`lag`); 0 for a momentum of 1.
    """
    left = float(layer.momentum) ** steps
    if left >= 1.0:
        return 0.0  # The averages are meant to stay.
    measured = [
        m + left / (1.0 - left) * (m - s) for s, m in zip(start, end, strict=True)
    ]
    return distance_between(end, measured, layer.epsilon)


def norms_of(network: keras.Model) -> list:
    """Returns the batch normalizations of a network, also of nested models."""
    return [m for m in network.submodules if isinstance(m, layer_registry.BATCH_NORMS)]


def statistics_of(layer: keras.layers.Layer) -> tuple[np.ndarray, np.ndarray]:
    """Returns the moving mean and variance as arrays, under any strategy."""
    averages = (layer.moving_mean, layer.moving_variance)
    return tuple(tf.convert_to_tensor(average).numpy() for average in averages)


def distance_between(
    moving: Sequence[np.ndarray], measured: Sequence[np.ndarray], epsilon: float
) -> float:
    """Computes the lag of one layer (`lag`) from its (mean, variance).

    Args:
        moving: The moving averages, which evaluation uses.
        measured: The statistics of the batches.
        epsilon: Epsilon of the layer.
    """
    (mean, variance), (batch_mean, batch_variance) = moving, measured
    deviation = np.sqrt(np.maximum(variance, 0.0) + epsilon)
    batch_deviation = np.sqrt(np.maximum(batch_variance, 0.0) + epsilon)
    shift = (batch_mean - mean) / deviation
    scale = batch_deviation / deviation - 1.0
    return float(np.sqrt(np.mean(shift**2 + scale**2)))


def _average_batch_norm(network, dataset, batches) -> list:
    with (
        without_draws(network),
        changed_setting(network, layer_registry.BATCH_NORMS, "momentum") as norms,
    ):
        norms = [layer for layer in norms if layer.trainable]
        _refuse_shared(network, norms)
        before = [layer.get_weights() for layer in norms]
        for layer in norms:
            # A NaN in the old average would stay, even with a momentum of 0.
            layer.moving_mean.assign(tf.zeros_like(layer.moving_mean))
            layer.moving_variance.assign(tf.ones_like(layer.moving_variance))
        largest = 0
        for count, inputs in enumerate(input_batches(network, dataset, batches)):
            largest = max(largest, len(tf.nest.flatten(inputs)[0]))
            for layer in norms:
                # The moving average becomes that of all batches up to this one.
                layer.momentum = count / (count + 1)
            network(inputs, training=True)
    moved = []
    for layer, values in zip(norms, before, strict=True):
        if is_at_start(layer):  # Called with training=False.
            layer.set_weights(values)
        else:
            moved.append(layer)
    for layer in moved:
        for average in (layer.moving_mean, layer.moving_variance):
            if not tf.reduce_all(tf.math.is_finite(average)):
                raise ValueError(
                    "Batch statistics must be finite: look for NaN in the data. "
                    f"Received: {average.name} that is not"
                )
    require_values(moved, largest)
    return moved


def require_values(norms: Sequence[keras.layers.Layer], examples: int) -> None:
    """Refuses batches too small for statistics, and warns of small ones.

    `examples` is the number of examples in the largest batch.

    Raises:
        ValueError: If a layer sees only one value per channel in each batch.
    """
    counts = {layer.name: examples * _values_of_an_example(layer) for layer in norms}
    if not counts:
        return
    name, count = min(counts.items(), key=lambda item: item[1])
    if count < 2:
        raise ValueError(
            "Batch normalization must see several values per channel: take batches "
            "of more than one example. "
            f"Received: {name!r}, with one value in each batch"
        )
    if count < _FEW_VALUES:
        user_warnings.warn(
            f"Batch normalization should see at least {_FEW_VALUES} values per channel "
            "to give accurate measurements behind it: take larger batches. "
            f"Received: {name!r}, with {count} values in each batch",
            QuantizationWarning,
        )


def batch_normalized(network: keras.Model) -> list:
    """Returns the layers that use the batch's statistics in training."""
    fixed = {
        node.layer.name
        for node in graph.calls(network)
        if getattr(node, "call_kwargs", {}).get("training") is False
    }
    return [n for n in norms_of(network) if n.trainable and n.name not in fixed]


def is_at_start(layer: keras.layers.Layer) -> bool:
    """Tells whether the averages are still 0 and 1, which no batch produces exactly."""
    is_mean = tf.reduce_all(tf.equal(layer.moving_mean, 0.0))
    return bool(is_mean & tf.reduce_all(tf.equal(layer.moving_variance, 1.0)))


def _values_of_an_example(layer) -> int:
    """Returns the number of values of each channel; unknown sizes count as 2."""
    try:
        sizes = enumerate(layer.get_output_shape_at(0))
    except RuntimeError:  # Inside another layer, which has no graph.
        return 2
    return math.prod(s or 2 for axis, s in sizes if axis > 0 and axis not in layer.axis)


def _layers_called(network):
    """Yields each layer once per call by a network, also those of nested models."""
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
            "Batch normalization must be called only once in the network to be "
            f"measured. Received: {shared}, called more often"
        )
