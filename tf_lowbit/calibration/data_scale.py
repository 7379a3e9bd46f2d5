"""Compares the scale of calibration data with that of the float training's."""

from typing import Any

import numpy as np

from tf_lowbit.calibration.batch_norm import is_at_start, statistics_of
from tf_lowbit.compat import deep_graphs, keras, tf
from tf_lowbit.core import user_warnings
from tf_lowbit.network import graph, inspection, layer_registry
from tf_lowbit.scheme.layout import QuantizationWarning

# Data have another scale than the training's if deviations differ by this factor. For
# a network trained on 0 to 1, undivided pixels give 255.
_OTHER_SCALE = 16.0


def warn_of_other_scale(network: keras.Model, inputs: Any) -> None:
    """Warns if a batch has another scale than the data of the float training.

    What the first normalization reads is compared with its moving statistics. Nothing
    is known without a normalization, or behind quantizers that change the scale, as
    DoReFa's do.

    Args:
        network: Calibrated network.
        inputs: Inputs of one batch.
    """
    norms = layer_registry.BATCH_NORMS
    node = next((n for n in graph.calls(network) if isinstance(n.layer, norms)), None)
    if node is None or is_at_start(node.layer):
        return
    layer = node.layer
    if getattr(layer, "virtual_batch_size", None) is not None:
        return  # Its axes are those of another shape.
    with deep_graphs():
        # Not `inputs`: a dict's keys may differ from the layers' names.
        reads = keras.Model(network.input, node.keras_inputs[0])
    if any(map(_changes_scale, inspection.quantized_tensors(reads))):
        return
    values = tf.cast(reads(inputs, training=False), tf.float32).numpy()
    kept = {axis % values.ndim for axis in layer.axis}
    axes = tuple(axis for axis in range(values.ndim) if axis not in kept)
    mean, variance = (statistic.ravel() for statistic in statistics_of(layer))
    varies = variance > np.finfo(np.float32).tiny  # Others are dead channels.
    if not varies.any():
        return
    deviation = np.sqrt(variance[varies])
    spread = np.median(values.std(axis=axes).ravel()[varies] / deviation)
    away = np.abs(values.mean(axis=axes).ravel() - mean)[varies]
    shift = np.median(away / deviation)
    if 1 / _OTHER_SCALE < spread < _OTHER_SCALE and shift < _OTHER_SCALE:
        return
    user_warnings.warn(
        "Data must have the scale of the float network's training data, such as 0 to "
        "1 or 0 to 255, or the ranges will not fit the training. Received: data of "
        f"which {layer.name!r} reads values with {spread:.2g} times the deviation of "
        f"its moving statistics, and a mean {shift:.2g} deviations away",
        QuantizationWarning,
    )


def _changes_scale(tensor) -> bool:
    """Tells whether a quantizer's values have another scale than what it rounds."""
    if tensor.latent is None:
        return tensor.quantizer.has_fixed_clip
    before, after = np.std(tensor.latent), np.std(tensor.quantized())
    return not 0.5 * before < after < 2.0 * before
