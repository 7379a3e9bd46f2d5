"""Sphinx's settings: `make docs` writes the pages to docs/_build."""

import re
import textwrap

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

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


def link_benchmarks(app, name, source):
    """Their page includes the file that the pages link to in the repository."""
    del app, name
    link = r"(\]\((?:\.\./)*)\.\./benchmarks/README\.md"
    source[0] = re.sub(link, r"\1benchmarks.md", source[0])


class LinkNames(SphinxPostTransform):
    """Links names of the library in prose to the reference, such as `tfl.calibrate`."""

    default_priority = 5

    def run(self, **kwargs):
        """Replaces literals of the present page."""
        domain = self.env.domains["py"]
        found = {
            name: entry
            for name, entry in domain.objects.items()
            if entry.objtype in ("class", "function", "exception")
        }
        # Without its package a name is linked if it is the only one.
        last = [name.rpartition(".")[2] for name in found]
        alone = {n.rpartition(".")[2]: n for n in found}
        alone = {short: n for short, n in alone.items() if last.count(short) == 1}
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, nodes.reference | nodes.title):
                continue
            written = re.match(r"[\w.]+", literal.astext())
            name = re.sub(r"^tfl\b", "tf_lowbit", written[0]) if written else ""
            name = next(
                (n for n in (name, f"tf_lowbit.{name}", alone.get(name)) if n in found),
                None,
            )
            if name is None or found[name].docname == self.env.docname:
                continue
            entry = found[name]
            literal.replace_self(
                make_refnode(
                    self.app.builder,
                    self.env.docname,
                    entry.docname,
                    entry.node_id,
                    literal.deepcopy(),
                    name,
                )
            )


def setup(app):
    """Sphinx's hook."""
    app.add_post_transform(LinkNames)
    app.connect("source-read", link_benchmarks)
    # Before napoleon, which is at 500.
    app.connect("autodoc-process-docstring", as_rst, priority=400)
