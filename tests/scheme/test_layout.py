"""What the rewritten graph computes."""

import warnings

import numpy as np
import pytest

from tests.scheme import nets
from tf_lowbit import (
    PrecisionRule,
    QuantizationWarning,
    calibrate,
    quantize,
    quantizers,
)
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import graph, inspection
from tf_lowbit.scheme.layout import split_activations

layers = keras.layers
W2A2 = PrecisionRule(".*", weight_bits=2, activation_bits=2)


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        yield


def assert_same_function(first, second, inputs):
    np.testing.assert_array_equal(first(inputs), second(inputs))


def own_activations():
    image = keras.Input(nets.IMAGE, name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="a")(image)
    x = layers.Conv2D(4, 3, activation=tf.nn.relu6, name="b")(x * 20.0)
    x = layers.Conv2D(4, 3, activation="tanh", name="c")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(3, activation="softmax", name="head")(x)
    return nets.randomize(keras.Model(image, x))


def test_split_activations_keep_the_function():
    model = own_activations()
    split = split_activations(model)
    assert_same_function(split, model, nets.images())
    added = {x.name for x in split.layers} - {x.name for x in model.layers}
    assert added == {"a_relu", "b_relu"}
    assert split.get_layer("b_relu").max_value == 6.0
    assert split.get_layer("c").activation is keras.activations.tanh
    # The model that was given keeps its own.
    assert model.get_layer("a").activation is keras.activations.relu


def test_a_model_without_own_activations_is_not_built_anew():
    inputs = keras.Input((4,))
    outputs = keras.layers.ReLU()(keras.layers.Dense(3)(inputs))
    model = keras.Model(inputs, outputs)
    assert split_activations(model) is model


def test_split_activations_of_a_shared_layer():
    inputs = keras.Input((4,), name="in")
    shared = layers.Dense(4, activation="relu", name="shared")
    model = nets.randomize(keras.Model(inputs, shared(shared(inputs))))
    split = split_activations(model)
    assert_same_function(split, model, nets.images(shape=(4,)))
    assert [x.name for x in split.layers] == ["in", "shared", "shared_relu"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.ReLU(name="act"),
        lambda: layers.ReLU(6.0, name="act"),
        lambda: layers.Activation("relu", name="act"),
        lambda: layers.Activation(tf.nn.relu6, name="act"),
    ],
    ids=["ReLU", "ReLU6", "Activation", "Activation6"],
)
def test_each_kind_of_relu_becomes_a_quantized_one(make):
    inputs = keras.Input((4,))
    x = make()(layers.Dense(6, name="in")(inputs))
    x = layers.ReLU(name="relu2")(layers.Dense(6, name="mid")(x))
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    quantized = quantize(model, W2A2)
    assert list(nets.by_name(quantized)) == ["act/output", "mid/kernel"]
    x = 9.0 * nets.images(64, shape=(4,))
    seen = nets.outputs_of(quantized, ["act"], x)["act"]
    assert np.unique(seen).size == 4
    # A quantized ReLU clips at its own range, also where a ReLU6 stood.
    assert (seen.min(), seen.max()) == (0.0, 1.0)


def test_an_own_activation_becomes_a_layer_of_its_own():
    quantized = quantize(own_activations(), PrecisionRule("b|c", 2, 3))
    assert {"b/kernel", "c/kernel", "b_relu/output"} <= set(nets.by_name(quantized))
    seen = nets.outputs_of(quantized, ["b_relu"], nets.images())["b_relu"]
    assert np.unique(seen).size <= 8
    assert quantized.get_layer("b_relu").quantize_config.replaces == "relu6"


def test_a_rule_can_name_the_new_relu():
    rules = [PrecisionRule("a_relu", activation_bits=8), PrecisionRule("b|c", 2, 3)]
    tensors = nets.by_name(quantize(own_activations(), rules))
    assert tensors["a_relu/output"].bits == 8
    assert tensors["b_relu/output"].bits == 3


def test_the_new_relu_takes_a_free_name():
    inputs = keras.Input((4,), name="in")
    x = layers.Dense(4, activation="relu", name="a")(inputs)
    x = layers.Dense(4, name="mid")(layers.Dropout(0.1, name="a_relu")(x))
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    tensors = nets.by_name(quantize(model, W2A2))
    assert len(tensors) == 2
    assert "a_relu/output" not in tensors


def test_every_kind_of_layer_is_quantized():
    quantized = quantize(nets.randomize(nets.every_layer()), W2A2)
    used = nets.used_weights(quantized, nets.images())
    assert set(used) == {
        "conv/kernel",
        "depthwise/depthwise_kernel",
        "separable_depthwise/depthwise_kernel",
        "separable/kernel",
        "transpose/kernel",
        "conv1d/kernel",
        "dense/kernel",
    }
    for name, values in used.items():
        assert set(np.unique(values)) <= set(np.float32([-3, -1, 1, 3]) / 3), name


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["lsq", "uniform"])
def test_steps_for_each_channel_have_the_channels_shape(name):
    quantizer = quantizers.get(name, "weight", per_axis=True)
    rule = PrecisionRule(".*", weight_bits=3, weight_quantizer=quantizer)
    quantized = quantize(nets.every_layer(), rule)
    steps = {
        name: tuple(t.quantizer.step(t.latent, t.variables).shape)
        for name, t in nets.by_name(quantized).items()
    }
    assert steps == {
        "conv/kernel": (1, 1, 1, 4),
        "depthwise/depthwise_kernel": (1, 1, 4, 2),
        "separable_depthwise/depthwise_kernel": (1, 1, 8, 1),
        "separable/kernel": (1, 1, 1, 5),
        "transpose/kernel": (1, 1, 6, 1),
        "conv1d/kernel": (1, 1, 3),
        "dense/kernel": (1, 7),
    }


@pytest.mark.slow
def test_batch_normalization_stays_where_it_is():
    quantized = quantize(nets.mobilenet_like(), W2A2)
    kinds = [type(layer) for layer in nets.mobilenet_like().layers]
    assert kinds.count(layers.BatchNormalization) == sum(
        type(layer) is layers.BatchNormalization for layer in quantized.layers
    )
    assert type(quantized.get_layer("block3_add")) is layers.Add


@pytest.mark.slow
def test_a_linear_bottleneck_is_rounded_once_for_its_readers():
    quantized = quantize(nets.mobilenet_like(), W2A2)
    inserted = [x.name for x in quantized.layers if x.name.endswith("_quantizer")]
    assert inserted == [
        "block1_add_quantizer",
        "block2_project_bn_quantizer",
        "block3_add_quantizer",
    ]
    # The skip connection takes what stands before the quantizer.
    skip = quantized.get_layer("block3_add").input[0]
    assert graph.producer(skip).layer.name == "block2_project_bn"
    data = nets.images(shape=(16, 16, 3))
    calibrate(quantized, [data], fit_batch_norm=False)
    seen = nets.outputs_of(quantized, inserted, 50.0 * data)
    for values in seen.values():
        assert np.unique(values).size == 3
        np.testing.assert_array_equal(np.unique(values), -np.unique(values)[::-1])


@pytest.mark.slow
def test_pooling_concatenation_and_dropout_pass_the_grid_on():
    image = keras.Input(nets.IMAGE, name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="stem")(image)
    a = layers.Conv2D(4, 1, activation="relu", name="a")(x)
    b = layers.Conv2D(4, 1, name="b")(x)
    x = layers.Concatenate(name="both")([a, b])
    x = layers.MaxPooling2D(2, name="max")(x)
    x = layers.ZeroPadding2D(1, name="pad")(x)
    x = layers.Dropout(0.5, name="dropout")(x)
    x = layers.Conv2D(3, 3, name="c")(x)
    x = layers.Dense(2, name="head")(layers.Flatten(name="flat")(x))
    quantized = quantize(keras.Model(image, x), W2A2)
    assert {"stem_relu/output", "a_relu/output", "b_quantizer/output"} <= set(
        nets.by_name(quantized)
    )
    seen = nets.outputs_of(quantized, ["pad"], nets.images())["pad"]
    assert np.unique(seen[..., :4]).size <= 4
    assert np.unique(seen[..., 4:]).size <= 4


def test_shared_layers_stay_shared():
    image = keras.Input(nets.IMAGE, name="image")
    relu, conv = layers.ReLU(name="relu"), layers.Conv2D(3, 3, name="conv")
    x = conv(relu(layers.Conv2D(3, 1, name="stem")(image)))
    x = conv(relu(x))
    x = layers.Dense(2, name="head")(layers.Flatten(name="flat")(relu(x)))
    quantized = quantize(keras.Model(image, x), W2A2)
    assert list(nets.by_name(quantized)) == ["relu/output", "conv/kernel"]
    assert len(quantized.get_layer("conv").inbound_nodes) == 2
    assert len(quantized.get_layer("relu").inbound_nodes) == 3
    before = nets.snapshot(quantized.trainable_variables)
    nets.train_step(quantized, nets.images(), nets.labels(classes=2), eager=True)
    after = nets.snapshot(quantized.trainable_variables)
    assert not any(np.array_equal(b, a) for b, a in zip(before, after, strict=True))


def test_several_inputs_and_outputs():
    left, right = keras.Input((4,), name="left"), keras.Input((5,), name="right")
    a = layers.Dense(6, activation="relu", name="a")(left)
    b = layers.Dense(6, activation="relu", name="b")(right)
    x = layers.Dense(6, activation="relu", name="mid")(layers.Add(name="sum")([a, b]))
    outputs = [layers.Dense(2, name="one")(x), layers.Dense(3, name="two")(x)]
    model = keras.Model([left, right], outputs)
    inputs = [nets.images(shape=(4,)), nets.images(shape=(5,))]
    quantized = quantize(model, W2A2)
    assert [y.shape for y in quantized(inputs)] == [(4, 2), (4, 3)]
    assert "mid/kernel" in nets.by_name(quantized)


def test_named_inputs_and_outputs():
    inputs = {"x": keras.Input((4,), name="x"), "y": keras.Input((4,), name="y")}
    both = layers.Concatenate(name="both")([inputs["y"], inputs["x"]])
    x = layers.Dense(6, activation="relu", name="in")(both)
    x = layers.Dense(6, activation="relu", name="mid")(x)
    outputs = {"b": layers.Dense(2, name="two")(x), "a": x}
    model = nets.randomize(keras.Model(inputs, outputs))
    data = {"x": nets.images(shape=(4,)), "y": nets.images(shape=(4,), seed=1)}
    exact = PrecisionRule(".*", 32, weight_quantizer="uniform")
    result, expected = quantize(model, exact)(data), model(data)
    assert set(result) == {"a", "b"}
    for name, values in expected.items():
        np.testing.assert_allclose(result[name], values, rtol=1e-5, atol=1e-6)


def test_operators_and_repeated_arguments_are_kept():
    image = keras.Input(nets.IMAGE, name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="stem")(image)
    x = layers.Conv2D(4, 1, name="mid")(x) * 2.0
    x = layers.Add(name="twice")([x, x])
    x = tf.reshape(x, (-1, 6 * 6 * 4))
    model = nets.randomize(keras.Model(image, layers.Dense(2, name="head")(x)))
    exact = PrecisionRule(".*", 32, weight_quantizer="uniform")
    np.testing.assert_allclose(
        quantize(model, exact)(nets.images()),
        model(nets.images()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_arguments_of_calls_are_kept():
    image = keras.Input(nets.IMAGE, name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="stem")(image)
    x = layers.Conv2D(4, 1, name="mid")(x)
    x = layers.BatchNormalization(name="bn")(x, training=False)
    x = layers.Dense(2, name="head")(layers.Flatten(name="flat")(x))
    quantized = quantize(keras.Model(image, x), W2A2)
    before = nets.snapshot(quantized.get_layer("bn").non_trainable_weights)
    quantized(nets.images(), training=True)
    nets.assert_all_equal(
        nets.snapshot(quantized.get_layer("bn").non_trainable_weights), before
    )


def prelu_net():
    inputs = keras.Input((4,), name="in")
    x = layers.Dense(4, activation="relu", name="first")(inputs)
    x = layers.PReLU(name="prelu")(layers.Dense(4, name="mid")(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def layer_norm_net():
    inputs = keras.Input((4,), name="in")
    x = layers.Dense(4, activation="relu", name="first")(inputs)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Dense(4, name="mid")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("build", "name"), [(prelu_net, "prelu"), (layer_norm_net, "norm")]
)
def test_an_unsupported_layer_is_reported(build, name):
    with pytest.warns(QuantizationWarning, match=f"layer {name} cannot be quantized"):
        quantized = quantize(build(), W2A2)
    assert "mid/kernel" in nets.by_name(quantized)
    assert type(quantized.get_layer(name)) is type(build().get_layer(name))
    with pytest.raises(ValueError, match=rf"Received:\n- layer {name} cannot"):
        quantize(build(), W2A2, strict=True)


def test_an_unused_rule_is_reported():
    rules = [PrecisionRule("nowhere", weight_bits=2), W2A2]
    with pytest.warns(QuantizationWarning, match="matches no layer.*nowhere"):
        quantize(nets.perceptron(), rules)
    with pytest.raises(ValueError, match=r"strict=True.*Received:\n.*nowhere"):
        quantize(nets.perceptron(), rules, strict=True)


def test_strict_without_problems_is_silent():
    assert nets.by_name(quantize(nets.perceptron(), W2A2, strict=True))


def test_graph_clone_copies_weights_and_frees_the_outputs():
    model = nets.randomize(nets.chain())
    # A second call, of another model, of the same layer.
    model.get_layer("relu1")(keras.Input((2, 2, 4)))
    copy = graph.clone(model)
    assert len(copy.get_layer("relu1").inbound_nodes) == 1
    assert_same_function(copy, model, nets.images())


def test_graph_clone_can_take_layers_over():
    model = nets.randomize(nets.chain())
    expected = model(nets.images()).numpy()
    model.get_layer("relu1")(keras.Input((2, 2, 4)))
    layers_before = {layer.name: layer for layer in model.layers}
    taken = graph.clone(model, lambda layer: layer)
    for layer in taken.layers[1:]:
        assert layer is layers_before[layer.name]
        assert len(layer.inbound_nodes) == 1
    np.testing.assert_array_equal(taken(nets.images()), expected)


def test_wrapped_layers_keep_their_own_name_and_class():
    quantized = quantize(nets.perceptron(), W2A2)
    layer = inspection.wrapped_layer(quantized.get_layer("mid"))
    assert type(layer) is layers.Dense
    assert layer.name == "mid"
