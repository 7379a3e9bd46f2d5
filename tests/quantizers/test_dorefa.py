"""DoReFa: every level and threshold, at the quantizer's own interface."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import DoReFaActivation, DoReFaWeight, build, quantize
from tf_lowbit.compat import tf

LARGEST = 1.5


def beside_thresholds(bits, margin=1e-6):
    """Weights whose unit `u` is just below and just above each threshold."""
    n = 2**bits - 1
    unit = (np.arange(n) + 0.5) / n
    unit = np.concatenate([unit - margin, unit + margin])
    unit = unit[(unit > 0) & (unit < 1)]
    weights = np.arctanh(np.tanh(LARGEST) * (2 * unit - 1))
    return np.append(weights, LARGEST).astype(np.float32)


@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_weight_codes_beside_every_threshold(bits):
    quantizer, w = DoReFaWeight(bits), beside_thresholds(bits)
    variables = build(quantizer)
    codes = quantizer.codes(tf.constant(w), variables)
    assert codes.dtype == tf.int32
    np.testing.assert_array_equal(codes, oracle.dorefa_codes(w, bits))
    n = 2**bits - 1
    assert set(codes.numpy()) == set(range(-n, n + 1, 2))
    values = quantize(quantizer, variables, w)
    np.testing.assert_allclose(values, oracle.dorefa_codes(w, bits) / n, rtol=1e-6)
    step = quantizer.step(tf.constant(w), variables)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, step.numpy()))


def test_weights_by_hand():
    # t = tanh(w) = (0.8, -0.8, 0.4, 0.1), u = (1, 0, 0.75, 0.5625)
    w = np.arctanh([0.8, -0.8, 0.4, 0.1])
    # k = 1: round(u) = (1, 0, 1, 1); k = 2: round(3u) = (3, 0, 2, 2);
    # k = 3: round(7u) = (7, 0, 5, 4).
    expected = {1: [1, -1, 1, 1], 2: [3, -3, 1, 1], 3: [7, -7, 3, 1]}
    for bits, codes in expected.items():
        quantizer = DoReFaWeight(bits)
        variables = build(quantizer)
        found = quantizer.codes(tf.constant(w, tf.float32), variables)
        np.testing.assert_array_equal(found, codes)
        n = 2**bits - 1
        np.testing.assert_allclose(
            quantize(quantizer, variables, w), np.array(codes) / n
        )


@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_the_middle_is_a_tie_that_goes_to_the_even_one(bits):
    """w = 0 is u = 1/2: `round(n / 2)` is 0 at one bit, else 2^(k-1)."""
    codes = DoReFaWeight(bits).codes(tf.constant([0.0, 1.0]), build(DoReFaWeight(bits)))
    assert codes.numpy()[0] == (-1 if bits == 1 else 1)


@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_no_weight_level_is_zero_and_all_are_reached(bits):
    w = np.linspace(-2, 2, 20001).astype(np.float32)
    quantizer = DoReFaWeight(bits)
    values = quantize(quantizer, build(quantizer), w)
    assert len(np.unique(values)) == quantizer.level_count(bits) == 2**bits
    assert (values != 0).all()
    assert values.min() == -1
    assert values.max() == 1


@pytest.mark.parametrize("bits", [16, 32])
def test_unrounded_weights_are_two_u_minus_one(bits):
    w = cases.random_inputs(spread=2.0)
    quantizer = DoReFaWeight(bits)
    values = quantize(quantizer, build(quantizer), w)
    expected = 2 * oracle.dorefa_unit(w) - 1
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_gradient", [True, False])
@pytest.mark.parametrize("bits", cases.ALL_BITS)
def test_weight_gradient(bits, max_gradient):
    w = cases.random_inputs()
    upstream = cases.random_upstream(w.shape)
    quantizer = DoReFaWeight(bits, max_gradient=max_gradient)
    (found,) = cases.gradients(quantizer, build(quantizer), w, upstream, None)
    expected = oracle.dorefa_gradient(w, upstream, max_gradient=max_gradient)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_maximum_is_over_the_whole_tensor():
    w = cases.random_inputs()
    w[..., 3] *= 10
    quantizer = DoReFaWeight(4)
    codes = quantizer.codes(tf.constant(w), build(quantizer))
    np.testing.assert_array_equal(np.abs(codes).max(axis=(0, 1, 2))[3], 15)
    unit = oracle.dorefa_unit(w) * 15
    clear = np.abs(unit % 1 - 0.5) > 1e-4
    expected = oracle.dorefa_codes(w, 4)
    np.testing.assert_array_equal(codes.numpy()[clear], expected[clear])


@settings(max_examples=25, deadline=None)
@given(
    hnp.arrays(np.float32, 16, elements=st.floats(-8, 8, width=32)),
    st.sampled_from(cases.LOW_BITS),
)
def test_weights_are_monotone_and_few(w, bits):
    quantizer = DoReFaWeight(bits)
    values = quantize(quantizer, build(quantizer), np.sort(w))
    assert (np.diff(values) >= 0).all()
    assert len(np.unique(values)) <= 2**bits


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_activations_beside_every_threshold(bits, implementation):
    n = 2**bits - 1
    ties = (np.arange(n) + 0.5) / n
    levels = np.arange(n + 1) / n
    x = np.concatenate([oracle.around(ties, 4), levels, [-3, -0.0, 1.01, 9]])
    x = x.astype(np.float32)
    quantizer = DoReFaActivation(bits, implementation)
    variables = build(quantizer)
    codes = quantizer.codes(tf.constant(x), variables)
    assert codes.dtype == tf.int32
    np.testing.assert_array_equal(codes, oracle.unsigned_codes(x, 1.0, bits))
    values = quantize(quantizer, variables, x)
    np.testing.assert_allclose(values, oracle.unsigned_values(x, 1.0, bits), rtol=1e-6)
    step = quantizer.step(tf.constant(x), variables)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, step.numpy()))
    assert len(np.unique(values)) == quantizer.level_count(bits) == 2**bits


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_one_bit_activations_tie_to_zero(implementation):
    """At one bit the threshold 1/2 is exact in float32; half to even is 0."""
    quantizer = DoReFaActivation(1, implementation)
    x = np.concatenate([oracle.shifted([0.5], u) for u in (-1, 0, 1)])
    np.testing.assert_array_equal(quantize(quantizer, build(quantizer), x), [0, 0, 1])


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_activations_and_gradient_by_hand(implementation):
    quantizer = DoReFaActivation(2, implementation)
    variables = build(quantizer)
    x = [-0.5, 0.0, 0.1, 0.2, 0.49, 0.51, 0.9, 1.0, 1.5]
    third = np.float32(1 / 3)
    expected = [0, 0, 0, third, third, 2 * third, 1, 1, 1]
    np.testing.assert_allclose(quantize(quantizer, variables, x), expected, rtol=1e-6)
    (d_x,) = cases.gradients(quantizer, variables, x, np.arange(1, 10), None)
    np.testing.assert_array_equal(d_x, [0, 2, 3, 4, 5, 6, 7, 8, 0])


@pytest.mark.parametrize("implementation", ["fast", "XLA", None, 1])
def test_activations_refuse_an_unknown_implementation(implementation):
    with pytest.raises(ValueError, match="Received: implementation="):
        DoReFaActivation(2, implementation)
