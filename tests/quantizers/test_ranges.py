"""Ranges from data."""

import numpy as np
import pytest

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import (
    PACT,
    LSQActivation,
    UniformActivation,
    build,
    with_bits,
)
from tf_lowbit.quantizers import ranges

CALIBRATED = [
    LSQActivation(2),
    LSQActivation(2, signed=True),
    PACT(2),
    UniformActivation(2),
    UniformActivation(2, signed=True),
]


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
    found = ranges.least_error_clip([x], bits, signed=False)

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
    assert ranges.least_error_clip([x], 2, signed=False) < 4.0


def test_without_rounding_nothing_is_clipped_away():
    x = np.array([0.5, 1.0, 7.0], np.float32)
    assert ranges.least_error_clip([x], 32, signed=False) == 7.0


def test_unsigned_error_is_against_the_relu():
    """The negative values neither count nor widen the clip."""
    x = np.array([-50.0, 0.0, 1.0, 2.0, 3.0], np.float32)
    assert ranges.least_error_clip([x], 2, signed=False) == 3.0


def test_of_weights_not_rounded_has_the_clips_of_8_bits():
    w = cases.random_inputs()
    clips = [ranges.least_error_weight_clips(w, k, False) for k in (8, 16, 32)]
    assert clips[0] == clips[1] == clips[2] <= np.abs(w).max()


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", cases.LOW_BITS)
@pytest.mark.parametrize("channel_axes", [None, (-1,), (2, 3)], ids=str)
def test_weight_clips_have_the_least_error_of_a_fine_search(bits, narrow, channel_axes):
    w = cases.random_inputs((9, 11, 2, 3)) * [1.0, 10.0, 0.1] + [0.5, 0.0, 0.0]
    found = ranges.least_error_weight_clips(w, bits, narrow, channel_axes)
    kept = [axis % 4 for axis in channel_axes or ()]
    axes = tuple(axis for axis in range(4) if axis not in kept)
    shape = tuple(d if i in kept else 1 for i, d in enumerate(w.shape))
    assert found.shape == (shape if kept else ())
    assert found.dtype == np.float32
    highest = oracle.signed_limits(bits, narrow)[1]

    def error(clip):
        step = np.asarray(clip, np.float64) / highest
        values = oracle.signed_codes(w, step, bits, narrow) * step
        return np.square(values - w).mean(axis=axes, keepdims=True)

    largest = np.abs(w).max(axis=axes, keepdims=True)
    tried = [error(share * largest) for share in np.linspace(0.01, 1, 300)]
    # Few weights in a channel: their error is a jagged function of the clip.
    assert (error(found) <= 1.4 * np.min(tried, axis=0)).all()


def test_the_clip_of_large_weights_is_that_of_all():
    """Nearly: they are drawn down to a share, which may miss an outlier."""
    w = cases.random_inputs((3, 3, 256, 64))
    w[0, 0, 0, 0] = 20.0

    def error(clip):
        step = np.float64(clip) / 127
        return np.square(oracle.signed_codes(w, step, 8, False) * step - w).mean()

    found = ranges.least_error_weight_clips(w, 8, False)
    tried = [error(clip) for clip in np.geomspace(1.0, 20.0, 20)]
    assert error(found) <= 2.0 * min(tried)
    w[0, 0, 0, 0] = 0.0
    tried = [error(clip) for clip in np.geomspace(1.0, 20.0, 20)]
    assert error(ranges.least_error_weight_clips(w, 8, False)) <= 1.1 * min(tried)


def test_channels_of_zeros_have_the_clip_0_and_nan_is_kept():
    w = np.stack([np.zeros(8), np.full(8, np.nan), np.full(8, 0.5)], axis=-1)
    found = ranges.least_error_weight_clips(w, 1, False, (-1,))
    np.testing.assert_array_equal(found, [[0.0, np.nan, 0.5]])


@pytest.mark.slow
def test_normal_clips_are_those_of_the_literature():
    """Max, Quantizing for Minimum Distortion (1960): uniform steps of 2^k levels.

    The signed grid has no level at the mirrored end, so that it is held against the
    odd ones of Max's table, 2^k - 1 levels.
    """
    steps = {2: 1.224, 3: 0.6508, 4: 0.3352}  # Of 3, 7 and 15 levels.
    for bits, step in steps.items():
        highest = 2 ** (bits - 1) - 1
        found = ranges.normal_clip(bits, signed=True, narrow_range=True) / highest
        assert found == pytest.approx(step, rel=0.06)
    assert ranges.normal_clip(1, signed=True) == pytest.approx(0.7979, rel=0.05)
    for signed in (False, True):
        clips = [ranges.normal_clip(k, signed) for k in cases.ALL_BITS]
        assert clips[:8] == sorted(clips[:8])
        assert clips[7] == clips[8] == clips[9]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("quantizer", CALIBRATED, ids=repr)
def test_calibrate_is_by_the_bits_that_hold(quantizer, bits):
    """Not those that it was made for: a stage may hold others."""
    x = cases.random_inputs((64, 9), spread=2.0)
    variables = build(quantizer)
    quantizer.assign_bits(variables, bits)
    quantizer.calibrate([x], variables)
    there = with_bits(quantizer, bits)
    expected = build(there)
    there.calibrate([x], expected)
    for name, variable in variables.items():
        np.testing.assert_array_equal(variable, expected[name])


@pytest.mark.quick(6)
@pytest.mark.parametrize(("old", "new"), [(8, 2), (2, 32), (1, 8), (4, 4)])
@pytest.mark.parametrize("quantizer", CALIBRATED, ids=repr)
def test_a_change_of_bits_rescales_the_range_about_as_new_data_would(
    quantizer, old, new
):
    x = cases.random_inputs((1 << 12,), spread=0.7)
    (name,) = set(build(quantizer)) - {"bits", "calibrated"}
    variables, fresh = build(quantizer), build(quantizer)
    quantizer.assign_bits(variables, old)
    quantizer.calibrate([x], variables)
    before = float(variables[name])
    quantizer.assign_bits(variables, new)
    quantizer.assign_bits(fresh, new)
    quantizer.calibrate([x], fresh)
    assert float(variables[name]) == pytest.approx(float(fresh[name]), rel=0.25)
    assert int(variables["bits"]) == new
    quantizer.assign_bits(variables, old)
    assert float(variables[name]) == pytest.approx(before, rel=1e-6)
