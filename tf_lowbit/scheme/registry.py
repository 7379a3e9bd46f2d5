"""What the library knows about Keras layers with weights, and about ReLUs."""

from collections.abc import Mapping
from typing import NamedTuple

from tf_lowbit.compat import keras, tf, tfmot
from tf_lowbit.core import checks
from tf_lowbit.scheme import passing

_layers = keras.layers


class Kernel(NamedTuple):
    """A weight that can be quantized.

    Attributes:
        attribute: the layer's attribute that holds it.
        channel_axes: its output-channel axes, for a step for each channel.
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
    """Tells the library of a layer class of yours.

    Layers are known by their exact class, for a subclass may use its kernel in another
    way; so subclasses of Keras's layers are registered, too.

    Args:
        layer_class: subclass of `keras.layers.Layer`. One with kernels must make them
            in `build` and read them in `call` as attributes, `self.kernel`, where the
            quantized tensor then stands in the variable's place. Keras must be able to
            copy and to load it: `get_config`, and `register_keras_serializable`.
        kernels: attribute name of each weight to be quantized -> its output-channel
            axes, for a step for each channel, such as `{"kernel": (-1,)}`. None for a
            layer without any that passes the values of its only input on, or a weighted
            mean of them, as pooling does: the quantizer in front of it then serves what
            reads it.

    Raises:
        ValueError: if the class is no layer class or is known with other kernels, or
            `kernels` is of another form.
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
    is_known = layer_class in _KERNELS or passing.is_registered(layer_class)
    if is_known and _KERNELS.get(layer_class, ()) != wanted:
        raise ValueError(
            "A layer class must be registered once, or each time alike. Received: "
            f"{layer_class.__name__} with {wanted}, known with "
            f"{_KERNELS.get(layer_class, ())}"
        )
    if wanted:
        _KERNELS[layer_class] = wanted
    else:
        passing.register(layer_class)


class LowBitRegistry(tfmot.quantization.keras.QuantizeRegistry):
    """The table, behind TF-MOT's interface.

    Placement needs the graph, so the layout hands every config out itself and
    `get_quantize_config` has nothing to add.
    """

    def supports(self, layer) -> bool:
        """Whether the layer has a weight that can be quantized."""
        return bool(kernels(layer))

    def get_quantize_config(self, layer):
        """None: a layer without a config from the layout stays as it is."""
        return None


def kernels(layer) -> tuple[Kernel, ...]:
    """The quantizable weights of a layer; empty if it has none.

    The type must be exact: a subclass may use its kernel in another way.
    """
    return _KERNELS.get(type(layer), ())


def is_add(layer) -> bool:
    """Whether the layer is an Add."""
    return type(layer) is _layers.Add


def is_sum(layer) -> bool:
    """Whether the layer adds tensors: an Add, `x + y`, `tf.add_n`."""
    return is_add(layer) or passing.operation(layer) in ("add", "add_n")


def own_relu(layer) -> str | None:
    """ "relu" or "relu6" if the layer ends in one by its `activation=`."""
    return _RELU_FUNCTIONS.get(getattr(layer, "activation", None))


def relu_kind(layer) -> str | None:
    """ "relu" or "relu6" if the layer is nothing but one, else None."""
    if type(layer) is _layers.Activation:
        return own_relu(layer)
    if type(layer) is not _layers.ReLU or layer.negative_slope or layer.threshold:
        return None
    if layer.max_value is None:
        return "relu"
    return "relu6" if float(layer.max_value) == 6.0 else None


def is_unsupported(layer) -> bool:
    """Whether the layer trains weights that this library cannot quantize.

    BatchNormalization is no such layer: it is folded into an integer scale.
    """
    known = bool(kernels(layer)) or isinstance(layer, BATCH_NORMS)
    return bool(layer.trainable_weights) and not known
