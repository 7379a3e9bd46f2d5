"""What the files of the accuracy sweep say, by row, and the statistics of rows."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.stats

from benchmarks.accuracy import plan as sweep
from benchmarks.common import store

CONFIDENCE = 0.95
BITS = ((4, 4), (3, 3), (2, 2), (1, 2))
SMALL, LARGE = "preact_resnet8", "preact_resnet20"


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs of one method that differ in their seed only.

    Attributes:
        accuracies: Final test accuracy in percent, by seed.
        recalibrated: The same with batch normalisation measured anew after the
            training, by seed, of the low-bit runs that tell it.
        cpu_seconds: Of the training, by seed.
        processors: That it ran on, by seed.
        weight_bytes: Of the network at its final bits; where bits are chosen for each
            seed, of the largest.
        bops: Likewise.
    """

    accuracies: dict[int, float]
    recalibrated: dict[int, float]
    cpu_seconds: dict[int, float]
    processors: dict[int, tuple]
    weight_bytes: int
    bops: int

    @property
    def mean(self) -> float:
        """Mean accuracy in percent."""
        return float(np.mean(list(self.accuracies.values())))

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN with one seed."""
        return standard_error(list(self.accuracies.values()))


def standard_error(values: list[float]) -> float:
    """Of the mean: the sample's deviation over the root of its size."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def mean_interval(values: list[float]) -> tuple[float, float]:
    """The mean, and the half width of its 95 % interval after Student's t.

    The half width of one value is NaN.
    """
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, max(1, len(values) - 1))
    return float(np.mean(values)), float(quantile * standard_error(values))


def paired(values: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """Difference of two rows' accuracies, seed by seed.

    Args:
        values: Minuend, by seed.
        other: Subtrahend.

    Returns:
        Mean difference, and the half width of its 95 % confidence interval after
        Student's t over the seeds that both have; NaN where there are none, or for the
        half width, one.
    """
    seeds = sorted(set(values) & set(other))
    if not seeds:
        return math.nan, math.nan
    return mean_interval([values[seed] - other[seed] for seed in seeds])


def cost_ratio(row: Row, other: Row) -> float:
    """CPU time of the training relative to another row's, the median over seeds.

    Of those seeds that ran on the same kind of processor; NaN where there are none.
    """
    seeds = [
        seed
        for seed, processor in row.processors.items()
        if other.processors.get(seed) == processor
    ]
    if not seeds:
        return math.nan
    return float(np.median([row.cpu_seconds[s] / other.cpu_seconds[s] for s in seeds]))


def _processor(machine: dict) -> tuple:
    """What the time of a training depends on: not the system's version."""
    return machine["processor"], machine["cpus"], *machine["instructions"]


def read_alike(folder: Path) -> Iterator[tuple[str, dict]]:
    """Yields the runs' names, sorted, with what they gave.

    Args:
        folder: Of the results.

    Raises:
        ValueError: If their settings differ.
    """
    settings = None
    for name, run in sorted(store.read(sweep.results_file(folder)).items()):
        if settings not in (None, run["settings"]):
            raise ValueError(
                "The runs of a table must have the same settings. Received: "
                f"{name!r} with {run['settings']}, others with {settings}"
            )
        settings = run["settings"]
        yield name, run


@dataclasses.dataclass(frozen=True)
class Trained:
    """Which row is meant.

    Attributes:
        method: A key of `sweep.METHODS`, `sweep.ABLATIONS` or `sweep.STARTS`, or
            `sweep.FLOAT`.
        bits: None for a float network.
        stages: How many times the sweep's epochs it takes.
        network: The model's name.
    """

    method: str
    bits: tuple[int, int] | None = (2, 2)
    stages: int = 1
    network: str = SMALL

    def key(self, settings: sweep.Settings) -> tuple:
        """Of its row."""
        purpose = "equal" if self.stages == 1 else "per_stage"
        if self.method in sweep.ABLATIONS and self.stages == 1:
            purpose = "ablation"
        if self.method in sweep.STARTS:
            purpose = "start"
        epochs = self.stages * settings.epochs
        return purpose, self.network, self.method, self.bits, epochs


def rows(folder: Path) -> dict[tuple, Row]:
    """All reported runs, by (purpose, network, method, bits, epochs).

    Those at several rates are left out.

    Raises:
        ValueError: If runs of other settings are among them, or one diverged.
    """
    found: dict[tuple, list[dict]] = {}
    for name, run in read_alike(folder):
        if run["measured_on"] != "test" or run["purpose"] == "rates":
            continue
        if run["accuracy"] is None:
            raise ValueError(
                f"A reported run must not diverge. Received: {name!r}, "
                f"{run['diverged']}"
            )
        bits = run["bits"] and tuple(run["bits"])
        key = (run["purpose"], run["network"], run["method"], bits, run["epochs"])
        found.setdefault(key, []).append(run)
    return {
        key: Row(
            {run["seed"]: 100 * run["accuracy"] for run in runs},
            {
                run["seed"]: 100 * run["recalibrated_accuracy"]
                for run in runs
                if run.get("recalibrated_accuracy") is not None
            },
            {run["seed"]: run["cpu_seconds"] for run in runs},
            {run["seed"]: _processor(run["machine"]) for run in runs},
            max(run["weight_bytes"] for run in runs),
            max(run["bops"] for run in runs),
        )
        for key, runs in found.items()
    }


def settings_of(folder: Path) -> sweep.Settings:
    """The settings that the runs of a sweep were made with."""
    _, run = next(read_alike(folder))
    found = run["settings"]
    lists = {name: tuple(v) for name, v in found.items() if isinstance(v, list)}
    return sweep.Settings(**{**found, **lists})


def label(bits) -> str:
    """Bits as they are written in the field; "float" for none."""
    return "float" if bits is None else f"W{bits[0]}A{bits[1]}"
