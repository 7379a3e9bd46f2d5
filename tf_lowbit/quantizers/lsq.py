"""LSQ: quantizers with a learned step.

Esser et al., Learned Step Size Quantization, arXiv:1902.08153.
"""

import math

import numpy as np

from tf_lowbit.compat import as_float32, keras, tf
from tf_lowbit.core import checks, grid, ste
from tf_lowbit.quantizers import ranges
from tf_lowbit.quantizers.base import (
    SMALLEST_RANGE,
    ActivationQuantizer,
    WeightQuantizer,
    channel_shape,
)


def _highest_code(bits, signed: bool):
    """Q_P, the highest code; "not rounded" has that of 8 bits."""
    if signed:
        return grid.signed_limits(bits, narrow_range=False)[1]
    return grid.unsigned_limit(tf.minimum(bits, grid.MAX_BITS))


class _LearnedStep:
    """What the weight and the activation quantizer of LSQ share."""

    def assign_bits(self, variables, bits):
        """Sets the bits and rescales the step as LSQ's initialisation would.

        `s = 2 mean|v| / sqrt(Q_P)`: from the same data, the step at the new bits is
        the old one times `sqrt(Q_P old / Q_P new)`. The rescale is ours.
        """
        old, new = int(variables["bits"].numpy()), grid.validate_bits(bits)
        if old == new:
            return
        ratio = _highest_code(old, self.signed) / _highest_code(new, self.signed)
        variables["step"].assign(variables["step"] * tf.sqrt(ratio))
        variables["bits"].assign(new)

    def _assign_first_step(self, variables, mean_magnitude):
        """`s = 2 mean|v| / sqrt(Q_P)` at the present bits, the paper's start."""
        bits = int(variables["bits"].numpy())
        start = 2.0 * mean_magnitude / math.sqrt(_highest_code(bits, self.signed))
        variables["step"].assign(tf.maximum(tf.cast(start, tf.float32), SMALLEST_RANGE))

    @staticmethod
    def _step(variables):
        # An optimizer that ignores constraints must not flip the grid.
        return tf.maximum(as_float32(variables["step"]), SMALLEST_RANGE)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class LSQWeightQuantizer(_LearnedStep, WeightQuantizer):
    """`s * round(clip(w / s, -Q_N, Q_P))` with a learned step `s`.

    The grid has a zero; at one bit it is {-s, +s}. Gradients: `ste.stepped_round`,
    with the paper's gradient scale `1 / sqrt(N Q_P)`, N the weights that share a
    step. The step is kept positive and starts at `2 mean|w| / sqrt(Q_P)`.

    Args:
        bits: 1 to 8, or 16 or 32 for the clip of 8 bits without rounding.
        per_axis: one step for each output channel.
        narrow_range: leave the lowest code out, so that the grid is symmetric.
        channel_axes: the kernel's output-channel axes; the layer's config sets it.
    """

    def __init__(
        self,
        bits: int = 2,
        per_axis: bool = False,
        narrow_range: bool = False,
        channel_axes=(-1,),
    ):
        super().__init__(bits)
        self.per_axis = checks.flag("per_axis", per_axis)
        self.narrow_range = checks.flag("narrow_range", narrow_range)
        self.channel_axes = checks.integers("channel_axes", channel_axes)

    def build_range(self, tensor_shape, name, layer, variables):
        """See `LowBitQuantizer.build_range`."""
        shape = channel_shape(tensor_shape, self.channel_axes) if self.per_axis else ()
        variables["step"] = self.add_learned(layer, f"{name}_step", 1.0, shape)

    def quantize(self, inputs, variables):
        """See `LowBitQuantizer.quantize`."""
        bits = tf.convert_to_tensor(variables["bits"])
        step = self._step(variables)
        sharing = inputs.shape.num_elements() / step.shape.num_elements()
        return ste.stepped_round(
            inputs,
            step,
            bits,
            signed=True,
            narrow_range=self.narrow_range,
            rounding_bits=self.rounding_bits(variables),
            gradient_scale=tf.math.rsqrt(sharing * _highest_code(bits, signed=True)),
        )

    def codes(self, inputs, variables):
        """Int32 codes in [-Q_N, Q_P], the shape of `inputs`."""
        scaled = as_float32(inputs) / self._step(variables)
        codes = grid.signed_codes(scaled, variables["bits"], self.narrow_range)
        return tf.cast(codes, tf.int32)

    def step(self, inputs, variables):
        """The learned step."""
        return self._step(variables)

    def initialize(self, weights, variables):
        """Starts the step at `2 mean|w| / sqrt(Q_P)`, as the paper does."""
        magnitude = np.abs(weights.numpy())
        kept = {axis % magnitude.ndim for axis in self.channel_axes}
        shared = tuple(a for a in range(magnitude.ndim) if a not in kept)
        mean = (
            magnitude.mean(axis=shared, keepdims=True)
            if self.per_axis
            else magnitude.mean()
        )
        self._assign_first_step(variables, mean)

    def get_config(self):
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "per_axis": self.per_axis,
            "narrow_range": self.narrow_range,
            "channel_axes": list(self.channel_axes),
        }


@keras.utils.register_keras_serializable(package="tf_lowbit")
class LSQActivationQuantizer(_LearnedStep, ActivationQuantizer):
    """`s * round(clip(x / s, 0, Q_P))` with a learned step `s`; or signed.

    Gradients: `ste.stepped_round`, with the gradient scale `1 / sqrt(N Q_P)`, N the
    features of one example. The step starts from data: `tf_lowbit.calibrate`. The
    unsigned one replaces the ReLU.

    Args:
        bits: 1 to 8, or 16 or 32 for the clip of 8 bits without rounding.
        signed: for activations that are not behind a ReLU.
        implementation: "auto", "fused" or "composed"; signed is always composed.
    """

    needs_calibration = True

    def __init__(
        self, bits: int = 2, signed: bool = False, implementation: str = "auto"
    ):
        super().__init__(bits)
        self.signed = checks.flag("signed", signed)
        self.implementation = ste.validate_implementation(implementation)

    def build_range(self, tensor_shape, name, layer, variables):
        """See `LowBitQuantizer.build_range`."""
        variables["step"] = self.add_learned(layer, f"{name}_step", 1.0)
        variables["calibrated"] = self.add_state(
            layer, f"{name}_calibrated", 0, tf.int32
        )

    def quantize(self, inputs, variables):
        """See `LowBitQuantizer.quantize`."""
        bits = tf.convert_to_tensor(variables["bits"])
        features = tf.cast(tf.reduce_prod(tf.shape(inputs)[1:]), tf.float32)
        return ste.stepped_round(
            inputs,
            self._step(variables),
            bits,
            signed=self.signed,
            rounding_bits=self.rounding_bits(variables),
            gradient_scale=tf.math.rsqrt(features * _highest_code(bits, self.signed)),
            implementation=self.implementation,
        )

    def codes(self, inputs, variables):
        """Int32 codes, the shape of `inputs`."""
        inputs, bits = as_float32(inputs), variables["bits"]
        step = self._step(variables)
        if self.signed:
            codes = grid.signed_codes(inputs / step, bits, self.narrow_range)
        else:
            limit = ste.unsigned_range(step, bits)
            codes = grid.unsigned_codes(inputs, limit, bits)
        return tf.cast(codes, tf.int32)

    def step(self, inputs, variables):
        """The learned step, as the grid's float32 arithmetic has it."""
        step = self._step(variables)
        if self.signed:
            return step
        bits = variables["bits"]
        return grid.unsigned_step(ste.unsigned_range(step, bits), bits)

    def calibrate(self, samples, variables):
        """Starts the step at `2 mean|x| / sqrt(Q_P)`, as the paper does."""
        mean = ranges.mean_magnitude(samples, signed=self.signed)
        self._assign_first_step(variables, mean)
        variables["calibrated"].assign(1)

    def get_config(self):
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "signed": self.signed,
            "implementation": self.implementation,
        }
