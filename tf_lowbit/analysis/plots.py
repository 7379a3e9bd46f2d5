"""The figures of a report, drawn by matplotlib, which is imported on first use.

They are as wide as a phone's screen or a column of print. The id of a bar or a point is
`TIP` and a text, which the page shows under the mouse.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from tf_lowbit.analysis.cost import FLOAT_BITS, Cost
from tf_lowbit.core.grid import MAX_BITS
from tf_lowbit.network.tensor_statistics import TensorStatistics
from tf_lowbit.training.stages import Stage

TIP = "tip:"
# A larger confusion matrix cannot be read.
MOST_CLASSES = 20
# Name -> color on a light background and in print, color on a dark one. Most
# color-blind readers can distinguish them. Bits run from green to violet.
PALETTE = {
    "weight": ("#2f6fb3", "#7db4ee"),
    "activation": ("#c9622a", "#f09a66"),
    "float": ("#8b8b8b", "#9aa0a8"),
    "bits-1": ("#3fae86", "#5fd0a8"),
    "bits-2": ("#2b9a94", "#4fc0ba"),
    "bits-3": ("#2688a0", "#4db0c8"),
    "bits-4": ("#2a76a9", "#58a2d6"),
    "bits-5": ("#3b65ac", "#6f97dd"),
    "bits-6": ("#5056a9", "#8a8be0"),
    "bits-7": ("#66499f", "#a283dc"),
    "bits-8": ("#7a3d92", "#b87fd2"),
}
_WIDTH = 4.2
_FONT, _SMALL = 8, 7
# Limits: characters of a layer's name, points of a curve with a tip, length of a bar.
_LONGEST = 26
_MOST_POINTS = 30
_SQNR_SHOWN = 80.0
# Logs that are not drawn as curves.
_NO_CURVES = ("lr", "weight_bits", "activation_bits")


def figures(
    cost: Cost,
    statistics: Sequence[TensorStatistics],
    confusion: np.ndarray | None = None,
    history: Mapping | None = None,
    stages: Sequence[Stage] | None = None,
) -> dict:
    """Draws all figures that there are data for.

    Args:
        cost: Cost of the network.
        statistics: Statistics of its tensors.
        confusion: Number of examples by true class (row) and predicted class (column).
        history: Name -> value at each epoch, as `fit(...).history`.
        stages: Stages of the training.

    Returns:
        Name -> matplotlib figure.
    """
    made = {"bit_map": _bit_map(cost), "operations": _operations(cost)}
    if confusion is not None and len(confusion) <= MOST_CLASSES:
        made["confusion"] = _confusion(confusion)
    made["sqnr"] = _sqnr(statistics)
    for role in ("weight", "activation"):
        own = [tensor for tensor in statistics if tensor.role == role and tensor.codes]
        if own:
            made[f"{role}_levels"] = _levels(own)
    if stages:
        made["stages"] = _stages(stages)
    if history:
        made["history"] = _history(history)
    return made


def _color(name):
    return PALETTE[name][0]


def _color_of(bits):
    return _color("float" if bits > MAX_BITS else f"bits-{bits}")


def _text_of(bits):
    return "float" if bits > MAX_BITS else f"{bits} bits" if bits > 1 else "1 bit"


def _figure(height):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure


def _bare(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_alpha(0.0)
    axes.tick_params(labelsize=_SMALL)


def _tip(artist, text):
    artist.set_gid(f"{TIP}{text}")


def _legend(figure, entries):
    """Adds a legend above the axes, from pairs (text, color)."""
    import matplotlib.patches

    handles = [matplotlib.patches.Patch(color=c, label=text) for text, c in entries]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=4,
        fontsize=_SMALL,
        frameon=False,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _bars(axes, names, values, colors, labels, tips):
    """Draws horizontal bars, the first one on top, each with a text at its end."""
    places = np.arange(len(names))
    bars = axes.barh(places, values, color=colors, height=0.7)
    for bar, place, value, label, tip in zip(
        bars, places, values, labels, tips, strict=True
    ):
        _tip(bar, tip)
        axes.annotate(
            label,
            (max(value, 0.0), place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=_SMALL,
        )
    axes.set_yticks(places, map(_shortened, names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    # Leaves room for the texts.
    axes.set_xlim(0, 1.3 * max(*values, 0.0, 1e-9))
    axes.xaxis.set_major_locator(_few_ticks())
    _bare(axes)


def _few_ticks():
    from matplotlib import ticker

    return ticker.MaxNLocator(4)


def _shortened(name):
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def _height(rows):
    return 1.0 + 0.19 * rows


def _layers(cost):
    return [layer for layer in cost.layers if layer.weight_bits]


def _by_bits(cost, values, labels, tips, what):
    """Draws bars of the layers with kernels, in the colors of their bits."""
    from matplotlib import ticker

    layers = _layers(cost)
    bits = [max(layer.weight_bits) for layer in layers]
    figure = _figure(_height(len(layers)))
    axes = figure.subplots()
    names = [layer.name for layer in layers]
    _bars(axes, names, values, [_color_of(b) for b in bits], labels, tips)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.set_xlabel(what, fontsize=_FONT)
    _legend(figure, [(_text_of(b), _color_of(b)) for b in sorted(set(bits))])
    return figure


def _bit_map(cost):
    layers = _layers(cost)
    texts = [_text_of(max(layer.weight_bits)) for layer in layers]
    tips = [
        f"{layer.name}: {text}, {layer.weight_bytes:,} bytes of {layer.parameters:,} "
        "parameters"
        for layer, text in zip(layers, texts, strict=True)
    ]
    values = [layer.weight_bytes for layer in layers]
    return _by_bits(cost, values, texts, tips, "bytes of parameters")


def _operations(cost):
    from matplotlib import ticker

    layers = _layers(cost)
    number = ticker.EngFormatter(sep="", places=1)
    values = [layer.bops or 0 for layer in layers]
    labels = ["?" if layer.bops is None else number(layer.bops) for layer in layers]
    tips = [
        f"{layer.name}: "
        + ("unknown" if layer.bops is None else f"{layer.bops:,} bit operations")
        for layer in layers
    ]
    return _by_bits(cost, values, labels, tips, "bit operations for one example")


def _confusion(confusion):
    import matplotlib.patches

    classes = len(confusion)
    figure = _figure(_WIDTH)
    axes = figure.subplots()
    totals = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for (true, predicted), count in np.ndenumerate(confusion):
        if not count:
            continue
        cell = matplotlib.patches.Rectangle(
            (predicted - 0.5, true - 0.5),
            1,
            1,
            color=_color("weight" if true == predicted else "activation"),
            # Light enough for a text.
            alpha=0.1 + 0.5 * float(count / totals[true, 0]),
            linewidth=0,
        )
        _tip(cell, f"class {true} predicted as {predicted}: {count:,}")
        axes.add_patch(cell)
        size = _SMALL if classes <= 10 else 5
        style = {"ha": "center", "va": "center", "fontsize": size}
        axes.text(predicted, true, f"{count}", **style)
    axes.set_xlim(-0.5, classes - 0.5)
    axes.set_ylim(classes - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(classes))
    axes.set_yticks(range(classes))
    axes.set_xlabel("predicted class", fontsize=_FONT)
    axes.set_ylabel("true class", fontsize=_FONT)
    _bare(axes)
    colors = _color("weight"), _color("activation")
    _legend(figure, zip(("right", "wrong"), colors, strict=True))
    return figure


def _sqnr(statistics):
    shown = [t for t in statistics if t.codes]
    figure = _figure(_height(len(shown)))
    axes = figure.subplots()
    _bars(
        axes,
        [tensor.name for tensor in shown],
        [min(tensor.sqnr, _SQNR_SHOWN) for tensor in shown],
        [_color(tensor.role) for tensor in shown],
        [f"{tensor.sqnr:.1f}" for tensor in shown],
        [_about(tensor) for tensor in shown],
    )
    axes.set_xlabel("SQNR (noise of rounding and clipping), dB", fontsize=_FONT)
    roles = dict.fromkeys(tensor.role for tensor in shown)
    _legend(figure, [(f"{role}s", _color(role)) for role in roles])
    return figure


def _about(tensor):
    return (
        f"{tensor.name}: {_text_of(tensor.bits)}, {tensor.sqnr:.1f} dB, "
        f"{100 * tensor.clip_rate:.2f} % clipped"
    )


def _levels(statistics):
    columns = 2
    rows = -(-len(statistics) // columns)
    figure = _figure(0.3 + 1.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel()[len(statistics) :]:
        axes.set_visible(False)
    for axes, tensor in zip(grid.ravel(), statistics, strict=False):
        _bare(axes)
        edges = np.asarray(tensor.edges)
        color = _color(tensor.role)
        steps = axes.stairs(tensor.counts, edges, fill=True, color=color, alpha=0.8)
        _tip(steps, _about(tensor))
        if len(tensor.codes) <= 16:
            for code in tensor.codes:
                axes.axvline(code, color=_color("float"), linewidth=0.6)
            ticks = tensor.codes[:: -(-len(tensor.codes) // 8)]
            axes.set_xticks(ticks, map(str, ticks))
        else:
            axes.xaxis.set_major_locator(_few_ticks())
        axes.set_yticks([])
        axes.set_title(_shortened(tensor.name), fontsize=_SMALL)
        axes.spines["left"].set_visible(False)
    return figure


def _stages(stages):
    ends = np.cumsum([0, *(stage.epochs for stage in stages)])
    figure = _figure(2.2)
    axes = figure.subplots()
    for role, shift in (("weight", 0.04), ("activation", -0.04)):
        bits = [getattr(stage, f"{role}_bits") or np.nan for stage in stages]
        steps = axes.stairs(
            # Slightly shifted, so that both lines show if the bits are equal.
            np.asarray(bits, float) * 2**shift,
            ends,
            baseline=None,
            color=_color(role),
            linewidth=2,
        )
        given = [
            _text_of(int(b)) if b <= FLOAT_BITS else "own bits"
            for b in np.nan_to_num(bits, nan=99)
        ]
        _tip(steps, f"{role}s: {', '.join(given)}")
    axes.set_yscale("log", base=2)
    widths = sorted(
        {b for s in stages for b in (s.weight_bits, s.activation_bits) if b}
    )
    axes.set_yticks(widths, map(str, widths))
    axes.minorticks_off()
    axes.set_ylabel("bits", fontsize=_FONT)
    axes.set_xlabel("epoch", fontsize=_FONT)
    axes.set_xlim(0, ends[-1])
    axes.xaxis.set_major_locator(_few_ticks())
    _bare(axes)
    roles = ("weight", "activation")
    _legend(figure, [(f"{role}s", _color(role)) for role in roles])
    return figure


def _history(history):
    from matplotlib import ticker

    curves = {n: v for n, v in history.items() if n not in _NO_CURVES}
    losses = {name: v for name, v in curves.items() if "loss" in name}
    others = {name: v for name, v in curves.items() if name not in losses}
    panels = [own for own in (losses, others) if own]
    figure = _figure(2.5 * len(panels))
    colors = [_color(n) for n in PALETTE if n not in ("bits-3", "bits-5", "bits-7")]
    for axes, own in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
    ):
        for index, (name, values) in enumerate(own.items()):
            color = colors[index % len(colors)]
            epochs = np.arange(1, len(values) + 1)
            axes.plot(epochs, values, label=name, linewidth=1.3, color=color)
            count = min(len(values), _MOST_POINTS)
            for place in np.unique(np.linspace(0, len(values) - 1, count).astype(int)):
                (point,) = axes.plot(
                    epochs[place], values[place], ".", color=color, markersize=4
                )
                _tip(point, f"{name}, epoch {epochs[place]}: {values[place]:.4g}")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        axes.set_xlabel("epoch", fontsize=_FONT)
        _bare(axes)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2,
            fontsize=_SMALL,
            frameon=False,
            handlelength=1.2,
        )
    return figure
