"""Ratios of steps at which an int8 Add has no ties.

TFLite's int8 Add computes `round(a s_a / s_out + b s_b / s_out)` of the codes `a` and
`b`, and its kernels do not round halves alike. With `s_a / s_out` and `s_b / s_out`
both fractions of odd denominator so is the sum, and no pair of codes meets a half:
whatever rounds to nearest gives the same code. Ours.
"""

import fractions
import math

from tf_lowbit.core import checks

_LARGEST_TERM = 15
# Every p / q with q odd and 1 <= p, q <= 15, ascending: about 4 % apart around 1.
RATIOS = tuple(
    sorted(
        {
            fractions.Fraction(p, q)
            for p in range(1, _LARGEST_TERM + 1)
            for q in range(1, _LARGEST_TERM + 1, 2)
        }
    )
)


def nearest_ratio(value: float) -> fractions.Fraction:
    """The ratio in `RATIOS` that is the nearest to `value` in logarithm.

    >>> nearest_ratio(0.7)
    Fraction(9, 13)

    Args:
        value: positive and finite.

    Returns:
        The fraction, of odd denominator; of two as near the smaller one.

    Raises:
        ValueError: if `value` is not positive and finite.
    """
    target = math.log(_positive(value))
    return min(RATIOS, key=lambda ratio: abs(math.log(ratio) - target))


def at_least_ratio(value: float) -> fractions.Fraction:
    """The smallest ratio in `RATIOS` that is not below `value`.

    A step that is so many times another one then clips no value that one of `value`
    times it would not.

    >>> at_least_ratio(0.7)
    Fraction(5, 7)

    Args:
        value: positive and finite. A float that is a ratio's own counts as equal.

    Returns:
        The fraction, of odd denominator; the largest one, 15, where all are below.

    Raises:
        ValueError: if `value` is not positive and finite.
    """
    least = _positive(value)
    return next((ratio for ratio in RATIOS if float(ratio) >= least), RATIOS[-1])


def _positive(value) -> float:
    return checks.number("value", value, above=0)
