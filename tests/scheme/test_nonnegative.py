import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import inspection
from tf_lowbit.network import keras3_activations as keras3
from tf_lowbit.scheme.nonnegative import is_nonnegative

layers = keras.layers


def relu(x):
    return layers.ReLU()(layers.Conv2D(4, 1)(x))


def linear(x):
    return layers.Conv2D(4, 1)(x)


def gate(x):
    return layers.Conv2D(4, 1, activation="sigmoid")(x)


def hard_sigmoid(x):
    """As MobileNetV3 has it."""
    return layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0)


SURE = {
    "relu": relu,
    "activation": lambda x: layers.Activation("softplus")(linear(x)),
    "softmax": lambda x: layers.Softmax()(linear(x)),
    "own activation": gate,
    "another bound": lambda x: layers.ReLU(max_value=4.0)(linear(x)),
    "layer as activation": lambda x: layers.Conv2D(4, 1, activation=layers.ReLU())(x),
    "relu function": lambda x: tf.nn.relu(linear(x)),
    "function": lambda x: tf.sigmoid(linear(x)),
    "excited": lambda x: layers.Multiply()([relu(x), gate(x)]),
    "operator": lambda x: relu(x) * gate(x),
    "Keras 3's gate": lambda x: layers.Activation(keras3.hard_sigmoid)(linear(x)),
    "hard gate": lambda x: layers.Multiply()([relu(x), hard_sigmoid(linear(x))]),
    "sum": lambda x: layers.Add()([relu(x), layers.MaxPooling2D(1)(relu(x))]),
    "joined": lambda x: layers.Concatenate()([relu(x), gate(x)]),
    "moved": lambda x: layers.Rescaling(2.0, offset=1.0)(relu(x)),
    "plus a number": lambda x: relu(x) + 0.5,
    "divided": lambda x: relu(x) / np.full((4,), 2.0, np.float32),
    "larger": lambda x: layers.UpSampling2D(interpolation="bilinear")(relu(x)),
}
OPEN = {
    "linear": linear,
    "image": lambda x: x,
    "normalised": lambda x: layers.BatchNormalization()(relu(x)),
    "leaky": lambda x: layers.LeakyReLU()(linear(x)),
    "sloped": lambda x: layers.ReLU(negative_slope=0.1)(linear(x)),
    "swish": lambda x: layers.Activation("swish")(linear(x)),
    "tanh": lambda x: layers.Conv2D(4, 1, activation="tanh")(x),
    "half excited": lambda x: layers.Multiply()([linear(x), gate(x)]),
    "sum": lambda x: layers.Add()([relu(x), linear(x)]),
    "difference": lambda x: layers.Subtract()([relu(x), relu(x)]),
    "minus a number": lambda x: relu(x) - 0.5,
    "plus a negative number": lambda x: relu(x) + (-0.5),
    "times a negative number": lambda x: relu(x) * -1.0,
    "moved": lambda x: layers.Rescaling(1.0, offset=-0.5)(relu(x)),
    "sharpened": lambda x: layers.UpSampling2D(interpolation="bicubic")(relu(x)),
}


@pytest.mark.parametrize("name", SURE)
def test_what_layers_tell_holds_for_what_they_compute(name):
    image = keras.Input((6, 6, 3))
    tensor = SURE[name](image)
    assert is_nonnegative(tensor)
    model = keras.Model(image, tensor)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    values = model(rng.normal(size=(8, 6, 6, 3)).astype(np.float32)).numpy()
    assert values.min() >= 0.0


@pytest.mark.parametrize("name", OPEN)
def test_what_may_be_negative_is_not_promised(name):
    assert not is_nonnegative(OPEN[name](keras.Input((6, 6, 3))))


def test_a_deep_network_needs_no_recursion():
    x = relu(keras.Input((4, 4, 3)))
    for _ in range(1500):
        x = layers.Add()([x, x])
    assert is_nonnegative(x)


@pytest.mark.parametrize("kind", ["lsq", "dorefa"])
def test_behind_squeeze_and_excite_the_grid_is_unsigned(kind):
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="stem")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization()(x))
    weights = layers.GlobalAveragePooling2D(keepdims=True)(x)
    weights = layers.Conv2D(8, 1, activation="sigmoid", name="gate")(weights)
    x = layers.Multiply(name="excited")([x, weights])
    x = layers.Conv2D(4, 3, name="conv")(x)
    x = layers.Dense(2, name="head")(layers.Flatten()(x))
    rule = tfl.PrecisionRule("conv", 2, 2, activation_quantizer=kind)
    model = tfl.quantize(keras.Model(image, x), [rule])
    data = np.random.default_rng(1).uniform(size=(32, 8, 8, 3)).astype(np.float32)
    tfl.calibrate(model, [data])
    (tensor,) = (
        t for t in inspection.quantized_tensors(model) if t.attribute == "output"
    )
    assert tensor.layer.name == "excited_quantizer"
    assert not tensor.quantizer.signed
    assert tensor.layer.quantize_config.replaces == "linear"
    probe = keras.Model(model.input, tensor.layer.output)
    found = np.unique(probe(data).numpy())
    step = tensor.quantizer.step(None, tensor.variables)
    grid = np.arange(4) * np.ravel(step)[0]
    # Where a signed grid of 2 bits would leave 0 and one more.
    assert len(found) >= 3
    np.testing.assert_allclose(found, grid[: len(found)], rtol=1e-6)
    # It is no ReLU's: stripped, nothing is left of it.
    stripped = tfl.strip(model)
    assert "excited_quantizer" not in {layer.name for layer in stripped.layers}
