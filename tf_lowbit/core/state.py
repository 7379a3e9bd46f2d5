"""Putting variables back to what they were."""

import contextlib
from collections.abc import Iterable, Iterator

from tf_lowbit.compat import tf

Values = list[tuple[tf.Variable, object]]


def values_of(variables: Iterable[tf.Variable]) -> Values:
    """The variables with their present values, for `assign_values`."""
    return [(variable, variable.numpy()) for variable in variables]


def assign_values(values: Values) -> None:
    """Gives each variable the value that was read."""
    for variable, value in values:
        variable.assign(value)


@contextlib.contextmanager
def restored(variables: Iterable[tf.Variable]) -> Iterator[None]:
    """A context after which variables have the values that they had before it."""
    before = values_of(variables)
    try:
        yield
    finally:
        assign_values(before)


@contextlib.contextmanager
def unchanged_on_error(variables: Iterable[tf.Variable]) -> Iterator[None]:
    """A context that puts variables back where it is left by an error."""
    before = values_of(variables)
    try:
        yield
    except BaseException:
        assign_values(before)
        raise
