"""Predicted classes, and labels as classes: what every accuracy of the library counts.

A network's first output holds a score for each class in its last axis: for an example,
or for each position of a map. One unit alone is a binary classifier's, class 1 or 0.
"""

import numpy as np

from tf_lowbit import inspection
from tf_lowbit.compat import keras
from tf_lowbit.scheme import graph

# How far the sum of an example's probabilities may be from 1.
_SLACK = 1e-3


def threshold(network: keras.Model) -> float:
    """Beyond which value the unit of a binary classifier says class 1.

    Args:
        network: functional model; its first output counts.

    Returns:
        0.5 where the last that the network does is a sigmoid; 0 otherwise, for a logit.
    """
    tensor = network.outputs[0]
    while True:
        node = graph.producer(tensor)
        layer = inspection.wrapped_layer(node.layer)
        activation = getattr(layer, "activation", None)
        is_plain = activation is keras.activations.linear and not layer.weights
        if not is_plain and not isinstance(
            layer, keras.layers.Flatten | keras.layers.Reshape
        ):
            break
        tensor = node.keras_inputs[0]
    is_sigmoid = activation is keras.activations.sigmoid
    return 0.5 if is_sigmoid or getattr(layer, "symbol", "") == "math.sigmoid" else 0.0


def classes(outputs, limit: float) -> np.ndarray:
    """The predicted classes.

    Args:
        outputs: [batch, ..., classes], or one unit for two classes.
        limit: of one unit: `threshold` of the network.

    Returns:
        One for each example and position, int64, one-dimensional.
    """
    outputs = np.asarray(outputs)
    if outputs.shape[-1] == 1:
        return (outputs > limit).ravel().astype(np.int64)
    return outputs.argmax(axis=-1).ravel()


def of_first_output(given, names):
    """What is given for a network's first output.

    Args:
        given: labels; of several outputs a tuple, list or dict of them.
        names: of the network's outputs.

    Returns:
        The labels of the first output; None where there are none.
    """
    if isinstance(given, dict):
        # Of one output the only entry is meant, whatever it is called.
        is_only = len(given) == len(names) == 1
        return next(iter(given.values())) if is_only else given.get(names[0])
    if isinstance(given, tuple | list) and len(names) > 1:
        return given[0]
    return given


def are_classes(network: keras.Model, outputs, given=None) -> bool:
    """Whether a network's first output scores classes, as far as can be told.

    Labels say it. Without them, an output of the shape of an input is none (an
    autoencoder's), nor is one unit without a sigmoid (a regression's).

    Args:
        network: functional model.
        outputs: of its first output.
        given: labels of that output, or None.
    """
    if given is not None:
        return labels(given, outputs, [""]) is not None
    if outputs.shape[-1] == 1:
        return threshold(network) > 0.0
    shapes = [tuple(tensor.shape[1:]) for tensor in network.inputs]
    return tuple(outputs.shape[1:]) not in shapes


def labels(given, outputs, names) -> np.ndarray | None:
    """Labels as classes, one for each prediction.

    Args:
        given: integers, one for each example or position; or probabilities of the
            classes, such as one-hot, in the shape of the outputs. Of a network with
            several outputs, those of the first one count, of a tuple, list or dict.
        outputs: of the network's first output.
        names: of the network's outputs.

    Returns:
        int64, one-dimensional; None where the numbers are no classes, such as what a
        regression is trained on.

    Raises:
        ValueError: if there is not one for each prediction, or one is an integer that
            is none of the outputs' classes.
    """
    given = of_first_output(given, names)
    if given is None:
        return None
    values, outputs = np.asarray(given), np.asarray(outputs)
    units = outputs.shape[-1]
    if units > 1 and values.shape == outputs.shape:
        sums = values.sum(axis=-1)
        if (values < 0).any() or not np.allclose(sums, 1.0, rtol=0.0, atol=_SLACK):
            return None
        return values.argmax(axis=-1).ravel()
    if values.size * units != outputs.size:
        raise ValueError(
            "There must be one label for each example, or each position of a map. "
            f"Received: labels of shape {values.shape}, outputs of shape "
            f"{outputs.shape}"
        )
    whole = values.ravel().astype(np.int64)
    are_whole = (whole == values.ravel()).all()
    if units > 1 and are_whole and not ((whole >= 0) & (whole < units)).all():
        raise ValueError(
            f"Labels must be classes in [0, {units}). "
            f"Received: labels in [{whole.min()}, {whole.max()}]"
        )
    is_class = are_whole and (units > 1 or ((whole == 0) | (whole == 1)).all())
    return whole if is_class else None
