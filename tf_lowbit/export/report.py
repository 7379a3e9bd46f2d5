"""What `verify` found, as data."""

import dataclasses
import functools
import math

from tf_lowbit.export import files, report_text

# One-sided 99 %: what few examples leave open is no failure.
SIGMAS = 2.33


@dataclasses.dataclass(frozen=True)
class Decisions:
    """How one integer layer's kernel decides, against what was trained.

    Attributes:
        layer: its name.
        kernel: "xnnpack" or "builtin".
        channels: number of output channels.
        points: decision points that lie within the accumulators' range.
        wrong: off-by-one accumulators, a channel: accumulator values whose output comes
            out one level off; over every accumulator that any input could give.
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
        off_by_one: codes that an off-by-one accumulator made.
    """

    tensor: str
    is_integer: bool
    elements: int = 0
    mismatches: int = 0
    end_to_end: int = 0
    error: float = 0.0
    off_by_one: int = 0


@dataclasses.dataclass
class Agreement:
    """One tensor of the trained network against the twin's, on data.

    "Within" means: each layer of the twin is given the trained network's own inputs,
    put on its grid, so that a layer answers for itself alone.

    Attributes:
        tensor: the name of the trained network's layer that puts it out.
        levels: of the twin's grid; 0 for floats.
        is_measured: whether the grid is 8 bits over a range that was measured on data.
        explained: whether a note says that it, or what it reads, is rounded.
        coarseness: of a sum, the steps of its terms together, in levels of its grid.
        elements: how many were compared.
        equal: codes that are the trained network's, from the input on.
        near: codes that are at most one level away, from the input on.
        equal_within: as `equal`, within the layer.
        far_within: codes that are farther away than rounding explains, within it.
        shift: the sum of the differences in levels, within it.
        clipped: values of the trained network beyond the grid's ends, by more than
            1/16 of its levels and one.
        span: (least, greatest) value of the trained network, in levels.
        error: of floats, the largest difference relative to the largest magnitude, from
            the input on.
        error_within: likewise within the layer.
    """

    tensor: str
    levels: int
    is_measured: bool = False
    explained: bool = False
    coarseness: float = 0.0
    elements: int = 0
    equal: int = 0
    near: int = 0
    equal_within: int = 0
    far_within: int = 0
    shift: float = 0.0
    clipped: int = 0
    span: tuple[float, float] = (math.inf, -math.inf)
    error: float = 0.0
    error_within: float = 0.0


@dataclasses.dataclass
class Predictions:
    """Predicted classes on data, of the first output: `tf_lowbit.predictions`.

    Attributes:
        examples: how many; of a map of classes, one for each position.
        twin_agrees: of the file's predictions, how many are the twin's.
        trained_agrees: likewise the trained model's; None where there is none.
        labels: how many of them had a label that is a class.
        right: right predictions of "file", "twin" and "trained".
        lost: predictions that the trained model has right and the file has wrong.
        gained: the other way round.
        mean_iou: of maps: mean intersection over union of the classes that occur, of
            "file", "twin" and "trained".
    """

    examples: int = 0
    twin_agrees: int = 0
    trained_agrees: int | None = None
    labels: int = 0
    right: dict[str, int] = dataclasses.field(default_factory=dict)
    lost: int = 0
    gained: int = 0
    mean_iou: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def drop(self) -> float | None:
        """Accuracy of the trained model minus that of the file; None if unknown."""
        if not self.labels or "trained" not in self.right:
            return None
        return (self.right["trained"] - self.right["file"]) / self.labels

    @property
    def certain_drop(self) -> float:
        """`drop`, less what chance could be: by McNemar's standard error."""
        noise = SIGMAS * math.sqrt(self.lost + self.gained)
        return (self.lost - self.gained - noise) / max(self.labels, 1)


@dataclasses.dataclass
class Errors:
    """Absolute differences of numbers, in the output's units.

    Attributes:
        count: how many.
        total: their sum.
        largest: the largest.
    """

    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    @property
    def mean(self) -> float:
        """The mean."""
        return self.total / max(self.count, 1)


@dataclasses.dataclass
class Values:
    """The first output on data, where it is no score of classes.

    Attributes:
        examples: how many.
        spread: standard deviation of the trained model's output, or of the twin's where
            there is no trained model.
        against: of the file: differences from "twin", "trained".
        to_labels: differences from the labels, of "file", "twin", "trained".
        more: mean error of the file minus that of the trained model.
        certain_more: `more`, less what chance could be: one-sided 99 %.
    """

    examples: int = 0
    spread: float = 0.0
    against: dict[str, Errors] = dataclasses.field(default_factory=dict)
    to_labels: dict[str, Errors] = dataclasses.field(default_factory=dict)
    more: float | None = None
    certain_more: float = 0.0


@dataclasses.dataclass
class Report:
    """What `verify` found.

    Attributes:
        file: the file.
        runtime: what ran it, with its version.
        content: the file's bytes.
        tolerance: how much accuracy the file may lose.
        agreement: the share of the trained model's predictions that it must keep.
        failures: what is wrong, a line each.
        operators: how often the file has which operator.
        not_delegated: operators that no delegate runs.
        decisions: of each integer layer and kernel.
        additions: wrong pairs of codes, of all, by Add and kernel.
        comparisons: of each tensor, file against twin, on data.
        agreements: of each tensor, twin against trained model, on data; empty without a
            trained model.
        is_tuned: whether the twin was trained further since it was made of the model.
        predictions: on data; None without data, or where outputs are no classes.
        values: on data, where outputs are no classes.
        notes: layers that are not exactly what was trained.
        arena: bytes of TFLite Micro's arena on this machine; None for other targets.
        widths: bits of an index, by packed tensor.
    """

    file: str
    runtime: str
    content: bytes = dataclasses.field(repr=False, default=b"")
    tolerance: float = 0.0
    agreement: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)
    operators: dict[str, int] = dataclasses.field(default_factory=dict)
    not_delegated: list[str] = dataclasses.field(default_factory=list)
    decisions: list[Decisions] = dataclasses.field(default_factory=list)
    additions: dict[str, int] = dataclasses.field(default_factory=dict)
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    agreements: list[Agreement] = dataclasses.field(default_factory=list)
    is_tuned: bool = False
    predictions: Predictions | None = None
    values: Values | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    arena: int | None = None
    widths: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: equal to the twin, and within the tolerances."""
        return not self.failures

    @property
    def is_measured(self) -> bool:
        """Whether the file was compared with the trained model on data."""
        if self.predictions is not None:
            return self.predictions.trained_agrees is not None
        return self.values is not None and "trained" in self.values.against

    @property
    def is_exact(self) -> bool:
        """Whether the file may be called exactly what was trained, as far as is seen.

        No note, no off-by-one accumulator, a twin that is as it was made, and on the
        data all predictions, or numbers to 1e-4 of their spread, the trained model's.
        """
        if not (self.ok and self.is_measured) or self.notes or self.is_tuned:
            return False
        if self.off_by_one:
            return False
        if self.predictions is not None:
            return self.predictions.trained_agrees == self.predictions.examples
        return self.values.against["trained"].largest <= 1e-4 * self.values.spread

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.content)

    @functools.cached_property
    def gzip_size(self) -> int:
        """Bytes of the file behind `gzip -9`; computed when it is asked for."""
        return files.gzip_bytes(self.content)

    @property
    def off_by_one(self) -> int:
        """Accumulator values, of all possible ones, that come out one level off."""
        return sum(sum(d.wrong) for d in self.decisions)

    @property
    def off_by_one_met(self) -> int:
        """Codes on data that an off-by-one accumulator made."""
        return sum(c.off_by_one for c in self.comparisons)

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
        """The same as JSON-ready data, without the file's bytes."""
        data = dataclasses.asdict(dataclasses.replace(self, content=b""))
        del data["content"]
        for entry in data["decisions"]:
            entry["wrong_channels"] = sum(w > 0 for w in entry["wrong"])
            entry["wrong"] = sum(entry["wrong"])
        return {
            "ok": self.ok,
            "is_exact": self.is_exact,
            "size": self.size,
            "off_by_one": self.off_by_one,
            "off_by_one_met": self.off_by_one_met,
            **data,
        }

    def __str__(self):
        return report_text.text(self)
