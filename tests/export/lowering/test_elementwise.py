import numpy as np
import pytest

from tests.export.networks import (
    CLASSES,
    EDGE,
    IMAGE,
    Rule,
    assert_as_trained,
    branched,
    conv_bn_relu,
    differing_codes,
    finished,
    images,
    layers,
    network,
    normals,
    prove,
    quantize,
)
from tf_lowbit import export
from tf_lowbit.compat import CustomScaleLayer, LayerScale, StochasticDepth, keras, tf
from tf_lowbit.export.integer import twin
from tf_lowbit.export.lowering import elementwise
from tf_lowbit.export.proof import agreement, comparison
from tf_lowbit.network import graph

THREE = [1.0, -2.0, 0.5]


def normalization(**arguments):
    layer = layers.Normalization(
        mean=[0.5, 1.0, 2.0], variance=[4.0, 1.0, 0.25], **arguments
    )
    return layer


def batch_norm():
    layer = layers.BatchNormalization()
    layer.build((None, 4, 4, 3))
    rng = np.random.default_rng(0)
    layer.set_weights([rng.uniform(0.5, 2.0, 3) for _ in range(4)])
    return layer


SCALES = {
    "add": lambda x: x + 3.0,
    "add_in_front": lambda x: 3.0 + x,
    "subtract": lambda x: x - 1,
    "subtract_from": lambda x: 1.5 - x,
    "multiply": lambda x: x * 0.5,
    "divide": lambda x: x / 6.0,
    "by_channel": lambda x: x * tf.constant(THREE),
    "by_channel_in_full": lambda x: x / np.reshape(THREE, (1, 1, 1, 3)),
    "one_number_in_brackets": lambda x: x * [2.0],
    "function": lambda x: tf.add(x, 0.25),
    "with_a_name": lambda x: tf.add(x, 0.25, "name"),
    "without_a_name": lambda x: tf.add(x, 0.25, None),
    "named": lambda x: tf.multiply(x=x, y=0.25),
    "named_the_other_way": lambda x: tf.subtract(y=x, x=0.25),
    "negative": lambda x: -x,
    "rescaling": lambda x: layers.Rescaling(1 / 127.5, -1.0)(x),
    "rescaling_by_channel": lambda x: layers.Rescaling(THREE, [0.0, 1.0, 2.0])(x),
    "normalization": lambda x: normalization()(x),
    "normalization_inverted": lambda x: normalization(invert=True)(x),
    "normalization_of_all": lambda x: layers.Normalization(
        axis=None, mean=1.0, variance=4.0
    )(x),
    "batch_norm": lambda x: batch_norm()(x),
}
OTHERS = {
    "divide_a_number": lambda x: 1.0 / x,
    "by_pixel": lambda x: x * np.arange(16.0).reshape(1, 4, 4, 1),
    "by_column": lambda x: x + np.arange(4.0).reshape(1, 1, 4, 1),
    "power": lambda x: x**2,
    "rescaling_of_each_pixel": layers.Rescaling(np.ones((4, 4, 3))),
    "offset_of_each_pixel": layers.Rescaling(1.0, np.ones((4, 4, 3))),
    "two_tensors": lambda x: x * layers.ReLU()(x),
    "more_axes": lambda x: x + np.zeros((1, 1, 1, 1, 1)),
    "relu": layers.ReLU(),
    "softmax": layers.Softmax(),
}


def last_node(function):
    """The last node of a model that is one function, and the model."""
    x = keras.Input((4, 4, 3))
    model = keras.Model(x, function(x))
    return list(graph.calls(model))[-1], model


@pytest.mark.parametrize("case", SCALES)
def test_gain_and_offset_are_what_the_layer_does(case):
    node, model = last_node(SCALES[case])
    gain, offset = elementwise.scale(node)
    assert gain.shape in {(1,), (3,)}
    assert gain.dtype == offset.dtype == np.float64
    x = normals(5, (4, 4, 3))
    wanted = model(x).numpy()
    np.testing.assert_allclose(x * gain + offset, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", OTHERS)
def test_other_layers_are_no_gain_and_offset(case):
    node, _ = last_node(OTHERS[case])
    assert elementwise.scale(node) is None


@pytest.mark.parametrize("axis", [1, (1, 3)])
def test_a_normalization_over_another_axis_is_refused(axis):
    node, _ = last_node(layers.Normalization(axis=axis, name="odd"))
    with pytest.raises(export.ExportError, match=r"'odd' with axis=\(1"):
        elementwise.scale(node)


def test_tensors_are_joined_by_layers_and_by_operators():
    x = keras.Input((4, 4, 3))
    y = layers.ReLU()(x)
    pooled = layers.GlobalAveragePooling2D()(x)
    for joined, wanted in (
        (layers.Add()([x, y]), np.add),
        (layers.Multiply()([x, y]), np.multiply),
        (x + y, np.add),
        (CustomScaleLayer(0.2)([x, y]), np.add),
        (tf.multiply(x, y), np.multiply),
        (x - y, None),
        (x / y, None),
        (x + 1.0, None),
        # Keras's layer and TensorFlow's operator place these axes differently.
        (x * pooled, None),
    ):
        assert elementwise.join(graph.producer(joined)) is wanted


def test_of_joined_tensors_those_of_a_scaled_sum_have_factors():
    x, y = keras.Input((4, 4, 3)), keras.Input((4, 4, 3))
    for joined, wanted in (
        (CustomScaleLayer(0.2)([x, y]), [1.0, 0.2]),
        (layers.Add()([x, y, y]), [1.0, 1.0, 1.0]),
        (x * y, [1.0, 1.0]),
    ):
        assert elementwise.factors(graph.producer(joined)) == wanted


ACTIVATIONS = {
    "gelu_layer": layers.Activation("gelu"),
    "gelu": lambda x: tf.nn.gelu(x, approximate=False),
    "swish": layers.Activation("swish"),
    "silu": tf.nn.silu,
    "sigmoid": tf.sigmoid,
    "tanh": tf.tanh,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "softmax": tf.nn.softmax,
    "softmax_layer": layers.Softmax(),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", ACTIVATIONS)
def test_float_activations_are_computed_and_proved(case):
    def body(x):
        x = layers.Conv2D(4, 3, name="front")(x)
        return conv_bn_relu(ACTIVATIONS[case](x), 4, name="inner")

    model = quantize(network(body), [EDGE, Rule("inner", 2, 2)])
    proof = prove(model, images())
    wanted, have = model(images()).numpy(), proof.snapped.twin(images()).numpy()
    assert np.abs(have - wanted).max() <= 0.1 * np.abs(wanted).max()


@pytest.mark.slow
def test_a_block_of_convnext_leaves():
    scale = LayerScale(0.5, 4, name="scale")

    def body(x):
        y = layers.Conv2D(4, 3, groups=4, padding="same", name="inner")(x)
        y = layers.LayerNormalization(name="norm")(y)
        y = layers.Activation("gelu", name="gelu")(layers.Dense(8, name="up")(y))
        y = StochasticDepth(0.5, name="drop")(scale(layers.Dense(4, name="down")(y)))
        return layers.ReLU(name="last_relu")(layers.Add(name="add")([x, y]))

    made = network(body)
    made.get_layer("scale").gamma.assign([0.5, -2.0, 0.0, 1.5])
    model = quantize(
        made, [EDGE, Rule(".*_relu", None, 3), Rule("inner|up|down", 3, 3)]
    )
    proof = prove(model, images())
    assert isinstance(proof.layer("down"), twin.IntegerLinear)
    assert not {"scale", "drop"} & {layer.name for layer in proof.snapped.twin.layers}
    found = differing_codes(model, proof.snapped, images())
    assert any(name.startswith("last_relu") for name in found)
    wanted, have = model(images()).numpy(), proof.snapped.twin(images()).numpy()
    assert np.abs(have - wanted).max() <= 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize(
    "function",
    [
        layers.Softmax(0),
        layers.Softmax(1),
        lambda x: tf.nn.softmax(x, 1),
        lambda x: tf.nn.softmax(x, axis=0),
    ],
)
def test_a_softmax_over_another_axis_is_refused(function):
    node, _ = last_node(function)
    with pytest.raises(export.ExportError, match="over the last axis"):
        elementwise.activation(node)


def test_settings_make_another_function():
    assert elementwise.activation(last_node(tf.nn.silu)[0]) == "swish"
    for beta in (2.0, 0.0, np.array([1.0, 2.0, 3.0], np.float32)):
        node, _ = last_node(lambda x, beta=beta: tf.nn.silu(x, beta))
        assert elementwise.activation(node) is None
    named = last_node(lambda x: tf.nn.silu(x, beta=2.0))[0]
    assert elementwise.activation(named) is None
    rough = last_node(lambda x: tf.nn.gelu(x, approximate=True))[0]
    assert elementwise.activation(rough) is None
    last = last_node(lambda x: tf.nn.softmax(x, axis=-1, name="last"))[0]
    assert elementwise.activation(last) == "softmax"


def _slopes(**arguments):
    """Learned slopes, some of them negative."""
    layer = layers.PReLU(
        alpha_initializer=keras.initializers.RandomNormal(0.2, 0.3, seed=1), **arguments
    )
    return layer


def _layer_norm(**arguments):
    initializer = keras.initializers.RandomUniform(0.5, 2.0, seed=1)
    return layers.LayerNormalization(
        gamma_initializer=initializer, beta_initializer=initializer, **arguments
    )


FLOATS = {
    "leaky_relu": lambda: layers.LeakyReLU(0.125),
    "prelu": _slopes,
    "prelu_by_channel": lambda: _slopes(shared_axes=[1, 2]),
    "layer_norm": lambda: _layer_norm(epsilon=0.01),
    "layer_norm_without_gamma": lambda: _layer_norm(scale=False),
    "layer_norm_without_beta": lambda: _layer_norm(center=False),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", FLOATS)
def test_float_layers_are_computed_proved_and_archived(case, tmp_path):
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(image, 4, name="first")
    x = layers.Conv2D(4, 3, name="front")(x)
    layer = FLOATS[case]()
    x = conv_bn_relu(layer(x), 4, name="inner")
    model = finished(image, x, CLASSES)
    quantized = quantize(model, [EDGE, Rule("front|inner", 4, 4)])
    proof = prove(quantized, images())
    wanted, have = quantized(images()).numpy(), proof.snapped.twin(images()).numpy()
    assert np.abs(have - wanted).max() <= 0.1 * np.abs(wanted).max()
    path = export.save_archive(proof.snapped, tmp_path / "net.npz")
    made = export.load_archive(path).layer(layer.name)
    assert case.startswith(made.type)


@pytest.mark.slow
def test_what_comes_behind_floats_is_not_asked_to_be_the_same_to_the_bit():
    def body(x):
        x = layers.Activation("swish", name="swish")(x)
        x = layers.DepthwiseConv2D(3, name="spread")(x)
        return conv_bn_relu(x, 4, name="inner")

    model = quantize(network(body), [EDGE, Rule("inner", 4, 4)])
    # Of the layers of floats each is one by itself, whatever stands in front.
    made = prove(model, images()).layer("spread")
    assert type(made) is layers.DepthwiseConv2D
    assert agreement.computes_floats(made)
    x = keras.Input((4, 4, 3))
    made = keras.Model(x, layers.DepthwiseConv2D(3, name="d")(x))
    node = next(iter(graph.calls(made)))
    assert comparison._behind_float([node]) == {"d"}


def test_a_tensor_joined_with_itself_is_no_gain():
    for function, wanted in ((lambda x: x * x, np.multiply), (lambda x: x + x, np.add)):
        node, _ = last_node(function)
        assert elementwise.scale(node) is None
        assert elementwise.join(node) is wanted


# --- whole networks -------------------------------------------------------------------

EVERYWHERE = [Rule(".*_relu", None, 2), Rule(".*", 2, 2, edges=True)]


@pytest.mark.slow
def test_numbers_behind_a_convolution_are_folded_into_its_thresholds():
    def scaled(x, name):
        x = layers.Conv2D(5, 3, name=name)(x)
        x = layers.Rescaling(0.5, 0.25)(-2.0 * x + 0.125)
        return layers.ReLU(name=f"{name}_relu")(x / tf.constant([1.0, 2, 3, 4, 5]))

    x = normals(8)
    proof = prove(quantize(branched({"one": scaled}, IMAGE), EVERYWHERE), x)
    assert_as_trained(proof, x)
    assert len(twin.integer_layers(proof.snapped.twin)) == 1


@pytest.mark.slow
def test_numbers_behind_a_relu_are_an_integer_layer():
    def scaled(x, name):
        x = conv_bn_relu(x, 5, name=name)
        return layers.ReLU(name=f"{name}_last_relu")(0.75 * x - 0.25)

    x = normals(8)
    proof = prove(quantize(branched({"one": scaled}, IMAGE), EVERYWHERE), x)
    assert_as_trained(proof, x)
    assert len(twin.integer_layers(proof.snapped.twin)) == 2


def _residual(join):
    def body(x):
        side = layers.Conv2D(4, 3, padding="same", name="side")(x)
        return layers.ReLU(name="sum_relu")(join(x, side))

    def made(x):
        return conv_bn_relu(body(x), 4, name="inner")

    rules = [EDGE, Rule("side|inner", 2, 2)]
    return prove(quantize(network(made), rules), images())


@pytest.mark.slow
def test_a_sum_by_operator_is_the_integer_sum_of_the_layer():
    by_layer = _residual(lambda x, y: layers.Add(name="sum")([x, y]))
    by_operator = _residual(lambda x, y: x + y)
    kinds = [
        [type(layer) for layer in proof.snapped.twin.layers]
        for proof in (by_layer, by_operator)
    ]
    assert kinds[0] == kinds[1]
    assert twin.IntegerAdd in kinds[0]
    np.testing.assert_array_equal(
        by_layer.snapped.twin(images()), by_operator.snapped.twin(images())
    )


def squeeze_excite(x, join):
    """Each channel times a number in [0, 1] that is made of all of them."""
    gate = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    gate = layers.Conv2D(2, 1, activation="swish", name="reduce")(gate)
    gate = layers.Conv2D(4, 1, activation="sigmoid", name="expand")(gate)
    return join(x, gate)


@pytest.mark.slow
@pytest.mark.parametrize(
    "join", [lambda x, y: layers.Multiply(name="excite")([x, y]), lambda x, y: x * y]
)
def test_a_squeeze_and_excite_block_leaves(join, tmp_path):
    def body(x):
        return conv_bn_relu(squeeze_excite(x, join), 4, name="inner")

    rules = [EDGE, Rule("reduce|expand|inner", 4, 4)]
    proof = prove(quantize(network(body), rules), images())
    (product,) = [
        layer
        for layer in proof.snapped.twin.layers
        if isinstance(layer, layers.Multiply)
    ]
    assert product.output_shape == (None, *IMAGE[:2], 4)
    wanted = proof.model(images()).numpy()
    have = proof.snapped.twin(images()).numpy()
    assert np.abs(have - wanted).max() <= 0.1 * np.abs(wanted).max()
    path = export.save_archive(proof.snapped, tmp_path / "net.npz")
    assert export.load_archive(path).layer(product.name).type == "multiply"


@pytest.mark.slow
def test_a_hard_swish_of_operators_leaves():
    """As MobileNetV3 writes it."""

    def body(x):
        x = layers.Conv2D(4, 3, name="front")(x)
        gate = layers.ReLU(6.0, name="gate")(x + 3.0) * (1.0 / 6.0)
        x = layers.Multiply(name="swish")([x, gate])
        return conv_bn_relu(x, 4, name="inner")

    proof = prove(quantize(network(body), [EDGE, Rule("inner", 4, 4)]), images())
    wanted = proof.model(images()).numpy()
    have = proof.snapped.twin(images()).numpy()
    assert np.abs(have - wanted).max() <= 0.1 * np.abs(wanted).max()


@pytest.mark.slow
def test_products_of_three_of_different_shapes_leave():
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(image, 4, name="first")
    row = layers.AveragePooling2D((8, 1), name="row")(x)
    column = layers.AveragePooling2D((1, 8), name="column")(x)
    x = layers.Multiply(name="outer")([row, column, x])
    x = conv_bn_relu(x, 4, name="inner")
    model = quantize(finished(image, x), [EDGE, Rule("inner", 4, 4)])
    proof = prove(model, images())
    assert proof.layer("outer").output_shape == (None, *IMAGE[:2], 4)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["float", "int8"])
def test_a_first_layer_behind_a_rescaling_is_what_was_asked_for(first):
    """As EfficientNet takes its pixels."""
    image = keras.Input(IMAGE, name="image")
    x = layers.Rescaling(1 / 255.0, name="scaled")(image)
    x = layers.Normalization(mean=[0.5, 0.25], variance=[0.25, 0.0625])(x)
    x = conv_bn_relu(x, 4, name="first")
    x = layers.ReLU(name="last_relu")(conv_bn_relu(x, 4, name="inner"))
    model = finished(image, x, CLASSES)
    data = 255 * images()
    proof = prove(quantize(model, [Rule("inner", 2, 2)]), data, first_layer=first)
    is_integer = isinstance(proof.layer("first"), twin.IntegerLinear)
    assert is_integer == (first == "int8")
    assert ("normalization" in proof.notes) == is_integer
    wanted, have = proof.model(data).numpy(), proof.snapped.twin(data).numpy()
    assert np.abs(have - wanted).max() <= 0.1 * np.abs(wanted).max()
