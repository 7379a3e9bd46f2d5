"""Tables of the accuracy sweep, drawn from its files alone."""

import json
import math
from pathlib import Path

import numpy as np

from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy import tuning
from benchmarks.accuracy.rows import (
    BITS,
    LARGE,
    SMALL,
    Row,
    Trained,
    cost_ratio,
    label,
    paired,
    read_alike,
    rows,
    settings_of,
    standard_error,
)
from benchmarks.common.tables import NOTHING, table

# What the short table shows.
SHORT = (sweep.FLOAT, "plain", "TS+PQ", "SP", "JKD", "LSQ", "LSQ with JKD")


def tables(folder: Path) -> dict[str, str]:
    """The tables in Markdown, by the name that their place in the README has.

    What was not run is left out, or shown as a dash.
    """
    found, settings = rows(folder), settings_of(folder)
    return {
        "W2A2": equal_table(found, settings, SMALL, (2, 2)),
        "bits": bits_table(found, settings),
        "bits, against plain": against_plain_table(found, settings),
        "ablations": ablations_table(found, settings),
        "per stage": per_stage_table(found, settings),
        "rates": rates_table(folder, found, settings),
        "starts": starts_table(found, settings),
        "ResNet-20": large_table(found, settings),
        "widths": widths_table(found, settings),
        "mixed": mixed_table(found, settings),
        "all layers": all_layers_table(found, settings),
        "tuning": tuning_table(folder, settings),
    }


def lsq_start_table(path: Path) -> str:
    """What the first step of LSQ changes, over the seeds.

    Args:
        path: JSON file of `benchmarks.accuracy.lsq_start`.
    """
    runs = json.loads(path.read_text())["runs"]

    def of(bits, start, pick):
        return {
            run["seed"]: pick(run)
            for run in runs
            if (run["bits"], run["start"]) == (bits, start)
        }

    def decibels(bits, start, role):
        ends = (
            of(bits, start, lambda run: run["sqnr_at_start"][role]),
            of(bits, start, lambda run: run["sqnr_at_end"][role]),
        )
        return " to ".join(f"{np.mean(list(end.values())):.1f}" for end in ends)

    lines = []
    for bits in sorted({run["bits"] for run in runs}):
        papers = of(bits, "paper", lambda run: run["accuracy"])
        for start in ("paper", "least_error"):
            own = of(bits, start, lambda run: run["accuracy"])
            values = list(own.values())
            lines.append(
                [
                    f"W{bits}A{bits}, {start}",
                    str(len(own)),
                    f"{np.mean(values):.2f} ± {standard_error(values):.2f}",
                    NOTHING if start == "paper" else shown(*paired(own, papers)),
                    decibels(bits, start, "weight"),
                    decibels(bits, start, "activation"),
                ]
            )
    headers = ["bits, start", "seeds", "accuracy, %", "minus the paper's start"]
    return table([*headers, "dB, weights", "dB, activations"], lines)


def _accuracy(row: Row | None) -> str:
    if row is None:
        return NOTHING
    return f"{row.mean:.2f}" + ("" if math.isnan(row.error) else f" ± {row.error:.2f}")


def _difference(row: Row | None, other: Row | None) -> str:
    if row is None or other is None or row is other:
        return NOTHING
    return shown(*paired(row.accuracies, other.accuracies))


def shown(mean: float, half: float) -> str:
    """A difference and its interval, as text.

    Args:
        mean: Of the difference; NaN where there is none.
        half: Half width of the interval; NaN where there is none.
    """
    if math.isnan(half):
        return NOTHING if math.isnan(mean) else f"{mean:+.2f}"
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def _ratio(row: Row, other: Row | None) -> str:
    ratio = math.nan if other is None else cost_ratio(row, other)
    return NOTHING if math.isnan(ratio) else f"{ratio:.2f}"


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
                    shown(*paired(row.recalibrated, row.accuracies)),
                    _ratio(row, plain) if purpose == "equal" else NOTHING,
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
            lines.append([method, *map(_accuracy_of, cells)])
    return table(["method", *map(label, BITS)], lines)


def _accuracy_of(row: Row | None) -> str:
    """With the number of seeds."""
    return NOTHING if row is None else f"{_accuracy(row)} ({len(row.accuracies)})"


def short_table(folder: Path) -> str:
    """The methods of `SHORT` at 4 and 2 bits.

    Args:
        folder: Of the results.
    """
    found, settings = rows(folder), settings_of(folder)
    longest = max(sweep.STAGES.values())
    columns = [((4, 4), 1), ((2, 2), 1), ((2, 2), longest)]

    def cell(method, bits, stages):
        bits = None if method == sweep.FLOAT else bits
        return _accuracy_of(found.get(Trained(method, bits, stages).key(settings)))

    lines = [[method, *(cell(method, *column) for column in columns)]
             for method in SHORT]  # fmt: skip
    headers = [
        f"{label(bits)}, {stages * settings.epochs} epochs" for bits, stages in columns
    ]
    return table(["test accuracy, %", *headers], lines)


def against_plain_table(found, settings) -> str:
    """Methods beside plain training, by bit-widths."""

    def row(method, bits):
        return found.get(("equal", SMALL, method, bits, settings.epochs))

    lines = [
        [method, *(_difference(row(method, b), row("plain", b)) for b in BITS)]
        for method in sweep.METHODS
        if method != "plain"
    ]
    # The float network that trained on as long, beside plain training of these bits.
    full = row(sweep.FLOAT, None)
    floats = [_difference(full, row("plain", bits)) for bits in BITS]
    shown_lines = [
        line for line in [["float", *floats], *lines] if set(line[1:]) != {NOTHING}
    ]
    return table(["method", *map(label, BITS)], shown_lines)


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
    for count in sorted({*sweep.LENGTHS.values(), sweep.AS_DEAR}):
        epochs = count * settings.epochs
        long = found.get(("per_stage", SMALL, "plain", (2, 2), epochs))
        methods = [method for method, c in sweep.LENGTHS.items() if c == count]
        for method in ("plain", *methods):
            bits = None if method == sweep.FLOAT else (2, 2)
            row = found.get(("per_stage", SMALL, method, bits, epochs))
            if row is not None:
                lines.append([method, str(epochs), *_compared(row, plain, long)])
    headers = ["method", "epochs", "seeds", "accuracy, %"]
    headers += [f"against plain, {settings.epochs} epochs", "against plain, as long"]
    return table([*headers, "CPU"], lines)


def rates_table(folder: Path, found, settings) -> str:
    """Plain training and JKD at several learning rates, beside float as long."""
    by_rate: dict[tuple, list[dict]] = {}
    for _, run in read_alike(folder):
        if run["purpose"] in ("rates", "per_stage"):
            key = (run["method"], run["epochs"], run["learning_rate"])
            by_rate.setdefault(key, []).append(run)

    def cell(*key):
        runs = by_rate.get(key, [])
        values = [run["accuracy"] for run in runs]
        if None in values:
            return f"diverged: {values.count(None)} of {len(values)}"
        if len(values) < 2:
            return NOTHING
        percent = [100 * value for value in values]
        shown = f"{np.mean(percent):.2f} ± {standard_error(percent):.2f}"
        return f"{shown} ({len(values)})"

    lines = []
    for length in sweep.RATE_LENGTHS:
        epochs = length * settings.epochs
        full = found.get(("per_stage", SMALL, sweep.FLOAT, None, epochs))
        for method in sweep.RATES_OF:
            cells = [cell(method, epochs, rate) for rate in sweep.RATES_AGAIN]
            if sum(each != NOTHING for each in cells) > 1:
                base = NOTHING if full is None else _accuracy(full)
                lines.append([method, str(epochs), *cells, base])
    rates = [f"{rate:g}" for rate in sweep.RATES_AGAIN]
    return table(["method", "epochs", *rates, "float, as long"], lines)


def starts_table(found, settings) -> str:
    """Other starts, beside what the sweep's start gives."""
    lines = []
    for name, (method, _) in sweep.STARTS.items():
        for epochs in sweep.start_lengths(name, settings):
            row = found.get(("start", SMALL, name, (2, 2), epochs))
            if row is None:
                continue
            length = settings.epochs if name == sweep.SCRATCH else epochs
            purpose = "equal" if length == settings.epochs else "per_stage"
            parent = found.get((purpose, SMALL, method, (2, 2), length))
            abrupt = found.get(("start", SMALL, "plain, abrupt", (2, 2), epochs))
            figures = [_accuracy(row), _difference(row, parent)]
            seeds = str(len(row.accuracies))
            lines.append([name, str(epochs), seeds, *figures, _difference(row, abrupt)])
    headers = ["start", "epochs", "seeds", "accuracy, %", "against the sweep's start"]
    return table([*headers, "against plain, abrupt"], lines)


def large_table(found, settings) -> str:
    """The larger network."""
    lines = []
    full = found.get(Trained(sweep.FLOAT, None, network=LARGE).key(settings))
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
                        _difference(row, full),
                    ]
                )
    for purpose, epochs, name in (
        ("equal", settings.epochs, "float, trained on as long"),
        ("float", settings.float_epochs, "float, the start"),
    ):
        row = found.get((purpose, LARGE, sweep.FLOAT, None, epochs))
        if row is not None:
            count = str(len(row.accuracies))
            lines.insert(0, [name, count, _accuracy(row), NOTHING, NOTHING])
    headers = ["network", "seeds", "accuracy, %", "against plain", "against float"]
    return table(headers, lines)


def mixed_table(found, settings) -> str:
    """Bits for each layer, beside uniform ones of the same cost."""
    (method,) = {method for method, _ in sweep.MIXED.values()}
    return _beside_uniform(
        found, settings, ("equal", method), sweep.MIXED, sweep.MIXED_AS
    )


def all_layers_table(found, settings) -> str:
    """The same where nothing is left in float."""
    uniform, *others = sweep.ALL_LAYERS
    return _beside_uniform(
        found, settings, ("mixed", uniform), others, sweep.ALL_LAYERS_AS
    )


def _beside_uniform(found, settings, uniform, others, widths) -> str:
    """Rows of uniform bits, (purpose, method), and of others that stand beside them."""
    lines = []
    for bits in widths:
        first = found.get((uniform[0], SMALL, uniform[1], bits, settings.epochs))
        rows = {
            name: found.get(("mixed", SMALL, name, bits, settings.epochs))
            for name in others
        }
        if not any(rows.values()):
            continue
        lines += [
            [
                title,
                str(len(row.accuracies)),
                str(row.weight_bytes),
                f"{row.bops / 1e6:.2f}",
                _accuracy(row),
                _difference(row, first),
            ]
            for title, row in {f"{uniform[1]}, {label(bits)}": first, **rows}.items()
            if row is not None
        ]
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
    """Accuracy on the held-out images by learning rate; the chosen one in bold."""
    found = {
        k: scores for k, scores in tuning.all_scores(folder, settings).items() if scores
    }
    rates = sorted({rate for scores in found.values() for rate in scores})
    lines = []
    for (method, bits), scores in found.items():
        chosen = tuning.chosen_rate(method, scores)
        cells = []
        for rate in rates:
            if rate not in scores:
                cells.append(NOTHING)
            elif scores[rate] is None:
                cells.append("diverged")
            else:
                text = f"{100 * scores[rate]:.2f}"
                cells.append(f"**{text}**" if rate == chosen else text)
        lines.append([method if bits is None else f"{method}, {label(bits)}", *cells])
    return table(["method", *(f"{rate:g}" for rate in rates)], lines)


def repeats_table(folder: Path, again: Path) -> str:
    """Runs that were done twice, of the same seed, on other processors."""
    found, settings = rows(folder), settings_of(folder)
    lines = []
    for key, row in rows(again).items() if again.exists() else ():
        (_, _, method, bits, epochs), other = key, found[key]
        name = f"{method}, {label(bits)}"
        if epochs != settings.epochs:
            name += f", {epochs} epochs"
        for seed, accuracy in sorted(row.accuracies.items()):
            here = other.accuracies[seed]
            figures = [f"{here:.2f}", f"{accuracy:.2f}", f"{here - accuracy:+.2f}"]
            lines.append([name, str(seed), *figures])
    return table(["run", "seed", "accuracy, %", "elsewhere, %", "difference"], lines)
