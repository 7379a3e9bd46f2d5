"""A verification report as text and HTML."""

import collections
from typing import Any

import rich.console
import rich.markup
import rich.table
import rich.text

from tf_lowbit.core import tables

_WIDTH = 80

# Share of equal codes below which a tensor is reported as the first that diverges.
_EQUAL = 0.99
_NETWORKS = {"file": "file", "twin": "twin", "trained": "trained model"}


def text(report: Any) -> str:
    """The `Report` of `verify` as a table and a verdict."""
    return "\n".join([tables.as_text(_table(report), _WIDTH), *_lines(report)])


def html(report: Any) -> str:
    """The `Report` of `verify` for a notebook."""
    lines = map(rich.text.Text, _lines(report))
    return tables.as_html(rich.console.Group(_table(report), *lines), _WIDTH)


def _lines(report) -> list[str]:
    notes = [f"note: {note}" for note in report.notes]
    failures = [f"FAILED: {failure}" for failure in report.failures]
    return [*notes, *failures, *_verdict(report)]


def _verdict(report) -> list[str]:
    if not report.ok:
        return ["Not proved."]
    if report.is_exact:
        return [
            "The file is proved equal to its integer model (twin), and agrees exactly "
            "with the trained model on the data."
        ]
    lines = ["The file is proved equal to its integer model (twin)."]
    if report.predictions is None and report.values is None:
        lines = [
            "The file is that of its integer model (twin); it was not run on data."
        ]
    if not report.is_measured:
        lines.append("Agreement with the trained model was not measured.")
    return lines


def _table(report) -> rich.table.Table:
    table = rich.table.Table(
        title=rich.markup.escape(f"Verification of {report.file}"), show_header=False
    )
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    _add_result(table, report)
    _add_agreements(table, report)
    operators = ", ".join(f"{n} {name}" for name, n in sorted(report.operators.items()))
    outside = ", ".join(report.not_delegated) or "none"
    table.add_row("size", f"{report.size:,} bytes")
    table.add_row("operators", operators)
    table.add_row("not delegated", f"{outside} (run by {report.runtime})")
    if report.arena is not None:
        table.add_row("arena", f"{report.arena:,} bytes on this machine")
    if report.widths:
        counts = collections.Counter(sorted(report.widths.values()))
        packed = ", ".join(f"{n} at {bits} bits" for bits, n in counts.items())
        table.add_row("packed tensors", packed)
    _add_decisions(table, report)
    if report.additions:
        table.add_row(
            "wrong sums",
            f"{sum(report.additions.values()):,} of {len(report.additions)} x 65,536 "
            "pairs",
        )
    if report.comparisons:
        floats = [c.error for c in report.comparisons if not c.is_integer]
        table.add_row(
            "codes against twin",
            f"{report.mismatches:,} of {report.codes:,} differ layer by layer, "
            f"{report.end_to_end:,} from the input on",
        )
        table.add_row(
            "floats against twin",
            f"largest relative error {max(floats, default=0):.1e}",
        )
    return table


def _add_result(table, report) -> None:
    if report.predictions is not None:
        _add_predictions(table, report, report.predictions)
    if report.values is not None:
        _add_values(table, report.values)
    for name, values in report.further.items():
        table.add_row(f"output {rich.markup.escape(name)}", "")
        _add_values(table, values)


def _add_predictions(table, report, found) -> None:
    for name, right in found.right.items():
        iou = ""
        if name in found.mean_iou:
            iou = f", mean IoU {100 * found.mean_iou[name]:.2f} %"
        table.add_row(
            f"accuracy of the {_NETWORKS[name]}",
            f"{100 * right / found.labels:.2f} % of {found.labels:,}{iou}",
        )
    if found.drop is not None:
        table.add_row(
            "lost to the trained",
            f"{100 * found.drop:+.2f} points ({found.lost:,} lost, {found.gained:,} "
            f"gained); allowed {100 * report.tolerance:g} and chance",
        )
    table.add_row(
        "predictions", f"{found.twin_agrees:,} of {found.examples:,} are the twin's"
    )
    if found.trained_agrees is not None:
        table.add_row(
            "",
            f"{found.trained_agrees:,} of {found.examples:,} are the trained model's",
        )


def _add_values(table, found) -> None:
    for name, errors in found.to_labels.items():
        table.add_row(
            f"error of the {_NETWORKS[name]}",
            f"mean {errors.mean:.4g}, largest {errors.largest:.4g}",
        )
    for name, errors in found.against.items():
        table.add_row(
            f"file against {_NETWORKS[name]}",
            f"mean {errors.mean:.4g}, largest {errors.largest:.4g}; outputs spread "
            f"by {found.spread:.4g}",
        )
    if found.worst_share:
        table.add_row(
            "  worst unit",
            f"{found.worst_unit}: mean {found.worst_share:.1%} of its own standard "
            "deviation",
        )


def _add_agreements(table, report) -> None:
    # Only tensors trained in codes: 8-bit roundings of floats differ more, but matter
    # less.
    rows = [row for row in report.agreements if row.levels and not row.is_measured]
    if not rows:
        return
    equal, near = sum(r.equal for r in rows), sum(r.near for r in rows)
    total = sum(r.elements for r in rows)
    table.add_row(
        "codes against trained",
        f"{100 * equal / total:.2f} % equal, {100 * near / total:.2f} % within one "
        f"level, of {total:,}",
    )
    first = next((r for r in rows if r.equal < _EQUAL * r.elements), None)
    if first is not None:
        table.add_row(
            f"  first below {100 * _EQUAL:g} %",
            f"{first.tensor}: {100 * first.equal / first.elements:.2f} % equal, "
            f"{100 * first.near / first.elements:.2f} % within one level",
        )
    if report.is_tuned:
        table.add_row("", "the twin was fine-tuned")


def _add_decisions(table, report) -> None:
    channels = sum(sum(w > 0 for w in d.wrong) for d in report.decisions)
    points = sum(d.points for d in report.decisions)
    all_channels = sum(d.channels for d in report.decisions)
    met = ""
    if report.comparisons and report.off_by_one:
        met = f"; met for {report.off_by_one_met:,} of {report.codes:,} codes on data"
    table.add_row(
        "off-by-one accumulators",
        f"{report.off_by_one:,} of all possible ones, in {channels} of {all_channels} "
        f"channels with {points:,} decision points{met}",
    )
    for decisions in report.decisions:
        if any(decisions.wrong):
            table.add_row(
                f"  {decisions.layer}",
                f"{sum(decisions.wrong):,} in {sum(w > 0 for w in decisions.wrong)} of "
                f"{decisions.channels} channels ({decisions.kernel})",
            )
