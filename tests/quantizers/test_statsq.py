"""StatsQ: the odd grid, scaled by each channel's mean magnitude."""

import numpy as np
import pytest

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import StatsQWeight, build, quantize
from tf_lowbit.compat import tf

AXES = {(-1,): (0, 1, 2), (2, 3): (0, 1)}


@pytest.mark.parametrize("channel_axes", AXES, ids=str)
@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_codes_steps_and_values(bits, channel_axes):
    w = cases.random_inputs() * np.linspace(0.1, 3, 8, dtype=np.float32)
    quantizer = StatsQWeight(bits, channel_axes=channel_axes)
    variables, axes = build(quantizer), AXES[channel_axes]
    codes = quantizer.codes(tf.constant(w), variables).numpy()
    expected = oracle.statsq_codes(w, bits, axes)
    # A float32 product on a threshold may fall on either side.
    assert np.mean(codes != expected) < 0.01
    assert np.abs(codes - expected).max() <= 2
    step = quantizer.step(tf.constant(w), variables).numpy()
    n = 2**bits - 1
    np.testing.assert_allclose(step, oracle.statsq_scale(w, axes) / n, rtol=1e-6)
    values = quantize(quantizer, variables, w)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, step))
    assert set(codes.ravel()) <= set(quantizer.level_codes(bits))


def test_by_hand():
    # One channel: mean|w| = 1, so s = 2; the levels are -2, -2/3, 2/3 and 2.
    w = np.array([[-3.0], [-1.0], [0.5], [0.25], [0.25]], np.float32)
    quantizer = StatsQWeight(2)
    variables = build(quantizer, w.shape)
    codes = quantizer.codes(tf.constant(w), variables)
    np.testing.assert_array_equal(codes, [[-3], [-1], [1], [1], [1]])
    expected = np.array([[-6], [-2], [2], [2], [2]]) / 3
    np.testing.assert_allclose(quantize(quantizer, variables, w), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", cases.ALL_BITS)
def test_the_gradient_is_passed_straight_through(bits):
    w = cases.random_inputs(spread=2.0)
    upstream = cases.random_upstream(w.shape)
    quantizer = StatsQWeight(bits)
    (d_w,) = cases.gradients(quantizer, build(quantizer), w, upstream, None)
    np.testing.assert_array_equal(d_w, upstream)


@pytest.mark.parametrize("bits", [16, 32])
def test_unrounded_is_the_clip_alone(bits):
    w = cases.random_inputs()
    quantizer = StatsQWeight(bits)
    scale = oracle.statsq_scale(w, (0, 1, 2))
    values = quantize(quantizer, build(quantizer), w)
    np.testing.assert_allclose(values, np.clip(w, -scale, scale), atol=1e-6)


def test_zeros_and_nan():
    quantizer = StatsQWeight(2)
    variables = build(quantizer, (2, 2))
    assert np.isfinite(quantize(quantizer, variables, np.zeros((2, 2)))).all()
    values = quantize(quantizer, variables, [[np.nan, 1.0], [1.0, 1.0]])
    assert np.isnan(values[:, 0]).all()
    assert np.isfinite(values[:, 1]).all()
