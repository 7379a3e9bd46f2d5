"""Packed weights: decoded here, and by TFLite Micro's interpreter on its own."""

import numpy as np
import pytest
from tflite_micro.tensorflow.lite.micro.compression import lut

from tests.export.kernels_in_files import CONV, DENSE, DEPTHWISE, OPERATORS, Layer
from tf_lowbit.export.tflite import flatbuffer, packed_weights, structure
from tf_lowbit.export.tflite.micro import MicroRunner
from tf_lowbit.export.tflite.packed_weights import WIDTHS

SHAPE = (6, 5, 3, 4)


def values_of(width, shape=SHAPE, axis=None, seed=0):
    """Int8 values that take indices of `width` bits, all of them used.

    With an axis each channel along it has values of its own.
    """
    rng = np.random.default_rng(seed)
    count = 2**width
    channels = 1 if axis is None else shape[axis]
    size = int(np.prod(shape)) // channels
    rows = []
    for _ in range(channels):
        table = rng.choice(np.arange(-128, 128), count, replace=False)
        places = rng.permutation(np.arange(size) % count)
        rows.append(table[places])
    if axis is None:
        return rows[0].reshape(shape).astype(np.int8)
    rest = [s for i, s in enumerate(shape) if i != axis]
    rows = np.stack([row.reshape(rest) for row in rows])
    return np.moveaxis(rows, 0, axis).astype(np.int8)


@pytest.mark.parametrize("axis", [None, 0, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_comes_back(width, axis):
    shape = (3, 5, 9, 3) if axis is not None else (5, 3, 11, 2)
    shape = (*shape[:2], 40, shape[3])
    values = values_of(width, shape, axis)
    parts = packed_weights.encode(values, axis)
    assert parts.width == width
    assert len(parts.indices) == -(-values.size * width // 8)
    assert parts.size == len(parts.indices) + len(parts.tables)
    decoded = packed_weights.decode(parts.indices, parts.tables, values.shape)
    assert decoded.dtype == np.int8
    np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize("width", WIDTHS)
def test_indices_are_those_of_tflms_own_packer(width):
    values = values_of(width, (7, 41))
    parts = packed_weights.encode(values)
    compressed = lut.compress_array(values, None)
    assert parts.indices == lut.pack_indices(compressed.indices, width)
    assert parts.tables[16:] == compressed.lookup_tables[0].tobytes()


def test_by_hand():
    values = np.array([[42, -126, 126], [-42, 42, 126]], np.int8)
    parts = packed_weights.encode(values)
    # 2 0 3 1 2 3: 10 00 11 01, 10 11 and zeros.
    assert parts.indices == bytes([0b10001101, 0b10110000])
    assert parts.tables[:7] == bytes([0, 1, 0, 0, 1, 0xF2, 0])
    assert not any(parts.tables[7:16])
    assert np.frombuffer(parts.tables[16:], np.int8).tolist() == [-126, -42, 42, 126]


def test_one_value_takes_one_bit():
    parts = packed_weights.encode(np.full((4, 9), 127, np.int8))
    assert parts.width == 1
    assert (packed_weights.decode(parts.indices, parts.tables, (4, 9)) == 127).all()


def test_more_than_128_values_are_not_packed():
    assert packed_weights.encode(np.arange(-64, 65, dtype=np.int8)) is None
    assert packed_weights.encode(np.arange(-64, 64, dtype=np.int8)).width == 7


@pytest.mark.quick(66)
@pytest.mark.parametrize("axis", [None, 0, 3])
@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("place", range(16))
def test_a_flipped_bit_of_a_header_is_found(place, bit, axis):
    values = values_of(2, axis=axis)
    parts = packed_weights.encode(values, axis)
    tables = bytearray(parts.tables)
    tables[place] ^= 1 << bit
    try:
        decoded = packed_weights.decode(parts.indices, bytes(tables), values.shape)
    except ValueError:
        pass
    else:  # Only another axis of the same number of channels can be decoded.
        assert place == 5
        assert not np.array_equal(decoded, values)


@pytest.mark.parametrize(
    "change",
    [
        lambda indices, tables: (indices[:-1], tables),
        lambda indices, tables: (indices + b"\0", tables),
        lambda indices, tables: (indices, tables[:-1]),
        lambda indices, tables: (indices, tables[:12]),
        lambda indices, tables: (indices[:-1] + b"\xff", tables),
        lambda indices, tables: (b"\xff" + indices[1:], tables),
    ],
)
def test_parts_that_do_not_fit(change):
    values = values_of(2, (3, 3)).clip(-100, 100)
    values[values == values.max()] = values.min()  # Index 3 is none.
    parts = packed_weights.encode(values)
    assert parts.width == 2
    with pytest.raises(ValueError, match="must be a complete one"):
        packed_weights.decode(*change(parts.indices, parts.tables), values.shape)


# --- files ----------------------------------------------------------------------------


def layer(operator, weights):
    channels = weights.shape[1]
    rng = np.random.default_rng(1)
    return Layer(
        operator,
        weights,
        np.exp(rng.uniform(-9.5, -8, channels)).astype(np.float32),
        rng.integers(-900, 900, channels).astype(np.int32),
    )


def differences(first, second):
    return structure.differences(flatbuffer.unpack(first), flatbuffer.unpack(second))


def run(data, operator, taps, channels):
    shape = {CONV: (1, 1, taps), DEPTHWISE: (1, taps, channels), DENSE: (taps,)}
    codes = np.random.default_rng(2).integers(-128, 128, (16, *shape[operator]))
    return MicroRunner(data)(codes.astype(np.int8))["output"]


@pytest.mark.parametrize("is_one", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("width", WIDTHS)
def test_tflite_micro_decodes_every_width(width, operator, is_one):
    """One table for all channels, and a table for each."""
    # Tables of their own pay where channels are long.
    taps, channels = (400, 12) if is_one else (2000, 4)
    weights = values_of(width, (taps, channels), None if is_one else 1)
    plain = layer(operator, weights).data
    packed = packed_weights.pack(plain)
    assert packed_weights.widths(packed) == {"kernel": width}
    assert len(packed) < len(plain)
    want = run(plain, operator, taps, channels)
    assert len(np.unique(want)) > 5
    np.testing.assert_array_equal(run(packed, operator, taps, channels), want)
    unpacked = packed_weights.unpack(packed)
    assert not differences(unpacked, plain)
    assert not differences(plain, unpacked)


def test_what_eight_bits_need_stays():
    weights = np.random.default_rng(0).integers(-127, 128, (96, 24)).astype(np.int8)
    plain = layer(DENSE, weights).data
    packed = packed_weights.pack(plain)
    assert packed_weights.widths(packed) == {}


@pytest.mark.parametrize("taps", range(8, 80, 4))
def test_a_file_never_grows(taps):
    weights = values_of(2, (taps, 6))
    plain = layer(DENSE, weights).data
    packed = packed_weights.pack(plain)
    if packed_weights.widths(packed):
        assert len(packed) < len(packed_weights._bytes(flatbuffer.unpack(plain)))
    else:
        assert taps * 6 < 420
