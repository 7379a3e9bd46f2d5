"""The sensitivity of a network to the rounding of each of its tensors (ours)."""

import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table

from tf_lowbit import inspection, predictions
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks, grid
from tf_lowbit.core.state import assign_values, restored, values_of
from tf_lowbit.observation import batches_for, validate_batches, without_draws
from tf_lowbit.tensor_statistics import decibels

SQNR, ACCURACY = "sqnr", "accuracy"
METRICS = (SQNR, ACCURACY)
NOT_ROUNDED = 32
# Decibels at which two runs of one network agree: float32's are above 120, of sums in
# another order above 100, and of 8 bits about 40.
_REPEATS = 80.0


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What rounding one tensor alone does to a network.

    Attributes:
        metric: "sqnr" or "accuracy".
        bits: the bit-widths that were tried.
        scores: name of the tensor, such as `conv1/kernel` or `relu1/output` -> bits ->
            score. Of "sqnr" the ratio of the outputs' power to that of their error, in
            decibels; infinite where nothing changes. Of "accuracy" the percentage
            points that are lost; negative where rounding helps.
        reference: accuracy with nothing rounded, in percent; None for "sqnr".
    """

    metric: str
    bits: tuple[int, ...]
    scores: Mapping[str, Mapping[int, float]]
    reference: float | None = None

    def loss(self, name: str, bits: int) -> float:
        """What a tensor's rounding costs, to be added up over tensors.

        Args:
            name: of the tensor.
            bits: one of `bits`.

        Returns:
            Of "sqnr" the power of the outputs' error relative to theirs; of "accuracy"
            the points that are lost, at least 0.
        """
        score = self.scores[name][bits]
        return 10 ** (-score / 10) if self.metric == SQNR else max(score, 0.0)

    def __str__(self) -> str:
        """A table, tensor by tensor."""
        stream = io.StringIO()
        console = rich.console.Console(file=stream, width=200, color_system=None)
        console.print(self.__rich__())
        return stream.getvalue().rstrip("\n")

    def __rich__(self):
        """The table for a rich console."""
        unit = "SQNR, dB" if self.metric == SQNR else "accuracy lost, points"
        table = rich.table.Table(title=unit, box=rich.box.SIMPLE)
        table.add_column("tensor")
        for bits in self.bits:
            table.add_column(f"{bits} bits", justify="right")
        for name, scores in self.scores.items():
            table.add_row(name, *(f"{scores[bits]:.2f}" for bits in self.bits))
        return table


def sensitivity(
    model: keras.Model,
    dataset,
    bits: Sequence[int] = (2, 3, 4, 8),
    *,
    metric: str = SQNR,
    batches: int = 4,
    progress: bool = True,
) -> Sensitivity:
    """Measures how much the network suffers where one tensor alone is rounded.

    Every quantizer but residual ones is tried at each bit-width, while all others keep
    their scale and clip and do not round. Normalisation uses each batch's own
    statistics, as in training, for rounding shifts them and training would follow;
    dropout, noise and augmentation are off. Learned steps are those that a change of
    bits gives. Nothing about the model is changed in the end.

    Args:
        model: what `tf_lowbit.quantize` made, calibrated and, at best, trained.
        dataset: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`; for
            "accuracy" with `y` integer labels or probabilities of the classes. One
            unit is a binary classifier's: class 1 above 0, or behind a sigmoid above
            0.5.
        bits: bit-widths from 1 to 8.
        metric: "sqnr" compares the outputs with those of the network in which nothing
            is rounded; "accuracy" compares top-1 accuracies, which is coarse on few
            examples.
        batches: how many of them to use, at least 1.
        progress: whether to show a progress bar.

    Returns:
        The scores.

    Raises:
        ValueError: if the model is not a quantized network with one output, the dataset
            is empty or has no labels that are classes, or another argument is none of
            those above; if the outputs are not finite, are alike for all examples, or
            change from one time to the next, as layers of one's own may make them.
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
            return [tf.cast(forward(x), tf.float32).numpy() for x, _ in data]

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
                    # From what it was: a step follows a change of bits.
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
    found = predictions.labels(labels, outputs, model.output_names)
    if found is None:
        raise ValueError(
            "Labels must be classes for the accuracy; metric='sqnr' needs none. "
            f"Received: labels of type {np.asarray(labels).dtype} that are not"
        )
    return found


def _check_outputs(first, second):
    """Refuses outputs that tell nothing of the rounding."""
    every = np.concatenate([values.reshape(len(values), -1) for values in first])
    if not np.isfinite(every).all():
        raise ValueError(
            "The network's outputs must be finite: look for NaN in data and weights. "
            "Received: outputs that are not"
        )
    if len(every) > 1 and (every == every[0]).all():
        raise ValueError(
            "The network's outputs must differ from example to example; normalisation "
            "that uses the batch's statistics needs larger batches. "
            "Received: the same for all examples"
        )
    if _sqnr(first, second) < _REPEATS:
        raise ValueError(
            "The network must put out the same for the same batch in training: a layer "
            "of your own that draws must be left out while it is measured. "
            f"Received: outputs that differ, at {_sqnr(first, second):.0f} dB"
        )


def _sqnr(reference, found) -> float:
    """In decibels, over all batches."""
    pairs = list(zip(reference, found, strict=True))
    signal = sum(float(np.sum(np.square(a, dtype=np.float64))) for a, _ in pairs)
    noise = sum(float(np.sum(np.square(a - b, dtype=np.float64))) for a, b in pairs)
    return decibels(signal, noise)


def _accuracy(outputs, classes, limit) -> float:
    """In percent, over all batches."""
    hits = [
        predictions.classes(values, limit) == own
        for values, own in zip(outputs, classes, strict=True)
    ]
    return 100.0 * float(np.mean(np.concatenate(hits)))
