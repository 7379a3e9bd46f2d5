"""Sphinx's settings: `make docs` writes the pages to docs/_build."""

import re
import textwrap

from tf_lowbit.version import __version__

project = "tf_lowbit"
author = "the tf_lowbit authors"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tf_lowbit {release}"
html_static_path = ["_static"]
html_css_files = ["cards.css"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_typehints_format = "short"
# Links to files of the repository that are no pages.
suppress_warnings = ["myst.xref_missing"]


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are Markdown: code in single backticks, in fences, behind a colon."""
    del app, what, name, obj, options
    text = "\n".join(lines)
    text = re.sub(r"```python\n(.*?)```", _as_block, text, flags=re.DOTALL)
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)(\w?)", _as_literal, text)
    text = re.sub(r"(?<!:):\n\n(?=    +\S)", "::\n\n", text)
    lines[:] = text.split("\n")


def _as_block(match):
    return "::\n\n" + textwrap.indent(match[1], "    ")


def _as_literal(match):
    code, behind = match.groups()
    return f"``{' '.join(code.split())}``" + (f"\\ {behind}" if behind else "")


def setup(app):
    """Sphinx's hook."""
    # Before napoleon, which is at 500.
    app.connect("autodoc-process-docstring", as_rst, priority=400)
