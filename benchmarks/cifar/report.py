"""Table and plot of the CIFAR experiments, drawn from their results alone."""

import collections
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np

from benchmarks.accuracy import tuning
from benchmarks.accuracy.rows import label, mean_interval, paired
from benchmarks.cifar import plan as cifar_plan
from benchmarks.cifar.plan import FLOAT, RECIPE
from benchmarks.common import store
from benchmarks.common.tables import NOTHING, table


def tables(path: Path) -> dict[str, str]:
    """The tables in Markdown, by the name that their place in the README has.

    An experiment that is still being tuned has no table.

    Args:
        path: The file of all results.
    """
    results = store.read(path)
    made = {}
    for name in cifar_plan.EXPERIMENTS:
        if not dict(_rows(name, results)):
            continue
        made[f"cifar, {name}"] = accuracy_table(name, results)
        made[f"cifar, tuning of {name}"] = tuning_table(name, results)
    return made


def accuracy_table(name: str, results: dict[str, dict]) -> str:
    """Accuracy on the test set after the last epoch, and what the network costs.

    Args:
        name: Of the experiment.
        results: Of the runs, by name.
    """
    plan = cifar_plan.EXPERIMENTS[name]
    headers = [
        "method", "seeds", "accuracy, %", "to float", f"to {plan.base}, by seed",
        "weight bytes", "million BOPs", "rate",
    ]  # fmt: skip
    if plan.target is not None:
        headers.append(f"{plan.target:g} % or more")
    lines, given = [], given_accuracy(name, results)
    if given is not None:
        start = "float, as given" if plan.is_given else "float, the start of all"
        rest = [NOTHING] * (len(headers) - 3)
        lines.append([start, NOTHING, f"{given:.2f}", *rest])
    found = dict(_rows(name, results))
    rows = [
        (row, runs)
        for row, by_rate in _by_rate(name, results).items()
        for runs in by_rate.values()
    ]
    for (method, bits), runs in rows:
        accuracies = _percent(runs)
        base = found.get((plan.base, bits)) if method != plan.base else None
        line = [
            cifar_plan.row_name(method, bits),
            str(len(runs)),
            _interval(*mean_interval(accuracies)),
            NOTHING if given is None else f"{np.mean(accuracies) - given:+.2f}",
            NOTHING if base is None else _to(runs, base),
            f"{runs[0]['weight_bytes']:,}",
            f"{runs[0]['bops'] / 1e6:,.0f}",
            f"{runs[0]['learning_rate']:g}",
        ]
        if plan.target is not None:
            reached = sum(a >= plan.target for a in accuracies)
            line.append(f"{reached} of {len(runs)}")
        lines.append(line)
    return table(headers, lines)


def _to(runs, base) -> str:
    """The difference in percentage points over the seeds that both have."""
    sides = [{r["seed"]: 100 * r["accuracy"] for r in each} for each in (runs, base)]
    return _interval(*paired(*sides), "+")


def _interval(mean, half, sign="") -> str:
    """The mean, and the half width of its interval if there is one."""
    if math.isnan(mean):
        return NOTHING
    shown = f"{mean:{sign}.2f}"
    return shown if math.isnan(half) else f"{shown} ± {half:.2f}"


def short_table(path: Path, files: Path) -> str:
    """Accuracy beside the bytes of the file for TFLite Micro, LSQ by bits.

    Args:
        path: The file of all results.
        files: JSON file of `benchmarks.deployment.tiny`, of the same network.
    """
    results = store.read(path)
    sizes = json.loads(files.read_text())["networks"]["ResNet-8"]
    given = given_accuracy("tiny", results)
    accuracy = NOTHING if given is None else f"{given:.2f}"
    lines = [["float32, as given", accuracy, f"{sizes['float']:,}", NOTHING]]
    for (method, bits), runs in sorted(_rows("tiny", results), key=_most_bits_first):
        if method != "LSQ" or len(runs) < 2:
            continue
        mean, half = mean_interval(_percent(runs))
        file = sizes["bits"].get(label(bits))
        lines.append(
            [
                label(bits),
                f"{mean:.2f} ± {half:.2f} ({len(runs)})",
                NOTHING if file is None else f"{file['bytes']['packed']:,}",
                f"{runs[0]['bops'] / 1e6:,.0f}",
            ]
        )
    headers = ["bits", "test accuracy, %", "bytes of the file", "million BOPs"]
    return table(headers, lines)


def _most_bits_first(row):
    (_, bits), _ = row
    return -sum(bits or ())


def given_accuracy(name: str, results: dict[str, dict]) -> float | None:
    """Test accuracy of the float network that all runs start from, in percent."""
    for r in results.values():
        is_own = r["experiment"] == name and r["measured_on"] == "test"
        if (
            is_own
            and r["method"] != cifar_plan.START
            and r.get("float_accuracy") is not None
        ):
            return 100 * r["float_accuracy"]
    return None


def tuning_table(name: str, results: dict[str, dict]) -> str:
    """Accuracy on held-out training images, by method, start and rate."""
    rates = [
        rate
        for rate in tuning.RATES
        if any(r["learning_rate"] == rate for r in _held_out(name, results))
    ]
    found = {
        (r["method"], r["seed"] in cifar_plan.TUNING_SEEDS, r["learning_rate"]): r
        for r in _held_out(name, results)
    }
    lines = []
    for method, is_new in itertools.product(cifar_plan.METHODS, (False, True)):
        cells = [found.get((method, is_new, rate)) for rate in rates]
        start = cifar_plan.START if is_new else "float, as given"
        if any(cells):
            lines.append([method, start, *(_accuracy_cell(cell) for cell in cells)])
    return table(["method", "start", *(f"{rate:g}" for rate in rates)], lines)


def plots(path: Path, step_costs: Path) -> dict[str, matplotlib.figure.Figure]:
    """Matplotlib figures by file name; none as long as there are no results.

    Args:
        path: The file of all results.
        step_costs: JSON file of `benchmarks.cost.step_cost`.
    """
    results = store.read(path)
    rows = [row for row in _rows("tiny", results) if _is_low_bit(row[0])]
    given = given_accuracy("tiny", results)
    if not rows:
        return {}
    matplotlib.rcParams["svg.hashsalt"] = "tf_lowbit"
    figure = matplotlib.figure.Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    _plot(axes[0], rows, lambda r: r["weight_bytes"] / 1e3, "kilobytes of weights")
    _plot(axes[1], rows, lambda r: r["bops"] / 1e6, "million bit operations (BOPs)")
    relative = _relative_steps(json.loads(step_costs.read_text())["ratios"])
    trained = [
        ((method, bits), runs)
        for name in ("tiny", "tiny_long")
        for (method, bits), runs in _rows(name, results)
        if bits is None or (bits == (2, 2) and _is_low_bit((method, bits)))
    ]
    _plot(
        axes[2],
        trained,
        lambda r: r["epochs"] * relative[r["method"]],
        "training at W2A2, in epochs of a float network",
    )
    target = cifar_plan.EXPERIMENTS["tiny"].target
    lines = [(target, "gray", ":", "MLPerf's target")]
    lines += [] if given is None else [(given, "black", "--", "float, as given")]
    for axis in axes:
        for height, color, style, name in lines:
            axis.axhline(height, color=color, linestyle=style, linewidth=1, label=name)
    axes[0].set_ylabel("accuracy, % of the test set")
    axes[2].legend(fontsize=8, loc="lower right")
    return {"tiny.svg": figure}


def _is_low_bit(row) -> bool:
    """Whether a row is one of our networks at few bits: files of peers are float."""
    method, bits = row
    return bits is not None and cifar_plan.METHODS[method].peer is None


def _relative_steps(ratios: list[dict]) -> dict[str, float]:
    """CPU time of a step of each method at W2A2, relative to a float step."""
    found = {r["step"]: r["median"] for r in ratios if r["relative to"] == "float"}
    return {
        FLOAT: 1.0,
        "plain": found["DoReFa W2A2"],
        "LSQ": found["LSQ W2A2"],
        "JKD": found["joint distillation"],
        RECIPE: found["recipes.low_bit W2A2"],
    }


def _plot(axes, rows, cost, title) -> None:
    colors = dict(
        zip(cifar_plan.METHODS, matplotlib.colormaps["tab10"].colors, strict=False)
    )
    for method, color in colors.items():
        own = [(bits, runs) for (name, bits), runs in rows if name == method]
        if not own:
            continue
        own.sort(key=lambda row: cost(row[1][0]))
        costs = [cost(runs[0]) for _, runs in own]
        means, halves = zip(
            *(mean_interval(_percent(runs)) for _, runs in own), strict=True
        )
        axes.errorbar(
            costs, means, np.nan_to_num(halves),
            marker="o", capsize=3, color=color, label=method,
        )  # fmt: skip
        for x, y, (bits, _) in zip(costs, means, own, strict=True):
            axes.annotate(
                label(bits), (x, y), xytext=(-6, 4), textcoords="offset points",
                fontsize=8, ha="right",
            )  # fmt: skip
    axes.set_xlabel(title)
    axes.margins(x=0.15)
    axes.set_xlim(left=0)


def _percent(runs: Iterable[dict]) -> list[float]:
    return [100 * run["accuracy"] for run in runs]


def _rows(name, results):
    """Yields (method, bits) and the runs of `_by_rate` at the first rate."""
    for row, by_rate in _by_rate(name, results).items():
        yield row, next(iter(by_rate.values()))


def _by_rate(name, results) -> dict[tuple, dict[float, list[dict]]]:
    """The runs on the test set that did not diverge: (method, bits) -> rate -> runs.

    For all bits of a method the same rate comes first: that of the tuning, once it has
    as many runs as others.
    """
    tested = [
        r
        for r in results.values()
        if (r["experiment"], r["measured_on"]) == (name, "test")
        if r["accuracy"] is not None
    ]
    found: dict[tuple, dict[float, list[dict]]] = {}
    for method, bits in cifar_plan.EXPERIMENTS[name].rows:
        own = [r for r in tested if r["method"] == method]
        counts = collections.Counter(r["learning_rate"] for r in own)
        tuned = cifar_plan.rate_of(name, method, results)
        for rate in sorted(counts, key=lambda x: (-counts[x], x != tuned)):
            runs = [
                r
                for r in own
                if r["learning_rate"] == rate and r["bits"] == (bits and list(bits))
            ]
            if runs:
                found.setdefault((method, bits), {})[rate] = runs
    return found


def _held_out(name, results) -> list[dict]:
    return [
        r
        for r in results.values()
        if r["experiment"] == name and r["measured_on"] == "held-out"
        if r["method"] != cifar_plan.START
    ]


def _accuracy_cell(result) -> str:
    if result is None:
        return NOTHING
    if result["accuracy"] is None:
        return "diverged"
    return f"{100 * result['accuracy']:.2f}"
