"""Ranges from data, for the quantizers that need them."""

import functools
import math
import statistics

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.core import grid, ste
from tf_lowbit.quantizers.base import SMALLEST_RANGE

# Candidate clips as shares of the largest magnitude: dense enough that the best is
# within a few per cent, from far outliers (1/64) to no clipping.
_SHARES = 2.0 ** np.linspace(-6.0, 0.0, 49)
_MOST_SAMPLES = 1 << 17
# Of a weight tensor: so many in all, and of each channel no fewer than so many.
_MOST_WEIGHTS = 1 << 15
_LEAST_ROWS = 1 << 9
_QUANTILES = 1 << 12


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


def least_error_clip(
    samples, bits: int, *, signed: bool, narrow_range: bool = False
) -> float:
    """The clip whose quantization error on the samples is the smallest.

    The clip is the largest value of the grid: `step * n` or, signed, `step * Q_P`.

    Args:
        samples: list of float32 arrays.
        bits: of the grid; "not rounded" has the clip of 8 bits.
        signed: False measures the error against the ReLU of the samples.
        narrow_range: of the signed grid.

    Returns:
        The clip, positive. Of tied clips the largest.
    """
    values = thinned(samples)
    target = values if signed else np.maximum(values, 0.0)
    if float(np.abs(target).max()) <= SMALLEST_RANGE:
        return 1.0  # A dead activation: any clip serves, and 1 is a harmless one.
    largest = np.abs(target).max()
    return float(_search(target, largest, bits, signed, narrow_range, None))


def least_error_weight_clips(
    weights, bits: int, narrow_range: bool, channel_axes=None
) -> np.ndarray:
    """The clips of least squared error of a weight tensor, or of each of its channels.

    Large tensors are drawn down by a fixed seed, which may miss an outlier; that the
    clip is no larger than the largest magnitude holds for all.

    Args:
        weights: float array of any shape.
        bits: of the signed grid; "not rounded" has the clips of 8 bits.
        narrow_range: of the signed grid.
        channel_axes: a clip for each index along these axes; None for one in all.

    Returns:
        Float32 array: a scalar, or of the weights' rank with 1 off the channel axes.
        0 where all weights are 0.
    """
    weights = np.asarray(weights, np.float32)
    kept = sorted(axis % weights.ndim for axis in channel_axes or ())
    shape = tuple(d if i in kept else 1 for i, d in enumerate(weights.shape))
    # A column for each clip, a row for each weight that shares it.
    columns = np.moveaxis(weights, kept, range(-len(kept), 0))
    columns = columns.reshape(-1, math.prod(shape))
    largest = np.abs(columns).max(axis=0, keepdims=True)
    rows = max(_MOST_WEIGHTS // columns.shape[1], _LEAST_ROWS)
    if rows < len(columns):
        columns = columns[np.random.default_rng(0).integers(len(columns), size=rows)]
    clips = _search(columns, largest, bits, True, narrow_range, 0)
    return clips.reshape(shape if kept else ())


@functools.cache
def normal_clip(bits: int, signed: bool, narrow_range: bool = False) -> float:
    """The clip of least squared error of normally distributed values.

    Args:
        bits: of the grid; "not rounded" has the clip of 8 bits.
        signed: False for the ReLU of the values.
        narrow_range: of the signed grid.

    Returns:
        The clip, in standard deviations.
    """
    normal = statistics.NormalDist()
    values = [normal.inv_cdf((i + 0.5) / _QUANTILES) for i in range(_QUANTILES)]
    samples = [np.array(values, np.float32)]
    return least_error_clip(samples, bits, signed=signed, narrow_range=narrow_range)


def _search(target, largest, bits, signed, narrow_range, axis) -> np.ndarray:
    """The clips of least error over an axis (kept as 1), or over all (None)."""
    bits = tf.constant(min(bits, grid.MAX_BITS))
    best, least = largest, np.full(np.shape(largest), np.inf)
    for share in _SHARES[::-1]:
        clip = np.maximum(largest * share, SMALLEST_RANGE).astype(np.float32)
        values = _on_grid(tf.constant(target), clip, bits, signed, narrow_range).numpy()
        error = np.square(values - target, dtype=np.float64)
        error = error.mean(axis=axis, keepdims=axis is not None)
        best = np.where(error < least, clip, best)
        least = np.minimum(error, least)
    return np.where(largest == 0, 0.0, best).astype(np.float32)


def _on_grid(inputs, clip, bits, signed, narrow_range):
    if not signed:
        return ste.unsigned_forward(inputs, clip, bits)
    step = clip / grid.signed_limits(bits, narrow_range)[1]
    return grid.signed_codes(inputs / step, bits, narrow_range) * step


class FittedClip:
    """Of a quantizer with a clip that `calibrate` sets: what both kinds share.

    Attributes:
        clip_name: the name of the clip among the quantizer's variables.
    """

    clip_name: str

    def assign_bits(self, variables, bits):
        """Sets the bits and rescales the clip to them.

        The clip is multiplied by the ratio of the clips of least squared error that
        normally distributed values, or their ReLU, have at the new and at the old bits
        (ours). `calibrate` measures it anew.
        """
        old, new = int(variables["bits"].numpy()), grid.validate_bits(bits)
        clips = [normal_clip(k, self.signed, self.narrow_range) for k in (old, new)]
        clip = variables[self.clip_name]
        clip.assign(clip * (clips[1] / clips[0]))
        variables["bits"].assign(new)

    def calibrate(self, samples, variables):
        """Sets the clip to that of least squared error at the present bits (ours)."""
        clip = least_error_clip(
            samples,
            int(variables["bits"].numpy()),
            signed=self.signed,
            narrow_range=self.narrow_range,
        )
        variables[self.clip_name].assign(clip)
        self.mark_calibrated(variables)


def mean_magnitude(samples, *, signed: bool) -> float:
    """Mean |x| of the samples, or of their ReLU where `signed` is False."""
    values = thinned(samples).astype(np.float64)
    return float(np.abs(values if signed else np.maximum(values, 0.0)).mean())
