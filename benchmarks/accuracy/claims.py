"""What the paper claims, beside what the accuracy sweep gives."""

import dataclasses
import math
from pathlib import Path

from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy.report import shown
from benchmarks.accuracy.rows import LARGE, Trained, paired, rows, settings_of
from benchmarks.common.tables import table

# Points that count as nothing lost: chosen, less than one such accuracy is sure to.
EQUAL = 0.2
TARGET = 0.5
LONGEST = max(sweep.STAGES.values())


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one row is better than another, or not much worse.

    Attributes:
        text: What is claimed.
        ours: The row that is claimed to be good.
        other: What it is measured by.
        margin: The points that it must be ahead by; negative, that it may be behind.
    """

    text: str
    ours: Trained
    other: Trained
    margin: float = 0.0

    def verdict(self, mean: float, half: float) -> str:
        """What an interval of the difference says of it.

        Args:
            mean: Of the difference, in points.
            half: Half width of its interval.
        """
        if math.isnan(half):
            return "one seed"
        if mean - half > self.margin:
            return "yes"
        return "no" if mean + half < self.margin else "not significant"


_PLAIN, _FLOAT = Trained("plain"), Trained(sweep.FLOAT, None)
CLAIMS = (
    *(
        Claim(f"{method} helps, in no more epochs", Trained(method), _PLAIN)
        for method in ("TS", "PQ", "TS+PQ", "SP", "JKD", "TS+PQ+JKD", "SP+JKD")
    ),
    *(
        Claim(
            f"{method} helps, each stage a full training",
            Trained(method, stages=count),
            Trained("plain", stages=count),
        )
        for method, count in sweep.STAGES.items()
    ),
    *(
        Claim(
            f"{method} helps, as long as {LONGEST} full trainings",
            Trained(method, stages=LONGEST),
            Trained("plain", stages=LONGEST),
        )
        for method in sweep.LONG
        if method != sweep.FLOAT
    ),
    Claim(
        f"JKD helps, {LONGEST} full trainings beside {sweep.AS_DEAR} plain ones",
        Trained("JKD", stages=LONGEST),
        Trained("plain", stages=sweep.AS_DEAR),
    ),
    *(
        Claim(
            f"TS+PQ helps after an abrupt start, {length}",
            Trained("TS+PQ, abrupt", stages=count),
            Trained("plain, abrupt", stages=count),
        )
        for length, count in (
            ("in no more epochs", 1),
            ("each stage a full training", sweep.STAGES["TS+PQ"]),
        )
    ),
    *(
        Claim(
            f"SP in one stage reaches {method} with full stages, to {EQUAL}",
            Trained("SP"),
            Trained(method, stages=count),
            -EQUAL,
        )
        for method, count in sweep.STAGES.items()
    ),
    *(
        Claim(
            f"W4A4 loses nothing, to {EQUAL}: {method}",
            Trained(method, (4, 4)),
            _FLOAT,
            -EQUAL,
        )
        for method in sweep.METHODS
    ),
    *(
        Claim(
            f"W2A2 within {TARGET} of float, {length}: {method}",
            Trained(method, stages=count),
            Trained(sweep.FLOAT, None, count),
            -TARGET,
        )
        for length, count in (("as short", 1), ("as long", LONGEST))
        for method in ("plain", "JKD", "LSQ", "LSQ with JKD")
    ),
    *(
        Claim(
            f"ResNet-20: {method} helps, in no more epochs",
            Trained(method, network=LARGE),
            Trained("plain", network=LARGE),
        )
        for method in ("SP", "JKD")
    ),
    Claim(
        f"ResNet-20: W4A4 loses nothing, to {EQUAL}: plain",
        Trained("plain", (4, 4), network=LARGE),
        Trained(sweep.FLOAT, None, network=LARGE),
        -EQUAL,
    ),
    *(
        Claim(
            f"ResNet-20: W2A2 within {TARGET} of float, as short: {method}",
            Trained(method, network=LARGE),
            Trained(sweep.FLOAT, None, network=LARGE),
            -TARGET,
        )
        for method in ("plain", "JKD", "LSQ")
    ),
)


def claims_table(folder: Path) -> str:
    """The claims whose runs are there, in Markdown."""
    found, settings = rows(folder), settings_of(folder)
    lines = []
    for claim in CLAIMS:
        ours, other = (
            found.get(trained.key(settings)) for trained in (claim.ours, claim.other)
        )
        if ours is None or other is None:
            continue
        mean, half = paired(ours.accuracies, other.accuracies)
        if not math.isnan(mean):
            lines.append([claim.text, shown(mean, half), claim.verdict(mean, half)])
    return table(["claim", "difference, points", "holds"], lines)
