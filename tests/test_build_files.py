"""The BUILD files are up to date, and say the same when read independently."""

import ast
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tools import build_files

ROOT = Path(__file__).resolve().parent.parent
RULES = ("py_binary", "py_library", "py_test")


def listed_python_files() -> list[Path]:
    """Returns the Python files Git knows or would add, else those found."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z", "--", "*.py"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        found = [*ROOT.glob("*.py")]
        for folder in ("benchmarks", "docs", "examples", "tests", "tf_lowbit", "tools"):
            found += (ROOT / folder).rglob("*.py")
        return [path for path in found if "__pycache__" not in path.parts]
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.exists()]


def read_targets(build: Path) -> list[dict]:
    """Returns the rule calls of a BUILD file, which is Python to the parser."""
    targets = []
    for node in ast.parse(build.read_text(encoding="utf-8")).body:
        assert isinstance(node, ast.Expr), f"{build}: only calls are expected"
        assert isinstance(node.value, ast.Call), f"{build}: only calls are expected"
        attributes = {
            keyword.arg: ast.literal_eval(keyword.value)
            for keyword in node.value.keywords
        }
        targets.append({"rule": node.value.func.id, **attributes})
    return targets


def absolute(label: str, folder: str) -> tuple[str, str]:
    """Returns (package, target) of a label read in `folder`."""
    package, _, target = label.rpartition(":")
    return (package.removeprefix("//") if package else folder), target


@pytest.fixture(scope="module")
def workspace() -> dict[str, list[dict]]:
    """Every BUILD file's targets, by the folder it is in."""
    folders = {path.parent for path in listed_python_files()} | {ROOT}
    return {
        "" if folder == ROOT else folder.relative_to(ROOT).as_posix(): read_targets(
            folder / "BUILD"
        )
        for folder in folders
    }


def test_build_files_are_up_to_date(capsys):
    status = build_files.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_every_python_file_has_exactly_one_target(workspace):
    counts = Counter(
        (folder, source)
        for folder, targets in workspace.items()
        for target in targets
        for source in target.get("srcs", [])
        if not source.startswith("//")
    )
    files = {
        (path.parent.relative_to(ROOT).as_posix().removeprefix("."), path.name)
        for path in listed_python_files()
    }
    assert len(files) > 10
    assert {key: counts[key] for key in files} == dict.fromkeys(files, 1)


def test_sources_and_dependencies_exist(workspace):
    names = {
        (folder, target["name"])
        for folder, targets in workspace.items()
        for target in targets
        if "name" in target
    }
    for folder, targets in workspace.items():
        for target in targets:
            for source in target.get("srcs", []):
                path = source.replace(":", "/").removeprefix("//")
                base = ROOT if source.startswith("//") else ROOT / folder
                assert (base / path).is_file(), f"{folder}: {target['name']}: {source}"
            for dep in target.get("deps", []):
                assert absolute(dep, folder) in names, f"{folder}: {dep}"


def test_names_are_unique_and_tests_are_py_tests(workspace):
    for folder, targets in workspace.items():
        rules = [target for target in targets if target["rule"] in RULES]
        names = Counter(target["name"] for target in targets if "name" in target)
        assert set(names.values()) <= {1}, folder
        for target in rules:
            named_test = target["name"].startswith("test_")
            assert (target["rule"] == "py_test") == named_test, target


@pytest.fixture
def fake(tmp_path):
    """A small repository with each kind of file and import."""
    sources = {
        "setup.py": "",
        "tf_lowbit/__init__.py": "from tf_lowbit.core import grid\n",
        "tf_lowbit/core/__init__.py": "from tf_lowbit.core.grid import levels\n",
        "tf_lowbit/core/grid.py": "import numpy\nfrom . import ste\nlevels = 1\n",
        "tf_lowbit/core/ste.py": "",
        "tests/conftest.py": "",
        "tests/core/test_grid.py": "from tf_lowbit.core import levels\n",
        "examples/train.py": "def run():\n    import tf_lowbit.core.grid as g\n",
        "examples/demo.py": 'import train\nif __name__ == "__main__":\n    pass\n',
    }
    for name, source in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


def test_dependencies_mirror_the_imports(fake):
    assert build_files.main(["--root", str(fake)]) == 0
    deps = {
        f"{build.parent.relative_to(fake).as_posix()}/{target['name']}": (
            target["rule"],
            target.get("deps", []),
        )
        for build in fake.rglob("BUILD")
        for target in read_targets(build)
        if target["rule"] in RULES
    }
    assert deps == {
        "./setup": ("py_library", []),
        "tf_lowbit/__init__": ("py_library", ["//tf_lowbit/core:grid"]),
        "tf_lowbit/core/__init__": ("py_library", [":grid"]),
        "tf_lowbit/core/grid": ("py_library", [":ste"]),
        "tf_lowbit/core/ste": ("py_library", []),
        "tests/conftest": ("py_library", []),
        "tests/core/test_grid": (
            "py_test",
            ["//tests:conftest", "//tf_lowbit/core:__init__"],
        ),
        "examples/train": ("py_library", ["//tf_lowbit/core:grid"]),
        "examples/demo": ("py_binary", [":train"]),
    }


def test_check_names_what_is_out_of_date(fake, capsys):
    root = ["--root", str(fake)]
    assert build_files.main([*root, "--check"]) == 1
    assert "tf_lowbit/core/BUILD: missing" in capsys.readouterr().err
    assert not list(fake.rglob("BUILD"))

    assert build_files.main(root) == 0
    assert build_files.main([*root, "--check"]) == 0
    capsys.readouterr()

    (fake / "tf_lowbit/core/packing.py").write_text("")
    (fake / "tests/core/test_grid.py").unlink()
    assert build_files.main([*root, "--check"]) == 1
    errors = capsys.readouterr().err
    assert "tf_lowbit/core/BUILD: out of date" in errors
    assert "tests/core/BUILD: in a folder without Python files" in errors
    assert "examples/BUILD" not in errors

    assert build_files.main(root) == 0
    assert build_files.main([*root, "--check"]) == 0
    assert not (fake / "tests/core/BUILD").exists()


def test_a_circle_of_imports_is_an_error(fake, capsys):
    (fake / "tf_lowbit/core/ste.py").write_text("import tf_lowbit.core.grid\n")
    assert build_files.main(["--root", str(fake), "--check"]) == 1
    expected = (
        "Received: tf_lowbit/core/grid.py -> tf_lowbit/core/ste.py -> "
        "tf_lowbit/core/grid.py"
    )
    assert expected in capsys.readouterr().err
