"""What a trainer trains and how, checked before anything is trained."""

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence

from tf_lowbit import inspection
from tf_lowbit.compat import deep_graphs, keras
from tf_lowbit.observation import RANDOM
from tf_lowbit.training.distillation import (
    LOGITS,
    Hint,
    JointDistillation,
    Seen,
    find_hints,
)
from tf_lowbit.training.outputs import Outputs, check_ends, outputs_of
from tf_lowbit.training.stochastic_precision import Sampler, StochasticPrecision

_DROPS = (
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a trainer trains how; no part of its checkpoints.

    Attributes:
        students: functions (inputs, training) -> `Seen`.
        teacher: likewise, or None.
        distillation: the losses, or None.
        hints: of each student.
        have_sigmoid: whether the networks put out a sigmoid's values; False without a
            teacher.
        sampler: of stochastic precision, or None.
    """

    students: list
    teacher: object
    distillation: JointDistillation | None
    hints: list[list[Hint]]
    have_sigmoid: bool
    sampler: Sampler | None

    @classmethod
    def of(
        cls,
        students: Sequence[keras.Model],
        teacher: keras.Model | None,
        distillation: JointDistillation | None,
        precision: StochasticPrecision | None,
    ) -> "Plan":
        """The plan for given networks.

        Raises:
            ValueError: as `LowBitTrainer` says.
        """
        for network in students:
            inspection.require_quantized(network)
            _check_graph("student", network)
        if teacher is None and distillation is not None:
            raise ValueError(
                "distillation needs a teacher. "
                f"Received: distillation={distillation!r}, teacher=None"
            )
        hints, have_sigmoid = [[] for _ in students], False
        if teacher is not None:
            distillation = distillation or JointDistillation()
            for network in students:
                _check_teacher(network, teacher)
            have_sigmoid = check_ends(students, teacher)
            _warn_of_augmentation([*students, teacher])
            hints = [
                find_hints(distillation.hints, network, teacher) for network in students
            ]
        _check_separate([*students, *([] if teacher is None else [teacher])])
        return cls(
            [
                _observer(network, [hint.student for hint in own])
                for network, own in zip(students, hints, strict=True)
            ],
            teacher and _observer(teacher, [h.teacher for own in hints for h in own]),
            distillation,
            hints,
            have_sigmoid,
            precision and Sampler.of(precision, students),
        )

    @property
    def trains_teacher(self) -> bool:
        """Whether there is a teacher whose weights move."""
        return self.distillation is not None and self.distillation.trains_teacher

    def outputs(self, loss, units: int | None) -> Outputs | None:
        """What the outputs mean to distillation; None without a teacher.

        Args:
            loss: of `compile`.
            units: how many a network puts out.

        Raises:
            ValueError: as `outputs_of`.
        """
        if self.distillation is None:
            return None
        return outputs_of(
            loss,
            units,
            have_sigmoid=self.have_sigmoid,
            match_logits=self.distillation.target == LOGITS,
        )

    def sampled(self, is_quantized):
        """A context in which the students round as drawn."""
        if self.sampler is None:
            return contextlib.nullcontext()
        return self.sampler.applied(is_quantized)


@deep_graphs()
def _observer(network, layers):
    """A function (inputs, training) -> `Seen`, with the features of named layers."""
    if not layers:
        return lambda x, training: Seen(network(x, training=training), {})
    features = {name: network.get_layer(name).output for name in layers}
    model = keras.Model(network.inputs, [network.output, features])
    aside = {layer.name for layer in network.layers} - {x.name for x in model.layers}
    if aside:
        raise ValueError(
            "Hints need a network whose layers all lead to its output (add_loss with a "
            f"tensor makes one that does not). Received: {network.name!r} with "
            f"{sorted(aside)}"
        )
    return lambda x, training: Seen(*model(x, training=training))


def _check_teacher(student, teacher):
    _check_graph("teacher", teacher)
    if teacher.input_shape != student.input_shape:
        raise ValueError(
            "Teacher and student must read the same inputs. Received: teacher "
            f"{teacher.input_shape}, student {student.input_shape}"
        )
    shapes = {"teacher": teacher.output_shape, "student": student.output_shape}
    is_logits = all(isinstance(s, tuple) and len(s) == 2 for s in shapes.values())
    if not is_logits or shapes["teacher"] != shapes["student"]:
        raise ValueError(
            "Teacher and student must put out logits of the same shape, "
            f"[batch, classes]. Received: {shapes}"
        )


def _warn_of_augmentation(networks):
    """Each network would draw for itself, and compare what it makes of two images."""
    found = {
        module.name
        for network in networks
        for module in network.submodules
        if isinstance(module, RANDOM) and not isinstance(module, _DROPS)
    }
    if found:
        warnings.warn(
            "Teacher and students each draw their own augmentation where it is a part "
            "of the networks, so that they see different images: augment the data. "
            f"Received: {sorted(found)}",
            stacklevel=4,
        )


def _check_graph(role, network):
    is_model = isinstance(network, keras.Model)
    if not is_model or not network.built or not network._is_graph_network:
        raise ValueError(
            f"The {role} must be a built Sequential or Functional model of tf_keras. "
            f"Received: {type(network).__name__}"
        )


def _check_separate(networks):
    seen = set()
    for network in networks:
        own = {id(variable) for variable in network.variables}
        if own & seen:
            raise ValueError(
                "Students and teacher must not share variables: clone the teacher. "
                f"Received: {network.name!r}, which shares some with another"
            )
        seen |= own
