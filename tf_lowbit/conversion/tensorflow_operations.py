"""TensorFlow operations in terms of `keras.ops`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tf_lowbit.compat import tf


def of(ops: Any) -> dict[str, Callable]:
    """Maps names of TensorFlow operations to functions made of Keras 3 operations.

    Args:
        ops: The module `keras.ops` of Keras 3.

    Returns:
        Functions with the arguments of the TensorFlow operations.
    """

    def positional(function):
        # TensorFlow names the arguments differently, in the same order.
        return lambda *args, **kwargs: function(*args, *kwargs.values())

    def add_n(inputs):
        return ops.sum(ops.stack(inputs), axis=0)

    def reduced(function):
        def reduce(input_tensor, axis=None, keepdims=False):
            return function(input_tensor, axis=axis, keepdims=keepdims)

        return reduce

    def pad(tensor, paddings, mode="CONSTANT", name=None, constant_values=0):
        # Positions are those of version 1, which version 2 calls.
        paddings = np.asarray(paddings).tolist()
        if mode.upper() != "CONSTANT":
            return ops.pad(tensor, paddings, mode=mode.lower())
        return ops.pad(tensor, paddings, constant_values=constant_values)

    def getitem(tensor, slice_spec):
        is_tuple = isinstance(slice_spec, list | tuple)
        slices = slice_spec if is_tuple else [slice_spec]
        return ops.get_item(tensor, tuple(_slice(one) for one in slices))

    same = (
        *("abs", "add", "divide", "elu", "exp", "floor", "log", "matmul", "maximum"),
        *("minimum", "multiply", "negative", "relu", "relu6", "round", "rsqrt"),
        *("selu", "sigmoid", "sign", "silu", "softplus", "sqrt", "square", "subtract"),
        *("stop_gradient", "tanh"),
    )
    return {
        **{name: positional(getattr(ops, name)) for name in same},
        "add_n": add_n,
        "argmax": lambda input, axis=None, output_type=tf.int64: ops.cast(
            ops.argmax(input, 0 if axis is None else axis),
            tf.as_dtype(output_type).name,
        ),
        "cast": lambda x, dtype: ops.cast(x, tf.as_dtype(dtype).name),
        "clip_by_value": lambda t, clip_value_min, clip_value_max: ops.clip(
            t, clip_value_min, clip_value_max
        ),
        "concat": lambda values, axis: ops.concatenate(values, axis=int(axis)),
        "expand_dims": lambda input, axis: ops.expand_dims(input, axis),
        "gelu": lambda features, approximate=False: ops.gelu(features, approximate),
        "getitem": getitem,
        "identity": lambda input: input,
        "leaky_relu": lambda features, alpha=0.2: ops.leaky_relu(features, alpha),
        "neg": positional(ops.negative),
        "pad": pad,
        "pow": positional(ops.power),
        "reduce_max": reduced(ops.max),
        "reduce_mean": reduced(ops.mean),
        "reduce_min": reduced(ops.min),
        "reduce_sum": reduced(ops.sum),
        "reshape": lambda tensor, shape: ops.reshape(
            tensor, np.asarray(shape).tolist()
        ),
        "softmax": lambda logits, axis=-1: ops.softmax(logits, axis),
        "squeeze": lambda input, axis=None: ops.squeeze(
            input, tuple(axis) if isinstance(axis, list) else axis
        ),
        "stack": lambda values, axis=0: ops.stack(values, axis=axis),
        "transpose": lambda a, perm=None: ops.transpose(a, axes=perm),
        "truediv": positional(ops.true_divide),
    }


def _slice(value):
    """Returns an index, which `tf_keras` may hold as a dict."""
    if isinstance(value, dict):
        return slice(value["start"], value["stop"], value["step"])
    return value
