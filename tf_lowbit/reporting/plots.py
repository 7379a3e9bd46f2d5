"""The figures of a report, drawn by matplotlib, which is imported by whoever draws."""

from collections.abc import Mapping, Sequence

import numpy as np

from tf_lowbit.core.stages import FLOAT_BITS, Stage
from tf_lowbit.reporting.cost import Cost
from tf_lowbit.tensor_statistics import TensorStatistics

# To be told apart in print, on light and dark ground, and by most of the colour-blind.
BLUE, ORANGE, GRAY = "#3b82c4", "#e07b39", "#8a8a8a"
_COLUMNS = 4
# Names of parts of the losses and metrics in the logs that are no curves of a training.
_NO_CURVES = ("lr", "weight_bits", "activation_bits")


def figures(
    cost: Cost,
    statistics: Sequence[TensorStatistics],
    history: Mapping | None = None,
    stages: Sequence[Stage] | None = None,
) -> dict:
    """All figures that there are data for.

    Args:
        cost: of the network.
        statistics: of its tensors.
        history: name -> value at each epoch, as `fit(...).history`.
        stages: of the training.

    Returns:
        Name -> matplotlib figure.
    """
    made = {"cost": _cost(cost), "sqnr": _sqnr(statistics)}
    for role in ("weight", "activation"):
        own = [tensor for tensor in statistics if tensor.role == role and tensor.codes]
        if own:
            made[f"{role}_levels"] = _levels(own)
    if stages:
        made["stages"] = _stages(stages)
    if history:
        made["history"] = _history(history)
    return made


def _figure(width, height):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure


def _bars(axes, names, values, colors):
    places = np.arange(len(names))
    axes.barh(places, values, color=colors, height=0.7)
    axes.set_yticks(places, names, fontsize=8)
    # The first one on top.
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_alpha(0.0)


def _cost(cost):
    from matplotlib import ticker

    layers = [layer for layer in cost.layers if layer.weight_bits]
    names = [layer.name for layer in layers]
    figure = _figure(9, 1.2 + 0.22 * len(layers))
    left, right = figure.subplots(1, 2, sharey=True)
    colors = [
        GRAY if max(layer.weight_bits) == FLOAT_BITS else BLUE for layer in layers
    ]
    _bars(left, names, [layer.weight_bytes for layer in layers], colors)
    left.set_xlabel("bytes of parameters (gray: float weights)")
    _bars(right, names, [layer.bops or 0 for layer in layers], colors)
    for axes in (left, right):
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    right.set_xlabel("bit operations for one example")
    return figure


def _sqnr(statistics):
    shown = [t for t in statistics if t.codes]
    figure = _figure(9, 1.2 + 0.22 * len(shown))
    axes = figure.subplots()
    values = [min(tensor.sqnr, 80.0) for tensor in shown]
    colors = [BLUE if tensor.role == "weight" else ORANGE for tensor in shown]
    names = [f"{tensor.name}, {tensor.bits} bits" for tensor in shown]
    _bars(axes, names, values, colors)
    axes.set_xlabel("signal to error of rounding and clipping, dB (blue: weights)")
    return figure


def _levels(statistics):
    rows = -(-len(statistics) // _COLUMNS)
    figure = _figure(9, 0.4 + 1.5 * rows)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes in grid.ravel()[len(statistics) :]:
        axes.set_visible(False)
    for axes, tensor in zip(grid.ravel(), statistics, strict=False):
        edges = np.asarray(tensor.edges)
        color = BLUE if tensor.role == "weight" else ORANGE
        axes.stairs(tensor.counts, edges, fill=True, color=color, alpha=0.8)
        if len(tensor.codes) <= 16:
            for code in tensor.codes:
                axes.axvline(code, color=GRAY, linewidth=0.6)
            axes.set_xticks(tensor.codes, map(str, tensor.codes), fontsize=6)
        else:
            axes.tick_params(labelsize=6)
        axes.set_yticks([])
        axes.set_title(tensor.name, fontsize=7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.patch.set_alpha(0.0)
    return figure


def _stages(stages):
    ends = np.cumsum([0, *(stage.epochs for stage in stages)])
    figure = _figure(9, 2.6)
    axes = figure.subplots()
    for name, color, shift in (
        ("weight", BLUE, 0.04),
        ("activation", ORANGE, -0.04),
    ):
        bits = [getattr(stage, f"{name}_bits") or np.nan for stage in stages]
        axes.stairs(
            # Apart by a hair, so that equal ones are both seen.
            np.asarray(bits, float) * 2**shift,
            ends,
            baseline=None,
            color=color,
            linewidth=2,
            label=f"{name}s",
        )
    axes.set_yscale("log", base=2)
    widths = sorted(
        {b for s in stages for b in (s.weight_bits, s.activation_bits) if b}
    )
    axes.set_yticks(widths, map(str, widths))
    axes.set_ylabel("bits")
    axes.set_xlabel("epoch")
    axes.set_xlim(0, ends[-1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_alpha(0.0)
    axes.legend(fontsize=8, framealpha=0.0)
    return figure


def _history(history):
    from matplotlib import ticker

    curves = {n: v for n, v in history.items() if n not in _NO_CURVES}
    losses = {name: v for name, v in curves.items() if "loss" in name}
    others = {name: v for name, v in curves.items() if name not in losses}
    panels = [own for own in (losses, others) if own]
    figure = _figure(9, 3.2)
    for axes, own in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for name, values in own.items():
            epochs = np.arange(1, len(values) + 1)
            axes.plot(epochs, values, label=name, linewidth=1.3, marker=".")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.patch.set_alpha(0.0)
        axes.legend(fontsize=7, framealpha=0.0)
    return figure
