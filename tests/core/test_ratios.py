"""Ratios by hand and against an exhaustive search; no codes of int8 tie at them."""

import doctest
import fractions
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_lowbit.core import ratios
from tf_lowbit.core.ratios import RATIOS, at_least_ratio, nearest_ratio

Fraction = fractions.Fraction
INT8 = np.arange(-128, 128)
# In (p, q), with doubles such as 2/6: not how the library lists them.
ALL = [(p, q) for q in range(1, 16) if q % 2 for p in range(1, 16)]
VALUES = st.floats(1e-6, 1e6)


def test_doctests():
    result = doctest.testmod(ratios)
    assert result.attempted == 2
    assert result.failed == 0


def test_the_ratios_are_all_there_are():
    assert list(RATIOS) == sorted({Fraction(p, q) for p, q in ALL})
    assert RATIOS[0] == Fraction(1, 15)
    assert RATIOS[-1] == 15
    assert 1 in RATIOS


def halves(first, second):
    """How many pairs of int8 codes give a half: `a p / q + b r / s` is n + 1/2."""
    whole = 2 * first.denominator * second.denominator
    a = 2 * INT8 * first.numerator * second.denominator % whole
    b = 2 * INT8 * second.numerator * first.denominator % whole
    return np.count_nonzero((a[:, None] + b) % whole == whole // 2)


@pytest.mark.parametrize("denominator", range(1, 16, 2))
def test_no_pair_of_int8_codes_ties(denominator):
    """A numerator that is prime to its denominator permutes the remainders."""
    firsts = [r for r in RATIOS if r.denominator == denominator]
    seconds = {r.denominator: r for r in RATIOS}.values()
    for first, second in itertools.product((firsts[0], firsts[-1]), seconds):
        assert halves(first, second) == 0


def test_no_remainders_of_any_two_ratios_tie():
    common = math.lcm(*(r.denominator for r in RATIOS))
    remainders = {
        r: np.unique(INT8 * (r.numerator * common // r.denominator) % common)
        for r in RATIOS
    }
    for first, second in itertools.combinations_with_replacement(remainders, 2):
        sums = remainders[first][:, None] + remainders[second]
        assert not np.any(2 * sums % (2 * common) == common)


def test_even_denominators_do_tie():
    assert halves(Fraction(1, 2), Fraction(1)) == 2**15
    assert halves(Fraction(3, 14), Fraction(5, 14)) > 0


@given(value=VALUES)
def test_nearest_in_logarithm(value):
    found = nearest_ratio(value)
    assert found.denominator % 2
    least = min(abs(math.log(value) - math.log(p / q)) for p, q in ALL)
    assert abs(math.log(value / found)) == pytest.approx(least, abs=1e-12)


@given(value=VALUES)
def test_the_smallest_that_is_not_below(value):
    found = at_least_ratio(value)
    assert found.denominator % 2
    above = [p / q for p, q in ALL if p / q >= value]
    assert float(found) == (min(above) if above else 15)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_ratio_is_its_own(ratio):
    assert nearest_ratio(float(ratio)) == ratio
    assert nearest_ratio(np.float32(ratio)) == ratio
    assert at_least_ratio(float(ratio)) == ratio


@pytest.mark.parametrize(
    ("value", "nearest", "at_least"),
    [
        (1e-9, Fraction(1, 15), Fraction(1, 15)),
        (1e9, 15, 15),
        (0.5, Fraction(8, 15), Fraction(8, 15)),  # 7/15 is the next one below.
        (1.01, 1, Fraction(14, 13)),
        (4, 4, 4),
        (14.4, 14, 15),
        (14.6, 15, 15),  # The geometric mean of 14 and 15 is 14.49.
    ],
)
def test_by_hand(value, nearest, at_least):
    assert nearest_ratio(value) == nearest
    assert at_least_ratio(value) == at_least


@pytest.mark.parametrize(
    "value", [0, -1.0, math.nan, math.inf, -math.inf, None, "1", True], ids=repr
)
@pytest.mark.parametrize("function", [nearest_ratio, at_least_ratio])
def test_what_is_not_positive_and_finite_is_refused(function, value):
    with pytest.raises(ValueError, match=r"finite number above 0. Received: value="):
        function(value)
