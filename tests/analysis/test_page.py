"""The page of a report: what is on it, and what it needs."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.analysis import page, plots
from tf_lowbit.compat import keras, tf

RULES = [
    tfl.PrecisionRule("stem|head", 8, 8, "lsq", "lsq"),
    tfl.PrecisionRule(".*", 2, 2, "lsq", "lsq"),
]
STAGES = [
    tfl.Stage(2, 4, 32, learning_rate=0.1, decay="cosine"),
    tfl.Stage(1, 2, 2),
]
HISTORY = {
    "loss": [1.0, 0.5, 0.25],
    "accuracy": [0.5, 0.75, 0.875],
    "lr": [0.1, 0.1, 0.1],
}
DATA = [(nets.images(4, seed=s), nets.labels(4, seed=s)) for s in range(3)]


def float_network():
    return nets.randomize(nets.chain())


@pytest.fixture(scope="module")
def network():
    model = tfl.quantize(float_network(), RULES)
    tfl.calibrate(model, DATA)
    return model


@pytest.fixture(scope="module")
def full(network, tmp_path_factory):
    """A page with everything, and its folder."""
    folder = tmp_path_factory.mktemp("report")
    exported = tfl.export.to_tflite(network, folder / "net.tflite", [DATA[0][0]])
    verified = tfl.export.verify(folder / "net.tflite", network, [DATA[0][0]])
    path = tfl.report(
        network,
        DATA,
        folder / "net.html",
        history=HISTORY,
        stages=STAGES,
        exported=exported,
        verified=verified,
        float_model=float_network(),
        figures=folder / "figures" / "png",
    )
    assert path == folder / "net.html"
    return path.read_text(), folder, exported, verified


class Text(HTMLParser):
    """The text of a page, cell by cell, and its tags."""

    def __init__(self, source):
        super().__init__()
        self.cells, self.tags = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if data.strip():
            self.cells.append(" ".join(data.split()))


def svgs(source):
    return [
        ElementTree.fromstring(text)
        for text in re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    ]


def test_what_was_found_is_on_it(full, network):
    source, _, exported, verified = full
    cells = Text(source).cells
    accuracy, baseline = (
        100 * np.mean([np.argmax(model(x), axis=1) == y for x, y in DATA])
        for model in (network, float_network())
    )
    assert cells[cells.index("accuracy on 12 examples") - 1] == f"{accuracy:.2f} %"
    beside = next(i for i, cell in enumerate(cells) if "float network:" in cell)
    assert cells[beside - 1] == f"{baseline:.2f} %"
    assert f"{accuracy - baseline:+.2f} points" in cells[beside]
    cost = tfl.cost(network)
    packed = next(i for i, cell in enumerate(cells) if "of packed parameters" in cell)
    assert cells[packed - 1] == f"{cost.weight_bytes:,}"
    assert f"than the {cost.float_bytes:,} of float" in cells[packed]
    assert cells[cells.index("bytes of the TFLite file") - 1] == f"{exported.size:,}"
    tables = cells.index("Layers with weights")
    for layer in cost.layers:
        row = cells.index(layer.name, tables)
        assert cells[row + 1] == layer.kind
        assert f"{layer.parameters:,}" in cells[row : row + 5]
    for tensor in tfl.statistics(network, DATA, 4):
        row = max(i for i, cell in enumerate(cells) if cell == tensor.name)
        assert cells[row + 1 : row + 6] == [
            str(tensor.bits),
            f"{tensor.step:.4g}",
            f"{tensor.sqnr:.1f}",
            f"{100 * tensor.clip_rate:.2f}",
            f"{tensor.entropy:.2f}",
        ]
    row = cells.index("0.1", cells.index("The stages in figures"))
    assert cells[row - 4 : row + 2] == ["1", "2", "4", "32", "0.1", "cosine"]
    assert ("verified" if verified.ok else "not verified") in cells
    assert " ".join(str(exported).split()) in cells
    assert tfl.__version__ in " ".join(cells)


def test_each_figure_is_there_and_is_for_print_too(full):
    source, folder, *_ = full
    titles = [cell for cell in Text(source).cells if cell in page._TITLES.values()]
    assert titles == list(page._TITLES.values())
    assert len(svgs(source)) == len(page._TITLES)
    found = {path.name for path in (folder / "figures" / "png").iterdir()}
    assert found == {f"{name}.png" for name in page._TITLES}
    for path in (folder / "figures" / "png").iterdir():
        pixels = tf.io.decode_png(path.read_bytes())
        # As wide as a column of print; drawn on white, and not empty.
        assert pixels.shape[1] == round(plots._WIDTH * 300)
        assert len(np.unique(pixels)) > 10


def test_it_needs_nothing_else_and_follows_light_and_dark(full):
    source, folder, *_ = full
    for tag, attributes in Text(source).tags:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "onload"} & set(attributes)
    assert not re.search(r"url\((?!#)|@import|@font-face", source)
    assert "prefers-color-scheme: dark" in source
    # Nothing is drawn in black: it could not be seen on dark ground.
    assert not re.search(r"#000000|fill: ?black|stroke: ?black", source)
    for drawing in svgs(source):
        texts = list(drawing.iter("{http://www.w3.org/2000/svg}text"))
        assert texts
        assert {text.get("fill") for text in texts} == {"currentColor"}
    assert {path.name for path in folder.iterdir()} == {
        *("net.html", "net.tflite", "figures")
    }


def test_weight_layers_come_first_and_the_others_are_folded(full, network):
    source, *_ = full
    open_part = re.sub(r"<details>.*?</details>", "", source, flags=re.DOTALL)
    layers = tfl.cost(network).layers
    others = [layer for layer in layers if not layer.weight_bits]
    assert 0 < len(others) < len(layers)
    for layer in layers:
        assert (f"<tr><td>{layer.name}</td>" in open_part) == (layer not in others)
    assert f"({len(others)})</summary>" in source


def test_bars_points_and_cells_say_what_they_are(full, network):
    source, *_ = full
    tips = re.findall(r"<title>(.*?)</title>", source)
    layer = next(layer for layer in tfl.cost(network).layers if layer.name == "mid")
    assert (
        f"mid: 2 bits, {layer.weight_bytes:,} bytes of {layer.parameters:,} parameters"
        in tips
    )
    assert f"mid: {layer.bops:,} bit operations" in tips
    assert "loss, epoch 2: 0.5" in tips
    assert sum("predicted as" in tip for tip in tips) > 1
    assert plots.TIP not in source


def test_light_and_dark_have_one_palette(full):
    source, *_ = full
    for name, (light, dark) in plots.PALETTE.items():
        # Each where the page sets it, and nowhere else.
        assert source.count(f"--{name}: {light};") == source.count(light) == 1
        assert source.count(f"--{name}: {dark};") == 1
    used = set(re.findall(r"var\(--([\w-]+)\)", "".join(map(drawn, svgs(source)))))
    assert {"weight", "activation", "bits-2", "bits-8"} <= used
    assert used <= set(plots.PALETTE)


def drawn(svg):
    return ElementTree.tostring(svg, encoding="unicode")


# A page in a frame, for windows are not as narrow as telephones. Measured: how far it
# reaches beyond the frame, texts of figures that lie on one another, and the height of
# the smallest.
FRAME = """
<iframe id=frame style="border: 0; width: {width}px; height: 3000px" srcdoc="{page}">
</iframe>
<script>
onload = () => {{
  const page = document.getElementById("frame").contentDocument;
  const texts = [...page.querySelectorAll("svg text")];
  const boxes = texts.map(text => text.getBoundingClientRect());
  const lie = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const overlapping = [];
  boxes.forEach((a, i) => boxes.slice(0, i).forEach((b, j) => {{
    if (lie(a, b)) overlapping.push([texts[i].textContent, texts[j].textContent]);
  }}));
  document.body.innerHTML = "<pre>" + JSON.stringify({{
    reach: page.documentElement.scrollWidth,
    outside: [...page.querySelectorAll("svg, h1, h2, figure, .numbers div")]
      .filter(e => e.getBoundingClientRect().right > {width}).map(e => e.tagName),
    overlapping,
    smallest: Math.min(...boxes.map(box => box.height)),
    texts: texts.length,
    ground: page.defaultView.getComputedStyle(page.body).backgroundColor,
  }}) + "</pre>";
}};
</script>
"""


def in_browsers(test):
    """Marks a test for each width and color scheme, where there is a browser."""
    test = pytest.mark.parametrize("width", [390, 1280])(test)
    test = pytest.mark.parametrize("scheme", ["light", "dark"])(test)
    needs = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
    return pytest.mark.slow(needs(test))


def browse(source, folder, scheme, *options):
    """Opens a page in Debian's chromium, and returns what that prints."""
    path = folder / "frame.html"
    path.write_text(source)
    return subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu"),
            *("--hide-scrollbars", "--force-device-scale-factor=1", *options),
            f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            f"--user-data-dir={folder / 'profile'}",
            path.as_uri(),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


@in_browsers
def test_a_browser_shows_it_whole(full, tmp_path, width, scheme):
    frame = FRAME.format(width=width, page=html.escape(full[0]))
    printed = browse(frame, tmp_path, scheme, "--window-size=1400,3000", "--dump-dom")
    found = json.loads(re.search(r"<pre>(.*?)</pre>", printed)[1])
    assert found["reach"] <= width
    assert found["outside"] == []
    assert found["texts"] > 50
    assert found["overlapping"] == []
    assert found["smallest"] >= 7
    ground = "rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 28)"
    assert found["ground"] == ground


SCALE = 8
# The mean absolute difference of the thumbnails, in gray levels of 255. A page without
# its palette differs by 2.1 to 5.5, without its first chart by 2.8 to 5.0, unstyled by
# 29 or more, in the other scheme by 200.
TOLERANCE = 1.5


def font() -> str:
    """The file of the font that a browser takes, or "" without fontconfig."""
    if not shutil.which("fc-match"):
        return ""
    return subprocess.check_output(["fc-match", "system-ui", "file"], text=True)


@pytest.mark.skipif("DejaVuSans.ttf" not in font(), reason="needs fonts-dejavu-core")
@in_browsers
def test_it_looks_as_it_did(full, tmp_path, width, scheme):
    """Compares the top of the page with a thumbnail, on which no text can be read.

    `TF_LOWBIT_THUMBNAILS=new` writes the thumbnails anew: look at the page before.
    """
    height = 900
    frame = (
        f'<body style="margin: 0"><iframe srcdoc="{html.escape(full[0])}" '
        f'style="border: 0; width: {width}px; height: {height}px"></iframe>'
    )
    shot = tmp_path / "shot.png"
    # The window is larger than the frame: part of its height shows no page.
    browse(frame, tmp_path, scheme, "--window-size=1400,1100", f"--screenshot={shot}")
    shown = Image.open(shot).convert("RGB").crop((0, 0, width, height))
    shown = shown.resize((width // SCALE, height // SCALE), Image.Resampling.BOX)
    committed = Path(__file__).with_name(f"page_{width}_{scheme}.png")
    if os.environ.get("TF_LOWBIT_THUMBNAILS") == "new":
        shown.save(committed, optimize=True)
    expected = Image.open(committed).convert("RGB")
    difference = np.abs(np.asarray(shown, float) - np.asarray(expected, float))
    assert difference.mean() < TOLERANCE


@pytest.mark.slow
def test_the_same_network_gives_the_same_page(network, tmp_path):
    first, second = (
        tfl.report(network, DATA, tmp_path / f"{i}.html").read_text() for i in (1, 2)
    )
    assert first == second


def test_without_data_it_is_about_the_weights(network, tmp_path):
    text = Text(tfl.report(network, path=tmp_path / "net.html").read_text())
    assert "mid/kernel" in text.cells
    assert "relu1/output" not in text.cells
    assert not any("accuracy on" in cell for cell in text.cells)
    titles = [cell for cell in text.cells if cell in page._TITLES.values()]
    assert len(titles) == 4


def test_without_labels_there_is_no_accuracy(network, tmp_path):
    data = tf.data.Dataset.from_tensors(DATA[0][0])
    text = Text(tfl.report(network, data, tmp_path / "net.html").read_text())
    assert "relu1/output" in text.cells
    assert not any("accuracy on" in cell for cell in text.cells)


@pytest.mark.slow
def test_a_name_is_no_markup(tmp_path):
    image = keras.Input((4,))
    x = keras.layers.Dense(3, name="in")(image)
    x = keras.layers.Dense(3, name="mid")(keras.layers.ReLU(name="a")(x))
    x = keras.layers.Dense(3, name="out")(x)
    model = keras.Model(image, x, name="<b>net</b>")
    model = tfl.quantize(model, tfl.PrecisionRule(".*", 2, 2))
    source = tfl.report(model, path=tmp_path / "net.html").read_text()
    assert "&lt;b&gt;net&lt;/b&gt;" in source
    assert "<b>net" not in source


def test_the_figures_show_the_numbers(network):
    cost, measured = tfl.cost(network), tfl.statistics(network, DATA)
    confusion = np.array([[3, 1], [0, 2]])
    drawn = plots.figures(cost, measured, confusion, HISTORY, STAGES)
    kernels = [layer for layer in cost.layers if layer.weight_bits]
    for name, what in (("bit_map", "weight_bytes"), ("operations", "bops")):
        (axes,) = drawn[name].axes
        values = [getattr(layer, what) for layer in kernels]
        assert [bar.get_width() for bar in axes.patches] == values
        ticks = [tick.get_text() for tick in axes.get_yticklabels()]
        assert ticks == [layer.name for layer in kernels]
        colors = {bar.get_facecolor() for bar in axes.patches}
        assert len(colors) == len({layer.weight_bits for layer in kernels}) == 2
        (legend,) = drawn[name].legends
        assert [t.get_text() for t in legend.get_texts()] == ["2 bits", "8 bits"]
    (axes,) = drawn["confusion"].axes
    cells = {
        (round(cell.get_y() + 0.5), round(cell.get_x() + 0.5)) for cell in axes.patches
    }
    assert cells == {(0, 0), (0, 1), (1, 1)}
    texts = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "3", (0, 1): "1", (1, 1): "2"}
    (axes,) = drawn["sqnr"].axes
    assert [bar.get_width() for bar in axes.patches] == [t.sqnr for t in measured]
    for role in ("weight", "activation"):
        own = [tensor for tensor in measured if tensor.role == role]
        shown = [axes for axes in drawn[f"{role}_levels"].axes if axes.get_visible()]
        assert [axes.get_title() for axes in shown] == [tensor.name for tensor in own]
        for axes, tensor in zip(shown, own, strict=True):
            counts, edges, _ = axes.patches[0].get_data()
            np.testing.assert_array_equal(counts, tensor.counts)
            np.testing.assert_array_equal(edges, tensor.edges)
            if tensor.bits == 2:
                ticks = [tick.get_text() for tick in axes.get_xticklabels()]
                assert ticks == [str(code) for code in tensor.codes]
    weights, activations = drawn["stages"].axes[0].patches
    np.testing.assert_allclose(np.round(weights.get_data()[0]), [4, 2])
    np.testing.assert_allclose(np.round(activations.get_data()[0]), [31, 2], atol=1)
    np.testing.assert_array_equal(weights.get_data()[1], [0, 2, 3])
    losses, others = drawn["history"].axes
    for axes, name in ((losses, "loss"), (others, "accuracy")):
        curve = axes.lines[0]
        assert curve.get_label() == name
        np.testing.assert_array_equal(curve.get_ydata(), HISTORY[name])
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [name]


def test_many_classes_have_no_confusion_matrix(network):
    cost, measured = tfl.cost(network), tfl.statistics(network)
    for classes in (plots.MOST_CLASSES, plots.MOST_CLASSES + 1):
        drawn = plots.figures(cost, measured, np.eye(classes, dtype=int))
        assert ("confusion" in drawn) == (classes == plots.MOST_CLASSES)


def test_a_trainer_and_a_float_network_of_keras3_are_reported(network, tmp_path):
    keras3 = pytest.importorskip("keras")
    float_model = keras3.Sequential(
        [keras3.Input((8, 8, 1)), keras3.layers.Flatten(), keras3.layers.Dense(10)]
    )
    path = tfl.report(
        tfl.LowBitTrainer(network),
        None,
        tmp_path / "net.html",
        float_model=float_model,
    )
    assert path.exists()


@pytest.mark.slow
def test_what_cannot_be_reported(network, tmp_path, monkeypatch):
    path = tmp_path / "net.html"
    path.write_text("an older one")
    endless = tf.data.Dataset.from_tensors(DATA[0]).repeat()
    with pytest.raises(ValueError, match=r"must be finite.*an endless dataset"):
        tfl.report(network, endless, path)
    with pytest.raises(ValueError, match=r"at least one batch\. Received: none"):
        tfl.report(network, [], path)
    with pytest.raises(ValueError, match=r"read only once\. Received: generator"):
        tfl.report(network, (batch for batch in DATA), path)
    with pytest.raises(ValueError, match="nothing is quantized"):
        tfl.report(nets.chain(), None, path)
    with pytest.raises(ValueError, match="float_model must be of type Model"):
        tfl.report(network, None, path, float_model="net.h5")
    with pytest.raises(FileNotFoundError, match=r"folder must exist\. Rec.*absent'$"):
        tfl.report(network, None, tmp_path / "absent" / "net.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"\.\[report\]"):
        tfl.report(network, None, path)
    assert path.read_text() == "an older one"
    assert [file.name for file in tmp_path.iterdir()] == ["net.html"]
