"""Makes notebooks of pages: `python -m tools.notebooks` writes docs/notebooks.

Each block of code of a page becomes a cell, with what it printed when it ran here. The
text between two blocks becomes a cell of Markdown.
"""

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = DOCS / "notebooks"
PAGES = ("tutorial", "guide")
_FENCE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
# What a terminal overwrites, and how long an epoch took on this machine.
_OVERWRITTEN = re.compile(r"^.*\r", re.MULTILINE)
_PROGRESS = re.compile(r"^\d+/\d+ .*$", re.MULTILINE)
_TIME = re.compile(r" (?:- )?\d+[mu]?s(?:/step|/epoch)?(?= |$)")
_LINK = re.compile(r"\]\((?![a-z]+:|#)")


def cells(page: str) -> list[tuple[str, str]]:
    """Splits a page.

    Args:
        page: Name in `PAGES`.

    Returns:
        Kind ("markdown" or "code") and text of each cell, in order.
    """
    # Every second part is code.
    parts = _FENCE.split((DOCS / f"{page}.md").read_text())
    found = [
        ("code" if index % 2 else "markdown", part.strip())
        for index, part in enumerate(parts)
    ]
    return [
        (kind, text if kind == "code" else _LINK.sub("](../", text))
        for kind, text in found
        if text
    ]


def run(codes: list[str]) -> list[str]:
    """Runs code, cell by cell, in an empty folder.

    Args:
        codes: Text of each cell; a cell sees the names of those before it.

    Returns:
        What each cell printed, without the times of Keras's progress bars.
    """
    names: dict = {"__name__": "__main__"}
    printed = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for code in codes:
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown):
                exec(compile(code, "cell", "exec"), names)
            printed.append(_tidy(shown.getvalue()))
    return printed


def _tidy(text: str) -> str:
    text = _OVERWRITTEN.sub("", text)
    return _PROGRESS.sub(lambda line: _TIME.sub("", line[0]), text)


def notebook(page: str, printed: list[str]) -> dict:
    """Returns a page's notebook in Jupyter's format 4.5.

    Args:
        page: Name in `PAGES`.
        printed: What each of its code cells printed.
    """
    outputs = iter(printed)
    made = []
    for number, (kind, text) in enumerate(cells(page)):
        cell = {
            "cell_type": kind,
            "id": f"{page}-{number}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
        if kind == "code":
            lines = next(outputs).splitlines(keepends=True)
            stream = {"name": "stdout", "output_type": "stream", "text": lines}
            cell |= {"execution_count": None, "outputs": [stream] if lines else []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": made,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    """Runs all pages, which takes minutes, and writes their notebooks."""
    FOLDER.mkdir(exist_ok=True)
    for page in PAGES:
        printed = run([text for kind, text in cells(page) if kind == "code"])
        made = json.dumps(notebook(page, printed), indent=1, ensure_ascii=False)
        (FOLDER / f"{page}.ipynb").write_text(made + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
