"""The grids of this library, each defined once: codes, steps and values.

Every quantizer maps a real tensor to integer **codes** and back to **values**,

    value = code * step,

with `step` in float32. Training, export and report all read this module, so that they
cannot disagree.

| grid | codes at k bits | levels | used by |
|---|---|---|---|
| unsigned | 0, 1, ..., n | n + 1 | activations after a ReLU |
| odd | -n, -n + 2, ..., n | n + 1, no zero | DoReFa weights |
| signed | -2^(k-1) + narrow, ..., 2^(k-1) - 1 | 2^k - narrow | LSQ, uniform |

with `n = 2^k - 1`. At k = 1 the signed grid is {-1, +1}, since {-1, 0} and {0} would be
useless. 16 and 32 bits mean "not rounded". They are computed as 24 bits, the resolution
of float32, so that one formula serves every k.

`bits` is a Python int or a scalar int32 tensor. If it is read from a variable,
assigning the variable changes the grid without a retrace. Rounding is half to even. NaN
stays NaN.
"""

from typing import Any

from tf_lowbit.compat import tf
from tf_lowbit.core import checks

MAX_BITS = 8
UNROUNDED_BITS = (16, 32)
ALLOWED_BITS = (*range(1, MAX_BITS + 1), *UNROUNDED_BITS)

# The bits of a float32 significand: n = 2^24 - 1 is the finest exact integer grid.
_FLOAT32_BITS = 24
# Signed codes stay within 2^7; 16 more bits fill the significand.
_UNROUNDED_FINENESS = 2.0**16


def validate_bits(bits: Any, name: str = "bits") -> int:
    """Checks a bit-width.

    Args:
        bits: Integer in [1, 8], or 16 or 32 for "not rounded".
        name: Name of the argument, for the message.

    Returns:
        `bits` as an int.

    Raises:
        ValueError: If `bits` is anything else, also a bool, str or float.
    """
    if not checks.is_integer(bits) or int(bits) not in ALLOWED_BITS:
        raise ValueError(
            f"{name} must be an integer in [1, {MAX_BITS}], or 16 or 32 for 'not "
            f"rounded'. Received: {name}={bits!r}"
        )
    return int(bits)


def effective_bits(bits: int | tf.Tensor) -> tf.Tensor:
    """Returns the bits that the arithmetic uses, int32: k for k <= 8, else 24."""
    bits = tf.convert_to_tensor(bits, tf.int32)
    # No `tf.where`: a GPU would put its int32 result in device memory, but the fused
    # quantizers read bits on the host. Integer arithmetic stays on the host.
    is_float = tf.minimum(tf.maximum(bits - MAX_BITS, 0), 1)
    return tf.minimum(bits, MAX_BITS) + (_FLOAT32_BITS - MAX_BITS) * is_float


def unsigned_limit(bits: int | tf.Tensor) -> tf.Tensor:
    """Returns `n = 2^k - 1`, the largest code of the unsigned and the odd grid.

    A scalar float32 tensor, exact since n < 2^24.
    """
    # A shift, not a power: `2.0 ** k` need not be exact on every device.
    return tf.cast(tf.bitwise.left_shift(1, effective_bits(bits)) - 1, tf.float32)


def unsigned_step(limit: float | tf.Tensor, bits: int | tf.Tensor) -> tf.Tensor:
    """Returns the step `limit / n` of the unsigned grid on [0, limit].

    A scalar float32 tensor, in the unit of the positive scalar `limit`.
    """
    return tf.convert_to_tensor(limit, tf.float32) / unsigned_limit(bits)


def unsigned_codes(
    inputs: tf.Tensor, limit: float | tf.Tensor, bits: int | tf.Tensor
) -> tf.Tensor:
    """Returns codes of the unsigned grid: `round(clip(x, 0, limit) * n / limit)`.

    `n / limit` is computed first, as in the fused kernel. The inputs are a float32
    tensor of any shape; the codes have its shape and are float32 integers in [0, n].
    """
    limit = tf.convert_to_tensor(limit, tf.float32)
    scale = unsigned_limit(bits) / limit
    return tf.round(tf.clip_by_value(inputs, 0.0, limit) * scale)


def odd_step(bits: int | tf.Tensor) -> tf.Tensor:
    """Returns the step `1 / n` of the odd grid on [-1, 1]: a scalar float32 tensor."""
    return 1.0 / unsigned_limit(bits)


def odd_codes(unit: tf.Tensor, bits: int | tf.Tensor) -> tf.Tensor:
    """Returns codes of the odd grid: `2 round(n u) - n`.

    The unit `u` is a float32 tensor of any shape, in [0, 1]. The codes have its shape
    and are odd float32 integers in [-n, n].
    """
    n = unsigned_limit(bits)
    return 2.0 * tf.round(n * unit) - n


def signed_limits(
    bits: int | tf.Tensor, narrow_range: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the magnitudes (Q_N, Q_P) of the lowest and the highest signed code.

    Two positive scalar float32 tensors; (1, 1) at one bit. "Not rounded" has the limits
    of 8 bits. `narrow_range` drops the lowest code, for a symmetric grid.
    """
    bits = tf.minimum(tf.convert_to_tensor(bits, tf.int32), MAX_BITS)
    half = tf.cast(tf.bitwise.left_shift(1, bits - 1), tf.float32)
    positive = tf.maximum(half - 1.0, 1.0)
    return (positive if narrow_range else half), positive


def signed_codes(
    scaled: tf.Tensor,
    bits: int | tf.Tensor,
    narrow_range: bool,
    rounding_bits: int | tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns codes of the signed grid: `round(clip(v, -Q_N, Q_P))`.

    At one bit: +1 where v >= 0, else -1.

    Args:
        scaled: The `v = x / step`: float32 tensor of any shape.
        bits: Bit-width.
        narrow_range: As in `signed_limits`.
        rounding_bits: `bits` (the default), or 16 or 32 to clip to the limits of `bits`
            without rounding.

    Returns:
        Float32 tensor of the same shape: integers in [-Q_N, Q_P]; for "not rounded" the
        clipped `v` itself, to 2^-17 of a step.
    """
    bits = tf.convert_to_tensor(bits, tf.int32)
    negative, positive = signed_limits(bits, narrow_range)
    clipped = tf.clip_by_value(scaled, -negative, positive)
    if rounding_bits is not None:
        bits = tf.convert_to_tensor(rounding_bits, tf.int32)
    fineness = tf.where(bits > MAX_BITS, _UNROUNDED_FINENESS, 1.0)
    rounded = tf.round(clipped * fineness) / fineness
    # Both comparisons are false for NaN, which therefore stays NaN.
    binary = tf.where(clipped >= 0.0, 1.0, tf.where(clipped < 0.0, -1.0, clipped))
    return tf.where(bits == 1, binary, rounded)


def level_codes(
    bits: int, *, signed: bool, narrow_range: bool = False, odd: bool = False
) -> range:
    """Returns all codes of a grid at 1 to 8 bits, ascending.

    `odd` overrides `signed`; neither means the unsigned grid.

    Raises:
        ValueError: If `bits` is not in [1, 8].
    """
    bits = validate_bits(bits)
    if bits > MAX_BITS:
        raise ValueError(
            f"bits must be in [1, {MAX_BITS}] to have levels. Received: bits={bits}"
        )
    n = 2**bits - 1
    if odd or (signed and bits == 1):
        return range(-n, n + 1, 2)
    if not signed:
        return range(n + 1)
    half = 2 ** (bits - 1)
    return range(-half + int(narrow_range), half)
