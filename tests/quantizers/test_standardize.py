"""`standardize`: each weight quantizer on `(w - mean) / std`."""

import numpy as np
import pytest

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import build, quantize
from tf_lowbit.compat import tf

NAMES = [name for name in cases.CASES if "standardized" in name]
SHAPE = (3, 3, 2, 4)


def pair(name, bits):
    """The quantizer and the one without the option."""
    quantizer = cases.make(name, bits)
    config = {**quantizer.get_config(), "standardize": False}
    return quantizer, type(quantizer).from_config(config)


def weights(spread=0.1):
    return cases.random_inputs(SHAPE, spread=spread) + np.float32(0.05)


@pytest.mark.parametrize("bits", [1, 2, 4, 32])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_quantizer_of_standardized_weights(name, bits):
    w, (quantizer, plain) = weights(), pair(name, bits)
    z = quantizer.prepared(tf.constant(w))
    np.testing.assert_allclose(z, oracle.standardized(w), rtol=1e-4, atol=1e-5)
    variables, others = build(quantizer, SHAPE), build(plain, SHAPE)
    quantizer.initialize(tf.Variable(w), variables)
    plain.initialize(tf.Variable(z), others)
    for key, variable in variables.items():
        np.testing.assert_array_equal(variable, others[key])
    values = quantize(quantizer, variables, w)
    np.testing.assert_array_equal(values, quantize(plain, others, z))
    exact = quantizer.exact(tf.constant(w), variables)
    np.testing.assert_array_equal(exact, plain.exact(z, others))
    if bits <= 8:
        codes = quantizer.codes(tf.constant(w), variables)
        step = quantizer.step(tf.constant(w), variables)
        np.testing.assert_array_equal(codes, plain.codes(z, others))
        np.testing.assert_array_equal(step, plain.step(z, others))
        np.testing.assert_allclose(values, cases.reconstruct(codes, step), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_goes_through_mean_and_deviation(name):
    w, (quantizer, plain) = weights(), pair(name, 3)
    upstream = cases.random_upstream(SHAPE)
    variables = build(quantizer, SHAPE)
    quantizer.initialize(tf.Variable(w), variables)
    z = quantizer.prepared(tf.constant(w))
    (d_z,) = cases.gradients(plain, variables, z, upstream, None)
    (d_w,) = cases.gradients(quantizer, variables, w, upstream, None)
    expected = oracle.standardized_gradient(w, d_z)
    np.testing.assert_allclose(d_w, expected, rtol=1e-3, atol=1e-3)
    assert not np.allclose(d_w, upstream)


@pytest.mark.parametrize("name", NAMES)
def test_neither_scale_nor_offset_of_the_weights_counts(name):
    w, (quantizer, _) = weights(), pair(name, 2)
    variables = build(quantizer, SHAPE)
    quantizer.initialize(tf.Variable(w), variables)
    one, other = (quantizer.codes(tf.constant(v), variables) for v in (w, 8 * w - 1))
    assert np.mean(one != other) < 0.05  # But for roundings on a threshold.


@pytest.mark.parametrize("name", NAMES)
def test_equal_weights_are_finite(name):
    quantizer, _ = pair(name, 2)
    w = tf.Variable(tf.fill(SHAPE, 0.3))
    variables = build(quantizer, SHAPE)
    quantizer.initialize(w, variables)
    found = cases.gradients(quantizer, variables, w, np.ones(SHAPE), None)
    assert np.isfinite(quantize(quantizer, variables, w)).all()
    assert np.isfinite(found[0]).all()
