"""The BUILD files hold every Python file and depend on what the files import."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent


def python_files() -> set[str]:
    """Returns the paths of the Python files that Bazel sees, from the root on."""
    ignored = (ROOT / ".bazelignore").read_text().split()
    tops = [top for top in ROOT.glob("[!.]*") if top.name not in ignored]
    paths = [path for top in tops if top.is_dir() for path in top.rglob("*.py")]
    paths += [top for top in tops if top.suffix == ".py"]
    return {path.relative_to(ROOT).as_posix() for path in paths}


def absolute(label: str, folder: str) -> str:
    """Returns `//folder:target` for a label in the BUILD file of `folder`."""
    package, _, target = label.removeprefix("//").partition(":")
    package = package or folder
    return f"//{package}:{target or package.split('/')[-1]}"


def read_targets(folder: str) -> dict[str, SimpleNamespace]:
    """Returns the libraries of a BUILD file by label, and its tests as one target."""
    targets = {}

    def glob(include, exclude=()):
        paths = [path for name in include for path in (ROOT / folder).glob(name)]
        return [p.name for p in paths if not any(p.match(name) for name in exclude)]

    def py_library(name, srcs, deps=(), **_):
        target = targets.setdefault(absolute(f":{name}", folder), SimpleNamespace())
        files = {f"{folder}/{src}".strip("/") for src in srcs if "//" not in src}
        target.files = getattr(target, "files", set()) | files
        target.deps = {absolute(dep, folder) for dep in deps}

    rules = {
        "glob": glob,
        "py_library": py_library,
        "py_test": lambda name, **rest: py_library("*", **rest),
        "py_binary": lambda **_: None,
    }
    names = {"native": SimpleNamespace(**rules), **rules}
    names["package"] = names["exports_files"] = lambda *_, **__: None
    names["load"] = lambda label, _: exec(
        (ROOT / label.strip("/").replace(":", "/")).read_text(), names
    )
    exec((ROOT / folder / "BUILD").read_text(), names)  # Starlark is Python to Python.
    return targets


def imported_files(path: str, files: set[str]) -> set[str]:
    """Returns the repository's files that the file at `path` imports."""
    package = path.split("/")[:-1]
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names += [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names += [[f"{module}.{alias.name}", module] for alias in node.names]
    found = set()
    for candidates in names:
        stems = [name.replace(".", "/") for name in candidates]
        paths = [f"{stem}{end}" for stem in stems for end in (".py", "/__init__.py")]
        found.update([path for path in paths if path in files][:1])
    return found


def test_build_files_cover_the_sources_and_depend_on_what_they_import():
    files = python_files()
    folders = {path.rpartition("/")[0] for path in files}
    targets = {k: v for folder in folders for k, v in read_targets(folder).items()}
    assert set().union(*(target.files for target in targets.values())) == files
    libraries = [label for label in targets if not label.endswith(":*")]
    pairs = [(path, label) for label in libraries for path in targets[label].files]
    owners = dict(pairs)
    assert len(owners) == len(pairs), "A file must be in one library."
    graph = {label: target.deps for label, target in targets.items()}
    # Python imports tf_lowbit ahead of what is in it: others depend on the whole of it.
    apart = {"//tf_lowbit/datasets:datasets", "//tf_lowbit/models:models"}
    inside = {label for label in graph if label.startswith("//tf_lowbit")}
    needed = {}
    for label, target in targets.items():
        imported = set().union(*(imported_files(path, files) for path in target.files))
        labels = {owners.get(path, path) for path in imported - target.files}
        if label not in inside and labels & (inside - apart):
            labels = labels - (inside - apart) | {"//tf_lowbit:tf_lowbit"}
        if label.endswith(":*"):  # What pytest_tests adds.
            labels |= {"//tests:tests", "//tf_lowbit:tf_lowbit"}
        elif label.startswith("//tests/"):
            labels.add("//tests:tests")  # Its __init__.py.
        needed[label] = labels
    assert graph == needed
    TopologicalSorter(graph).prepare()  # A circle raises CycleError.
