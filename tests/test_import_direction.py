"""Imports inside the library point one way.

The rule, over the modules and packages directly under tf_lowbit/: one imports itself,
modules of lower layers, and the foundation. `models` and `datasets` stand apart: the
library does not import them, and they import `core` and the foundation alone.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parent.parent / "tf_lowbit"

# Low to high. Modules of one layer do not import one another.
LAYERS = (
    {"core"},
    {"quantizers"},
    {"scheme"},
    {"inspection", "keras3", "separable"},
    {"keras3_inference", "observation", "predictions", "saving"},
    {"batch_norm", "tensor_statistics"},
    {"quantized_network"},
    {"calibration"},
    {"callbacks", "training", "export", "reporting"},
    {"api"},  # It says what of a network will have no form in a file.
    {"requantization"},
    {"bit_allocation"},
)
FOUNDATION = {"compat", "version"}  # imports itself only; everything may import it
APART = {"models", "datasets"}
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}


def library_imports(tree: ast.Module, package: list[str]) -> Iterator[tuple[str, int]]:
    """Yields (module directly under tf_lowbit, line) of each import of the library.

    Imports inside functions and under `TYPE_CHECKING` count as well. The module is
    "" where the whole library is imported. `package` is that of the file.
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
            parts = name.split(".")
            if parts[0] == "tf_lowbit":
                yield (parts[1] if len(parts) > 1 else ""), node.lineno


def is_allowed(importer: str, imported: str) -> bool:
    """Tells whether module `importer` may import module `imported`."""
    if imported == importer or imported in FOUNDATION:
        return True
    if importer in RANK and imported in RANK:
        return RANK[imported] < RANK[importer]
    return importer in APART and imported == "core"


def find_violations(library: Path) -> list[str]:
    """Returns one line for each import or module that breaks the rule."""
    violations = []
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if inside.name == "__init__.py" and len(inside.parts) == 1:
            continue  # the public names come from everywhere
        importer = inside.parts[0].removesuffix(".py")
        if importer not in RANK.keys() | FOUNDATION | APART:
            violations.append(f"{inside}: {importer} has no place in the table")
            continue
        package = ["tf_lowbit", *inside.parts[:-1]]
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for imported, line in library_imports(tree, package):
            if not is_allowed(importer, imported):
                violations.append(
                    f"{inside}:{line}: {importer} imports {imported or 'tf_lowbit'}"
                )
    return violations


def test_imports_of_the_library_point_one_way():
    assert list(LIBRARY.rglob("*.py"))
    assert find_violations(LIBRARY) == []


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
        inspection="from tf_lowbit import compat, quantizers\n",
        saving="from tf_lowbit.scheme.api import quantize\n",
        calibration="from tf_lowbit.inspection import walk\n",
        callbacks__calibration="from tf_lowbit.calibration import calibrate\n",
        reporting__cost="from ..inspection import walk\nfrom .render import text\n",
        models__resnet="from tf_lowbit.compat import keras\nfrom . import blocks\n",
        models__registry="from tf_lowbit.core import checks\n",
        datasets__digits="from tf_lowbit.version import __version__\n",
    )
    assert find_violations(library) == []


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("core__grid", "import tf_lowbit.quantizers.pact", "quantizers"),
        ("core__grid", "from tf_lowbit import scheme", "scheme"),
        ("quantizers__pact", "from ..scheme import api", "scheme"),
        ("scheme__api", "from .. import inspection", "inspection"),
        ("scheme__api", "def f():\n    from tf_lowbit.export import twin", "export"),
        ("inspection", "from .calibration import calibrate", "calibration"),
        ("separable", "from tf_lowbit import inspection", "inspection"),
        ("calibration", "from tf_lowbit.callbacks import staging", "callbacks"),
        ("callbacks__staging", "from tf_lowbit.training import trainer", "training"),
        ("reporting__cost", "from tf_lowbit.export.plan import Plan", "export"),
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
    assert find_violations(library) == [f"{path}:{line}: {importer} imports {imported}"]


def test_checker_wants_every_module_in_the_table(tmp_path):
    library = write_library(tmp_path, foo="", bar__baz="")
    assert find_violations(library) == [
        "bar/baz.py: bar has no place in the table",
        "foo.py: foo has no place in the table",
    ]
