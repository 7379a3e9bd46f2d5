import re

import pytest
import rich.console

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras
from tf_lowbit.network import inspection

layers = keras.layers


def net(input_shape=(6, 6, 2), name="small_net", mid="mid"):
    x = image = keras.Input(input_shape, name="image")
    x = layers.ReLU(name="relu1")(layers.Conv2D(3, 3, name="stem")(x))
    x = nets.Separable(5, 3, padding="same", use_bias=False, name=mid)(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(layers.ReLU(name="relu2")(x))
    return keras.Model(image, layers.Dense(4, name="head")(x), name=name)


@pytest.fixture(scope="module")
def quantized():
    return tfl.quantize(net(), [tfl.PrecisionRule(".*", 2, 4)])


def row_of(text, name):
    """The cells of a layer's row; two spaces or more part them."""
    (line,) = [x for x in text.splitlines() if x.split() and x.split()[0] == name]
    return re.split(r"\s{2,}", line.strip())


def test_title_header_rows_totals_and_ratio(quantized):
    text = str(tfl.summary(quantized))
    lines = text.splitlines()
    assert lines[0].strip() == "small_net"
    assert row_of(text, "layer") == [
        "layer",
        "type",
        "output",
        "parameters",
        "weight bits",
        "activation bits",
        "weight bytes",
        "MACs",
        "BOPs",
    ]
    # Kernels: stem 54, mid 27 + 15, head 20 weights.
    assert row_of(text, "stem") == [
        *("stem", "Conv2D", "4 x 4 x 3", "57", "float", "float", "228"),
        *("864", "884,736"),
    ]
    assert row_of(text, "mid") == [
        *("mid", "Separable", "4 x 4 x 5", "42", "2", "4/float", "11"),
        *("672", f"{16 * 27 * 8 + 16 * 15 * 64:,}"),
    ]
    # Nothing is multiplied with a kernel: no bits, no MACs, no zeros.
    assert row_of(text, "bn") == ["bn", "BatchNormalization", "4 x 4 x 5", "20", "80"]
    assert row_of(text, "head")[:4] == ["head", "Dense", "4", "24"]
    total = 884_736 + 16 * 27 * 8 + 16 * 15 * 64 + 20 * 1024
    assert row_of(text, "total") == [
        *("total", "143", "415", "1,556", f"{total:,}"),
    ]
    assert lines[-1].strip() == "0.726 of the 572 bytes at float32"


def test_a_notebook_shows_the_table(quantized):
    for shown in (tfl.summary(quantized), tfl.cost(quantized)):
        page = shown._repr_html_()
        assert page.startswith("<pre")
        for line in str(shown).splitlines():
            for cell in re.split(r"\s{2,}", line.strip()):
                assert cell in re.sub(r"<[^>]*>", "", page)
    assert str(tfl.summary(quantized)) == str(tfl.cost(quantized))


def test_every_layer_with_parameters_has_one_row_in_order(quantized):
    text = str(tfl.summary(quantized))
    first = [line.split()[0] for line in text.splitlines() if line.split()]
    assert [word for word in first if word in {x.name for x in quantized.layers}] == [
        *("stem", "mid", "bn", "head")
    ]


def test_columns_are_aligned(quantized):
    lines = str(tfl.summary(quantized)).splitlines()
    wanted = ("layer", "stem", "mid", "total")
    rows = [x for x in lines if x.split() and x.split()[0] in wanted]
    header, stem, mid, _ = rows
    # Numbers end in the same column, as the last heading does; texts begin in one.
    assert len({len(row) for row in rows}) == 1
    assert len({len(row) - len(row.lstrip()) for row in rows}) == 1
    assert header.index("type") == stem.index("Conv") == mid.index("Sep")


@pytest.mark.parametrize("force", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_is_plain_text(quantized, monkeypatch, force):
    monkeypatch.setenv(force, "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "20")
    text = str(tfl.summary(quantized))
    assert "\x1b" not in text
    assert "…" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert not text.startswith("\n")
    assert not text.endswith("\n")


@pytest.mark.parametrize("length", [60, 200, 500])
def test_long_names_are_not_cut(length):
    name = "n" * length
    text = str(tfl.summary(net(mid=name)))
    assert row_of(text, name)[1] == "Separable"
    assert "…" not in text


@pytest.mark.parametrize("name", ["net[v1]", "net[bold]x[/bold]", "net:smile:"])
def test_a_models_name_is_no_markup(name):
    assert str(tfl.summary(net(name=name))).splitlines()[0].strip() == name


@pytest.mark.slow
def test_open_sizes_are_question_marks():
    text = str(tfl.summary(net((None, 6, 2))))
    assert row_of(text, "stem")[2] == "? x 4 x 3"
    assert row_of(text, "stem")[-2:] == ["?", "?"]
    assert row_of(text, "head")[-2:] == ["20", "20,480"]
    assert row_of(text, "total")[-2:] == ["?", "?"]


def test_bits_assigned_afterwards_change_the_table():
    model = tfl.quantize(net(), [tfl.PrecisionRule(".*", 2, 2)])
    assert row_of(str(tfl.summary(model)), "mid")[4:6] == ["2", "2/float"]
    for tensor in inspection.quantized_tensors(model):
        tensor.assign_bits(32 if tensor.role == "activation" else 3)
    assert row_of(str(tfl.summary(model)), "mid")[4:6] == ["3", "float"]


def test_numbers_are_those_of_cost(quantized):
    assert tfl.summary(quantized).cost == tfl.cost(quantized)


def test_a_rich_console_renders_it_too(quantized, capsys):
    rich.console.Console(width=200).print(tfl.summary(quantized))
    shown = capsys.readouterr().out
    assert "small_net" in shown
    assert "0.726 of the 572 bytes" in shown


def test_a_model_without_parameters():
    image = keras.Input((4,))
    text = str(tfl.summary(keras.Model(image, layers.ReLU()(image))))
    assert row_of(text, "total")[1] == "0"


@pytest.mark.slow
def test_ranges_that_are_mere_defaults_are_named():
    rule = tfl.PrecisionRule(".*", 2, 4, activation_quantizer="pact")
    model = tfl.quantize(net(), [rule])
    waiting = tfl.summary(model).uncalibrated
    assert waiting == ("relu1/output",)
    assert "1 ranges are defaults: call tf_lowbit.calibrate" in str(tfl.summary(model))
    for tensor in inspection.quantized_tensors(model):
        if "calibrated" in tensor.variables:
            tensor.variables["calibrated"].assign(1)
    assert tfl.summary(model).uncalibrated == ()
    assert "ranges are defaults" not in str(tfl.summary(model))
