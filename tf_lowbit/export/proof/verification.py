"""The result of `verify` as data."""

import dataclasses
import functools
import math

from tf_lowbit.export import file_bytes
from tf_lowbit.export.proof import text

# One-sided 99 % confidence: a difference that chance explains is not a failure.
SIGMAS = 2.33


@dataclasses.dataclass(frozen=True)
class Decisions:
    """Rounding decisions of one integer layer's kernel, against the trained layer.

    Attributes:
        layer: The layer's name.
        kernel: "xnnpack", "builtin" or "tflm".
        channels: Number of output channels.
        points: Number of decision points within the accumulators' range.
        wrong: Per channel, the number of off-by-one accumulators: values, of all that
            any input could give, whose output is one level away from the right one.
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
        tensor: The tensor's name.
        is_integer: Whether it holds codes, or the classes of an argmax.
        elements: Number of compared elements.
        mismatches: Number of codes that differ from the twin's layer, given the file's
            inputs of that layer.
        end_to_end: Number of codes that differ from the twin, given the same inputs of
            the network.
        error: For floats, the largest difference from the twin's layer, given the
            file's inputs of that layer, relative to the tensor's largest magnitude.
        off_by_one: Number of codes from off-by-one accumulators.
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

    "End to end" compares the networks from the same inputs of the network. "Within the
    layer" gives the twin's layer the trained network's inputs of that layer, rounded to
    the grid, so that errors of earlier layers do not count.

    Attributes:
        tensor: Name of the trained network's layer that outputs it.
        levels: Number of levels of the twin's grid, or of classes; 0 for floats.
        is_measured: Whether the grid has 8 bits over a range measured on data.
        measured_levels: Levels from zero to the larger end of that range, twice as many
            for a signed grid; 0 without such a range, or if it held zeros only.
        explained: Whether a note says that it, or its input, is rounded.
        coarseness: For a sum, the total of its terms' steps, in levels of its grid.
        elements: Number of compared elements.
        equal: Number of codes equal to the trained network's, end to end.
        near: Number of codes at most one level away, end to end.
        equal_within: As `equal`, within the layer; or as near as a tie of the trained
            network, or a step of the integer bias, allows.
        far_within: Number of codes farther away than rounding explains, within the
            layer.
        shift: Sum of the differences in levels, within the layer.
        clipped: Number of the trained network's values that are outside of the grid by
            more than 1/16 of its levels plus one level.
        span: (minimum, maximum) of zero and the trained network's values, in levels.
        error: For floats, the largest difference relative to the largest magnitude,
            end to end.
        error_within: The same within the layer.
    """

    tensor: str
    levels: int
    is_measured: bool = False
    measured_levels: float = 0.0
    explained: bool = False
    coarseness: float = 0.0
    elements: int = 0
    equal: int = 0
    near: int = 0
    equal_within: int = 0
    far_within: int = 0
    shift: float = 0.0
    clipped: int = 0
    span: tuple[float, float] = (0.0, 0.0)
    error: float = 0.0
    error_within: float = 0.0


@dataclasses.dataclass
class Predictions:
    """Predicted classes of the first output on data: `tf_lowbit.predictions`.

    Attributes:
        examples: Number of predictions; a map of classes has one for each position.
        twin_agrees: Number of the file's predictions that equal the twin's. Scores of
            the twin that only float32's rounding tells apart are a tie.
        trained_agrees: Number that equal the trained model's, or None without one.
        labels: Number of predictions with a label that is a class.
        right: Number of right predictions of "file", "twin" and "trained".
        lost: Number that only the trained model predicts right.
        gained: Number that only the file predicts right.
        mean_iou: For maps of classes, mean intersection over union of the classes that
            occur, for "file", "twin" and "trained".
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
        """Accuracy of the trained model minus accuracy of the file; None if unknown."""
        if not self.labels or "trained" not in self.right:
            return None
        return (self.right["trained"] - self.right["file"]) / self.labels

    @property
    def certain_drop(self) -> float:
        """Lower confidence bound of `drop`, by McNemar's standard error."""
        noise = SIGMAS * math.sqrt(self.lost + self.gained)
        return (self.lost - self.gained - noise) / max(self.labels, 1)


@dataclasses.dataclass
class Errors:
    """Absolute differences of numbers, in the output's units.

    Attributes:
        count: Number of differences.
        total: Their sum.
        largest: The largest one.
    """

    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    @property
    def mean(self) -> float:
        """The mean difference."""
        return self.total / max(self.count, 1)


@dataclasses.dataclass
class Values:
    """An output on data, if it is not the first one with scores of classes.

    Attributes:
        examples: Number of examples.
        spread: Standard deviation of the output of the trained model, or of the twin
            without a trained model.
        against: Differences of the file from "twin" and "trained".
        to_labels: Differences of "file", "twin" and "trained" from the labels.
        worst_unit: Index on the output's last axis of the unit that differs most from
            the trained model's, relative to its own standard deviation.
        worst_share: The mean difference of that unit, in its standard deviations.
        more: Mean error of the file minus mean error of the trained model.
        certain_more: Lower bound of `more` at one-sided 99 % confidence.
    """

    examples: int = 0
    spread: float = 0.0
    against: dict[str, Errors] = dataclasses.field(default_factory=dict)
    to_labels: dict[str, Errors] = dataclasses.field(default_factory=dict)
    worst_unit: int = 0
    worst_share: float = 0.0
    more: float | None = None
    certain_more: float = 0.0


@dataclasses.dataclass
class Report:
    """The result of `verify`.

    Attributes:
        file: Path of the file, or "bytes".
        runtime: Interpreter that ran it, with its version.
        content: The file's bytes.
        tolerance: Accuracy that the file may lose.
        agreement: Share of the trained model's predictions that it must keep.
        failures: The failures, a line each.
        operators: Operator -> number of its uses in the file.
        not_delegated: Operators that no delegate runs.
        decisions: Rounding decisions, for each integer layer and kernel.
        additions: Add and kernel -> number of pairs of codes with a wrong sum.
        comparisons: File against twin on data, for each tensor.
        agreements: Twin against trained model on data, for each tensor; empty without a
            trained model.
        is_tuned: Whether the twin was fine-tuned after it was made from the model.
        predictions: Predictions on data; None without data, or if outputs are not
            classes.
        values: The first output on data if it does not hold classes, or None.
        further: Output's name -> values on data, for the outputs after the first.
        notes: Layers that differ from the trained ones.
        arena: Bytes of TFLite Micro's arena on this machine; None for other targets.
        widths: Packed tensor -> bits of an index.
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
    further: dict[str, Values] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    arena: int | None = None
    widths: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the file equals the twin and is within the tolerances."""
        return not self.failures

    @property
    def is_measured(self) -> bool:
        """Whether the file was compared with the trained model on data."""
        if self.predictions is not None:
            return self.predictions.trained_agrees is not None
        return self.values is not None and "trained" in self.values.against

    @property
    def is_exact(self) -> bool:
        """Whether no difference from the trained model was found.

        That is: no note, no off-by-one accumulator, no fine-tuning of the twin, and on
        the data all predictions, or numbers to 1e-4 of their spread, are the trained
        model's.
        """
        if not (self.ok and self.is_measured) or self.notes or self.is_tuned:
            return False
        found = self.predictions
        is_other = found is not None and found.trained_agrees != found.examples
        if self.off_by_one or is_other:
            return False
        measured = [*self.further.values(), *([self.values] if self.values else [])]
        return all(v.against["trained"].largest <= 1e-4 * v.spread for v in measured)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.content)

    @functools.cached_property
    def gzip_size(self) -> int:
        """Bytes of the file after `gzip -9`, computed on first use."""
        return file_bytes.gzip_bytes(self.content)

    @property
    def off_by_one(self) -> int:
        """Number of possible accumulators whose output is one level off."""
        return sum(sum(d.wrong) for d in self.decisions)

    @property
    def off_by_one_met(self) -> int:
        """Number of codes on data that come from an off-by-one accumulator."""
        return sum(c.off_by_one for c in self.comparisons)

    @property
    def codes(self) -> int:
        """Number of codes compared on data."""
        return sum(c.elements for c in self.comparisons if c.is_integer)

    @property
    def mismatches(self) -> int:
        """Number of codes that a layer computes otherwise than the twin's layer."""
        return sum(c.mismatches for c in self.comparisons if c.is_integer)

    @property
    def end_to_end(self) -> int:
        """Number of codes that differ between file and twin, given the same input."""
        return sum(c.end_to_end for c in self.comparisons if c.is_integer)

    def as_dict(self) -> dict:
        """The report as JSON-ready data, without the file's bytes."""
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
        return text.text(self)

    def _repr_html_(self):
        return text.html(self)
