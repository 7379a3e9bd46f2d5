"""Measures how well the values of a network fit their grids."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import grid
from tf_lowbit.network import inspection, oscillation
from tf_lowbit.network.observation import quantizer_inputs, validate_batches
from tf_lowbit.quantizers import WEIGHT

# A histogram's bins per step, halved until the total is at most _MOST_BINS; it extends
# _MARGIN steps beyond the outermost levels.
_BINS_PER_STEP = 8
_MOST_BINS = 128
_MARGIN = 2
# Float32 rounding moves some values slightly beyond half a step.
_SLACK = 1e-3


@dataclasses.dataclass(frozen=True)
class TensorStatistics:
    """One tensor and its grid.

    Attributes:
        name: Name such as `conv1/kernel` or `relu1/output`.
        role: "weight" or "activation".
        bits: Current bit-width; 16 and 32 mean "not rounded".
        step: Value of code 1; the mean over channels.
        sqnr: Power of the exact values divided by that of the rounding and clipping
            error, in decibels; infinite without an error.
        clip_rate: Share of values beyond the outermost levels by more than rounding
            explains.
        codes: Codes of the grid, ascending; empty if nothing is rounded.
        occupancy: Share of the values on each code.
        edges: Edges of the histogram's bins, in steps. The first and the last bin
            include all values beyond them. Empty if nothing is rounded.
        counts: Share of the exact values in each bin.
        oscillating: Share of the weights whose code flips in more than 0.5 % of the
            steps; None if `callbacks.OscillationFreezing` did not measure it.
        frozen: Share of the weights that this callback has frozen, or None.
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
    oscillating: float | None = None
    frozen: float | None = None

    @property
    def entropy(self) -> float:
        """Entropy of the levels in bits: how much of the grid is used."""
        return -sum(share * math.log2(share) for share in self.occupancy if share)

    def as_dict(self) -> dict:
        """Returns JSON-ready data, with the entropy."""
        return {**dataclasses.asdict(self), "entropy": self.entropy}


def statistics(
    model: keras.Model, dataset: Iterable[Any] | None = None, batches: int = 1
) -> list[TensorStatistics]:
    """Measures every quantizer of a network at its current bits.

    "Exact" values are those that the grid approximates: activations after the ReLU that
    a quantizer replaces, and weights on the scale of the grid.

    Args:
        model: A model from `tf_lowbit.quantize`.
        dataset: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, for the
            activations; None for weights only. Normalization uses its moving
            statistics, as in evaluation.
        batches: Number of batches to use, at least 1.

    Returns:
        One item for each quantizer, in the layers' order.

    Raises:
        ValueError: If the model is not quantized or not a single network, the dataset
            is empty, `batches` is below 1, or a value is NaN or infinite.
    """
    validate_batches(batches)
    tensors = inspection.require_quantized(model)
    if inspection.networks(model) != [model]:
        raise ValueError(
            "model must be a network, such as a trainer's student. "
            f"Received: {type(model).__name__}"
        )
    activations = [tensor for tensor in tensors if tensor.role != WEIGHT]
    seen: dict[str, list] = {}
    if dataset is not None:
        seen = quantizer_inputs(model, activations, dataset, batches, training=False)
    found = []
    flips = {own.tensor.name: own for own in oscillation.tracked(model)}
    for tensor in tensors:
        if tensor.role == WEIGHT:
            measured = _statistics(tensor, [tensor.latent])
            if own := flips.get(tensor.name):
                measured = dataclasses.replace(
                    measured,
                    oscillating=own.oscillating_share(),
                    frozen=own.frozen_share(),
                )
            found.append(measured)
        elif tensor.name in seen:
            found.append(_statistics(tensor, seen[tensor.name]))
    return found


def _statistics(tensor, parts) -> TensorStatistics:
    """Measures a quantizer over `parts`, all tensors that it quantizes."""
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
                "Measured values must be finite: look for NaN in data and weights. "
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
    """Returns the ratio of two powers in decibels; infinite without noise."""
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf
