"""Where residual quantizers stand, network by network."""

import warnings

import numpy as np
import pytest

from tests.scheme import nets
from tests.scheme.test_placement import EVERYWHERE, W2A2, conv, finish, relu, start
from tf_lowbit import (
    PrecisionRule,
    QuantizationWarning,
    calibrate,
    models,
    quantize,
    quantizers,
)
from tf_lowbit.compat import keras
from tf_lowbit.network import graph, inspection, layer_registry
from tf_lowbit.scheme.placement import make_plan
from tf_lowbit.scheme.rules import as_rules

layers = keras.layers


def placed(model, rules=EVERYWHERE, bits=8):
    """The names of the residual quantizers that the plan holds."""
    eligible = {layer.name for layer in model.layers if layer_registry.kernels(layer)}
    plan = make_plan(model, as_rules(rules), eligible, bits)
    found = list(plan.residuals.values())
    assert {insertion.quantizer.bits for insertion in found} <= {8}
    is_noted = any("residual_bits=8 finds no Add" in p for p in plan.problems())
    assert is_noted == (bits == 8 and not found)
    return {insertion.name.removesuffix("_residual") for insertion in found}


def bn(x, name):
    return layers.BatchNormalization(name=name)(x)


def add(*inputs, name="sum"):
    return layers.Add(name=name)(list(inputs))


# --- the networks of the papers


def test_a_pre_activation_resnet():
    model = models.preact_resnet(14, width=2, input_shape=(8, 8, 3))
    expected = {
        f"stage{stage}_block{block}_{name}"
        for stage in (1, 2, 3)
        for block in (1, 2)
        for name in ("conv2", "add")
    }
    expected |= {f"stage{stage}_block1_shortcut" for stage in (2, 3)}
    assert placed(model) == placed(model, W2A2) == expected


def test_a_post_activation_resnet():
    model = models.resnet18(width=2, classes=3, input_shape=(16, 16, 3))
    expected = {f"stage{s}_block{b}_bn2" for s in (1, 2, 3, 4) for b in (1, 2)}
    expected |= {f"stage{stage}_block1_shortcut_bn" for stage in (2, 3, 4)}
    # A quantized ReLU behind it is what the int8 Add puts out.
    assert placed(model) == expected
    # The last one only feeds the float head, and stays float.
    assert placed(model, W2A2) == expected | {"stage4_block2_add"}


def test_inverted_residuals():
    assert placed(nets.mobilenet_like()) == {
        "block1_project_bn",
        "block1_add",
        "block2_project_bn",
        "block3_project_bn",
        "block3_add",
    }


def test_none_without_residual_bits():
    assert placed(nets.mobilenet_like(), bits=None) == set()


# --- inputs


def test_an_input_on_a_relus_grid_gets_none():
    """Maximum pooling and the like keep it; average pooling does not."""
    for pool, expected in (
        (layers.MaxPooling2D(2, name="pooled"), set()),
        (layers.ZeroPadding2D(1, name="pooled"), set()),
        (layers.UpSampling2D(2, name="pooled"), set()),
        (layers.AveragePooling2D(2, name="pooled"), {"pooled"}),
        (layers.UpSampling2D(2, interpolation="bilinear", name="pooled"), {"pooled"}),
    ):
        image, x = start()
        x = pool(x)
        x = relu(add(bn(conv(x, "a"), "bn"), x), "relu1")
        assert placed(finish(image, conv(x, "b"))) == {"bn", *expected}


def test_a_quantized_branch_is_found_behind_what_passes_it_on():
    image, x = start()
    y = layers.Dropout(0.1, name="drop")(bn(conv(x, "a"), "bn"))
    x = relu(add(layers.MaxPooling2D(1, name="max")(y), x), "relu1")
    assert placed(finish(image, conv(x, "b"))) == {"max"}


def test_an_add_of_activations_only_gets_none():
    image, x = start()
    x = add(relu(conv(x, "a"), "relu1"), x)
    assert placed(finish(image, conv(x, "b"))) == set()


def test_an_add_of_float_layers_gets_none():
    image, x = start()
    x = relu(add(bn(conv(x, "a"), "bn"), x), "relu1")
    model = finish(image, conv(x, "b"))
    rule = PrecisionRule("b", weight_bits=2, activation_bits=2)
    assert placed(model, rule) == set()


def test_a_float_branch_beside_a_quantized_one_gets_one():
    image, x = start()
    y = bn(conv(x, "float"), "float_bn")
    x = relu(add(bn(conv(x, "a"), "bn"), y), "relu1")
    model = finish(image, conv(x, "b"))
    assert placed(model, PrecisionRule("a|b", 2, 2)) == {"bn", "float_bn"}


def test_weights_alone_quantized():
    """The ReLUs are float then, and no grid."""
    image, x = start()
    x = relu(add(bn(conv(x, "a"), "bn"), x), "relu1")
    model = finish(image, conv(x, "b"))
    rule = PrecisionRule(".*", weight_bits=2)
    assert placed(model, rule) == {"bn", "relu0", "sum"}


def test_the_models_input_can_be_an_addend():
    image = keras.Input((8, 8, 4), name="image")
    x = relu(add(conv(image, "a"), image), "relu1")
    assert placed(finish(image, conv(x, "b"))) == {"image", "a"}


def test_three_addends_and_one_twice():
    image, x = start()
    a = conv(x, "a")
    x = relu(add(a, conv(x, "b"), x, a), "relu1")
    assert placed(finish(image, conv(x, "c"))) == {"a", "b"}


# --- outputs


def test_a_chain_of_adds_is_on_the_grid():
    image, x = start()
    one = add(conv(x, "a"), x, name="one")
    two = add(layers.MaxPooling2D(1, name="max")(one), one, name="two")
    x = relu(bn(two, "bn"), "relu1")
    assert placed(finish(image, conv(x, "b"))) == {"a", "one", "two"}


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (lambda x: relu(x, "r"), set()),
        (lambda x: relu(bn(x, "bn"), "r"), {"sum"}),
        (lambda x: layers.Activation("tanh", name="r")(x), {"sum"}),
        # Two grids are more than one Add can put out.
        (lambda x: layers.Concatenate()([relu(x, "r"), relu(x, "s")]), {"sum"}),
        # This ReLU is float, since no quantized layer reads it.
        (lambda x: add(relu(x, "r"), x, name="two"), {"sum", "r", "two"}),
    ],
    ids=["relu", "batch norm", "tanh", "two relus", "relu and add"],
)
def test_an_output_gets_one_unless_one_relu_alone_reads_it(tail, expected):
    image, x = start()
    x = tail(add(conv(x, "a"), x))
    model = finish(image, conv(layers.MaxPooling2D(2, name="max")(x), "b"))
    assert placed(model) == {"a", *expected}


def test_an_output_of_the_model_gets_one():
    image, x = start()
    total = add(conv(x, "a"), x)
    y = conv(relu(total, "relu1"), "b")
    assert placed(keras.Model(image, [y, total])) == {"a", "sum"}
    assert placed(keras.Model(image, y)) == {"a"}


# --- names


def test_shared_layers_have_one_for_each_call():
    image, x = start()
    shared, total = layers.Conv2D(4, 1, name="shared"), layers.Add(name="sum")
    x = total([shared(x), x])
    x = total([shared(relu(x, "relu1")), x])
    model = finish(image, conv(relu(x, "relu2"), "b"))
    quantized = quantize(model, EVERYWHERE, residual_bits=8)
    names = [t.layer.name for t in inspection.quantized_tensors(quantized)]
    assert [name for name in names if "residual" in name] == [
        "shared_residual",
        "sum_residual",
        "shared_residual_2",
    ]


def test_a_name_that_is_taken():
    image, x = start()
    x = relu(add(bn(conv(x, "a"), "bn"), x), "bn_residual")
    model = finish(image, conv(x, "b"))
    quantized = quantize(model, EVERYWHERE, residual_bits=8)
    assert nets.by_name(quantized)["bn_residual_2/output"].is_residual
    assert not nets.by_name(quantized)["bn_residual/output"].is_residual


# --- the rewritten graph


@pytest.mark.slow
def test_all_readers_read_the_quantized_tensor():
    quantized = quantize(nets.mobilenet_like(), W2A2, residual_bits=8)

    def read_by(name):
        nodes = (node for node in graph.calls(quantized) if node.layer.name == name)
        return [
            graph.producer(t).layer.name for node in nodes for t in node.keras_inputs
        ]

    assert read_by("block1_add") == ["stem_relu", "block1_project_bn_residual"]
    assert read_by("block1_add_residual") == ["block1_add"]
    # The k-bit quantizer of a linear bottleneck stands behind.
    assert read_by("block1_add_quantizer") == ["block1_add_residual"]
    assert read_by("block2_project_bn_quantizer") == ["block2_project_bn_residual"]
    assert read_by("block3_add") == [
        "block2_project_bn_residual",
        "block3_project_bn_residual",
    ]


def test_the_models_own_input_and_output_are_quantized():
    image = keras.Input((8, 8, 4), name="image")
    total = add(conv(image, "a"), image)
    model = keras.Model(image, [total, conv(relu(total, "relu1"), "b")])
    quantized = quantize(nets.randomize(model), EVERYWHERE, residual_bits=8)
    assert graph.producer(quantized.outputs[0]).layer.name == "sum_residual"
    assert quantized.output_shape[0] == model.output_shape[0]
    seen = nets.outputs_of(quantized, ["image_residual"], nets.images(shape=(8, 8, 4)))
    codes = seen["image_residual"] * 16  # The first step is 1/16.
    np.testing.assert_array_equal(codes, np.round(codes))


@pytest.mark.slow
def test_a_network_without_such_adds_is_reported():
    with pytest.warns(QuantizationWarning, match="residual_bits=8 finds no Add"):
        quantize(nets.chain(), W2A2, residual_bits=8)
    with pytest.raises(ValueError, match="residual_bits=8 finds no Add"):
        quantize(nets.chain(), W2A2, residual_bits=8, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        quantize(nets.postactivation(), W2A2, residual_bits=8)


@pytest.mark.quick(1)
@pytest.mark.parametrize("eager", [True, False])
def test_the_levels_around_each_add_are_int8s(eager):
    """After a training step, in both modes."""
    rule = PrecisionRule(".*", 2, 2, activation_quantizer="lsq")
    model = quantize(nets.randomize(nets.preactivation()), rule, residual_bits=8)
    data = nets.images()
    calibrate(model, [data])
    nets.train_step(model, data, nets.labels(), eager=eager)
    tensors = [t for t in inspection.quantized_tensors(model) if t.is_residual]
    seen = nets.outputs_of(model, [t.layer.name for t in tensors], 3 * data)
    assert len(seen) == 6
    for tensor in tensors:
        values = seen[tensor.layer.name]
        step = tensor.quantizer.step(values, tensor.variables).numpy()
        codes = tensor.quantizer.codes(values, tensor.variables).numpy()
        np.testing.assert_array_equal(values, codes.astype(np.float32) * step)
        assert -128 <= codes.min() < codes.max() <= 127
        assert np.unique(codes).size > 50


@pytest.mark.slow
def test_everything_in_front_of_a_residual_quantizer_trains():
    model = quantize(nets.randomize(nets.preactivation()), W2A2, residual_bits=8)
    data = nets.images(8)
    calibrate(model, [data])
    names = [v.name for v in model.trainable_variables]
    assert not any("residual" in name for name in names)
    before = nets.snapshot(model.trainable_variables)
    nets.train_step(model, data, nets.labels(8), eager=True)
    after = nets.snapshot(model.trainable_variables)
    pairs = zip(names, before, after, strict=True)
    assert not [name for name, b, a in pairs if np.array_equal(b, a)]


@pytest.mark.slow
def test_unrounded_equals_float():
    model = nets.randomize(nets.preactivation())
    uniform = quantizers.UniformActivationQuantizer(clip=64.0)
    rule = PrecisionRule(
        ".*", 32, 32, weight_quantizer="uniform", activation_quantizer=uniform
    )
    quantized = quantize(model, rule, residual_bits=8)
    for tensor in inspection.quantized_tensors(quantized):
        if tensor.is_residual:
            tensor.assign_bits(32)
            tensor.variables["step"].assign(1.0)
    data = nets.images()
    np.testing.assert_allclose(quantized(data), model(data), rtol=1e-3, atol=1e-3)
