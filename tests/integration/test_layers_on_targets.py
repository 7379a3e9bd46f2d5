"""Layers that people lose their training on: trained, exported and proved everywhere.

Each is quantized, trained for one step, and written for every target that runs here and
for QONNX; each file runs in its own program.
"""

import warnings

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import IMAGE, bn_relu, conv_bn_relu, images, randomize
from tf_lowbit.compat import keras, tf

layers = keras.layers
SERIES = (12, 3)
TARGETS = ("xnnpack", "portable", "tflm")
RULES = [
    tfl.PrecisionRule("first|head", 8, 8, "uniform", "uniform"),
    tfl.PrecisionRule(".*", 2, 3, "lsq", "lsq"),
]


def of_images(body, end=None):
    """first - body - global pooling - head - end."""
    image = keras.Input(IMAGE, name="image")
    x = body(conv_bn_relu(image, 4, name="first"))
    x = layers.Dense(3, name="head")(layers.GlobalAveragePooling2D(name="pool")(x))
    return keras.Model(image, x if end is None else end(x))


def of_series(body):
    """first - body - head, of steps."""
    series = keras.Input(SERIES, name="series")
    x = layers.Conv1D(4, 3, padding="same", use_bias=False, name="first")(series)
    x = body(bn_relu(x, "first"))
    x = layers.Flatten(name="flat")(x) if len(x.shape) == 3 else x
    return keras.Model(series, layers.Dense(3, name="head")(x))


def normed(layer, *arguments, **more):
    """A layer named "inner", its normalisation and a ReLU."""
    return lambda x: bn_relu(layer(*arguments, **more, name="inner")(x), "inner")


def behind(make):
    """What `make` gives, and a convolution behind it."""
    return lambda x: conv_bn_relu(make(x), 4, name="inner")


def conv1d(**more):
    return normed(layers.Conv1D, 4, 3, use_bias=False, **more)


def pooled(x):
    return layers.GlobalAveragePooling1D(name="pool")(conv1d(padding="same")(x))


def resized(size, how="bilinear"):
    return behind(layers.Resizing(*size, interpolation=how, name="resized"))


def augmented(x):
    x = layers.RandomFlip(name="flip")(layers.GaussianNoise(0.1, name="noise")(x))
    return layers.Identity(name="same")(x)


def widened(x):
    """Half the pixels and twice the channels, with a shortcut without weights.

    Option A of arXiv:1512.03385, section 3.3, as CIFAR's ResNets have it.
    """
    channels = x.shape[-1]
    y = conv_bn_relu(x, channels, name="third")
    y = layers.Conv2D(2 * channels, 3, 2, padding="same", name="second")(y)
    sides = [[0, 0], [0, 0], [0, 0], [channels // 2, channels - channels // 2]]
    return bn_relu(y + tf.pad(x[:, ::2, ::2, :], sides), "sum")


EVERYWHERE = {
    "SeparableConv2D": lambda: of_images(
        normed(layers.SeparableConv2D, 6, 3, padding="same")
    ),
    "SeparableConv1D": lambda: of_series(
        normed(layers.SeparableConv1D, 6, 3, padding="causal")
    ),
    "Conv2DTranspose": lambda: of_images(
        normed(layers.Conv2DTranspose, 4, 3, 2, padding="same")
    ),
    "Conv2DTranspose, valid": lambda: of_images(
        normed(layers.Conv2DTranspose, 4, 2, 3, padding="valid")
    ),
    "Conv1D, causal": lambda: of_series(conv1d(padding="causal", dilation_rate=2)),
    "Conv1D, strided": lambda: of_series(conv1d(padding="same", strides=2)),
    "GlobalAveragePooling1D": lambda: of_series(pooled),
    "UpSampling2D, bilinear": lambda: of_images(
        behind(layers.UpSampling2D(2, interpolation="bilinear", name="up"))
    ),
    "Resizing, bilinear": lambda: of_images(resized((16, 24))),
    "Resizing, nearest": lambda: of_images(resized((16, 24), "nearest")),
    "tf.image.resize": lambda: of_images(
        behind(lambda x: tf.image.resize(x, (16, 16)))
    ),
    "shortcut of padded channels": lambda: of_images(behind(widened)),
    "noise and augmentation": lambda: of_images(behind(augmented)),
    "softmax": lambda: of_images(behind(lambda x: x), layers.Softmax(name="end")),
    "tf.nn.softmax": lambda: of_images(behind(lambda x: x), tf.nn.softmax),
    "tf.argmax": lambda: of_images(behind(lambda x: x), lambda x: tf.argmax(x, -1)),
    "tf.argmax of a softmax": lambda: of_images(
        behind(lambda x: x), lambda x: tf.argmax(tf.nn.softmax(x), axis=-1)
    ),
    "sigmoid": lambda: of_images(
        behind(lambda x: x), layers.Activation("sigmoid", name="end")
    ),
}
LAST = "take the argmax over the last axis at the end"
WHOLE = "larger by whole factors.*smaller by strides or pooling"
REFUSED = {
    "Resizing by 1.5": (lambda: of_images(resized((12, 12))), WHOLE, "resized"),
    "Resizing by 1.5, nearest": (
        lambda: of_images(resized((12, 12), "nearest")),
        WHOLE,
        "resized",
    ),
    "Resizing by a half": (lambda: of_images(resized((4, 4))), WHOLE, "resized"),
    "tf.image.resize by 1.5": (
        lambda: of_images(behind(lambda x: tf.image.resize(x, (12, 12)))),
        WHOLE,
        "tf.image.resize",
    ),
    "tf.argmax over examples": (
        lambda: of_images(behind(lambda x: x), lambda x: tf.argmax(x, 0)),
        LAST,
        "tf.math.argmax",
    ),
    "tf.argmax, and more behind it": (
        lambda: of_images(
            behind(lambda x: x), lambda x: tf.cast(tf.argmax(x, -1), tf.int32)
        ),
        "end the network in the argmax",
        "tf.cast",
    ),
}


def trained(model):
    """Quantized, calibrated and trained for one step; and its data."""
    randomize(model)
    x = images(32, model.input_shape[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tfl.QuantizationWarning)
        quantized = tfl.quantize(model, RULES)
    tfl.calibrate(quantized, [x])
    if quantized.output.dtype.is_floating:
        quantized.compile("sgd", "mse")
        quantized.fit(x, np.zeros((32, 3)), verbose=0)
    tfl.recalibrate_batch_norm(quantized, [x])
    return quantized, x


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_runs_everywhere(name, tmp_path):
    model, x = trained(EVERYWHERE[name]())
    path = tmp_path / "net.tflite"
    for target in TARGETS:
        tfl.export.to_tflite(model, path, [x], target=target, verbose=0)
        report = tfl.export.verify(path, model, [x], verbose=0)
        assert report.ok, (target, report.failures)
        assert report.mismatches == 0 < report.codes
    tfl.export.to_qonnx(model, tmp_path / "net.onnx", batch_size=8)
    found = tfl.export.compare_qonnx(tmp_path / "net.onnx", model, x)
    assert found.codes > 1000
    # One code beside a decision point changes others behind it.
    assert sum(found.different.values()) <= 1e-3 * found.codes, str(found)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_everywhere_with_a_remedy(name, tmp_path):
    make, remedy, layer = REFUSED[name]
    model, x = trained(make())
    words = f"{remedy}.*Received: '{layer}"
    for target in TARGETS:
        (problem,) = tfl.export.check(model, target=target).problems
        assert problem.layer.startswith(layer)
        with pytest.raises(tfl.export.ExportError, match=words):
            tfl.export.to_tflite(model, tmp_path / "n", [x], target=target, verbose=0)
    with pytest.raises(tfl.export.ExportError, match=words):
        tfl.export.to_qonnx(model, tmp_path / "n")
    assert not list(tmp_path.iterdir())
