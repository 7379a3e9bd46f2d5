"""Networks that end in an argmax: class numbers, in files and in what verifies them."""

import keras as keras3
import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import (
    EDGE,
    IMAGE,
    Rule,
    conv_bn_relu,
    images,
    layers,
    network,
    quantize,
    randomize,
)
from tf_lowbit import export
from tf_lowbit.analysis import page
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import plain_layers
from tf_lowbit.export.lowering import problems
from tf_lowbit.export.lowering.builder import Builder
from tf_lowbit.export.options import Options
from tf_lowbit.export.tflite import flatbuffer, writer
from tf_lowbit.export.tflite.flatbuffer import schema

DATA = images(16)


def classes(model, function=tf.argmax, **arguments):
    """A network with an argmax at its end."""
    return keras.Model(
        model.inputs, function(model.outputs[0], axis=-1, **arguments), name="chosen"
    )


def plain():
    return network(lambda x: conv_bn_relu(x, 4, name="inner"))


def segmentation():
    """A class for each pixel."""
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(conv_bn_relu(image, 4, name="first"), 16, name="inner")
    return randomize(keras.Model(image, layers.Conv2D(3, 1, name="head")(x)))


def quantized(model):
    return quantize(model, [EDGE, Rule(".*", 2, 2, "lsq", "lsq")])


@pytest.fixture(scope="module")
def maps():
    """Logits for each pixel, and the classes of the same network."""
    logits = quantized(segmentation())
    model = classes(logits)
    assert min(np.bincount(model(DATA).numpy().ravel(), minlength=3)) > 50
    return logits, model


# --- by hand --------------------------------------------------------------------------

# Rows of input codes (a, b, c); the class among a, b and about 3c; and that in codes of
# 8 bits, whose step is 3 times as large, so that a = 9 and b = 10 tie.
ROWS = {
    (0, 0, 0): (0, 0),
    (9, 9, 1): (0, 0),
    (-9, 9, 9): (2, 2),
    (9, 10, 1): (1, 0),
    (-5, -5, -5): (0, 0),
    (0, 0, 127): (2, 2),
    (0, 1, 0): (1, 0),
    (0, 2, 1): (2, 1),
}
STEP = np.float32(2.5) / np.float32(127)


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("target", "head"),
    [("xnnpack", "float"), ("xnnpack", "int8"), ("portable", "int8"), ("tflm", "int8")],
)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_the_first_of_equal_ones_by_hand(target, head, dtype):
    """Logits a, b and 3c, of inputs on a grid."""
    image = keras.Input((3,), name="image")
    model = keras.Model(image, layers.Dense(3, use_bias=False, name="head")(image))
    model.set_weights([np.diag([1, 1, 3]).astype(np.float32)])
    model = classes(quantize(model, [EDGE]), output_type=dtype)
    codes = np.array([*ROWS], np.float32)
    wanted = [chosen[head == "int8"] for chosen in ROWS.values()]
    options = Options(target=target, head=head)
    snapped = export.snap(model, [codes * STEP], options=options)
    content = writer.to_bytes(snapped)
    if target == "tflm":
        found = export.MicroRunner(content)(codes.astype(np.int8))
        assert found["tf.math.argmax"].dtype == np.int32  # It has no other.
        runs = [found]
    else:
        kernels = options.target.kernels
        runs = [export.Runner(content, k)(codes * STEP) for k in kernels]
        assert {run["tf.math.argmax"].dtype.name for run in runs} == {dtype}
    for run in runs:
        assert run["tf.math.argmax"].tolist() == wanted
    report = export.verify(content, model, [(codes * STEP, wanted)], verbose=0)
    assert report.ok, report.failures
    assert report.predictions.right["file"] == len(ROWS)
    # Of an int8 head the argmax is of the codes themselves.
    assert ("DEQUANTIZE" in report.operators) == (head == "float")


def test_the_layer_alone():
    layer = plain_layers.ArgMax("int32")
    scores = np.array([[[1.0, 5.0], [7.0, 7.0]]])
    assert layer(scores).numpy().tolist() == [[1, 0]]
    assert plain_layers.ArgMax.from_config(layer.get_config()).output_type == "int32"


# --- what is measured -----------------------------------------------------------------


@pytest.mark.parametrize("head", ["float", "int8"])
def test_class_numbers_count_as_the_logits_do(maps, head):
    """Accuracy, IoU and agreement are those of the file that ends in the logits."""
    labels = np.random.default_rng(0).integers(0, 3, (16, *IMAGE[:2]))
    found = []
    for model in maps:
        snapped = export.snap(model, [DATA], options=Options(head=head))
        content = writer.to_bytes(snapped)
        report = export.verify(content, model, [(DATA, labels)], tolerance=1, verbose=0)
        assert report.ok, report.failures
        found.append(report.predictions)
    assert found[0] == found[1]
    assert found[1].labels == labels.size
    right = (maps[1](DATA).numpy() == labels).sum()
    assert found[1].right["trained"] == right


def test_without_labels_class_numbers_are_classes():
    """Also where their scores have the shape of the image."""
    image = keras.Input((8, 8, 3), name="image")
    x = conv_bn_relu(image, 4, name="first")
    model = randomize(keras.Model(image, layers.Conv2D(3, 1, name="head")(x)))
    model, data = classes(quantized(model)), images(4, (8, 8, 3))
    report = export.verify(
        writer.to_bytes(export.snap(model, [data])), model, [data], verbose=0
    )
    assert report.ok, report.failures
    assert report.predictions.trained_agrees > 0.9 * 4 * 64


def test_scores_and_classes_of_one_network(maps):
    """A second output of class numbers, and logits as codes."""
    logits = maps[0]
    ends = [logits.outputs[0], maps[1].outputs[0]]
    model = keras.Model(logits.inputs, ends)
    snapped = export.snap(model, [DATA], options=Options(output_type="int8"))
    content = writer.to_bytes(snapped)
    report = export.verify(content, model, [DATA], verbose=0)
    assert report.ok, report.failures
    values = export.Runner(content)(DATA)
    codes, chosen = values.values()
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(chosen, codes.argmax(-1))


def test_sensitivity_and_report_are_those_of_the_logits(maps):
    data = [(DATA, np.random.default_rng(0).integers(0, 3, (16, *IMAGE[:2])))]
    found = [tfl.sensitivity(m, data, bits=(1,), metric="accuracy") for m in maps]
    assert found[0] == found[1]
    first, second = (page._accuracy(m, data) for m in maps)
    assert first.percent == second.percent
    np.testing.assert_array_equal(first.confusion, second.confusion)


# --- what is found --------------------------------------------------------------------


def last_of_equal_ones(layer, inputs):
    reverse = tf.argmax(inputs[..., ::-1], axis=-1, output_type=layer.output_type)
    return inputs.shape[-1] - 1 - reverse


def smallest(layer, inputs):
    return tf.argmin(inputs, axis=-1, output_type=layer.output_type)


@pytest.mark.parametrize("fault", [last_of_equal_ones, smallest])
def test_a_twin_that_chooses_otherwise_is_found(maps, fault, monkeypatch):
    """Two classes have one kernel, so their codes are equal."""
    logits, model = maps
    head = logits.get_layer("head").weights
    monkeypatch.setattr(plain_layers.ArgMax, "call", fault)
    weights = [weight for weight in head if weight.shape[-1:] == 3]
    before = [weight.numpy() for weight in weights]
    try:
        for weight, values in zip(weights, before, strict=True):
            weight.assign(values[..., [0, 0, 2]])
        snapped = export.snap(model, [DATA], options=Options(head="int8"))
        report = export.verify(writer.to_bytes(snapped), model, [DATA], verbose=0)
    finally:
        for weight, values in zip(weights, before, strict=True):
            weight.assign(values)
    assert any("codes are not what its inputs give" in f for f in report.failures)
    (row,) = [c for c in report.comparisons if c.tensor.startswith("tf.math.argmax")]
    assert row.mismatches > 0


def another_axis(file, graph, operator):
    tensor = graph.tensors[operator.inputs[1]]
    file.buffers.append(schema.BufferT(np.array([1], np.int32).view(np.uint8)))
    tensor.buffer = len(file.buffers) - 1


def another_type(file, graph, operator):
    operator.builtinOptions.outputType = schema.TensorType.INT32


@pytest.mark.parametrize("change", [another_axis, another_type])
def test_a_changed_file_is_found(maps, change):
    model = maps[1]
    snapped = export.snap(model, [DATA])
    file = flatbuffer.unpack(writer.to_bytes(snapped))
    (graph,) = file.subgraphs
    change(file, graph, graph.operators[-1])
    report = export.verify(flatbuffer.pack(file), snapped, [DATA], verbose=0)
    assert any("tf.math.argmax" in failure for failure in report.failures)
    assert report.codes == 0  # It was not run.


def test_a_wrong_lowering_diverges_from_the_trained_network(maps, monkeypatch):
    """File and twin agree, because both have the fault."""
    read = Builder.codes_or_values
    turned = layers.Permute((2, 1, 3), name="turned")
    monkeypatch.setattr(Builder, "codes_or_values", lambda *a: turned(read(*a)))
    made = export.snap(maps[1], [DATA])
    content = writer.to_bytes(made)
    report = export.verify(
        content, made, [DATA], trained=maps[1], agreement=0, verbose=0
    )
    (failure,) = report.failures
    assert "tf.math.argmax" in failure
    assert "diverges from the trained network" in failure


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("name", export.TARGETS)
def test_an_argmax_over_other_axes_is_refused(name):
    model = segmentation()
    for axis in (0, 1, None):
        other = keras.Model(model.inputs, tf.argmax(model.outputs[0], axis))
        (problem,) = export.check(other, target=name).problems
        assert "over the last axis at the end" in problem.remedy


def test_what_reads_class_numbers_is_refused():
    model = classes(segmentation())
    for read in (
        layers.Reshape((64,), name="reader"),
        lambda x: tf.cast(x, tf.float32, name="reader"),
        lambda x: tf.one_hot(x, 3, name="reader"),
    ):
        other = keras.Model(model.inputs, read(model.outputs[0]))
        (problem,) = export.check(other).problems
        assert "must not read the class numbers of an argmax" in problem.reason
        assert problem.layer != "tf.math.argmax"
        with pytest.raises(export.ExportError, match="must not read the class numbers"):
            export.snap(quantized(other), [DATA])
    assert list(problems.problems(model)) == []


def test_a_target_without_the_operator_refuses_by_name():
    (problem,) = export.check(classes(plain()), target="int8").problems
    assert "needs ARG_MAX" in problem.received


# --- Keras 3 --------------------------------------------------------------------------


def test_keras_3_and_back(tmp_path):
    image = keras3.Input(IMAGE, name="image")
    x = keras3.layers.Conv2D(4, 3, activation="relu", name="first")(image)
    x = keras3.layers.Dense(3, name="head")(keras3.layers.Flatten()(x))
    model = tfl.quantize(
        keras3.Model(image, keras3.ops.argmax(x, axis=-1)), [EDGE, Rule(".*", 2, 2)]
    )
    tfl.calibrate(model, [DATA])
    path = tmp_path / "net.tflite"
    export.to_tflite(model, path, [DATA], verbose=0)
    report = export.verify(path, model, [DATA], verbose=0)
    assert report.ok, report.failures
    assert report.predictions.examples == 16
    again = tfl.to_keras3(model)(DATA)
    assert np.asarray(again).tolist() == model(DATA).numpy().tolist()
    assert keras3.backend.standardize_dtype(again.dtype) == "int32"
