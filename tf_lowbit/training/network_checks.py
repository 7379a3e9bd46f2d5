"""Checks that networks can be trained together."""

from collections.abc import Mapping

from tf_lowbit.compat import keras
from tf_lowbit.core import user_warnings
from tf_lowbit.network import inspection
from tf_lowbit.network.observation import RANDOM
from tf_lowbit.training.participant import DISTILLATION, HINT, TASK

# Random layers that only drop values or add noise: networks still see the same image.
_DROPS = (
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)


def check_networks(students: Mapping, teacher: keras.Model | None) -> None:
    """Checks that networks can be trained together; warns of augmentation layers.

    Args:
        students: Name -> student.
        teacher: The teacher, or None.

    Raises:
        ValueError: As documented in `LowBitTrainer`.
    """
    taken = {"", "teacher", "val"}
    taken |= {term.removesuffix("_loss") for term in (TASK, DISTILLATION, HINT)}
    clashes = [n for n in students if not isinstance(n, str) or n in taken]
    if not students or clashes:
        raise ValueError(
            "Students must have names that have no other meaning in the logs. "
            f"Received: {clashes or 'no students'}"
        )
    networks = list(students.values())
    for student in networks:
        inspection.require_quantized(student)
        _check_graph("student", student)
    if teacher is not None:
        _check_graph("teacher", teacher)
        for student in networks:
            _check_shapes(student, teacher)
        networks.append(teacher)
        _warn_of_augmentation(networks)
    seen: set[int] = set()
    for network in networks:
        variables = {id(variable) for variable in network.variables}
        if variables & seen:
            raise ValueError(
                "Students and teacher must not share variables: clone the teacher. "
                f"Received: {network.name!r}, which shares some with another"
            )
        seen |= variables


def _check_graph(role, network):
    is_model = isinstance(network, keras.Model)
    if not is_model or not network.built or not network._is_graph_network:
        raise ValueError(
            f"The {role} must be a built Sequential or Functional model of tf_keras. "
            f"Received: {type(network).__name__}"
        )


def _check_shapes(student, teacher):
    if teacher.input_shape != student.input_shape:
        raise ValueError(
            "Teacher and student must read the same inputs. Received: teacher "
            f"{teacher.input_shape}, student {student.input_shape}"
        )
    shapes = {"teacher": teacher.output_shape, "student": student.output_shape}
    if not all(isinstance(s, tuple) and len(s) == 2 for s in shapes.values()):
        raise ValueError(
            "With a teacher, networks must have one output, of logits [batch, classes]:"
            " train without the teacher, or both networks up to that output. "
            f"Received: outputs of shapes {shapes}"
        )
    if shapes["teacher"] != shapes["student"]:
        raise ValueError(
            "Teacher and student must output logits of the same shape, "
            f"[batch, classes]. Received: {shapes}"
        )


def _warn_of_augmentation(networks):
    """Warns of augmentation layers: each network would see another image."""
    drawing = {
        module.name
        for network in networks
        for module in network.submodules
        if isinstance(module, RANDOM) and not isinstance(module, _DROPS)
    }
    if drawing:
        user_warnings.warn(
            "Teacher and students must see the same images, but augmentation layers "
            "draw for each network anew: augment the data instead. "
            f"Received: {sorted(drawing)}",
        )
