"""The figures of the methods' pages: what they draw, and that the pages show them."""

import re
from pathlib import Path

import numpy as np
import pytest

import tf_lowbit as tfl
from tools import plots

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Shown on another page than the one of the figure's name.
PAGES = {"stages": "progressive"}

quantizers = tfl.quantizers
# Each by hand, at 2 bits: quantizer, inputs, values of variables, outputs, gradients.
BY_HAND = {
    "DoReFa activations": (
        quantizers.DoReFaActivationQuantizer(2),
        ([-1.0, 0.2, 0.6, 2.0], (), {}),
        [0.0, 1 / 3, 2 / 3, 1.0],
        [0, 1, 1, 0],
    ),
    "PACT": (
        quantizers.PACTActivationQuantizer(2),
        ([-1.0, 0.5, 3.0], (), {"alpha": 2.0}),
        [0.0, 2 / 3, 2.0],
        [0, 1, 0],
    ),
    "LSQ weights": (
        quantizers.LSQWeightQuantizer(2),
        ([-2.0, -0.6, 0.3, 2.0], (), {"step": 0.5}),
        [-1.0, -0.5, 0.5, 0.5],
        [0, 1, 1, 0],
    ),
    "uniform, signed": (
        quantizers.UniformActivationQuantizer(2, signed=True),
        ([-3.0, -0.9, 0.3, 3.0], (), {"clip": 1.0}),
        [-1.0, -1.0, 0.0, 1.0],
        [0, 1, 1, 0],
    ),
    # The zeros bring the mean magnitude to 4 / 8.
    "StatsQ": (
        quantizers.StatsQWeightQuantizer(2),
        ([-2.0, 0.1, 1.9], [0.0] * 5, {}),
        [-1.0, 1 / 3, 1.0],
        [1, 1, 1],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_curve_is_that_of_the_quantizer(name):
    quantizer, (inputs, others, ranges), outputs, gradients = BY_HAND[name]
    found = plots.curve(quantizer, inputs, others, **ranges)
    np.testing.assert_allclose(found[0], outputs, rtol=1e-6)
    np.testing.assert_allclose(found[1], gradients)


def test_every_figure_is_made_and_shown_on_its_page():
    names = set(plots.figures())
    assert {path.stem for path in plots.FOLDER.iterdir()} == names
    shown = {
        (path.stem, figure)
        for path in (DOCS / "methods").glob("*.md")
        for figure in re.findall(
            r"!\[.+\]\(\.\./figures/(\w+)\.svg\)", path.read_text()
        )
    }
    assert shown == {(PAGES.get(name, name), name) for name in names}


def test_the_figures_of_quantizers_are_those_that_are_drawn():
    for page, panels in plots.PANELS.items():
        drawn = (plots.FOLDER / f"{page}.svg").read_text()
        for title, _, _ in panels:
            assert f">{title}</text>" in drawn, page


def test_the_diagram_shows_the_graphs():
    """By hand: what each layer reads, and the bits of its quantizer."""
    before, after = map(plots.drawn_nodes, plots.networks_of_the_diagram())
    assert {name: read for name, (_, _, read) in before.items()} == {
        "image": [],
        "conv1": ["image"],
        "conv2": ["conv1"],
        "norm": ["conv2"],
        "add": ["norm", "conv1"],
        "relu": ["add"],
        "pool": ["relu"],
        "head": ["pool"],
    }
    assert before["conv1"][:2] == ("conv1: Conv2D with ReLU", None)
    changed = {
        "image_quantizer": ("values at 8 bits", "activation", ["image"]),
        "conv1": ("Conv2D, weights at 8 bits", "weight", ["image_quantizer"]),
        "conv1_relu": ("values at 2 bits", "activation", ["conv1"]),
        "conv2": ("Conv2D, weights at 2 bits", "weight", ["conv1_relu"]),
        "add": ("Add", None, ["norm", "conv1_relu"]),
        "relu": ("values at 8 bits", "activation", ["add"]),
        "head": ("Dense, weights at 8 bits", "weight", ["pool"]),
    }
    assert after == before | {
        name: (f"{name}: {what}", role, read)
        for name, (what, role, read) in changed.items()
    }
    drawn = (plots.FOLDER / "quantize.svg").read_text()
    for label, _, _ in (*before.values(), *after.values()):
        assert f">{label}</text>" in drawn
