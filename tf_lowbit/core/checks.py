"""Argument checks. Only this module defines what an integer, number or choice is.

Each function returns `value`, so that a constructor checks and stores it in one line,
or raises ValueError. The message names the argument by `name`, and states the
requirement and what was received.
"""

import math
import numbers
import os
import types
from collections.abc import Collection
from typing import Any


def is_integer(value: Any) -> bool:
    """Tells whether a value is a Python or NumPy integer; a bool is not."""
    # bool is an Integral in Python, but `width=True` is a mistake.
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite Python or NumPy real number; a bool is not."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def integer(
    name: str, value: Any, *, at_least: int | None = None, below: int | None = None
) -> int:
    """Checks an integer; a bool is not one.

    Args:
        name: Name of the argument.
        value: Value to check.
        at_least: Lower bound, included, or None.
        below: Upper bound, excluded, or None.

    Returns:
        The value as an int.
    """
    is_low = at_least is not None and is_integer(value) and value < at_least
    is_high = below is not None and is_integer(value) and value >= below
    if not is_integer(value) or is_low or is_high:
        bounds = _in_words(("of at least", at_least), ("below", below))
        raise ValueError(f"{name} must be an integer{bounds}. {received(name, value)}")
    return int(value)


def number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> float:
    """Checks a finite real number; a bool is not one.

    Args:
        name: Name of the argument.
        value: Value to check.
        at_least: Lower bound, included, or None.
        above: Lower bound, excluded, or None.
        at_most: Upper bound, included, or None.
        below: Upper bound, excluded, or None.

    Returns:
        The value as a float.
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


def choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """Checks that a value is one of `choices`, of any type; True is not 1."""
    choices = tuple(choices)
    if not any(type(value) is type(one) and value == one for one in choices):
        raise ValueError(f"{name} must be one of {choices}. {received(name, value)}")
    return value


def integers(name: str, value: Any) -> tuple[int, ...]:
    """Checks a list or tuple of at least one integer, such as axes; returns a tuple."""
    is_list = isinstance(value, list | tuple) and all(map(is_integer, value))
    if not is_list or not value:
        raise ValueError(
            f"{name} must be a list of at least one integer. {received(name, value)}"
        )
    return tuple(int(one) for one in value)


def flag(name: str, value: Any) -> bool:
    """Checks that a value is True or False; 0, 1 and None are refused."""
    return choice(name, value, (True, False))


def instance(
    name: str, value: Any, kind: type | types.UnionType, *, remedy: str = ""
) -> Any:
    """Checks the type of a value.

    Args:
        name: Name of the argument.
        value: Value to check.
        kind: Required type, or a union of types.
        remedy: How to get such a value.
    """
    if not isinstance(value, kind):
        how = f": {remedy}" if remedy else ""
        wanted = getattr(kind, "__name__", kind)
        raise ValueError(
            f"{name} must be of type {wanted}{how}. {received(name, value)}"
        )
    return value


def path(name: str, value: Any) -> str:
    """Checks a str or `os.PathLike` that is not empty; returns a str.

    The file need not exist.
    """
    found = os.fsdecode(value) if isinstance(value, str | os.PathLike) else ""
    if not found or "\0" in found:
        raise ValueError(
            f"{name} must be a path, a str or an os.PathLike. {received(name, value)}"
        )
    return found


def received(name: str, value: Any) -> str:
    """Formats the end of a message: what was received, on one short line."""
    shown = " ".join(repr(value).split())
    if len(shown) > _MOST_SHOWN:
        shown = f"{shown[:_MOST_SHOWN]}..."
    return f"Received: {name}={shown}"


def _in_words(*bounds) -> str:
    """Formats bounds, such as " of at least 0 and below 1"."""
    given = [f"{word} {bound}" for word, bound in bounds if bound is not None]
    return f" {' and '.join(given)}" if given else ""


_MOST_SHOWN = 200
