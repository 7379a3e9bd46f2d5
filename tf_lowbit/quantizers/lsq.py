"""LSQ: quantizers with a learned step.

Esser et al., Learned Step Size Quantization, arXiv:1902.08153.
"""

import math
from collections.abc import Sequence

import numpy as np

from tf_lowbit.compat import as_float32, keras, tf
from tf_lowbit.core import checks, grid, ste
from tf_lowbit.quantizers import ranges
from tf_lowbit.quantizers.base import (
    SMALLEST_RANGE,
    ActivationQuantizer,
    Variables,
    WeightQuantizer,
    channel_shape,
    scaled_gradient,
)

LEAST_ERROR, PAPER = "least_error", "paper"
INITIALIZATIONS = (LEAST_ERROR, PAPER)


def _highest_code(bits, signed: bool):
    """Returns Q_P, the highest code; for "not rounded" that of 8 bits."""
    if signed:
        return grid.signed_limits(bits, narrow_range=False)[1]
    return grid.unsigned_limit(tf.minimum(bits, grid.MAX_BITS))


class _LearnedStep:
    # Of the quantizer:
    signed: bool
    narrow_range: bool
    initialization: str

    def assign_bits(self, variables, bits):
        """Sets the bits and rescales the step.

        The factor is the ratio of the first steps that normally distributed values (or
        their ReLU) have at the new and at the old bits. `initialize` and `calibrate`
        measure the step again.
        """
        old, new = int(variables["bits"].numpy()), grid.validate_bits(bits)
        ratio = self._relative_step(new) / self._relative_step(old)
        variables["step"].assign(variables["step"] * ratio)
        variables["bits"].assign(new)

    def _relative_step(self, bits: int) -> float:
        """Returns the first step for normally distributed values, up to a factor."""
        highest = float(_highest_code(bits, self.signed))
        if self.initialization == PAPER:
            return 1.0 / math.sqrt(highest)
        return ranges.normal_clip(bits, self.signed, self.narrow_range) / highest

    def _gradient_scale(self, sharing, bits):
        """Returns "g" of the paper, `1 / sqrt(N Q_P)`, or `1 / (Q_P sqrt(N))`.

        The paper's scale fits steps that start by the paper's rule. At many bits, steps
        of least error are several times smaller. With the paper's scale, each update
        would change them by a large share, and most levels would soon be unused.
        """
        highest = _highest_code(bits, self.signed)
        if self.initialization == PAPER:
            return tf.math.rsqrt(sharing * highest)
        return tf.math.rsqrt(tf.cast(sharing, tf.float32)) / highest

    def _assign_first_step(self, variables, mean_magnitude, clip):
        """Sets the first step at the current bits by `initialization`.

        Args:
            variables: The quantizer's variables.
            mean_magnitude: Function () -> `mean|v|`, the paper's statistic.
            clip: Function (bits) -> the clip of least squared error.
        """
        bits = int(variables["bits"].numpy())
        highest = float(_highest_code(bits, self.signed))
        if self.initialization == PAPER:
            step = 2.0 * mean_magnitude() / math.sqrt(highest)
        else:
            step = clip(bits) / highest
        step = np.maximum(step, SMALLEST_RANGE)
        variables["step"].assign(np.asarray(step, np.float32))

    @staticmethod
    def _step(variables):
        # Some optimizers ignore constraints; a negative step would flip the grid.
        return tf.maximum(as_float32(variables["step"]), SMALLEST_RANGE)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class LSQWeightQuantizer(_LearnedStep, WeightQuantizer):
    """`s * round(clip(w / s, -Q_N, Q_P))` with a learned step `s`.

    The grid has a zero; at one bit it is {-s, +s}. Gradients are those of
    `ste.stepped_round`. The step stays positive. N is the number of weights that share
    a step:

    - `initialization="least_error"`: the step starts at the least squared error of the
      weights; its gradient is multiplied by `1 / (Q_P sqrt(N))`.
    - `initialization="paper"`: the step starts at `2 mean|w| / sqrt(Q_P)`; its gradient
      is multiplied by `1 / sqrt(N Q_P)`.

    Args:
        bits: 1 to 8, or 16 or 32 for the clip of 8 bits without rounding.
        per_axis: Whether each output channel has its own step.
        narrow_range: Whether to drop the lowest code, for a symmetric grid.
        channel_axes: Output-channel axes of the kernel; the layer's config sets it.
        initialization: First step and gradient scale: "least_error" or "paper".
        gradient_factor: Factor on the step's gradient. With SGD it is the step's
            learning rate relative to that of the weights. Adam and similar optimizers
            cancel it. With 0, only weight decay moves the step.
        standardize: Standardizes weights first: `(w - mean) / std` (`prepared`).

    Raises:
        ValueError: If `initialization` is unknown or a factor is below 0.
    """

    def __init__(
        self,
        bits: int = 2,
        per_axis: bool = False,
        narrow_range: bool = False,
        channel_axes: Sequence[int] = (-1,),
        initialization: str = LEAST_ERROR,
        gradient_factor: float = 1.0,
        standardize: bool = False,
    ):
        super().__init__(bits)
        self.initialization = checks.choice(
            "initialization", initialization, INITIALIZATIONS
        )
        self.gradient_factor = checks.number(
            "gradient_factor", gradient_factor, at_least=0
        )
        self.standardize = checks.flag("standardize", standardize)
        self.per_axis = checks.flag("per_axis", per_axis)
        self.narrow_range = checks.flag("narrow_range", narrow_range)
        self.channel_axes = checks.integers("channel_axes", channel_axes)

    def build_range(
        self,
        tensor_shape: tf.TensorShape,
        name: str,
        layer: keras.layers.Layer,
        variables: Variables,
    ) -> None:
        """See `LowBitQuantizer.build_range`."""
        shape = channel_shape(tensor_shape, self.channel_axes) if self.per_axis else ()
        variables["step"] = self.add_learned(layer, f"{name}_step", 1.0, shape)

    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.quantize`."""
        bits = tf.convert_to_tensor(variables["bits"])
        step = self._step(variables)
        sharing = inputs.shape.num_elements() / step.shape.num_elements()
        return ste.stepped_round(
            self.prepared(inputs),
            scaled_gradient(step, self.gradient_factor),
            bits,
            signed=True,
            narrow_range=self.narrow_range,
            rounding_bits=self.rounding_bits(variables),
            gradient_scale=self._gradient_scale(sharing, bits),
        )

    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Int32 codes in [-Q_N, Q_P], the shape of `inputs`."""
        scaled = self.prepared(inputs) / self._step(variables)
        codes = grid.signed_codes(scaled, variables["bits"], self.narrow_range)
        return tf.cast(codes, tf.int32)

    def step(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """The learned step."""
        return self._step(variables)

    def initialize(self, weights: tf.Variable, variables: Variables) -> None:
        """Sets the first step from the weights by `initialization`."""
        values = self.prepared(weights).numpy()
        axes = self.channel_axes if self.per_axis else None

        def mean_magnitude():
            kept = {axis % values.ndim for axis in axes or ()}
            shared = tuple(axis for axis in range(values.ndim) if axis not in kept)
            return np.abs(values).mean(axis=shared, keepdims=bool(kept))

        def clip(bits):
            return ranges.least_error_weight_clips(
                values, bits, self.narrow_range, axes
            )

        self._assign_first_step(variables, mean_magnitude, clip)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class LSQActivationQuantizer(_LearnedStep, ActivationQuantizer):
    """`s * round(clip(x / s, 0, Q_P))` with a learned step `s`; or signed.

    Gradients and first step are as in `LSQWeightQuantizer`, with N the number of
    features of one example. `tf_lowbit.calibrate` sets the first step from data. The
    unsigned quantizer replaces the ReLU.

    Args:
        bits: 1 to 8, or 16 or 32 for the clip of 8 bits without rounding.
        signed: True for activations that are not the output of a ReLU.
        implementation: "auto", "fused" or "composed"; signed is always composed.
        initialization: First step and gradient scale: "least_error" or "paper".
        gradient_factor: As in `LSQWeightQuantizer`.

    Raises:
        ValueError: If `initialization` or `implementation` is unknown, or a factor is
            below 0.
    """

    needs_calibration = True

    def __init__(
        self,
        bits: int = 2,
        signed: bool = False,
        implementation: str = "auto",
        initialization: str = LEAST_ERROR,
        gradient_factor: float = 1.0,
    ):
        super().__init__(bits)
        self.initialization = checks.choice(
            "initialization", initialization, INITIALIZATIONS
        )
        self.gradient_factor = checks.number(
            "gradient_factor", gradient_factor, at_least=0
        )
        self.signed = checks.flag("signed", signed)
        self.implementation = ste.validate_implementation(implementation)

    def build_range(
        self,
        tensor_shape: tf.TensorShape | None,
        name: str,
        layer: keras.layers.Layer,
        variables: Variables,
    ) -> None:
        """See `LowBitQuantizer.build_range`."""
        variables["step"] = self.add_learned(layer, f"{name}_step", 1.0)
        self._add_calibrated(name, layer, variables)

    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.quantize`."""
        bits = tf.convert_to_tensor(variables["bits"])
        features = tf.cast(tf.reduce_prod(tf.shape(inputs)[1:]), tf.float32)
        return ste.stepped_round(
            inputs,
            scaled_gradient(self._step(variables), self.gradient_factor),
            bits,
            signed=self.signed,
            rounding_bits=self.rounding_bits(variables),
            gradient_scale=self._gradient_scale(features, bits),
            implementation=self.implementation,
        )

    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Int32 codes, the shape of `inputs`."""
        inputs, bits = as_float32(inputs), variables["bits"]
        step = self._step(variables)
        if self.signed:
            codes = grid.signed_codes(inputs / step, bits, self.narrow_range)
        else:
            limit = ste.unsigned_range(step, bits)
            codes = grid.unsigned_codes(inputs, limit, bits)
        return tf.cast(codes, tf.int32)

    def step(self, inputs: tf.Tensor | None, variables: Variables) -> tf.Tensor:
        """The learned step, rounded as the grid's float32 arithmetic rounds it."""
        step = self._step(variables)
        if self.signed:
            return step
        bits = variables["bits"]
        return grid.unsigned_step(ste.unsigned_range(step, bits), bits)

    def calibrate(self, samples: Sequence[np.ndarray], variables: Variables) -> None:
        """Sets the first step from data by `initialization`."""
        self._assign_first_step(
            variables,
            lambda: ranges.mean_magnitude(samples, signed=self.signed),
            lambda bits: ranges.least_error_clip(samples, bits, signed=self.signed),
        )
        self.mark_calibrated(variables)
