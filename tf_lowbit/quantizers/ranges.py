"""Ranges from data, for the quantizers that need them."""

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.core import ste
from tf_lowbit.quantizers.base import SMALLEST_RANGE

# Candidate clips as shares of the largest magnitude: dense enough that the best is
# within a few per cent, from far outliers (1/64) to no clipping.
_SHARES = 2.0 ** np.linspace(-6.0, 0.0, 49)
_MOST_SAMPLES = 1 << 17


def thinned(samples) -> np.ndarray:
    """All samples in one float32 vector, drawn down to at most 2^17 by a fixed seed.

    Args:
        samples: list of arrays of any shape.

    Raises:
        ValueError: if there are none, or one is not finite: a range made from NaN
            would hide where it comes from.
    """
    values = np.concatenate([np.ravel(s) for s in samples] or [np.zeros(0)])
    if values.size == 0:
        raise ValueError("Calibration needs at least one value. Received: none")
    if not np.isfinite(values).all():
        raise ValueError(
            "Calibration needs finite values. Received: "
            f"{int((~np.isfinite(values)).sum())} of {values.size} are NaN or inf"
        )
    if values.size > _MOST_SAMPLES:
        # Drawn, not strided: a stride could meet only some of the channels.
        chosen = np.random.default_rng(0).integers(values.size, size=_MOST_SAMPLES)
        chosen[0] = np.argmin(values)  # Whether there is a negative one is asked.
        values = values[chosen]
    return values.astype(np.float32)


def least_error_clip(samples, quantize, *, signed: bool) -> float:
    """The clip whose quantization error on the samples is the smallest.

    Args:
        samples: list of float32 arrays.
        quantize: function (tensor, clip) -> quantized tensor.
        signed: False measures the error against the ReLU of the samples.

    Returns:
        The clip, positive. Of tied clips the largest.
    """
    values = thinned(samples)
    target = values if signed else np.maximum(values, 0.0)
    largest = float(np.abs(target).max())
    if largest <= SMALLEST_RANGE:
        return 1.0  # A dead activation: any clip serves, and 1 is a harmless one.
    best, least = largest, np.inf
    for share in _SHARES[::-1]:
        clip = np.float32(largest * share)
        error = tf.reduce_mean(tf.square(quantize(tf.constant(target), clip) - target))
        if float(error) < least:
            best, least = float(clip), float(error)
    return best


def least_error_relu_clip(samples, bits: int) -> float:
    """`least_error_clip` of a quantized ReLU at so many bits."""
    bits = tf.constant(bits)
    return least_error_clip(
        samples, lambda x, clip: ste.unsigned_forward(x, clip, bits), signed=False
    )


def mean_magnitude(samples, *, signed: bool) -> float:
    """Mean |x| of the samples, or of their ReLU where `signed` is False."""
    values = thinned(samples).astype(np.float64)
    return float(np.abs(values if signed else np.maximum(values, 0.0)).mean())
