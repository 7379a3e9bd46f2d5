"""Ratios of steps with which an int8 Add never rounds an exact half.

TFLite's int8 Add computes `round(a s_a / s_out + b s_b / s_out)` from the codes `a` and
`b`. Its kernels differ in how they round halves. If `s_a / s_out` and `s_b / s_out` are
fractions of odd denominator, so is the sum. Then no pair of codes gives a half, and
every kernel that rounds to nearest returns the same code.
"""

import fractions
import math

from tf_lowbit.core import checks

_LARGEST_TERM = 15
# All p / q with odd q and 1 <= p, q <= 15, ascending: about 4 % apart around 1.
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
    """Returns the ratio in `RATIOS` nearest to a positive value on a logarithmic scale.

    Of two that are equally near, it returns the smaller one.

    >>> nearest_ratio(0.7)
    Fraction(9, 13)

    Raises:
        ValueError: If `value` is not positive and finite.
    """
    target = math.log(checks.number("value", value, above=0))
    return min(RATIOS, key=lambda ratio: abs(math.log(ratio) - target))


def at_least_ratio(value: float) -> fractions.Fraction:
    """Returns the smallest ratio in `RATIOS` that is not below a positive value.

    A step that is multiplied by this ratio instead of by `value` clips no more. A float
    equal to a ratio counts as that ratio. If all ratios are smaller, the result is 15,
    the largest.

    >>> at_least_ratio(0.7)
    Fraction(5, 7)

    Raises:
        ValueError: If `value` is not positive and finite.
    """
    least = checks.number("value", value, above=0)
    return next((ratio for ratio in RATIOS if float(ratio) >= least), RATIOS[-1])
