"""Writes the Bazel BUILD files from the Python files and their imports.

    python tools/build_files.py           writes every BUILD file anew
    python tools/build_files.py --check   writes nothing; exits with 1 and names the
                                          files that are out of date

A Python file is one target, named after the file: `py_test` for a test file,
`py_binary` for a program (`if __name__ == "__main__"`), `py_library` otherwise.
`deps` mirrors the imports of files of this repository, wherever in the file they
stand. A submodule does not depend on the `__init__.py` above it, which usually
imports the submodule: Bazel allows no cycle.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE_DIRS = ("benchmarks", "docs", "examples", "tests", "tf_lowbit", "tools")
# Programs run as `python examples/demo.py` find their neighbours by bare name.
SCRIPT_DIRS = ("examples", "tools")
PYTEST_MAIN = "tools/pytest_main.py"

HEADER = """\
# Written by tools/build_files.py from the imports: run it, do not edit.
# TensorFlow and the other PyPI packages come from the Python environment
# (requirements.lock): they are no targets of this workspace.

package(default_visibility = ["//visibility:public"])

licenses(["notice"])
"""
TOP_RULES = """
exports_files(["LICENSE"])

alias(
    name = "tf_lowbit",
    actual = "//tf_lowbit:__init__",
)
"""


def python_files(root: Path) -> list[str]:
    """Returns the paths of all Python files, relative to `root`, sorted."""
    files = list(root.glob("*.py"))
    for folder in SOURCE_DIRS:
        files += (root / folder).rglob("*.py")
    paths = [path.relative_to(root) for path in files]
    hidden = ("__pycache__", ".")
    return sorted(
        path.as_posix()
        for path in paths
        if not any(part.startswith(hidden) for part in path.parts)
    )


def label(path: str) -> str:
    """Returns the label of a Python file's target."""
    folder, _, name = path.rpartition("/")
    return f"//{folder}:{name.removesuffix('.py')}"


def is_test(path: str) -> bool:
    """Tells whether pytest collects the file."""
    name = path.rpartition("/")[2]
    return name.startswith("test_") or name.endswith("_test.py")


def is_program(tree: ast.Module) -> bool:
    """Tells whether the file has an `if __name__ == "__main__"` block."""
    return any(
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Compare)
        and isinstance(node.test.left, ast.Name)
        and node.test.left.id == "__name__"
        for node in tree.body
    )


def module_file(module: str, files: set[str]) -> str | None:
    """Returns the file a dotted name stands for, None if it is not of ours."""
    stem = module.replace(".", "/")
    found = (path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in files)
    return next(found, None)


def imported_names(path: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yields (module, name) of each import, absolute; the name may be empty."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                yield module, alias.name


def imported_files(path: str, tree: ast.Module, files: set[str]) -> set[str]:
    """Returns the repository's files that the file at `path` imports."""
    prefixes = [""]
    if path.startswith(tuple(f"{folder}/" for folder in SCRIPT_DIRS)):
        prefixes.append(path.rpartition("/")[0].replace("/", ".") + ".")
    found = set()
    for module, name in imported_names(path, tree):
        # `from package import name`: the submodule if there is one, else the
        # package, whose __init__.py must define the name.
        candidates = [f"{module}.{name}".strip("."), module] if name else [module]
        targets = (
            module_file(prefix + candidate, files)
            for prefix in prefixes
            for candidate in candidates
        )
        found.add(next((target for target in targets if target), path))
    return found - {path}


def conftests(path: str, files: set[str]) -> set[str]:
    """Returns the conftest.py files that pytest loads before a test file."""
    parents = Path(path).parents
    return {p for p in ((d / "conftest.py").as_posix() for d in parents) if p in files}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Returns one import cycle as a list of files, empty if there is none."""
    done: set[str] = set()

    def visit(path: str, above: list[str]) -> list[str]:
        if path in above:
            return [*above[above.index(path) :], path]
        if path in done:
            return []
        for target in sorted(graph[path]):
            if cycle := visit(target, [*above, path]):
                return cycle
        done.add(path)
        return []

    return next((cycle for path in sorted(graph) if (cycle := visit(path, []))), [])


def string_list(name: str, values: list[str]) -> list[str]:
    """Returns the lines of an attribute that is a list of strings."""
    if len(values) == 1:
        return [f'    {name} = ["{values[0]}"],']
    return [f"    {name} = [", *(f'        "{v}",' for v in values), "    ],"]


def target_rule(path: str, tree: ast.Module, imports: set[str]) -> str:
    """Returns the rule of one Python file."""
    folder, _, name = path.rpartition("/")
    stem = name.removesuffix(".py")
    deps = []
    for dep in sorted(label(target) for target in imports):
        package, _, target = dep[2:].partition(":")
        deps.append(f":{target}" if package == folder else dep)
    lines = [f'    name = "{stem}",']
    if is_test(path):
        main = "//{}:{}".format(*PYTEST_MAIN.rsplit("/", 1))
        kind = "py_test"
        lines += string_list("srcs", [name, main])
        lines += string_list("args", [f"$(location {name})"])
        lines.append(f'    main = "{main}",')
    else:
        kind = "py_binary" if is_program(tree) else "py_library"
        lines += string_list("srcs", [name])
    if deps:
        lines += string_list("deps", sorted(deps, key=lambda d: (d[0] != ":", d)))
    return "\n".join([f"\n{kind}(", *lines, ")\n"])


def generate(root: Path) -> dict[str, str]:
    """Returns the content of every BUILD file by its path relative to `root`.

    Raises:
      ValueError: if files import one another in a circle.
    """
    paths = python_files(root)
    files = set(paths)
    trees = {p: ast.parse((root / p).read_text(encoding="utf-8"), p) for p in paths}
    graph = {path: imported_files(path, trees[path], files) for path in paths}
    if cycle := find_cycle(graph):
        raise ValueError(
            "Python files must not import one another in a circle. "
            f"Received: {' -> '.join(cycle)}"
        )
    builds: dict[str, str] = {}
    for path in paths:
        folder = path.rpartition("/")[0]
        build = f"{folder}/BUILD" if folder else "BUILD"
        if build not in builds:
            builds[build] = HEADER
            if not folder:
                builds[build] += TOP_RULES
            elif f"{folder}/pytest_main.py" == PYTEST_MAIN:
                builds[build] += '\nexports_files(["pytest_main.py"])\n'
        imports = graph[path]
        if is_test(path):
            imports = imports | conftests(path, files)
        builds[build] += target_rule(path, trees[path], imports)
    return builds


def stale_files(root: Path, builds: dict[str, str]) -> list[str]:
    """Returns one line per BUILD file that is not what it should be."""
    stale = []
    for name, content in sorted(builds.items()):
        path = root / name
        if not path.exists():
            stale.append(f"{name}: missing")
        elif path.read_text(encoding="utf-8") != content:
            stale.append(f"{name}: out of date")
    for folder in SOURCE_DIRS:
        for path in sorted((root / folder).rglob("BUILD")):
            name = path.relative_to(root).as_posix()
            if name not in builds:
                stale.append(f"{name}: in a folder without Python files")
    return stale


def main(argv: list[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository root")
    arguments = parser.parse_args(argv)
    try:
        builds = generate(arguments.root)
    except (SyntaxError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    stale = stale_files(arguments.root, builds)
    if arguments.check:
        for line in stale:
            print(line, file=sys.stderr)
        if stale:
            print("To renew them: python tools/build_files.py", file=sys.stderr)
        return 1 if stale else 0
    for line in stale:
        name = line.partition(":")[0]
        if name in builds:
            (arguments.root / name).write_text(builds[name], encoding="utf-8")
        else:
            (arguments.root / name).unlink()
        print(f"{name}: {'written' if name in builds else 'removed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
