"""Draws the tables of benchmarks/README.md, and the plots, from the committed results.

  python benchmarks/report.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Nothing is trained or
measured, and TensorFlow is not needed.
"""

from pathlib import Path

import accuracy_report
import costs_report
import peers_report
from absl import app

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"


def tables(results: Path = RESULTS) -> dict[str, str]:
    """All tables in Markdown, by name.

    Args:
        results: the folder of all results.
    """
    accuracy = accuracy_report.tables(results / "accuracy")
    peers = peers_report.tables(results / "peers")
    return {
        **{f"accuracy, {name}": table for name, table in accuracy.items()},
        **{f"peers, {name}": table for name, table in peers.items()},
        **costs_report.tables(results),
    }


def drawn(text: str, made: dict[str, str]) -> str:
    """A Markdown text with each table between its marks.

    Args:
        text: with the marks of all tables.
        made: the tables by name.

    Raises:
        ValueError: if a table's marks are missing.
    """
    for name, table in made.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        head, found, rest = text.partition(start)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(
                f"The text must have the marks {start!r} and {end!r}. "
                f"Received: a text of {len(text)} characters without them"
            )
        text = f"{head}{start}\n{table}\n\n{end}{tail}"
    return text


def main(argv):
    """Writes tables and plots."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    text = drawn(README.read_text(), tables())
    temporary = README.with_name(".README.md.partial")
    temporary.write_text(text)
    temporary.replace(README)
    for name, figure in accuracy_report.plots(RESULTS / "accuracy").items():
        figure.savefig(RESULTS / "accuracy" / name, metadata={"Date": None})


if __name__ == "__main__":
    app.run(main)
