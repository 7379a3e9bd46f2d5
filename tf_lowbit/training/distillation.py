"""Joint distillation: the losses between teacher and student.

Zhuang et al., arXiv:1908.04680, train a full-precision teacher together with the
low-bitwidth student. The posterior terms and their constants are those of the authors'
code. The hints are reconstructed from memory and, in part, from that code.
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

# The authors' CIFAR-100 constants; those for ImageNet are in examples/configs/.
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

    `CE` is the compiled loss. `D` is the distance to the other network's output,
    averaged over the batch. `H` is the distance at the hint layers. `R` is the
    regularization loss of the network:

        student: task_weight CE + R
            + distillation_weight D(teacher, student) + hint_weight H
        teacher: teacher_task_weight CE + R
            + teacher_distillation_weight D(student, teacher) + hint_weight H

    The teacher's H needs `hint_teacher_gradient`. The gradient of each network takes
    the other network as a constant. With several students, the teacher's `D` and `H`
    are means over the students.

    `target="posteriors"`: `D(p, q) = T^2 KL(p || q)`, with temperature T.

    - Units are classes: `p` and `q` are the softmax of `logits / T`, and KL is the sum
      over the classes of `p (log p - log q)`.
    - Each unit is a binary label, as for a binary cross-entropy, or there is a single
      unit: `p` and `q` are the sigmoid of `logits / T`, and KL is the mean over the
      units of `p (log p - log q) + (1 - p) (log (1 - p) - log (1 - q))`.

    `target="logits"`: D is the mean over the units of the squared difference of logits.
    If the networks end in a sigmoid, the logits are the inputs of the sigmoid.

    `H = 1/2 mean((Q(teacher's feature) - student's feature)^2)`, summed over the hint
    layers. Q is the student's activation quantizer of that layer; a layer without one
    is matched without Q.

    Attributes:
        target: "posteriors" or "logits".
        task_weight: None for 0.7 (posteriors) or 0.3 (logits), the authors' values.
        distillation_weight: None for 0.7 (posteriors) or 0.1 (logits).
        teacher_task_weight: None for 1.
        teacher_distillation_weight: None for 0.5 (posteriors) or 0.1 (logits).
        temperature: T, for posteriors only; None for 1.
        teacher: "joint" trains the teacher on all its terms, "task" on CE and R only.
            "frozen" does not train it, and its batch normalization uses the moving
            statistics.
        hints: None for no hints. "stages" for the last activation quantizer (except
            residual ones) of each of the last two resolutions of the student. Or a list
            of layer names and of pairs (student's layer, teacher's layer).
        hint_weight: None for 1.
        hint_teacher_gradient: Whether the hints train the teacher too. None for yes if
            the teacher is "joint".

    None is replaced by the default above. It stays None where it has no effect, such as
    `hint_weight` without hints.

    Raises:
        ValueError: If a value is not one of those above, or has no effect.
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
                        f"{name} must be None where it has no effect. "
                        f"Received: {name}={value!r} with target={self.target!r}, "
                        f"teacher={self.teacher!r}, hints={self.hints!r}"
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
        """Whether the teacher is trained."""
        return self.teacher != FROZEN

    def frozen(self) -> "JointDistillation":
        """Returns these settings for a frozen teacher; the students' losses stay."""
        return dataclasses.replace(
            self,
            teacher=FROZEN,
            teacher_task_weight=None,
            teacher_distillation_weight=None,
            hint_teacher_gradient=None,
        )

    def student_weights(self) -> dict[str, float]:
        """Returns the weight of each term of a student's loss, by name."""
        weights = {TASK: self.task_weight, DISTILLATION: self.distillation_weight}
        return weights | ({} if self.hints is None else {HINT: self.hint_weight})

    def teacher_weights(self) -> dict[str, float]:
        """Returns the weight of each term of the teacher's loss, by name.

        The loss of a frozen teacher is only logged.
        """
        weights = {TASK: self.teacher_task_weight if self.trains_teacher else 1.0}
        if self.teacher == JOINT:
            weights[DISTILLATION] = self.teacher_distillation_weight
        if self.hint_teacher_gradient:
            weights[HINT] = self.hint_weight
        return weights

    def distance(
        self, target: tf.Tensor, logits: tf.Tensor, *, are_labels: bool = False
    ) -> tf.Tensor:
        """Returns the distance D between logits and target logits.

        Args:
            target: Logits [batch, units], any floating dtype.
            logits: Logits [batch, units], any floating dtype.
            are_labels: Whether each unit is a binary label, not a class.

        Returns:
            Float32 tensor [batch], not negative up to rounding. It has a gradient for
            both arguments.
        """
        target, logits = tf.cast(target, tf.float32), tf.cast(logits, tf.float32)
        if self.target == LOGITS:
            return tf.reduce_mean(tf.math.squared_difference(target, logits), axis=-1)
        target, logits = target / self.temperature, logits / self.temperature
        if are_labels:
            # The label and its complement: 1 - sigmoid(z) = sigmoid(-z).
            terms = [
                _divergence(
                    tf.math.log_sigmoid(s * target), tf.math.log_sigmoid(s * logits)
                )
                for s in (1.0, -1.0)
            ]
            divergence = tf.reduce_mean(tf.add_n(terms), axis=-1)
        else:
            terms = _divergence(tf.nn.log_softmax(target), tf.nn.log_softmax(logits))
            divergence = tf.reduce_sum(terms, axis=-1)
        return self.temperature**2 * divergence


def _divergence(log_p, log_q):
    """Returns the terms of KL(p || q), before their sum."""
    return tf.exp(log_p) * (log_p - log_q)


class Distiller:
    """Joint distillation between given networks.

    Attributes:
        settings: The trainer's settings.
        present: The settings of the current stage.
        hints: For each student, the pairs of layers that are matched.

    Raises:
        ValueError: If hints cannot be found, or the networks neither all output logits
            nor all end in a sigmoid.
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
        """Makes a participant of each network, the teacher last.

        Args:
            prefixes: For each student, the prefix of its names in the logs.
        """
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
        """Sets the teacher's role, one of `stages.ROLES`, and with it all losses.

        Returns:
            The participants of a training step, without an absent teacher.
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
        """Finds the kind of the outputs from the compiled loss (`outputs_of`)."""
        self._outputs = outputs_of(
            loss,
            self._teacher.output_shape[-1],
            have_sigmoid=self._have_sigmoid,
            match_logits=self.settings.target == LOGITS,
        )

    def losses(self, outputs: Any, features: Any, mean: Callable) -> list[dict]:
        """Returns the losses of each network against the others on a batch.

        z are the logits, f the features at the hints (the teacher's after the student's
        quantizer), and c(.) stops the gradient:

            student: D(c(z_teacher), z_student),  H(c(f_teacher), f_student)
            teacher: D(c(z_student), z_teacher),  H(f_teacher, c(f_student)),
                each a mean over the students

        Args:
            outputs: The outputs of each student, and last those of the teacher.
            features: In the same order, layer name -> features.
            mean: Function from the losses of the examples, [batch], to their mean.

        Returns:
            In the same order, name of the term -> float32 scalar.
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
        """Returns D: [batch]."""
        are_labels = self._outputs.are_labels
        return self.settings.distance(target, logits, are_labels=are_labels)


def _hint_distance(targets, features):
    """Returns H, the sum over the hints: [batch]."""
    return tf.add_n(list(map(hint_distance, targets, features)))


def _constant(tensors):
    """Returns c(.): the same values without a gradient."""
    return tf.nest.map_structure(tf.stop_gradient, tensors)
