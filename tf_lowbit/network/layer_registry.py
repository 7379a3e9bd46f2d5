"""The table of layers with weights, and tests for ReLUs and sums."""

from collections.abc import Mapping
from typing import NamedTuple

from tf_lowbit.compat import keras, tf, tfmot
from tf_lowbit.core import checks
from tf_lowbit.network import graph, passthrough

_layers = keras.layers


class Kernel(NamedTuple):
    """A weight that can be quantized.

    Attributes:
        attribute: Attribute of the layer that holds it.
        channel_axes: Its output-channel axes, for per-channel steps.
    """

    attribute: str
    channel_axes: tuple[int, ...] = (-1,)


_KERNEL = (Kernel("kernel"),)
# A depthwise kernel is ([height,] width, channels, multiplier): both last axes are
# output channels. A transposed one is (height, width, out, in).
_DEPTHWISE = Kernel("depthwise_kernel", (-2, -1))
_KERNELS = {
    _layers.Dense: _KERNEL,
    _layers.Conv1D: _KERNEL,
    _layers.Conv2D: _KERNEL,
    _layers.Conv3D: _KERNEL,
    _layers.Conv2DTranspose: (Kernel("kernel", (-2,)),),
    _layers.DepthwiseConv1D: (_DEPTHWISE,),
    _layers.DepthwiseConv2D: (_DEPTHWISE,),
    _layers.SeparableConv1D: (_DEPTHWISE, Kernel("pointwise_kernel")),
    _layers.SeparableConv2D: (_DEPTHWISE, Kernel("pointwise_kernel")),
}

BATCH_NORMS = (
    _layers.BatchNormalization,
    _layers.experimental.SyncBatchNormalization,
)

_RELU_FUNCTIONS = {
    keras.activations.relu: "relu",
    tf.nn.relu: "relu",
    tf.nn.relu6: "relu6",
}


def register_layer(layer_class: type, kernels: Mapping | None = None) -> None:
    """Registers your own layer class.

    The library compares the exact class, because a subclass may use its kernel in
    another way. So register subclasses of Keras's layers too.

    Args:
        layer_class: Subclass of `keras.layers.Layer`. If it has kernels, it must make
            them in `build` and read them in `call` as attributes, such as
            `self.kernel`, where the quantized tensor replaces the variable. Keras must
            be able to copy and load it: `get_config`, and
            `register_keras_serializable`.
        kernels: Attribute name of each weight to quantize -> its output-channel axes,
            for per-channel steps, such as `{"kernel": (-1,)}`. None for a layer without
            kernels that outputs the values of its only input or, like pooling, weighted
            means of them. The quantizer in front of such a layer also serves the layers
            behind it.

    Raises:
        ValueError: If the class is not a layer class or is registered with other
            kernels, or `kernels` has another form.
    """
    is_layer = isinstance(layer_class, type) and issubclass(layer_class, _layers.Layer)
    if not is_layer:
        raise ValueError(
            "layer_class must be a subclass of tf_keras's Layer. "
            f"Received: {layer_class!r}"
        )
    if kernels is not None and not (isinstance(kernels, Mapping) and kernels):
        raise ValueError(
            "kernels must be a dict of attribute names and channel axes, such as "
            f"{{'kernel': (-1,)}}, or None. Received: {kernels!r}"
        )
    wanted = tuple(
        Kernel(
            checks.instance("A name in kernels", name, str),
            checks.integers("The axes in kernels", axes),
        )
        for name, axes in (kernels or {}).items()
    )
    is_known = layer_class in _KERNELS or passthrough.is_registered(layer_class)
    if is_known and _KERNELS.get(layer_class, ()) != wanted:
        raise ValueError(
            "A layer class must be registered with the same kernels each time. "
            f"Received: {layer_class.__name__} with {wanted}, known with "
            f"{_KERNELS.get(layer_class, ())}"
        )
    if wanted:
        _KERNELS[layer_class] = wanted
    else:
        passthrough.register(layer_class)


class LowBitRegistry(tfmot.quantization.keras.QuantizeRegistry):
    """The table of layers, as TF-MOT's interface.

    Placement needs the graph, so the layout makes every config and
    `get_quantize_config` adds nothing.
    """

    def supports(self, layer: keras.layers.Layer) -> bool:
        """Tells whether the layer has a weight that can be quantized."""
        return bool(kernels(layer))

    def get_quantize_config(self, layer: keras.layers.Layer) -> None:
        """Returns None: a layer without a config from the layout is not quantized."""
        return None


def kernels(layer: keras.layers.Layer) -> tuple[Kernel, ...]:
    """Returns the quantizable weights of a layer; empty if it has none.

    The type must match exactly: a subclass may use its kernel in another way.
    """
    return _KERNELS.get(type(layer), ())


def is_add(layer: keras.layers.Layer) -> bool:
    """Tells whether the layer is an Add."""
    return type(layer) is _layers.Add


def is_sum(layer: keras.layers.Layer) -> bool:
    """Tells whether the layer adds tensors: an Add, `x + y`, `tf.add_n`."""
    return is_add(layer) or passthrough.operation(layer) in ("add", "add_n")


def own_relu(layer: keras.layers.Layer) -> str | None:
    """Returns "relu" or "relu6" if that is the layer's `activation=`, else None."""
    return _RELU_FUNCTIONS.get(getattr(layer, "activation", None))


def relu_kind(layer: keras.layers.Layer) -> str | None:
    """Returns "relu" or "relu6" if the layer is just that, else None."""
    if type(layer) is _layers.Activation:
        return own_relu(layer)
    if type(layer) is not _layers.ReLU or layer.negative_slope or layer.threshold:
        return None
    if layer.max_value is None:
        return "relu"
    return "relu6" if float(layer.max_value) == 6.0 else None


def is_unsupported(layer: keras.layers.Layer) -> bool:
    """Tells whether the layer has weights to train that this library cannot quantize.

    Whether they are frozen does not matter. BatchNormalization is supported: it is
    folded into an integer scale.
    """
    known = bool(kernels(layer)) or isinstance(layer, BATCH_NORMS)
    with graph.thawed(layer):
        return bool(layer.trainable_weights) and not known
