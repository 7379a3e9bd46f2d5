import functools

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import (
    CLASSES,
    EDGE,
    IMAGE,
    Rule,
    assert_as_trained,
    bn_relu,
    conv_bn_relu,
    images,
    layers,
    network,
    normals,
    prove,
    quantize,
    randomize,
)
from tf_lowbit import export, models
from tf_lowbit.compat import keras
from tf_lowbit.export.integer import kernels, twin
from tf_lowbit.export.options import Options
from tf_lowbit.export.targets import END_TYPES
from tf_lowbit.export.tflite import flatbuffer, writer
from tf_lowbit.export.tflite.runner import Runner

INNER = Rule("inner", 2, 2)


def _body(x):
    x = layers.Add(name="add")([x, conv_bn_relu(x, 4, name="other")])
    x = conv_bn_relu(layers.ReLU(name="add_relu")(x), 4, name="inner")
    return layers.ReLU(name="last_relu")(x)


@functools.cache
def edges_float():
    """First layer and head in float."""
    rules = [Rule("inner|other", 2, 2), Rule("last_relu", None, 2)]
    return quantize(network(_body), rules)


@functools.cache
def edges_trained():
    """Everything is on a grid but the head's input."""
    return quantize(network(_body), [EDGE, Rule("inner|other", 2, 2)])


@functools.cache
def edges_calibrated():
    """As `edges_trained`, on images, which are not negative."""
    model = quantize(network(_body), [EDGE, Rule("inner|other", 2, 2)])
    tfl.calibrate(model, [images()])
    return model


@functools.cache
def snapped(name="edges_float", **options):
    model = {"edges_float": edges_float, "edges_trained": edges_trained}[name]()
    return export.snap(model, [images()], options=Options(**options))


def _operators(content):
    return export.verify(content, edges_float(), verbose=0).operators


# --- options --------------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "portable"},
        {"first_layer": "float", "head": "int8"},
        {"target": "portable", "head": "int8", "input_type": "int8"},
    ],
)
def test_every_choice_leaves_and_is_proved(options):
    proof = prove(edges_float(), images(), **options)
    integer = {layer.name for layer in twin.integer_layers(proof.snapped.twin)}
    assert ("first" in integer) == (options.get("first_layer") != "float")
    assert ("head" in integer) == (options.get("head") == "int8")


@pytest.mark.parametrize("target", ["xnnpack", "portable"])
def test_a_portable_file_decides_as_its_twin_under_builtin_kernels(target):
    x = images(32)
    proof = prove(edges_float(), x, target=target, head="int8")
    outputs = {k: Runner(proof.content, k)(x)["head_values"] for k in kernels.KERNELS}
    wanted = proof.snapped.twin(x).numpy()
    np.testing.assert_array_equal(outputs[kernels.XNNPACK], wanted)
    by_kernel = {
        kernel: sum(sum(d.wrong) for d in proof.report.decisions if d.kernel == kernel)
        for kernel in {d.kernel for d in proof.report.decisions}
    }
    if target == "portable":
        assert set(by_kernel) == set(kernels.KERNELS)
        if not any(by_kernel.values()):
            np.testing.assert_array_equal(outputs[kernels.BUILTIN], wanted)
    else:
        assert set(by_kernel) == {kernels.XNNPACK}


def test_operators_are_those_of_integers():
    content = writer.to_bytes(snapped(head="int8", input_type="int8"))
    assert _operators(content) == {
        "ADD": 1,
        "CONV_2D": 3,
        "DEPTHWISE_CONV_2D": 1,
        "DEQUANTIZE": 1,
        "FULLY_CONNECTED": 1,
        "RESHAPE": 1,
    }


# --- inputs ---------------------------------------------------------------------------


def test_pixels_give_the_codes_of_their_floats():
    pixels = np.random.default_rng(1).integers(0, 256, (16, *IMAGE)).astype(np.uint8)
    x = (pixels / np.float32(255)).astype(np.float32)
    floats, whole = (
        Runner(writer.to_bytes(snapped(input_type=kind)), intermediates=True)
        for kind in ("float32", "uint8")
    )
    wanted, have = floats(x), whole(pixels)
    shared = sorted(set(wanted) & set(have) - {"image"})
    assert len(shared) > 5
    for name in shared:
        np.testing.assert_array_equal(have[name], wanted[name], err_msg=name)


@pytest.mark.quick(2)
@pytest.mark.parametrize("input_type", END_TYPES)
@pytest.mark.parametrize("model", [edges_float, edges_calibrated])
def test_each_input_type_is_proved(model, input_type):
    outside = ["QUANTIZE"] if input_type == "uint8" else []
    proof = prove(model(), images(), input_type, outside)
    (detail,) = Runner(proof.content).inputs
    assert detail["dtype"] == np.dtype(input_type)
    assert detail["name"] == "image"


def test_int8_inputs_need_a_quantized_input():
    made = snapped(first_layer="float", input_type="int8")
    with pytest.raises(export.ExportError, match="'image', read by"):
        writer.to_bytes(made)


@pytest.mark.slow
def test_inputs_below_zero_leave():
    x = normals()
    proof = prove(edges_float(), x)
    grid = proof.layer("image_codes").grid
    assert grid.low < 0 < grid.high
    assert grid.levels == 256


def _two_inputs(order):
    """One input is read two layers later than the other."""
    named = {
        "early": keras.Input(IMAGE, name="early"),
        "late": keras.Input((8, 8, 3), name="late"),
    }
    x = conv_bn_relu(named["early"], 4, name="first")
    y = conv_bn_relu(named["late"], 5, 1, name="second")
    x = layers.Concatenate()([conv_bn_relu(x, 4, name="inner"), y])
    x = conv_bn_relu(x, 4, name="inner2")
    outputs = [
        layers.Dense(CLASSES, name="head")(layers.GlobalAveragePooling2D()(x)),
        layers.Dense(2, name="other_head", activation="softmax")(
            layers.GlobalAveragePooling2D()(y)
        ),
    ]
    model = randomize(keras.Model([named[n] for n in order], outputs))
    return quantize(model, [Rule("inner2?", 2, 2)])


_DATA = {"early": images(8), "late": images(8, (8, 8, 3), seed=1)}


@pytest.mark.quick(1)
@pytest.mark.parametrize("order", [("early", "late"), ("late", "early")])
def test_several_inputs_and_outputs(order):
    model = _two_inputs(order)
    data = [_DATA[name] for name in order]
    made = export.snap(model, [data])
    content = writer.to_bytes(made)
    runner = Runner(content)
    assert [d["name"] for d in runner.inputs] == list(order)
    found = runner(*data)
    for detail, wanted in zip(runner.outputs, made.twin(data), strict=True):
        np.testing.assert_allclose(found[detail["name"]], wanted, rtol=1e-4, atol=1e-4)
    report = export.verify(content, model, [data], verbose=0)
    assert report.ok, report.failures


@pytest.mark.slow
def test_the_signature_names_inputs_and_outputs():
    made = export.snap(_two_inputs(("early", "late")), [[*_DATA.values()]])
    (signature,) = flatbuffer.unpack(writer.to_bytes(made)).signatureDefs
    assert [m.name.decode() for m in signature.inputs] == ["early", "late"]
    assert len(signature.outputs) == 2


@pytest.mark.slow
def test_a_dict_of_inputs_is_data_too():
    model = _two_inputs(("late", "early"))
    made = export.snap(model, [_DATA])
    report = export.verify(writer.to_bytes(made), model, [_DATA], verbose=0)
    assert report.ok, report.failures


@pytest.mark.slow
def test_images_of_any_size():
    def body(x):
        return conv_bn_relu(layers.MaxPooling2D(2)(x), 4, name="inner")

    model = quantize(network(body, (None, None, 2)), [INNER])
    proof = prove(model, images(4, (10, 7, 2)))
    smaller = images(3, (6, 6, 2))
    np.testing.assert_allclose(
        Runner(proof.content)(smaller)["head"],
        proof.snapped.twin(smaller),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.slow
def test_sequences_of_any_length_are_refused_where_they_are_reshaped():
    image = keras.Input((None, 3), name="image")
    x = bn_relu(layers.Conv1D(4, 3, name="first")(image), "first")
    x = bn_relu(layers.Conv1D(4, 3, name="inner")(x), "inner")
    model = quantize(randomize(keras.Model(image, x)), [EDGE, INNER])
    data = normals(4, (9, 3))
    with pytest.raises(export.ExportError, match=r"one open size.*first"):
        prove(model, data)


# --- heads and outputs ----------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("head", ["float", "int8"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "tanh", "layer", "own"])
def test_float_heads(kind, head):
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(conv_bn_relu(image, 4, name="first"), 4, name="inner")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    own = "sigmoid" if kind == "own" else None
    x = layers.Dense(CLASSES, name="head", activation=own)(x)
    if kind == "layer":
        x = layers.Softmax(name="last")(x)
    elif kind != "own":
        x = layers.Activation(kind, name="last")(x)
    model = quantize(randomize(keras.Model(image, x)), [INNER])
    proof = prove(model, images(), head=head)
    made = Runner(proof.content)(images())
    (values,) = made.values()
    np.testing.assert_allclose(values, proof.snapped.twin(images()), atol=1e-5)


@pytest.mark.slow
def test_a_network_that_ends_in_codes():
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(image, 4, name="first")
    x = layers.Conv2D(3, 1, name="inner")(x)
    model = quantize(randomize(keras.Model(image, x)), [EDGE, INNER])
    proof = prove(model, images())
    assert "8 bits" in proof.notes["inner"]


@pytest.mark.slow
def test_one_tensor_is_output_and_read():
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(image, 4, name="first")
    y = conv_bn_relu(x, 4, name="inner")
    y = layers.Dense(2, name="head")(layers.GlobalAveragePooling2D()(y))
    model = randomize(keras.Model(image, [x, y]))
    proof = prove(quantize(model, [EDGE, INNER]), images())
    assert len(Runner(proof.content).outputs) == 2


@pytest.mark.slow
def test_one_tensor_is_two_outputs():
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(image, 4, name="first")
    y = conv_bn_relu(x, 4, name="inner")
    model = randomize(keras.Model(image, [y, layers.Dropout(0.5)(y)]))
    model = quantize(model, [EDGE, INNER, Rule(".*_relu", None, 2)])
    made = export.snap(model, [images()])
    content = writer.to_bytes(made)
    (signature,) = flatbuffer.unpack(content).signatureDefs
    assert len(signature.outputs) == len(model.outputs)


# --- storage --------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("bits", "kind"),
    [(1, "dorefa"), (3, "dorefa"), (3, "lsq"), (4, "uniform")],
)
def test_low_bit_weights_are_stored_in_4_bits(bits, kind):
    def body(x):
        return conv_bn_relu(conv_bn_relu(x, 4, name="other"), 4, name="inner")

    rules = [
        Rule("first", 8, 8, "uniform", "uniform"),
        Rule("inner|other", bits, 2, kind),
        Rule(".*_relu", None, 2),
    ]
    model = quantize(network(body), rules)
    proof = prove(model, images(), "float32", ["CONV_2D"] * 2, storage="int4")
    stored = {
        layer.name: layer.storage for layer in twin.integer_layers(proof.snapped.twin)
    }
    assert stored["inner"] == stored["other"] == "int4"
    assert stored["first"] == "int8"
    assert_as_trained(proof, images())


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "kind"), [(4, "dorefa"), (5, "uniform"), (4, "lsq")])
def test_weights_that_do_not_fit_4_bits_are_refused(bits, kind):
    model = quantize(network(_body), [EDGE, Rule("inner|other", bits, 2, kind)])
    with pytest.raises(export.ExportError, match=f"codes up to .* at {bits} bits"):
        export.snap(model, [images()], options=Options(storage="int4"))


@pytest.mark.slow
def test_depthwise_dense_and_1d_weights_in_4_bits():
    def body(x):
        x = bn_relu(
            layers.DepthwiseConv2D(3, name="deep", depth_multiplier=2)(x), "deep"
        )
        x = layers.Reshape((-1, 8))(x)
        x = bn_relu(layers.Conv1D(4, 3, name="line")(x), "line")
        x = bn_relu(layers.Dense(4, name="wide")(layers.Flatten()(x)), "wide")
        return x

    model = quantize(network(body), [EDGE, Rule("deep|line|wide", 2, 2)])
    # XNNPACK takes the dense layer: it has an even number of inputs.
    outside = ["CONV_2D", "DEPTHWISE_CONV_2D"]
    proof = prove(model, images(), "float32", outside, storage="int4")
    assert {proof.layer(name).storage for name in ("deep", "line", "wide")} == {"int4"}


# --- what a file says of itself -------------------------------------------------------


@pytest.mark.slow
def test_the_metadata_make_the_plan_again():
    made = snapped(head="int8", target="portable", input_type="uint8")
    about = flatbuffer.read_metadata(writer.to_bytes(made))
    assert Options(**about["options"]) == made.options
    assert {k: tuple(v) for k, v in about["ranges"].items()} == made.ranges
    again = export.snap(edges_float(), ranges=about["ranges"], options=made.options)
    assert writer.to_bytes(again) == writer.to_bytes(made)


def test_to_tflite_writes_what_verify_reads(tmp_path):
    path = tmp_path / "net.tflite"
    made = export.to_tflite(edges_float(), path, [images()], verbose=0)
    report = export.verify(
        path, edges_float(), [(images(), np.zeros(16, int))], verbose=0
    )
    assert report.ok
    assert report.predictions.labels == 16
    assert path.stat().st_size == made.size == report.size


# --- the networks of this package -----------------------------------------------------

MODELS = {
    "preact_resnet8": {"width": 4, "input_shape": (12, 12, 1)},
    "plain_cnn": {"width": 4, "input_shape": (14, 14, 1)},
    "mobilenet_v2": {"width": 4, "input_shape": (12, 12, 1), "expansion": 2},
    "resnet18": {"width": 4, "input_shape": (48, 48, 3), "classes": 10},
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", MODELS)
def test_the_networks_of_this_package(name):
    arguments = MODELS[name]
    x = images(4, arguments["input_shape"])
    model = quantize(randomize(models.get(name, **arguments)), [Rule(".*", 2, 2)], 1.0)
    tfl.calibrate(model, [x])
    proof = prove(model, x)
    assert proof.report.end_to_end == 0


@pytest.mark.slow
def test_floats_of_a_signed_grid_are_those_of_its_name(tmp_path):
    keras.utils.set_random_seed(0)
    image = keras.Input((6,))
    x = layers.Dense(8, activation="relu", name="d1")(image)
    x = layers.Dense(8, name="d2")(x)
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    rule = Rule(".*", 4, 4, "uniform", "dorefa", edges=True)
    data = normals(16, (6,))
    low_bit = tfl.quantize(model, [rule])
    tfl.calibrate(low_bit, [data])
    result = export.to_tflite(low_bit, tmp_path / "net.tflite")
    # The head reads floats of a narrow grid, whose scale in the file is not its step.
    (values,) = (x for x in result.twin.layers if isinstance(x, twin.ToValues))
    assert values.factor is not None
    runner = Runner((tmp_path / "net.tflite").read_bytes(), intermediates=True)
    found = runner(data)[values.name]
    own = keras.Model(result.twin.input, values.output)(data).numpy()
    np.testing.assert_array_equal(found, own)
    proof = export.verify(tmp_path / "net.tflite", low_bit, [data], verbose=0)
    assert proof.ok, proof.failures


@pytest.mark.slow
def test_a_float_relu6_goes_into_the_archive(tmp_path):
    image = keras.Input(IMAGE)
    x = layers.Conv2D(4, 3, activation="relu", name="first")(image)
    x = layers.ReLU(6.0, name="six")(layers.Multiply(name="square")([x, x]))
    model = randomize(keras.Model(image, layers.Dense(3, name="head")(x)))
    low_bit = quantize(model, [Rule("first", 4, 4, edges=True)])
    result = export.to_tflite(low_bit, tmp_path / "net.tflite", [images()])
    export.save_archive(result.snapped, tmp_path / "net.npz")
    found = export.load_archive(tmp_path / "net.npz")
    assert found.layer("six").settings == {"max_value": 6.0}


@pytest.mark.slow
def test_a_dead_channels_steep_gain_is_decided_as_it_was_trained():
    """A variance of 0: the normalisation multiplies by hundreds."""
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(image, 4, name="first")
    x = conv_bn_relu(x, 4, name="c")
    x = layers.ReLU(name="last_relu")(layers.Conv2D(4, 3, name="last")(x))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = randomize(keras.Model(image, layers.Dense(3, name="head")(x)))
    norm = model.get_layer("c_bn")
    norm.epsilon = 1e-5
    norm.gamma.assign([2.0] * 4)
    norm.moving_variance.assign([0.0] * 4)
    norm.moving_mean.assign([0.0] * 4)
    norm.beta.assign([0.3, 0.35, 0.7, 0.25])
    low_bit = quantize(model, [EDGE, Rule(".*", 2, 2)])
    result = prove(low_bit, [images()])
    wrong = {d.layer: sum(d.wrong) for d in result.report.decisions}
    assert len(wrong) == 3
    assert set(wrong.values()) == {0}
