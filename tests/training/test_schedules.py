"""Schedules by hand, and what holds for every ramp."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lowbit.compat import tf
from tf_lowbit.training import schedules
from tf_lowbit.training.schedules import LinearRamp

# TensorFlow flushes subnormal floats to zero.
SHARES = st.floats(0.0, 1.0, width=32, allow_subnormal=False)


def values(ramp, points):
    return [float(ramp(point)) for point in points]


def test_doctests():
    result = doctest.testmod(schedules)
    assert result.attempted == 3
    assert result.failed == 0


@pytest.mark.parametrize(
    ("start", "tail", "by_hand"),
    [
        # 0.5 more within 0.75.
        (0.5, 0.25, {0: 0.5, 0.25: 2 / 3, 0.375: 0.75, 0.75: 1, 0.8: 1, 1: 1}),
        (0.5, 0.2, {0: 0.5, 0.2: 0.625, 0.4: 0.75, 0.6: 0.875, 0.8: 1, 0.9: 1, 1: 1}),
        (0.0, 0.5, {0: 0, 0.125: 0.25, 0.25: 0.5, 0.375: 0.75, 0.5: 1, 0.75: 1, 1: 1}),
        (0.25, 0.0, {0: 0.25, 0.5: 0.625, 0.75: 0.8125, 1: 1}),
        (0.0, 0.0, {0: 0, 0.1: 0.1, 0.5: 0.5, 0.9: 0.9, 1: 1}),
        (1.0, 0.2, {0: 1, 0.4: 1, 1: 1}),
        (0.0, 1.0, {0: 1, 0.5: 1, 1: 1}),
        (0.3, 1, {0: 1, 1: 1}),
    ],
)
def test_a_ramp_by_hand(start, tail, by_hand):
    found = values(LinearRamp(start, tail), by_hand)
    np.testing.assert_allclose(found, list(by_hand.values()), rtol=3e-7, atol=0)


def test_the_defaults_are_the_methods():
    assert LinearRamp() == LinearRamp(start=0.5, tail=0.2)


@settings(max_examples=40, deadline=None)
@given(start=SHARES, tail=SHARES, points=st.lists(SHARES, min_size=2, max_size=6))
def test_a_ramp_is_monotone_and_a_share(start, tail, points):
    found = values(LinearRamp(start, tail), sorted(points))
    assert (np.diff(found) >= 0).all()
    # 1 - (1 - start): half a unit in the last place of 1 may be lost.
    assert found[0] >= start - 2.0**-24
    assert found[-1] <= 1


@settings(max_examples=40, deadline=None)
@given(start=SHARES, tail=SHARES, within=SHARES)
def test_the_tail_is_exactly_one(start, tail, within):
    ramp = LinearRamp(start, tail)
    assert values(ramp, [1 - tail, 1 - tail + within * tail, 1.0]) == [1, 1, 1]


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "XLA"])
def test_the_tail_is_exactly_one_in_a_compiled_step(compiled):
    """A compiler may divide by multiplying with the reciprocal, which rounds anew."""
    tails = [i / 20 for i in range(20)]
    ramps = [LinearRamp(0.25, tail) for tail in tails]

    @tf.function(jit_compile=compiled)
    def at(points):
        return tf.stack([ramp(points[i]) for i, ramp in enumerate(ramps)])

    at_its_start = at(tf.constant([1 - tail for tail in tails], tf.float32))
    np.testing.assert_array_equal(at_its_start, np.ones(20))


@settings(max_examples=40, deadline=None)
@given(start=SHARES, tail=st.floats(0.0, 1.0, exclude_max=True))
def test_the_start_is_exact(start, tail):
    assert float(LinearRamp(start, tail)(0.0)) == np.float32(start)


@pytest.mark.parametrize("tail", [0.2, 1.0])
@pytest.mark.parametrize(
    "progress",
    [0.4, np.float32(0.4), tf.constant(0.4), tf.constant(0.4, tf.float64)],
    ids=lambda p: type(p).__name__,
)
def test_floats_and_tensors_give_a_scalar_float32_tensor(progress, tail):
    value = LinearRamp(0.5, tail)(progress)
    assert tf.is_tensor(value)
    assert value.dtype == tf.float32
    assert value.shape == ()
    assert float(value) == pytest.approx({0.2: 0.75, 1.0: 1.0}[tail])


@pytest.mark.parametrize("name", ["start", "tail"])
@pytest.mark.parametrize(
    "value", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5", None, [0.5]], ids=repr
)
def test_a_bad_share_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a finite number") as error:
        LinearRamp(**{name: value})
    assert str(error.value).endswith(f"Received: {name}={value!r}")


def test_a_ramp_is_a_value():
    assert LinearRamp(0.3) == LinearRamp(0.3)
    assert len({LinearRamp(0.3), LinearRamp(0.3), LinearRamp(0.4)}) == 2
    with pytest.raises(AttributeError):
        LinearRamp().start = 0.1


@pytest.mark.parametrize(
    ("bits", "share"), [(1, 0.25), (2, 0.25), (3, 0.5), (4, 1), (8, 1), (32, 1)]
)
def test_the_weight_decay_is_less_at_few_bits(bits, share):
    assert schedules.weight_decay_at_bits(3e-4, bits) == 3e-4 * share


@pytest.mark.parametrize(
    ("decay", "bits"), [(-1.0, 2), (float("nan"), 2), ("1", 2), (True, 2), (1e-4, 9)]
)
def test_a_weight_decay_of_bad_arguments_is_refused(decay, bits):
    with pytest.raises(ValueError, match="Received"):
        schedules.weight_decay_at_bits(decay, bits)
