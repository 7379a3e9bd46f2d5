"""How well the values of a network sit on their grids."""

import dataclasses
import math

import numpy as np

from tf_lowbit import inspection
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import grid
from tf_lowbit.observation import quantizer_inputs, validate_batches
from tf_lowbit.quantizers import WEIGHT

# Bins of a histogram to a step, halved until there are no more than that many in all;
# and how many steps it reaches beyond the outermost levels.
_BINS_PER_STEP = 8
_MOST_BINS = 128
_MARGIN = 2
# Float32 rounding puts some values a little beyond half a step.
_SLACK = 1e-3


@dataclasses.dataclass(frozen=True)
class TensorStatistics:
    """One tensor and its grid.

    Attributes:
        name: such as `conv1/kernel` or `relu1/output`.
        role: "weight" or "activation".
        bits: that hold now; 16 and 32 are not rounded.
        step: between neighbouring integers; the mean where channels have their own.
        sqnr: the power of the exact values relative to that of the error of rounding
            and clipping, in decibels; infinite without an error.
        clip_rate: share of the values that lie further beyond the outermost levels than
            rounding would take them.
        codes: the grid's codes, ascending; empty where nothing is rounded.
        occupancy: share of the values on each of them.
        edges: of the histogram's bins, in steps; the first and the last bin hold all
            that lies beyond, too. Empty where nothing is rounded.
        counts: share of the exact values in each bin.
    """

    name: str
    role: str
    bits: int
    step: float
    sqnr: float
    clip_rate: float
    codes: tuple[int, ...]
    occupancy: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[float, ...]

    @property
    def entropy(self) -> float:
        """Of the levels, in bits: what is used of the grid; 0 where there is none."""
        return -sum(share * math.log2(share) for share in self.occupancy if share)

    def as_dict(self) -> dict:
        """The same as JSON-ready data, with the entropy."""
        return {**dataclasses.asdict(self), "entropy": self.entropy}


def statistics(
    model: keras.Model, dataset=None, batches: int = 1
) -> list[TensorStatistics]:
    """Measures every quantizer of a network at the bits that it has now.

    "Exact" are the values that the grid stands for: behind the ReLU, where the
    quantizer takes its place, and on the scale of DoReFa's weights.

    Args:
        model: what `tf_lowbit.quantize` made.
        dataset: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, for the
            activations; None for the weights alone. Normalisation uses its moving
            statistics, as in evaluation.
        batches: how many of them to use, at least 1.

    Returns:
        One for each quantizer, in the layers' order.

    Raises:
        ValueError: if nothing in the model is quantized, it is no single network, the
            dataset is empty, `batches` is below 1, or a value is NaN or infinite.
    """
    validate_batches(batches)
    tensors = inspection.require_quantized(model)
    if inspection.networks(model) != [model]:
        raise ValueError(
            "model must be a network, such as a trainer's student. "
            f"Received: {type(model).__name__}"
        )
    activations = [tensor for tensor in tensors if tensor.role != WEIGHT]
    if dataset is None:
        activations = []
    seen = quantizer_inputs(model, activations, dataset, batches, training=False)
    found = []
    for tensor in tensors:
        if tensor.role == WEIGHT:
            found.append(_statistics(tensor, [tensor.latent]))
        elif tensor.name in seen:
            found.append(_statistics(tensor, seen[tensor.name]))
    return found


def _statistics(tensor, parts) -> TensorStatistics:
    """Over all parts, which are tensors that the quantizer is applied to."""
    quantizer, variables = tensor.quantizer, tensor.variables
    is_rounded = tensor.bits <= grid.MAX_BITS
    levels = quantizer.level_codes(tensor.bits) if is_rounded else range(0)
    edges = _edges(levels)
    signal = noise = 0.0
    clipped = count = 0
    occupied, counts = np.zeros(len(levels)), np.zeros(max(len(edges) - 1, 0))
    steps = []
    for values in parts:
        values = tf.cast(values, tf.float32)
        exact = quantizer.exact(values, variables).numpy()
        if not np.isfinite(exact).all():
            raise ValueError(
                "What is measured must be finite: look for NaN in data and weights. "
                f"Received: {tensor.name} with NaN or infinite values"
            )
        error = quantizer(values, False, variables).numpy() - exact
        step = np.asarray(quantizer.step(values, variables))
        signal += float(np.sum(np.square(exact, dtype=np.float64)))
        noise += float(np.sum(np.square(error, dtype=np.float64)))
        count += exact.size
        steps.append(float(np.mean(step)))
        if is_rounded:
            half = step * levels.step / 2 * (1 + _SLACK)
            clipped += int(np.sum(np.abs(error) > half))
            codes = quantizer.codes(values, variables).numpy().ravel()
            occupied += np.bincount(
                (codes - levels[0]) // levels.step, minlength=len(levels)
            )
            scaled = np.clip((exact / step).ravel(), edges[0], edges[-1])
            counts += np.histogram(scaled, edges)[0]
    return TensorStatistics(
        name=tensor.name,
        role=tensor.role,
        bits=tensor.bits,
        step=float(np.mean(steps)),
        sqnr=decibels(signal, noise),
        clip_rate=clipped / count,
        codes=tuple(levels),
        occupancy=tuple(float(share) for share in occupied / count),
        edges=tuple(edges),
        counts=tuple(float(share) for share in counts / count),
    )


def _edges(levels: range) -> list[float]:
    if not levels:
        return []
    first = levels[0] - _MARGIN if levels[0] < 0 else 0
    steps = levels[-1] + _MARGIN - first
    width = 1 / _BINS_PER_STEP
    while steps / width > _MOST_BINS:
        width *= 2
    return [first + i * width for i in range(math.ceil(steps / width) + 1)]


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers; infinite without noise."""
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf
