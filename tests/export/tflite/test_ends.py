"""What files take and put out: pixels and codes, against the trained network."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import (
    IMAGE,
    Rule,
    conv_bn_relu,
    finished,
    layers,
    randomize,
)
from tf_lowbit import export
from tf_lowbit.compat import keras
from tf_lowbit.export import Runner
from tf_lowbit.network import inspection

INNER = Rule(".*", 4, 4, "lsq", "lsq")
EDGES = [Rule("first|head", 8, 8, "lsq", "lsq"), INNER]
SAME = [Rule("first|head", 8, 8, "uniform", "uniform"), INNER]
PIXELS = np.random.default_rng(1).integers(0, 256, (24, *IMAGE)).astype(np.uint8)
PIXELS.reshape(-1)[:2] = 0, 255
UNIT, RAW = 1 / 255, 1.0
SCALES = {UNIT: float(np.float32(UNIT)), RAW: 1.0}
# What stands in front of the first layer, and what a pixel is in the network's input.
FRONTS = {
    "[0, 1]": (UNIT, ()),
    "[0, 255]": (RAW, ()),
    "x / 255": (RAW, (lambda: layers.Rescaling(UNIT),)),
    "x / 127.5 - 1": (RAW, (lambda: layers.Rescaling(1 / 127.5, -1.0),)),
    "2 x - 1": (UNIT, (lambda: layers.Rescaling(2.0, -1.0),)),
    "by channel": (
        UNIT,
        (lambda: layers.Normalization(mean=[0.3, 0.4], variance=[0.1, 0.2]),),
    ),
    "twice": (
        RAW,
        (
            lambda: layers.Rescaling(UNIT),
            lambda: layers.Normalization(mean=[0.3, 0.4], variance=[0.1, 0.2]),
        ),
    ),
    "x / 255, padded": (
        RAW,
        (lambda: layers.Rescaling(UNIT), lambda: layers.ZeroPadding2D(1)),
    ),
}
# The padding's zeros want a grid in front of the trained one.
ROUNDED = {
    "x / 127.5 - 1, padded": (
        RAW,
        (lambda: layers.Rescaling(1 / 127.5, -1.0), lambda: layers.ZeroPadding2D(1)),
    ),
}
ALL = FRONTS | ROUNDED


def inputs(scale, pixels=PIXELS):
    return (pixels * np.float32(scale)).astype(np.float32)


def body(x):
    x = conv_bn_relu(x, 4, name="first", padding="valid")
    return conv_bn_relu(x, 4, name="inner")


def trained(front=(), scale=UNIT, rules=EDGES, data=None, moved=0.9):
    """Calibrated, and the step of the image's quantizer moved as training moves it."""
    x = image = keras.Input(IMAGE, name="image")
    for make in front:
        x = make()(x)
    model = tfl.quantize(finished(image, body(x)), rules)
    data = inputs(scale) if data is None else data
    tfl.calibrate(model, [data])
    for tensor in inspection.quantized_tensors(model):
        if (
            tensor.role == "activation"
            and tensor.bits == 8
            and "step" in tensor.variables
        ):
            step = tensor.variables["step"]
            step.assign(step * np.float32(moved))
    return model


def written(model, path, data, **options):
    """The export, the file's bytes and the report, which must be ok."""
    made = export.to_tflite(model, path / "n.tflite", [data], verbose=0, **options)
    content = made.path.read_bytes()
    report = export.verify(content, model, [data], verbose=0)
    assert report.ok, report.failures
    assert report.mismatches == report.end_to_end == 0 < report.codes
    return made, content, report


def outputs(content, x):
    """Values of the only output, dequantized as its tensor says."""
    runner = Runner(content)
    (detail,) = runner.outputs
    (found,) = runner(x).values()
    if found.dtype == np.float32:
        return found
    scale, zero_point = detail["quantization"]
    return (found.astype(np.float32) - zero_point) * np.float32(scale)


def error(found, wanted):
    return float(np.abs(found - wanted).mean() / np.std(wanted))


# --- pixels in ------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ALL)
def test_raw_pixels_give_what_the_trained_network_gives(name, tmp_path):
    scale, front = ALL[name]
    model, x = trained(front, scale), inputs(scale)
    target = "portable" if name in ("[0, 1]", "2 x - 1") else "xnnpack"
    made, content, report = written(
        model, tmp_path, x, input_type="uint8", target=target
    )
    (detail,) = Runner(content).inputs
    assert detail["dtype"] == np.uint8
    assert detail["quantization"] == (SCALES[scale], 0)
    found = outputs(content, PIXELS)
    np.testing.assert_allclose(found, made.twin(x), rtol=1e-4, atol=1e-5)
    assert error(found, model(x, training=False).numpy()) < 0.01
    if name in FRONTS:
        (row,) = [r for r in report.agreements if r.tensor.endswith("_quantizer")]
        assert row.levels == 256
        assert row.equal == row.elements


@pytest.mark.slow
@pytest.mark.parametrize("name", ["[0, 1]", "x / 255"])
def test_a_grid_that_is_the_pixels_needs_no_operator(name, tmp_path):
    scale, front = FRONTS[name]
    *_, report = written(
        trained(front, scale, SAME), tmp_path, inputs(scale), input_type="uint8"
    )
    assert report.operators["QUANTIZE"] == 1
    assert "DEPTHWISE_CONV_2D" not in report.operators


@pytest.mark.slow
@pytest.mark.parametrize("first_layer", ["int8", "float"])
@pytest.mark.parametrize("name", ["[0, 255]", "x / 255", "2 x - 1"])
def test_a_first_layer_that_was_trained_in_float(name, first_layer, tmp_path):
    scale, front = FRONTS[name]
    model, x = trained(front, scale, [INNER]), inputs(scale)
    _, content, _ = written(
        model, tmp_path, x, input_type="uint8", first_layer=first_layer
    )
    assert error(outputs(content, PIXELS), model(x, training=False).numpy()) < 0.01


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["x / 255", "2 x - 1"])
def test_int8_in_front_of_a_scaling_is_pixels_less_128(name, tmp_path):
    scale, front = FRONTS[name]
    model, x = trained(front, scale), inputs(scale)
    _, content, _ = written(model, tmp_path, x, input_type="int8")
    (detail,) = Runner(content).inputs
    assert detail["quantization"] == (SCALES[scale], -128)
    codes = (PIXELS.astype(np.int32) - 128).astype(np.int8)
    found = outputs(content, codes)
    assert error(found, model(x, training=False).numpy()) < 0.01


@pytest.mark.slow
def test_int8_codes_of_a_quantizer_of_the_input_are_its_own(tmp_path):
    model, x = trained(), inputs(UNIT)
    _, content, _ = written(model, tmp_path, x, input_type="int8")
    (detail,) = Runner(content).inputs
    scale, zero_point = detail["quantization"]
    assert scale == pytest.approx(0.9 * UNIT, rel=1e-5)
    codes = np.clip(np.rint(x / scale) + zero_point, -128, 127).astype(np.int8)
    found = outputs(content, codes)
    assert error(found, model(x, training=False).numpy()) < 0.01


@pytest.mark.slow
def test_dark_pixels_are_pixels(tmp_path):
    dark = PIXELS // 16
    x = inputs(RAW, dark)
    model = trained((), RAW, [INNER], x)
    _, content, _ = written(model, tmp_path, x, input_type="uint8")
    assert error(outputs(content, dark), model(x, training=False).numpy()) < 0.05


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("calibrated", "data"),
    [
        (inputs(UNIT) - 0.5, inputs(UNIT) - 0.5),
        (inputs(UNIT) - 0.5, inputs(UNIT)),
        (inputs(1.5 * UNIT), inputs(1.5 * UNIT)),
        (inputs(2.0), inputs(2.0)),
    ],
    ids=["below 0", "calibrated below 0", "up to 1.5", "up to 510"],
)
def test_inputs_that_are_no_pixels_are_refused(calibrated, data, tmp_path):
    model = trained(data=calibrated)
    path = tmp_path / "n.tflite"
    with pytest.raises(
        export.ExportError, match=r"Rescaling.*Received: 'image' in \[.*on the data"
    ):
        export.to_tflite(model, path, [data], input_type="uint8", verbose=0)
    assert not path.exists()


@pytest.mark.quick(1)
@pytest.mark.parametrize("target", ["portable", "tflm"])
def test_a_sensors_numbers_are_normalized_outside_of_the_network(target, tmp_path):
    x = inputs(UNIT) - 0.5
    model = trained(FRONTS["by channel"][1], data=x)
    with pytest.raises(
        export.ExportError,
        match=r"'int8' takes pixels here.*outside of the network.*in \[-0\.5, 0\.5\]",
    ):
        export.to_tflite(
            model, tmp_path / "n", [x], target=target, input_type="int8", verbose=0
        )
    # Then they are codes, without a rounding that training did not have.
    made, _, _ = written(trained(data=x), tmp_path, x, target=target, input_type="int8")
    assert "image" not in {note.layer for note in made.notes}


@pytest.mark.slow
def test_pixels_are_known_by_data(tmp_path):
    with pytest.raises(ValueError, match=r"data must be given.*'image'"):
        export.to_tflite(trained(), tmp_path / "n", input_type="uint8", verbose=0)


# --- codes out ------------------------------------------------------------------------


def dense_end(x):
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))


def conv_end(x):
    return layers.Conv2D(3, 1, name="head")(x)


def relu_end(x):
    return layers.ReLU(name="head_relu")(layers.Conv2D(8, 1, name="head")(x))


def ending(*ends, rules=EDGES):
    """A calibrated network of these ends."""
    image = keras.Input(IMAGE, name="image")
    x = body(image)
    model = tfl.quantize(
        randomize(keras.Model(image, [end(x) for end in ends])),
        [Rule("head_relu", None, 4, "lsq", "lsq"), *rules],
    )
    tfl.calibrate(model, [inputs(UNIT)])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["int8", "uint8"])
@pytest.mark.parametrize("end", [dense_end, conv_end, relu_end])
def test_ends_put_out_codes(end, output_type, tmp_path):
    model, x = ending(end), inputs(UNIT)
    made, content, report = written(model, tmp_path, x, output_type=output_type)
    (detail,) = Runner(content).outputs
    assert detail["dtype"] == np.dtype(output_type)
    assert "DEQUANTIZE" not in report.operators
    wanted = made.twin(x).numpy()
    np.testing.assert_allclose(outputs(content, x), wanted, rtol=1e-6)
    assert len(np.unique(wanted)) > 4
    floats = export.to_tflite(model, tmp_path / "f", [x], head="int8", verbose=0)
    np.testing.assert_allclose(
        outputs(floats.path.read_bytes(), x), wanted, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_an_end_that_is_read_puts_out_codes_too(tmp_path):
    image = keras.Input(IMAGE, name="image")
    first = conv_end(body(image))
    second = layers.Conv2D(2, 1, name="last")(layers.Activation("tanh")(first))
    model = tfl.quantize(randomize(keras.Model(image, [first, second])), EDGES)
    x = inputs(UNIT)
    tfl.calibrate(model, [x])
    with pytest.raises(export.ExportError, match="Received: 'last', floats of 'last"):
        written(model, tmp_path, x, output_type="int8")
    model = tfl.quantize(
        randomize(keras.Model(image, [first, second])),
        [Rule("last", 8, 8, "lsq", "lsq"), *EDGES],
    )
    tfl.calibrate(model, [x])
    _, content, _ = written(model, tmp_path, x, output_type="int8")
    assert {d["dtype"] for d in Runner(content).outputs} == {np.int8}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "tanh"])
def test_float_ends_are_refused_by_name(name, tmp_path):
    model = ending(lambda x: layers.Activation(name, name="end")(dense_end(x)))
    path = tmp_path / "n.tflite"
    with pytest.raises(
        export.ExportError, match=r"output_type='float32'.*Received: 'end', floats"
    ):
        export.to_tflite(model, path, [inputs(UNIT)], output_type="int8", verbose=0)
    assert not path.exists()


@pytest.mark.slow
def test_a_float_head_that_is_asked_for_is_refused(tmp_path):
    with pytest.raises(export.ExportError, match=r"head='int8'.*Received: 'head'"):
        export.to_tflite(
            ending(dense_end),
            tmp_path / "n",
            [inputs(UNIT)],
            output_type="int8",
            head="float",
            verbose=0,
        )


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["linear", "softmax"])
@pytest.mark.parametrize("output_type", [None, "int8", "float32"])
def test_tflite_micro_puts_out_codes_where_there_are_some(
    activation, output_type, tmp_path
):
    pytest.importorskip("tflite_micro")
    model = ending(lambda x: layers.Activation(activation)(dense_end(x)))
    x = inputs(UNIT)

    def exported():
        _, content, _ = written(
            model, tmp_path, x, target="tflm", output_type=output_type
        )
        return export.MicroRunner(content).outputs[0]["dtype"]

    if (activation, output_type) == ("softmax", "int8"):
        with pytest.raises(export.ExportError, match="output_type='int8'"):
            exported()
    else:
        is_float = activation == "softmax" or output_type == "float32"
        assert exported() == (np.float32 if is_float else np.int8)
