"""Hints: pairs of layers, of student and teacher, whose features are matched.

Reconstructed from memory of Zhuang et al. and, in part, from the authors' code.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tf_lowbit.compat import keras, tf
from tf_lowbit.network import inspection, layer_registry
from tf_lowbit.quantizers import ACTIVATION

STAGES = "stages"
# With "stages", so many of the last stages have a hint.
_HINT_STAGES = 2


class Hint(NamedTuple):
    """A pair of layers whose outputs are matched.

    Attributes:
        student: Name of the student's layer.
        teacher: Name of the teacher's layer.
        quantizer: Activation quantizer of the student's layer, or None.
    """

    student: str
    teacher: str
    quantizer: inspection.QuantizedTensor | None

    def quantized(self, feature: tf.Tensor) -> tf.Tensor:
        """Returns Q(feature): the teacher's feature after the student's quantizer."""
        if self.quantizer is None:
            return feature
        return self.quantizer.declared(feature, True, self.quantizer.variables)


def hint_distance(target: tf.Tensor, feature: tf.Tensor) -> tf.Tensor:
    """Returns `1/2 mean((target - feature)^2)` per example: [batch, ...] -> [batch].

    Any floating dtype is cast to float32. There is a gradient for both arguments.
    """
    target, feature = tf.cast(target, tf.float32), tf.cast(feature, tf.float32)
    squared = tf.math.squared_difference(target, feature)
    return 0.5 * tf.reduce_mean(squared, axis=list(range(1, squared.shape.rank)))


def check_hints(hints: Any) -> None:
    """Checks `hints` without networks; raises ValueError."""

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


def find_hints(
    hints: str | Sequence[str | tuple[str, str]] | None,
    student: keras.Model,
    teacher: keras.Model,
) -> list[Hint]:
    """Finds the pairs of layers for the setting `hints`.

    Args:
        hints: As in `JointDistillation`.
        student: Quantized model.
        teacher: Float model.

    Raises:
        ValueError: If a layer is unknown, the shapes of a pair differ, or "stages"
            finds no layer.
    """
    quantizers = {
        tensor.layer.name: tensor
        for tensor in inspection.quantized_tensors(student)
        if tensor.role == ACTIVATION
    }
    if hints == STAGES:
        hints = _last_of_stages(student, quantizers)
    found = []
    for hint in hints or ():
        pair = (hint, _counterpart(hint, teacher)) if isinstance(hint, str) else hint
        shape = _output_shape("student", student, pair[0])
        other = _output_shape("teacher", teacher, pair[1])
        if shape != other:
            raise ValueError(
                "The layers of a hint must output the same shape. Received: student's "
                f"{pair[0]!r} {shape}, teacher's {pair[1]!r} {other}"
            )
        found.append(Hint(*pair, quantizers.get(pair[0])))
    return found


def _counterpart(name: str, teacher: keras.Model) -> str:
    """Returns the name of the teacher's layer for a layer of the student.

    `quantize` splits a layer `conv` with `activation="relu"` into `conv` and
    `conv_relu`. The teacher may still have both as one layer, `conv`.
    """
    owner = name.removesuffix("_relu")
    is_one = any(x.name == owner and layer_registry.own_relu(x) for x in teacher.layers)
    return owner if owner != name and is_one else name


def _last_of_stages(student, quantizers) -> list[str]:
    """Returns the last quantized activation of each of the last resolutions."""
    last: dict[tuple, str] = {}
    for layer in student.layers:
        tensor = quantizers.get(layer.name)
        is_hint = tensor is not None and not tensor.is_residual
        shape = layer.output_shape if is_hint else None
        if shape is not None and len(shape) == 4:
            if None in shape[1:3]:
                raise ValueError(
                    f'hints="{STAGES}" needs a student of fixed image size, because it '
                    "finds stages by their resolution: name the layers instead. "
                    f"Received: {layer.name!r} with outputs of {shape}"
                )
            last.pop(shape[1:3], None)  # Keeps the order of the last quantizers.
            last[shape[1:3]] = layer.name
    if not last:
        raise ValueError(
            f'hints="{STAGES}" needs a student with quantized image activations. '
            f"Received: {student.name!r}, with activation quantizers {list(quantizers)}"
        )
    return list(last.values())[-_HINT_STAGES:]


def _output_shape(role, network, name):
    names = [layer.name for layer in network.layers]
    if name not in names:
        raise ValueError(
            f"A hint must name a layer of the {role}. Received: {name!r}, "
            f"and the {role} {network.name!r} has {names}"
        )
    return network.get_layer(name).output_shape
