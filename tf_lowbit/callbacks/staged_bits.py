"""Sets the bits of a model's quantizers to those of a stage."""

import itertools
from collections.abc import Iterable

from tf_lowbit.calibration import activation_ranges
from tf_lowbit.calibration.residual_steps import tie_residuals
from tf_lowbit.compat import keras
from tf_lowbit.core import user_warnings
from tf_lowbit.network import inspection
from tf_lowbit.network.variables import unchanged_on_error
from tf_lowbit.quantizers import ACTIVATION, WEIGHT
from tf_lowbit.scheme.layout import QuantizationWarning
from tf_lowbit.training.stages import FLOAT_BITS, Stage

# Number of batches to measure the ranges of a stage on, as in `calibrate`.
_BATCHES = 8


class StagedBits:
    """The quantizers of a model, each at `max(the stage's bits, its own)`.

    Args:
        model: A quantized network or a `LowBitTrainer`.
        data: Batches to measure ranges of activations on, or None.
        keep_ranges: Whether to rescale the ranges of weights instead of measuring them.

    Raises:
        ValueError: If the model is not quantized.
    """

    def __init__(self, model: keras.Model, data: Iterable | None, keep_ranges: bool):
        self._model, self._data, self._keep_ranges = model, data, keep_ranges
        self._tensors = inspection.require_quantized(model)

    def at_other_bits(self, stage: Stage) -> list[inspection.QuantizedTensor]:
        """The quantizers that are not at the stage's bits."""
        return [t for t in self._tensors if t.bits != _wanted(t, stage)]

    def differ(self, stage: Stage, other: Stage) -> bool:
        """Whether the bits of any quantizer differ between two stages."""
        return any(_wanted(t, stage) != _wanted(t, other) for t in self._tensors)

    def lowest(self, role: str) -> int:
        """The smallest bits of weights or of activations in the model."""
        return min((tensor.bits for tensor in self._staged(role)), default=FLOAT_BITS)

    def assign(self, stage: Stage) -> bool:
        """Sets every quantizer's bits; returns whether any changed."""
        others, batches = self.at_other_bits(stage), []
        if others and self._data is not None:
            batches = list(itertools.islice(iter(self._data), _BATCHES))
        with unchanged_on_error(v for t in others for v in t.variables.values()):
            for tensor in others:
                tensor.assign_bits(_wanted(tensor, stage))
                if tensor.role == WEIGHT and not self._keep_ranges:
                    tensor.quantizer.initialize(tensor.latent, tensor.variables)
            # After all changes of bits, because a quantizer's input depends on them.
            if self._data is not None:
                self._measure(others, batches)
        return bool(others)

    def tie_residuals(self) -> None:
        """Ties the steps of residual quantizers to the learned steps around them."""
        if any(tensor.is_residual for tensor in self._tensors):
            tie_residuals(self._model)

    def check_reachable(self, last: Stage) -> None:
        """Compares the bits of the last stage with those of the rules.

        Warns if they are more than the bits of some rules.

        Raises:
            ValueError: If they are fewer than the bits of all rules.
        """
        for role in (WEIGHT, ACTIVATION):
            wanted = last.weight_bits if role == WEIGHT else last.activation_bits
            own = sorted({t.quantizer.bits for t in self._staged(role)})
            if wanted is not None and own and wanted < own[0]:
                raise ValueError(
                    f"The last stage asks for {wanted}-bit {role}s, but no quantizer "
                    f"was made for so few: quantize the model at {wanted} bits. "
                    f"Received: {role} quantizers of {own} bits"
                )
            if wanted is not None and own and own[0] < wanted <= own[-1]:
                user_warnings.warn(
                    f"The last stage should ask for the fewest bits of any {role} "
                    "quantizer, or that one ends with more bits than its rule. "
                    f"Received: {wanted} bits, and quantizers of {own} bits",
                    QuantizationWarning,
                )

    def _measure(self, tensors, batches):
        """Sets the ranges of activation quantizers from data."""
        wanted = {id(t.variables) for t in tensors if t.quantizer.needs_calibration}
        for network in inspection.networks(self._model):
            found = inspection.quantized_tensors(network)
            own = [t for t in found if id(t.variables) in wanted]
            activation_ranges.measure(network, own, batches)

    def _staged(self, role):
        """The quantizers of a role, without residual ones."""
        return [t for t in self._tensors if t.role == role and not t.is_residual]


def _wanted(tensor, stage) -> int:
    wanted = stage.weight_bits if tensor.role == WEIGHT else stage.activation_bits
    return max(wanted or 0, tensor.quantizer.bits)
