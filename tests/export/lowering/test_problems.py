"""What stops an export, told before it: layers without a form, and a target's rules."""

import dataclasses

import pytest

from tests.export.networks import (
    EDGE,
    Rule,
    conv_bn_relu,
    images,
    layers,
    network,
    normals,
    quantize,
)
from tf_lowbit import export
from tf_lowbit.compat import keras
from tf_lowbit.export.lowering import problems
from tf_lowbit.export.options import Options
from tf_lowbit.export.tflite import flatbuffer, writer

TARGETS = export.TARGETS


def test_check_lists_every_layer_with_a_remedy():
    def body(x):
        x = layers.SeparableConv2D(4, 3, name="split")(x)
        x = layers.Subtract(name="less")([x, x])
        x = layers.Conv2DTranspose(4, 3, (1, 2), name="transposed")(x)
        x = layers.Activation("elu", name="elu")(x)
        x = layers.Conv2D(4, 1, activation="selu", name="own")(x)
        x = layers.UpSampling2D(2, interpolation="bicubic", name="up")(x)
        x = layers.Lambda(lambda t: t, name="lambda")(x)
        return conv_bn_relu(x, 4, name="inner")

    model = network(body)
    names = ["less", "transposed", "elu", "up", "lambda", "own"]
    for checked in (model, quantize(model, [EDGE])):
        found = export.check(checked)
        assert not found.ok
        assert [p.layer for p in found.problems] == names
        by_name = {p.layer: p for p in found.problems}
        assert "x + (-1.0 * y)" in by_name["less"].remedy
        assert "x + (-1.0 * y)" not in by_name["transposed"].remedy
        assert by_name["transposed"].type == "Conv2DTranspose"
        for name in names:
            assert name in str(found)
    # What it lists first is what the export says.
    with pytest.raises(export.ExportError) as refused:
        export.snap(quantize(model, [EDGE]), [normals()])
    assert refused.value.problem == found.problems[0]


def test_check_says_so_where_all_is_well():
    found = export.check(network(lambda x: x))
    assert found.ok
    assert "Every layer" in str(found)


def test_check_wants_a_graph():
    with pytest.raises(ValueError, match=r"built Sequential.*Received: Sequential"):
        export.check(keras.Sequential([layers.Dense(1)]))


# --- targets --------------------------------------------------------------------------


def test_check_wants_a_target():
    with pytest.raises(ValueError, match=r"target must be .*Received: target='gpu'"):
        export.check(network(lambda x: x), target="gpu")


def named(model, target):
    return {p.layer: str(p) for p in export.check(model, target).problems}


def _curved(x):
    x = layers.Activation("gelu", name="curved")(x)
    return layers.Conv2D(4, 1, activation="gelu", name="own")(x)


def test_operators_that_a_target_lacks_are_told_before_training():
    for model in (network(_curved), quantize(network(_curved), [EDGE])):
        assert named(model, "xnnpack") == {}
        found = named(model, "tflm")
        assert set(found) == {"curved", "own"}
        assert "needs GELU" in found["curved"]
        assert "needs CONV_2D" not in found["own"]
        # What it lists first is what the export says.
    options = Options(target="tflm")
    with pytest.raises(export.ExportError) as refused:
        export.snap(model, [images()], options=options)
    assert str(refused.value) == found["curved"]


def test_what_computes_in_float_is_told_before_training():
    def body(x):
        y = layers.Conv2DTranspose(4, 2, 2, name="wide")(x)
        y = layers.AveragePooling2D(2, padding="same", name="borders")(y)
        y = layers.Multiply(name="gated")([x, y])
        y = layers.AveragePooling2D(2, name="plain")(y)
        y = layers.UpSampling2D(2, interpolation="bilinear", name="smooth")(y)
        return layers.Conv2D(4, 1, activation="tanh", name="own")(y)

    found = named(network(body), "int8")
    assert set(found) == {"wide", "borders", "gated", "smooth", "own"}
    assert "needs DEPTH_TO_SPACE" in found["wide"]
    assert "needs MIRROR_PAD" in found["smooth"]
    assert "computes in float" in found["borders"]
    assert named(network(body), "tflm") == {}


@pytest.mark.slow
def test_a_layer_that_no_rule_quantizes_computes_in_float():
    def body(x):
        return conv_bn_relu(conv_bn_relu(x, 4, name="inner"), 4, name="left")

    model = quantize(network(body), [EDGE, Rule("inner", 2, 2)])
    assert set(named(model, "int8")) == {"left"}
    model = quantize(network(body), [EDGE, Rule(".*", 2, 2)])
    assert named(model, "int8") == {}


def test_open_sizes_are_told_before_training():
    image = keras.Input((None, None, 2), name="image")
    model = keras.Model(image, layers.Conv2D(3, 1, name="head")(image))
    assert named(model, "xnnpack") == {}
    assert set(named(model, "tflm")) == {"image"}


@pytest.mark.slow
def test_bits_that_a_target_does_not_have():
    target = dataclasses.replace(
        TARGETS["tflm"], name="mine", weight_bits=(2, 8), activation_bits=(4, 8)
    )
    model = quantize(
        network(lambda x: conv_bn_relu(x, 4, name="inner")),
        [EDGE, Rule("inner", 3, 2, "uniform")],
    )
    found = named(model, target)
    assert set(found) == {"inner", "first_relu"}
    assert "takes weights of 2, 8 bits" in found["inner"]
    assert "kernel at 3 bits" in found["inner"]
    assert "takes activations of 4, 8 bits" in found["first_relu"]
    with pytest.raises(export.ExportError) as refused:
        export.snap(model, [images()], options=Options(target=target))
    assert str(refused.value) == found["first_relu"]
    # The bits that it is exported at count, not those of a later stage.
    for tensor in problems.inspection.quantized_tensors(model):
        tensor.assign_bits(8)
    export.snap(model, [images()], options=Options(target=target))


# Name -> what stands inside of a network, and the operators that it surely needs.
BODIES = {
    "crop": (lambda x: layers.Cropping2D(1)(x), "STRIDED_SLICE"),
    "turn": (lambda x: layers.Permute((2, 1, 3))(x), "TRANSPOSE"),
    "pad": (lambda x: layers.ZeroPadding2D(1)(x), "PAD"),
    "pool": (lambda x: layers.MaxPooling2D()(x), "MAX_POOL_2D"),
    "highest": (lambda x: layers.GlobalMaxPooling2D()(x), "MAX_POOL_2D"),
    "up": (lambda x: layers.UpSampling2D()(x), "RESIZE_NEAREST_NEIGHBOR"),
    "smooth": (
        lambda x: layers.UpSampling2D(interpolation="bilinear")(x),
        "RESIZE_NEAREST_NEIGHBOR MIRROR_PAD DEPTHWISE_CONV_2D",
    ),
    "wide": (lambda x: layers.Conv2DTranspose(3, 2, 2)(x), "DEPTH_TO_SPACE"),
    "deep": (lambda x: layers.DepthwiseConv2D(3)(x), "DEPTHWISE_CONV_2D"),
    "sum": (lambda x: layers.Add()([x, layers.MaxPooling2D(1)(x)]), "ADD MAX_POOL_2D"),
    "join": (
        lambda x: layers.Concatenate()([x, layers.MaxPooling2D(1)(x)]),
        "CONCATENATION MAX_POOL_2D",
    ),
    "gate": (
        lambda x: layers.Multiply()([x, layers.MaxPooling2D(1)(x)]),
        "MUL MAX_POOL_2D",
    ),
    "leaky": (lambda x: layers.LeakyReLU()(x), "LEAKY_RELU"),
    "slopes": (lambda x: layers.PReLU(shared_axes=[1, 2])(x), "PRELU"),
    "norm": (lambda x: layers.LayerNormalization()(x), "ADD MEAN MUL RSQRT SUB"),
    "swish": (lambda x: layers.Conv2D(3, 1, activation="swish")(x), "LOGISTIC MUL"),
    "gelu": (lambda x: layers.Activation("gelu")(x), "GELU"),
    "dense": (lambda x: layers.Dense(3, activation="relu")(x), ""),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", BODIES)
def test_operators_that_are_foretold_are_in_the_file(case):
    """No layer is refused for an operator that its file would not have had."""
    body, operators = BODIES[case]
    model = quantize(network(body), [EDGE, Rule(".*", 2, 2)])
    # Of bilinear interpolation they are foretold where there are no floats.
    target = dataclasses.replace(
        TARGETS["xnnpack"], name="mine", operators=(), floats=case != "smooth"
    )
    foretold = set()
    for problem in export.check(model, target).problems:
        foretold |= {*problem.received.split("needs ")[1].split(", ")}
    assert foretold == {"CONV_2D", "FULLY_CONNECTED", *operators.split()}
    file = flatbuffer.unpack(writer.to_bytes(export.snap(model, [images()])))
    written = {
        flatbuffer.OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
        for code in file.operatorCodes
    }
    assert foretold <= written
