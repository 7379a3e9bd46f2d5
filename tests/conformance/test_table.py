"""Every public name has its row, and its documentation."""

import ast
import dataclasses
import importlib
import inspect
import pickle
import re
import textwrap
from pathlib import Path

import pytest

import tf_lowbit as tfl
from tests.conformance import table
from tf_lowbit.compat import keras

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = (
    *("", "callbacks", "datasets", "export", "models", "quantizers", "recipes"),
)
DOCUMENTED = [
    name
    for name, row in table.TABLE.items()
    if row.kind not in (table.MODULE, table.CONSTANT)
]
SETTINGS = table.variants(table.SETTING)
# Of Keras: a base class of ours hands them on.
INHERITED = {"kwargs", "args"}


def module_of(namespace):
    return importlib.import_module(f"tf_lowbit.{namespace}".rstrip("."))


def resolved(name):
    namespace, _, last = name.rpartition(".")
    return getattr(module_of(namespace), last)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_registered_and_no_other(namespace):
    registered = {
        name.rpartition(".")[2]
        for name in table.TABLE
        if name.rpartition(".")[0] == namespace
    }
    assert registered == set(module_of(namespace).__all__)


def test_every_row_is_of_a_kind_and_those_that_are_made_have_variants():
    for name, row in table.TABLE.items():
        assert row.kind in table.KINDS, name
        makes = row.kind not in (
            table.FUNCTION,
            table.CLASS,
            table.MODULE,
            table.CONSTANT,
        )
        assert bool(row.variants) == makes, name


def test_every_concrete_class_of_a_kind_is_registered_as_one():
    kinds = {
        quantizer: kind
        for kind, quantizer in {
            table.WEIGHT: tfl.quantizers.WeightQuantizer,
            table.ACTIVATION: tfl.quantizers.ActivationQuantizer,
            table.CALLBACK: keras.callbacks.Callback,
            table.TRAINER: keras.Model,
        }.items()
    }
    for name, row in table.TABLE.items():
        found = resolved(name)
        if inspect.isclass(found) and not inspect.isabstract(found):
            expected = [kind for base, kind in kinds.items() if issubclass(found, base)]
            if row.kind == table.RESIDUAL:
                expected = [table.RESIDUAL]
            if expected and found not in kinds:
                assert [row.kind] == expected, name


# --- documentation


def parameters_of(thing):
    """Names of what a caller gives."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        if not dataclasses.is_dataclass(thing):
            return []
    found = inspect.signature(function).parameters
    return [name for name in found if name not in {"self", *INHERITED}]


def section(docstring, *titles):
    """The lines below one of the titles."""
    lines = inspect.cleandoc(docstring).splitlines()
    for index, line in enumerate(lines):
        if line.strip() in {f"{title}:" for title in titles}:
            below = []
            for after in lines[index + 1 :]:
                if after and not after.startswith(" "):
                    break
                below.append(after)
            return textwrap.dedent("\n".join(below))
    return ""


def test_a_section_is_read():
    text = """Does.

    Args:
        a: one,
            more.
        b: two.

    Returns:
        It.
    """
    assert section(text, "Args") == "a: one,\n    more.\nb: two.\n"
    assert section(text, "Raises", "Returns") == "It."
    assert section(text, "Yields") == ""


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_parameter_is_described(name):
    thing = resolved(name)
    assert thing.__doc__, name
    described = section(thing.__doc__, "Args") + "\n"
    described += section(thing.__doc__, "Attributes")
    for parameter in parameters_of(thing):
        pattern = rf"^(\w+, )*\**{parameter}(, \w+)*:"
        assert re.search(pattern, described, re.MULTILINE), parameter


def raised_in(thing):
    """Names of the exceptions that the source of a function raises itself."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (TypeError, OSError):
        return set()
    calls = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc]
    return {c.func.id for c in calls if isinstance(c, ast.Call) and c.func.id[0] != "_"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_errors_and_results_are_described(name):
    thing = resolved(name)
    for error in raised_in(thing) - {"StopIteration"}:
        assert error in section(thing.__doc__, "Raises"), error
    if not inspect.isfunction(thing):
        return
    if inspect.signature(thing).return_annotation not in (None, inspect._empty):
        first = inspect.cleandoc(thing.__doc__).splitlines()[0]
        is_told = section(thing.__doc__, "Returns", "Yields")
        # Of what has no parameters the first line may be all.
        assert is_told or (first and not parameters_of(thing)), name


def test_the_reference_names_what_is_public():
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    text = "".join(page.read_text() for page in pages)
    apart = {"datasets", "models"}  # Of the examples, no part of the method.
    for name, row in table.TABLE.items():
        namespace, _, last = name.rpartition(".")
        if namespace in apart or row.kind in (table.MODULE, table.CONSTANT):
            continue
        whole = re.search(rf"automodule:: tf_lowbit\.{namespace}\n   :members:\n", text)
        assert (namespace and whole) or re.search(rf"\b{last}\b", text), name


# --- settings


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_frozen_equal_to_its_like_and_can_be_pickled(name):
    setting = SETTINGS[name]()
    assert dataclasses.is_dataclass(setting)
    field = dataclasses.fields(setting)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(setting, field, None)
    again = pickle.loads(pickle.dumps(setting))
    assert again == setting
    assert dataclasses.replace(setting) == setting
    assert f"{field}=" in repr(setting)
