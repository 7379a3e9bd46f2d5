"""Renders rich tables as plain text and as HTML for notebooks."""

import abc
import io
import textwrap

import rich.console
from rich.console import RenderableType

# A table is as wide as its contents; the console must not make it narrower.
_WIDEST = 1_000_000
_HTML = '<pre style="line-height: 1.25; overflow-x: auto">{code}</pre>'


class Table(abc.ABC):
    """Base class of a result that prints as the table of its method `__rich__`."""

    @abc.abstractmethod
    def __rich__(self) -> RenderableType:
        """The table for a rich console."""

    def __str__(self) -> str:
        """The table without colors, as wide as needed."""
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def as_text(shown: RenderableType, width: int = _WIDEST) -> str:
    """Renders as plain text without colours.

    Args:
        shown: A `rich` table or another renderable.
        width: Characters in a line.

    Returns:
        The lines, without spaces at their ends and without a common indent.
    """
    stream = io.StringIO()
    console = rich.console.Console(file=stream, width=width, color_system=None)
    console.print(shown, crop=False)
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    return textwrap.dedent("\n".join(lines)).strip("\n")


def as_html(shown: RenderableType, width: int = _WIDEST) -> str:
    """Renders as HTML, for the `_repr_html_` of a notebook.

    Args:
        shown: A `rich` table or another renderable.
        width: Characters in a line.

    Returns:
        One `<pre>` element with escaped text. It takes its colours from the page, so
        that it is readable on light and dark backgrounds.
    """
    console = rich.console.Console(
        file=io.StringIO(), width=width, record=True, force_jupyter=False
    )
    console.print(shown, crop=False)
    return console.export_html(inline_styles=True, code_format=_HTML)
