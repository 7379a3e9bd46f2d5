"""How TFLite's kernels turn an int32 accumulator into a code.

Three of them, found by running every accumulator of small layers through the real ones
(a test does so again):

- "xnnpack": `rint(float32(acc) * M)` with the float32 `M = (s_in * s_w) / s_out`, half
  to even. XNNPACK on x86; what `tf.lite.Interpreter` delegates int8 layers to.
- "builtin": TFLite's own kernels. `M` in float64 becomes a 31-bit multiplier `q` and a
  shift; `round(acc * q / 2^31)`, then a rounding shift, both half up. A depthwise
  convolution handles 8 channels at a time, and rounds the ties of the second one away
  from zero in those that are left over (`rounds_away`).
- "tflm": TFLite Micro's reference kernels. As "builtin", with the ties of the second
  rounding away from zero in all channels of all operators.

The zero point is added behind the rounding in all, so that codes here have none.
"""

import numpy as np

from tf_lowbit.compat import tf

XNNPACK = "xnnpack"
BUILTIN = "builtin"
TFLM = "tflm"
# Those of TFLite's interpreter.
KERNELS = (XNNPACK, BUILTIN)
INT32_MAX = 2**31 - 1


def multiplier(kernel: str, input_scale, weight_scales, output_scale):
    """`M`, as the kernel computes it from the file's float32 scales.

    Args:
        kernel: one of the above.
        input_scale: float32 scalar.
        weight_scales: float32, one for each channel.
        output_scale: float32 scalar.

    Returns:
        One for each channel: float32 for XNNPACK, else float64.
    """
    dtype = np.float32 if kernel == XNNPACK else np.float64
    scales = [
        np.asarray(np.float32(s), dtype)
        for s in (input_scale, weight_scales, output_scale)
    ]
    return scales[0] * scales[1] / scales[2]


def fixed_point(multipliers):
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
    """Channels whose builtin kernel rounds ties away from zero, not up.

    Args:
        is_depthwise: whether the operator is a depthwise convolution.
        channels: of the output.

    Returns:
        Bool vector of `channels`.
    """
    return np.arange(channels) >= (
        channels - channels % 8 if is_depthwise else channels
    )


def largest_accumulator(kernel: str, multipliers) -> np.ndarray:
    """The largest magnitude that a kernel computes right: the builtin one shifts left.

    Args:
        kernel: one of the above.
        multipliers: from `multiplier`.

    Returns:
        Int64 array of the multipliers' shape.
    """
    if kernel == XNNPACK:
        return np.full(np.shape(multipliers), INT32_MAX, np.int64)
    return INT32_MAX >> np.maximum(fixed_point(multipliers)[1], 0)


def requantize(kernel: str, accumulators, multipliers, low: int, high: int, away=False):
    """Codes of accumulators: what the kernel computes, in NumPy.

    Args:
        kernel: one of the above.
        accumulators: int64 array within `largest_accumulator`, bias included.
        multipliers: from `multiplier`, broadcastable.
        low: lowest code.
        high: highest code.
        away: bool, broadcastable: from `rounds_away`. Only the builtin kernel's: that
            of TFLM rounds away in all channels.

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
    # One less than half: ties of negative numbers go down.
    half = half - ((away | (kernel == TFLM)) & (high_part < 0) & (right > 0))
    return np.clip((high_part + half) >> right, low, high)


def stored(kernel: str, multipliers) -> np.ndarray:
    """What `requantize_tensor` wants of multipliers.

    Args:
        kernel: one of the above.
        multipliers: from `multiplier`, one for each channel.

    Returns:
        Float32 as they are for XNNPACK; else int64 of shape (2, channels): q and shift.
    """
    if kernel == XNNPACK:
        return np.asarray(multipliers, np.float32)
    return np.stack(fixed_point(multipliers))


def requantize_tensor(
    kernel: str, accumulators, multipliers, low: int, high: int, away=False
):
    """`requantize` in TensorFlow.

    Args:
        kernel: one of the above.
        accumulators: float tensor of integers within int32, exact in its dtype.
        multipliers: tensor of what `stored` gives.
        low: lowest code.
        high: highest code.
        away: from `rounds_away`, or False for none.

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
