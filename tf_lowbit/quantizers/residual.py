"""The 8-bit quantizer of residual streams: rounds as an int8 Add does."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_lowbit.compat import as_float32, keras, tf
from tf_lowbit.core import checks, grid, ste
from tf_lowbit.quantizers import ranges
from tf_lowbit.quantizers.base import SMALLEST_RANGE, ActivationQuantizer, Variables

RESIDUAL_BITS = 8
# The step before `calibrate`: a power of two, for the range [-8, 8).
_FIRST_STEP = 2.0**-4


@keras.utils.register_keras_serializable(package="tf_lowbit")
class ResidualQuantizer(ActivationQuantizer):
    """`s * round(clip(x / s, -128, 127))` with a calibrated step `s`.

    The grid is all of int8 with zero point 0, because an int8 Add clamps only at the
    range of int8. Gradient: `dy/dx = 1` in range, else 0; the step is not learned. "Not
    rounded" keeps the clip.

    Args:
        bits: 8.

    Raises:
        ValueError: If `bits` is not 8.
    """

    signed = True
    needs_calibration = True

    def __init__(self, bits: int = RESIDUAL_BITS):
        if not is_residual_bits(bits):
            raise ValueError(
                f"bits must be {RESIDUAL_BITS}: an int8 Add clamps only at the range "
                f"of int8. Received: bits={bits!r}"
            )
        super().__init__(bits)

    def build_range(
        self,
        tensor_shape: tf.TensorShape | None,
        name: str,
        layer: keras.layers.Layer,
        variables: Variables,
    ) -> None:
        """See `LowBitQuantizer.build_range`."""
        variables["step"] = self.add_state(layer, f"{name}_step", _FIRST_STEP)
        self._add_calibrated(name, layer, variables)

    def assign_bits(self, variables: Variables, bits: int) -> None:
        """See `LowBitQuantizer.assign_bits`; takes only 8, 16 and 32.

        Raises:
            ValueError: For any other value.
        """
        if grid.validate_bits(bits) not in (self.bits, *grid.UNROUNDED_BITS):
            raise ValueError(
                f"bits must be {self.bits}, or 16 or 32 for 'not rounded', on a "
                f"residual stream. Received: bits={bits!r}"
            )
        super().assign_bits(variables, bits)

    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.quantize`."""
        return ste.scaled_round(
            inputs,
            self.step(inputs, variables),
            tf.constant(self.bits),
            narrow_range=False,
            rounding_bits=self.rounding_bits(variables),
        )

    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Int32 codes in [-128, 127], the shape of `inputs`."""
        scaled = as_float32(inputs) / self.step(inputs, variables)
        codes = grid.signed_codes(scaled, self.bits, narrow_range=False)
        return tf.cast(codes, tf.int32)

    def step(self, inputs: tf.Tensor | None, variables: Variables) -> tf.Tensor:
        """The calibrated step."""
        return tf.maximum(as_float32(variables["step"]), SMALLEST_RANGE)

    def calibrate(self, samples: Sequence[np.ndarray], variables: Variables) -> None:
        """Sets the step to `clip / 127`, with the clip of least squared error.

        `tf_lowbit.calibrate` then ties the steps of each Add (`tie_residuals`).
        """
        clip = ranges.least_error_clip(samples, self.bits, signed=True)
        highest = grid.signed_limits(self.bits, narrow_range=False)[1]
        variables["step"].assign(clip / highest)
        self.mark_calibrated(variables)


def is_residual_bits(bits: Any) -> bool:
    """Tells whether `bits` is the integer 8; a bool, str or float is not."""
    return checks.is_integer(bits) and bits == RESIDUAL_BITS
