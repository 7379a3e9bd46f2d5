"""Ranges from data."""

import numpy as np
import pytest

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import PACT, LSQActivation, UniformActivation, build
from tf_lowbit.compat import tf
from tf_lowbit.core import ste
from tf_lowbit.quantizers import ranges

CALIBRATED = [
    LSQActivation(2),
    LSQActivation(2, signed=True),
    PACT(2),
    UniformActivation(2),
    UniformActivation(2, signed=True),
]


def quantizer_of(bits):
    return lambda x, clip: ste.unsigned_forward(x, clip, tf.constant(bits))


@pytest.mark.parametrize("data", [[], [np.zeros(0)], [np.zeros((0, 3))] * 2])
def test_empty_data_is_refused(data):
    with pytest.raises(ValueError, match="at least one value"):
        ranges.thinned(data)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_that_is_not_finite_is_refused_and_counted(bad):
    with pytest.raises(ValueError, match="Received: 2 of 5 are NaN or inf"):
        ranges.thinned([np.array([1.0, bad, bad]), np.array([[1.0, 2.0]])])


@pytest.mark.parametrize("quantizer", CALIBRATED, ids=repr)
@pytest.mark.parametrize("data", [[], [np.array([1.0, np.nan], np.float32)]])
def test_a_refused_calibration_leaves_the_variables_alone(quantizer, data):
    variables = build(quantizer)
    before = {key: value.numpy() for key, value in variables.items()}
    with pytest.raises(ValueError, match="Calibration needs"):
        quantizer.calibrate(data, variables)
    assert {key: value.numpy() for key, value in variables.items()} == before
    assert before["calibrated"] == 0


@pytest.mark.parametrize("quantizer", CALIBRATED, ids=repr)
def test_a_dead_activation_gets_a_positive_finite_range(quantizer):
    variables = build(quantizer)
    quantizer.calibrate([np.zeros((4, 3), np.float32)], variables)
    assert int(variables["calibrated"]) == 1
    values = cases.quantize(quantizer, variables, [0.0, 1.0])
    assert np.isfinite(values).all()
    assert values[1] > 0


def test_small_data_is_not_thinned():
    data = [np.ones((2, 3), np.float32), np.zeros(4, np.float32)]
    np.testing.assert_array_equal(ranges.thinned(data), [1] * 6 + [0] * 4)
    assert ranges.thinned([np.ones(3)]).dtype == np.float32


def test_large_data_is_thinned_to_the_limit():
    values = ranges.thinned([np.arange(1 << 18, dtype=np.float32)] * 3)
    assert 1 << 16 < values.size <= 1 << 17


@pytest.mark.parametrize("channels", [2, 3, 8, 64])
def test_thinning_sees_every_channel(channels):
    """A stride that divides the channels would look at some of them alone."""
    data = np.zeros((1 << 17, channels), np.float32)
    data[:, -1] = channels
    assert ranges.mean_magnitude([data], signed=True) == pytest.approx(1.0, rel=0.15)


def test_mean_magnitude_by_hand():
    data = [np.array([[-3.0, 1.0], [2.0, -2.0]], np.float32)]
    assert ranges.mean_magnitude(data, signed=True) == 2.0
    assert ranges.mean_magnitude(data, signed=False) == 0.75


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_clip_has_the_least_error_of_a_fine_search(bits):
    x = np.abs(cases.random_inputs((3000,), spread=2.0))
    found = ranges.least_error_clip([x], quantizer_of(bits), signed=False)

    def error(clip):
        return np.square(oracle.unsigned_values(x, clip, bits) - x).mean()

    best = min(error(clip) for clip in np.linspace(0.02, 1, 500) * x.max())
    assert error(found) <= 1.05 * best


@pytest.mark.parametrize("bits", [2, 4])
def test_the_signed_clip_has_the_least_error_of_a_fine_search(bits):
    x = cases.random_inputs((3000,), spread=2.0)
    quantizer = UniformActivation(bits, signed=True)
    variables = build(quantizer)
    quantizer.calibrate([x], variables)
    top = oracle.signed_limits(bits, narrow=True)[1]

    def error(clip):
        values = oracle.signed_codes(x, clip / top, bits, True) * clip / top
        return np.square(values - x).mean()

    best = min(error(clip) for clip in np.linspace(0.02, 1, 500) * np.abs(x).max())
    assert error(float(variables["clip"])) <= 1.05 * best


def test_an_outlier_is_clipped_away():
    x = np.append(np.linspace(0, 1, 20000), 20.0).astype(np.float32)
    assert ranges.least_error_clip([x], quantizer_of(2), signed=False) < 4.0


def test_without_rounding_nothing_is_clipped_away():
    x = np.array([0.5, 1.0, 7.0], np.float32)
    assert ranges.least_error_clip([x], quantizer_of(32), signed=False) == 7.0


def test_unsigned_error_is_against_the_relu():
    """The negative values neither count nor widen the clip."""
    x = np.array([-50.0, 0.0, 1.0, 2.0, 3.0], np.float32)
    assert ranges.least_error_clip([x], quantizer_of(2), signed=False) == 3.0
