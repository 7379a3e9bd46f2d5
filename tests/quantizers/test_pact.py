"""PACT: a learned clip alpha."""

import numpy as np
import pytest

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import PACT, build, quantize
from tf_lowbit.compat import keras, tf


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_thresholds_are_exact_to_one_ulp_where_the_step_is(bits, implementation):
    """alpha = n / 4: ties are exact in float32, and go to the even code."""
    n = 2**bits - 1
    ties = oracle.half_codes(0, n) / 4
    x = np.concatenate([ties, oracle.around(ties, 1), [-1, n / 4, n]])
    x = x.astype(np.float32)
    quantizer = PACT(bits, alpha=n / 4, implementation=implementation)
    variables = build(quantizer)
    expected = oracle.unsigned_codes(x, n / 4, bits)
    np.testing.assert_array_equal(quantizer.codes(tf.constant(x), variables), expected)
    np.testing.assert_array_equal(quantize(quantizer, variables, x), expected / 4)


@pytest.mark.parametrize("alpha", [6.0, 0.37, 3.1234567])
@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_codes_beside_every_threshold_of_any_clip(bits, alpha):
    n, alpha = 2**bits - 1, np.float32(alpha)
    x = oracle.around(oracle.half_codes(0, n) * np.float64(alpha) / n, 8)
    quantizer = PACT(bits, alpha=float(alpha))
    variables = build(quantizer)
    codes = quantizer.codes(tf.constant(x), variables)
    assert codes.dtype == tf.int32
    np.testing.assert_array_equal(codes, oracle.unsigned_codes(x, alpha, bits))
    values = quantize(quantizer, variables, x)
    step = quantizer.step(tf.constant(x), variables).numpy()
    np.testing.assert_allclose(step, alpha / n, rtol=1e-6)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, step))
    assert len(np.unique(values)) == quantizer.level_count(bits) == 2**bits


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", cases.ALL_BITS)
def test_gradients(bits, implementation):
    x = cases.random_inputs((8, 5, 5, 4), spread=3.0)
    upstream = cases.random_upstream(x.shape)
    quantizer = PACT(bits, alpha=2.5, implementation=implementation)
    d_x, d_alpha = cases.gradients(quantizer, build(quantizer), x, upstream, "alpha")
    expected = oracle.unsigned_gradients(x, 2.5, upstream)
    np.testing.assert_array_equal(d_x, expected[0])
    assert expected[1] != 0
    assert d_alpha == expected[1]


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_by_hand(implementation):
    quantizer = PACT(2, alpha=6.0, implementation=implementation)
    variables = build(quantizer)
    x = [-1.0, 0.9, 1.1, 3.5, 6.0, 7.0, 100.0]
    np.testing.assert_array_equal(
        quantize(quantizer, variables, x), [0, 0, 2, 4, 6, 6, 6]
    )
    upstream = [1, 2, 4, 8, 16, 32, 64]
    d_x, d_alpha = cases.gradients(quantizer, variables, x, upstream, "alpha")
    np.testing.assert_array_equal(d_x, [0, 2, 4, 8, 16, 0, 0])
    assert d_alpha == 96


@pytest.mark.parametrize("bits", [16, 32])
def test_unrounded_is_the_clip_alone(bits):
    x = np.linspace(-2, 8, 2001).astype(np.float32)
    quantizer = PACT(bits, alpha=2.5)
    values = quantize(quantizer, build(quantizer), x)
    np.testing.assert_allclose(values, np.clip(x, 0, 2.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_alpha_learns(implementation):
    """A target above the clip pulls alpha up, step for step."""
    quantizer = PACT(4, alpha=1.0, implementation=implementation)
    variables = build(quantizer)
    optimizer = keras.optimizers.SGD(0.1)
    x = tf.constant([0.2, 3.0, 5.0])
    for _ in range(3):
        with tf.GradientTape() as tape:
            y = quantizer(x, training=True, weights=variables)
            loss = tf.reduce_sum(-y)
        optimizer.minimize(loss, [variables["alpha"]], tape=tape)
    # Two values lie above alpha: each step adds 0.1 * 2.
    np.testing.assert_allclose(variables["alpha"], 1.6, rtol=1e-6)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_an_update_never_turns_alpha_negative(implementation):
    quantizer = PACT(2, alpha=0.5, implementation=implementation)
    variables = build(quantizer)
    x = tf.constant([0.1, 3.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(quantizer(x, training=True, weights=variables))
    keras.optimizers.SGD(100.0).minimize(loss, [variables["alpha"]], tape=tape)
    np.testing.assert_allclose(variables["alpha"], 1e-6)
    assert np.isfinite(quantize(quantizer, variables, x)).all()
    # It can come back: the floor still has a gradient.
    _, d_alpha = cases.gradients(quantizer, variables, x, [1.0, 1.0], "alpha")
    assert d_alpha == 2


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_the_forward_is_finite_where_an_optimizer_ignores_the_constraint(alpha):
    quantizer = PACT(2)
    variables = build(quantizer)
    variables["alpha"].assign(alpha)
    values = quantize(quantizer, variables, [-1.0, 0.0, 1.0])
    np.testing.assert_allclose(values, [0, 0, 1e-6], rtol=1e-5)


def test_alpha_decay_is_an_l2_penalty_of_the_layer():
    layer = keras.layers.Layer()
    PACT(2, alpha=3.0, alpha_decay=0.25).build((4,), "act", layer)
    np.testing.assert_allclose(tf.add_n(layer.losses), 0.25 * 9.0)
    plain = keras.layers.Layer()
    PACT(2, alpha=3.0, alpha_decay=0.0).build((4,), "act", plain)
    assert plain.losses == []


def test_alpha_decays_by_default():
    """By 2e-4 alpha: the paper's decay of CIFAR-10, in torch's way of counting."""
    layer = keras.layers.Layer()
    variables = PACT(2, alpha=3.0).build((4,), "act", layer)
    with tf.GradientTape() as tape:
        penalty = tf.add_n(layer.losses)
    d_alpha = tape.gradient(penalty, variables["alpha"])
    np.testing.assert_allclose(d_alpha, 2e-4 * 3.0, rtol=1e-6)


def test_the_gradient_factor_is_on_alpha_alone():
    quantizer = PACT(2, alpha=6.0, gradient_factor=0.5)
    x, upstream = [-1.0, 0.9, 6.0, 7.0, 100.0], [1, 2, 16, 32, 64]
    d_x, d_alpha = cases.gradients(quantizer, build(quantizer), x, upstream, "alpha")
    np.testing.assert_array_equal(d_x, [0, 2, 16, 0, 0])
    assert d_alpha == 48


def test_calibrate_replaces_alpha_and_sets_the_flag():
    quantizer = PACT(2, alpha=50.0)
    variables = build(quantizer)
    assert int(variables["calibrated"]) == 0
    # 0, 1, 2 and 3 alone: the clip 3 makes no error at 2 bits.
    x = np.repeat([[-2.0, 0.0, 1.0, 2.0, 3.0]], 10, axis=0).astype(np.float32)
    quantizer.calibrate([x[:4], x[4:]], variables)
    assert float(variables["alpha"]) == 3.0
    assert int(variables["calibrated"]) == 1


@pytest.mark.parametrize("alpha", [0, 0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="Received: alpha="):
        PACT(2, alpha=alpha)


@pytest.mark.parametrize("decay", [-1e-4, float("nan")])
def test_alpha_decay_must_not_be_negative(decay):
    with pytest.raises(ValueError, match="Received: alpha_decay="):
        PACT(2, alpha_decay=decay)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="Received: implementation='fast'"):
        PACT(2, implementation="fast")
