"""Restoring variables to earlier values."""

import contextlib
from collections.abc import Iterable, Iterator

from tf_lowbit.compat import tf

Values = list[tuple[tf.Variable, object]]


def values_of(variables: Iterable[tf.Variable]) -> Values:
    """Returns the variables with their current values, for `assign_values`."""
    return [(variable, variable.numpy()) for variable in variables]


def assign_values(values: Values) -> None:
    """Assigns the recorded values."""
    for variable, value in values:
        variable.assign(value)


@contextlib.contextmanager
def restored(variables: Iterable[tf.Variable]) -> Iterator[None]:
    """A context that restores variables at its end."""
    before = values_of(variables)
    try:
        yield
    finally:
        assign_values(before)


@contextlib.contextmanager
def unchanged_on_error(variables: Iterable[tf.Variable]) -> Iterator[None]:
    """A context that restores variables if an error leaves it."""
    before = values_of(variables)
    try:
        yield
    except BaseException:
        assign_values(before)
        raise
