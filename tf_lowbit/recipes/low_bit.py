"""The recipe for few bits: LSQ, 8-bit edges and shortcuts, a float teacher."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tf_lowbit.calibration.activation_ranges import calibrate
from tf_lowbit.callbacks import StagedPrecision
from tf_lowbit.compat import is_keras3, keras
from tf_lowbit.conversion.quantization import quantize
from tf_lowbit.core import checks, grid
from tf_lowbit.network import graph, layer_registry
from tf_lowbit.network.keras3 import from_keras3
from tf_lowbit.network.observation import batches_of, require_rereadable
from tf_lowbit.scheme.placement import edge_layers
from tf_lowbit.scheme.rules import PrecisionRule
from tf_lowbit.training import JointDistillation, LowBitTrainer
from tf_lowbit.training.outputs import check_ends
from tf_lowbit.training.stages import Stage

TEACHERS = ("joint", "frozen")
_EDGE_BITS = 8
_SHORTCUT_BITS = 8
_RESIDUAL_BITS = 8
_MOMENTUM = 0.9
# Share of the training over which the learning rate rises from 0.
_WARMUP = 0.05


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training that is ready to run.

    Run it with `trainer.fit(data, epochs=epochs, callbacks=callbacks)`.

    Attributes:
        trainer: Compiled `LowBitTrainer`; `trainer.student` is the low-bit network.
        callbacks: Callbacks for `fit`; add your own after them.
        epochs: Epochs for `fit`.
        settings: All settings by name, JSON-ready.
    """

    trainer: LowBitTrainer
    callbacks: list[keras.callbacks.Callback]
    epochs: int
    settings: dict

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.settings.items())


def low_bit(
    model: keras.Model,
    data: Iterable,
    bits: int | tuple[int, int] = 2,
    epochs: int = 30,
    *,
    learning_rate: float = 0.03,
    teacher: str | None = "joint",
    loss: Callable | str | None = None,
    metrics: Sequence = ("accuracy",),
    steps_per_epoch: int | None = None,
) -> Recipe:
    """Prepares the training of a low-bit network from a trained float one.

    The recipe is:

    - Quantizers: LSQ for weights and activations (Esser et al., arXiv:1902.08153). The
      first and the last weight layer, shortcuts of residual blocks and residual sums
      have 8 bits, uniform.
    - Ranges are calibrated on `data`.
    - The teacher is the float network, trained jointly with the student (Zhuang et al.,
      arXiv:1908.04680), or frozen.
    - SGD with Nesterov momentum 0.9. The learning rate rises from 0 during 5 % of the
      training, then falls by a cosine to 0.

    `benchmarks/README.md` compares its results with those of other settings. Tune
    `learning_rate` at the number of epochs that you train: it matters more than the
    choice among most methods.

    Args:
        model: Trained float model of `tf_keras` or Keras 3, built, Sequential or
            Functional. With a teacher, or with the default loss, it must output logits.
        data: Training batches `(x, y)` or `(x, y, weight)` that can be read repeatedly:
            a `tf.data.Dataset` or a `tf_keras.utils.Sequence`.
        bits: Bits of weights and activations, 1 to 8; or a pair (weights, activations).
        epochs: Epochs of the training, at least 1.
        learning_rate: Learning rate after the warmup, of the student and of a joint
            teacher.
        teacher: "joint", "frozen" or None.
        loss: Task loss: a `keras.losses.Loss`, its name or a function. None for the
            cross-entropy of logits that fits the labels of the first batch: integers,
            or a probability for each class (one-hot).
        metrics: Metrics for `compile`.
        steps_per_epoch: Number of batches in an epoch; None for the length of `data`.

    Returns:
        The compiled trainer, the callbacks and the settings. `model` is not changed.

    Raises:
        ValueError: If an argument has another value, data have no length and
            `steps_per_epoch` is None, or `quantize` or `LowBitTrainer` refuses the
            model.
    """
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    if len(pair) != 2:
        raise ValueError(f"bits must be a number or a pair. Received: {bits=}")
    for value in pair:
        checks.choice("bits", value, range(1, grid.MAX_BITS + 1))
    checks.integer("epochs", epochs, at_least=1)
    checks.number("learning_rate", learning_rate, above=0)
    loss = None if loss is None else _loss(loss)
    checks.instance("metrics", metrics, list | tuple)
    if teacher is not None:
        checks.choice("teacher", teacher, TEACHERS)
    require_rereadable(data)
    if is_keras3(data, "utils.PyDataset"):
        raise ValueError(
            "data must be a tf.data.Dataset or a tf_keras.utils.Sequence, which the "
            f"trainer's fit reads. Received: {type(data).__name__} of Keras 3"
        )
    steps = epochs * _steps_per_epoch(data, steps_per_epoch)

    model = from_keras3(model) if is_keras3(model) else model
    checks.instance("model", model, keras.Model)
    model = graph.clone(graph.flatten(model))  # A joint teacher is trained.
    if teacher is not None or loss is None:
        is_sigmoid = check_ends([], model)
    if loss is None:
        loss = _cross_entropy(model, data, is_sigmoid)
    has_sums = any(
        layer_registry.is_sum(node.layer) and len(node.keras_inputs) > 1
        for node in graph.calls(model)
    )
    first, last = edge_layers(model)
    names = "|".join(map(re.escape, sorted(first | last)))
    rules = [
        PrecisionRule(names, _EDGE_BITS, _EDGE_BITS, "uniform", "uniform"),
        PrecisionRule(".*", *pair, "lsq", "lsq"),
    ]
    student = quantize(
        model,
        rules,
        residual_bits=_RESIDUAL_BITS if has_sums else None,
        shortcut_bits=_SHORTCUT_BITS if has_sums else None,
    )
    calibrate(student, data)
    trainer = LowBitTrainer(
        student,
        None if teacher is None else model,
        distillation=None if teacher is None else JointDistillation(teacher=teacher),
    )
    trainer.compile(
        _sgd(learning_rate),
        loss,
        metrics=list(metrics),
        teacher_optimizer=_sgd(_scheduled(learning_rate, steps))
        if teacher == "joint"
        else None,
    )
    stage = Stage(
        epochs, *pair, learning_rate=learning_rate, decay="cosine", warmup=_WARMUP
    )
    settings = {
        "weight_bits": pair[0],
        "activation_bits": pair[1],
        "quantizers": "lsq",
        "edges": f"{_EDGE_BITS} bits, uniform: {', '.join(sorted(first | last))}",
        "shortcut_bits": _SHORTCUT_BITS if has_sums else None,
        "residual_bits": _RESIDUAL_BITS if has_sums else None,
        "teacher": teacher,
        "epochs": epochs,
        "steps": steps,
        "optimizer": f"SGD, momentum {_MOMENTUM}, Nesterov",
        "learning_rate": learning_rate,
        "schedule": f"cosine to 0, warmup over {_WARMUP:.0%}",
    }
    return Recipe(trainer, [StagedPrecision([stage])], epochs, settings)


def _cross_entropy(model, data, is_sigmoid) -> keras.losses.Loss:
    shape = model.output_shape
    if isinstance(shape, list | dict) or shape[-1] == 1 or is_sigmoid:
        raise ValueError(
            "loss must be given, unless the network has one output with a logit for "
            "each of several classes. It serves every output: for a loss of each, use "
            f"quantize and LowBitTrainer. Received: loss=None, outputs of shape {shape}"
            f"{', behind a sigmoid' if is_sigmoid else ''}"
        )
    batch = next(iter(batches_of(data)), None)
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ValueError(
            "data must be batches (x, y) or (x, y, weight). Received: a batch of type "
            f"{type(batch).__name__}{'' if batch is None else ' without labels'}"
        )
    labels = np.shape(batch[1])
    if len(labels) == len(shape) and labels[-1] == shape[-1]:
        return keras.losses.CategoricalCrossentropy(from_logits=True)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _loss(given) -> Callable:
    if callable(given):
        return given
    try:
        return keras.losses.get({} if given == "" else given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "loss must be a keras.losses.Loss, the name of one, or a function of "
            f"labels and predictions. {checks.received('loss', given)}"
        ) from error


def _steps_per_epoch(data, given) -> int:
    if given is not None:
        return checks.integer("steps_per_epoch", given, at_least=1)
    try:
        return len(data)
    except TypeError as error:
        raise ValueError(
            "data must have a length: without it, give steps_per_epoch. "
            f"Received: data of type {type(data).__name__} ({error})"
        ) from error


def _sgd(rate) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(rate, momentum=_MOMENTUM, nesterov=True)


def _scheduled(rate, steps) -> keras.optimizers.schedules.LearningRateSchedule:
    """Returns the schedule of a joint teacher; a callback sets the student's."""
    warmup = round(_WARMUP * steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else rate,
        max(steps - warmup, 1),
        warmup_target=rate if warmup else None,
        warmup_steps=warmup,
    )
