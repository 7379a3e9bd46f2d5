"""The grids of this library, each defined once: codes, steps and values.

Every quantizer maps a real tensor to integer **codes** and back to **values**,

    value = code * step,

with `step` in float32. Training, export and report all read this module, so that
they cannot disagree. The bit-width `k` may be a Python int or an int32 tensor;
assigning a variable that holds it changes the grid without a retrace.

| grid | codes at k bits | levels | used by |
|---|---|---|---|
| unsigned | 0, 1, ..., n | n + 1 | activations after a ReLU |
| odd | -n, -n + 2, ..., n | n + 1, no zero | DoReFa weights |
| signed | -2^(k-1) + narrow, ..., 2^(k-1) - 1 | 2^k - narrow | LSQ, uniform |

with `n = 2^k - 1`. At k = 1 the signed grid is {-1, +1}, since {-1, 0} and {0}
serve nothing. 16 and 32 bits mean "not rounded": they are carried out as 24 bits,
which is the resolution of float32 itself, so that one formula serves every k.
"""

from tf_lowbit.compat import tf
from tf_lowbit.core import checks

MAX_BITS = 8
UNROUNDED_BITS = (16, 32)
ALLOWED_BITS = (*range(1, MAX_BITS + 1), *UNROUNDED_BITS)

# The bits of a float32 significand: n = 2^24 - 1 is the finest exact integer grid.
_FLOAT32_BITS = 24
# Codes of the signed grid stay below 2^7; 16 more bits fill the significand.
_UNROUNDED_FINENESS = 2.0**16


def validate_bits(bits, name: str = "bits") -> int:
    """Returns `bits` as an int, or raises an error that says what is allowed.

    Args:
        bits: the bit-width: an integer in [1, 8], or 16 or 32 for "not rounded".
        name: how the error message names the argument.

    Raises:
        ValueError: for anything else; also for bool, str and float.
    """
    if not checks.is_integer(bits) or int(bits) not in ALLOWED_BITS:
        raise ValueError(
            f"{name} must be an integer in [1, {MAX_BITS}], or 16 or 32 for 'not "
            f"rounded'. Received: {name}={bits!r}"
        )
    return int(bits)


def effective_bits(bits):
    """The bits that the arithmetic runs at: k for k <= 8, else 24.

    Args:
        bits: scalar int or int32 tensor.

    Returns:
        Scalar int32 tensor.
    """
    bits = tf.convert_to_tensor(bits, tf.int32)
    # No `tf.where`: on a GPU its int32 result is in device memory, and the fused
    # quantizers read bits on the host. Integer arithmetic stays there.
    is_float = tf.minimum(tf.maximum(bits - MAX_BITS, 0), 1)
    return tf.minimum(bits, MAX_BITS) + (_FLOAT32_BITS - MAX_BITS) * is_float


def unsigned_limit(bits):
    """The largest code `n = 2^k - 1` of the unsigned and of the odd grid.

    Args:
        bits: scalar int or int32 tensor.

    Returns:
        Scalar float32 tensor; exact, since n < 2^24.
    """
    # A shift, not a power: `2.0 ** k` need not be exact on every device.
    return tf.cast(tf.bitwise.left_shift(1, effective_bits(bits)) - 1, tf.float32)


def unsigned_step(limit, bits):
    """The step `limit / n` of the unsigned grid on [0, limit].

    Args:
        limit: scalar float or float32 tensor, positive: the upper clip.
        bits: scalar int or int32 tensor.

    Returns:
        Scalar float32 tensor, in the unit of `limit`.
    """
    return tf.convert_to_tensor(limit, tf.float32) / unsigned_limit(bits)


def unsigned_codes(inputs, limit, bits):
    """Codes of the unsigned grid: `round(clip(x, 0, limit) * n / limit)`.

    Half to even. The product is taken with `n / limit`, as the fused kernel does.

    Args:
        inputs: float32 tensor of any shape. NaN stays NaN.
        limit: scalar, positive: the upper clip.
        bits: scalar int or int32 tensor.

    Returns:
        Float32 tensor of the same shape, integers in [0, n].
    """
    limit = tf.convert_to_tensor(limit, tf.float32)
    scale = unsigned_limit(bits) / limit
    return tf.round(tf.clip_by_value(inputs, 0.0, limit) * scale)


def odd_step(bits):
    """The step `1 / n` of the odd grid, which always spans [-1, 1].

    Args:
        bits: scalar int or int32 tensor.

    Returns:
        Scalar float32 tensor.
    """
    return 1.0 / unsigned_limit(bits)


def odd_codes(unit, bits):
    """Codes of the odd grid: `2 round(n u) - n` for u in [0, 1], half to even.

    Args:
        unit: float32 tensor of any shape, in [0, 1]. NaN stays NaN.
        bits: scalar int or int32 tensor.

    Returns:
        Float32 tensor of the same shape, odd integers in [-n, n].
    """
    n = unsigned_limit(bits)
    return 2.0 * tf.round(n * unit) - n


def signed_limits(bits, narrow_range: bool):
    """The magnitudes (Q_N, Q_P) of the lowest and the highest signed code.

    Args:
        bits: scalar int or int32 tensor. "Not rounded" has the limits of 8 bits.
        narrow_range: drop the lowest code, so that the grid is symmetric.

    Returns:
        Two scalar float32 tensors, both positive; (1, 1) at one bit.
    """
    bits = tf.minimum(tf.convert_to_tensor(bits, tf.int32), MAX_BITS)
    half = tf.cast(tf.bitwise.left_shift(1, bits - 1), tf.float32)
    positive = tf.maximum(half - 1.0, 1.0)
    return (positive if narrow_range else half), positive


def signed_codes(scaled, bits, narrow_range: bool, rounding_bits=None):
    """Codes of the signed grid: `round(clip(v, -Q_N, Q_P))`, half to even.

    At one bit: +1 where v >= 0, else -1.

    Args:
        scaled: float32 tensor `v = x / step` of any shape. NaN stays NaN.
        bits: scalar int or int32 tensor.
        narrow_range: as in `signed_limits`.
        rounding_bits: scalar int or int32 tensor: `bits` (also where None), or 16 or
            32 to clip to the limits of `bits` without rounding.

    Returns:
        Float32 tensor of the same shape: integers in [-Q_N, Q_P], or the clipped
        `v` itself (to 2^-17 of a step) where the bits say "not rounded".
    """
    bits = tf.convert_to_tensor(bits, tf.int32)
    negative, positive = signed_limits(bits, narrow_range)
    clipped = tf.clip_by_value(scaled, -negative, positive)
    if rounding_bits is not None:
        bits = tf.convert_to_tensor(rounding_bits, tf.int32)
    fineness = tf.where(bits > MAX_BITS, _UNROUNDED_FINENESS, 1.0)
    rounded = tf.round(clipped * fineness) / fineness
    # Neither comparison holds for a NaN, which so stays what it is.
    binary = tf.where(clipped >= 0.0, 1.0, tf.where(clipped < 0.0, -1.0, clipped))
    return tf.where(bits == 1, binary, rounded)


def level_codes(
    bits: int, *, signed: bool, narrow_range: bool = False, odd: bool = False
) -> range:
    """All codes of a grid at `bits` in [1, 8], ascending.

    Args:
        bits: int in [1, 8].
        signed: the signed grid; False for the unsigned one.
        narrow_range: as in `signed_limits`.
        odd: the odd grid, whatever the others say.

    Raises:
        ValueError: if `bits` is out of [1, 8].
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
