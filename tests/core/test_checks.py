"""The shared checks of arguments."""

import decimal
import re
from pathlib import Path

import numpy as np
import pytest

from tf_lowbit.core import checks

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("value", [1, np.int64(1), np.uint8(1)], ids=repr)
def test_an_integer_comes_back_as_an_int(value):
    found = checks.integer("count", value, at_least=1, below=2)
    assert type(found) is int
    assert found == 1


@pytest.mark.parametrize(
    "value", [0, 3, 1.0, True, np.True_, "1", None, NAN, [1], np.array(1)], ids=repr
)
def test_no_integer_in_the_range_is_refused_by_name(value):
    message = "count must be an integer of at least 1 and below 3. Received: count="
    with pytest.raises(ValueError, match=f"^{re.escape(message + repr(value))}$"):
        checks.integer("count", value, at_least=1, below=3)


@pytest.mark.parametrize("value", [0, 1, 0.25, np.float32(0.25), np.int64(1)], ids=repr)
def test_a_number_comes_back_as_a_float(value):
    found = checks.number("share", value, at_least=0, at_most=1)
    assert type(found) is float
    assert found == value


@pytest.mark.parametrize(
    "value",
    [-0.1, 1.1, NAN, INFINITY, True, "0.5", None, [0.5], 1j, decimal.Decimal("0.5")],
    ids=repr,
)
def test_no_number_in_the_range_is_refused_by_name(value):
    message = "share must be a finite number of at least 0 and at most 1. Received: "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}share=") as error:
        checks.number("share", value, at_least=0, at_most=1)
    assert str(error.value).endswith(repr(value))


@pytest.mark.parametrize("value", [0, 1])
def test_open_bounds_are_left_out(value):
    with pytest.raises(ValueError, match=r"^part must be a finite number above 0 and"):
        checks.number("part", value, above=0, below=1)


@pytest.mark.parametrize(
    "value", ["b ", None, 1, ["a"], {"a": 1}, np.array(["a", "b"])], ids=repr
)
def test_another_choice_is_refused(value):
    assert checks.choice("kind", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match=r"^kind must be one of \('a', 'b'\). Re"):
        checks.choice("kind", value, ("a", "b"))


@pytest.mark.parametrize("value", [0, 1, None, "yes", np.array([True])], ids=repr)
def test_a_flag_is_a_bool(value):
    assert checks.flag("strict", True) is True
    with pytest.raises(ValueError, match=r"^strict must be one of \(True, False\). Re"):
        checks.flag("strict", value)


@pytest.mark.parametrize("value", [None, 3, b"x", ["x"], "", "a\0b"], ids=repr)
def test_a_path_is_text_or_a_path(value):
    assert checks.path("file", Path("a") / "b") == str(Path("a/b"))
    with pytest.raises(ValueError, match=r"^file must be a path, .* Received: file="):
        checks.path("file", value)


def test_a_long_value_is_cut():
    with pytest.raises(ValueError, match="Received") as error:
        checks.integer("count", np.zeros((50, 50)))
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)
