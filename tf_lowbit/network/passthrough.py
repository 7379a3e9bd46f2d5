"""Properties of values that layers and TensorFlow operations preserve.

Two tables map a layer's type, or an operation's name, to a `Kept`. They decide where a
quantizer can be placed, and whether its codes need a sign.
"""

import enum
from collections.abc import Callable
from typing import Any

import numpy as np

from tf_lowbit.compat import Node, StochasticDepth, keras, tf
from tf_lowbit.network import keras3_activations

_layers = keras.layers


class Kept(enum.IntEnum):
    """The properties of the inputs that the output has too, at inference.

    - `SIGN`: no output is negative if no input is.
    - `RANGE`: no output is outside of the range of the inputs and zero.
    - `PLACE`: outputs are weighted means of inputs, or several inputs are joined. A
      quantizer in front serves the readers of the output.
    - `GRID`: each output is one of the inputs, or zero. So it is on the grid of the
      only input.

    Each implies those before it.
    """

    NOTHING = 0
    SIGN = 1
    RANGE = 2
    PLACE = 3
    GRID = 4


def kept(node: Node) -> Kept:
    """Returns what a node of a functional graph preserves of its `sources`."""
    if node.is_input:
        return Kept.NOTHING
    layer = node.layer
    found = _LAYERS.get(type(layer), _OPERATIONS.get(operation(layer), Kept.NOTHING))
    return found if isinstance(found, Kept) else found(node)


def is_transparent(node: Node) -> bool:
    """Tells whether a quantizer in front of the node serves the node's readers."""
    return kept(node) >= Kept.PLACE


def keeps_grid(node: Node) -> bool:
    """Tells whether, at inference, the output is on the grid of the only input."""
    return kept(node) is Kept.GRID


def is_identity(node: Node) -> bool:
    """Tells whether, at inference, the node outputs exactly what it reads."""
    layer = node.layer
    if type(layer) is _layers.Activation:
        return layer.activation is keras.activations.linear
    is_known = type(layer) in _IDENTITIES or operation(layer) in _IDENTITY_OPERATIONS
    return is_known and keeps_grid(node)


def sources(node: Node) -> list:
    """Returns the tensors whose values the node reads, without shapes and indices."""
    floats = [t for t in node.keras_inputs if tf.as_dtype(t.dtype).is_floating]
    return floats or list(node.keras_inputs)


def operation(layer: keras.layers.Layer) -> str:
    """Returns the name of a layer's TensorFlow operation: "abs" for `tf.math.abs`.

    Empty for Keras's own layers. Python's operators are operations too.
    """
    symbol = getattr(layer, "symbol", None)
    return symbol.rsplit(".", 1)[-1] if isinstance(symbol, str) else ""


def makes_nonnegative(node: Node) -> bool:
    """Tells whether a node never outputs a negative number, for any input."""
    layer = node.layer
    if isinstance(layer, _layers.ReLU | _layers.ThresholdedReLU):
        return _is_relu(layer)
    name = operation(layer)
    numbers = [n for n in _numbers(node) if np.ndim(n) == 0]
    if name == "pow":
        return len(numbers) == 1 and numbers[0] % 2 == 0 and _reads_first(node)
    if name == "maximum":
        return any(np.all(np.asarray(n) >= 0) for n in _numbers(node))
    if name == "clip_by_value":
        low = _argument(node, 1, "clip_value_min")
        return _is_number(low) and bool(np.all(np.asarray(low) >= 0))
    if name == "multiply" and len(node.keras_inputs) == 2:
        return len({id(tensor) for tensor in node.keras_inputs}) == 1  # A square.
    return type(layer) is _layers.Softmax or name in _NONNEGATIVE


def is_nonnegative_function(activation: Any) -> bool:
    """Tells whether an activation never returns a negative number."""
    return activation in _NONNEGATIVE_FUNCTIONS or _is_relu(activation)


def register(layer_class: type) -> None:
    """Adds a layer class that outputs values of its input, or means of them."""
    _LAYERS[layer_class] = Kept.PLACE


def is_registered(layer_class: type) -> bool:
    """Tells whether the table has a layer class."""
    return layer_class in _LAYERS


def _is_relu(layer) -> bool:
    if isinstance(layer, _layers.ThresholdedReLU):
        return bool(np.all(layer.theta >= 0))
    if not isinstance(layer, _layers.ReLU):
        return False
    return layer.negative_slope == 0 and layer.threshold >= 0


def _is_number(value) -> bool:
    is_keras = hasattr(value, "_keras_history")
    return not (is_keras or value is None or isinstance(value, str | bool | tf.DType))


def _numbers(node) -> list:
    named = {k: v for k, v in node.call_kwargs.items() if k != "name"}
    given = tf.nest.flatten((node.call_args, named))
    return [value for value in given if _is_number(value)]


def _reads_first(node) -> bool:
    """Tells whether the first argument is the tensor: `x ** 2`, not `2 ** x`."""
    first = _argument(node, 0, "x")
    return hasattr(first, "_keras_history")


def _argument(node, position: int, *names: str, default=None):
    """Returns an argument of an operation's call, given by position or by name."""
    if len(node.call_args) > position:
        return node.call_args[position]
    return next((node.call_kwargs[n] for n in names if n in node.call_kwargs), default)


def _if(condition: Callable, then: Kept, otherwise: Kept = Kept.NOTHING) -> Callable:
    return lambda node: then if condition(node) else otherwise


def _has_no_negative_number(node) -> bool:
    numbers = _numbers(node)
    is_fixed = not any(isinstance(number, tf.Variable) for number in numbers)
    return is_fixed and all(np.all(np.asarray(number) >= 0) for number in numbers)


def _interpolated(method) -> Kept:
    # Cubic and Lanczos interpolation overshoot.
    method = getattr(method, "value", method)
    if method in ("nearest", 1):
        return Kept.GRID
    is_mean = method in ("bilinear", "area", "gaussian", "triangle", 0, 3)
    return Kept.RANGE if is_mean else Kept.NOTHING


def _is_at_rest(node) -> bool:
    """Tells whether a layer that is random in training is called for inference."""
    training = node.call_kwargs.get("training")
    return training is None or training is False


def _pads_zeros(node) -> bool:
    mode = str(_argument(node, 2, "mode", default="CONSTANT")).upper()
    value = _argument(node, 4, "constant_values", default=0)
    if len(node.call_args) > 3 and _is_number(node.call_args[3]):
        value = node.call_args[3]  # `tf.pad` of version 2 has it in the name's place.
    return mode != "CONSTANT" or (_is_number(value) and bool(np.all(value == 0)))


def _of_activation(node) -> Kept:
    function = node.layer.activation
    if function is keras.activations.linear:
        return Kept.GRID
    return Kept.SIGN if function in _SIGN_FUNCTIONS else Kept.NOTHING


def _of_cast(node) -> Kept:
    dtypes = [tf.as_dtype(t.dtype) for t in (*sources(node), node.outputs)]
    if dtypes[0] == dtypes[1]:
        return Kept.GRID
    return Kept.RANGE if dtypes[1].is_floating else Kept.NOTHING


# Random in training, identities at inference.
_DRAWN_IDENTITIES = (
    *(_layers.AlphaDropout, _layers.GaussianDropout, _layers.GaussianNoise),
    *(_layers.RandomBrightness, _layers.RandomContrast, _layers.RandomFlip),
    *(_layers.RandomHeight, _layers.RandomRotation, _layers.RandomTranslation),
    *(_layers.RandomWidth, _layers.RandomZoom),
)
# The same; in training they output zero or a positive multiple of the input.
_DROPOUTS = (
    *(_layers.Dropout, _layers.SpatialDropout1D, _layers.SpatialDropout2D),
    *(_layers.SpatialDropout3D, StochasticDepth),
)
_PLAIN_IDENTITIES = (_layers.ActivityRegularization, _layers.Identity)
_IDENTITIES = (*_DRAWN_IDENTITIES, *_DROPOUTS, *_PLAIN_IDENTITIES)
_IDENTITY_OPERATIONS = ("identity", "stop_gradient")

# These never return a negative number.
_NONNEGATIVE_FUNCTIONS = (
    *(keras.activations.relu, keras.activations.sigmoid, keras.activations.softmax),
    *(keras.activations.softplus, keras.activations.exponential),
    *(keras.activations.hard_sigmoid, keras3_activations.hard_sigmoid),
    *(tf.nn.relu, tf.nn.relu6, tf.sigmoid, tf.nn.softmax, tf.nn.softplus),
    *(tf.abs, tf.square, tf.exp),
)
_NONNEGATIVE = (
    *("abs", "square", "squared_difference", "exp", "sqrt", "rsqrt", "norm"),
    *("sigmoid", "softplus", "softmax", "relu", "relu6"),
    *("reduce_std", "reduce_variance", "reduce_euclidean_norm"),
)
# These return no negative number for one that is not negative.
_SIGN_FUNCTIONS = (
    *(keras.activations.elu, keras.activations.gelu, keras.activations.selu),
    *(keras.activations.softsign, keras.activations.swish, keras.activations.tanh),
    *(
        keras3_activations.hard_silu,
        tf.nn.elu,
        tf.nn.gelu,
        tf.nn.leaky_relu,
        tf.nn.selu,
    ),
    *(tf.nn.silu, tf.tanh),
)

_LAYERS: dict[type, Kept | Callable] = {
    **dict.fromkeys(_PLAIN_IDENTITIES, Kept.GRID),
    **dict.fromkeys(_DROPOUTS, _if(_is_at_rest, Kept.GRID, Kept.SIGN)),
    **dict.fromkeys(_DRAWN_IDENTITIES, _if(_is_at_rest, Kept.GRID)),
    **dict.fromkeys(
        (
            *(_layers.Cropping1D, _layers.Cropping2D, _layers.Cropping3D),
            *(_layers.GlobalMaxPooling1D, _layers.GlobalMaxPooling2D),
            *(_layers.GlobalMaxPooling3D, _layers.MaxPooling1D, _layers.MaxPooling2D),
            *(_layers.MaxPooling3D, _layers.Flatten, _layers.Permute),
            *(_layers.RepeatVector, _layers.Reshape, _layers.UpSampling1D),
            *(_layers.UpSampling3D, _layers.ZeroPadding1D, _layers.ZeroPadding2D),
            _layers.ZeroPadding3D,
        ),
        Kept.GRID,
    ),
    **dict.fromkeys(
        (
            *(_layers.AveragePooling1D, _layers.AveragePooling2D),
            *(_layers.AveragePooling3D, _layers.GlobalAveragePooling1D),
            *(_layers.GlobalAveragePooling2D, _layers.GlobalAveragePooling3D),
            _layers.Concatenate,
        ),
        Kept.PLACE,
    ),
    **dict.fromkeys(
        (
            *(_layers.Average, _layers.Maximum, _layers.Minimum),
            # Both interpolate images that are smaller than the crop.
            *(_layers.CenterCrop, _layers.RandomCrop),
        ),
        Kept.RANGE,
    ),
    **dict.fromkeys(
        (
            *(_layers.Add, _layers.Multiply, _layers.Dot, _layers.LeakyReLU),
            *(_layers.PReLU, _layers.ELU, _layers.UnitNormalization),
        ),
        Kept.SIGN,
    ),
    _layers.Activation: _of_activation,
    _layers.Rescaling: _if(
        lambda n: (
            np.all(np.asarray(n.layer.scale) >= 0)
            and np.all(np.asarray(n.layer.offset) >= 0)
        ),
        Kept.SIGN,
    ),
    _layers.Resizing: lambda node: _interpolated(node.layer.interpolation),
    _layers.UpSampling2D: lambda node: _interpolated(node.layer.interpolation),
}

_OPERATIONS: dict[str, Kept | Callable] = {
    **dict.fromkeys(
        (
            *("identity", "stop_gradient", "reshape", "transpose", "squeeze"),
            *("expand_dims", "getitem", "slice", "strided_slice", "gather", "split"),
            *("unstack", "reverse", "roll", "tile", "repeat", "broadcast_to"),
            *("flip_left_right", "flip_up_down", "rot90", "central_crop"),
            *("crop_to_bounding_box", "pad_to_bounding_box"),
            *("resize_with_crop_or_pad", "space_to_depth", "depth_to_space"),
            *("max_pool", "max_pool1d", "max_pool2d", "max_pool3d"),
            *("reduce_max", "reduce_min"),
        ),
        Kept.GRID,
    ),
    "pad": _if(_pads_zeros, Kept.GRID),
    "resize": lambda node: _interpolated(
        _argument(node, 2, "method", default="bilinear")
    ),
    **dict.fromkeys(
        (
            *("avg_pool", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
            *("reduce_mean", "concat", "stack"),
        ),
        Kept.PLACE,
    ),
    **dict.fromkeys(
        (
            *("add", "add_n", "divide", "divide_no_nan", "matmul", "minimum"),
            *("multiply", "truediv"),
        ),
        _if(_has_no_negative_number, Kept.SIGN),
    ),
    **dict.fromkeys(
        (
            *("ceil", "cumsum", "dropout", "elu", "floor", "gelu", "l2_normalize"),
            *("leaky_relu", "log1p", "maximum", "reduce_prod"),
            *("reduce_sum", "round", "selu", "sign", "silu", "tanh"),
        ),
        Kept.SIGN,
    ),
    "pow": _if(lambda n: _reads_first(n) or _has_no_negative_number(n), Kept.SIGN),
    "cast": _of_cast,
    "clip_by_value": _if(
        lambda node: (
            _is_number(high := _argument(node, 2, "clip_value_max"))
            and bool(np.all(np.asarray(high) >= 0))
        ),
        Kept.SIGN,
    ),
}
