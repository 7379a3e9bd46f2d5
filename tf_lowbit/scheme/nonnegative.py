"""Which tensors of a float network are never negative, as far as its layers tell."""

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.scheme import activations, graph, registry

_layers = keras.layers
# What puts out no negative number, whatever it reads.
_FUNCTIONS = (
    *(keras.activations.relu, keras.activations.sigmoid, keras.activations.softmax),
    *(keras.activations.softplus, keras.activations.exponential),
    *(keras.activations.hard_sigmoid, activations.hard_sigmoid),
    *(tf.nn.relu, tf.nn.relu6, tf.sigmoid),
)
_SYMBOLS = ("math.sigmoid", "math.softplus", "nn.relu", "nn.relu6", "nn.softmax")
# What puts out none where it reads none.
_KEEPING = (
    *(_layers.Add, _layers.Average, _layers.Maximum, _layers.Minimum),
    *(_layers.Multiply, _layers.Rescaling),
)
_KEEPING_SYMBOLS = (
    *("__operators__.add", "math.add", "math.divide", "math.maximum"),
    *("math.minimum", "math.multiply", "math.truediv"),
)


def is_nonnegative(tensor) -> bool:
    """Whether a Keras tensor of a float network never holds a negative number.

    Args:
        tensor: of a functional model.

    Returns:
        False also where its layers do not tell.
    """
    known: dict[int, bool] = {}
    # Those that a tensor is made of come before it: no recursion, however deep.
    waiting = [tensor]
    while waiting:
        node = graph.producer(waiting[-1])
        sources = node.keras_inputs if _may_keep(node) else []
        missing = [t for t in sources if id(t) not in known]
        if missing and not _is_source(node):
            waiting += missing
            continue
        is_kept = bool(sources) and all(known.get(id(t), False) for t in sources)
        known[id(waiting.pop())] = _is_source(node) or is_kept
    return known[id(tensor)]


def _is_source(node) -> bool:
    layer = node.layer
    activation = getattr(layer, "activation", None)
    if type(layer) is _layers.ReLU:
        return _is_relu(layer)
    if type(layer) is _layers.Softmax or getattr(layer, "symbol", "") in _SYMBOLS:
        return True
    if type(layer) is _layers.Activation or registry.kernels(layer):
        return activation in _FUNCTIONS or _is_relu(activation)
    return False


def _is_relu(layer) -> bool:
    if not isinstance(layer, _layers.ReLU):
        return False
    return layer.negative_slope == 0 and layer.threshold >= 0


def _may_keep(node) -> bool:
    """Whether an output of none below 0 follows from inputs of none below 0."""
    layer = node.layer
    if node.is_input:
        return False
    if getattr(layer, "symbol", "") in _KEEPING_SYMBOLS:
        given = tf.nest.flatten((node.call_args, node.call_kwargs))
        numbers = [g for g in given if not hasattr(g, "_keras_history")]
        return all(
            np.all(np.asarray(n) >= 0)
            for n in numbers
            if n is not None and not isinstance(n, str)
        )
    if type(layer) is _layers.Rescaling:
        return bool(np.all(np.asarray(layer.scale) >= 0)) and bool(
            np.all(np.asarray(layer.offset) >= 0)
        )
    # Cubic and Lanczos interpolation overshoot.
    is_upsampling = type(layer) is _layers.UpSampling2D
    is_mean = is_upsampling and layer.interpolation == "bilinear"
    return type(layer) in _KEEPING or registry.is_transparent(layer) or is_mean
