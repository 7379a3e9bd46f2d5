"""Draws the figures of the methods' pages: `python -m tools.plots` writes docs/figures.

Every value and gradient is what the library's own quantizer gives, every schedule what
the library's own functions return, and the diagram is read from a quantized network.
"""

from pathlib import Path

import numpy as np

import tf_lowbit as tfl
from tf_lowbit import quantizers as q
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import graph, layer_registry
from tf_lowbit.training.schedules import LinearRamp

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
BITS = (2, 4)
# All three can be read on white and on dark ground.
COLORS = ("#3b82c4", "#e07b39")
GRAY = "#808080"
_STYLE = {
    "svg.hashsalt": "tf_lowbit",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.titlecolor": GRAY,
    "text.color": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.framealpha": 0.0,
}


def curve(quantizer, inputs, others=(), **ranges):
    """What a quantizer makes of numbers, and the gradient that training uses.

    Args:
        quantizer: Of weights or activations, at its bits.
        inputs: Floats of shape (n,).
        others: Further floats of the same tensor, which are not returned: scales that
            are a statistic of the tensor see them.
        **ranges: Values of the quantizer's variables, such as `step` or `alpha`.

    Returns:
        `(values, gradients)`, float32 of shape (n,). The gradient at a number is the
        derivative of the sum of all values to it.
    """
    whole = np.concatenate([np.asarray(inputs), np.asarray(others)])
    tensor = tf.constant(whole[:, None], tf.float32)
    variables = quantizer.build(tensor.shape, "plot", keras.layers.Layer())
    for name, value in ranges.items():
        variables[name].assign(value)
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        values = quantizer(tensor, training=True, weights=variables)
    gradients = tape.gradient(values, tensor)
    return tuple(a.numpy()[: len(inputs), 0] for a in (values, gradients))


# Page -> (title, whether x may be negative, curve of bits k and of x) of each panel.
PANELS = {
    "dorefa": [
        ("weights", True, lambda k, x: curve(q.DoReFaWeightQuantizer(k), x)),
        ("activations", False, lambda k, x: curve(q.DoReFaActivationQuantizer(k), x)),
    ],
    "lsq": [
        (
            "weights, signed inputs (s = 1 / Q_N)",
            True,
            lambda k, x: curve(q.LSQWeightQuantizer(k), x, step=2.0 ** (1 - k)),
        ),
        (
            "activations (s = 1 / Q_P)",
            False,
            lambda k, x: curve(q.LSQActivationQuantizer(k), x, step=1 / (2**k - 1)),
        ),
    ],
    "pact": [
        (
            "activations (alpha = 1)",
            False,
            lambda k, x: curve(q.PACTActivationQuantizer(k), x, alpha=1.0),
        )
    ],
    "statsq": [
        # As many zeros halve the mean magnitude, which is 1 on [-2, 2].
        (
            "weights (mean|w| = 0.5)",
            True,
            lambda k, x: curve(q.StatsQWeightQuantizer(k), x, 0 * x),
        )
    ],
    "uniform": [
        (
            "weights (max|w| = 2)",
            True,
            lambda k, x: curve(q.UniformWeightQuantizer(k, per_axis=False), x),
        ),
        (
            "activations (clip = 1)",
            False,
            lambda k, x: curve(q.UniformActivationQuantizer(k), x, clip=1.0),
        ),
        (
            "signed activations (clip = 1)",
            True,
            lambda k, x: curve(
                q.UniformActivationQuantizer(k, signed=True), x, clip=1.0
            ),
        ),
    ],
}


def _quantizer_figure(panels):
    figure = _figure(3.2 * len(panels) + 0.4, 3.8)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex="col")
    for (top, bottom), (title, is_signed, evaluate) in zip(grid.T, panels, strict=True):
        # Activations: a little of what the ReLU cuts off, and of what the clip does.
        x = np.linspace(*((-2, 2) if is_signed else (-0.5, 1.5)), 1601)
        exact = x if is_signed else np.maximum(x, 0)
        top.plot(x, exact, ":", color=GRAY, linewidth=0.9)
        for bits, color in zip(BITS, COLORS, strict=True):
            values, gradients = evaluate(bits, x)
            top.plot(x, values, color=color, linewidth=1.5, label=f"{bits} bits")
            # Where both are the same, the other one is seen through the gaps.
            style = "-" if bits == BITS[0] else (0, (2, 2))
            bottom.plot(x, gradients, color=color, linewidth=1.5, linestyle=style)
        top.set_title(title, fontsize=9)
        bottom.set_ylim(-0.1, max(1.2, 1.1 * bottom.get_ylim()[1]))
        bottom.set_xlabel("w" if "weights" in title else "x")
    grid[0, 0].set_ylabel("quantized")
    grid[1, 0].set_ylabel("gradient to the input")
    grid[0, 0].legend(fontsize=8, loc="upper left")
    return figure


def _stages_figure():
    schedules = {
        "two_stage(2, 10)": tfl.two_stage(2, 10),
        "progressive(2, 4)": tfl.progressive(2, 4),
        "two_stage_progressive(2, 4, (8, 4, 2))": tfl.two_stage_progressive(
            2, 4, (8, 4, 2)
        ),
    }
    figure = _figure(9.6, 2.6)
    panels = figure.subplots(1, len(schedules), sharey=True)
    for axes, (title, stages) in zip(panels, schedules.items(), strict=True):
        ends = np.cumsum([0, *(stage.epochs for stage in stages)])
        for name, color, style in zip(
            ("weight", "activation"), COLORS, ("-", (0, (3, 2))), strict=True
        ):
            bits = [getattr(stage, f"{name}_bits") for stage in stages]
            axes.stairs(
                bits,
                ends,
                baseline=None,
                color=color,
                linewidth=1.8,
                linestyle=style,
                label=f"{name}s",
            )
        axes.set_yscale("log", base=2)
        axes.set_yticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
        axes.minorticks_off()
        axes.set_xlabel("epoch")
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("bits")
    panels[0].legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.65))
    return figure


def _probability_figure():
    figure = _figure(4.6, 2.6)
    axes = figure.subplots()
    steps = 1000
    for (start, tail), color in zip(((0.5, 0.2), (0.0, 0.5)), COLORS, strict=True):
        ramp = LinearRamp(start, tail)
        values = [float(ramp(step / steps)) for step in range(0, steps + 1, 5)]
        label = f"start={start}, tail={tail}" + (" (default)" if start else "")
        axes.plot(range(0, steps + 1, 5), values, color=color, label=label)
    axes.set_ylim(-0.05, 1.08)
    axes.set_xlabel(f"step, of {steps}")
    axes.set_ylabel("probability of being\nquantized")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def networks_of_the_diagram():
    """Returns a float network with a shortcut, and what `quantize` makes of it."""
    layers = keras.layers
    image = keras.Input((8, 8, 1), name="image")
    first = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv1")(image)
    x = layers.Conv2D(8, 3, padding="same", name="conv2")(first)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(layers.Add(name="add")([x, first]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    network = keras.Model(image, layers.Dense(10, name="head")(x))
    rules = [tfl.PrecisionRule("conv1|head", 8, 8), tfl.PrecisionRule(".*", 2, 2)]
    return network, tfl.quantize(network, rules)


def drawn_nodes(model):
    """Returns what the diagram says of a network's layers.

    Args:
        model: Functional model, float or quantized.

    Returns:
        Name of each layer -> `(label, role, names of the layers that it reads)`. The
        role is that of the layer's quantizer: "weight", "activation" or None.
    """
    tensors = {t.layer.name: t for t in tfl.inspection.quantized_tensors(model)}
    found = {}
    for node in graph.nodes(model):
        name = node.layer.name
        layer = tfl.inspection.wrapped_layer(node.layer)
        kind = "input" if node.is_input else type(layer).__name__
        kind += " with ReLU" if layer_registry.own_relu(layer) else ""
        tensor = tensors.get(name)
        role = tensor.role if tensor else None
        what = {None: kind, "weight": f"{kind}, weights", "activation": "values"}[role]
        label = f"{name}: {what}" + (f" at {tensor.bits} bits" if tensor else "")
        read = [graph.producer(t).layer.name for t in node.keras_inputs]
        found[name] = (label, role, read)
    return found


def _graph_figure():
    both = [drawn_nodes(model) for model in networks_of_the_diagram()]
    # A layer stands on the same line in both.
    lines = {name: -index for index, name in enumerate(both[1])}
    figure = _figure(7.2, 0.42 * len(lines) + 0.4)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.45, 2.0)
    axes.set_ylim(-len(lines) + 0.4, 1.2)
    colors = {None: GRAY, "weight": COLORS[0], "activation": COLORS[1]}
    arrow = {"arrowstyle": "->", "color": GRAY}
    titles = ("float network", "after quantize")
    for x, nodes, title in zip((0.0, 1.4), both, titles, strict=True):
        axes.text(x, 0.9, title, ha="center", fontsize=10)
        for name, (label, role, read) in nodes.items():
            y = lines[name]
            box = {"boxstyle": "round", "fc": "none", "ec": colors[role]}
            axes.text(x, y, label, ha="center", va="center", fontsize=8.5, bbox=box)
            for source in read:
                top = lines[source]
                if any(y < lines[other] < top for other in nodes):
                    # A shortcut, beside the boxes; a letter is so wide.
                    left, aside = (x + 0.03 + 0.0108 * len(nodes[source][0]), x + 0.5)
                    axes.plot([left, aside, aside], [top, top, y], color=GRAY, lw=1)
                    end = x + 0.03 + 0.0108 * len(label)
                    axes.annotate("", (end, y), (aside, y), arrowprops=arrow)
                else:
                    axes.annotate("", (x, y + 0.3), (x, top - 0.3), arrowprops=arrow)
    return figure


def _figure(width, height):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure


def figures() -> dict:
    """Name -> function that draws the figure of that name, without its ending."""
    drawn = {
        page: lambda panels=panels: _quantizer_figure(panels)
        for page, panels in PANELS.items()
    }
    return {
        **drawn,
        "quantize": _graph_figure,
        "stages": _stages_figure,
        "stochastic_precision": _probability_figure,
    }


def main(folder=FOLDER, ending="svg") -> None:
    """Writes all figures; without dates and versions, so that the same stay the same.

    Args:
        folder: That exists.
        ending: "svg", or "png" to look at them.
    """
    import matplotlib

    metadata = {"Date": None, "Creator": None} if ending == "svg" else None
    with matplotlib.rc_context(_STYLE):
        for name, draw in figures().items():
            figure = draw()
            for axes in figure.axes:
                axes.patch.set_alpha(0.0)
            path = Path(folder) / f"{name}.{ending}"
            figure.savefig(path, format=ending, metadata=metadata)


if __name__ == "__main__":
    main()
