"""Requantization against the real kernels, over every accumulator of small layers."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.export.kernels_in_files import (
    DENSE,
    DEPTHWISE,
    OPERATORS,
    RUNTIMES,
    Layer,
    all_codes,
    random_layer,
)
from tf_lowbit.compat import tf
from tf_lowbit.export.integer import kernels
from tf_lowbit.export.integer.kernels import BUILTIN, KERNELS, XNNPACK

_LOW, _HIGH = -128, 127
_CHANNELS = 64


def _mismatches(layer, codes, kernel, runtime):
    away = kernels.rounds_away(layer.operator == DEPTHWISE, layer.weights.shape[1])
    want = kernels.requantize(
        kernel, layer.accumulators(codes), layer.multipliers(kernel), _LOW, _HIGH, away
    )
    got = layer.run(codes, kernel, runtime)
    assert np.unique(got).size > 20  # The codes are no trivial ones.
    return np.argwhere(got != want)


# --- the real ones --------------------------------------------------------------------


@pytest.mark.parametrize(("runtime", "kernel"), RUNTIMES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_accumulator(operator, runtime, kernel):
    codes = all_codes()
    assert codes.shape[0] * _CHANNELS > 4_000_000
    assert not _mismatches(random_layer(operator), codes, kernel, runtime).size


@pytest.mark.parametrize(("runtime", "kernel"), RUNTIMES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_accumulator_of_int4_weights(operator, runtime, kernel):
    """Only FULLY_CONNECTED with int4 weights is delegated to XNNPACK."""
    layer = random_layer(operator, int4=True)
    if kernel == XNNPACK and operator != DENSE:
        with pytest.raises(AssertionError, match=operator):
            layer.run(all_codes(-3, 3), kernel, runtime)
        return
    assert not _mismatches(layer, all_codes(), kernel, runtime).size


def test_int4_rows_of_odd_length_are_not_delegated():
    """The default resolver then runs the builtin kernel."""
    layer = random_layer(DENSE, int4=True, taps=3)
    with pytest.raises(AssertionError, match=DENSE):
        layer.run(np.zeros((1, 3), np.int64), XNNPACK)


@pytest.mark.parametrize(("runtime", "kernel"), RUNTIMES)
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_other_sizes(operator, int4, runtime, kernel):
    rng = np.random.default_rng(3)
    for taps in (1, 2, 8, 9, 33):
        for channels in (3, 8, 17):
            if int4 and kernel == XNNPACK and (operator != DENSE or taps % 2):
                continue
            layer = random_layer(operator, int4, channels, taps, least=1e-3)
            codes = rng.integers(_LOW, _HIGH + 1, (2000, taps))
            wrong = _mismatches(layer, codes, kernel, runtime)
            assert not wrong.size, (taps, channels)


@pytest.mark.parametrize("runtime", sorted({runtime for runtime, _ in RUNTIMES}))
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("channels", [1, 7, 8, 12, 16, 17])
def test_the_depthwise_kernels_last_channels(channels, int4, runtime):
    """Builtin: channels behind the last multiple of 8 round ties away from zero."""
    layer = random_layer(DEPTHWISE, int4, channels)
    # 2^-3, ..., 2^-7: many ties.
    multipliers = 0.5 ** (np.arange(channels)[::-1] % 5 + 3)
    scales = (multipliers * 0.25 / 0.5).astype(np.float32)
    layer = dataclasses.replace(layer, scales=scales)
    codes = all_codes()
    accumulators = layer.accumulators(codes)
    multipliers = layer.multipliers(BUILTIN)
    half_up = _gemmlowp(accumulators, multipliers, away=False)
    away = _gemmlowp(accumulators, multipliers, away=True)
    is_last = np.arange(channels) >= channels - channels % 8
    want = np.where(is_last, away, half_up)
    got = layer.run(codes, BUILTIN, runtime)
    np.testing.assert_array_equal(got, np.clip(want, _LOW, _HIGH))
    if is_last.any():
        assert (half_up != away)[:, is_last].any()
    mask = kernels.rounds_away(True, channels)
    assert mask.tolist() == is_last.tolist()
    arguments = (BUILTIN, accumulators, multipliers, _LOW, _HIGH, mask)
    np.testing.assert_array_equal(kernels.requantize(*arguments), got)
    arguments = (
        BUILTIN,
        accumulators.astype(float),
        kernels.stored(BUILTIN, multipliers),
    )
    made = kernels.requantize_tensor(*arguments, _LOW, _HIGH, mask).numpy()
    np.testing.assert_array_equal(made, got)


@pytest.mark.parametrize(("runtime", "kernel"), RUNTIMES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_steep_and_flat_multipliers(operator, runtime, kernel):
    codes = all_codes()[::5]
    steep = random_layer(operator, least=1.0, most=180.0)
    assert not _mismatches(steep, codes, kernel, runtime).size
    # Accumulators beyond 2^24, which float32 rounds.
    flat = random_layer(operator, least=2.0**-24, most=2.0**-21)
    rng = np.random.default_rng(0)
    biases = rng.integers(-(2**30), 2**30, _CHANNELS)
    flat = dataclasses.replace(flat, biases=biases)
    assert (np.abs(flat.accumulators(codes)) > 2**24).mean() > 0.9
    assert not _mismatches(flat, codes, kernel, runtime).size


@pytest.mark.parametrize("runtime", sorted({runtime for runtime, _ in RUNTIMES}))
@pytest.mark.parametrize("operator", OPERATORS)
def test_xnnpack_refuses_multipliers_of_256(operator, runtime):
    def run(multiplier):
        scales = np.full(8, multiplier * 0.5, np.float32)
        weights = np.ones((2, 8), np.int8)
        layer = Layer(operator, weights, scales, np.zeros(8, np.int32))
        return layer.run(np.array([[0, 0]]), XNNPACK, runtime)

    run(255.9)
    with pytest.raises(RuntimeError, match="XNNPACK"):
        run(256.0)


def _ties_of_the_fixed_point():
    """A layer with a multiplier half way between two fixed-point ones.

    Its biases stand where the two differ in a code.
    """
    input_scale = float(np.float32(1 + 2.0**-15))
    weight_scale = np.float32(0.5 * (1 + 2.0**-16))
    output_scale = 2.0**22
    multiplier = kernels.multiplier(BUILTIN, input_scale, weight_scale, output_scale)
    q = multiplier * 2.0**53
    assert q % 1 == 0.5
    down, up = int(np.floor(q)), int(np.ceil(q))

    def code(accumulator, q):
        high_part = (accumulator * q + 2**30) >> 31
        return (high_part + 2**21) >> 22

    biases = []
    for j in range(40, 120):
        edge = ((2 * j - 1) << 52) // down
        near = range(edge - 4, edge + 5)
        biases += [a for a in near if code(a, down) != code(a, up)]
    layer = Layer(
        DENSE,
        np.zeros((2, len(biases)), np.int8),
        np.full(len(biases), weight_scale, np.float32),
        np.array(biases),
        input_scale=input_scale,
        output_scale=output_scale,
    )
    return layer, [code(a, up) for a in biases]


@pytest.mark.parametrize("runtime", sorted({runtime for runtime, _ in RUNTIMES}))
def test_real_fixed_point_rounds_half_away_from_zero(runtime):
    layer, want = _ties_of_the_fixed_point()
    assert len(want) > 5
    got = layer.run(np.array([[0, 0]]), BUILTIN, runtime)
    assert got.tolist() == [want]


def test_fixed_point_rounds_half_away_from_zero():
    layer, want = _ties_of_the_fixed_point()
    multipliers = layer.multipliers(BUILTIN)
    got = kernels.requantize(BUILTIN, layer.biases, multipliers, _LOW, _HIGH)
    assert got.tolist() == want


# --- gemmlowp's definition ------------------------------------------------------------


def _quantize_multiplier(multiplier: float) -> tuple[int, int]:
    """TFLite's, in exact integers: (q, shift), ties of q away from zero."""
    numerator, denominator = multiplier.as_integer_ratio()
    shift = 0
    while numerator * 2 ** -min(shift, 0) >= denominator * 2 ** max(shift, 0):
        shift += 1
    while 2 * numerator * 2 ** -min(shift, 0) < denominator * 2 ** max(shift, 0):
        shift -= 1
    # q = M / 2^shift * 2^31
    numerator <<= max(31 - shift, 0)
    q = (2 * numerator + denominator) // (2 * denominator)
    return (q // 2, shift + 1) if q == 2**31 else (q, shift)


def _gemmlowp(accumulators, multipliers, away: bool):
    """SaturatingRoundingDoublingHighMul and RoundingDivideByPOT, as they are defined.

    `away` is the latter's rounding of negative ties; NEON's is half up.
    """
    pairs = [_quantize_multiplier(float(m)) for m in multipliers]
    q, shift = np.array(pairs, np.int64).T
    left, right = np.maximum(shift, 0), np.maximum(-shift, 0)
    product = (np.asarray(accumulators, np.int64) << left) * q
    nudge = np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    # C++ divides towards zero.
    total = product + nudge
    high = np.sign(total) * (np.abs(total) >> 31)
    mask = (1 << right) - 1
    remainder = high & mask
    threshold = (mask >> 1) + (away & (high < 0))
    return (high >> right) + (remainder > threshold)


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        (0.5, (2**30, 0)),
        (0.25, (2**30, -1)),
        (1.0, (2**30, 1)),
        (0.75, (3 * 2**29, 0)),
        (3.0, (3 * 2**29, 2)),
        (2.0**-20, (2**30, -19)),
        (255.0, (255 * 2**23, 8)),
        # Rounds up to 2^31, which is one more shift.
        (1.0 - 2.0**-40, (2**30, 1)),
        (2.0 - 2.0**-33, (2**30, 2)),
        (1 / 3, (1431655765, -1)),
    ],
)
def test_fixed_point_by_hand(multiplier, expected):
    q, shift = kernels.fixed_point(np.array([multiplier]))
    assert q.dtype == shift.dtype == np.int64
    assert (int(q[0]), int(shift[0])) == expected == _quantize_multiplier(multiplier)


@given(st.floats(2.0**-30, 2.0**9))
def test_fixed_point(multiplier):
    q, shift = kernels.fixed_point(np.array([multiplier]))
    assert 2**30 <= q[0] < 2**31
    assert (int(q[0]), int(shift[0])) == _quantize_multiplier(multiplier)


@given(
    st.integers(-(2**31) + 1, 2**31 - 1),
    st.floats(2.0**-30, 0.9).map(np.float32),
)
def test_builtin_is_gemmlowp_with_ties_up(accumulator, multiplier):
    arguments = np.array([accumulator]), np.array([multiplier], np.float64)
    got = kernels.requantize(BUILTIN, *arguments, -(2**31), 2**31)
    assert got.tolist() == _gemmlowp(*arguments, away=False).tolist()


@pytest.mark.parametrize(
    ("kernel", "accumulator", "multiplier", "code"),
    [
        # Ties: to even, and up.
        (XNNPACK, 1, 0.5, 0),
        (XNNPACK, 3, 0.5, 2),
        (XNNPACK, -1, 0.5, 0),
        (XNNPACK, -3, 0.5, -2),
        (BUILTIN, 1, 0.5, 1),
        (BUILTIN, 3, 0.5, 2),
        (BUILTIN, -1, 0.5, 0),
        (BUILTIN, -3, 0.5, -1),
        # Rounded twice: 5 / 8 * 3 = 1.875 -> 2; then 2 / 4 -> 1. Once: 0.46875 -> 0.
        (BUILTIN, 3, 5 / 32, 1),
        (XNNPACK, 3, 5 / 32, 0),
        # float32 knows no 2^24 + 1.
        (XNNPACK, 2**24 + 1, 2.0**-17, 128),
        (XNNPACK, 2**24 + 1, 1.0, 2**24),
        (BUILTIN, 2**24 + 1, 1.0, 2**24 + 1),
        (XNNPACK, 10, 4.0, 40),
        (BUILTIN, -10, 4.0, -40),
    ],
)
def test_requantize_by_hand(kernel, accumulator, multiplier, code):
    multipliers = np.array([multiplier], np.float32 if kernel == XNNPACK else None)
    accumulators = np.array([accumulator])
    got = kernels.requantize(kernel, accumulators, multipliers, -(2**26), 2**26)
    assert got.dtype == np.int64
    assert got.tolist() == [code]
    assert kernels.requantize(kernel, accumulators, multipliers, -1, 1).tolist() == [
        np.clip(code, -1, 1)
    ]


def test_multiplier():
    scales = np.float32([0.1, 0.3])
    m = kernels.multiplier(XNNPACK, 0.7, scales, 0.011)
    assert m.dtype == np.float32
    want = (np.float32(0.7) * scales) / np.float32(0.011)
    np.testing.assert_array_equal(m, want)
    m = kernels.multiplier(BUILTIN, 0.7, scales, 0.011)
    assert m.dtype == np.float64
    # The file's scales are float32 in both.
    want = float(np.float32(0.7)) * scales.astype(np.float64)
    np.testing.assert_array_equal(m, want / float(np.float32(0.011)))


# --- in TensorFlow --------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_requantize_tensor(kernel, dtype, traced):
    """Small and large accumulators, M from 2^-31 to 100, ties, both signs."""
    rng = np.random.default_rng(5)
    channels = 300
    exponents = rng.uniform(-31, 6.6, channels)
    exponents[::3] = np.rint(exponents[::3])
    unit = np.array(2.0, np.float64) ** exponents
    scales = unit.astype(np.float32)
    multipliers = kernels.multiplier(kernel, 1.0, scales, 1.0)
    reach = np.minimum(2.0**31 - 1, 300 / unit)
    accumulators = np.rint(rng.uniform(-1, 1, (400, channels)) * reach).astype(np.int64)
    accumulators[:10] = np.arange(-5, 5)[:, None]
    if dtype == tf.float32:
        accumulators = accumulators.astype(np.float32).astype(np.int64)
        accumulators = np.clip(accumulators, -(2**31) + 128, 2**31 - 128)
    assert np.abs(accumulators).max() > 2**30

    def compute(accumulators):
        stored = tf.constant(kernels.stored(kernel, multipliers))
        return kernels.requantize_tensor(kernel, accumulators, stored, -100, 120)

    compute = tf.function(compute) if traced else compute
    got = compute(tf.constant(accumulators, dtype))
    assert got.dtype == tf.float32
    want = kernels.requantize(kernel, accumulators, multipliers, -100, 120)
    np.testing.assert_array_equal(got.numpy(), want)
    assert np.unique(want).size == 221


def test_requantize_tensor_keeps_the_shape():
    for kernel in KERNELS:
        stored = kernels.stored(kernel, kernels.multiplier(kernel, 1, [0.5, 2.0], 1))
        got = kernels.requantize_tensor(
            kernel, tf.ones((4, 3, 5, 2)), tf.constant(stored), 0, 9
        )
        assert got.shape == (4, 3, 5, 2)


def test_stored():
    m = kernels.multiplier(XNNPACK, 1, [0.5, 3.0], 1)
    assert kernels.stored(XNNPACK, m).dtype == np.float32
    assert kernels.stored(XNNPACK, m).tolist() == [0.5, 3.0]
    m = kernels.multiplier(BUILTIN, 1, [0.5, 3.0], 1)
    assert kernels.stored(BUILTIN, m).dtype == np.int64
    assert kernels.stored(BUILTIN, m).tolist() == [[2**30, 3 * 2**29], [0, 2]]


def test_operators_are_the_real_ones():
    """A file's output does depend on every channel's weights and bias."""
    codes = np.array([[1, 2], [-3, 5]])
    for operator in OPERATORS:
        layer = Layer(
            operator,
            np.array([[1, 0, 3], [0, 1, -1]], np.int8),
            np.full(3, 0.5, np.float32),
            np.array([0, 0, 10]),
        )
        for kernel in KERNELS:
            got = layer.run(codes, kernel)
            assert got.tolist() == [[1, 2, 11], [-3, 5, -4]]
