"""Decision points by brute force: over all accumulators, and in the real kernels."""

import dataclasses
import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.kernels_in_files import CONV, RUNTIMES, Layer
from tf_lowbit.export.integer import int8_grids, kernels, thresholds
from tf_lowbit.export.integer.kernels import BUILTIN, KERNELS, XNNPACK

_INPUT_SCALE, _STEP = 0.5, 0.37
_RUNTIMES = [pair for pair in RUNTIMES if pair[0] == RUNTIMES[-1][0]]


# --- ideal ----------------------------------------------------------------------------


def _points_of(code, low, high, smallest, largest):
    """The decision points of a function of A, by trying every A."""
    codes = [code(a) for a in range(smallest, largest + 1)]
    assert codes == sorted(codes)
    return [
        next((a for a, c in enumerate(codes, smallest) if c >= j), largest + 1)
        for j in range(low + 1, high + 1)
    ]


def _ideal(gain, offset, low, high, smallest, largest):
    return thresholds.ideal([gain], [offset], low, high, [smallest], [largest])


_LIMITS = st.tuples(st.integers(-9, 0), st.integers(1, 9))
_RANGES = st.tuples(st.integers(-60, 20), st.integers(0, 60)).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)


@settings(max_examples=300)
@given(st.integers(0, 40), st.integers(-300, 300), st.integers(0, 5), _LIMITS, _RANGES)
def test_ideal_in_exact_arithmetic(gain, offset, shift, limits, accumulators):
    """Dyadic gains and offsets: ties are exact, and go to even."""
    low, high = limits
    gain, offset = Fraction(gain, 2**shift), Fraction(offset, 2**shift)
    # Python rounds fractions half to even.
    want = _points_of(
        lambda a: max(low, min(high, round(gain * a + offset))),
        *(low, high, *accumulators),
    )
    got = _ideal(float(gain), float(offset), low, high, *accumulators)
    assert got.dtype == np.int64
    assert got.tolist() == [want]


@settings(max_examples=300)
@given(
    st.floats(1e-9, 3) | st.sampled_from([0.0, 0.1, 0.3]),
    st.floats(-20, 20) | st.sampled_from([0.5, -0.5, 1e30, -1e30]),
    _LIMITS,
    _RANGES,
)
def test_ideal_of_any_floats(gain, offset, limits, accumulators):
    low, high = limits
    want = _points_of(
        lambda a: max(low, min(high, round(gain * a + offset))),
        *(low, high, *accumulators),
    )
    assert _ideal(gain, offset, low, high, *accumulators).tolist() == [want]


@pytest.mark.parametrize(
    ("gain", "offset", "want"),
    [
        # code = round(A / 2): 0.5 -> 0, 1.5 -> 2, 2.5 -> 2.
        (0.5, 0.0, [2, 3, 6]),
        (1.0, 0.0, [1, 2, 3]),
        (1.0, 0.5, [1, 1, 3]),
        (2.0, 0.0, [1, 1, 2]),
        (100.0, 0.0, [1, 1, 1]),
        (0.0, 1.6, [-8, -8, 9]),
        (0.0, 2.5, [-8, -8, 9]),
        (0.0, 3.5, [-8, -8, -8]),
        (0.0, -5.0, [9, 9, 9]),
        # One-sided: always reached, never reached.
        (1.0, 30.0, [-8, -8, -8]),
        (1.0, -30.0, [9, 9, 9]),
        (0.25, 1.0, [-1, 2, 7]),
    ],
)
def test_ideal_by_hand(gain, offset, want):
    assert _ideal(gain, offset, 0, 3, -8, 8).tolist() == [want]


def test_ideal_of_large_accumulators():
    """Beyond float32's integers; the points' neighbours decide otherwise."""
    rng = np.random.default_rng(0)
    gain = np.exp(rng.uniform(np.log(1e-8), np.log(1e-6), 500))
    offset = rng.uniform(0, 255, 500)
    bound = np.full(500, 2**30)
    points = thresholds.ideal(gain, offset, 0, 255, -bound, bound)
    codes = np.arange(1, 256)
    inside = (points > -(2**30)) & (points <= 2**30)
    assert inside.sum() > 10_000
    at = np.rint(gain[:, None] * points + offset[:, None])
    before = np.rint(gain[:, None] * (points - 1) + offset[:, None])
    assert ((at >= codes) & (before < codes))[inside].all()
    assert (np.diff(points, axis=1) >= 0).all()


def test_ideal_takes_bounds_by_channel():
    got = thresholds.ideal([1.0, 1.0], [0.0, 0.0], 0, 2, [0, -5], [1, 0])
    assert got.tolist() == [[1, 2], [1, 1]]


# --- layers that reach every accumulator ----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of equal channels but for gain and offset, which place is asked for.

    Attributes:
        weights: codes of the taps.
        most: the largest weight code of its bits: `upscale` is 127 // most.
        inputs: the largest input code; the lowest is 0.
        low: lowest output code.
        high: highest output code.
        channels: how many.
        names: kernels for `place`.
        seed: of gains and offsets.
        ties: let gains be powers of two, and offsets integers. Points of half to even
            then stand on no line.
    """

    weights: tuple[int, ...]
    most: int
    inputs: int
    low: int
    high: int
    channels: int = 200
    names: tuple[str, ...] = (XNNPACK,)
    seed: int = 0
    ties: bool = False

    @property
    def upscale(self):
        return 127 // self.most

    @property
    def smallest(self):
        return self.inputs * sum(w for w in self.weights if w < 0)

    @property
    def largest(self):
        return self.inputs * sum(w for w in self.weights if w > 0)

    @functools.cached_property
    def affine(self):
        """(gain, offset): from a twentieth to twice the output's range."""
        rng = np.random.default_rng(self.seed)
        span = self.largest - self.smallest
        gain = (self.high - self.low) / span
        gain = gain * np.exp(rng.uniform(np.log(0.2), np.log(8), self.channels))
        middle = (self.largest + self.smallest) / 2
        offset = rng.uniform(self.low, self.high, self.channels) - gain * middle
        if self.ties:
            gain, offset = 2.0 ** np.rint(np.log2(gain)), np.rint(offset)
        # A constant channel, one below and one above the range.
        gain[3], offset[3] = 0.0, (self.high + self.low) / 2
        gain[4], offset[4] = 1e-3, -1e9
        gain[5], offset[5] = 1e-3, 1e9
        return gain, offset

    def place(self, **changes):
        gain, offset = self.affine
        grid = int8_grids.grid(_STEP, self.low, self.high)
        arguments = {
            "low": self.low,
            "high": self.high,
            "smallest": np.full(self.channels, self.smallest),
            "largest": np.full(self.channels, self.largest),
            "upscale": self.upscale,
            "input_scale": _INPUT_SCALE,
            "output_scale": grid.scale,
            "kernel_names": self.names,
            **changes,
        }
        return thresholds.place(gain, offset, **arguments)

    def layer(self, affine) -> Layer:
        """The file's layer."""
        weights = np.array(self.weights)[:, None] * self.upscale
        weights = np.where(affine.constant, 0, weights).astype(np.int8)
        grid = int8_grids.grid(_STEP, self.low, self.high)
        return Layer(
            CONV,
            weights,
            affine.weight_scales,
            affine.biases,
            input_scale=_INPUT_SCALE,
            input_zero_point=127 - self.inputs,
            output_scale=grid.scale,
            output_zero_point=grid.zero_point,
            activation=grid.clamp,
        )

    def rows(self):
        """Input codes, a row for every accumulator from smallest to largest."""
        rest = np.arange(self.smallest, self.largest + 1)
        rows = np.zeros((len(rest), len(self.weights)), np.int64)
        for tap in np.argsort([-abs(w) for w in self.weights], kind="stable"):
            weight = self.weights[tap]
            if weight:
                rows[:, tap] = np.clip(np.trunc(rest / weight), 0, self.inputs)
                rest = rest - rows[:, tap] * weight
        assert not rest.any()
        return rows

    def wanted(self):
        """The trained network's codes, accumulators x channels."""
        gain, offset = self.affine
        totals = np.arange(self.smallest, self.largest + 1)[:, None]
        return np.clip(np.rint(gain * totals + offset), self.low, self.high)

    def reported(self, affine, kernel):
        """Wrong decisions of the channels that are not constant."""
        reached = thresholds.reached_by(
            kernel,
            self.layer(affine).multipliers(kernel),
            affine.biases,
            self.upscale,
            self.low,
            self.high,
            np.full(self.channels, self.smallest),
            np.full(self.channels, self.largest),
        )
        wrong = thresholds.wrong_decisions(affine.thresholds, reached)
        return np.where(affine.constant, 0, wrong)

    def counted(self, affine, kernel, runtime):
        """The same, by running the file: differences of codes, channel by channel."""
        got = self.layer(affine).run(self.rows(), kernel, runtime)
        return np.abs(got - self.wanted()).sum(axis=0).astype(np.int64)


@pytest.mark.parametrize("upscale", [1, 42, 127])
@pytest.mark.parametrize("gain", [2.0, 3.0, 20.0, 150.0, 500.0])
@pytest.mark.parametrize("high", [3, 15])
def test_steep_gains_are_decided_right(gain, upscale, high):
    """Several codes lie between two accumulators: no channel needs to be wrong."""
    count = 64
    offset = np.random.default_rng(0).uniform(-2.0, high + 2.0, count)
    ends = np.full(count, -20), np.full(count, 20)
    grid = int8_grids.grid(_STEP, 0, high)
    affine = thresholds.place(
        np.full(count, gain),
        offset,
        low=0,
        high=high,
        smallest=ends[0],
        largest=ends[1],
        upscale=upscale,
        input_scale=_INPUT_SCALE,
        output_scale=grid.scale,
    )
    multiplier = kernels.multiplier(
        XNNPACK, _INPUT_SCALE, affine.weight_scales, grid.scale
    )
    totals = np.arange(-20, 21)[:, None]
    found = kernels.requantize(
        XNNPACK, upscale * totals + affine.biases, multiplier, 0, high, False
    )
    wanted = np.clip(np.rint(gain * totals + offset), 0, high)
    wrong = (found != wanted).any(axis=0) & ~affine.constant
    # What one scale and one bias can do, tried with a fine comb of both.
    possible = np.zeros(count, bool)
    if wrong.any():
        possible = _has_a_way(wanted[:, wrong], upscale, high)
        assert not possible.any(), f"{int(possible.sum())} of {count} channels"


def _has_a_way(wanted, upscale, high):
    """Whether some real scale and bias give the codes, channel by channel."""
    totals = upscale * np.arange(-20, 21)[:, None]
    found = np.zeros(wanted.shape[1], bool)
    for scale in np.geomspace(0.05, 600.0, 400) / upscale:
        for bias in np.arange(-upscale, upscale + 1, max(1, upscale // 21)):
            for start in range(-21, 22):
                codes = np.rint(scale * (totals + bias - upscale * start))
                found |= (np.clip(codes, 0, high) == wanted).all(axis=0)
    return found


BINARY = ((1, -1) * 16, 1)
TERNARY = ((1, -1, 0) * 8, 1)
TWO_BITS = ((3, 1, -1, -3, 3, 1, -3, -1, 1, -1) * 2, 3)
THREE_BITS = ((7, 5, 3, 1, 1, -1, -1, -3, -5, -7, 1, -1, 2, -2), 7)
FOUR_BITS = ((15, 8, 4, 2, 1, -1, -2, -4, -8, -15), 15)
WEIGHTS = {"1": BINARY, "t": TERNARY, "2": TWO_BITS, "3": THREE_BITS, "4": FOUR_BITS}
OUTPUTS = {"1": (0, 1), "2": (0, 3), "3": (0, 7), "n2": (-1, 1), "s2": (-2, 1)}
OUTPUTS["s3"] = (-4, 3)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("inputs", [1, 2, 3, 4])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_all_decisions_are_right(weights, inputs, outputs):
    """Upscales of 127, 42, 18 and 8, and up to 3 bits out, by brute force."""
    case = Case(*WEIGHTS[weights], 2**inputs - 1, *OUTPUTS[outputs], channels=64)
    affine = case.place()
    for runtime, kernel in _RUNTIMES:
        if kernel == XNNPACK:
            got = case.layer(affine).run(case.rows(), kernel, runtime)
            np.testing.assert_array_equal(got, case.wanted())
    assert not case.reported(affine, XNNPACK).any()


@pytest.mark.parametrize("outputs", [(0, 15), (-7, 7), (-8, 7)])
@pytest.mark.parametrize("weights", ["1", "2", "3"])
def test_all_decisions_of_four_bits_are_right(weights, outputs):
    """From an upscale of 18 on."""
    case = Case(*WEIGHTS[weights], 15, *outputs)
    affine = case.place()
    assert not case.counted(affine, XNNPACK, _RUNTIMES[0][0]).any()
    assert not case.reported(affine, XNNPACK).any()


@pytest.mark.parametrize("outputs", [(0, 1), (0, 3), (-2, 1), (0, 7)])
@pytest.mark.parametrize("weights", ["1", "2", "3"])
def test_portable_is_right_in_both_kernels(weights, outputs):
    case = Case(*WEIGHTS[weights], 3, *outputs, names=KERNELS)
    affine = case.place()
    for runtime, kernel in _RUNTIMES:
        assert not case.counted(affine, kernel, runtime).any()
        assert not case.reported(affine, kernel).any()


def test_portable_differs_from_xnnpack_alone():
    """What is placed for one kernel is wrong in the other, now and then."""
    case = Case(*FOUR_BITS, 15, 0, 7)
    assert case.reported(case.place(), BUILTIN).any()


@pytest.mark.parametrize("names", [(XNNPACK,), (BUILTIN,), KERNELS])
@pytest.mark.parametrize(
    "case",
    [
        # 8-bit weights: no room between two accumulators.
        Case((127, 1, -127, -1), 127, 255, 0, 255, channels=24),
        Case((127, 1, -127, -1), 127, 255, -128, 127, channels=24),
        Case((127, 1, -127, -1), 127, 255, 0, 3, channels=24),
        Case((100, 27, 1, -1), 127, 255, 0, 15, channels=24),
        Case(*FOUR_BITS, 15, 0, 255, channels=24),
        Case(*FOUR_BITS, 15, -127, 127, channels=24),
        Case(*TWO_BITS, 3, 0, 255, channels=24),
        Case(*TWO_BITS, 3, 0, 3, ties=True),
        Case(*BINARY, 3, -4, 3, ties=True),
    ],
)
def test_wrong_decisions_are_those_of_brute_force(case, names):
    case = dataclasses.replace(case, names=names)
    affine = case.place()
    assert affine.constant.sum() >= 3
    total = 0
    for runtime, kernel in _RUNTIMES:
        reported = case.reported(affine, kernel)
        np.testing.assert_array_equal(case.counted(affine, kernel, runtime), reported)
        total += reported.sum()
    assert total > 0  # Some are: the counts are no trivial ones.


def test_few_decisions_are_wrong_with_eight_bits():
    """W8A8: each of the 255 decisions is off by less than a tenth of an accumulator."""
    case = Case((127, 1, -127, -1), 127, 255, 0, 255, channels=24)
    affine = case.place()
    wrong = case.reported(affine, XNNPACK)[~affine.constant]
    assert wrong.mean() < 25


def test_what_place_misses_does_not_exist():
    """Four bits at upscale 8: every channel without a wrong decision is found."""
    missed = []
    for seed in range(3):
        case = Case(*FOUR_BITS, 15, 0, 15, seed=seed)
        affine = case.place()
        wrong = case.reported(affine, XNNPACK) > 0
        assert wrong.mean() < 0.1
        missed += [
            (seed, channel)
            for channel in np.flatnonzero(wrong).tolist()
            if _exists(case, affine.thresholds[channel])
        ]
    assert not missed


def _exists(case, points):
    """Whether any real 1 / M and integer bias decide right, by trying all biases."""
    u, n = case.upscale, case.high - case.low
    edges = [Fraction(2 * (case.low + j) + 1, 2) for j in range(n)]
    assert case.low == 0
    for bias in range(-40 * u - u * case.largest, 40 * u + u * case.largest):
        least, most = Fraction(0), Fraction(10**12)
        for edge, point in zip(edges, points.tolist(), strict=True):
            if point <= case.largest:
                most = min(most, (u * point + bias) / edge)
            if point > case.smallest:
                least = max(least, (u * (point - 1) + bias) / edge)
            if least >= most:
                break
        else:
            return True
    return False


def test_exists_finds_what_is_there():
    case = Case(*TWO_BITS, 3, 0, 3)
    affine = case.place()
    assert _exists(case, affine.thresholds[10])
    # Codes 1 and 2 at once, 3 much later: no line does that.
    assert not _exists(case, np.array([1, 1, case.largest - 1]))


# --- extremes -------------------------------------------------------------------------


def _place_one(gain, offset, low, high, reach, upscale=42, names=(XNNPACK,)):
    bounds = np.full(len(gain), reach)
    affine = thresholds.place(
        gain,
        offset,
        low=low,
        high=high,
        smallest=-bounds,
        largest=bounds,
        upscale=upscale,
        input_scale=_INPUT_SCALE,
        output_scale=_STEP,
        kernel_names=names,
    )
    wrong = np.zeros(len(gain), np.int64)
    for name in names:
        multipliers = kernels.multiplier(
            name, _INPUT_SCALE, affine.weight_scales, _STEP
        )
        reached = thresholds.reached_by(
            name, multipliers, affine.biases, upscale, low, high, -bounds, bounds
        )
        wrong += thresholds.wrong_decisions(affine.thresholds, reached)
    return affine, np.where(affine.constant, 0, wrong)


@pytest.mark.parametrize("names", [(XNNPACK,), KERNELS])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3), (-7, 7), (0, 255)])
def test_tiny_gains_with_one_decision(low, high, names):
    """The bias that 1 / gain asks for would be far beyond int32."""
    gain = 10.0 ** -np.arange(4, 13).repeat(5)
    # The one decision lies at A = 4 or -4.
    edge = np.array([low + 1, high, (low + high) // 2, 1, low + 1] * 9) - 0.5
    edge = np.clip(edge, low + 0.5, high - 0.5)
    offset = edge - gain * np.tile([3.5, -4.5, 3.5, 3.5, -4.5], 9)
    affine, wrong = _place_one(gain, offset, low, high, 900, names=names)
    assert not affine.constant.any()
    assert not wrong.any()
    inside = (affine.thresholds > -900) & (affine.thresholds <= 900)
    assert (inside.sum(axis=1) == 1).all()
    assert set(affine.thresholds[inside]) == {4, -4}


@pytest.mark.parametrize("offset", [1e4, 1e9, 1e18, 1e300])
def test_huge_offsets_are_constant(offset):
    offsets = np.array([offset, -offset])
    affine, _ = _place_one(np.array([1.0, 1.0]), offsets, -2, 5, 900)
    assert affine.constant.all()
    assert affine.biases.dtype == np.int32
    assert affine.biases.tolist() == [5, -2]


def test_constant_channels():
    gain = np.array([0.0, 0.0, 1e-9, 1e-9, 1.0])
    offset = np.array([1.2, 2.5, 0.49, 7.0, 0.0])
    affine, _ = _place_one(gain, offset, 0, 3, 900)
    assert affine.constant.tolist() == [True] * 4 + [False]
    assert affine.biases[:4].tolist() == [1, 2, 0, 3]
    # M = 1 for them: the bias is the code.
    m = kernels.multiplier(XNNPACK, _INPUT_SCALE, affine.weight_scales, _STEP)
    codes = kernels.requantize(XNNPACK, affine.biases, m, 0, 3)
    assert codes[:4].tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("upscale", [1, 8, 127])
def test_biases_stay_in_int32(upscale):
    rng = np.random.default_rng(0)
    reach = 2**30 // upscale - 1
    gain = np.exp(rng.uniform(np.log(1e-12), np.log(1.0), 60))
    offset = rng.uniform(-300, 300, 60)
    with np.errstate(all="raise", under="ignore"):
        affine, _ = _place_one(gain, offset, 0, 255, reach, upscale, names=KERNELS)
    largest = np.abs(affine.biases.astype(np.int64)) + upscale * reach
    assert (largest[~affine.constant] < 2**31).all()
    assert np.isfinite(affine.weight_scales).all()
    assert (affine.weight_scales > 0).all()
    assert affine.weight_scales.dtype == np.float32


def test_steep_gains():
    """All codes lie between two accumulators."""
    gain = np.array([10.0, 100.0, 1000.0, 4000.0])
    offset = -gain * 2.5
    _, wrong = _place_one(gain, offset, 0, 3, 900)
    assert not wrong.any()


def test_multipliers_stay_below_256():
    """XNNPACK refuses files with others."""
    gain = np.array([1e4, 1e5, 1e9])
    affine, wrong = _place_one(gain, -gain * 2.5, 0, 3, 900)
    m = kernels.multiplier(XNNPACK, _INPUT_SCALE, affine.weight_scales, _STEP)
    assert (m < 256).all()
    assert not wrong.any()


def test_nearly_constant_channels_stay_nearly_constant():
    """One decision of 255, at code 200, in a wide layer of 8 bits.

    A constant would be wrong for one code in half of the accumulators.
    """
    reach = 3_000_000
    _, wrong = _place_one(np.array([1e-9]), np.array([199.5]), 0, 255, reach, 1)
    assert wrong[0] <= reach + 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gains", [(0.02, 0.2), (0.2, 0.45), (1.0, 1.9), (2.1, 3.9)])
def test_no_scale_and_bias_of_a_dense_search_are_better(gains, kernel):
    """Decisions that lie closer than the kernel can tell, at multipliers below 1/2,
    where the builtin kernel rounds twice, from there to 1, and above it."""
    rng = np.random.default_rng(1)
    count, reach, upscale, low, high = 6, 300, 2, 0, 255
    gain = rng.uniform(*gains, count)
    offset = rng.uniform(0, 40, count)
    smallest, largest = np.full(count, -reach), np.full(count, reach)
    points = thresholds.ideal(gain, offset, low, high, smallest, largest)

    def wrong(scales, biases):
        m = kernels.multiplier(kernel, _INPUT_SCALE, scales, _STEP)
        reached = thresholds.reached_by(
            kernel, m, biases, upscale, low, high, smallest, largest
        )
        return (reached != points).sum(axis=1)

    affine = thresholds.place(
        gain, offset, low=low, high=high, smallest=smallest, largest=largest,
        upscale=upscale, input_scale=_INPUT_SCALE, output_scale=_STEP,
        kernel_names=(kernel,),
    )  # fmt: skip
    nominal = gain / upscale * _STEP / _INPUT_SCALE
    middle = np.rint(offset * upscale / gain).astype(np.int64)
    best = np.min(
        [
            wrong((nominal * (1 + change)).astype(np.float32), middle + shift)
            for change in np.linspace(-0.01, 0.01, 201)
            for shift in range(-3, 4)
        ],
        axis=0,
    )
    assert best.max() > 0  # So that it matters which are taken.
    assert (wrong(affine.weight_scales, affine.biases) <= best + 1).all()


# --- counting -------------------------------------------------------------------------


def test_wrong_decisions_by_hand():
    points = np.array([[1, 4, 6], [0, 0, 0], [-3, 2, 9]])
    reached = np.array([[1, 4, 6], [0, 0, 2], [-4, 5, 9]])
    wrong = thresholds.wrong_decisions(points, reached)
    assert wrong.tolist() == [0, 2, 4]
    assert wrong.dtype == np.int64


@settings(max_examples=200, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS),
    multiplier=st.floats(1e-4, 0.9).map(np.float32),
    bias=st.integers(-20000, 20000),
    upscale=st.integers(1, 127),
    limits=_LIMITS,
    accumulators=_RANGES,
)
def test_reached_by(kernel, multiplier, bias, upscale, limits, accumulators):
    low, high = limits
    m = np.array([multiplier], np.float32 if kernel == XNNPACK else np.float64)

    def code(a):
        return int(kernels.requantize(kernel, [upscale * a + bias], m, low, high)[0])

    want = _points_of(code, low, high, *accumulators)
    smallest, largest = np.array(accumulators)[:, None]
    got = thresholds.reached_by(
        kernel, m, [bias], upscale, low, high, smallest, largest
    )
    assert got.tolist() == [want]
    # Wrong decisions are the codes' differences, summed over accumulators.
    rng = np.random.default_rng(abs(bias))
    count = largest[0] - smallest[0] + 2
    other = np.sort(rng.integers(smallest[0], smallest[0] + count, high - low))
    totals = np.arange(smallest[0], largest[0] + 1)[:, None]
    codes = [(totals >= p).sum(axis=1) for p in (np.array(want), other)]
    wrong = thresholds.wrong_decisions(other[None], got)
    assert wrong.tolist() == [np.abs(codes[0] - codes[1]).sum()]


def test_reached_by_of_many_channels():
    rng = np.random.default_rng(2)
    m = np.exp(rng.uniform(np.log(1e-3), np.log(0.5), 40)).astype(np.float32)
    biases = rng.integers(-3000, 3000, 40)
    smallest, largest = rng.integers(-99, 0, 40), rng.integers(0, 99, 40)
    arguments = (XNNPACK, m, biases, 9, -4, 7, smallest, largest)
    got = thresholds.reached_by(*arguments)
    assert got.shape == (40, 11)
    for i in range(40):
        one = thresholds.reached_by(
            *(XNNPACK, m[i : i + 1], biases[i : i + 1], 9, -4, 7),
            *(smallest[i : i + 1], largest[i : i + 1]),
        )
        assert got[i].tolist() == one[0].tolist()
        assert math.prod(one.shape) == 11
