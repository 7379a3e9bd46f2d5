"""Requantization of int32 accumulators to codes, as TFLite's kernels compute it.

The rounding of three kernels was found by running every accumulator of small layers
through them. A test repeats this.

- "xnnpack": XNNPACK on x86, to which `tf.lite.Interpreter` delegates int8 layers.
  `rint(float32(acc) * M)` with the float32 `M = (s_in * s_w) / s_out`, half to even.
- "builtin": TFLite's own kernels. The float64 `M` becomes a 31-bit multiplier `q` and a
  shift: `round(acc * q / 2^31)`, then a rounding shift, both half up. A depthwise
  convolution takes 8 channels at a time; in the channels left over, the second
  rounding is half away from zero (`rounds_away`).
- "tflm": TFLite Micro's reference kernels. As "builtin", but the second rounding is
  half away from zero in all channels of all operators.

All add the zero point after rounding, so codes here have no zero point.
"""

import numpy as np

from tf_lowbit.compat import tf

XNNPACK = "xnnpack"
BUILTIN = "builtin"
TFLM = "tflm"
# Kernels of TFLite's interpreter.
KERNELS = (XNNPACK, BUILTIN)
INT32_MAX = 2**31 - 1


def multiplier(
    kernel: str, input_scale: float, weight_scales: np.ndarray, output_scale: float
) -> np.ndarray:
    """The requantization multiplier `M` that a kernel computes from float32 scales.

    Args:
        kernel: One of the above.
        input_scale: float32 scalar.
        weight_scales: float32 [channels].
        output_scale: float32 scalar.

    Returns:
        [channels], float32 for XNNPACK, else float64.
    """
    dtype = np.float32 if kernel == XNNPACK else np.float64
    scales: list[np.ndarray] = [
        np.asarray(np.float32(s), dtype)
        for s in (input_scale, weight_scales, output_scale)
    ]
    return scales[0] * scales[1] / scales[2]


def fixed_point(multipliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """TFLite's `QuantizeMultiplier`: `M = q / 2^31 * 2^shift`, q in [2^30, 2^31).

    Args:
        multipliers: float64 array, positive.

    Returns:
        Two int64 arrays: q and shift.
    """
    mantissa, shift = np.frexp(np.asarray(multipliers, np.float64))
    q = np.floor(mantissa * 2.0**31 + 0.5).astype(np.int64)
    overflown = q == 2**31
    return np.where(overflown, 2**30, q), shift.astype(np.int64) + overflown


def rounds_away(is_depthwise: bool, channels: int) -> np.ndarray:
    """Whether the builtin kernel rounds ties away from zero, not up, in each channel.

    Args:
        is_depthwise: Whether the operator is a depthwise convolution.
        channels: Number of output channels.

    Returns:
        Bool [channels].
    """
    left_over = channels % 8 if is_depthwise else 0
    return np.arange(channels) >= channels - left_over


def largest_accumulator(kernel: str, multipliers: np.ndarray) -> np.ndarray:
    """The largest accumulator magnitude that does not overflow in a kernel.

    Other kernels than XNNPACK shift accumulators left if `M` is 1 or more.

    Args:
        kernel: One of the above.
        multipliers: From `multiplier`.

    Returns:
        Int64 array of the multipliers' shape.
    """
    if kernel == XNNPACK:
        return np.full(np.shape(multipliers), INT32_MAX, np.int64)
    return INT32_MAX >> np.maximum(fixed_point(multipliers)[1], 0)


def requantize(
    kernel: str,
    accumulators: np.ndarray,
    multipliers: np.ndarray,
    low: int,
    high: int,
    away: np.ndarray | bool = False,
) -> np.ndarray:
    """The codes of accumulators, computed as by the kernel, in NumPy.

    Args:
        kernel: One of the above.
        accumulators: int64 array within `largest_accumulator`, bias included.
        multipliers: From `multiplier`, broadcastable.
        low: Lowest code.
        high: Highest code.
        away: bool, broadcastable, from `rounds_away`; for the builtin kernel only.

    Returns:
        Int64 array of the broadcast shape.
    """
    if kernel == XNNPACK:
        scaled = np.asarray(accumulators).astype(np.float32) * multipliers
        return np.clip(np.rint(scaled), low, high).astype(np.int64)
    q, shift = fixed_point(multipliers)
    left, right = np.maximum(shift, 0), np.maximum(-shift, 0)
    high_part = ((np.asarray(accumulators) << left) * q + (1 << 30)) >> 31
    half = np.where(right > 0, 1 << np.maximum(right - 1, 0), 0)
    # Slightly less than half: ties of negative numbers go down, away from zero.
    half = half - ((away | (kernel == TFLM)) & (high_part < 0) & (right > 0))
    return np.clip((high_part + half) >> right, low, high)


def stored(kernel: str, multipliers: np.ndarray) -> np.ndarray:
    """Multipliers in the form that `requantize_tensor` takes.

    Args:
        kernel: One of the above.
        multipliers: From `multiplier`, [channels].

    Returns:
        Float32 [channels] for XNNPACK; else int64 [2, channels], q and shift.
    """
    if kernel == XNNPACK:
        return np.asarray(multipliers, np.float32)
    return np.stack(fixed_point(multipliers))


def requantize_tensor(
    kernel: str,
    accumulators: tf.Tensor,
    multipliers: tf.Tensor,
    low: int,
    high: int,
    away: np.ndarray | bool = False,
) -> tf.Tensor:
    """`requantize` in TensorFlow.

    Args:
        kernel: One of the above.
        accumulators: float tensor of int32 integers, exact in its dtype.
        multipliers: Tensor, from `stored`; the other arguments are as in `requantize`.

    Returns:
        Float32 tensor of integers, of the accumulators' shape.
    """
    if kernel == XNNPACK:
        scaled = tf.cast(accumulators, tf.float32) * multipliers
        return tf.round(tf.clip_by_value(scaled, float(low), float(high)))
    q, shift = multipliers[0], multipliers[1]
    one = tf.ones((), tf.int64)
    left, right = tf.maximum(shift, 0), tf.maximum(-shift, 0)
    half = tf.where(
        right > 0, tf.bitwise.left_shift(one, tf.maximum(right - 1, 0)), 0 * one
    )
    product = tf.cast(accumulators, tf.int64) * (tf.bitwise.left_shift(one, left) * q)
    high_part = tf.bitwise.right_shift(product + (1 << 30), 31 * one)
    is_down = (away | (kernel == TFLM)) & (high_part < 0) & (right > 0)
    half -= tf.cast(is_down, tf.int64)
    codes = tf.bitwise.right_shift(high_part + half, right)
    return tf.cast(tf.clip_by_value(codes, low, high), tf.float32)
