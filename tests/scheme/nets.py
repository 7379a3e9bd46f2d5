"""Small networks, data and readings that the scheme's tests share."""

import warnings

import numpy as np

import tf_lowbit as tfl
from tf_lowbit.compat import keras, tf
from tf_lowbit.models import blocks
from tf_lowbit.network import inspection

layers = keras.layers

IMAGE = (8, 8, 3)
CLASSES = 4


@keras.utils.register_keras_serializable("tests")
class Separable(layers.SeparableConv2D):
    """Two kernels in one layer of one's own, which `quantize` does not split."""


tfl.register_layer(Separable, {"depthwise_kernel": (-2, -1), "pointwise_kernel": (-1,)})


def images(count=4, shape=IMAGE, seed=0):
    """Normal images."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def labels(count=4, classes=CLASSES, seed=0):
    return np.random.default_rng(seed).integers(0, classes, size=count)


def chain(*, width=4, batch_norm=True, l2=None, dropout=0.0):
    """stem - relu1 - mid - relu2 - last - relu3 - pool - head."""
    penalty = keras.regularizers.l2(l2) if l2 else None
    x = image = keras.Input(IMAGE, name="image")
    for index, name in enumerate(("stem", "mid", "last"), start=1):
        x = layers.Conv2D(
            width, 3, padding="same", name=name, kernel_regularizer=penalty
        )(x)
        if batch_norm:
            x = layers.BatchNormalization(name=f"bn{index}")(x)
        x = layers.ReLU(name=f"relu{index}")(x)
        if dropout:
            x = layers.Dropout(dropout, name=f"dropout{index}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(CLASSES, name="head", kernel_regularizer=penalty)(x)
    return keras.Model(image, x, name="chain")


def perceptron(units=6):
    """in - relu1 - mid - relu2 - head, of Dense layers."""
    return keras.Sequential(
        [
            layers.Dense(units, name="in", input_shape=(5,)),
            layers.ReLU(name="relu1"),
            layers.Dense(units, name="mid"),
            layers.ReLU(name="relu2"),
            layers.Dense(CLASSES, name="head"),
        ],
        name="perceptron",
    )


def every_layer():
    """One of each image layer that can be quantized, all behind a ReLU."""
    x = image = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="stem")(x)
    x = layers.Conv2D(4, 1, activation="relu", name="conv")(x)
    x = layers.DepthwiseConv2D(
        3, padding="same", depth_multiplier=2, activation="relu", name="depthwise"
    )(x)
    x = layers.SeparableConv2D(5, 3, activation="relu", name="separable")(x)
    x = layers.Conv2DTranspose(6, 2, strides=2, activation="relu", name="transpose")(x)
    x = layers.Reshape((64, 6), name="sequence")(x)
    x = layers.Conv1D(3, 3, strides=4, activation="relu", name="conv1d")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(7, activation="relu", name="dense")(x)
    x = layers.Dense(CLASSES, name="head")(x)
    return keras.Model(image, x, name="every_layer")


def mobilenet_like(width=8):
    """Inverted residuals, ReLU6, linear bottlenecks and an Add (arXiv:1801.04381)."""

    def conv_bn(x, name, filters, size, relu=True, strides=1):
        x = layers.Conv2D(
            filters, size, strides=strides, padding="same", use_bias=False, name=name
        )(x)
        return finish(x, name, relu)

    def finish(x, name, relu):
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        return layers.ReLU(6.0, name=f"{name}_relu")(x) if relu else x

    def inverted_residual(x, name, filters, strides):
        y = conv_bn(x, f"{name}_expand", 2 * x.shape[-1], 1)
        y = layers.ZeroPadding2D(1, name=f"{name}_pad")(y)
        y = layers.DepthwiseConv2D(
            3, strides=strides, use_bias=False, name=f"{name}_depthwise"
        )(y)
        y = finish(y, f"{name}_depthwise", True)
        y = conv_bn(y, f"{name}_project", filters, 1, relu=False)
        if strides == 1 and x.shape[-1] == filters:
            return layers.Add(name=f"{name}_add")([x, y])
        return y

    image = keras.Input((16, 16, 3), name="image")
    x = conv_bn(image, "stem", width, 3, strides=2)
    x = inverted_residual(x, "block1", width, 1)
    x = inverted_residual(x, "block2", width, 2)
    x = inverted_residual(x, "block3", width, 1)
    x = conv_bn(x, "features", 2 * width, 1)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(CLASSES, name="head")(x)
    return keras.Model(image, x, name="mobilenet_like")


def postactivation():
    """Two post-activation blocks, the second one with a shortcut."""
    image = keras.Input((8, 8, 3), name="image")
    x = layers.ReLU(name="stem_relu")(layers.Conv2D(4, 3, name="stem")(image))
    for name, filters in (("one", 4), ("two", 6)):
        plan = blocks.basic(filters, 1)
        x = blocks.postact_block(x, plan, weight_decay=0.0, name=name)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, layers.Dense(3, name="head")(x))


def preactivation():
    """Three pre-activation blocks; the identity of the first starts at its ReLU."""
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(6, 3, name="stem")(image)
    for name in ("one", "two", "three"):
        plan = blocks.basic(6, 1)
        x = blocks.preact_block(
            x, plan, first=name == "one", weight_decay=0.0, name=name
        )
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(x))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, layers.Dense(CLASSES, name="head")(x))


def randomize(model, seed=0):
    """Gives each weight of a float model, BN statistics included, a known value."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.shape.rank > 1:
            kept = 2 if "depthwise" in weight.name else -1
            fan_in = np.prod(weight.shape[:kept])
            weight.assign(rng.normal(0.0, np.sqrt(2.0 / fan_in), weight.shape))
        else:  # Zeros or ones so far.
            weight.assign(np.abs(weight.numpy() + rng.normal(0.0, 0.1, weight.shape)))
    return model


def by_name(model):
    """Every quantizer of the model, by its name."""
    return {tensor.name: tensor for tensor in inspection.quantized_tensors(model)}


def used_weights(model, inputs):
    """The weights that the quantized layers multiply with in one eager call."""
    model(inputs, training=False)
    return {
        tensor.name: getattr(
            inspection.wrapped_layer(tensor.layer), tensor.attribute
        ).numpy()
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == "weight"
    }


def outputs_of(model, names, inputs):
    """What the named layers put out, as arrays by name."""
    read = keras.Model(model.inputs, {n: model.get_layer(n).output for n in names})
    return {n: np.asarray(y) for n, y in read(inputs, training=False).items()}


def train_step(model, inputs, targets, *, optimizer=None, eager=False):
    """Compiles where needed and takes one step; returns the loss."""
    if not model.optimizer:
        model.compile(
            optimizer or keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            run_eagerly=eager,
        )
    return model.train_on_batch(inputs, targets)


def snapshot(variables):
    """Copies of variables' values."""
    return [np.array(tf.convert_to_tensor(variable)) for variable in variables]


def assert_all_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def told(action):
    """The texts of this package's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    mine = [w for w in caught if issubclass(w.category, tfl.QuantizationWarning)]
    return [str(each.message) for each in mine]
