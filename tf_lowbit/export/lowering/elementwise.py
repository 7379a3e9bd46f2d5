"""Elementwise functions of layers: scales, sums, products and activations.

Python's operators on Keras tensors, and TensorFlow's functions, are layers of one type.
Their `symbol` names the function; the call holds the constants.
"""

from typing import Any

import numpy as np

from tf_lowbit.compat import CustomScaleLayer, LayerScale, Node, keras, tf
from tf_lowbit.export.types import ExportError, refusal
from tf_lowbit.network import inspection, keras3_activations, layer_registry

_layers = keras.layers
_OPERATORS = {
    "__operators__.add": np.add,
    "math.add": np.add,
    "math.subtract": np.subtract,
    "math.multiply": np.multiply,
    "math.truediv": np.true_divide,
    "math.divide": np.true_divide,
    "math.negative": np.negative,
}
_ACTIVATIONS = {
    "math.sigmoid": "sigmoid",
    "math.tanh": "tanh",
    "nn.gelu": "gelu",
    "nn.relu": "relu",
    "nn.relu6": "relu6",
    "nn.silu": "swish",
    "nn.softmax": "softmax",
}
# By identity: a user's function may have the name of one of Keras's.
_FUNCTIONS = {
    keras.activations.gelu: "gelu",
    keras.activations.linear: "linear",
    keras.activations.relu: "relu",
    keras.activations.sigmoid: "sigmoid",
    keras.activations.softmax: "softmax",
    keras.activations.swish: "swish",
    keras.activations.tanh: "tanh",
    tf.identity: "linear",
    tf.nn.gelu: "gelu",
    tf.nn.relu: "relu",
    tf.nn.relu6: "relu6",
    tf.nn.sigmoid: "sigmoid",
    tf.nn.silu: "swish",
    tf.nn.softmax: "softmax",
    tf.nn.tanh: "tanh",
}
FLOAT_ACTIVATIONS = tuple(sorted(set(_FUNCTIONS.values())))
# TFLite operators of an activation that is not fused into a layer.
OPERATORS = {
    "gelu": ("GELU",),
    "relu": ("RELU",),
    "relu6": ("RELU6",),
    "sigmoid": ("LOGISTIC",),
    "softmax": ("SOFTMAX",),
    "swish": ("LOGISTIC", "MUL"),
    "tanh": ("TANH",),
}


def scale(node: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Gain and offset of a node that computes `gain * x + offset` in inference.

    Returns:
        Gain and offset, float64 [1] or [channels]; None for any other node.

    Raises:
        ExportError: For a layer that scales along an axis other than the last.
    """
    layer = inspection.wrapped_layer(node.layer)
    if isinstance(layer, layer_registry.BATCH_NORMS):
        require_last(layer, len(node.output_shapes))
        deviation = np.sqrt(_array(layer.moving_variance) + layer.epsilon)
        gain = (_array(layer.gamma) if layer.scale else 1.0) / deviation
        offset = -_array(layer.moving_mean) * gain
        return gain, offset + (_array(layer.beta) if layer.center else 0.0)
    if type(layer) is _layers.Normalization:
        require_last(layer, len(node.output_shapes))
        mean, variance = np.ravel(_array(layer.mean)), np.ravel(_array(layer.variance))
        deviation = np.maximum(np.sqrt(variance), keras.backend.epsilon())
        if layer.invert:
            return deviation, mean
        return 1.0 / deviation, -mean / deviation
    if type(layer) is _layers.Rescaling:
        gain, offset = _array(layer.scale), _array(layer.offset)
        if not all(_is_by_channel(n, node.output_shapes) for n in (gain, offset)):
            return None  # Other ones for each pixel.
        return np.ravel(gain), np.ravel(offset)
    if type(layer) is LayerScale:
        return _array(layer.gamma), np.zeros(1)
    if _symbol(layer) in _OPERATORS and len(node.keras_inputs) == 1:
        return _scale_of_operator(node, _OPERATORS[_symbol(layer)])
    return None


def join(node: Node) -> np.ufunc | None:
    """`np.add` or `np.multiply` for a sum or a product of tensors; else None.

    The inputs are first multiplied by `factors`.
    """
    if type(node.layer) in (_layers.Add, CustomScaleLayer):
        return np.add
    if type(node.layer) is _layers.Multiply:
        return np.multiply
    ranks = {len(tensor.shape) for tensor in node.keras_inputs}
    operator = _OPERATORS.get(_symbol(node.layer))
    if operator in (np.add, np.multiply) and len(node.keras_inputs) == 2:
        return operator if len(ranks) == 1 else None
    return None


def factors(node: Node) -> list[float]:
    """The factor of each input of a node that `join` knows."""
    if type(node.layer) is CustomScaleLayer:
        return [1.0, float(node.layer.scale)]
    return [1.0] * len(node.keras_inputs)


def activation(node: Node) -> str | None:
    """Name of the activation that a node computes, or None for another node.

    Raises:
        ExportError: For an activation that cannot be exported, or a softmax over an
            axis other than the last.
    """
    layer = node.layer
    if type(layer) is _layers.Activation:
        if name := function_name(layer.activation):
            return name
        raise unknown_activation(layer)
    named = [value for key, value in node.call_kwargs.items() if key != "name"]
    given = (*node.call_args[1:], *named)
    settings = [s for s in given if s is not None and s is not False]
    if type(layer) is _layers.Softmax:
        settings = [layer.axis]
    elif _symbol(layer) != "nn.softmax":
        # With settings, such as silu's `beta` or gelu's `approximate`, it is another
        # function.
        return None if settings else _ACTIVATIONS.get(_symbol(layer))
    if not set(settings) <= {-1, len(node.output_shapes) - 1}:
        raise refusal(
            layer,
            "Softmax must be over the last axis",
            "put a Permute layer in front and one behind",
            f"over {settings} of {tuple(node.output_shapes)}",
        )
    return "softmax"


def function_name(function: Any) -> str | None:
    """The name of an activation function that can be exported, or None."""
    return _FUNCTIONS.get(function)


def unknown_activation(layer: keras.layers.Layer) -> ExportError:
    """The error for a layer whose activation cannot be exported."""
    function = layer.activation
    remedy = "use one of these and continue training"
    if function is keras3_activations.hard_silu:
        remedy = "write it as x * tf.nn.relu6(x + 3.0) / 6.0, which is the same"
    return refusal(
        layer,
        f"Activations must be one of {', '.join(FLOAT_ACTIVATIONS)}",
        remedy,
        f"with {getattr(function, '__name__', type(function).__name__)!r}",
    )


def _symbol(layer) -> str | None:
    return getattr(layer, "symbol", None)


def _scale_of_operator(node, operator):
    """Gain and offset of an operator with one tensor and constants."""
    named = (node.call_kwargs[key] for key in ("x", "y") if key in node.call_kwargs)
    given = (*node.call_args, *named)
    # The arguments may include a name.
    operands = [o for o in given if o is not None and not isinstance(o, str)]
    (tensor,) = node.keras_inputs
    is_tensor = [operand is tensor for operand in operands]
    if operator is np.true_divide and not is_tensor[0]:
        return None  # A number divided by the tensor.
    pairs = list(zip(operands, is_tensor, strict=True))
    if not all(t or _is_by_channel(_array(o), tensor.shape) for o, t in pairs):
        return None

    def at(value):
        return operator(*(value if t else _array(o) for o, t in pairs))

    return np.ravel(at(1.0) - at(0.0)), np.ravel(at(0.0))


def _is_by_channel(numbers, shape) -> bool:
    """Whether constants are one number or one number per channel of a shape."""
    if numbers.ndim > len(shape):
        return False
    return numbers.size == 1 or numbers.shape[-1] == numbers.size == shape[-1]


def require_last(layer: keras.layers.Layer, rank: int) -> None:
    """Raises `ExportError` for a normalization over an axis other than the last."""
    axes = np.ravel([] if layer.axis is None else layer.axis)
    if not set(axes) <= {-1, rank - 1}:
        raise refusal(
            layer,
            "Normalization must be over the last axis",
            "make it with axis=-1, in a network whose channels come last",
            f"with axis={layer.axis}",
        )


def _array(values) -> np.ndarray:
    return np.asarray(values, np.float64)
