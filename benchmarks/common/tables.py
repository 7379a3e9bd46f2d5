"""Tables in Markdown."""

from collections.abc import Iterable

import tabulate

# A cell of what was not run.
NOTHING = "—"


def table(headers: list[str], lines: Iterable[list]) -> str:
    """Lines of text as a table in Markdown, the first column to the left."""
    lines = list(lines)
    if not lines:
        return "Not run yet."
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate.tabulate(
        lines, headers, tablefmt="github", disable_numparse=True, colalign=align
    )
