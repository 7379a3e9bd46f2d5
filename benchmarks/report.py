"""Draws tables of both READMEs and of docs/, and plots, from committed results.

  python -m benchmarks.report

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Nothing is trained or
measured, and TensorFlow is not needed.
"""

from pathlib import Path

from absl import app

from benchmarks.accuracy import claims as accuracy_claims
from benchmarks.accuracy import plots as accuracy_plots
from benchmarks.accuracy import report as accuracy_report
from benchmarks.applications import plan as applications_plan
from benchmarks.cifar import report as cifar_report
from benchmarks.cost import report as costs_report
from benchmarks.deployment import report as deployment_report
from benchmarks.peers import report as peers_report

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"
FRONT = FOLDER.parent / "README.md"
SUPPORTED = FOLDER.parent / "docs" / "supported_models.md"
CHOOSING = FOLDER.parent / "docs" / "how_to" / "choosing.md"
MICRO = FOLDER.parent / "docs" / "how_to" / "microcontroller.md"


def texts(results: Path = RESULTS) -> dict[Path, dict[str, str]]:
    """The texts with tables, and their tables in Markdown, by name.

    Args:
        results: The folder of all results.
    """
    applications = applications_plan.table(results / "applications.jsonl")

    return {
        README: tables(results),
        FRONT: {
            "cifar, in short": cifar_report.short_table(
                results / "cifar.jsonl", results / "tiny.json"
            )
        },
        CHOOSING: {
            "accuracy, in short": accuracy_report.short_table(results / "accuracy")
        },
        SUPPORTED: {"applications": applications},
        MICRO: {"tiny": deployment_report.tiny_table(results / "tiny.json")},
    }


def tables(results: Path = RESULTS) -> dict[str, str]:
    """The tables of benchmarks/README.md.

    Args:
        results: The folder of all results.
    """
    accuracy = accuracy_report.tables(results / "accuracy")
    peers = peers_report.tables(results / "peers")
    return {
        **{f"accuracy, {name}": table for name, table in accuracy.items()},
        "accuracy, repeats": accuracy_report.repeats_table(
            results / "accuracy", results / "accuracy_repeats"
        ),
        "accuracy, LSQ's start": accuracy_report.lsq_start_table(
            results / "accuracy" / "lsq_start.json"
        ),
        "accuracy, claims": accuracy_claims.claims_table(results / "accuracy"),
        **{f"peers, {name}": table for name, table in peers.items()},
        **cifar_report.tables(results / "cifar.jsonl"),
        **costs_report.tables(results),
        **deployment_report.tables(results),
    }


def drawn(text: str, made: dict[str, str]) -> str:
    """A Markdown text with each table between its marks.

    Args:
        text: With the marks of all tables.
        made: The tables by name.

    Raises:
        ValueError: If a table's marks are missing.
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
    for path, made in texts().items():
        text = drawn(path.read_text(), made)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(text)
        temporary.replace(path)
    for name, figure in accuracy_plots.plots(RESULTS / "accuracy").items():
        figure.savefig(RESULTS / "accuracy" / name, metadata={"Date": None})
    cifar = RESULTS / "cifar.jsonl", RESULTS / "step_cost-onednn-1.json"
    for name, figure in cifar_report.plots(*cifar).items():
        figure.savefig(RESULTS / name, metadata={"Date": None})


if __name__ == "__main__":
    app.run(main)
