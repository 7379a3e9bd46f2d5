"""The kind of a network's outputs: logits or probabilities, classes or labels."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from tf_lowbit.compat import keras, logits_in_front, tf
from tf_lowbit.network import graph, losses

SIGMOID, SOFTMAX = "Sigmoid", "Softmax"
# Operators whose outputs are values of their inputs.
_KEEPING = {
    *("Cast", "CheckNumerics", "ConcatV2", "EnsureShape", "ExpandDims", "GatherV2"),
    *("Identity", "IdentityN", "Pack", "PreventGradient", "Reshape", "Slice", "Split"),
    *("SplitV", "Squeeze", "StopGradient", "StridedSlice", "Transpose", "Unpack"),
}
# Probabilities are clipped to [1e-7, 1 - 1e-7] before a logarithm, as in Keras.
_LEAST = 1e-7


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The kind of outputs of teacher and students.

    Attributes:
        are_labels: True if each unit is a binary label, with a sigmoid as posterior;
            False if the units are classes, with one softmax.
        are_probabilities: Whether the outputs are values of a sigmoid, not logits.
    """

    are_labels: bool
    are_probabilities: bool

    def logits(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the logits of a network's outputs: float32 [batch, units].

        For probabilities these are the sigmoid's inputs, if Keras kept them. Otherwise
        they are the log-odds, whose gradient is 0 for probabilities within 1e-7 of 0 or
        1.
        """
        if not self.are_probabilities:
            return tf.cast(outputs, tf.float32)
        logits = logits_in_front(outputs)
        if logits is not None:
            return tf.cast(logits, tf.float32)
        p = tf.cast(outputs, tf.float32)
        p = tf.clip_by_value(p, _LEAST, 1.0 - _LEAST)
        return tf.math.log(p) - tf.math.log1p(-p)


def end_functions(network: keras.Model) -> dict[str, str]:
    """Finds the operators that compute a network's outputs.

    The search goes back through layers that only pass values on. So it finds a softmax
    in an activation, in a Lambda, in a nested model, or in front of a Reshape.

    Returns:
        Type of the operator, such as "Softmax" or "BiasAdd" -> name of a layer that has
        it. The type is "Placeholder" if an output is an input of the network.
    """
    found: dict[str, str] = {}

    def read(tensor):
        node = graph.producer(tensor)
        if node.is_input:
            found.setdefault("Placeholder", node.layer.name)
            return []
        places = [id(output) for output in graph.outputs_of(node)]
        types, sources = _traced(node, places.index(id(tensor)))
        for kind in types:
            found.setdefault(kind, node.layer.name)
        return sources

    _walk(network.outputs, read)
    return found


def _walk(tensors, read):
    """Calls `read` once for each tensor, and for each tensor that `read` returns."""
    seen, waiting = set(), list(tensors)
    while waiting:
        tensor = waiting.pop()
        if id(tensor) not in seen:
            seen.add(id(tensor))
            waiting += read(tensor)


def _traced(node, place: int) -> tuple[set[str], list]:
    """Finds the operators that compute one output of a node.

    Returns:
        Types of the operators, and the inputs that the node passes on to this output.
    """
    inputs = node.keras_inputs

    @functools.partial(tf.function, autograph=False)
    def call(*tensors):
        by_id: dict[str, list] = {}
        for old, new in zip(inputs, tensors, strict=True):
            by_id.setdefault(str(id(old)), []).append(new)
        args, kwargs = node.map_arguments(by_id)
        return tf.nest.flatten(node.layer(*args, **kwargs))[place]

    traced = call.get_concrete_function(
        *(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs)
    )
    placeholders = map(id, traced.inputs[: len(inputs)])
    arguments = dict(zip(placeholders, inputs, strict=True))
    types, passed_on = set(), []

    def read(tensor):
        operator = tensor.op
        if id(tensor) in arguments:
            passed_on.append(arguments[id(tensor)])
        elif operator.type == "IdentityN":
            return [operator.inputs[tensor.value_index]]
        elif operator.type in _KEEPING:
            return [each for each in operator.inputs if each.dtype.is_floating]
        else:
            types.add(operator.type)
        return []

    _walk(traced.outputs, read)
    return types, passed_on


def check_ends(students: Sequence[keras.Model], teacher: keras.Model) -> bool:
    """Checks the ends of the networks; tells whether they are a sigmoid.

    Raises:
        ValueError: If a network ends in a softmax, only some of its outputs are a
            sigmoid's, or the networks differ.
    """
    forms = {}
    for role, network in [("teacher", teacher), *(("student", s) for s in students)]:
        ends = end_functions(network)
        if SOFTMAX in ends:
            raise ValueError(
                f"The {role} must output logits, not probabilities: distillation "
                "applies the softmax itself. Before quantize, set that layer's "
                "activation to keras.activations.linear, or build the network without "
                "the softmax. Give the loss "
                f"from_logits=True. Received: a softmax in layer {ends[SOFTMAX]!r}"
            )
        if SIGMOID in ends and len(ends) > 1:
            raise ValueError(
                f"All outputs of the {role} must be logits, or all a sigmoid's: remove "
                f"the sigmoid. Received: a sigmoid in layer {ends[SIGMOID]!r}, but not "
                f"in {sorted(set(ends.values()) - {ends[SIGMOID]})}"
            )
        forms[role] = SIGMOID in ends
        if forms[role] != forms["teacher"]:
            raise ValueError(
                "Teacher and student must both output logits, or both end in a "
                "sigmoid, because they share a loss. Received: a sigmoid at the end of "
                f"the {'student' if forms[role] else 'teacher'} only"
            )
    return forms["teacher"]


def outputs_of(
    loss: Any, units: int, *, have_sigmoid: bool, match_logits: bool
) -> Outputs:
    """Finds the kind of the networks' outputs.

    Args:
        loss: The loss given to `compile`, of one output.
        units: Number of units of the output.
        have_sigmoid: Result of `check_ends`.
        match_logits: Whether distillation compares logits, not posteriors.

    Raises:
        ValueError: If `from_logits` of the loss contradicts the outputs, or the outputs
            have no posteriors to compare.
    """
    name, from_logits = losses.named(loss)
    if name in losses.BINARY | losses.CATEGORICAL and from_logits == have_sigmoid:
        remedy = f"give it from_logits={not from_logits}"
        if name in losses.BINARY and not have_sigmoid:
            remedy += ", or the networks a sigmoid at their end"
        raise ValueError(
            "With a teacher, from_logits of the loss must match the networks' outputs: "
            f"{remedy}. Received: {name} with from_logits={from_logits}, and networks "
            f"that end {'in' if have_sigmoid else 'without'} a sigmoid"
        )
    is_meaningless = name in losses.REGRESSION or name in losses.CATEGORICAL
    if units == 1 and not match_logits and is_meaningless:
        raise ValueError(
            "One output unit has posteriors only if it is a binary label: use a binary "
            'cross-entropy, or JointDistillation(target="logits") for a regression. '
            f"Received: the loss {name}"
        )
    is_single = units == 1 and name not in losses.CATEGORICAL
    return Outputs(have_sigmoid or name in losses.BINARY or is_single, have_sigmoid)
