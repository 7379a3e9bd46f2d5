"""Checks of arguments: the one place that says what an integer or a choice must be.

Each function returns the value, so that a constructor can check and keep it in one
line. Each error states the requirement and what was received.
"""

import math
import numbers
import os


def is_integer(value) -> bool:
    """Whether a value is an integer, of Python or NumPy, and no bool."""
    # bool is an Integral in Python, but `width=True` is a slip and no width.
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether a value is a finite real number, of Python or NumPy, and no bool."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def integer(
    name: str, value, *, at_least: int | None = None, below: int | None = None
) -> int:
    """Checks an integer.

    Args:
        name: of the argument, for the message.
        value: to be checked.
        at_least: its least value; None for any.
        below: what it must be below; None for any.

    Returns:
        The value as an int.

    Raises:
        ValueError: if it is no integer (a bool is none) or out of the range.
    """
    is_low = at_least is not None and is_integer(value) and value < at_least
    is_high = below is not None and is_integer(value) and value >= below
    if not is_integer(value) or is_low or is_high:
        bounds = _in_words(("of at least", at_least), ("below", below))
        raise ValueError(f"{name} must be an integer{bounds}. {received(name, value)}")
    return int(value)


def number(
    name: str,
    value,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> float:
    """Checks a finite real number.

    Args:
        name: of the argument, for the message.
        value: to be checked.
        at_least: its least value; None for any, as for those that follow.
        above: what it must be above.
        at_most: its largest value.
        below: what it must be below.

    Returns:
        The value as a float.

    Raises:
        ValueError: if it is no number (a bool is none), NaN, infinite or out of range.
    """
    is_inside = is_number(value) and not (
        (at_least is not None and value < at_least)
        or (above is not None and value <= above)
        or (at_most is not None and value > at_most)
        or (below is not None and value >= below)
    )
    if not is_inside:
        bounds = _in_words(
            ("of at least", at_least),
            ("above", above),
            ("at most", at_most),
            ("below", below),
        )
        raise ValueError(
            f"{name} must be a finite number{bounds}. {received(name, value)}"
        )
    return float(value)


def choice(name: str, value, choices):
    """Checks that a value is one of a few; True is not 1.

    Args:
        name: of the argument, for the message.
        value: to be checked, of any type.
        choices: what it may be.

    Returns:
        The value.

    Raises:
        ValueError: if it is none of them.
    """
    choices = tuple(choices)
    if not any(type(value) is type(one) and value == one for one in choices):
        raise ValueError(f"{name} must be one of {choices}. {received(name, value)}")
    return value


def integers(name: str, value) -> tuple[int, ...]:
    """Checks a list of integers, such as axes.

    Returns:
        They, as a tuple.

    Raises:
        ValueError: if it is no list or tuple, is empty, or holds something else.
    """
    is_list = isinstance(value, list | tuple) and all(map(is_integer, value))
    if not is_list or not value:
        raise ValueError(
            f"{name} must be a list of at least one integer. {received(name, value)}"
        )
    return tuple(int(one) for one in value)


def flag(name: str, value) -> bool:
    """Checks that a value is True or False.

    Raises:
        ValueError: if it is another one; 0, 1 and None are.
    """
    return choice(name, value, (True, False))


def instance(name: str, value, kind, *, remedy: str = ""):
    """Checks the type of a value.

    Args:
        name: of the argument, for the message.
        value: to be checked.
        kind: the type that it must have, or a union of types.
        remedy: how to get such a value, for the message.

    Returns:
        The value.

    Raises:
        ValueError: if it is of another type.
    """
    if not isinstance(value, kind):
        how = f": {remedy}" if remedy else ""
        wanted = getattr(kind, "__name__", kind)
        raise ValueError(
            f"{name} must be of type {wanted}{how}. {received(name, value)}"
        )
    return value


def path(name: str, value) -> str:
    """Checks a path in the file system; nothing need be there.

    Returns:
        The path as a str.

    Raises:
        ValueError: if it is no str and no `os.PathLike`, or is empty.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(
            f"{name} must be a path, a str or an os.PathLike. {received(name, value)}"
        )
    return os.fsdecode(value)


def received(name: str, value) -> str:
    """The end of a message: what was received, in one line of fair length."""
    shown = " ".join(repr(value).split())
    if len(shown) > _MOST_SHOWN:
        shown = f"{shown[:_MOST_SHOWN]}..."
    return f"Received: {name}={shown}"


def _in_words(*bounds) -> str:
    """Such as " of at least 0 and below 1"."""
    given = [f"{word} {bound}" for word, bound in bounds if bound is not None]
    return f" {' and '.join(given)}" if given else ""


_MOST_SHOWN = 200
