"""Each operation of Keras 3 puts out the same after the conversion, in every form."""

import re
from pathlib import Path

import keras as keras3
import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras
from tf_lowbit.network import keras3_operations

ROOT = Path(__file__).resolve().parent.parent.parent
layers = keras3.layers
ops = keras3.ops
SHAPE = (4, 6, 2)
ARRAY = np.random.default_rng(1).uniform(0.5, 2, SHAPE).astype(np.float32)

# Class of the operation -> calls with x, an image of positive numbers.
FORMS = {
    "Absolute": [lambda x: ops.abs(x - 1.0)],
    "Add": [
        lambda x: ops.add(x, x),
        lambda x: x + 2,
        lambda x: 0.5 + x,
        lambda x: ops.add(ARRAY, x),
        lambda x: x + ops.convert_to_tensor(ARRAY),
        lambda x: x + ops.mean(x, axis=1, keepdims=True),
    ],
    "Amax": [ops.amax, lambda x: ops.amax(x, axis=(1, 2))],
    "Amin": [ops.amin, lambda x: ops.amin(x, axis=-1, keepdims=True)],
    "Argmax": [
        lambda x: ops.argmax(x, axis=-1),
        lambda x: ops.argmax(x, axis=1, keepdims=True),
    ],
    "AveragePool": [
        lambda x: ops.average_pool(x, 2),
        lambda x: ops.average_pool(x, (2, 3), strides=1, padding="same"),
        lambda x: ops.average_pool(x[:, 0], 2),
    ],
    "Cast": [lambda x: ops.cast(x * 9, "int32"), lambda x: ops.cast(x, "float64")],
    "Ceil": [ops.ceil],
    "Clip": [lambda x: ops.clip(x, 0.7, 1.5)],
    "Concatenate": [
        lambda x: ops.concatenate([x, 2 * x], axis=-1),
        lambda x: ops.concatenate([x, x[:, :1], x], axis=1),
        lambda x: ops.concatenate((x, ops.cast(x, "int32")), 2),
    ],
    "DepthToSpace": [lambda x: ops.depth_to_space(ops.tile(x, (1, 1, 1, 4)), 2)],
    "Divide": [lambda x: x / 3, lambda x: 1.0 / x, lambda x: ops.divide(x, ARRAY)],
    "Elu": [lambda x: ops.elu(x - 1.0), lambda x: ops.elu(x - 1.0, alpha=0.3)],
    "Equal": [lambda x: ops.cast(ops.equal(x, ops.max(x)), "float32")],
    "Exp": [ops.exp],
    "ExpandDims": [
        lambda x: ops.expand_dims(x, 1),
        lambda x: ops.expand_dims(x, -1),
        lambda x: ops.expand_dims(x, (-2, 1)),
    ],
    "Flip": [lambda x: ops.flip(x, axis=1), lambda x: ops.flip(x, axis=(1, -1))],
    "Floor": [lambda x: ops.floor(4 * x)],
    "Gelu": [
        lambda x: ops.gelu(x - 1.0),
        lambda x: ops.gelu(x - 1.0, approximate=False),
    ],
    "GetItem": [
        lambda x: x[:, 1:],
        lambda x: x[:, ::2, :-1],
        lambda x: x[..., 0],
        lambda x: x[:, None, -1, ..., 1:],
        lambda x: x[:, 3:0:-2],
        lambda x: x[0],
    ],
    "Greater": [lambda x: ops.cast(x > 1.0, "float32")],
    "GreaterEqual": [lambda x: ops.cast(x >= 2 - x, "float32")],
    "HardSigmoid": [lambda x: ops.hard_sigmoid(4 * x - 4)],
    "HardSilu": [lambda x: ops.hard_silu(4 * x - 4)],
    "LeakyRelu": [
        lambda x: ops.leaky_relu(x - 1.0),
        lambda x: ops.leaky_relu(x - 1.0, negative_slope=0.4),
    ],
    "Less": [lambda x: ops.cast(x < ARRAY, "float32")],
    "LessEqual": [lambda x: ops.cast(x <= 1.0, "float32")],
    "Log": [ops.log],
    "LogSoftmax": [ops.log_softmax, lambda x: ops.log_softmax(x, axis=1)],
    "Matmul": [
        lambda x: ops.matmul(x, ops.transpose(x, (0, 1, 3, 2))),
        lambda x: x @ ARRAY[0, :2],
    ],
    "Max": [
        ops.max,
        lambda x: ops.max(x, axis=(1, 2)),
        lambda x: ops.max(x, axis=2, keepdims=True, initial=1.5),
    ],
    "MaxPool": [
        lambda x: ops.max_pool(x, 2),
        lambda x: ops.max_pool(x, (2, 3), strides=1, padding="same"),
        lambda x: ops.max_pool(x[:, 0], 2),
        lambda x: ops.max_pool(ops.expand_dims(x, 1), (1, 2, 2)),
    ],
    "Maximum": [
        lambda x: ops.maximum(x, 1.0),
        lambda x: ops.maximum(ARRAY, x),
        lambda x: ops.maximum(ops.cast(x, "int32"), x),
    ],
    "Mean": [
        ops.mean,
        lambda x: ops.mean(x, axis=1),
        lambda x: ops.mean(x, axis=(1, 2), keepdims=True),
        lambda x: ops.mean(x, (-1, -2)),
        lambda x: ops.mean(ops.cast(4 * x, "int32"), axis=1),
    ],
    "Min": [
        ops.min,
        lambda x: ops.min(x, axis=-1),
        lambda x: ops.min(x, axis=(1, 2), initial=0.6),
    ],
    "Minimum": [lambda x: ops.minimum(x, 1.0), lambda x: ops.minimum(x, 2 - x)],
    "Moveaxis": [
        lambda x: ops.moveaxis(x, 1, -1),
        lambda x: ops.moveaxis(x, (3, 1), (1, 2)),
    ],
    "Multiply": [
        lambda x: x * x,
        lambda x: 2 * x,
        lambda x: ops.multiply(x, ARRAY),
        lambda x: 0.5 * ops.cast(4 * x, "int32"),
    ],
    "Negative": [lambda x: -x],
    "Normalize": [
        ops.normalize,
        lambda x: ops.normalize(x, axis=1, epsilon=0.5),
        lambda x: ops.normalize(0 * x),
    ],
    "Pad": [
        lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0))),
        lambda x: ops.pad(x, ((0, 0), (1, 2), (1, 1), (0, 0)), mode="reflect"),
        lambda x: ops.pad(x, ((0, 0), (1, 2), (1, 1), (0, 0)), mode="symmetric"),
        lambda x: ops.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=3.0),
    ],
    "Power": [lambda x: x**2, lambda x: 2.0**x, lambda x: ops.power(x, x)],
    "Prod": [lambda x: ops.prod(x, axis=-1), lambda x: ops.prod(x, (1, 2), True)],
    "Relu": [lambda x: ops.relu(x - 1.0)],
    "Relu6": [lambda x: ops.relu6(9 * x - 9.0)],
    "Repeat": [lambda x: ops.repeat(x, 2, axis=1), lambda x: ops.repeat(x, 3, -1)],
    "Reshape": [
        lambda x: ops.reshape(x, (-1, 48)),
        lambda x: ops.reshape(x, [-1, 6, 8]),
        lambda x: ops.reshape(x, -1),
    ],
    "Resize": [
        lambda x: ops.image.resize(x, (8, 12)),
        lambda x: ops.image.resize(x, (3, 3), interpolation="nearest"),
        lambda x: ops.image.resize(x, (2, 3), antialias=True),
    ],
    "Roll": [lambda x: ops.roll(x, 1, axis=1), lambda x: ops.roll(x, -2, axis=2)],
    "Round": [lambda x: ops.round(4 * x)],
    "Rsqrt": [ops.rsqrt],
    "Selu": [lambda x: ops.selu(x - 1.0)],
    "Sigmoid": [ops.sigmoid, keras3.activations.sigmoid],
    "Sign": [lambda x: ops.sign(x - 1.0)],
    "Silu": [lambda x: ops.silu(x - 1.0), ops.swish],
    "Softmax": [ops.softmax, lambda x: ops.softmax(x, axis=1)],
    "Softplus": [ops.softplus],
    "Softsign": [ops.softsign],
    "SpaceToDepth": [lambda x: ops.space_to_depth(x, 2)],
    "Split": [
        lambda x: ops.split(x, 3, axis=2),
        lambda x: ops.split(x, [1, 3], axis=1),
        lambda x: ops.split(x, 2, axis=-1)[1],
    ],
    "Sqrt": [ops.sqrt],
    "Square": [ops.square],
    "Squeeze": [
        lambda x: ops.squeeze(x[:, :1], axis=1),
        lambda x: ops.squeeze(x[:, :1, :, :1], axis=(1, -1)),
        lambda x: ops.squeeze(x[:, :1, :, :1]),
    ],
    "Stack": [
        lambda x: ops.stack([x, 2 * x], axis=1),
        lambda x: ops.stack([x, x, x], -1),
    ],
    "Std": [lambda x: ops.std(x, axis=(1, 2)), lambda x: ops.std(x, -1, True)],
    "StopGradient": [ops.stop_gradient],
    "Subtract": [lambda x: x - 1, lambda x: 1 - x, lambda x: ops.subtract(x, ARRAY)],
    "Sum": [
        ops.sum,
        lambda x: ops.sum(x, axis=-1),
        lambda x: ops.sum(x, axis=(1, 3), keepdims=True),
    ],
    "Swapaxes": [lambda x: ops.swapaxes(x, 1, 2), lambda x: ops.swapaxes(x, -1, 1)],
    "Take": [lambda x: ops.take(x, [2, 0, 1], axis=1), lambda x: ops.take(x, 1, -1)],
    "Tanh": [ops.tanh],
    "Tile": [lambda x: ops.tile(x, (1, 2, 1, 3)), lambda x: ops.tile(x, [1, 1, 2, 1])],
    "Transpose": [
        lambda x: ops.transpose(x, (0, 2, 1, 3)),
        lambda x: ops.transpose(x, axes=[0, 3, 1, 2]),
        ops.transpose,
    ],
    "TrueDivide": [lambda x: ops.true_divide(x, 3), lambda x: x / (x + 1)],
    "Var": [lambda x: ops.var(x, axis=(1, 2)), lambda x: ops.var(x, 1, True)],
    "Where": [
        lambda x: ops.where(x > 1.0, x, 0.0),
        lambda x: ops.where(x > 1.0, 2 * x, ARRAY),
    ],
}


def model_of(*forms):
    image = keras3.Input(SHAPE, name="image")
    return keras3.Model(image, [form(image) for form in forms])


def test_each_operation_of_the_table_is_tested():
    assert {*keras3_operations._LAYERS, *keras3_operations._FUNCTIONS} == set(FORMS)


def test_the_page_lists_the_table():
    text = (ROOT / "docs/how_to/keras3.md").read_text()
    listed = re.findall(
        r"^- .*?(?=^\S|\Z)", text.split("## What is converted")[1], re.M | re.S
    )
    found = sorted(re.findall(r"`(\w+)`", "".join(listed)))
    classes = {*keras3_operations._LAYERS, *keras3_operations._FUNCTIONS}
    assert found == sorted(re.sub(r"\B([A-Z])", r"_\1", c).lower() for c in classes)


@pytest.mark.parametrize("name", FORMS)
def test_outputs_stay_equal(name):
    model = model_of(*FORMS[name])
    assert name in {type(operation).__name__ for operation in model.operations}
    converted = tfl.from_keras3(model)
    images = np.random.default_rng(0).uniform(0.5, 2, (3, *SHAPE)).astype(np.float32)
    found, expected = converted(images), model(images)
    for ours, theirs in zip(
        keras3.tree.flatten(found), keras3.tree.flatten(expected), strict=True
    ):
        theirs = ops.convert_to_numpy(theirs)
        assert ours.dtype.name == theirs.dtype.name
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)
    # Only the batch's size may be open where it was.
    shapes = [tuple(tensor.shape) for tensor in converted.outputs]
    assert shapes == [tuple(tensor.shape) for tensor in model.outputs]


REFUSED = {
    "unknown": (ops.sin, "operation 'sin.*', Sin, .* not in the list"),
    "mode": (
        lambda x: ops.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge"),
        "operation 'pad.*', Pad, .*no mode='edge'",
    ),
    "decimals": (lambda x: ops.round(x, 2), "Round, .*no decimals=2"),
    "all axes": (ops.argmax, "Argmax, .*needs an axis"),
    "order": (lambda x: ops.normalize(x, order=1), "Normalize, .*no order=1"),
    "crop": (
        lambda x: ops.image.resize(x, (2, 2), crop_to_aspect_ratio=True),
        "Resize, .*neither crops nor pads",
    ),
    "variable": (
        lambda x: ops.add(x, keras3.Variable(ARRAY)),
        "Add, .*reads a variable",
    ),
    "own": (lambda x: Sin()(x), "operation 'sin.*', Sin, .* not in the list"),
}


class Sin(keras3.Operation):
    """Of the name of one of Keras's, as `Mean` might be."""

    def call(self, x):
        return x

    def compute_output_spec(self, x):
        return keras3.KerasTensor(x.shape, x.dtype)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused(name):
    form, message = REFUSED[name]
    image = keras3.Input(SHAPE, name="image")
    x = layers.Conv2D(2, 1, name="stem")(image)
    with pytest.raises(ValueError, match=message) as caught:
        tfl.from_keras3(keras3.Model(image, form(x)))
    assert "use a layer" in str(caught.value)
    assert "the output of 'stem'" in str(caught.value)


def test_layers_of_operations_keep_name_and_dtype():
    image = keras3.Input((4,), dtype="float16", name="image")
    x = ops.relu6(image)
    relu = x._keras_history.operation
    model = keras3.Model(image, relu(layers.Dense(3, dtype="float16")(x)))
    converted = tfl.from_keras3(model)
    found = converted.get_layer(relu.name)
    assert type(found) is keras.layers.ReLU
    assert len(found.inbound_nodes) == 2  # One layer, called twice as the operation is.
    assert converted.outputs[0].dtype == "float16"


def test_the_operations_are_quantized_and_exported():
    """As the layers they stand for: each has a form in the file."""
    keras3.backend.clear_session()  # Names start anew.
    x = image = keras3.Input((8, 8, 3), name="image")
    x = ops.relu(layers.Conv2D(4, 3, padding="same", name="stem")(x))
    y = ops.relu(layers.Conv2D(4, 3, padding="same", name="left")(x))
    x = ops.relu(x + layers.Conv2D(4, 1, name="right")(y))
    x = ops.concatenate([x[:, 1:, :-1], y[:, 1:, :-1]], axis=-1)
    x = ops.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0)))
    x = ops.max_pool(ops.transpose(x, (0, 2, 1, 3)), 2)
    x = ops.relu(layers.Conv2D(4, 3, name="mid")(x))
    x = ops.expand_dims(ops.mean(x, axis=(1, 2)), 1)
    x = ops.reshape(ops.squeeze(x, 1), (-1, 4))
    model = keras3.Model(image, layers.Dense(nets.CLASSES, name="head")(x))
    rules = [
        tfl.PrecisionRule("stem|head", 8, 8, "lsq", "lsq"),
        tfl.PrecisionRule(".*", 2, 2, "lsq", "lsq"),
    ]
    quantized = tfl.quantize(model, rules)
    assert tfl.export.check(quantized).ok
    assert {
        *("image_quantizer/output", "relu/output", "relu_1/output"),
        *("relu_2/output", "relu_3/output"),
    } == {name for name in nets.by_name(quantized) if name.endswith("output")}
