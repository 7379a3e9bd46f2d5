"""What `verify` found, and how it is shown."""

import collections
import dataclasses
import io

import rich.console
import rich.markup
import rich.table


@dataclasses.dataclass(frozen=True)
class Decisions:
    """How one integer layer's kernel decides, against what was trained.

    Attributes:
        layer: its name.
        kernel: "xnnpack" or "builtin".
        channels: number of output channels.
        points: decision points that lie within the accumulators' range.
        wrong: accumulators decided wrongly, a channel; over every accumulator that any
            input could give.
    """

    layer: str
    kernel: str
    channels: int
    points: int
    wrong: tuple[int, ...]


@dataclasses.dataclass
class Comparison:
    """One tensor of the file against the twin, on data.

    Attributes:
        tensor: its name.
        is_integer: whether it holds codes.
        elements: how many were compared.
        mismatches: codes that the twin's layer, given the file's own inputs of that
            layer, computes otherwise. 0 means that the layer is the twin's.
        end_to_end: codes that differ where the twin computes from its own input on.
        error: of floats: the largest difference in `mismatches`' sense, relative to the
            largest magnitude in the tensor.
    """

    tensor: str
    is_integer: bool
    elements: int = 0
    mismatches: int = 0
    end_to_end: int = 0
    error: float = 0.0


@dataclasses.dataclass
class Predictions:
    """Predicted classes on data, of the first output: `tf_lowbit.predictions`.

    Attributes:
        examples: how many; of a map of classes, one for each position.
        twin_agrees: of the file's predictions, how many are the twin's.
        trained_agrees: likewise the trained model's; None where there is none.
        labels: how many of them had a label that is a class.
        right: right predictions of "file", "twin" and "trained".
    """

    examples: int = 0
    twin_agrees: int = 0
    trained_agrees: int | None = None
    labels: int = 0
    right: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Report:
    """What `verify` found.

    Attributes:
        file: the file.
        runtime: what ran it.
        size: bytes.
        gzip_size: bytes behind `gzip -9`.
        failures: promises that the file breaks, a line each; empty is a proof.
        operators: how often the file has which operator.
        not_delegated: operators that no delegate runs.
        decisions: of each integer layer and kernel.
        additions: wrong pairs of codes, of all, by Add and kernel.
        comparisons: of each tensor, on data.
        predictions: on data; None without data.
        notes: layers that are not exactly what was trained.
        arena: bytes of TFLite Micro's arena on this machine; None for other targets.
        widths: bits of an index, by packed tensor.
    """

    file: str
    runtime: str
    size: int
    gzip_size: int
    failures: list[str] = dataclasses.field(default_factory=list)
    operators: dict[str, int] = dataclasses.field(default_factory=dict)
    not_delegated: list[str] = dataclasses.field(default_factory=list)
    decisions: list[Decisions] = dataclasses.field(default_factory=list)
    additions: dict[str, int] = dataclasses.field(default_factory=dict)
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    predictions: Predictions | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    arena: int | None = None
    widths: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every promise is kept."""
        return not self.failures

    @property
    def codes(self) -> int:
        """How many codes were compared on data."""
        return sum(c.elements for c in self.comparisons if c.is_integer)

    @property
    def mismatches(self) -> int:
        """Codes that a layer of the file computes otherwise than the twin's."""
        return sum(c.mismatches for c in self.comparisons if c.is_integer)

    @property
    def end_to_end(self) -> int:
        """Codes that differ where file and twin each compute from the input on."""
        return sum(c.end_to_end for c in self.comparisons if c.is_integer)

    def as_dict(self) -> dict:
        """The same as JSON-ready data."""
        data = dataclasses.asdict(self)
        for entry in data["decisions"]:
            entry["wrong_channels"] = sum(w > 0 for w in entry["wrong"])
            entry["wrong"] = sum(entry["wrong"])
        return {"ok": self.ok, **data}

    def __str__(self):
        text = io.StringIO()
        rich.console.Console(file=text, width=80).print(_table(self))
        lines = [text.getvalue().rstrip()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"FAILED: {failure}" for failure in self.failures]
        lines.append("Every promise is kept." if self.ok else "Not proved.")
        return "\n".join(lines)


def _table(report) -> rich.table.Table:
    table = rich.table.Table(
        title=rich.markup.escape(f"Verification of {report.file}"), show_header=False
    )
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    operators = ", ".join(f"{n} {name}" for name, n in sorted(report.operators.items()))
    outside = ", ".join(report.not_delegated) or "none"
    wrong = sum(sum(d.wrong) for d in report.decisions)
    channels = sum(sum(w > 0 for w in d.wrong) for d in report.decisions)
    points = sum(d.points for d in report.decisions)
    all_channels = sum(d.channels for d in report.decisions)
    table.add_row("size", f"{report.size:,} bytes, {report.gzip_size:,} gzipped")
    table.add_row("operators", operators)
    table.add_row("not delegated", f"{outside} (run by {report.runtime})")
    if report.arena is not None:
        table.add_row("arena", f"{report.arena:,} bytes on this machine")
    if report.widths:
        counts = collections.Counter(sorted(report.widths.values()))
        packed = ", ".join(f"{n} at {bits} bits" for bits, n in counts.items())
        table.add_row("packed tensors", packed)
    table.add_row(
        "wrong decisions",
        f"{wrong:,} accumulators of all possible ones, in {channels} of {all_channels} "
        f"channels with {points:,} decision points",
    )
    for decisions in report.decisions:
        if any(decisions.wrong):
            table.add_row(
                f"  {decisions.layer}",
                f"{sum(decisions.wrong):,} in {sum(w > 0 for w in decisions.wrong)} of "
                f"{decisions.channels} channels ({decisions.kernel})",
            )
    if report.additions:
        table.add_row(
            "wrong sums",
            f"{sum(report.additions.values()):,} of {len(report.additions)} x 65,536 "
            "pairs",
        )
    if report.predictions is not None:
        found = report.predictions
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
        table.add_row(
            "predictions", f"{found.twin_agrees:,} of {found.examples:,} are the twin's"
        )
        if found.trained_agrees is not None:
            table.add_row(
                "",
                f"{found.trained_agrees:,} of {found.examples:,} are the trained "
                "model's",
            )
        for name, right in found.right.items():
            table.add_row(
                f"accuracy of the {name}{' model' if name == 'trained' else ''}",
                f"{100 * right / found.labels:.2f} % of {found.labels:,}",
            )
    return table
