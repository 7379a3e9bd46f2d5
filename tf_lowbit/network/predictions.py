"""Predicted classes, and labels as classes, for every accuracy of the library.

The last axis of a network's first output holds one score per class, for an example or
for each position of a map. A single unit is a binary classifier: class 1 or 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_lowbit.compat import KerasTensor, keras, tf
from tf_lowbit.network import (
    graph,
    inspection,
    keras3_activations,
    losses,
    output_names,
    passthrough,
)

# Tolerance for the sum of an example's probabilities.
_SLACK = 1e-3
_SIGMOIDS = (
    *(keras.activations.sigmoid, keras.activations.hard_sigmoid, tf.sigmoid),
    keras3_activations.hard_sigmoid,
)


def threshold(network: keras.Model) -> float:
    """Returns the value above which the unit of a binary classifier means class 1.

    0.5 if all values of the functional network's first output are those of a sigmoid,
    moved, selected or averaged; else 0 (a logit).
    """
    waiting = [network.outputs[0]]
    while waiting:
        node = graph.producer(waiting.pop())
        if passthrough.kept(node) >= passthrough.Kept.RANGE:
            waiting += passthrough.sources(node)
        elif not _is_sigmoid(inspection.wrapped_layer(node.layer)):
            return 0.0
    return 0.5


def _is_sigmoid(layer) -> bool:
    function = getattr(layer, "activation", None)
    return function in _SIGMOIDS or passthrough.operation(layer) == "sigmoid"


def in_units(outputs: np.typing.ArrayLike) -> np.ndarray:
    """Returns outputs with an axis of units, which `Reshape(())` leaves out."""
    outputs = np.asarray(outputs)
    return outputs[:, np.newaxis] if outputs.ndim == 1 else outputs


def scores(end: KerasTensor, outputs: np.ndarray) -> np.ndarray:
    """Returns an output of a network as scores: float32 [batch, ..., classes].

    Args:
        end: The network's tensor. Behind an argmax, which puts out class numbers, a
            class has the score 1 where it is chosen and 0 elsewhere.
        outputs: Its values.
    """
    if not _is_argmax(graph.producer(end)):
        return in_units(outputs).astype(np.float32)
    # Two at least, because one unit is a binary classifier.
    return np.eye(max(class_count(end) or 0, 2), dtype=np.float32)[outputs]


def class_count(end: KerasTensor) -> int | None:
    """Returns the number of scores in an output of a network; None if it is open."""
    node = graph.producer(end)
    scored = node.keras_inputs[0] if _is_argmax(node) else end
    return scored.shape[-1]


def _is_argmax(node) -> bool:
    return passthrough.operation(node.layer) == "argmax"


def classes(outputs: np.typing.ArrayLike, limit: float) -> np.ndarray:
    """Returns the predicted classes: int64, one per example and position, flat.

    Args:
        outputs: [batch, ..., classes], or one unit for two classes.
        limit: The `threshold` of the network; used for one unit only.
    """
    outputs = in_units(outputs)
    if outputs.shape[-1] == 1:
        return (outputs > limit).ravel().astype(np.int64)
    return outputs.argmax(axis=-1).ravel()


def of_first_output(given: Any, names: Sequence[str]) -> Any:
    """Returns the labels of a network's first output, or None.

    Args:
        given: Labels; for several outputs a tuple, list or dict of them.
        names: Names of the network's outputs.

    Raises:
        ValueError: If none of a dict's keys is the name of an output.
    """
    if isinstance(given, dict):
        # A single entry belongs to a single output, under any name.
        if len(given) == len(names) == 1:
            return next(iter(given.values()))
        if given and not set(given) & set(names):
            raise ValueError(
                f"A dict of labels must have a key of {list(names)}, the names of the "
                f"outputs. Received: {list(given)}"
            )
        return given.get(names[0])
    if isinstance(given, tuple | list) and len(names) > 1:
        return given[0]
    return given


def are_classes(network: keras.Model) -> bool:
    """Guesses, without labels, whether a network's first output holds class scores.

    An argmax does. Else the loss of `compile` tells it, if it is one of `losses`. Else
    one unit must end in a sigmoid. Several units must not (each is a label of its own),
    nor have the shape of an input (an autoencoder).
    """
    end = network.outputs[0]
    if _is_argmax(graph.producer(end)):
        return True
    shape = tuple(end.shape[1:])
    is_unit = not shape or shape[-1] == 1
    given = getattr(network, "loss", None)
    loss, _ = losses.named(of_first_output(given, output_names.of_labels(network)))
    if loss is not None:
        return loss in losses.CATEGORICAL or (is_unit and loss in losses.BINARY)
    is_sigmoid = threshold(network) > 0.0
    if is_unit or is_sigmoid:
        return is_unit and is_sigmoid
    return shape not in [tuple(tensor.shape[1:]) for tensor in network.inputs]


def labels(given: Any, outputs: np.ndarray, names: Sequence[str]) -> np.ndarray | None:
    """Converts labels to classes, one for each prediction.

    Args:
        given: Integers, one per example or position; or probabilities of the classes,
            such as one-hot, in the shape of the outputs. For a network with several
            outputs a tuple, list or dict, of which the first output's labels count.
        outputs: The network's first output.
        names: Names of the network's outputs.

    Returns:
        Int64, one-dimensional; None if the numbers are not classes, such as the targets
        of a regression.

    Raises:
        ValueError: If there is not one label per prediction, an integer is not one of
            the outputs' classes, or none of a dict's keys is the name of an output.
    """
    given = of_first_output(given, names)
    if given is None:
        return None
    values, outputs = np.asarray(given), in_units(outputs)
    if values.dtype.kind not in "biuf":
        raise ValueError(
            "Labels must be numbers: classes, probabilities of classes, or targets of "
            f"a regression. Received: labels of dtype {values.dtype}"
        )
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
