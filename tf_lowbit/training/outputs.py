"""What teacher and student put out: logits or probabilities, of classes or labels."""

import dataclasses
import functools

from tf_lowbit.compat import keras, logits_in_front, tf
from tf_lowbit.scheme import graph

SIGMOID, SOFTMAX = "Sigmoid", "Softmax"
# Operators that put out values of their inputs, as they are.
_KEEPING = {
    *("Cast", "CheckNumerics", "ConcatV2", "EnsureShape", "ExpandDims", "GatherV2"),
    *("Identity", "IdentityN", "Pack", "PreventGradient", "Reshape", "Slice", "Split"),
    *("SplitV", "Squeeze", "StopGradient", "StridedSlice", "Transpose", "Unpack"),
}
_BINARY = {"binary_crossentropy", "binary_focal_crossentropy"}
_CATEGORICAL = {
    "categorical_crossentropy",
    "categorical_focal_crossentropy",
    "sparse_categorical_crossentropy",
}
_REGRESSION = {
    *("huber", "log_cosh", "mean_absolute_error", "mean_absolute_percentage_error"),
    *("mean_squared_error", "mean_squared_logarithmic_error"),
}
# The least probability that a logarithm is taken of, as in Keras's losses.
_LEAST = 1e-7


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What teacher and students put out.

    Attributes:
        are_labels: each unit is a yes or no of its own, and its posterior a sigmoid;
            else the units are classes, with one softmax.
        are_probabilities: they are a sigmoid's values already, not logits.
    """

    are_labels: bool
    are_probabilities: bool

    def logits(self, outputs):
        """The logits of a network's outputs.

        Args:
            outputs: tensor [batch, units], any floating dtype.

        Returns:
            Float32 tensor [batch, units]. Of probabilities, what the sigmoid has read
            where Keras has kept it; else the log-odds, whose gradient is 0 for
            probabilities within 1e-7 of 0 or 1.
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
    """What makes the values of a network's outputs, looked at through the layers.

    The last layers are traced, one after the other, as far as they only hand values
    on: a softmax is seen in an activation, a Lambda, a model within the model and
    behind a Reshape alike.

    Args:
        network: a Functional model.

    Returns:
        Type of the operator, such as "Softmax" or "BiasAdd" -> name of a layer that
        has it; "Placeholder" where an input is put out.
    """
    found: dict[str, str] = {}
    seen: set[int] = set()
    waiting = list(network.outputs)
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        node = graph.producer(tensor)
        if node.is_input:
            found.setdefault("Placeholder", node.layer.name)
            continue
        places = [id(output) for output in graph.outputs_of(node)]
        types, read = _traced(node, places.index(id(tensor)))
        for kind in types:
            found.setdefault(kind, node.layer.name)
        waiting += read
    return found


def _traced(node, place: int) -> tuple[set[str], list]:
    """Of one output of a node: the operators that make it, and what it hands on."""
    reads = node.keras_inputs

    @functools.partial(tf.function, autograph=False)
    def call(*tensors):
        by_id: dict[str, list] = {}
        for old, new in zip(reads, tensors, strict=True):
            by_id.setdefault(str(id(old)), []).append(new)
        args, kwargs = node.map_arguments(by_id)
        return tf.nest.flatten(node.layer(*args, **kwargs))[place]

    traced = call.get_concrete_function(
        *(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in reads)
    )
    placeholders = map(id, traced.inputs[: len(reads)])
    arguments = dict(zip(placeholders, reads, strict=True))
    types, handed_on, seen = set(), [], set()
    waiting = list(traced.outputs)
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        operator = tensor.op
        if id(tensor) in arguments:
            handed_on.append(arguments[id(tensor)])
        elif operator.type == "IdentityN":
            waiting.append(operator.inputs[tensor.value_index])
        elif operator.type in _KEEPING:
            waiting += [read for read in operator.inputs if read.dtype.is_floating]
        else:
            types.add(operator.type)
    return types, handed_on


def check_ends(students, teacher: keras.Model) -> bool:
    """Whether the networks put out a sigmoid's values.

    Args:
        students: Functional models.
        teacher: likewise.

    Raises:
        ValueError: for a softmax, for outputs of which some alone are a sigmoid's, and
            where networks differ.
    """
    forms = {}
    for role, network in [("teacher", teacher), *(("student", s) for s in students)]:
        ends = end_functions(network)
        if SOFTMAX in ends:
            raise ValueError(
                f"The {role} must put out logits, not probabilities: distillation "
                "applies the softmax itself. Leave it out, and give the loss "
                f"from_logits=True. Received: a softmax in layer {ends[SOFTMAX]!r}"
            )
        if SIGMOID in ends and len(ends) > 1:
            raise ValueError(
                f"All outputs of the {role} must be logits, or all a sigmoid's: leave "
                f"the sigmoid out. Received: a sigmoid in layer {ends[SIGMOID]!r}, and "
                f"none in {sorted(set(ends.values()) - {ends[SIGMOID]})}"
            )
        forms[role] = SIGMOID in ends
        if forms[role] != forms["teacher"]:
            raise ValueError(
                "Teacher and student must both put out logits, or both a sigmoid's "
                "values, for they have one loss. Received: a sigmoid at the end of the "
                f"{'student' if forms[role] else 'teacher'} alone"
            )
    return forms["teacher"]


def outputs_of(loss, units: int, *, have_sigmoid: bool, match_logits: bool) -> Outputs:
    """What the networks put out, by their compiled loss, shape and last function.

    Args:
        loss: of `compile`, for one output.
        units: how many there are.
        have_sigmoid: `check_ends`'s.
        match_logits: whether logits are compared, not posteriors.

    Raises:
        ValueError: if the loss reads the outputs in another way than they are, or there
            are no posteriors.
    """
    name, from_logits = _named(loss)
    if name in _BINARY | _CATEGORICAL and from_logits == have_sigmoid:
        remedy = f"give it from_logits={not from_logits}"
        if name in _BINARY and not have_sigmoid:
            remedy += ", or the networks a sigmoid at their end"
        raise ValueError(
            "With a teacher, the loss must read outputs as what they are: "
            f"{remedy}. Received: {name} with from_logits={from_logits}, of networks "
            f"that end {'in' if have_sigmoid else 'without'} a sigmoid"
        )
    is_meaningless = name in _REGRESSION or name in _CATEGORICAL
    if units == 1 and not match_logits and is_meaningless:
        raise ValueError(
            "One output unit has posteriors as a yes or no alone: take a binary "
            'cross-entropy, or JointDistillation(target="logits") for a number that is '
            f"no class. Received: the loss {name}"
        )
    are_labels = have_sigmoid or name in _BINARY
    if name not in _CATEGORICAL:
        are_labels = are_labels or units == 1
    return Outputs(are_labels, have_sigmoid)


def _named(loss) -> tuple[str | None, bool]:
    """The name of a Keras loss, and its `from_logits`; (None, False) of another one."""
    losses = tf.nest.flatten(loss)
    if len(losses) != 1 or losses[0] is None:
        return None, False
    (loss,) = losses
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    settings = {}
    if isinstance(loss, functools.partial):
        loss, settings = loss.func, loss.keywords
    elif isinstance(loss, keras.losses.Loss):
        loss, settings = getattr(loss, "fn", None), loss.get_config()
    name = getattr(loss, "__name__", None)
    is_of_keras = name in _BINARY | _CATEGORICAL | _REGRESSION
    if not is_of_keras or loss is not getattr(keras.losses, name, None):
        return None, False
    return name, bool(settings.get("from_logits", False))
