"""Tables and plots of the accuracy sweep, drawn from its files alone."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import scipy.stats
import sweep
import tabulate

CONFIDENCE = 0.95
BITS = ((4, 4), (3, 3), (2, 2), (1, 2))
SMALL, LARGE = "preact_resnet8", "preact_resnet20"
_NOTHING = "—"


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs of one method that differ in their seed only.

    Attributes:
        accuracies: final test accuracy in percent, by seed.
        recalibrated: the same with batch normalisation measured anew after the
            training, by seed, of the low-bit runs that tell it.
        cpu_seconds: of the training, by seed.
        weight_bytes: of the network at its final bits.
        bops: likewise.
    """

    accuracies: dict[int, float]
    recalibrated: dict[int, float]
    cpu_seconds: dict[int, float]
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


def paired(values: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """Difference of two rows' accuracies, seed by seed.

    Args:
        values: minuend, by seed.
        other: subtrahend.

    Returns:
        Mean difference, and the half width of its 95 % confidence interval after
        Student's t over the seeds that both have; NaN where there are none, or for the
        half width, one.
    """
    seeds = sorted(set(values) & set(other))
    if not seeds:
        return math.nan, math.nan
    differences = [values[seed] - other[seed] for seed in seeds]
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)
    return float(np.mean(differences)), float(quantile * standard_error(differences))


def cost_ratio(row: Row, other: Row) -> float:
    """CPU time of the training relative to another row's, the median over seeds."""
    seeds = sorted(set(row.cpu_seconds) & set(other.cpu_seconds))
    if not seeds:
        return math.nan
    return float(np.median([row.cpu_seconds[s] / other.cpu_seconds[s] for s in seeds]))


def read_alike(paths: Iterable[Path]) -> Iterator[tuple[Path, dict]]:
    """Yields the runs' files, sorted, with what they hold.

    Raises:
        ValueError: if their settings differ.
    """
    settings = None
    for path in sorted(paths):
        run = json.loads(path.read_text())
        if settings not in (None, run["settings"]):
            raise ValueError(
                "The runs of a table must have the same settings. Received: "
                f"{str(path)!r} with {run['settings']}, others with {settings}"
            )
        settings = run["settings"]
        yield path, run


def rows(folder: Path) -> dict[tuple, Row]:
    """All reported runs, by (purpose, network, method, bits, epochs).

    Raises:
        ValueError: if runs of other settings are among them, or one diverged.
    """
    found: dict[tuple, list[dict]] = {}
    for path, run in read_alike(folder.glob("*/*/*.json")):
        if run["measured_on"] != "test":
            continue
        if run["accuracy"] is None:
            raise ValueError(
                f"A reported run must not diverge. Received: {str(path)!r}, "
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
            runs[0]["weight_bytes"],
            runs[0]["bops"],
        )
        for key, runs in found.items()
    }


def settings_of(folder: Path) -> sweep.Settings:
    """The settings that the files of a sweep were made with."""
    path = next(iter(sorted(folder.glob("*/*/*.json"))))
    found = json.loads(path.read_text())["settings"]
    lists = {name: tuple(v) for name, v in found.items() if isinstance(v, list)}
    return sweep.Settings(**{**found, **lists})


def label(bits) -> str:
    """Bits as they are written in the field; "float" for none."""
    return "float" if bits is None else f"W{bits[0]}A{bits[1]}"


def tables(folder: Path) -> dict[str, str]:
    """The tables in Markdown, by the name that their place in the README has.

    What was not run is left out, or shown as a dash.
    """
    found, settings = rows(folder), settings_of(folder)
    return {
        "W2A2": equal_table(found, settings, SMALL, (2, 2)),
        "bits": bits_table(found, settings),
        "ablations": ablations_table(found, settings),
        "per stage": per_stage_table(found, settings),
        "ResNet-20": large_table(found, settings),
        "widths": widths_table(found, settings),
        "mixed": mixed_table(found, settings),
        "tuning": tuning_table(folder, settings),
    }


def table(headers: list[str], lines: Iterable[list]) -> str:
    lines = list(lines)
    if not lines:
        return "Not run yet."
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate.tabulate(
        lines, headers, tablefmt="github", disable_numparse=True, colalign=align
    )


def _accuracy(row: Row | None) -> str:
    if row is None:
        return _NOTHING
    return f"{row.mean:.2f}" + ("" if math.isnan(row.error) else f" ± {row.error:.2f}")


def _difference(row: Row | None, other: Row | None) -> str:
    if row is None or other is None or row is other:
        return _NOTHING
    return _shown(*paired(row.accuracies, other.accuracies))


def _shown(mean: float, half: float) -> str:
    """A difference, and the half width of its interval."""
    if math.isnan(half):
        return _NOTHING if math.isnan(mean) else f"{mean:+.2f}"
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def _ratio(row: Row, other: Row | None) -> str:
    ratio = math.nan if other is None else cost_ratio(row, other)
    return _NOTHING if math.isnan(ratio) else f"{ratio:.2f}"


def _compared(row: Row, plain: Row | None, other: Row | None) -> list[str]:
    """Seeds, accuracy, differences to plain training and another row; CPU time."""
    return [
        str(len(row.accuracies)),
        _accuracy(row),
        _difference(row, plain),
        _difference(row, other),
        _ratio(row, plain),
    ]


def equal_table(found, settings, network, bits) -> str:
    """All methods with the same total of epochs."""
    named = [
        (sweep.FLOAT, "float", None, settings.float_epochs, "float, the start"),
        (sweep.FLOAT, "equal", None, settings.epochs, "float, trained on as long"),
        *((m, "equal", bits, settings.epochs, m) for m in sweep.METHODS),
    ]
    plain = found.get(("equal", network, "plain", bits, settings.epochs))
    lines = []
    for method, purpose, wanted, epochs, name in named:
        row = found.get((purpose, network, method, wanted, epochs))
        if row is not None:
            lines.append(
                [
                    name,
                    str(len(row.accuracies)),
                    _accuracy(row),
                    _difference(row, plain),
                    _shown(*paired(row.recalibrated, row.accuracies)),
                    _ratio(row, plain) if purpose == "equal" else _NOTHING,
                ]
            )
    headers = ["method", "seeds", "accuracy, %", "against plain", "recalibrated"]
    return table([*headers, "CPU"], lines)


def bits_table(found, settings) -> str:
    """Methods by bit-widths."""
    lines = []
    for method in sweep.METHODS:
        cells = [
            found.get(("equal", SMALL, method, bits, settings.epochs)) for bits in BITS
        ]
        if any(cells):
            lines.append([method, *map(_accuracy, cells)])
    return table(["method", *map(label, BITS)], lines)


def ablations_table(found, settings) -> str:
    """Methods with one thing changed, beside what they are without the change."""
    plain = found.get(("equal", SMALL, "plain", (2, 2), settings.epochs))
    lines = []
    for name, (method, _) in sweep.ABLATIONS.items():
        row = found.get(("ablation", SMALL, name, (2, 2), settings.epochs))
        if row is not None:
            parent = found.get(("equal", SMALL, method, (2, 2), settings.epochs))
            lines.append([name, *_compared(row, plain, parent)])
    headers = ["changed", "seeds", "accuracy, %", "against plain"]
    return table([*headers, "against the method itself", "CPU"], lines)


def per_stage_table(found, settings) -> str:
    """Longer trainings, beside plain training that is as long."""
    plain = found.get(("equal", SMALL, "plain", (2, 2), settings.epochs))
    lines = []
    for count in sorted(set(sweep.LENGTHS.values())):
        epochs = count * settings.epochs
        long = found.get(("per_stage", SMALL, "plain", (2, 2), epochs))
        methods = [method for method, c in sweep.LENGTHS.items() if c == count]
        for method in ("plain", *methods):
            row = found.get(("per_stage", SMALL, method, (2, 2), epochs))
            if row is not None:
                lines.append([method, str(epochs), *_compared(row, plain, long)])
    headers = ["method", "epochs", "seeds", "accuracy, %"]
    headers += [f"against plain, {settings.epochs} epochs", "against plain, as long"]
    return table([*headers, "CPU"], lines)


def large_table(found, settings) -> str:
    """The larger network."""
    lines = []
    for bits in BITS:
        plain = found.get(("equal", LARGE, "plain", bits, settings.epochs))
        for method in sweep.METHODS:
            row = found.get(("equal", LARGE, method, bits, settings.epochs))
            if row is not None:
                lines.append(
                    [
                        f"{label(bits)}, {method}",
                        str(len(row.accuracies)),
                        _accuracy(row),
                        _difference(row, plain),
                    ]
                )
    for purpose, epochs, name in (
        ("equal", settings.epochs, "float, trained on as long"),
        ("float", settings.float_epochs, "float, the start"),
    ):
        row = found.get((purpose, LARGE, sweep.FLOAT, None, epochs))
        if row is not None:
            count = str(len(row.accuracies))
            lines.insert(0, [name, count, _accuracy(row), _NOTHING])
    return table(["network", "seeds", "accuracy, %", "against plain"], lines)


def mixed_table(found, settings) -> str:
    """Bits for each layer, beside uniform ones of the same cost."""
    lines = []
    for bits in sweep.MIXED_AS:
        for name, (method, _) in sweep.MIXED.items():
            row = found.get(("mixed", SMALL, name, bits, settings.epochs))
            uniform = found.get(("equal", SMALL, method, bits, settings.epochs))
            for title, each in ((f"{method}, {label(bits)}", uniform), (name, row)):
                if row is not None and each is not None:
                    lines.append(
                        [
                            title,
                            str(len(each.accuracies)),
                            str(each.weight_bytes),
                            f"{each.bops / 1e6:.2f}",
                            _accuracy(each),
                            _difference(each, uniform),
                        ]
                    )
    headers = ["bits", "seeds", "weights, bytes", "million BOPs", "accuracy, %"]
    return table([*headers, "against uniform"], lines)


def widths_table(found, settings) -> str:
    """What wider networks lose at 2 bits."""
    lines = []
    networks = {settings.width: SMALL}
    networks |= {width: sweep.at_width(SMALL, width) for width in sweep.WIDTHS}
    for width, network in networks.items():
        low = [
            found.get(("equal", network, method, (2, 2), settings.epochs))
            for method in sweep.AT_WIDTHS
        ]
        if not any(low):
            continue
        full = found.get(("equal", network, sweep.FLOAT, None, settings.epochs))
        size = next(row.weight_bytes for row in low if row is not None)
        lines.append(
            [
                str(width),
                str(min(len(row.accuracies) for row in (full, *low) if row)),
                f"{size / 1000:.1f}",
                _accuracy(full),
                *(
                    cell
                    for row in low
                    for cell in (_accuracy(row), _difference(row, full))
                ),
            ]
        )
    headers = ["width", "seeds", "weights, kB", "float, %"]
    for method in sweep.AT_WIDTHS:
        headers += [f"{method}, %", "against float"]
    return table(headers, lines)


def tuning_table(folder: Path, settings: sweep.Settings) -> str:
    """Accuracy on the held-out images by learning rate; the best in bold."""
    found = {
        m: scores for m, scores in sweep.tuning(folder, settings).items() if scores
    }
    rates = sorted({rate for scores in found.values() for rate in scores})
    lines = []
    for method, scores in found.items():
        best = sweep.best_rate(scores)
        cells = []
        for rate in rates:
            if rate not in scores:
                cells.append(_NOTHING)
            elif scores[rate] is None:
                cells.append("diverged")
            else:
                text = f"{100 * scores[rate]:.2f}"
                cells.append(f"**{text}**" if rate == best else text)
        lines.append([method, *cells])
    return table(["method", *(f"{rate:g}" for rate in rates)], lines)


def plots(folder: Path) -> dict:
    """Matplotlib figures by file name; without those that there is no run for yet."""
    found, settings = rows(folder), settings_of(folder)
    # Equal figures give equal files.
    matplotlib.rcParams["svg.hashsalt"] = "tf_lowbit"
    cost = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    _plot_cost(cost.subplots(), found, settings)
    bits = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    _plot_bits(bits.subplots(), found, settings)
    figures = {"accuracy_cost.svg": cost, "accuracy_bits.svg": bits}
    return {name: made for name, made in figures.items() if made.axes[0].has_data()}


def _plot_cost(axes, found, settings):
    """W2A2: what the training costs, and what it comes to."""
    plain = found.get(("equal", SMALL, "plain", (2, 2), settings.epochs))
    if plain is None:
        return
    markers = {"equal": "o", "per_stage": "s"}
    names = {"equal": "equal total of epochs", "per_stage": "longer"}
    colors = dict(zip(sweep.METHODS, matplotlib.colormaps["tab10"].colors, strict=True))
    for (purpose, network, method, bits, epochs), row in found.items():
        if network != SMALL or bits != (2, 2) or purpose not in markers:
            continue
        axes.errorbar(
            cost_ratio(row, plain),
            row.mean,
            yerr=None if math.isnan(row.error) else row.error,
            marker=markers[purpose],
            color=colors[method],
            capsize=3,
        )
        axes.annotate(
            method if purpose == "equal" else f"{method}, {epochs} epochs",
            (cost_ratio(row, plain), row.mean),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
        )
    float_row = found.get(("equal", SMALL, sweep.FLOAT, None, settings.epochs))
    if float_row is not None:
        axes.axhline(float_row.mean, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            "float, trained on as long",
            (1.0, float_row.mean),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    for purpose, marker in markers.items():
        axes.plot([], [], marker, color="gray", label=names[purpose])
    axes.set_xscale("log")
    axes.set_xlabel("CPU time of the training, relative to plain")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("ResNet-8, W2A2, Fashion-MNIST: mean and standard error over seeds")
    axes.legend(fontsize=8)


def _plot_bits(axes, found, settings):
    """What the bits cost in accuracy, by method."""
    for method in sweep.METHODS:
        here = {
            bits: found[key]
            for bits in BITS
            if (key := ("equal", SMALL, method, bits, settings.epochs)) in found
        }
        if len(here) < 2:
            continue
        axes.errorbar(
            [row.bops / 1e6 for row in here.values()],
            [row.mean for row in here.values()],
            yerr=[0 if math.isnan(r.error) else r.error for r in here.values()],
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1,
            label=method,
        )
    axes.set_xlabel("million bit operations per image (float first and last layer)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("ResNet-8 by bit-width: mean and standard error over seeds")
    if axes.has_data():
        axes.legend(fontsize=8, ncols=2)
