"""Ties the steps around each Add, so that an int8 Add never rounds an exact half."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from tf_lowbit.compat import keras
from tf_lowbit.core import grid, ratios
from tf_lowbit.network import inspection
from tf_lowbit.network.variables import restored


def tie_residuals(model: keras.Model) -> None:
    """Makes the steps around each Add simple multiples of one another.

    Afterwards `step of an input / step of the output` is a fraction of odd denominator
    (`core.ratios`), to float32 precision. An int8 Add then never rounds an exact half.

    A step is fixed if it is that of a k-bit activation, at the bits of its rule, or was
    tied at an earlier Add. For each Add, in the graph's order:

    1. The output. If a quantized ReLU is its only reader, its step is that of the ReLU.
       Otherwise the residual quantizer's step changes to the nearest ratio to a fixed
       step of an input, if there is one.
    2. The inputs. Each residual quantizer that is not fixed changes to the nearest
       ratio to the output's step. `calibrate` takes the smallest ratio (up to 15) that
       clips no more than was measured.

    Two fixed steps around one Add stay, even if their ratio does not fit: an input and
    the ReLU behind the Add, as in post-activation networks (DoReFa's steps do fit), or
    two independent inputs.

    Training changes learned steps (LSQ, PACT), and so their ratios. `StagedPrecision`
    ties the steps after each epoch. Without it, call this function after training and
    before export. A second call changes nothing.

    Args:
        model: A model from `tf_lowbit.quantize`, or a `LowBitTrainer` for its students.

    Raises:
        ValueError: If the model is not quantized.
    """
    inspection.require_quantized(model)
    for network in inspection.networks(model):
        tie(network, ratios.nearest_ratio)


def tie(model: keras.Model, choose: Callable[[float], Fraction]) -> None:
    """Ties each Add; `choose` maps an input's current ratio to the new one."""
    settled: dict[str, float] = {}  # Tied residual quantizers -> steps, newest last.

    def settle(tensor, step) -> float:
        tensor.variables["step"].assign(np.float32(step))
        settled[tensor.name] = _current_step(tensor)
        return settled[tensor.name]

    for add in inspection.residual_adds(model):
        inputs = [tensor for tensor in add.inputs if tensor is not None]
        if add.output is None:
            continue
        step: float | None
        if add.output.is_residual:
            wanted = _current_step(add.output)
            known = _settled_step(inputs, settled)
            if known is not None:
                wanted = known / ratios.nearest_ratio(known / wanted)
            step = settle(add.output, wanted)
        else:
            step = step_as_made(add.output)
        for tensor in inputs:
            if step and tensor.is_residual and tensor.name not in settled:
                settle(tensor, step * choose(_current_step(tensor) / step))


def _settled_step(tensors, settled) -> float | None:
    """Returns the newest fixed step of the tensors, or None."""
    names = {tensor.name for tensor in tensors}
    residual = [step for name, step in settled.items() if name in names]
    others = [step_as_made(tensor) for tensor in tensors if not tensor.is_residual]
    known = [step for step in (*others, *residual) if step is not None]
    return known[-1] if known else None


def _current_step(tensor) -> float:
    return float(tensor.quantizer.step(None, tensor.variables))


def step_as_made(tensor: inspection.QuantizedTensor) -> float | None:
    """Returns the step at a quantizer's declared bits; None if it does not round."""
    if tensor.quantizer.bits > grid.MAX_BITS:
        return None
    if tensor.bits == tensor.quantizer.bits:
        return _current_step(tensor)
    # A training stage may have set other bits, with which some steps change.
    with restored(tensor.variables.values()):
        tensor.assign_bits(tensor.quantizer.bits)
        return _current_step(tensor)
