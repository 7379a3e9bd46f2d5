"""Ranges measured on data, for the quantizers that need them."""

import functools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.core import grid, ste
from tf_lowbit.quantizers.base import SMALLEST_RANGE, Variables

# Candidate clips as shares of the largest magnitude, from 1/64 (far outliers) to 1 (no
# clipping). The best is found within a few percent.
_SHARES = 2.0 ** np.linspace(-6.0, 0.0, 49)
_MOST_SAMPLES = 1 << 17
# At most so many weights of a tensor are used, but at least so many per channel.
_MOST_WEIGHTS = 1 << 15
_LEAST_ROWS = 1 << 9
_QUANTILES = 1 << 12
# Values that a search quantizes in one call.
_MOST_AT_ONCE = 1 << 20


def thinned(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Joins samples into one float32 vector, reduced by a fixed seed to at most 2^17.

    Raises:
        ValueError: If there are none, or one is not finite: a range computed from NaN
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
        # Random, not strided: a stride could skip some of the channels.
        chosen = np.random.default_rng(0).integers(values.size, size=_MOST_SAMPLES)
        chosen[0] = np.argmin(values)  # Callers ask whether any is negative.
        values = values[chosen]
    return values.astype(np.float32)


def least_error_clip(
    samples: Sequence[np.ndarray],
    bits: int,
    *,
    signed: bool,
    narrow_range: bool = False,
) -> float:
    """Returns the clip with the smallest squared quantization error on the samples.

    The clip is the largest value of the grid: `step * n` or, signed, `step * Q_P`. It
    is positive; of tied clips the largest.

    Args:
        samples: List of float32 arrays.
        bits: Bit-width of the grid; "not rounded" has the clip of 8 bits.
        signed: False measures the error against the ReLU of the samples.
        narrow_range: As in `grid.signed_limits`.
    """
    values = thinned(samples)
    target = values if signed else np.maximum(values, 0.0)
    if float(np.abs(target).max()) <= SMALLEST_RANGE:
        return 1.0  # All values are zero: any clip fits.
    largest = np.abs(target).max()
    return float(_search(target, largest, bits, signed, narrow_range, None))


def least_error_weight_clips(
    weights: np.ndarray,
    bits: int,
    narrow_range: bool,
    channel_axes: Sequence[int] | None = None,
) -> np.ndarray:
    """Returns the clips of least squared error of a weight tensor or of its channels.

    Of large tensors a random part, by a fixed seed, is measured, which may miss an
    outlier. No clip exceeds the largest magnitude of all weights that share it. The
    grid is signed; arguments are as in `least_error_clip`.

    Returns:
        Float32 array: a scalar, or with `channel_axes` of the weights' rank, with size
        1 on all other axes. 0 where all weights are 0.
    """
    weights = np.asarray(weights, np.float32)
    kept = sorted(axis % weights.ndim for axis in channel_axes or ())
    shape = tuple(d if i in kept else 1 for i, d in enumerate(weights.shape))
    # One column per clip, one row per weight that shares it.
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
    """Returns the clip of least squared error of normally distributed values.

    The clip is in standard deviations. If not `signed`, it is that of the ReLU of the
    values. Arguments are as in `least_error_clip`.
    """
    normal = statistics.NormalDist()
    values = [normal.inv_cdf((i + 0.5) / _QUANTILES) for i in range(_QUANTILES)]
    samples = [np.array(values, np.float32)]
    return least_error_clip(samples, bits, signed=signed, narrow_range=narrow_range)


def _search(target, largest, bits, signed, narrow_range, axis) -> np.ndarray:
    """Finds the clips of least error over an axis (kept as 1), or over all (None)."""
    bits = tf.constant(min(bits, grid.MAX_BITS))
    # Tries many clips per call if tensors are small: then the calls take the time.
    count = max(_MOST_AT_ONCE // target.size, 1) if signed else 1
    best, least = largest, np.full(np.shape(largest), np.inf)
    for start in range(0, len(_SHARES), count):
        clips = np.stack(
            [
                np.maximum(largest * share, SMALLEST_RANGE).astype(np.float32)
                for share in _SHARES[::-1][start : start + count]
            ]
        )
        wide = clips.reshape(-1, *(np.shape(largest) or (1,) * target.ndim))
        values = _on_grid(tf.constant(target), wide, bits, signed, narrow_range).numpy()
        errors = np.square(values - target, dtype=np.float64)
        over = tuple(range(1, errors.ndim)) if axis is None else axis + 1
        errors = errors.mean(axis=over, keepdims=axis is not None)
        for clip, error in zip(clips, errors, strict=True):
            best = np.where(error < least, clip, best)
            least = np.minimum(error, least)
    return np.where(largest == 0, 0.0, best).astype(np.float32)


def _on_grid(inputs, clip, bits, signed, narrow_range):
    if not signed:
        return ste.unsigned_forward(inputs, clip.item(), bits)[tf.newaxis]
    step = clip / grid.signed_limits(bits, narrow_range)[1]
    return grid.signed_codes(inputs / step, bits, narrow_range) * step


class FittedClip:
    """Base class of quantizers with one clip, which `calibrate` sets.

    Attributes:
        clip_name: Name of the clip among the quantizer's variables.
    """

    clip_name: str
    # Of the quantizer:
    signed: bool
    narrow_range: bool
    mark_calibrated: Callable[[Variables], None]

    def assign_bits(self, variables: Variables, bits: int) -> None:
        """Sets the bits and rescales the clip.

        The factor is the ratio of the clips of least squared error that normally
        distributed values (or their ReLU) have at the new and at the old bits.
        `calibrate` measures the clip again.
        """
        old, new = int(variables["bits"].numpy()), grid.validate_bits(bits)
        clips = [normal_clip(k, self.signed, self.narrow_range) for k in (old, new)]
        clip = variables[self.clip_name]
        clip.assign(clip * (clips[1] / clips[0]))
        variables["bits"].assign(new)

    def calibrate(self, samples: Sequence[np.ndarray], variables: Variables) -> None:
        """Sets the clip of least squared error at the current bits."""
        clip = least_error_clip(
            samples,
            int(variables["bits"].numpy()),
            signed=self.signed,
            narrow_range=self.narrow_range,
        )
        variables[self.clip_name].assign(clip)
        self.mark_calibrated(variables)


def mean_magnitude(samples: Sequence[np.ndarray], *, signed: bool) -> float:
    """Returns the mean |x| of the samples, or of their ReLU if not `signed`."""
    values = thinned(samples).astype(np.float64)
    return float(np.abs(values if signed else np.maximum(values, 0.0)).mean())
