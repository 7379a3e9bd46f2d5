"""Grids: that real kernels clamp where the grid says, and what is refused."""

import numpy as np
import pytest

from tests.export.kernels_in_files import CONV, DEPTHWISE, RUNTIMES, Layer
from tf_lowbit.compat import keras
from tf_lowbit.export.integer import int8_grids, kernels

UNSIGNED = [(0, 2**k - 1) for k in range(1, 9)]
NARROW = [(1 - 2 ** (k - 1), 2 ** (k - 1) - 1) for k in range(2, 9)]
WIDE = [(-(2 ** (k - 1)), 2 ** (k - 1) - 1) for k in range(2, 9)]
# A bound of a later ReLU6, a residual sum's, one code alone, the empty side.
OTHERS = [(0, 5), (0, 100), (-5, 3), (-1, 0), (-128, 0), (-100, 155), (-1, 254)]
ALL = UNSIGNED + NARROW + WIDE + OTHERS
STEPS = [1.0, 0.0371, 3e-5, 41.7]


def _run(grid, operator, kernel, runtime):
    """Codes of a layer whose accumulators go far beyond the grid, code by code."""
    inputs = np.arange(-128, 128)[:, None]
    channels = 8
    weights = np.full((1, channels), 4, np.int8)
    biases = np.arange(channels) - 4  # Accumulators: all in [-516, 511].
    input_scale = 0.5
    # M = 1: a code for an accumulator.
    scales = np.full(channels, grid.scale / input_scale, np.float32)
    layer = Layer(
        operator,
        weights,
        scales,
        biases,
        input_scale=input_scale,
        output_scale=grid.scale,
        output_zero_point=grid.zero_point,
        activation=grid.clamp,
    )
    np.testing.assert_array_equal(layer.multipliers(kernel), 1.0)
    return layer.accumulators(inputs), layer.run(inputs, kernel, runtime)


@pytest.mark.parametrize(("runtime", "kernel"), RUNTIMES)
@pytest.mark.parametrize(("low", "high"), ALL)
def test_kernels_clamp_at_both_ends(low, high, runtime, kernel):
    for step in STEPS:
        for operator in (DEPTHWISE, CONV):
            grid = int8_grids.grid(step, low, high)
            accumulators, codes = _run(grid, operator, kernel, runtime)
            np.testing.assert_array_equal(codes, np.clip(accumulators, low, high))
            assert (codes.min(), codes.max()) == (low, high)


@pytest.mark.parametrize(("low", "high"), ALL)
def test_the_file_holds_the_grid(low, high):
    for step in STEPS:
        for grid in (
            int8_grids.grid(step, low, high),
            int8_grids.float_grid(step, low, high),
        ):
            assert (grid.step, grid.low, grid.high) == (step, low, high)
            assert grid.levels == high - low + 1
            assert grid.high + grid.zero_point == 127
            assert grid.low + grid.zero_point >= -128
            assert grid.scale == np.float32(grid.scale) > 0


@pytest.mark.parametrize(("low", "high"), UNSIGNED)
def test_unsigned(low, high):
    grid = int8_grids.grid(0.1, low, high)
    assert grid.scale == float(np.float32(0.1))
    assert grid.zero_point == 127 - high
    # All of int8: it clamps by itself.
    assert grid.clamp == (
        int8_grids.NO_CLAMP if high == 255 else int8_grids.CLAMP_AT_ZERO
    )


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point", "clamp"),
    [
        (-1, 1, 1.0, 126, "RELU_N1_TO_1"),
        (-2, 1, 0.5, 126, "RELU_N1_TO_1"),
        (-7, 7, float(np.float32(1 / 7)), 120, "RELU_N1_TO_1"),
        (-8, 7, 0.125, 120, "RELU_N1_TO_1"),
        (-127, 127, float(np.float32(1 / 127)), 0, "RELU_N1_TO_1"),
        (-128, 127, 0.25, 0, "NONE"),
        (0, 3, 0.25, 124, "RELU"),
    ],
)
def test_by_hand(low, high, scale, zero_point, clamp):
    grid = int8_grids.grid(0.25, low, high)
    assert grid == int8_grids.Grid(0.25, low, high, scale, zero_point, clamp)


@pytest.mark.parametrize(("low", "high"), ALL)
def test_float_grid_has_the_step_as_its_scale(low, high):
    """Floats are quantized by the scale itself; nothing clamps them below."""
    for step in STEPS:
        grid = int8_grids.float_grid(step, low, high)
        assert grid.scale == float(np.float32(step))
        assert grid.clamp == int8_grids.NO_CLAMP


def test_why_a_signed_grid_is_not_clamped_by_relu():
    """RELU clamps at zero: the clamp of -2..1 is the other one."""
    wrong = int8_grids.Grid(1.0, -2, 1, 0.5, 126, int8_grids.CLAMP_AT_ZERO)
    for _, kernel in RUNTIMES[:2]:
        _, codes = _run(wrong, DEPTHWISE, kernel, "tensorflow")
        assert codes.min() == 0
    # And without one, int8 clamps far below.
    wrong = int8_grids.Grid(1.0, -2, 1, 0.5, 126, int8_grids.NO_CLAMP)
    _, codes = _run(wrong, DEPTHWISE, kernels.BUILTIN, "tensorflow")
    assert codes.min() == -254


@pytest.mark.parametrize("make", [int8_grids.grid, int8_grids.float_grid])
@pytest.mark.parametrize(
    ("step", "low", "high"),
    [
        (1.0, 1, 3),
        (1.0, -3, -1),
        (1.0, 0, 256),
        (1.0, -128, 128),
        (1.0, -255, 1),
        (0.0, 0, 3),
        (-1.0, 0, 3),
        (float("inf"), 0, 3),
        (float("nan"), 0, 3),
    ],
)
def test_refusals(make, step, low, high):
    with pytest.raises(ValueError, match="at most 256 codes, zero among them") as info:
        make(step, low, high)
    assert f"Received: codes {low}..{high}, step {step}" in str(info.value)


def test_holds():
    grid = int8_grids.grid(0.5, -4, 3)
    assert grid.holds(grid)
    assert grid.holds(int8_grids.grid(0.5, -2, 1))
    assert grid.holds(int8_grids.grid(0.5, 0, 3))
    assert grid.holds(int8_grids.float_grid(0.5, -4, 3))
    assert not grid.holds(int8_grids.grid(0.25, -2, 1))
    assert not grid.holds(int8_grids.grid(0.5, -5, 3))
    assert not grid.holds(int8_grids.grid(0.5, -4, 4))
    assert not int8_grids.grid(0.5, 0, 3).holds(grid)


def test_config_round_trip():
    grid = int8_grids.grid(0.3, -2, 1)
    assert int8_grids.Grid.from_config(grid.get_config()) == grid
    config = keras.saving.serialize_keras_object(grid)
    assert keras.saving.deserialize_keras_object(config) == grid
