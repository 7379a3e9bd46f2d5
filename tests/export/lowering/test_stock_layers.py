import numpy as np
import pytest

from tests.export.networks import (
    EVERYWHERE,
    branched,
    conv,
    layers,
    normals,
    quantize,
)
from tf_lowbit import export
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import plain_layers
from tf_lowbit.export.lowering import forms, stock_layers
from tf_lowbit.export.tflite import writer
from tf_lowbit.network import graph

SHAPE = (6, 8, 3)
# What operations become; of a tensor of `SHAPE`.
OPERATIONS = {
    "reshape": (lambda x: tf.reshape(x, (-1, 8, 6, 3)), layers.Reshape),
    "flat": (lambda x: tf.reshape(x, (-1, 144)), layers.Reshape),
    "transpose": (lambda x: tf.transpose(x, (0, 2, 1, 3)), layers.Permute),
    "concat": (lambda x: tf.concat([x, tf.abs(x)], -1), layers.Concatenate),
    "pad": (
        lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]]),
        layers.ZeroPadding2D,
    ),
    "more_channels": (
        lambda x: tf.pad(x, [[0, 0], [0, 0], [0, 0], [1, 2]]),
        plain_layers.ZeroPadding,
    ),
    "all_sides": (
        lambda x: tf.pad(x, [[0, 0], [1, 0], [0, 2], [3, 0]]),
        plain_layers.ZeroPadding,
    ),
    "more_features": (
        lambda x: tf.pad(tf.reshape(x, (-1, 144)), [[0, 0], [1, 2]]),
        plain_layers.ZeroPadding,
    ),
    "every_other": (lambda x: x[:, ::2, ::2, :], layers.MaxPooling2D),
    "every_third": (lambda x: x[:, :, ::3], layers.MaxPooling2D),
    "every_step": (
        lambda x: tf.reshape(x, (-1, 6, 24))[:, ::4],
        layers.MaxPooling1D,
    ),
    "slice": (lambda x: x[:, 1:-1, 2:], layers.Cropping2D),
    "ellipsis": (lambda x: x[:, -3:, ...], layers.Cropping2D),
    "squeeze": (lambda x: tf.squeeze(x[:, 2:3], 1), layers.Reshape),
    "units": (
        lambda x: tf.squeeze(layers.Dense(1)(layers.Flatten()(x)), -1),
        layers.Reshape,
    ),
    "expand": (lambda x: tf.expand_dims(x, -1), layers.Reshape),
    "mean": (lambda x: tf.reduce_mean(x, [1, 2]), layers.GlobalAveragePooling2D),
    "kept": (lambda x: tf.reduce_mean(x, (2, 1), True), layers.GlobalAveragePooling2D),
    "resize": (lambda x: tf.image.resize(x, (12, 8)), layers.UpSampling2D),
    "nearest": (
        lambda x: tf.image.resize(x, (12, 24), "nearest"),
        layers.UpSampling2D,
    ),
    "resizing": (lambda x: layers.Resizing(12, 16)(x), layers.UpSampling2D),
}
# What has no stock layer.
OTHERS = {
    "batch": lambda x: tf.reshape(x, (-1, 3)),
    "batch_axis": lambda x: tf.transpose(x, (1, 0, 2, 3)),
    "batches": lambda x: tf.concat([x, x], 0),
    "examples": lambda x: tf.pad(x, [[1, 0], [0, 0], [0, 0], [0, 0]]),
    "ones": lambda x: tf.pad(x, [[0, 0], [1, 1], [0, 0], [0, 0]], constant_values=1.0),
    "mirrored": lambda x: tf.pad(x, [[0, 0], [1, 1], [0, 0], [0, 0]], "REFLECT"),
    "from_the_second": lambda x: x[:, 1::2],
    "reversed": lambda x: x[:, ::-1],
    "some": lambda x: x[..., :2],
    "row": lambda x: x[:, 1],
    "height": lambda x: tf.reduce_mean(x, 1),
    "part": lambda x: tf.image.resize(x, (9, 8)),
    "smaller": lambda x: tf.image.resize(x, (3, 4)),
    "smooth": lambda x: tf.image.resize(x, (12, 16), antialias=True),
    "cropped": lambda x: layers.Resizing(12, 12, crop_to_aspect_ratio=True)(x),
    "batch_size": lambda x: tf.shape(x)[0],
    "new_shape": lambda x: tf.concat([tf.shape(x)[:1], [3]], 0),
    "turned_number": lambda x: tf.transpose(tf.reduce_sum(x), ()),
    "longest_axis": lambda x: tf.argmax(tf.shape(x), 0),
    "joined_numbers": lambda x: tf.reshape(tf.shape(x)[0], (1, 1)),
}


def last_node(operation):
    image = keras.Input(SHAPE)
    model = keras.Model(image, operation(image))
    return model, list(graph.calls(model))[-1]


@pytest.mark.parametrize("case", OPERATIONS)
def test_the_stock_layer_computes_the_same(case):
    operation, kind = OPERATIONS[case]
    _, node = last_node(operation)
    made = stock_layers.layer_of(node)
    assert type(made) is kind
    assert made.name == node.layer.name
    x = [tf.constant(normals(2, t.shape[1:])) for t in node.keras_inputs]
    inner = keras.Model(node.keras_inputs, graph.outputs_of(node))
    argument = x[0] if len(x) == 1 else x
    np.testing.assert_allclose(made(argument), inner(argument), rtol=1e-6)


@pytest.mark.parametrize("case", OTHERS)
def test_what_computes_something_else_is_left(case):
    _, node = last_node(OTHERS[case])
    assert stock_layers.layer_of(node) is node.layer
    with pytest.raises(export.ExportError, match=node.layer.name):
        forms.form(node)


def test_operations_are_exact_in_the_file():
    """All that only move codes, each behind a quantized tensor."""

    def branch(operation):
        def made(x, name):
            x = operation(conv(3, padding="same")(x, f"{name}_in"))
            return conv(1)(x, name) if len(x.shape) == 4 else x

        return made

    moving = ("reshape", "transpose", "concat", "pad", "slice", "nearest")
    moving += ("more_channels", "all_sides", "every_other", "every_third")
    branches = {name: branch(OPERATIONS[name][0]) for name in moving}
    branches["reshape"] = branch(lambda x: tf.reshape(x, (-1, 8, 6, x.shape[-1])))
    branches["concat"] = branch(lambda x: tf.concat([x, layers.MaxPooling2D(1)(x)], -1))
    model = quantize(branched(branches, SHAPE), EVERYWHERE)
    x = normals(4, SHAPE)
    snapped = export.snap(model, [x])
    report = export.verify(writer.to_bytes(snapped), model, [x], verbose=0)
    assert report.ok, report.failures
    assert not snapped.notes
    assert report.is_exact
