"""Keras 3 operations (`keras.ops`), as layers of `tf_keras` and TensorFlow operations.

Two tables map the class of a Keras 3 operation to its counterpart. Activations and
pooling become layers, which keep the operation's name. The others become the TensorFlow
operations that `network.passthrough` and the exports know.
"""

import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tf_lowbit.compat import KerasTensor, keras, tf
from tf_lowbit.network.keras3_activations import hard_sigmoid, hard_silu

_layers = keras.layers


def layer(node: Any) -> keras.layers.Layer | None:
    """Makes the layer that computes a node's operation; None if no layer does.

    Args:
        node: Node of a Keras 3 graph that calls an operation.

    Raises:
        ValueError: If `tf_keras` lacks an option of the operation.
    """
    make = _LAYERS.get(_kind(node))
    if make is None:
        return None
    # The operation's dtype, not the policy's: a layer must not cast either.
    return make(node, name=node.operation.name, dtype=node.outputs[0].dtype)


def function(node: Any) -> Callable:
    """Returns the function that computes a node's operation.

    Args:
        node: Node of a Keras 3 graph that calls an operation.

    Returns:
        A function of the arguments of the node's call. It raises ValueError, with the
        reason, if TensorFlow lacks an option of the operation.

    Raises:
        ValueError: If the operation is not in the table.
    """
    convert = _FUNCTIONS.get(_kind(node))
    if convert is None:
        raise ValueError("it is not in the list")

    def call(*args, **kwargs):
        args, kwargs = tf.nest.map_structure(_without_backend, (args, kwargs))
        return convert(node, *args, **kwargs)

    return call


def _kind(node) -> str:
    kind = type(node.operation)
    # A class of the user's may have the name of one of Keras's.
    return kind.__name__ if kind.__module__.startswith("keras.src.") else ""


def _without_backend(value):
    """Turns a constant of a Keras 3 backend into an array."""
    library = sys.modules["keras"]
    if isinstance(value, library.Variable):
        raise ValueError("it reads a variable that belongs to no layer")
    is_constant = not isinstance(value, KerasTensor) and library.ops.is_tensor(value)
    return library.ops.convert_to_numpy(value) if is_constant else value


def _promoted(node, values):
    """Casts operands to the dtype of the result, as Keras 3 does."""
    dtype = tf.as_dtype(node.outputs[0].dtype)

    def cast(value):
        if isinstance(value, KerasTensor) and value.dtype != dtype:
            return tf.cast(value, dtype)
        is_array = isinstance(value, np.ndarray | np.generic)
        return value.astype(dtype.as_numpy_dtype) if is_array else value

    return tf.nest.map_structure(cast, values)


def _same(compute):
    """Converts an operation whose only arguments are tensors."""
    return lambda node, *tensors: compute(*tensors)


def _promoting(compute):
    """Converts an operation whose only arguments are tensors, of any types."""
    return lambda node, *tensors: compute(*_promoted(node, tensors))


def _reducing(compute):
    def reduce(node, x):
        own = node.operation
        (x,) = _promoted(node, [x])
        return compute(x, axis=own.axis, keepdims=own.keepdims)

    return reduce


def _joining(compute):
    return lambda node, xs: compute(_promoted(node, list(xs)), axis=node.operation.axis)


def _argmax(node, x):
    own = node.operation
    if own.axis is None:
        raise ValueError("TensorFlow needs an axis")
    x = tf.argmax(x, axis=own.axis, output_type=node.outputs[0].dtype)
    return tf.expand_dims(x, own.axis) if own.keepdims else x


def _extreme(compute, limit):
    def reduce(node, x):
        own = node.operation
        x = compute(x, axis=own.axis, keepdims=own.keepdims)
        initial = getattr(own, "initial", None)
        return x if initial is None else limit(x, initial)

    return reduce


def _permuting(permute, *names):
    def transpose(node, x):
        axes = [getattr(node.operation, name) for name in names]
        # An empty array whose sizes are the axes' numbers shows the permutation.
        return tf.transpose(x, permute(np.empty(range(len(x.shape))), *axes).shape)

    return transpose


def _expand_dims(node, x):
    axes = _ints(node.operation.axis)
    rank = len(x.shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = tf.expand_dims(x, axis)
    return x


def _squeeze(node, x):
    axes = _ints(node.operation.axis)
    if axes is None:  # TensorFlow would remove the batch of one example.
        axes = [axis for axis, size in enumerate(x.shape) if size == 1]
    return tf.squeeze(x, axes)


def _pad(node, x, constant_values=None):
    own = node.operation
    if own.mode not in ("constant", "reflect", "symmetric"):
        raise ValueError(f"TensorFlow has no mode={own.mode!r}")
    sides = [list(map(int, side)) for side in own.pad_width]
    given = {} if constant_values is None else {"constant_values": constant_values}
    return tf.pad(x, sides, mode=own.mode.upper(), **given)


def _get_item(node, x, key):
    return x[tuple(key) if isinstance(key, list) else key]


def _split(node, x):
    own, parts = node.operation, node.operation.indices_or_sections
    if not isinstance(parts, int):
        parts = np.diff([0, *parts, x.shape[own.axis]]).tolist()
    return tf.split(x, parts, axis=own.axis)


def _flip(node, x):
    axes = node.operation.axis
    return tf.reverse(x, list(range(len(x.shape))) if axes is None else _ints(axes))


def _round(node, x):
    if node.operation.decimals:
        raise ValueError(f"TensorFlow has no decimals={node.operation.decimals}")
    return tf.round(x)


def _normalize(node, x):
    own = node.operation
    if own.order != 2:
        raise ValueError(f"TensorFlow has no order={own.order}")
    smallest = keras.backend.epsilon() if own.epsilon is None else own.epsilon
    return tf.math.l2_normalize(x, axis=own.axis, epsilon=smallest**2)


def _resize(node, images):
    own = node.operation
    if own.crop_to_aspect_ratio or own.pad_to_aspect_ratio:
        raise ValueError("TensorFlow neither crops nor pads when it resizes")
    return tf.image.resize(
        images, own.size, method=own.interpolation, antialias=own.antialias
    )


def _ints(axes) -> list[int] | None:
    return None if axes is None else np.ravel(axes).tolist()


def _activation(activation):
    return lambda node, **given: _layers.Activation(activation, **given)


def _pooling(*kinds):
    """Converts pooling over 1, 2 or 3 dimensions."""

    def pool(node, **given):
        own = node.operation
        rank = len(node.outputs[0].shape) - 2
        return kinds[rank - 1](
            own.pool_size, own.strides, own.padding, own.data_format, **given
        )

    return pool


_LAYERS: dict[str, Callable] = {
    "AveragePool": _pooling(
        _layers.AveragePooling1D, _layers.AveragePooling2D, _layers.AveragePooling3D
    ),
    "Elu": lambda node, **given: _layers.ELU(node.operation.alpha, **given),
    "HardSigmoid": _activation(hard_sigmoid),
    "HardSilu": _activation(hard_silu),
    "LeakyRelu": lambda node, **given: _layers.LeakyReLU(
        node.operation.negative_slope, **given
    ),
    "MaxPool": _pooling(
        _layers.MaxPooling1D, _layers.MaxPooling2D, _layers.MaxPooling3D
    ),
    "Relu": lambda node, **given: _layers.ReLU(**given),
    "Relu6": lambda node, **given: _layers.ReLU(6.0, **given),
    "Selu": _activation("selu"),
    "Sigmoid": _activation("sigmoid"),
    "Silu": _activation("swish"),
    "Softmax": lambda node, **given: _layers.Softmax(node.operation.axis, **given),
    "Softplus": _activation("softplus"),
    "Softsign": _activation("softsign"),
    "Tanh": _activation("tanh"),
}

_FUNCTIONS: dict[str, Callable] = {
    "Absolute": _same(tf.abs),
    "Add": _promoting(operator.add),
    "Amax": _extreme(tf.reduce_max, tf.maximum),
    "Amin": _extreme(tf.reduce_min, tf.minimum),
    "Argmax": _argmax,
    "Cast": lambda node, x: tf.cast(x, node.operation.dtype),
    "Ceil": _same(tf.math.ceil),
    "Clip": lambda node, x: tf.clip_by_value(
        x, node.operation.x_min, node.operation.x_max
    ),
    "Concatenate": _joining(tf.concat),
    "DepthToSpace": lambda node, x: tf.nn.depth_to_space(x, node.operation.block_size),
    "Divide": _promoting(operator.truediv),
    "Equal": _same(tf.equal),
    "Exp": _same(tf.exp),
    "ExpandDims": _expand_dims,
    "Flip": _flip,
    "Floor": _same(tf.floor),
    "Gelu": lambda node, x: tf.nn.gelu(x, approximate=node.operation.approximate),
    "GetItem": _get_item,
    "Greater": _same(tf.greater),
    "GreaterEqual": _same(tf.greater_equal),
    "Less": _same(tf.less),
    "LessEqual": _same(tf.less_equal),
    "Log": _same(tf.math.log),
    "LogSoftmax": lambda node, x: tf.nn.log_softmax(x, axis=node.operation.axis),
    "Matmul": _promoting(tf.matmul),
    "Max": _extreme(tf.reduce_max, tf.maximum),
    "Maximum": _promoting(tf.maximum),
    "Mean": _reducing(tf.reduce_mean),
    "Min": _extreme(tf.reduce_min, tf.minimum),
    "Minimum": _promoting(tf.minimum),
    "Moveaxis": _permuting(np.moveaxis, "source", "destination"),
    "Multiply": _promoting(operator.mul),
    "Negative": _same(operator.neg),
    "Normalize": _normalize,
    "Pad": _pad,
    "Power": _promoting(tf.pow),
    "Prod": _reducing(tf.reduce_prod),
    "Repeat": lambda node, x: tf.repeat(
        x, node.operation.repeats, axis=node.operation.axis
    ),
    "Reshape": lambda node, x: tf.reshape(x, _ints(node.operation.newshape)),
    "Resize": _resize,
    "Roll": lambda node, x: tf.roll(x, node.operation.shift, node.operation.axis),
    "Round": _round,
    "Rsqrt": _same(tf.math.rsqrt),
    "Sign": _same(tf.sign),
    "SpaceToDepth": lambda node, x: tf.nn.space_to_depth(x, node.operation.block_size),
    "Split": _split,
    "Sqrt": _same(tf.sqrt),
    "Square": _same(tf.square),
    "Squeeze": _squeeze,
    "Stack": _joining(tf.stack),
    "Std": _reducing(tf.math.reduce_std),
    "StopGradient": _same(tf.stop_gradient),
    "Subtract": _promoting(operator.sub),
    "Sum": _reducing(tf.reduce_sum),
    "Swapaxes": _permuting(np.swapaxes, "axis1", "axis2"),
    "Take": lambda node, x, indices: tf.gather(x, indices, axis=node.operation.axis),
    "Tile": lambda node, x: tf.tile(x, node.operation.repeats),
    "Transpose": lambda node, x: tf.transpose(x, _ints(node.operation.axes)),
    "TrueDivide": _promoting(operator.truediv),
    "Var": _reducing(tf.math.reduce_variance),
    "Where": lambda node, condition, *values: tf.where(
        condition, *_promoted(node, values)
    ),
}
