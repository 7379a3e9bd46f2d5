"""Joint distillation: what teacher and student learn from each other.

Zhuang et al., arXiv:1908.04680: a full-precision teacher is trained together with the
low-bitwidth student. The posterior terms and their constants are those of the authors'
code; the hints are reconstructed (recalled, half seen in it).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks
from tf_lowbit.training.hints import check_hints, find_hints, hint_distance
from tf_lowbit.training.outputs import check_ends, outputs_of
from tf_lowbit.training.participant import DISTILLATION, HINT, TASK, Participant
from tf_lowbit.training.settings import Settings
from tf_lowbit.training.stages import ABSENT, FROZEN

POSTERIORS, LOGITS = "posteriors", "logits"
JOINT, TASK_ONLY = "joint", "task"

# The authors' CIFAR-100 constants; those for ImageNet are in examples/configs/. The
# logits have one weight for both ways.
_WEIGHTS = (
    "task_weight",
    "distillation_weight",
    "teacher_task_weight",
    "teacher_distillation_weight",
)
_DEFAULTS = {POSTERIORS: (0.7, 0.7, 1.0, 0.5), LOGITS: (0.3, 0.1, 1.0, 0.1)}


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
        task_weight: None for 0.7 (posteriors) or 0.3 (logits), the authors' values.
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
        checks.choice("target", self.target, (POSTERIORS, LOGITS))
        checks.choice("teacher", self.teacher, (JOINT, TASK_ONLY, FROZEN))
        check_hints(self.hints)
        if isinstance(self.hints, list | tuple):
            hints = (h if isinstance(h, str) else tuple(h) for h in self.hints)
            object.__setattr__(self, "hints", tuple(hints))
        is_joint, has_hints = self.teacher == JOINT, self.hints is not None
        has_effect = {
            "teacher_task_weight": self.trains_teacher,
            "teacher_distillation_weight": is_joint,
            "temperature": self.target == POSTERIORS,
            "hint_weight": has_hints,
            "hint_teacher_gradient": is_joint and has_hints,
        }
        defaults = dict(zip(_WEIGHTS, _DEFAULTS[self.target], strict=True))
        defaults |= {
            "temperature": 1.0,
            "hint_weight": 1.0,
            "hint_teacher_gradient": True,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if not has_effect.get(name, True):
                if value is not None:
                    raise ValueError(
                        f"{name} must have an effect. Received: {name}={value!r} with "
                        f"target={self.target!r}, teacher={self.teacher!r}, "
                        f"hints={self.hints!r}"
                    )
            elif value is None:
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

    def frozen(self) -> "JointDistillation":
        """The same student's losses, under a teacher that is not trained."""
        return dataclasses.replace(
            self,
            teacher=FROZEN,
            teacher_task_weight=None,
            teacher_distillation_weight=None,
            hint_teacher_gradient=None,
        )

    def student_weights(self) -> dict[str, float]:
        """The terms of a student's loss, and their weights."""
        weights = {TASK: self.task_weight, DISTILLATION: self.distillation_weight}
        return weights | ({} if self.hints is None else {HINT: self.hint_weight})

    def teacher_weights(self) -> dict[str, float]:
        """The terms of the teacher's loss, and their weights; logged if frozen."""
        weights = {TASK: self.teacher_task_weight if self.trains_teacher else 1.0}
        if self.teacher == JOINT:
            weights[DISTILLATION] = self.teacher_distillation_weight
        if self.hint_teacher_gradient:
            weights[HINT] = self.hint_weight
        return weights

    def distance(
        self, target: tf.Tensor, logits: tf.Tensor, *, are_labels: bool = False
    ) -> tf.Tensor:
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
            yes_and_no = [
                _divergence(
                    tf.math.log_sigmoid(s * target), tf.math.log_sigmoid(s * logits)
                )
                for s in (1.0, -1.0)
            ]
            divergence = tf.reduce_mean(tf.add_n(yes_and_no), axis=-1)
        else:
            terms = _divergence(tf.nn.log_softmax(target), tf.nn.log_softmax(logits))
            divergence = tf.reduce_sum(terms, axis=-1)
        return self.temperature**2 * divergence


def _divergence(log_p, log_q):
    """The terms of KL(p || q)."""
    return tf.exp(log_p) * (log_p - log_q)


class Distiller:
    """Joint distillation between given networks.

    Attributes:
        settings: what the trainer was given.
        present: what holds in the present stage.
        hints: of each student, the layers that are matched.

    Raises:
        ValueError: if hints cannot be found, or the networks do not all put out logits
            or all a sigmoid's values.
    """

    def __init__(
        self,
        settings: JointDistillation,
        students: Sequence[keras.Model],
        teacher: keras.Model,
    ):
        self.settings = self.present = settings
        self._students, self._teacher = students, teacher
        self._have_sigmoid = check_ends(students, teacher)
        self.hints = [find_hints(settings.hints, s, teacher) for s in students]

    def participants(self, prefixes: Sequence[str]) -> list[Participant]:
        """The students by the prefixes of their logs, and last the teacher."""
        weights = self.settings.student_weights()
        students = [
            Participant(student, prefix, weights, [hint.student for hint in hints])
            for student, prefix, hints in zip(
                self._students, prefixes, self.hints, strict=True
            )
        ]
        weights = self.settings.teacher_weights()
        layers = [hint.teacher for hints in self.hints for hint in hints]
        is_trained = self.settings.trains_teacher
        teacher = Participant(self._teacher, "teacher_", weights, layers, is_trained)
        self._participants = [*students, teacher]
        return self._participants

    def assign_role(self, role: str | None) -> list[Participant]:
        """Sets what the teacher does, one of `stages.ROLES`, and what each learns.

        Returns:
            The participants that are in a step; without the teacher if it is absent.
        """
        self.present = self.settings if role is None else self.settings.frozen()
        *students, teacher = self._participants
        weights = {TASK: 1.0} if role == ABSENT else self.present.student_weights()
        for student in students:
            student.weights = weights
        teacher.weights = self.present.teacher_weights()
        teacher.is_trained = self.present.trains_teacher
        return students if role == ABSENT else self._participants

    def compile(self, loss: Any) -> None:
        """Learns from the compiled loss what the outputs are, as `outputs_of` says."""
        self._outputs = outputs_of(
            loss,
            self._teacher.output_shape[-1],
            have_sigmoid=self._have_sigmoid,
            match_logits=self.settings.target == LOGITS,
        )

    def losses(self, outputs: Any, features: Any, mean: Callable) -> list[dict]:
        """What each network learns from the others on a batch.

        With z the logits, f the features at the hints (the teacher's as the student's
        quantizers give them), and c(.) for what counts as a constant:

            student: D(c(z_teacher), z_student),  H(c(f_teacher), f_student)
            teacher: D(c(z_student), z_teacher),  H(f_teacher, c(f_student)),
                each a mean over the students

        Args:
            outputs: of each student, and last of the teacher.
            features: likewise, each a dict by the names of layers.
            mean: from the losses of examples, [batch], to their mean.

        Returns:
            Likewise: name of the term -> float32 scalar.
        """
        *z_students, z_teacher = map(self._outputs.logits, outputs)
        *students, teacher = features
        teacher_terms = self.present.teacher_weights()
        of_students, of_teacher = [], []
        for z_student, student, hints in zip(
            z_students, students, self.hints, strict=True
        ):
            f_student = [student[hint.student] for hint in hints]
            f_teacher = [hint.quantized(teacher[hint.teacher]) for hint in hints]
            losses = {DISTILLATION: self._distance(_constant(z_teacher), z_student)}
            if hints:
                losses[HINT] = _hint_distance(_constant(f_teacher), f_student)
            of_students.append({name: mean(loss) for name, loss in losses.items()})
            losses = {}
            if DISTILLATION in teacher_terms:
                losses[DISTILLATION] = self._distance(_constant(z_student), z_teacher)
            if HINT in teacher_terms:
                losses[HINT] = _hint_distance(f_teacher, _constant(f_student))
            of_teacher.append({name: mean(loss) for name, loss in losses.items()})
        average = {
            name: tf.add_n([losses[name] for losses in of_teacher]) / len(of_teacher)
            for name in of_teacher[0]
        }
        return [*of_students, average]

    def _distance(self, target, logits):
        """D, [batch]."""
        are_labels = self._outputs.are_labels
        return self.settings.distance(target, logits, are_labels=are_labels)


def _hint_distance(targets, features):
    """H: the sum over the hints, [batch]."""
    return tf.add_n(list(map(hint_distance, targets, features)))


def _constant(tensors):
    """c(.): the same values, which no gradient passes."""
    return tf.nest.map_structure(tf.stop_gradient, tensors)
