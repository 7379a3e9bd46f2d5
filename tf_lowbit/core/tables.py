"""What rich shows on a terminal, as text and for notebooks."""

import io
import textwrap

import rich.console
from rich.console import RenderableType

# A table is as wide as its contents; the console must not make it narrower.
_WIDEST = 1_000_000
_HTML = '<pre style="line-height: 1.25; overflow-x: auto">{code}</pre>'


def as_text(shown: RenderableType, width: int = _WIDEST) -> str:
    """What rich shows, without colours.

    Args:
        shown: a `rich` table or another renderable.
        width: characters in a line.

    Returns:
        The lines, without spaces at their ends or in front of all of them.
    """
    stream = io.StringIO()
    console = rich.console.Console(file=stream, width=width, color_system=None)
    console.print(shown, crop=False)
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    return textwrap.dedent("\n".join(lines)).strip("\n")


def as_html(shown: RenderableType, width: int = _WIDEST) -> str:
    """What rich shows, for the `_repr_html_` of a notebook.

    Args:
        shown: a `rich` table or another renderable.
        width: characters in a line.

    Returns:
        One `<pre>` element, in which text is no markup. It has the page's colours, so
        that it is read on light and dark ground alike.
    """
    console = rich.console.Console(
        file=io.StringIO(), width=width, record=True, force_jupyter=False
    )
    console.print(shown, crop=False)
    return console.export_html(inline_styles=True, code_format=_HTML)
