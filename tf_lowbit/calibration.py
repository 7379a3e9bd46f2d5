"""Ranges of activation quantizers, which are measured on data and not trained."""

import warnings

import numpy as np

from tf_lowbit import inspection
from tf_lowbit.batch_norm import (
    batch_normalized,
    fit_to_fixed_clips,
    require_values,
)
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks, grid, ratios
from tf_lowbit.core.state import restored, unchanged_on_error
from tf_lowbit.observation import (
    batches_for,
    calibration_samples,
    inputs_in,
    validate_batches,
    without_draws,
)
from tf_lowbit.quantizers import sampling
from tf_lowbit.scheme.layout import QuantizationWarning

# A step that float32 has put just above a ratio is of that ratio: tying twice is as
# tying once. A range that is a millionth shorter clips nothing worth mention.
_SLACK = 1.0 - 2.0**-20


def calibrate(
    model: keras.Model, dataset, batches: int = 8, *, fit_batch_norm: bool = True
) -> list[str]:
    """Fits activation quantizers and their inputs to each other, before training.

    PACT, uniform and LSQ: the range whose squared error is the least at the bits that
    hold (ours; LSQ's paper has another start, an option of its quantizer). DoReFa's
    clip is fixed at 1: there the batch normalisation in front of it is made to fit, its
    gamma and beta divided by the clip of least squared error (ours). That is left out
    where something else reads the normalisation, too, or it is frozen, has no gamma or
    is not there.

    While it is measured, the ranges to be set neither clip nor round, weights are
    quantized as they stand, normalisation uses each batch's own statistics (quantized
    weights have another scale than the float ones, so the moving averages would
    mislead) and dropout, noise and augmentation are off. No other weight and no moving
    average is changed.

    Where an inserted quantizer has levels for negative numbers and nothing negative is
    seen, its levels are put to use from zero on, and a `QuantizationWarning` names it;
    another call on other data takes that back. The sign is a variable, which every kind
    of checkpoint holds.

    The range of a quantized ReLU in a ReLU6's place ends at 6 or below.

    Residual quantizers are measured as uniform ones, and then tied (`tie_residuals`).
    Ranges of frozen layers are set, too: they have none before.

    Args:
        model: what `tf_lowbit.quantize` made; or a `LowBitTrainer`, for its students.
        dataset: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`.
        batches: how many of them to use, at least 1. They are kept in memory.
        fit_batch_norm: False leaves gamma and beta alone, as for a network whose
            training is to go on.

    Returns:
        The names of the quantizers that fit their inputs now.

    Raises:
        ValueError: if the model is not quantized, the dataset is empty, `batches` is
            below 1, a batch normalisation sees one value of a channel in each batch,
            or an activation is NaN or infinite; then nothing is changed. Below 8
            values a `QuantizationWarning` names the layer.
    """
    validate_batches(batches)
    checks.flag("fit_batch_norm", fit_batch_norm)
    inspection.require_quantized(model)
    networks = inspection.networks(model)
    kept = list(batches_for(networks[0], dataset, batches))
    with unchanged_on_error(model.variables):
        return [
            name
            for network in networks
            for name in _calibrate(network, kept, fit_batch_norm)
        ]


def _calibrate(model, batches, fit_batch_norm) -> list[str]:
    inputs = [inputs_in(batch) for batch in batches]
    examples = max((len(tf.nest.flatten(x)[0]) for x in inputs), default=0)
    if examples:  # None are refused below, where data are needed.
        require_values(batch_normalized(model), examples)
    names = fit_to_fixed_clips(model, batches) if fit_batch_norm else []
    tensors = [
        tensor
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == "activation" and tensor.quantizer.needs_calibration
    ]
    measure(model, tensors, batches)
    return [*names, *(tensor.name for tensor in tensors)]


def measure(
    model: keras.Model, tensors: list[inspection.QuantizedTensor], batches: list
) -> None:
    """Sets the ranges of some activation quantizers from data, at their present bits.

    Args:
        model: a network, no trainer.
        tensors: its activation quantizers whose ranges are to be set; the others stay,
            but that residual steps are tied anew.
        batches: list of batches, `x` or `(x, y)` or `(x, y, weight)`.

    Raises:
        ValueError: as `calibrate`.
    """
    if not tensors:
        return
    # The moving averages are not to move.
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
        warnings.warn(
            "Nothing negative was seen there, so all levels are for numbers from zero "
            "on, and a negative one would become zero. If there can be some, calibrate "
            f"on data that hold them. Received: {unsigned}",
            QuantizationWarning,
            stacklevel=4,
        )
    # What was just measured is to clip no more than it was measured to.
    _tie(model, lambda ratio: ratios.at_least_ratio(ratio * _SLACK))


def _lower_to_ceiling(tensor) -> None:
    """Ends the range of a quantizer in a ReLU6's place at 6, if it goes beyond."""
    if tensor.ceiling is None or tensor.quantizer.bits > grid.MAX_BITS:
        return
    top = _step_as_made(tensor) * (2**tensor.quantizer.bits - 1)
    if top > tensor.ceiling:
        for name in {"alpha", "clip", "step"} & set(tensor.variables):
            variable = tensor.variables[name]
            variable.assign(variable * np.float32(tensor.ceiling / top))


def tie_residuals(model: keras.Model) -> None:
    """Makes the steps around each Add multiples of one another (ours).

    After it, `step of an input / step of the output` is a fraction of odd denominator
    (`core.ratios`), to float32 precision: an int8 Add then meets no tie. Add by Add,
    in the graph's order:

    - the output's step is that of the quantized ReLU that alone reads it; or else what
      its residual quantizer has, moved to the nearest ratio with an input whose step
      is settled, if there is one: k-bit activations and what earlier Adds have tied;
    - the other residual quantizers on its inputs get the nearest ratio to it. In
      `calibrate` they get the smallest one at which they clip no more than what was
      measured (up to 15).

    The steps of k-bit activations are read, at the bits that they are made for, and
    never moved. So two settled steps around one Add stay as they are, though they may
    not fit: those of an input and of the ReLU behind, as in post-activation networks
    (of DoReFa quantizers they do fit), or of inputs that do not come from one another.
    Steps that are learned (LSQ, PACT) go on moving in training, away from what was
    tied to them. `StagedPrecision` ties them after each epoch; without it, call this
    after training and before export. Calling it twice changes nothing.

    Args:
        model: what `tf_lowbit.quantize` made; or a `LowBitTrainer`, for its students.

    Raises:
        ValueError: if the model is not quantized.
    """
    inspection.require_quantized(model)
    for network in inspection.networks(model):
        _tie(network, ratios.nearest_ratio)


def _tie(model, choose) -> None:
    """Ties each Add; `choose` gives the ratio for an input's present one."""
    settled: dict[str, float] = {}  # Steps of residual quantizers, the latest last.

    def settle(tensor, step) -> float:
        tensor.variables["step"].assign(np.float32(step))
        settled[tensor.name] = _present_step(tensor)
        return settled[tensor.name]

    for add in inspection.residual_adds(model):
        inputs = [tensor for tensor in add.inputs if tensor is not None]
        if add.output is None:
            continue
        if add.output.is_residual:
            step = _present_step(add.output)
            known = _settled_step(inputs, settled)
            if known is not None:
                step = known / ratios.nearest_ratio(known / step)
            step = settle(add.output, step)
        else:
            step = _step_as_made(add.output)
        for tensor in inputs:
            if step and tensor.is_residual and tensor.name not in settled:
                settle(tensor, step * choose(_present_step(tensor) / step))


def _settled_step(tensors, settled) -> float | None:
    """The latest settled step, so that it is a multiple of those before in a chain."""
    names = {tensor.name for tensor in tensors}
    residual = [step for name, step in settled.items() if name in names]
    others = [_step_as_made(tensor) for tensor in tensors if not tensor.is_residual]
    known = [step for step in (*others, *residual) if step is not None]
    return known[-1] if known else None


def _present_step(tensor) -> float:
    return float(tensor.quantizer.step(None, tensor.variables))


def _step_as_made(tensor) -> float | None:
    """The step at the bits that a quantizer is made for; None if it does not round."""
    if tensor.quantizer.bits > grid.MAX_BITS:
        return None
    if tensor.bits == tensor.quantizer.bits:
        return _present_step(tensor)
    # A stage holds other bits, and the step of some quantizers follows them.
    with restored(tensor.variables.values()):
        tensor.assign_bits(tensor.quantizer.bits)
        return _present_step(tensor)
