"""Joint distillation: what teacher and student learn from each other.

Zhuang et al., arXiv:1908.04680: a full-precision teacher is trained together with the
low-bitwidth student. The posterior terms and their constants are those of the authors'
code; the hints are reconstructed (recalled, half seen in it).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from tf_lowbit import inspection
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks
from tf_lowbit.quantizers import ACTIVATION
from tf_lowbit.scheme import registry
from tf_lowbit.training.outputs import Outputs
from tf_lowbit.training.scores import DISTILLATION, HINT, TASK, Batch
from tf_lowbit.training.settings import Settings

POSTERIORS, LOGITS = "posteriors", "logits"
JOINT, TASK_ONLY, FROZEN = "joint", "task", "frozen"
STAGES = "stages"
TARGETS = (POSTERIORS, LOGITS)
TEACHERS = (JOINT, TASK_ONLY, FROZEN)

# The authors' CIFAR-100 constants; those for ImageNet are in examples/configs/. The
# logits have one weight for both ways.
_WEIGHTS = {
    POSTERIORS: {
        "task_weight": 0.7,
        "distillation_weight": 0.7,
        "teacher_task_weight": 1.0,
        "teacher_distillation_weight": 0.5,
    },
    LOGITS: {
        "task_weight": 0.3,
        "distillation_weight": 0.1,
        "teacher_task_weight": 1.0,
        "teacher_distillation_weight": 0.1,
    },
}
# How many of the last stages give hints by default.
_HINT_STAGES = 2


@keras.utils.register_keras_serializable(package="tf_lowbit")
@dataclasses.dataclass(frozen=True)
class JointDistillation(Settings):
    """The losses of teacher and student.

    With `CE` the compiled loss, `D` the mean over the batch of the distance to the
    other's output, which is detached, and `H` the distance at the hint layers:

        student: task_weight CE + distillation_weight D(teacher, student)
            + hint_weight H
        teacher: teacher_task_weight CE
            + teacher_distillation_weight D(student, teacher)
            + hint_weight H, if its gradient is on

    and the regularisation losses of each, with weight 1. With several students the
    teacher's `D` and `H` are means over them.

    `target="posteriors"`: `D(p, q) = T^2 KL(p || q)`, the sum over the classes of
    `p (log p - log q)`, with `p` and `q` the softmax of the logits over `T`. Where each
    unit is a label of its own, as for a binary cross-entropy, and for a single unit:
    the mean over the units of the KL of yes and no, with `p` and `q` the sigmoid of the
    logits over `T`.
    `target="logits"`: the mean over the units of the logits' squared difference.
    Of networks that end in a sigmoid, the logits are what the sigmoid reads.

    `H = 1/2 mean((Q(teacher's feature) - student's feature)^2)`, summed over
    the hint layers, with Q the student's activation quantizer there; a layer without
    one is matched as it is. Each side's gradient takes the other as a constant.

    Attributes:
        target: "posteriors" or "logits".
        task_weight: None for 0.7 (posteriors) or 0.3 (logits), as the authors have it.
        distillation_weight: None for 0.7 or 0.1.
        teacher_task_weight: None for 1.
        teacher_distillation_weight: None for 0.5 or 0.1.
        temperature: T; 1 by default, for posteriors only.
        teacher: "joint"; "task" trains it with its own CE only; "frozen" not at all
            (its batch normalisation then uses its moving statistics).
        hints: None for no hints; "stages" for the last activation quantizer (residual
            ones apart) of each of the last two resolutions of the student; or a list
            of layer names, or of (student's layer, teacher's layer).
        hint_weight: None for 1.
        hint_teacher_gradient: whether the hints train the teacher too; None for
            yes where the teacher is "joint".

    Where None stands for a number, the attribute becomes it; where it has no effect, as
    `hint_weight` without hints, it stays None.

    Raises:
        ValueError: for a value outside of what is said above, and for one that would
            have no effect.
    """

    target: str = POSTERIORS
    task_weight: float | None = None
    distillation_weight: float | None = None
    teacher_task_weight: float | None = None
    teacher_distillation_weight: float | None = None
    temperature: float | None = None
    teacher: str = JOINT
    hints: str | Sequence | None = None
    hint_weight: float | None = None
    hint_teacher_gradient: bool | None = None

    def __post_init__(self):
        checks.choice("target", self.target, TARGETS)
        checks.choice("teacher", self.teacher, TEACHERS)
        _check_hints(self.hints)
        if self.hints is not None and not isinstance(self.hints, str):
            hints = (h if isinstance(h, str) else tuple(h) for h in self.hints)
            object.__setattr__(self, "hints", tuple(hints))
        is_joint, has_hints = self.teacher == JOINT, self.hints is not None
        defaults = {
            **_WEIGHTS[self.target],
            "temperature": 1.0,
            "hint_weight": 1.0,
            "hint_teacher_gradient": is_joint,
        }
        idle = {
            "teacher_task_weight": self.teacher == FROZEN,
            "teacher_distillation_weight": not is_joint,
            "temperature": self.target == LOGITS,
            "hint_weight": not has_hints,
            "hint_teacher_gradient": not (is_joint and has_hints),
        }
        for name, default in defaults.items():
            self._settle(name, default, idle.get(name, False))

    def _settle(self, name, default, is_idle):
        """Puts a default in; refuses what has no effect or is no weight."""
        value = getattr(self, name)
        if is_idle and value is not None:
            raise ValueError(
                f"{name} must have an effect. Received: {name}={value!r} with target="
                f"{self.target!r}, teacher={self.teacher!r}, hints={self.hints!r}"
            )
        if is_idle:
            return
        if value is None:
            object.__setattr__(self, name, default)
        elif name == "hint_teacher_gradient":
            checks.flag(name, value)
        elif name == "temperature":
            checks.number(name, value, above=0)
        else:
            checks.number(name, value, at_least=0)

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher's weights move."""
        return self.teacher != FROZEN

    def student_weights(self) -> dict[str, float]:
        """The parts of a student's loss, and their weights."""
        weights = {
            TASK: self.task_weight,
            DISTILLATION: self.distillation_weight,
        }
        return weights | ({} if self.hints is None else {HINT: self.hint_weight})

    def teacher_weights(self) -> dict[str, float]:
        """The parts of the teacher's loss, and their weights; logged if frozen."""
        weights = {TASK: self.teacher_task_weight if self.trains_teacher else 1.0}
        if self.teacher == JOINT:
            weights[DISTILLATION] = self.teacher_distillation_weight
        if self.hint_teacher_gradient:
            weights[HINT] = self.hint_weight
        return weights

    def distance(self, target, logits, *, are_labels: bool = False):
        """The distance D of logits to target logits.

        Args:
            target: logits [batch, units], any floating dtype.
            logits: likewise.
            are_labels: whether each unit is a label of its own instead of a class.

        Returns:
            Float32 tensor [batch], not negative but for rounding. The gradient reaches
            both arguments.
        """
        target, logits = tf.cast(target, tf.float32), tf.cast(logits, tf.float32)
        if self.target == LOGITS:
            return tf.reduce_mean(tf.math.squared_difference(target, logits), axis=-1)
        target, logits = target / self.temperature, logits / self.temperature
        if are_labels:
            # Yes and no: 1 - sigmoid(z) = sigmoid(-z).
            divergence = tf.reduce_mean(
                tf.add_n(
                    [
                        _divergence(
                            tf.math.log_sigmoid(sign * target),
                            tf.math.log_sigmoid(sign * logits),
                        )
                        for sign in (1.0, -1.0)
                    ]
                ),
                axis=-1,
            )
        else:
            divergence = tf.reduce_sum(
                _divergence(tf.nn.log_softmax(target), tf.nn.log_softmax(logits)),
                axis=-1,
            )
        return self.temperature**2 * divergence


def _divergence(log_p, log_q):
    """The terms of KL(p || q)."""
    return tf.exp(log_p) * (log_p - log_q)


class Seen(NamedTuple):
    """What a network makes of a batch.

    Attributes:
        outputs: its outputs.
        features: layer name -> output, at the hints.
    """

    outputs: object
    features: dict


class Hint(NamedTuple):
    """A pair of layers whose outputs are matched.

    Attributes:
        student: the student's layer.
        teacher: the teacher's layer.
        quantizer: the student's activation quantizer there, or None.
    """

    student: str
    teacher: str
    quantizer: inspection.QuantizedTensor | None

    def quantized(self, feature):
        """The teacher's feature as the student's quantizer gives it: Q."""
        if self.quantizer is None:
            return feature
        return self.quantizer.declared(feature, True, self.quantizer.variables)


def hint_distance(target, feature):
    """`1/2 mean((target - feature)^2)` of each example.

    Args:
        target: tensor [batch, ...], any floating dtype.
        feature: likewise, of the same shape.

    Returns:
        Float32 tensor [batch]. The gradient reaches both arguments.
    """
    target, feature = tf.cast(target, tf.float32), tf.cast(feature, tf.float32)
    squared = tf.math.squared_difference(target, feature)
    return 0.5 * tf.reduce_mean(squared, axis=list(range(1, squared.shape.rank)))


def student_parts(
    distillation: JointDistillation,
    outputs: Outputs,
    hints: Sequence[Hint],
    student: Seen,
    teacher: Seen,
    batch: Batch,
) -> dict:
    """What a student learns from the teacher, which counts as a constant.

    Args:
        distillation: the losses.
        outputs: what the networks put out.
        hints: of the student.
        student: what the student made of the batch.
        teacher: what the teacher made of it.
        batch: this replica's part.

    Returns:
        Name of the part -> mean over this replica's examples, float32 scalar.
    """
    target = tf.stop_gradient(outputs.logits(teacher.outputs))
    distance = distillation.distance(
        target, outputs.logits(student.outputs), are_labels=outputs.are_labels
    )
    parts = {DISTILLATION: batch.mean(distance)}
    if hints:
        distances = [
            hint_distance(
                tf.stop_gradient(hint.quantized(teacher.features[hint.teacher])),
                student.features[hint.student],
            )
            for hint in hints
        ]
        parts[HINT] = batch.mean(tf.add_n(distances))
    return parts


def teacher_parts(
    distillation: JointDistillation,
    outputs: Outputs,
    hints: Sequence[Sequence[Hint]],
    students: Sequence[Seen],
    teacher: Seen,
    batch: Batch,
) -> dict:
    """What the teacher learns from the students, which count as constants.

    Args:
        distillation: the losses.
        outputs: what the networks put out.
        hints: of each student.
        students: what the students made of the batch.
        teacher: what the teacher made of it.
        batch: this replica's part.

    Returns:
        Name of the part -> mean over this replica's examples and over the students.
    """
    wanted = distillation.teacher_weights()
    parts = {}
    if DISTILLATION in wanted:
        parts[DISTILLATION] = _mean(
            batch.mean(
                distillation.distance(
                    tf.stop_gradient(outputs.logits(student.outputs)),
                    outputs.logits(teacher.outputs),
                    are_labels=outputs.are_labels,
                )
            )
            for student in students
        )
    if HINT in wanted:
        parts[HINT] = _mean(
            batch.mean(
                tf.add_n(
                    [
                        hint_distance(
                            hint.quantized(teacher.features[hint.teacher]),
                            tf.stop_gradient(student.features[hint.student]),
                        )
                        for hint in own
                    ]
                )
            )
            for student, own in zip(students, hints, strict=True)
        )
    return parts


def _mean(values):
    values = list(values)
    return tf.add_n(values) / len(values)


def find_hints(hints, student: keras.Model, teacher: keras.Model) -> list[Hint]:
    """Resolves the `hints` setting for two networks.

    Args:
        hints: as in `JointDistillation`.
        student: what `quantize` made.
        teacher: its teacher.

    Returns:
        The pairs; empty for None.

    Raises:
        ValueError: if there is no such layer, the shapes of a pair differ, or "stages"
            finds nothing.
    """
    _check_hints(hints)
    if hints is None:
        return []
    by_layer = {
        tensor.layer.name: tensor
        for tensor in inspection.quantized_tensors(student)
        if tensor.role == ACTIVATION
    }
    names = _last_of_stages(student, by_layer) if hints == STAGES else hints
    pairs = [
        (name, _counterpart(name, teacher)) if isinstance(name, str) else tuple(name)
        for name in names
    ]
    for pair in pairs:
        _check_hint(student, teacher, *pair)
    return [Hint(s, t, by_layer.get(s)) for s, t in pairs]


def _counterpart(name: str, teacher: keras.Model) -> str:
    """The teacher's layer of a student's layer.

    It has the same name; but `quantize` has made `conv_relu` of a layer `conv` with
    `activation="relu"`, which a teacher may still have as one.
    """
    owner = name.removesuffix("_relu")
    for layer in teacher.layers:
        if layer.name == owner != name and registry.own_relu(layer):
            return owner
    return name


def _last_of_stages(student, by_layer) -> list[str]:
    """The last activation quantizer of each of the last resolutions."""
    last: dict[tuple, str] = {}
    for layer in student.layers:
        tensor = by_layer.get(layer.name)
        is_hint = tensor is not None and not tensor.is_residual
        shape = layer.output_shape if is_hint else None
        if shape is not None and len(shape) == 4:
            if None in shape[1:3]:
                raise ValueError(
                    f'hints="{STAGES}" needs a student of fixed image size, whose '
                    "resolutions tell its stages: name the layers. "
                    f"Received: {layer.name!r} with outputs of {shape}"
                )
            last.pop(shape[1:3], None)  # So that the order is that of the last ones.
            last[shape[1:3]] = layer.name
    if not last:
        raise ValueError(
            f'hints="{STAGES}" needs a student with quantized image activations. '
            f"Received: {student.name!r}, with activation quantizers {list(by_layer)}"
        )
    return list(last.values())[-_HINT_STAGES:]


def _check_hints(hints):
    """Refuses what is no setting for `hints`, whatever the networks."""

    def is_hint(hint):
        pair = (hint, hint) if isinstance(hint, str) else hint
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        return is_pair and all(isinstance(name, str) for name in pair)

    is_list = isinstance(hints, list | tuple) and hints and all(map(is_hint, hints))
    if hints is not None and hints != STAGES and not is_list:
        raise ValueError(
            f'hints must be None, "{STAGES}" or a list of layer names and of pairs '
            f"(student's layer, teacher's layer). Received: hints={hints!r}"
        )


def _check_hint(student, teacher, student_layer, teacher_layer):
    shapes = []
    for owner, model, name in (
        ("student", student, student_layer),
        ("teacher", teacher, teacher_layer),
    ):
        names = [layer.name for layer in model.layers]
        if name not in names:
            raise ValueError(
                f"A hint must name a layer of the {owner}. Received: {name!r}, "
                f"and the {owner} {model.name!r} has {names}"
            )
        shapes.append(model.get_layer(name).output_shape)
    if shapes[0] != shapes[1]:
        raise ValueError(
            "The layers of a hint must put out the same shape. Received: student's "
            f"{student_layer!r} {shapes[0]}, teacher's {teacher_layer!r} {shapes[1]}"
        )
