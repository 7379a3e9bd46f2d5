"""Imports inside the library point one way, in the order that CONTRIBUTING.md gives.

`models` and `datasets` stand apart: the library does not import them, and they import
`core` and the foundation alone.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "tf_lowbit"
FOUNDATION = {"compat", "version"}  # imports itself only; everything may import it
APART = {"models", "datasets"}


def read_orders(text: str) -> dict[str, list[set[str]]]:
    """From a package to its layers, low to high, as CONTRIBUTING.md lists them."""
    lists = re.findall(
        r"^      (tf_lowbit[\w.]*): ((?:.+\n)+?)(?=      \w|\n)", text, re.M
    )
    return {
        package: [set(re.findall(r"\w+", layer)) for layer in layers.split("<")]
        for package, layers in lists
    }


ORDERS = read_orders((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def library_imports(tree: ast.Module, package: list[str]) -> Iterator[tuple[list, int]]:
    """Yields (parts of the imported name, line) of each import of the library.

    Imports inside functions and under `TYPE_CHECKING` count as well. `package` is that
    of the file.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "tf_lowbit":
                yield name.split("."), node.lineno


def is_allowed(order: list[set[str]], importer: str, imported: str) -> bool:
    """Tells whether room `importer` may import room `imported`."""
    if imported == importer or imported in FOUNDATION:
        return True
    rank = {room: number for number, layer in enumerate(order) for room in layer}
    if importer in rank and imported in rank:
        return rank[imported] < rank[importer]
    return importer in APART and imported == "core"


def find_violations(library: Path, orders: dict) -> list[str]:
    """Returns one line for each import or module that breaks the rule."""
    violations = []
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        module = ["tf_lowbit", *inside.with_suffix("").parts]
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for package, order in orders.items():
            depth = len(package.split("."))
            if module[:depth] != package.split(".") or module[depth:] == ["__init__"]:
                continue  # A package's public names come from all of its rooms.
            importer = module[depth]
            known = set.union(*order) | (FOUNDATION | APART if depth == 1 else set())
            if importer not in known:
                violations.append(f"{inside}: {importer} has no place in the list")
                continue
            for imported, line in library_imports(tree, module[:-1]):
                if imported[:depth] != package.split("."):
                    continue
                room = imported[depth] if len(imported) > depth else imported[-1]
                if not is_allowed(order, importer, room):
                    violations.append(f"{inside}:{line}: {importer} imports {room}")
    return violations


def test_imports_of_the_library_point_one_way():
    assert list(ORDERS) == ["tf_lowbit", "tf_lowbit.export"]
    assert find_violations(LIBRARY, ORDERS) == []


def test_every_room_of_the_list_stands():
    for package, order in ORDERS.items():
        folder = LIBRARY.joinpath(*package.split(".")[1:])
        for room in set.union(*order):
            assert (folder / room).is_dir() or (folder / f"{room}.py").is_file(), room


def write_library(folder: Path, **sources: str) -> Path:
    """Writes files named like `core__grid` for core/grid.py."""
    for name, source in {"__init__": "", **sources}.items():
        parts = [name] if name.startswith("__") else name.split("__")
        path = folder.joinpath(*parts).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def test_checker_accepts_what_the_rule_allows(tmp_path):
    library = write_library(
        tmp_path,
        __init__="from tf_lowbit import callbacks, models\n",
        compat="import os\n",
        core__grid="from tf_lowbit.compat import tf\nimport tf_lowbit.core.ste\n",
        core__ste="from . import grid\n",
        quantizers__pact="from tf_lowbit.core import grid\n",
        network__graph="from tf_lowbit import compat, quantizers\n",
        conversion__saving="from tf_lowbit.scheme.api import quantize\n",
        callbacks__staging="from tf_lowbit.calibration.steps import calibrate\n",
        analysis__cost="from ..network import walk\nfrom .render import text\n",
        export__proof__verify="from tf_lowbit.export.tflite import runner\n",
        export__tflite__runner="from .. import types\nfrom tf_lowbit import network\n",
        models__resnet="from tf_lowbit.compat import keras\nfrom . import blocks\n",
        models__registry="from tf_lowbit.core import checks\n",
        datasets__digits="from tf_lowbit.version import __version__\n",
    )
    assert find_violations(library, ORDERS) == []


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("core__grid", "import tf_lowbit.quantizers.pact", "quantizers"),
        ("core__grid", "from tf_lowbit import scheme", "scheme"),
        ("quantizers__pact", "from ..scheme import api", "scheme"),
        ("scheme__api", "from .. import calibration", "calibration"),
        ("scheme__api", "def f():\n    from tf_lowbit.export import twin", "export"),
        ("network__graph", "from .scheme import layout", None),
        ("network__graph", "from ..calibration import calibrate", "calibration"),
        ("calibration__steps", "from tf_lowbit.callbacks import staging", "callbacks"),
        ("callbacks__staging", "from tf_lowbit.analysis import cost", "analysis"),
        ("export__types", "from tf_lowbit.analysis.cost import Cost", "analysis"),
        ("training__trainer", "import tf_lowbit.models", "models"),
        ("scheme__api", "from tf_lowbit.datasets import digits", "datasets"),
        ("models__resnet", "from tf_lowbit.scheme import graph", "scheme"),
        ("datasets__digits", "from tf_lowbit import models", "models"),
        ("compat", "from tf_lowbit.core import grid", "core"),
        ("core__grid", "import tf_lowbit", "tf_lowbit"),
        ("core__grid", "from tf_lowbit import quantize", "quantize"),
    ],
)
def test_checker_finds_a_violation(tmp_path, module, source, imported):
    library = write_library(tmp_path, **{module: f"import os\n{source}\n"})
    path = module.replace("__", "/") + ".py"
    line = 3 if source.startswith("def") else 2
    importer = module.partition("__")[0]
    expected = [f"{path}:{line}: {importer} imports {imported}"] if imported else []
    assert find_violations(library, ORDERS) == expected


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        (
            "integer__twin",
            "from tf_lowbit.export import options",
            "integer imports options",
        ),
        (
            "qonnx__layers",
            "from tf_lowbit.export import tflite",
            "qonnx imports tflite",
        ),
        ("tflite__writer", "from ..proof.verify import f", "tflite imports proof"),
        (
            "types",
            "from tf_lowbit.export.lowering import walk",
            "types imports lowering",
        ),
        ("lowering__walk", "import tf_lowbit.export", "lowering imports export"),
    ],
)
def test_checker_finds_a_violation_within_the_export(tmp_path, module, source, found):
    library = write_library(tmp_path, **{f"export__{module}": f"{source}\n"})
    path = f"export__{module}".replace("__", "/") + ".py"
    assert find_violations(library, ORDERS) == [f"{path}:1: {found}"]


def test_checker_wants_every_module_in_the_list(tmp_path):
    library = write_library(tmp_path, foo="", bar__baz="", export__qux="")
    assert find_violations(library, ORDERS) == [
        "bar/baz.py: bar has no place in the list",
        "export/qux.py: qux has no place in the list",
        "foo.py: foo has no place in the list",
    ]
