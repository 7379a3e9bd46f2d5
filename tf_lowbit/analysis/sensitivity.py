"""The sensitivity of a network to the rounding of each of its tensors."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.progress
import rich.table
import rich.text

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks, grid, tables
from tf_lowbit.network import inspection, output_names, predictions
from tf_lowbit.network.observation import batches_for, validate_batches, without_draws
from tf_lowbit.network.tensor_statistics import decibels
from tf_lowbit.network.variables import assign_values, restored, values_of

SQNR, ACCURACY = "sqnr", "accuracy"
METRICS = (SQNR, ACCURACY)
NOT_ROUNDED = 32
# SQNR in dB above which two runs count as equal. Float32 rounding gives above 120, sums
# in another order above 100, and 8 bits about 40.
_REPEATS = 80.0


@dataclasses.dataclass(frozen=True)
class Sensitivity(tables.Table):
    """The effect of rounding a single tensor of a network, for each tensor.

    Attributes:
        metric: "sqnr" or "accuracy".
        bits: The measured bit-widths.
        scores: Name of the tensor, such as `conv1/kernel` or `relu1/output` -> bits ->
            score. For "sqnr", the ratio of the outputs' power to the power of their
            error, in dB; infinite if nothing changes. For "accuracy", the loss in
            percentage points; negative if rounding helps.
        reference: Accuracy without rounding, in percent; None for "sqnr".
    """

    metric: str
    bits: tuple[int, ...]
    scores: Mapping[str, Mapping[int, float]]
    reference: float | None = None

    def loss(self, name: str, bits: int) -> float:
        """The loss from rounding a tensor, which can be summed over tensors.

        Args:
            name: Name of the tensor.
            bits: One of `bits`.

        Returns:
            For "sqnr", the power of the outputs' error relative to the outputs' power;
            for "accuracy", the loss in points, at least 0.

        Raises:
            ValueError: For a tensor or bits that were not tried.
        """
        if name not in self.scores or bits not in self.scores[name]:
            raise ValueError(
                f"name must be one of {list(self.scores)}, and bits of "
                f"{list(self.bits)}. Received: name={name!r}, bits={bits!r}"
            )
        score = self.scores[name][bits]
        return 10 ** (-score / 10) if self.metric == SQNR else max(score, 0.0)

    def __rich__(self):
        """The table for a rich console."""
        unit = "SQNR, dB" if self.metric == SQNR else "accuracy lost, points"
        table = rich.table.Table(title=unit, box=rich.box.SIMPLE)
        table.add_column("tensor")
        for bits in self.bits:
            table.add_column(f"{bits} bits", justify="right")
        for name, scores in self.scores.items():
            # Text, not str: a name such as net[v1] is not markup.
            table.add_row(
                rich.text.Text(name), *(f"{scores[bits]:.2f}" for bits in self.bits)
            )
        return table


def sensitivity(
    model: keras.Model,
    dataset: Iterable[Any],
    bits: Sequence[int] = (2, 3, 4, 8),
    *,
    metric: str = SQNR,
    batches: int = 4,
    progress: bool = True,
) -> Sensitivity:
    """Measures the effect of rounding each tensor of a network alone.

    Each quantizer, except residual ones, is tried at each bit-width. All others keep
    their scale and clip and do not round. Normalization uses the statistics of each
    batch, as in training, because rounding shifts them and training would follow.
    Dropout, noise and augmentation are off. Learned steps follow the change of bits.
    The model is restored at the end.

    Args:
        model: Quantized model, calibrated and, if possible, trained.
        dataset: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`; "accuracy"
            needs `y`, integer labels or probabilities of the classes. One unit is a
            binary classifier: class 1 is above 0, or above 0.5 behind a sigmoid.
        bits: Bit-widths from 1 to 8.
        metric: "sqnr" compares outputs with those of the network without rounding;
            "accuracy" compares top-1 accuracies, which is coarse on few examples.
        batches: Number of batches to use, at least 1.
        progress: Whether to show a progress bar.

    Returns:
        The scores.

    Raises:
        ValueError: If the model is not a quantized network with one output, the dataset
            is empty or has no class labels, or another argument is invalid; if outputs
            are not finite, are equal for all examples, or differ between two runs, as
            with a random layer of your own.
    """
    chosen = _check(model, bits, metric, batches)
    tensors = [t for t in inspection.quantized_tensors(model) if not t.is_residual]
    data = [_parts(b, metric) for b in batches_for(model, dataset, batches)]
    if not data:
        raise ValueError("dataset must hold at least one batch. Received: none")
    scores: dict[str, dict[int, float]] = {}
    limit = predictions.threshold(model)
    with restored(model.variables), without_draws(model):
        forward = tf.function(lambda x: model(x, training=True))

        def outputs():
            end = model.outputs[0]
            return [predictions.scores(end, forward(x).numpy()) for x, _ in data]

        def score(found):
            if metric == SQNR:
                return _sqnr(reference, found)
            exact = _accuracy(reference, classes, limit)
            return exact - _accuracy(found, classes, limit)

        given = {
            tensor.name: values_of(tensor.variables.values()) for tensor in tensors
        }
        for tensor in tensors:
            tensor.assign_bits(NOT_ROUNDED)
        reference = outputs()
        _check_outputs(reference, outputs())
        if metric == ACCURACY:
            classes = [
                _classes(y, values, model)
                for (_, y), values in zip(data, reference, strict=True)
            ]
        for tensor in rich.progress.track(
            tensors, "sensitivity", disable=not progress, transient=True
        ):
            with restored(tensor.variables.values()):
                for width in chosen:
                    # From the given bits, because a step follows a change of bits.
                    assign_values(given[tensor.name])
                    tensor.assign_bits(width)
                    scores.setdefault(tensor.name, {})[width] = score(outputs())
    accuracy = None
    if metric == ACCURACY:
        accuracy = _accuracy(reference, classes, limit)
    return Sensitivity(metric, chosen, scores, accuracy)


def _check(model, bits, metric, batches) -> tuple[int, ...]:
    inspection.require_quantized(model)
    if inspection.networks(model) != [model] or len(model.outputs) != 1:
        raise ValueError(
            "model must be a network with one output, such as a trainer's student. "
            f"Received: {type(model).__name__} {model.name!r}"
        )
    checks.choice("metric", metric, METRICS)
    validate_batches(batches)
    is_list = isinstance(bits, Sequence) and not isinstance(bits, str)
    chosen = tuple(sorted({grid.validate_bits(b) for b in (bits if is_list else ())}))
    if not chosen or chosen[-1] > grid.MAX_BITS:
        raise ValueError(
            f"bits must be from 1 to {grid.MAX_BITS}. Received: bits={bits!r}"
        )
    return chosen


def _parts(batch, metric):
    """Inputs and labels of a batch."""
    if not isinstance(batch, tuple):
        batch = (batch,)
    labels = None
    if metric == ACCURACY:
        if len(batch) < 2:
            raise ValueError(
                "dataset must have labels for the accuracy: batches of (x, y). "
                "Received: batches of x"
            )
        labels = batch[1]
    return batch[0], labels


def _classes(labels, outputs, model) -> np.ndarray:
    found = predictions.labels(labels, outputs, output_names.of_labels(model))
    if found is None:
        raise ValueError(
            "Labels must be classes for the accuracy; metric='sqnr' needs none. "
            f"Received: other labels, of type {np.asarray(labels).dtype}"
        )
    return found


def _check_outputs(first, second):
    """Refuses outputs that cannot show the effect of rounding."""
    every = np.concatenate([values.reshape(len(values), -1) for values in first])
    if not np.isfinite(every).all():
        raise ValueError(
            "The network's outputs must be finite: look for NaN in data and weights. "
            "Received: NaN or infinity"
        )
    if len(every) > 1 and (every == every[0]).all():
        raise ValueError(
            "The network's outputs must differ between examples: batch statistics of "
            "normalization need larger batches. Received: equal outputs for all"
        )
    if _sqnr(first, second) < _REPEATS:
        raise ValueError(
            "The network must output the same for the same batch in training: remove "
            "random layers of your own for the measurement. "
            f"Received: outputs that differ, at {_sqnr(first, second):.0f} dB"
        )


def _sqnr(reference, found) -> float:
    """SQNR in dB, over all batches."""
    pairs = list(zip(reference, found, strict=True))
    signal = sum(float(np.sum(np.square(a, dtype=np.float64))) for a, _ in pairs)
    noise = sum(float(np.sum(np.square(a - b, dtype=np.float64))) for a, b in pairs)
    return decibels(signal, noise)


def _accuracy(outputs, classes, limit) -> float:
    """Accuracy in percent, over all batches."""
    hits = [
        predictions.classes(values, limit) == own
        for values, own in zip(outputs, classes, strict=True)
    ]
    return 100.0 * float(np.mean(np.concatenate(hits)))
