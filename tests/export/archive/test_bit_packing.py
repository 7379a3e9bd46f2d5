"""Packing against bytes written by hand, and against Python's big integers."""

import doctest
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tf_lowbit.export.archive import bit_packing

BITS = range(1, 9)


@st.composite
def cases(draw):
    """(bits, values in range, of any shape)."""
    bits = draw(st.integers(1, 8))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    elements = st.integers(0, 2**bits - 1)
    return bits, draw(hnp.arrays(np.uint8, shape, elements=elements))


def packed_by_big_integer(values, bits):
    """One number whose digits in base 2**bits are the values, and its bytes."""
    flat = [int(value) for value in values.reshape(-1)]
    number = sum(value << (i * bits) for i, value in enumerate(flat))
    return number.to_bytes(-(-len(flat) * bits // 8), "little")


def test_doctests():
    result = doctest.testmod(bit_packing)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 1], [0b0000_0001, 0b0000_0001]),
        (1, [0, 1, 1, 0, 0, 0, 0, 1], [0b1000_0110]),
        (2, [0, 1, 2, 3], [0b11_10_01_00]),
        (2, [3, 0, 0, 0, 2], [0b0000_0011, 0b0000_0010]),
        # The third value's highest bit is the second byte's lowest one.
        (3, [1, 2, 5], [0b01_010_001, 0b0000000_1]),
        (3, [7, 0, 7, 0, 7, 0, 7, 0], [0b11_000_111, 0b0_111_000_1, 0b000_111_00]),
        (4, [1, 2, 3], [0x21, 0x03]),
        (4, [15, 0, 0, 15], [0x0F, 0xF0]),
        (5, [0b10001, 0b00110], [0b110_10001, 0b000000_00]),
        (6, [0b000001, 0b100011], [0b11_000001, 0b0000_1000]),
        (7, [0b1000001, 0b0000011], [0b1_1000001, 0b00_000001]),
        (8, [0, 1, 128, 255], [0, 1, 128, 255]),
    ],
)
def test_bytes_by_hand(bits, values, expected):
    packed = bit_packing.pack(np.array(values), bits)
    assert packed.dtype == np.uint8
    assert packed.tolist() == expected
    assert bit_packing.unpack(packed, bits, (len(values),)).tolist() == values


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_bytes_are_those_of_one_little_endian_number(case):
    bits, values = case
    assert bit_packing.pack(values, bits).tobytes() == packed_by_big_integer(
        values, bits
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_round_trip(case):
    bits, values = case
    packed = bit_packing.pack(values, bits)
    unpacked = bit_packing.unpack(packed, bits, values.shape)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, values, strict=True)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bits=st.sampled_from(BITS), count=st.integers(0, 24))
def test_every_stream_with_zero_padding_is_the_packing_of_its_values(data, bits, count):
    used = count * bits
    number = data.draw(st.integers(0, 2**used - 1))
    stream = np.frombuffer(number.to_bytes(-(-used // 8), "little"), np.uint8)
    values = bit_packing.unpack(stream, bits, (count,))
    assert values.tolist() == [number >> (i * bits) & 2**bits - 1 for i in range(count)]
    np.testing.assert_array_equal(bit_packing.pack(values, bits), stream, strict=True)


@pytest.mark.parametrize("bits", BITS)
def test_every_size_round_trips_with_the_fewest_bytes(bits):
    rng = np.random.default_rng(bits)
    for size in range(34):
        values = rng.integers(0, 2**bits, size, dtype=np.uint8)
        packed = bit_packing.pack(values, bits)
        assert packed.shape == (-(-size * bits // 8),)
        assert packed.tobytes() == packed_by_big_integer(values, bits)
        np.testing.assert_array_equal(bit_packing.unpack(packed, bits, (size,)), values)


def test_order_is_that_of_c_whatever_the_memory_layout():
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    expected = bit_packing.pack(range(6), 3).tolist()
    assert bit_packing.pack(values, 3).tolist() == expected
    assert bit_packing.pack(np.asfortranarray(values), 3).tolist() == expected
    assert (
        bit_packing.pack(values.T, 3).tolist()
        == bit_packing.pack([0, 3, 1, 4, 2, 5], 3).tolist()
    )


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint16, np.uint64])
def test_any_integer_type_will_do(dtype):
    assert bit_packing.pack(np.array([1, 2, 3], dtype), np.uint8(8)).tolist() == [
        1,
        2,
        3,
    ]


def test_no_values_and_a_scalar():
    empty = bit_packing.pack(np.zeros((0, 4), np.int32), 3)
    assert empty.shape == (0,)
    assert bit_packing.unpack(empty, 3, (0, 4)).shape == (0, 4)
    assert bit_packing.pack(5, 3).tolist() == [5]
    assert bit_packing.unpack(np.array([5], np.uint8), 3, ()) == np.uint8(5)


def test_arguments_are_not_changed():
    values = np.array([3, 1, 2], np.uint8)
    packed = bit_packing.pack(values, 8)
    packed[0] = 0
    unpacked = bit_packing.unpack(packed, 8, (3,))
    unpacked[1] = 0
    assert values.tolist() == [3, 1, 2]
    assert packed.tolist() == [0, 1, 2]


@pytest.mark.parametrize("bits", [0, 9, -1, 16, "2", 2.0, True, None], ids=repr)
def test_other_bits_are_refused(bits):
    message = f"bits must be an integer in [1, 8]. Received: {bits=}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bit_packing.pack([0], bits)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bit_packing.unpack(np.zeros(1, np.uint8), bits, (1,))


@pytest.mark.parametrize(
    ("bits", "values", "received"),
    [
        (1, [0, 2], "0 to 2"),
        (2, [[-1, 3]], "-1 to 3"),
        (7, np.array([128], np.uint8), "128 to 128"),
        (8, [0, 256], "0 to 256"),
        (8, np.array([-256]), "-256 to -256"),
    ],
)
def test_values_out_of_range_are_refused(bits, values, received):
    message = (
        f"values must be in [0, {2**bits - 1}] to fit into {bits} bits. "
        f"Received: values from {received}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bit_packing.pack(values, bits)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([1.0], "float64"), ([], "float64"), ([True], "bool"), (["1"], "<U1")],
)
def test_values_of_other_types_are_refused(values, dtype):
    message = f"^values must be integers. Received: values of dtype {dtype}$"
    with pytest.raises(ValueError, match=message):
        bit_packing.pack(values, 2)


@pytest.mark.parametrize(
    ("packed", "received"),
    [
        (np.zeros(1, np.uint8), "uint8 of shape (1,)"),
        (np.zeros(3, np.uint8), "uint8 of shape (3,)"),
        (np.zeros((2, 1), np.uint8), "uint8 of shape (2, 1)"),
        (np.zeros(2, np.int8), "int8 of shape (2,)"),
        ([0, 0], "int64 of shape (2,)"),
    ],
)
def test_bytes_of_another_type_or_length_are_refused(packed, received):
    message = (
        "packed must be uint8 of shape (2,) to hold 4 values of 3 bits. "
        f"Received: {received}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bit_packing.unpack(packed, 3, (2, 2))


@pytest.mark.parametrize("last", [0b0001_0000, 0b1000_0000, 0xFF])
def test_nonzero_padding_is_refused(last):
    message = (
        "packed must be 0 in the 4 bits behind its last value. "
        f"Received: a last byte of {last:#04x}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bit_packing.unpack(np.array([0xFF, last], np.uint8), 3, (4,))


@pytest.mark.parametrize("shape", [4, (-1,), (2.0, 2), (True,), "4", None], ids=repr)
def test_other_shapes_are_refused(shape):
    message = f"shape must be a sequence of integers of at least 0. Received: {shape=}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bit_packing.unpack(np.zeros(1, np.uint8), 2, shape)
