"""Plots of the accuracy sweep, drawn from its files alone."""

import math
from pathlib import Path

import matplotlib
import matplotlib.figure
import matplotlib.ticker

from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy.rows import (
    BITS,
    LARGE,
    SMALL,
    cost_ratio,
    label,
    rows,
    settings_of,
)


def plots(folder: Path) -> dict:
    """Matplotlib figures by file name; without those that there is no run for yet."""
    found, settings = rows(folder), settings_of(folder)
    # Equal figures give equal files.
    matplotlib.rcParams["svg.hashsalt"] = "tf_lowbit"
    cost = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    _plot_cost(cost.subplots(), found, settings)
    bits = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    _plot_bits(bits.subplots(), found, settings)
    size = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
    _plot_bytes(size.subplots(), found, settings)
    figures = {
        "accuracy_cost.svg": cost,
        "accuracy_bits.svg": bits,
        "accuracy_bytes.svg": size,
    }
    return {name: made for name, made in figures.items() if made.axes[0].has_data()}


def _plot_cost(axes, found, settings):
    """W2A2: what the training costs, and what it comes to."""
    plain = found.get(("equal", SMALL, "plain", (2, 2), settings.epochs))
    if plain is None:
        return
    colors = dict(zip(sweep.METHODS, matplotlib.colormaps["tab10"].colors, strict=True))
    points = {
        (method, epochs): (ratio, row)
        for (purpose, network, method, bits, epochs), row in found.items()
        if network == SMALL and bits == (2, 2) and method in colors
        if purpose in ("equal", "per_stage")
        if not math.isnan(ratio := cost_ratio(row, plain))
    }
    lengths = sorted({epochs for _, epochs in points})
    markers = dict(zip(lengths, "os^Dv", strict=False))
    for (method, epochs), (ratio, row) in points.items():
        axes.errorbar(
            ratio,
            row.mean,
            yerr=None if math.isnan(row.error) else row.error,
            marker=markers[epochs],
            color=colors[method],
            capsize=3,
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
    for method in sweep.METHODS:
        if any(method == name for name, _ in points):
            axes.plot([], [], "o", color=colors[method], label=method)
    for epochs, marker in markers.items():
        axes.plot([], [], marker, color="black", label=f"{epochs} epochs in total")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set_xlabel("CPU time of the training, relative to plain")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("ResNet-8, W2A2, Fashion-MNIST: mean and standard error over seeds")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


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


def _plot_bytes(axes, found, settings):
    """Plain training of three networks: what bytes cost and bring."""
    networks = {
        SMALL: "ResNet-8",
        sweep.at_width(SMALL, 2 * settings.width): "ResNet-8, twice as wide",
        LARGE: "ResNet-20",
    }
    for network, title in networks.items():
        here = {
            bits: found[key]
            for method, bits in [(sweep.FLOAT, None), *(("plain", b) for b in BITS)]
            if (key := ("equal", network, method, bits, settings.epochs)) in found
        }
        if len(here) < 2:
            continue
        line = axes.errorbar(
            [row.weight_bytes / 1000 for row in here.values()],
            [row.mean for row in here.values()],
            yerr=[0 if math.isnan(r.error) else r.error for r in here.values()],
            marker="o",
            markersize=5,
            capsize=3,
            linewidth=1,
            label=title,
        )
        for bits, row in here.items():
            axes.annotate(
                label(bits),
                (row.weight_bytes / 1000, row.mean),
                xytext=(6, -11),
                textcoords="offset points",
                color=line[0].get_color(),
                fontsize=9,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set_xlabel("weights, kB, packed at their bits (first and last layer float)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(
        "Fashion-MNIST, plain training: mean and standard error (3 to 5 seeds)"
    )
    if axes.has_data():
        axes.grid(alpha=0.3)
        axes.margins(x=0.1)  # Room for the labels.
        axes.legend(fontsize=9, loc="lower right")
