"""Packing of unsigned integers of 1 to 8 bits into bytes, and unpacking.

Values follow one another without gaps, least significant bit first. As one
little-endian number, the bytes are

    sum(values[i] * 2**(i * bits)).

So bit `b` of the stream is bit `b % 8`, from the least significant, of byte `b // 8`,
and value `i` occupies the bits `i * bits` to `i * bits + bits - 1`. At 4 bits, the
first value is in the low nibble. Values can cross byte boundaries if `bits` does not
divide 8. The bits behind the last value, up to the end of its byte, are 0.
"""

import math
from collections.abc import Sequence

import numpy as np

from tf_lowbit.core import checks

_BYTE = 8


def pack(values: np.typing.ArrayLike, bits: int) -> np.ndarray:
    """Packs unsigned integers into bytes.

    >>> pack([1, 2, 3], bits=4)  # 0x21, 0x03
    array([33,  3], dtype=uint8)

    Args:
        values: Integers of any shape in [0, 2**bits - 1], packed in C order.
        bits: int in [1, 8].

    Returns:
        uint8 array of shape (ceil(size * bits / 8),), in the module's bit order.

    Raises:
        ValueError: If `bits` or `values` are not integers or out of range.
    """
    bits = _check_bits(bits)
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"values must be integers. Received: values of dtype {values.dtype}"
        )
    largest = 2**bits - 1
    if values.size and (values.min() < 0 or values.max() > largest):
        raise ValueError(
            f"values must be in [0, {largest}] to fit into {bits} bits. "
            f"Received: values from {values.min()} to {values.max()}"
        )
    flat = values.astype(np.uint8).reshape(-1, 1)
    stream = np.unpackbits(flat, axis=1, count=bits, bitorder="little")
    return np.packbits(stream, bitorder="little")


def unpack(packed: np.ndarray, bits: int, shape: Sequence[int]) -> np.ndarray:
    """Inverts `pack`: `unpack(pack(v, bits), bits, v.shape) == v`.

    >>> unpack(np.array([33, 3], np.uint8), bits=4, shape=(3,))
    array([1, 2, 3], dtype=uint8)

    Args:
        packed: uint8 array of shape (ceil(size * bits / 8),) for `size` values.
        bits: int in [1, 8].
        shape: Shape of the values.

    Returns:
        uint8 array of shape `shape`, in [0, 2**bits - 1].

    Raises:
        ValueError: If an argument is not as above, or a bit behind the last value is
            not 0.
    """
    bits = _check_bits(bits)
    is_sequence = isinstance(shape, Sequence) and not isinstance(shape, str)
    if not is_sequence or not all(
        checks.is_integer(size) and size >= 0 for size in shape
    ):
        raise ValueError(
            f"shape must be a sequence of integers of at least 0. Received: {shape=}"
        )
    shape = tuple(int(size) for size in shape)
    used = math.prod(shape) * bits
    length = -(-used // _BYTE)
    packed = np.asarray(packed)
    if packed.dtype != np.uint8 or packed.shape != (length,):
        raise ValueError(
            f"packed must be uint8 of shape ({length},) to hold {math.prod(shape)} "
            f"values of {bits} bits. Received: {packed.dtype} of shape {packed.shape}"
        )
    stream = np.unpackbits(packed, bitorder="little")
    if stream[used:].any():
        raise ValueError(
            f"packed must be 0 in the {_BYTE * length - used} bits behind its last "
            f"value. Received: a last byte of {packed[-1]:#04x}"
        )
    flat = np.packbits(stream[:used].reshape(-1, bits), axis=1, bitorder="little")
    return flat.reshape(shape)


def _check_bits(bits) -> int:
    if not checks.is_integer(bits) or not 1 <= bits <= _BYTE:
        raise ValueError(f"bits must be an integer in [1, {_BYTE}]. Received: {bits=}")
    return int(bits)
