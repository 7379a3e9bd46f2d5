"""Codes, steps and levels against the float64 oracle, at every decision threshold."""

import numpy as np
import pytest

from tests import oracle
from tf_lowbit.compat import tf
from tf_lowbit.core import grid

LOW_BITS = range(1, 9)
BAD_BITS = (0, 9, -1, 12, 17, 64, "2", 2.0, True, False, None, [2], np.float32(2.0))


@pytest.mark.parametrize("bits", [*LOW_BITS, 16, 32, np.int64(4), np.uint8(8)])
def test_allowed_bits_come_back_as_an_int(bits):
    result = grid.validate_bits(bits)
    assert type(result) is int
    assert result == bits


@pytest.mark.parametrize("bits", BAD_BITS, ids=repr)
def test_other_bits_are_refused_with_the_value(bits):
    with pytest.raises(ValueError, match="weight_bits must be an integer in") as error:
        grid.validate_bits(bits, "weight_bits")
    assert str(error.value).endswith(f"Received: weight_bits={bits!r}")


def test_effective_bits_of_all_bits_are_made_without_a_selection():
    """An int32 selection is in a GPU's memory; the fused quantizers read the host's."""
    function = tf.function(grid.effective_bits)
    for bits in range(1, 33):
        expected = bits if bits <= 8 else 24
        assert int(function(tf.constant(bits))) == expected
        assert int(grid.effective_bits(bits)) == expected
    assert function.experimental_get_tracing_count() == 1
    (traced,) = function._list_all_concrete_functions()
    kinds = {operator.type for operator in traced.graph.get_operations()}
    assert not kinds & {"Select", "SelectV2"}


def test_effective_bits_are_24_where_nothing_is_rounded():
    results = [int(grid.effective_bits(k)) for k in (1, 2, 7, 8, 16, 32)]
    assert results == [1, 2, 7, 8, 24, 24]


def test_unsigned_limit_is_exact():
    results = [float(grid.unsigned_limit(k)) for k in (1, 2, 3, 4, 8, 16, 32)]
    assert results == [1, 3, 7, 15, 255, 2**24 - 1, 2**24 - 1]


def test_bits_may_be_a_variable_that_changes():
    bits = tf.Variable(2)
    assert float(grid.unsigned_limit(bits)) == 3
    assert float(grid.odd_step(bits)) == np.float32(1 / 3)
    assert [float(q) for q in grid.signed_limits(bits, narrow_range=False)] == [2, 1]
    bits.assign(8)
    assert float(grid.unsigned_limit(bits)) == 255
    assert [float(q) for q in grid.signed_limits(bits, narrow_range=False)] == [
        128,
        127,
    ]


@pytest.mark.parametrize(
    ("bits", "wide", "narrow"),
    [
        (1, (1, 1), (1, 1)),
        (2, (2, 1), (1, 1)),
        (3, (4, 3), (3, 3)),
        (8, (128, 127), (127, 127)),
        (16, (128, 127), (127, 127)),
        (32, (128, 127), (127, 127)),
    ],
)
def test_signed_limits_by_hand(bits, wide, narrow):
    assert tuple(map(float, grid.signed_limits(bits, narrow_range=False))) == wide
    assert tuple(map(float, grid.signed_limits(bits, narrow_range=True))) == narrow


def test_unsigned_codes_by_hand():
    inputs = tf.constant([-1.0, 0.0, 0.1, 0.2, 0.49, 0.51, 0.8, 0.9, 1.0, 7.0])
    codes = grid.unsigned_codes(inputs, 1.0, 2)
    np.testing.assert_array_equal(codes, [0, 0, 0, 1, 1, 2, 2, 3, 3, 3])
    assert float(grid.unsigned_step(6.0, 2)) == 2.0


def test_odd_codes_by_hand():
    codes = grid.odd_codes(tf.constant([0.0, 0.1, 0.2, 0.5, 0.6, 0.9, 1.0]), 2)
    # 3u = 0, 0.3, 0.6, 1.5 (half to even: 2), 1.8, 2.7, 3
    np.testing.assert_array_equal(codes, [-3, -3, -1, 1, 1, 3, 3])


def test_signed_codes_by_hand():
    scaled = tf.constant([-9.0, -1.6, -1.5, -0.5, -0.4, 0.0, 0.5, 0.6, 1.5, 9.0])
    two = grid.signed_codes(scaled, 2, narrow_range=False)
    np.testing.assert_array_equal(two, [-2, -2, -2, 0, 0, 0, 0, 1, 1, 1])
    narrow = grid.signed_codes(scaled, 2, narrow_range=True)
    np.testing.assert_array_equal(narrow, [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1])
    one = grid.signed_codes(scaled, 1, narrow_range=False)
    np.testing.assert_array_equal(one, [-1, -1, -1, -1, -1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("bits", LOW_BITS)
def test_unsigned_boundaries_are_exact_to_one_ulp(bits):
    """A step of 1/4 makes every product exact, so that even ties are decided."""
    n = 2**bits - 1
    ties = oracle.half_codes(0, n) / 4
    inputs = np.concatenate([ties, oracle.around(ties, 1)]).astype(np.float32)
    codes = grid.unsigned_codes(tf.constant(inputs), n / 4, bits)
    expected = np.round(inputs.astype(np.float64) * 4)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(codes, oracle.unsigned_codes(inputs, n / 4, bits))


@pytest.mark.parametrize("limit", [1.0, 6.0, 0.37, 3.1234567, 1e-6, 1e4])
@pytest.mark.parametrize("bits", LOW_BITS)
def test_unsigned_codes_beside_each_boundary_of_any_range(bits, limit):
    n = 2**bits - 1
    limit = np.float32(limit)
    ties = oracle.half_codes(0, n) * np.float64(limit) / n
    levels = np.arange(n + 1) * np.float64(limit) / n
    inputs = np.concatenate([oracle.around(ties, 8), levels]).astype(np.float32)
    codes = grid.unsigned_codes(tf.constant(inputs), limit, bits)
    np.testing.assert_array_equal(codes, oracle.unsigned_codes(inputs, limit, bits))


@pytest.mark.parametrize("bits", LOW_BITS)
def test_odd_codes_beside_each_boundary(bits):
    n = 2**bits - 1
    ties = oracle.half_codes(0, n) / n
    unit = np.concatenate([oracle.around(ties, 4), np.arange(n + 1) / n])
    unit = unit.astype(np.float32)
    codes = grid.odd_codes(tf.constant(unit), bits)
    expected = 2 * np.round(n * unit.astype(np.float64)) - n
    np.testing.assert_array_equal(codes, expected)
    assert set(np.unique(codes)) == set(range(-n, n + 1, 2))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", LOW_BITS)
def test_signed_boundaries_are_exact_to_one_ulp(bits, narrow):
    negative, positive = oracle.signed_limits(bits, narrow)
    ties = oracle.half_codes(-negative - 2, positive + 2)
    scaled = np.concatenate([ties, oracle.around(ties, 1), [0.0, -0.0, 1e-30, -1e-30]])
    scaled = scaled.astype(np.float32)
    codes = grid.signed_codes(tf.constant(scaled), bits, narrow_range=narrow)
    np.testing.assert_array_equal(codes, oracle.signed_codes(scaled, 1.0, bits, narrow))
    assert codes.numpy().min() == -negative
    assert codes.numpy().max() == positive


@pytest.mark.parametrize("bits", [16, 32])
def test_unrounded_codes_are_only_clipped(bits):
    x = np.linspace(-200, 200, 4001).astype(np.float32)
    signed = grid.signed_codes(tf.constant(x), bits, narrow_range=False)
    np.testing.assert_allclose(signed, np.clip(x, -128, 127), rtol=1e-6, atol=1e-5)
    narrow = grid.signed_codes(tf.constant(x), bits, narrow_range=True)
    np.testing.assert_allclose(narrow, np.clip(x, -127, 127), rtol=1e-6, atol=1e-5)
    unsigned = grid.unsigned_codes(tf.constant(x), 6.0, bits)
    values = unsigned * grid.unsigned_step(6.0, bits)
    np.testing.assert_allclose(values, np.clip(x, 0, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_nan_stays_nan_in_every_grid(bits):
    x = tf.constant([np.nan, 0.5])
    for codes in (
        grid.unsigned_codes(x, 1.0, bits),
        grid.odd_codes(x, bits),
        grid.signed_codes(x, bits, narrow_range=False),
        grid.signed_codes(x, bits, narrow_range=True),
    ):
        np.testing.assert_array_equal(np.isnan(codes), [True, False])


@pytest.mark.parametrize("bits", LOW_BITS)
def test_infinities_saturate(bits):
    x = tf.constant([-np.inf, np.inf])
    n = 2**bits - 1
    np.testing.assert_array_equal(grid.unsigned_codes(x, 1.0, bits), [0, n])
    negative, positive = oracle.signed_limits(bits, narrow=False)
    if bits > 1:
        signed = grid.signed_codes(x, bits, narrow_range=False)
        np.testing.assert_array_equal(signed, [-negative, positive])


def test_infinities_have_a_sign_at_one_bit():
    codes = grid.signed_codes(tf.constant([-np.inf, np.inf]), 1, narrow_range=False)
    np.testing.assert_array_equal(codes, [-1, 1])


@pytest.mark.parametrize("bits", LOW_BITS)
def test_the_levels_are_what_a_dense_input_reaches(bits):
    x = np.linspace(-150, 150, 30001).astype(np.float32)

    def assert_levels(codes, **kind):
        np.testing.assert_array_equal(np.unique(codes), grid.level_codes(bits, **kind))

    for narrow in (False, True):
        codes = grid.signed_codes(tf.constant(x), bits, narrow_range=narrow)
        assert_levels(codes, signed=True, narrow_range=narrow)
    assert_levels(grid.unsigned_codes(tf.constant(x), 100.0, bits), signed=False)
    assert_levels(
        grid.odd_codes(tf.constant(x / 300 + 0.5), bits), signed=True, odd=True
    )


def test_the_levels_by_hand():
    assert list(grid.level_codes(2, signed=False)) == [0, 1, 2, 3]
    assert list(grid.level_codes(2, signed=True)) == [-2, -1, 0, 1]
    assert list(grid.level_codes(2, signed=True, narrow_range=True)) == [-1, 0, 1]
    assert list(grid.level_codes(2, signed=True, odd=True)) == [-3, -1, 1, 3]
    for narrow in (False, True):
        assert list(grid.level_codes(1, signed=True, narrow_range=narrow)) == [-1, 1]


@pytest.mark.parametrize("bits", [16, 32, 0, 9])
def test_levels_need_a_rounded_grid(bits):
    with pytest.raises(ValueError, match="Received: bits="):
        grid.level_codes(bits, signed=True)


@pytest.mark.parametrize("rounding_bits", [16, 32, tf.constant(32)], ids=str)
def test_signed_codes_in_the_range_of_their_bits_without_rounding(rounding_bits):
    scaled = tf.constant([-9.0, -1.625, -0.25, 0.0, 0.375, 0.75, 1.5, 9.0])

    def codes(bits, narrow):
        return grid.signed_codes(scaled, bits, narrow, rounding_bits)

    # Multiples of 1/8 are exact at the fineness of 2^-16.
    wide = [-2, -1.625, -0.25, 0, 0.375, 0.75, 1, 1]
    np.testing.assert_array_equal(codes(2, False), wide)
    one = [-1, -1, -0.25, 0, 0.375, 0.75, 1, 1]
    np.testing.assert_array_equal(codes(2, True), one)
    np.testing.assert_array_equal(codes(1, False), one)
    eight = [-9, -1.625, -0.25, 0, 0.375, 0.75, 1.5, 9]
    np.testing.assert_array_equal(codes(8, False), eight)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", LOW_BITS)
def test_rounding_bits_change_no_range(bits, narrow):
    x = np.linspace(-150, 150, 3001).astype(np.float32)
    negative, positive = oracle.signed_limits(bits, narrow)
    unrounded = grid.signed_codes(tf.constant(x), bits, narrow, rounding_bits=32)
    expected = np.clip(x, -negative, positive)
    np.testing.assert_allclose(unrounded, expected, rtol=0, atol=2.0**-17)
    rounded = grid.signed_codes(tf.constant(x), bits, narrow)
    for same in (bits, tf.constant(bits)):
        again = grid.signed_codes(tf.constant(x), bits, narrow, rounding_bits=same)
        np.testing.assert_array_equal(again, rounded)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_nan_and_infinity_without_rounding(bits):
    x = tf.constant([np.nan, -np.inf, np.inf])
    negative, positive = oracle.signed_limits(bits, narrow=False)
    codes = grid.signed_codes(x, bits, narrow_range=False, rounding_bits=32)
    np.testing.assert_array_equal(codes, [np.nan, -negative, positive])
