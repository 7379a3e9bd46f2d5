"""setup.py, the lock, the Makefile and the README agree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def arguments() -> dict:
    """What setup.py hands to setuptools.setup."""
    received = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **kwargs: received.update(kwargs))
        patch.chdir(ROOT)
        path = ROOT / "setup.py"
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
        exec(code, {"__name__": "__main__", "__file__": str(path)})
    return received


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """The lock's versions by canonical name."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.+]+", line), line
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


def test_version_is_that_of_version_py(arguments):
    source = (ROOT / "tf_lowbit" / "version.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)
    assert arguments["version"] == version


def test_setup_py_runs_and_does_not_import_the_library(arguments):
    script = (
        "import runpy, sys; sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py', run_name='__main__');"
        "sys.exit(sorted({'tf_lowbit', 'tensorflow'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == arguments["version"]


def test_metadata(arguments):
    assert arguments["name"] == "tf_lowbit"
    assert arguments["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    supported = SpecifierSet(arguments["python_requires"])
    assert [minor for minor in range(8, 20) if f"3.{minor}.1" in supported] == [
        11,
        12,
        13,
    ]


def test_every_package_of_the_library_is_packaged_and_nothing_else(arguments):
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "tf_lowbit").rglob("*.py")
    }
    assert set(arguments["packages"]) == folders


def test_requirements_have_two_bounds(arguments):
    extras = arguments["extras_require"]
    assert extras.keys() == {
        *("all", "benchmarks", "datasets", "dev", "docs"),
        *("examples", "litert", "micro", "qonnx", "report", "search"),
    }
    parts = (extras[name] for name in extras if name != "all")
    assert set(extras["all"]) == set().union(*parts)
    for text in [*arguments["install_requires"], *extras["all"]]:
        operators = {spec.operator for spec in Requirement(text).specifier}
        assert operators in ({">=", "<"}, {"=="}), text


def test_lock_pins_every_dependency_within_its_bounds(arguments, pins):
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    texts = [
        *arguments["install_requires"],
        *arguments["extras_require"]["all"],
        *build["build-system"]["requires"],
    ]
    assert len(texts) > 10
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"requirements.lock lacks {name}"
        assert pins[name] in requirement.specifier, f"{requirement}: {pins[name]}"


def test_lock_has_one_tensorflow_only(pins):
    copies = {"tensorflow", "tensorflow-cpu", "tf-nightly", "tensorflow-intel"}
    assert copies & pins.keys() == {"tensorflow"}


def test_library_imports_only_what_setup_py_declares(arguments):
    """Extras may be imported by `datasets` alone, the interpreters by what runs files,
    SciPy by the search for bits, and what draws and fills a page by `reporting`.
    """
    distributions = {
        "ai_edge_litert": "ai-edge-litert",
        "absl": "absl-py",
        "sklearn": "scikit-learn",
        "tflite_micro": "tflite-micro",
        "tensorflow_datasets": "tensorflow-datasets",
        "tensorflow_model_optimization": "tensorflow-model-optimization",
        "tf_keras": "tf-keras",
    }
    runtime = {Requirement(text).name for text in arguments["install_requires"]}
    extra = {Requirement(text).name for text in arguments["extras_require"]["datasets"]}
    for path in (ROOT / "tf_lowbit").rglob("*.py"):
        allowed = runtime | (extra if path.parent.name == "datasets" else set())
        allowed |= {"ai-edge-litert"} if path.name == "running.py" else set()
        allowed |= {"tflite-micro"} if path.name == "micro.py" else set()
        allowed |= {"onnx", "qonnx"} if path.name.startswith("qonnx") else set()
        is_report = path.parent.name == "reporting"
        allowed |= {"jinja2", "matplotlib"} if is_report else set()
        allowed |= {"scipy"} if path.parent.name == "bit_allocation" else set()
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
