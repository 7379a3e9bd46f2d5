"""Uniform symmetric quantizers without learned parameters (common practice)."""

from collections.abc import Sequence

from tf_lowbit.compat import as_float32, keras, tf
from tf_lowbit.core import checks, grid, ste
from tf_lowbit.quantizers import ranges
from tf_lowbit.quantizers.base import (
    SMALLEST_RANGE,
    ActivationQuantizer,
    Variables,
    WeightQuantizer,
    shared_axes,
)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class UniformWeightQuantizer(WeightQuantizer):
    """`s * round(clip(w / s, -Q, Q))`, `Q = 2^(k-1) - 1`, `s = max|w| / Q`.

    The grid has a zero and is symmetric (narrow range). At one bit it is `{-s, +s}`
    with `s = mean|w|`, as in XNOR-Net (arXiv:1603.05279). At 2 bits `s` is the largest
    weight, so that most weights become zero: prefer LSQ or DoReFa there. Gradient:
    `dy/dw = 1` everywhere, at one bit also beyond the levels; none through `s`.

    Args:
        bits: 1 to 8, or 16 or 32 for "not rounded".
        per_axis: Whether each output channel has its own scale.
        channel_axes: Output-channel axes of the kernel; the layer's config sets it.
        standardize: Standardizes weights first: `(w - mean) / std` (`prepared`).
    """

    narrow_range = True

    def __init__(
        self,
        bits: int = 8,
        per_axis: bool = True,
        channel_axes: Sequence[int] = (-1,),
        standardize: bool = False,
    ):
        super().__init__(bits)
        self.per_axis = checks.flag("per_axis", per_axis)
        self.channel_axes = checks.integers("channel_axes", channel_axes)
        self.standardize = checks.flag("standardize", standardize)

    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.quantize`."""
        bits = tf.convert_to_tensor(variables["bits"])
        weights = self.prepared(inputs)
        return ste.scaled_round(
            weights,
            self._scale(weights, variables),
            bits,
            narrow_range=True,
            rounding_bits=self.rounding_bits(variables),
            clips_gradient=False,
        )

    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Int32 codes in [-Q, Q], the shape of `inputs`."""
        weights = self.prepared(inputs)
        scaled = weights / self._scale(weights, variables)
        codes = grid.signed_codes(scaled, variables["bits"], narrow_range=True)
        return tf.cast(codes, tf.int32)

    def step(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """The scale: `max|w| / Q`, or `mean|w|` at one bit."""
        return self._scale(self.prepared(inputs), variables)

    def _scale(self, weights, variables):
        bits = tf.convert_to_tensor(variables["bits"])
        magnitude = tf.abs(weights)
        axes = None
        if self.per_axis:
            axes = shared_axes(weights.shape, self.channel_axes)
        largest = tf.reduce_max(magnitude, axis=axes, keepdims=self.per_axis)
        mean = tf.reduce_mean(magnitude, axis=axes, keepdims=self.per_axis)
        highest = grid.signed_limits(bits, narrow_range=True)[1]
        scale = tf.where(bits == 1, mean, largest / highest)
        return tf.maximum(scale, SMALLEST_RANGE)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class UniformActivationQuantizer(ranges.FittedClip, ActivationQuantizer):
    """A fixed, calibrated range: [0, clip], or [-clip, clip] if signed.

    Unsigned: `clip / n * round(clip(x, 0, clip) * n / clip)`, a quantized ReLU. Signed:
    narrow range, `step = clip / Q`; {-clip, +clip} at one bit. Gradient: `dy/dx = 1` in
    range, else 0; the clip is not learned. "Not rounded" keeps the clip.

    Args:
        bits: 1 to 8, or 16 or 32 for the clip without rounding.
        signed: True for activations that are not the output of a ReLU.
        clip: Initial clip, in the unit of the activations; `calibrate` replaces it.
        implementation: "auto", "fused" or "composed"; signed is always composed.

    Raises:
        ValueError: If `clip` is not positive.
    """

    needs_calibration = True
    clip_name = "clip"
    narrow_range = True

    def __init__(
        self,
        bits: int = 8,
        signed: bool = False,
        clip: float = 6.0,
        implementation: str = "auto",
    ):
        super().__init__(bits)
        checks.number("clip", clip, above=0)
        self.signed = checks.flag("signed", signed)
        self.clip = clip
        self.implementation = ste.validate_implementation(implementation)

    def build_range(
        self,
        tensor_shape: tf.TensorShape | None,
        name: str,
        layer: keras.layers.Layer,
        variables: Variables,
    ) -> None:
        """See `LowBitQuantizer.build_range`."""
        variables["clip"] = self.add_state(layer, f"{name}_clip", self.clip)
        self._add_calibrated(name, layer, variables)

    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.quantize`."""
        bits = tf.convert_to_tensor(variables["bits"])
        clip = tf.stop_gradient(as_float32(variables["clip"]))
        rounding_bits = self.rounding_bits(variables)
        if not self.signed:
            return ste.learned_clip_round(
                inputs, clip, rounding_bits, self.implementation
            )
        return ste.scaled_round(
            inputs,
            self._signed_step(clip, bits),
            bits,
            narrow_range=True,
            rounding_bits=rounding_bits,
        )

    @staticmethod
    def _signed_step(clip, bits):
        return clip / grid.signed_limits(bits, narrow_range=True)[1]

    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Int32 codes, the shape of `inputs`."""
        inputs, bits = as_float32(inputs), variables["bits"]
        if self.signed:
            scaled = inputs / self.step(inputs, variables)
            codes = grid.signed_codes(scaled, bits, narrow_range=True)
        else:
            codes = grid.unsigned_codes(inputs, as_float32(variables["clip"]), bits)
        return tf.cast(codes, tf.int32)

    def step(self, inputs: tf.Tensor | None, variables: Variables) -> tf.Tensor:
        """`clip / n`, or `clip / Q` if signed."""
        clip, bits = as_float32(variables["clip"]), variables["bits"]
        if self.signed:
            return self._signed_step(clip, bits)
        return grid.unsigned_step(clip, bits)
