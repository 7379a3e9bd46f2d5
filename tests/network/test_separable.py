import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit.compat import keras
from tf_lowbit.network import graph, separable
from tf_lowbit.scheme.rules import with_parts

layers = keras.layers


def _network(**arguments):
    image = keras.Input((9, 8, 3), name="image")
    x = layers.SeparableConv2D(
        6, (3, 2), depth_multiplier=2, padding="same", name="first", **arguments
    )(image)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(x))
    shared = layers.SeparableConv2D(6, 3, padding="same", name="shared")
    x = layers.Add(name="add")([shared(x), shared(shared(x))])
    within = keras.Input(x.shape[1:])
    y = layers.SeparableConv2D(4, 3, strides=2, name="inner")(within)
    x = keras.Model(within, y, name="nested")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(3, name="head")(x)
    model = keras.Model(image, x, name="net")
    rng = np.random.default_rng(0)
    model.set_weights(
        [w + rng.normal(0, 0.1, w.shape) ** 2 for w in model.get_weights()]
    )
    return model


def _images():
    return np.random.default_rng(1).normal(size=(4, 9, 8, 3)).astype(np.float32)


def test_the_function_is_the_same():
    model = _network(activation="relu", kernel_regularizer="l2")
    before = model.get_weights()
    made = tfl.split_separable(model)
    np.testing.assert_allclose(made(_images()), model(_images()), atol=1e-5)
    names = [[layer.name for layer in each.layers] for each in (made, model)]
    assert names[0] == names[1]
    assert (made.name, made.input_names) == ("net", ["image"])
    names = [layer.name for layer in made.get_layer("first").layers]
    assert names == ["first_depthwise", "first_pointwise"]
    for have, want in zip(made.get_weights(), before, strict=True):
        np.testing.assert_array_equal(have, want)
    # Its own weights: training one does not move the other.
    made.get_layer("head").kernel.assign_add(made.get_layer("head").kernel)
    for have, want in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(have, want)


def test_settings_are_kept():
    model = _network(
        depthwise_regularizer=keras.regularizers.L2(0.1),
        pointwise_regularizer=keras.regularizers.L1(0.2),
        bias_constraint="non_neg",
        dtype="float64",
        trainable=False,
        use_bias=True,
        dilation_rate=2,
        activation="tanh",
    )
    depthwise, pointwise = tfl.split_separable(model).get_layer("first").layers
    assert type(depthwise) is layers.DepthwiseConv2D
    assert type(pointwise) is layers.Conv2D
    assert (depthwise.kernel_size, pointwise.kernel_size) == ((3, 2), (1, 1))
    assert (depthwise.depth_multiplier, pointwise.filters) == (2, 6)
    assert (depthwise.dilation_rate, pointwise.dilation_rate) == ((2, 2), (1, 1))
    assert (depthwise.use_bias, pointwise.use_bias) == (False, True)
    assert float(depthwise.depthwise_regularizer.l2) == pytest.approx(0.1)
    assert float(pointwise.kernel_regularizer.l1) == pytest.approx(0.2)
    assert isinstance(pointwise.bias_constraint, keras.constraints.NonNeg)
    assert pointwise.activation is keras.activations.tanh
    assert depthwise.activation is keras.activations.linear
    for layer in (depthwise, pointwise):
        assert layer.dtype == "float64"
        assert not layer.trainable


def test_what_is_split_is_exported_and_proved(tmp_path):
    images = _images()
    made = tfl.split_separable(_network())
    model = tfl.quantize(made, [tfl.PrecisionRule(".*", 3, 3, "lsq", "lsq")])
    tfl.calibrate(model, [images])
    # What is between the two is rounded, too.
    between = {t.layer.name for t in tfl.inspection.quantized_tensors(model)}
    assert "inner_depthwise_quantizer" in between
    file = tmp_path / "net.tflite"
    result = tfl.export.to_tflite(model, file, [images], verbose=0)
    assert tfl.export.verify(file, result, [images], verbose=0).ok


def test_quantize_splits_by_itself():
    """Under the layers' own names, as the function that splits says."""
    model = _network(activation="relu")
    before = model.get_weights()
    flat, split = separable.split_in_graph(graph.flatten(model))
    np.testing.assert_allclose(flat(_images()), model(_images()), atol=1e-5)
    assert [layer.name for layer in split] == ["first", "shared", "inner"]
    assert split == {layer: [f"{layer.name}_depthwise", layer.name] for layer in split}
    first, second = (
        tfl.PrecisionRule("first|inner", 3, 4),
        tfl.PrecisionRule(".*", 2, 2),
    )
    quantized = tfl.quantize(model, [first, second])
    bits = {
        tensor.name: tensor.bits
        for tensor in tfl.inspection.quantized_tensors(quantized)
        if tensor.role == "weight"
    }
    assert bits == {
        "first_depthwise/depthwise_kernel": 3,
        "first/kernel": 3,
        "shared_depthwise/depthwise_kernel": 2,
        "shared/kernel": 2,
        "inner_depthwise/depthwise_kernel": 3,
        "inner/kernel": 3,
    }
    assert quantized.output_names == model.output_names
    for have, want in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(have, want)


def test_a_network_without_separable_convolutions_stays_as_it_is():
    model = keras.Sequential([layers.Input((3,)), layers.Dense(2)])
    assert separable.split_in_graph(model) == (model, {})


@pytest.mark.parametrize(
    ("rule", "pattern", "edges"),
    [
        (tfl.PrecisionRule("conv", 2, 2), "conv|conv_depthwise", True),
        (tfl.PrecisionRule("(?i)CONV", 2, 2), "(?i)CONV|conv_depthwise", True),
        (tfl.PrecisionRule(".*", 2, 2), ".*", None),
        (tfl.PrecisionRule("other", 2, 2), "other", None),
        (
            tfl.PrecisionRule(".*", 2, 2, layer_type="SeparableConv2D"),
            "conv_depthwise|conv",
            False,
        ),
        (tfl.PrecisionRule(".*", 2, 2, layer_type="Conv2D"), ".*", None),
    ],
)
def test_rules_reach_both_parts(rule, pattern, edges):
    layer = layers.SeparableConv2D(3, 3, name="conv")
    found = with_parts(rule, {layer: ["conv_depthwise", "conv"]})
    assert (found.pattern, found.edges) == (pattern, edges)
    assert found.reaches_edges == rule.reaches_edges
    kept = rule.layer_type if found is rule else None
    assert found.layer_type == kept


def test_check_says_nothing_of_what_quantize_splits():
    assert tfl.export.check(_network()).ok


def test_a_sequential_model():
    model = keras.Sequential(
        [layers.Input((8, 8, 2)), layers.SeparableConv2D(3, 3, name="conv")], name="s"
    )
    made = tfl.split_separable(model)
    images = _images()[:, :8, :, :2]
    np.testing.assert_allclose(made(images), model(images), atol=1e-6)


@pytest.mark.parametrize(
    "model", [keras.Sequential([layers.Dense(2)]), keras.Model(), "net"]
)
def test_what_has_no_graph_is_refused(model):
    with pytest.raises(ValueError, match=r"built Sequential or Functional.*Received: "):
        tfl.split_separable(model)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "more",
    [
        {"padding": "causal", "dilation_rate": 2},
        {"padding": "same", "strides": 2},
        {"depth_multiplier": 3, "activation": "relu"},
    ],
)
def test_convolutions_of_steps_are_split_and_exported(more, tmp_path):
    model = keras.Sequential(
        [
            layers.Input((12, 3)),
            layers.SeparableConv1D(4, 3, name="conv", **more),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )
    steps = np.random.default_rng(0).normal(size=(8, 12, 3)).astype(np.float32)
    for made in (tfl.split_separable(model), separable.split_in_graph(model)[0]):
        np.testing.assert_allclose(made(steps), model(steps), atol=1e-6)
    rule = tfl.PrecisionRule(".*", 4, 4, "uniform", "uniform", edges=True)
    quantized = tfl.quantize(model, rule)
    tfl.calibrate(quantized, [steps])
    file = tmp_path / "net.tflite"
    tfl.export.to_tflite(quantized, file, [steps], verbose=0)
    assert tfl.export.verify(file, quantized, [steps], verbose=0).ok
