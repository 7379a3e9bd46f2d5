"""pyproject.toml, the lock, the Makefile and the README agree."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict:
    """The `[project]` table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def distribution() -> setuptools.Distribution:
    """What setuptools reads from pyproject.toml."""
    read = setuptools.Distribution()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        read.parse_config_files()
    return read


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """The lock's versions by canonical name."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.+]+", line), line
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


def test_version_is_that_of_version_py_everywhere(distribution):
    source = (ROOT / "tf_lowbit" / "version.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)
    assert distribution.metadata.version == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation


def test_setup_py_runs_and_does_not_import_the_library(distribution):
    script = (
        "import runpy, sys; sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py', run_name='__main__');"
        "sys.exit(sorted({'tf_lowbit', 'tensorflow'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == distribution.metadata.version


def test_metadata(project):
    assert project["name"] == "tf_lowbit"
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    supported = SpecifierSet(project["requires-python"])
    minors = [minor for minor in range(8, 20) if f"3.{minor}.1" in supported]
    assert minors == [11, 12, 13]
    versions = [f"Programming Language :: Python :: 3.{minor}" for minor in minors]
    assert set(versions) <= set(project["classifiers"])


def test_every_package_of_the_library_is_packaged_and_nothing_else(distribution):
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "tf_lowbit").rglob("*.py")
    }
    assert set(distribution.packages) == folders


def test_files_that_are_no_modules_are_packaged(distribution):
    packaged = {
        path
        for package, patterns in distribution.package_data.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    present = {
        path
        for path in (ROOT / "tf_lowbit").rglob("*")
        if path.is_file()
        and path.name != "BUILD"
        and path.suffix not in (".py", ".pyc")
    }
    assert packaged == present
    assert {path.suffix for path in packaged} == {".typed", ".jinja"}


def requirements(project: dict) -> list[str]:
    """Returns what the library and its extras need, but for `all`, which names them."""
    extras = project["optional-dependencies"]
    parts = (extras[name] for name in extras if name != "all")
    return [*project["dependencies"], *chain.from_iterable(parts)]


def test_all_has_every_other_extra(project):
    extras = project["optional-dependencies"]
    assert extras.keys() == {
        *("all", "benchmarks", "datasets", "dev", "docs"),
        *("examples", "litert", "micro", "qonnx", "report", "search"),
    }
    (requirement,) = map(Requirement, extras["all"])
    assert requirement.name == "tf_lowbit"
    assert requirement.extras == extras.keys() - {"all"}


def test_requirements_have_two_bounds(project):
    for text in requirements(project):
        operators = {spec.operator for spec in Requirement(text).specifier}
        assert operators in ({">=", "<"}, {"=="}), text


def test_lock_pins_every_dependency_within_its_bounds(project, pins):
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]
    texts = [*requirements(project), *build["requires"]]
    assert len(texts) > 10
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"requirements.lock lacks {name}"
        assert pins[name] in requirement.specifier, f"{requirement}: {pins[name]}"


def test_lock_has_one_tensorflow_only(pins):
    copies = {"tensorflow", "tensorflow-cpu", "tf-nightly", "tensorflow-intel"}
    assert copies & pins.keys() == {"tensorflow"}


def test_library_imports_only_what_is_declared(project):
    """Extras may be imported by `datasets` alone, the interpreters by what runs files,
    what solves, draws and fills a page by `analysis`.
    """
    distributions = {
        "ai_edge_litert": "ai-edge-litert",
        "absl": "absl-py",
        "google": "protobuf",
        "sklearn": "scikit-learn",
        "tflite_micro": "tflite-micro",
        "tensorflow_datasets": "tensorflow-datasets",
        "tensorflow_model_optimization": "tensorflow-model-optimization",
        "tf_keras": "tf-keras",
    }
    runtime = {Requirement(text).name for text in project["dependencies"]}
    extra = {
        Requirement(text).name for text in project["optional-dependencies"]["datasets"]
    }
    qonnx = {
        Requirement(text).name for text in project["optional-dependencies"]["qonnx"]
    }
    for path in (ROOT / "tf_lowbit").rglob("*.py"):
        allowed = runtime | (extra if path.parent.name == "datasets" else set())
        allowed |= {"ai-edge-litert"} if path.name == "runner.py" else set()
        allowed |= {"tflite-micro"} if path.name == "micro.py" else set()
        allowed |= qonnx if path.parent.name == "qonnx" else set()
        is_report = path.parent.name == "analysis"
        allowed |= {"jinja2", "matplotlib"} if is_report else set()
        allowed |= {"scipy"} if path.parent.name == "analysis" else set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for module in {name.split(".")[0] for name in names}:
                if module in sys.stdlib_module_names | {"tf_lowbit"}:
                    continue
                assert distributions.get(module, module) in allowed, (
                    f"{path.relative_to(ROOT)}:{node.lineno}: {module}"
                )


def test_makefile_has_the_targets_that_are_documented():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "lint", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme
    for page in (readme, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", page, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
