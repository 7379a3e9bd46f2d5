"""The page of a report: what is on it, and what it needs."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tf
from tf_lowbit.reporting import page, plots

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


@pytest.fixture(scope="module")
def network():
    model = tfl.quantize(nets.randomize(nets.chain()), RULES)
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
    outputs = np.concatenate([network(x) for x, _ in DATA])
    labels = np.concatenate([y for _, y in DATA])
    accuracy = 100 * (outputs.argmax(axis=1) == labels).mean()
    assert f"{accuracy:.2f} %" in cells
    assert "accuracy on 12 examples" in cells
    cost = tfl.cost(network)
    assert f"{cost.weight_bytes:,}" in cells
    for layer in cost.layers:
        row = cells.index(layer.name)
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
    row = cells.index("0.1")
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
        # Nine inches; drawn on white, and not empty.
        assert pixels.shape[1] == 9 * 300
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


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_a_browser_shows_it_light_and_dark_and_narrow(full, tmp_path):
    _, folder, *_ = full

    def shown(name, width, *flags):
        subprocess.run(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu"),
                *("--hide-scrollbars", f"--window-size={width},4000", *flags),
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--screenshot={tmp_path / name}",
                (folder / "net.html").as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        return tf.io.decode_png((tmp_path / name).read_bytes())[..., :3].numpy()

    light = shown("light.png", 1100)
    dark = shown(
        "dark.png", 1100, "--blink-settings=preferredColorScheme=0", "--force-dark-mode"
    )
    assert np.median(light) == 255
    assert np.median(dark) < 40
    # As much is written and drawn on either ground.
    marks = [
        (np.abs(picture.astype(int) - picture[0, 0]).max(axis=-1) > 60).mean()
        for picture in (light, dark)
    ]
    assert marks[0] > 0.02
    assert marks[1] == pytest.approx(marks[0], rel=0.25)
    # On a narrow screen tables scroll by themselves, and nothing sticks out.
    narrow = shown("narrow.png", 500)
    assert np.all(narrow[:, -8:] == 255)


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
    assert len(titles) == 3


def test_without_labels_there_is_no_accuracy(network, tmp_path):
    data = tf.data.Dataset.from_tensors(DATA[0][0])
    text = Text(tfl.report(network, data, tmp_path / "net.html").read_text())
    assert "relu1/output" in text.cells
    assert not any("accuracy on" in cell for cell in text.cells)


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
    drawn = plots.figures(cost, measured, HISTORY, STAGES)
    sizes, operations = drawn["cost"].axes
    kernels = [layer for layer in cost.layers if layer.weight_bits]
    assert [bar.get_width() for bar in sizes.patches] == [
        layer.weight_bytes for layer in kernels
    ]
    assert [bar.get_width() for bar in operations.patches] == [
        layer.bops for layer in kernels
    ]
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
    assert [line.get_label() for line in losses.lines] == ["loss"]
    assert [line.get_label() for line in others.lines] == ["accuracy"]
    np.testing.assert_array_equal(others.lines[0].get_ydata(), HISTORY["accuracy"])


def test_what_cannot_be_reported(network, tmp_path, monkeypatch):
    path = tmp_path / "net.html"
    path.write_text("an older one")
    endless = tf.data.Dataset.from_tensors(DATA[0]).repeat()
    with pytest.raises(ValueError, match=r"must end.*Received: an endless dataset"):
        tfl.report(network, endless, path)
    with pytest.raises(ValueError, match=r"at least one batch\. Received: none"):
        tfl.report(network, [], path)
    with pytest.raises(ValueError, match=r"read only once\. Received: generator"):
        tfl.report(network, (batch for batch in DATA), path)
    with pytest.raises(ValueError, match="nothing is quantized"):
        tfl.report(nets.chain(), None, path)
    with pytest.raises(ValueError, match="Received: LowBitTrainer"):
        tfl.report(tfl.LowBitTrainer(network), None, path)
    with pytest.raises(FileNotFoundError, match=r"folder must exist\. Rec.*absent'$"):
        tfl.report(network, None, tmp_path / "absent" / "net.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"\.\[report\]"):
        tfl.report(network, None, path)
    assert path.read_text() == "an older one"
    assert [file.name for file in tmp_path.iterdir()] == ["net.html"]
