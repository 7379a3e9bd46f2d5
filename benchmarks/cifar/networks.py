"""The trained float networks of the CIFAR experiments, read from their files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tf_lowbit import models
from tf_lowbit.compat import keras, tf
from tf_lowbit.datasets.dataset import Normalization

_layers = keras.layers


def mlperf_resnet8(models_dir: Path) -> keras.Model:
    """MLPerf Tiny's reference network for CIFAR-10, without the softmax at its end."""
    path = models_dir / "mlperf_tiny_ic_resnet8.h5"
    trained = keras.models.load_model(path, compile=False)
    trained.layers[-1].activation = keras.activations.linear
    model = keras.models.clone_model(trained)
    model.set_weights(trained.get_weights())
    return model


def resnet20(models_dir: Path) -> keras.Model:
    """A trained ResNet-20 from PyTorch, with shortcuts of kind A.

    Float32 images [batch, 32, 32, 3] -> logits [batch, 10]. Architecture: He et al.,
    arXiv:1512.03385, section 4.2.
    """
    with np.load(models_dir / "cifar10_resnet20_float.npz") as file:
        weights = dict(file)

    def conv(x, name, strides=1):
        filters = len(weights[f"{name}.weight"])
        # PyTorch pads both sides, Keras's "same" only one of an even image.
        x = _layers.ZeroPadding2D(1, name=f"{name}.pad")(x)
        return _layers.Conv2D(filters, 3, strides, use_bias=False, name=name)(x)

    def norm(x, name):
        return _layers.BatchNormalization(epsilon=1e-5, name=name)(x)

    def block(x, name, strides):
        y = norm(conv(x, f"{name}.conv1", strides), f"{name}.bn1")
        y = _layers.ReLU(name=f"{name}.relu1")(y)
        y = norm(conv(y, f"{name}.conv2"), f"{name}.bn2")
        more = y.shape[-1] - x.shape[-1]
        if more:
            sides = [[0, 0], [0, 0], [0, 0], [more // 2, more // 2]]
            x = tf.pad(x[:, ::strides, ::strides, :], sides)
        y = _layers.Add(name=f"{name}.add")([x, y])
        return _layers.ReLU(name=f"{name}.relu2")(y)

    x = image = keras.Input((32, 32, 3))
    x = _layers.ReLU(name="relu1")(norm(conv(x, "conv1"), "bn1"))
    for stage in (1, 2, 3):
        for index in range(3):
            strides = 2 if stage > 1 and index == 0 else 1
            x = block(x, f"layer{stage}.{index}", strides)
    x = _layers.GlobalAveragePooling2D(name="pool")(x)
    x = _layers.Dense(len(weights["linear.weight"]), name="linear")(x)
    model = keras.Model(image, x, name="resnet20")
    for layer in model.layers:
        own = {
            k.rpartition(".")[2]: w
            for k, w in weights.items()
            if k.rpartition(".")[0] == layer.name
        }
        if isinstance(layer, _layers.Conv2D):
            layer.set_weights([own["weight"].transpose(2, 3, 1, 0)])
        elif isinstance(layer, _layers.Dense):
            layer.set_weights([own["weight"].T, own["bias"]])
        elif own:
            names = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([own[name] for name in names])
    return model


def resnet8_100(models_dir: Path) -> keras.Model:
    """A pre-activation ResNet-8 of width 16 for CIFAR-100, with random weights."""
    del models_dir
    return models.preact_resnet(8, width=16, classes=100)


@dataclasses.dataclass(frozen=True)
class Network:
    """A float network.

    Attributes:
        load: Function folder -> float network, of trained weights where there are any.
        edges: Pattern of the names of its first and last layer.
        normalization: Of the images that it reads; None for the data set's own.
    """

    load: Callable[[Path], keras.Model]
    edges: str
    normalization: Normalization | None


NETWORKS = {
    # Pixels go in as they are, from 0 to 255.
    "mlperf_resnet8": Network(
        mlperf_resnet8,
        "conv2d|dense",
        Normalization(1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ),
    "resnet20": Network(
        resnet20,
        "conv1|linear",
        Normalization(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
    "resnet8_100": Network(resnet8_100, "stem|head", None),
}
