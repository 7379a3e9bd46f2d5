"""Every public function of the library says what it takes and what it returns."""

import ast
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent.parent / "tf_lowbit"


def is_public(name: str) -> bool:
    """Tells whether a user calls a function of this name."""
    return not name.startswith("_") or name in ("__init__", "__call__")


def public_functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """Yields each public function and method, and whether it is a method."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and is_public(node.name):
            yield node, False
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and is_public(method.name):
                    yield method, True


def missing(function: ast.FunctionDef, is_method: bool) -> list[str]:
    """Returns the names of the parameters without a type, and "return"."""
    given = function.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    parameters += filter(None, (given.vararg, given.kwarg))
    names = [p.arg for p in parameters if p.annotation is None]
    if is_method and names[:1] in (["self"], ["cls"]):
        names = names[1:]
    returns = function.returns is not None or function.name == "__init__"
    return names if returns else [*names, "return"]


def test_public_functions_are_annotated():
    found, count = [], 0
    for path in sorted(LIBRARY.rglob("*.py")):
        for function, is_method in public_functions(ast.parse(path.read_text("utf-8"))):
            count += 1
            if names := missing(function, is_method):
                place = f"{path.relative_to(LIBRARY)}:{function.lineno}"
                found.append(f"{place} {function.name}: {', '.join(names)}")
    assert count > 400
    assert found == []
