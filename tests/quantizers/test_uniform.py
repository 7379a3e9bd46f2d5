"""Uniform symmetric quantizers: scales from the weights, clips from calibration."""

import numpy as np
import pytest

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import UniformActivation, UniformWeight, build, quantize
from tf_lowbit.compat import tf


def highest(bits):
    return oracle.signed_limits(bits, narrow=True)[1]


def beside_thresholds(bits, largest, ulps):
    """Weights with max|w| = largest, on both sides of every threshold."""
    top = highest(bits)
    ties = oracle.half_codes(-top, top) * np.float64(largest) / top
    return np.concatenate([oracle.around(ties, ulps), [largest, -largest, 0.0]]).astype(
        np.float32
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_thresholds_are_exact_to_one_ulp_where_the_step_is(bits):
    """max|w| = Q / 32 makes the step 1/32: ties are exact and go to the even code."""
    top = highest(bits)
    w = beside_thresholds(bits, top / 32, 1)
    w = np.concatenate([w, oracle.half_codes(-top, top) / 32]).astype(np.float32)
    quantizer = UniformWeight(bits, per_axis=False)
    variables = build(quantizer)
    expected = oracle.signed_codes(w, 1 / 32, bits, narrow=True)
    np.testing.assert_array_equal(quantizer.codes(tf.constant(w), variables), expected)
    np.testing.assert_array_equal(quantize(quantizer, variables, w), expected / 32)


@pytest.mark.parametrize("largest", [1.0, 0.3, 7.297671])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_codes_beside_every_threshold_of_any_scale(bits, largest):
    largest = np.float32(largest)
    w = beside_thresholds(bits, largest, 8)
    quantizer = UniformWeight(bits, per_axis=False)
    variables = build(quantizer)
    codes = quantizer.codes(tf.constant(w), variables)
    assert codes.dtype == tf.int32
    scale = oracle.uniform_scale(w, bits)
    np.testing.assert_array_equal(codes, oracle.signed_codes(w, scale, bits, True))
    step = quantizer.step(tf.constant(w), variables).numpy()
    np.testing.assert_allclose(step, scale, rtol=1e-6)
    values = quantize(quantizer, variables, w)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, step))
    assert len(np.unique(values)) == quantizer.level_count(bits) == 2**bits - 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_each_channel_has_the_scale_of_its_own_largest_weight(bits):
    top = highest(bits)
    powers = 2.0 ** np.arange(-5, 1)
    w = np.stack([beside_thresholds(bits, top * p, 1) for p in powers], axis=-1)
    quantizer = UniformWeight(bits)
    variables = build(quantizer, w.shape)
    step = quantizer.step(tf.constant(w), variables)
    np.testing.assert_array_equal(step, powers[None])
    codes = quantizer.codes(tf.constant(w), variables)
    np.testing.assert_array_equal(codes, oracle.signed_codes(w, powers, bits, True))
    values = quantize(quantizer, variables, w)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, powers))


@pytest.mark.parametrize(
    ("arguments", "axes"),
    [
        ({"per_axis": False}, None),
        ({}, (0, 1, 2)),
        ({"channel_axes": (2, 3)}, (0, 1)),
        ({"channel_axes": (2,)}, (0, 1, 3)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_scale_of_each_layout(bits, arguments, axes):
    w = cases.random_inputs()
    quantizer = UniformWeight(bits, **arguments)
    step = quantizer.step(tf.constant(w), build(quantizer))
    expected = oracle.uniform_scale(w, bits, axes)
    assert step.shape == expected.shape
    np.testing.assert_allclose(step, expected, rtol=1e-6)


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    quantizer = UniformWeight(1, per_axis=False)
    variables = build(quantizer)
    w = [-3.0, -0.5, 0.0, 0.5]
    np.testing.assert_array_equal(quantize(quantizer, variables, w), [-1, -1, 1, 1])
    np.testing.assert_array_equal(
        quantizer.codes(tf.constant(w), variables), [-1, -1, 1, 1]
    )
    # All of it passes, also beyond the levels; nothing flows through the mean.
    (d_w,) = cases.gradients(quantizer, variables, w, [1.0, 2.0, 3.0, 4.0], None)
    np.testing.assert_array_equal(d_w, [1, 2, 3, 4])


def test_weights_by_hand():
    # Q = 3, s = 0.9 / 3 = 0.3: v = (3, -1.67, 0.33, 0.67).
    quantizer = UniformWeight(3, per_axis=False)
    variables = build(quantizer)
    w = tf.constant([0.9, -0.5, 0.1, 0.2])
    np.testing.assert_array_equal(quantizer.codes(w, variables), [3, -2, 0, 1])
    np.testing.assert_allclose(
        quantize(quantizer, variables, w), [0.9, -0.6, 0, 0.3], rtol=1e-6
    )


@pytest.mark.parametrize("bits", [*range(2, 9), 16, 32])
def test_no_gradient_through_the_scale_and_every_weight_is_in_range(bits):
    """Not even rounding may put the largest weight outside of the range."""
    w = cases.random_inputs((9, 4000), spread=4.0)
    w[0, :3] = [7.297671, 7.965276, 7.2992578]
    w[1:, :3] /= 4
    upstream = cases.random_upstream(w.shape) + 4.0
    for per_axis in (False, True):
        quantizer = UniformWeight(bits, per_axis=per_axis)
        (d_w,) = cases.gradients(quantizer, build(quantizer), w, upstream, None)
        np.testing.assert_array_equal(d_w, upstream)


@pytest.mark.parametrize("bits", [16, 32])
def test_unrounded_weights_are_themselves(bits):
    w = cases.random_inputs()
    quantizer = UniformWeight(bits)
    values = quantize(quantizer, build(quantizer), w)
    np.testing.assert_allclose(values, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_zero_weights_are_finite(bits):
    quantizer = UniformWeight(bits)
    w = np.zeros((3, 3, 4, 8))
    values = quantize(quantizer, build(quantizer), w)
    np.testing.assert_allclose(values, w, atol=2e-6)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_nan_weight_stays_visible(bits):
    quantizer = UniformWeight(bits)
    values = quantize(quantizer, build(quantizer), [[np.nan, 1.0], [0.5, -1.0]])
    np.testing.assert_array_equal(np.isnan(values[:, 0]), [True, True])
    assert np.isfinite(values[:, 1]).all()


# Activations.


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_unsigned_activation_thresholds_are_exact_to_one_ulp(bits, implementation):
    n = 2**bits - 1
    ties = oracle.half_codes(0, n) / 4
    x = np.concatenate([ties, oracle.around(ties, 1), [-1, n]]).astype(np.float32)
    quantizer = UniformActivation(bits, clip=n / 4, implementation=implementation)
    variables = build(quantizer)
    expected = oracle.unsigned_codes(x, n / 4, bits)
    np.testing.assert_array_equal(quantizer.codes(tf.constant(x), variables), expected)
    np.testing.assert_array_equal(quantize(quantizer, variables, x), expected / 4)
    assert len(np.unique(expected)) == quantizer.level_count(bits) == 2**bits


@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_signed_activation_thresholds_are_exact_to_one_ulp(bits):
    top = highest(bits)
    ties = oracle.half_codes(-top, top) / 4
    if bits == 1:
        ties = np.array([-1.0, -1e-6, 0.0, 1e-6, 1.0])
    x = np.concatenate([ties, oracle.around(ties, 1), [-top, top]]).astype(np.float32)
    quantizer = UniformActivation(bits, signed=True, clip=top / 4)
    variables = build(quantizer)
    expected = oracle.signed_codes(x, 0.25, bits, narrow=True)
    np.testing.assert_array_equal(quantizer.codes(tf.constant(x), variables), expected)
    np.testing.assert_array_equal(quantize(quantizer, variables, x), expected / 4)
    assert len(np.unique(expected)) == quantizer.level_count(bits)


@pytest.mark.parametrize("clip", [6.0, 0.37, 3.1234567])
@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_activation_codes_beside_every_threshold_of_any_clip(bits, clip):
    n, clip = 2**bits - 1, np.float32(clip)
    x = oracle.around(oracle.half_codes(0, n) * np.float64(clip) / n, 8)
    quantizer = UniformActivation(bits, clip=float(clip))
    variables = build(quantizer)
    codes = quantizer.codes(tf.constant(x), variables)
    np.testing.assert_array_equal(codes, oracle.unsigned_codes(x, clip, bits))
    step = quantizer.step(tf.constant(x), variables).numpy()
    np.testing.assert_array_equal(
        quantize(quantizer, variables, x), cases.reconstruct(codes, step)
    )
    signed = UniformActivation(bits, signed=True, clip=float(clip))
    variables, top = build(signed), highest(bits)
    x = oracle.around(oracle.half_codes(-top, top) * np.float64(clip) / top, 8)
    codes = signed.codes(tf.constant(x), variables)
    expected = oracle.signed_codes(x, np.float64(clip) / top, bits, narrow=True)
    clear = np.abs(x) > 0
    np.testing.assert_array_equal(codes.numpy()[clear], expected[clear])
    step = signed.step(tf.constant(x), variables).numpy()
    np.testing.assert_array_equal(
        quantize(signed, variables, x), cases.reconstruct(codes, step)
    )


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_unsigned_activation_gradient(implementation):
    x = cases.random_inputs((8, 5, 5, 4), spread=3.0)
    upstream = cases.random_upstream(x.shape)
    quantizer = UniformActivation(3, clip=2.5, implementation=implementation)
    d_x, d_clip = cases.gradients(quantizer, build(quantizer), x, upstream, "clip")
    expected, _ = oracle.unsigned_gradients(x, 2.5, upstream)
    np.testing.assert_array_equal(d_x, expected)
    assert d_clip is None


def test_signed_activation_gradient():
    x = cases.random_inputs((8, 5, 5, 4), spread=3.0)
    upstream = cases.random_upstream(x.shape)
    quantizer = UniformActivation(3, signed=True, clip=2.5)
    d_x, d_clip = cases.gradients(quantizer, build(quantizer), x, upstream, "clip")
    np.testing.assert_array_equal(d_x, np.where(np.abs(x) <= 2.5, upstream, 0))
    assert d_clip is None


@pytest.mark.parametrize("bits", range(2, 9))
def test_an_activation_at_the_clip_is_in_range(bits):
    """`Q * (clip / Q)` may round below the clip, where much data can lie."""
    for clip in (7.297671, 7.2992578, 7.9652796, 3.8429387):
        x = tf.constant([clip, -clip], tf.float32)
        quantizer = UniformActivation(bits, signed=True, clip=clip)
        (d_x,) = cases.gradients(quantizer, build(quantizer), x, [1.0, 2.0], None)
        np.testing.assert_array_equal(d_x, [1, 2])


@pytest.mark.parametrize("bits", [16, 32])
def test_unrounded_activations_are_clipped_only(bits):
    x = np.linspace(-4, 4, 2001).astype(np.float32)
    unsigned = UniformActivation(bits, clip=2.5)
    values = quantize(unsigned, build(unsigned), x)
    np.testing.assert_allclose(values, np.clip(x, 0, 2.5), rtol=0, atol=1e-6)
    signed = UniformActivation(bits, signed=True, clip=2.5)
    values = quantize(signed, build(signed), x)
    np.testing.assert_allclose(values, np.clip(x, -2.5, 2.5), rtol=0, atol=1e-6)


def test_activations_by_hand():
    unsigned = UniformActivation(2, clip=3.0)
    x = [-4.0, -1.4, 0.4, 0.6, 2.6, 9.0]
    np.testing.assert_array_equal(
        quantize(unsigned, build(unsigned), x), [0, 0, 0, 1, 3, 3]
    )
    signed = UniformActivation(3, signed=True, clip=3.0)
    np.testing.assert_array_equal(
        quantize(signed, build(signed), x), [-3, -1, 0, 1, 3, 3]
    )
    binary = UniformActivation(1, signed=True, clip=3.0)
    np.testing.assert_array_equal(
        quantize(binary, build(binary), x), [-3, -3, 3, 3, 3, 3]
    )


@pytest.mark.parametrize("signed", [False, True])
def test_calibrate_finds_the_clip_without_error(signed):
    quantizer = UniformActivation(3, signed=signed, clip=50.0)
    variables = build(quantizer)
    top = 3 if signed else 7
    x = np.arange(-top, top + 1, dtype=np.float32).repeat(20)
    quantizer.calibrate([x], variables)
    assert float(variables["clip"]) == top
    assert int(variables["calibrated"]) == 1
    expected = x if signed else np.maximum(x, 0)
    np.testing.assert_array_equal(quantize(quantizer, variables, x), expected)


@pytest.mark.parametrize("clip", [0, -1.0, float("nan")])
def test_clip_must_be_positive(clip):
    with pytest.raises(ValueError, match="Received: clip="):
        UniformActivation(2, clip=clip)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="Received: implementation='fast'"):
        UniformActivation(2, implementation="fast")


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_the_gradient_passes_straight_through(bits):
    """At one bit the range is the mean magnitude: beyond it weights must train too."""
    weights = tf.Variable(np.linspace(-1, 1, 10).astype(np.float32))
    quantizer = UniformWeight(bits, per_axis=False)
    variables = build(quantizer, weights.shape)
    with tf.GradientTape() as tape:
        outputs = quantizer(weights, True, variables)
    np.testing.assert_array_equal(tape.gradient(outputs, weights), np.ones(10))
