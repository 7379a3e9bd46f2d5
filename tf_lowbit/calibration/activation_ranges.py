"""Measures the ranges of activation quantizers on data."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tf_lowbit.calibration.batch_norm import batch_normalized, require_values
from tf_lowbit.calibration.data_scale import warn_of_other_scale
from tf_lowbit.calibration.fixed_clips import fit_to_fixed_clips
from tf_lowbit.calibration.residual_steps import step_as_made, tie
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks, grid, progress, ratios, user_warnings
from tf_lowbit.network import inspection
from tf_lowbit.network.observation import (
    batches_for,
    calibration_samples,
    inputs_in,
    validate_batches,
    without_draws,
)
from tf_lowbit.network.variables import restored, unchanged_on_error
from tf_lowbit.quantizers import sampling
from tf_lowbit.scheme.layout import QuantizationWarning

# Float32 may round a step to just above its ratio. With this slack, tying twice equals
# tying once. The range may be a millionth shorter, which is harmless.
_SLACK = 1.0 - 2.0**-20


def calibrate(
    model: keras.Model,
    dataset: Iterable[Any],
    batches: int = 8,
    *,
    fit_batch_norm: bool = True,
    verbose: int = 1,
) -> list[str]:
    """Fits activation quantizers and their inputs to each other, before training.

    - PACT, uniform and LSQ get the range of least squared error at their current bits
      (the paper's start of LSQ is an option of its quantizer).
    - DoReFa's clip is fixed at 1. So the batch normalization in front is scaled: its
      gamma and beta are divided by the clip of least squared error. A normalization
      that has another reader, is frozen or has no gamma is not changed.
    - Residual quantizers are measured like uniform ones and then tied
      (`tie_residuals`).

    During the measurement, the ranges to be set neither clip nor round, weights are
    quantized, and dropout, noise and augmentation are off. Normalization uses each
    batch's statistics, because the moving averages belong to float weights, which have
    another scale. No other weight and no moving average changes.

    If a signed inserted quantizer sees no negative value, it becomes unsigned, with all
    levels from zero on, and a `QuantizationWarning` names it. Another call with other
    data can revert that. The sign is a variable, and every kind of checkpoint saves it.
    Another `QuantizationWarning` tells if the first batch normalization reads values of
    another scale than in the float training.

    If a quantized ReLU replaced a ReLU6, its range ends at 6 or below. Frozen layers
    get ranges too.

    Args:
        model: A model from `tf_lowbit.quantize`, or a `LowBitTrainer` for its students.
        dataset: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`.
        batches: Number of batches to use, at least 1. They are kept in memory.
        fit_batch_norm: False does not change gamma and beta, for example in a network
            whose training will continue.
        verbose: 1 shows a progress bar on a terminal or in a notebook if it takes long,
            0 is silent.

    Returns:
        The names of the quantizers that now fit their inputs.

    Raises:
        ValueError: If the model is not quantized, the dataset is empty, `batches` is
            below 1, a batch normalization sees only one value per channel in each
            batch, or an activation is NaN or infinite. Then nothing is changed. Below 8
            values a `QuantizationWarning` names the layer.
    """
    validate_batches(batches)
    checks.flag("fit_batch_norm", fit_batch_norm)
    inspection.require_quantized(model)
    networks = inspection.networks(model)
    with (
        progress.bar("Calibrating", verbose) as update,
        unchanged_on_error(model.variables),
    ):
        kept = progress.Tracked(batches_for(networks[0], dataset, batches), update)
        return [
            name
            for network in networks
            for name in _calibrate(network, kept, fit_batch_norm)
        ]


def _calibrate(model, batches, fit_batch_norm) -> list[str]:
    inputs = [inputs_in(batch) for batch in batches]
    examples = max((len(tf.nest.flatten(x)[0]) for x in inputs), default=0)
    if examples:  # Empty data raise an error below.
        require_values(batch_normalized(model), examples)
    names = fit_to_fixed_clips(model, batches) if fit_batch_norm else []
    tensors = [
        tensor
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == "activation" and tensor.quantizer.needs_calibration
    ]
    measure(model, tensors, batches)
    if inputs:
        warn_of_other_scale(model, inputs[0])
    return [*names, *(tensor.name for tensor in tensors)]


def measure(
    model: keras.Model, tensors: list[inspection.QuantizedTensor], batches: list
) -> None:
    """Sets the ranges of the given activation quantizers at their current bits.

    Other ranges stay, but residual steps are tied again. Errors are as in `calibrate`.
    """
    if not tensors:
        return
    # The moving averages must not change.
    with (
        restored(model.non_trainable_variables),
        without_draws(model),
        sampling.opened((tensor.variables, tensor.ceiling) for tensor in tensors),
    ):
        samples = calibration_samples(model, tensors, batches)
    unsigned = []
    for tensor in tensors:
        was_signed = tensor.quantizer.signed
        tensor.declared.assign_sign(samples[tensor.name], tensor.variables)
        if was_signed and not tensor.quantizer.signed:
            unsigned.append(tensor.name)
        tensor.quantizer.calibrate(samples[tensor.name], tensor.variables)
        _lower_to_ceiling(tensor)
    if unsigned:
        user_warnings.warn(
            "A signed quantizer must see negative values to keep its levels for them: "
            "these saw none, and now round negative values to zero. If negative values "
            f"can occur, calibrate on data that hold them. Received: {unsigned}",
            QuantizationWarning,
        )
    # Tied steps must not clip more than was measured.
    tie(model, lambda ratio: ratios.at_least_ratio(ratio * _SLACK))


def _lower_to_ceiling(tensor) -> None:
    """Shortens the range of a quantizer that replaced a ReLU6 to at most 6."""
    if tensor.ceiling is None or tensor.quantizer.bits > grid.MAX_BITS:
        return
    codes = tensor.quantizer.level_codes(tensor.quantizer.bits)
    top = step_as_made(tensor) * codes[-1]
    if top > tensor.ceiling:
        for name in {"alpha", "clip", "step"} & set(tensor.variables):
            variable = tensor.variables[name]
            variable.assign(variable * np.float32(tensor.ceiling / top))
