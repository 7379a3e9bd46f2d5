"""Batch normalisation and quantizers: what is measured on data and not trained."""

import itertools
import math

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
        tensor.variables
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
            name
            for network in networks
            for name in _average_batch_norm(network, dataset, batches)
        ]


def _average_batch_norm(network, dataset, batches) -> list[str]:
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
        for count, inputs in enumerate(input_batches(dataset, batches)):
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
        if largest * _values_of_an_example(layer) < 2:
            raise ValueError(
                "Batch normalisation must see several values of a channel: take "
                "batches of more than one example. "
                f"Received: {layer.name!r}, with one value in each batch"
            )
    return [layer.name for layer in norms]


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
