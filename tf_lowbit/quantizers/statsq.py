"""StatsQ: weights on the odd grid, scaled by a statistic of each channel.

Liu et al., Nonuniform-to-Uniform Quantization (N2UQ), arXiv:2111.14826.
"""

from collections.abc import Sequence

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks, grid, ste
from tf_lowbit.quantizers.base import (
    SMALLEST_RANGE,
    Variables,
    WeightQuantizer,
    shared_axes,
)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class StatsQWeightQuantizer(WeightQuantizer):
    """`s (2 round(n u) - n) / n`, `u = clip(w / s, -1, 1) / 2 + 1/2`, `s = 2 mean|w|`.

    `n = 2^k - 1`. Each output channel has its own scale, computed from the weights at
    each step; nothing is learned. There is no zero level. Weights beyond `2 mean|w|`
    are clipped, so the quantizer is meant for 1 to 4 bits. The authors' code has the
    factor `(2^k - 1) / 2^(k-1)` instead of 2, which is 1.5 at 2 bits; here the scale
    does not depend on the bits.

    Gradient: `dy/dw = 1` everywhere, also beyond the clip; none through `s`.

    Args:
        bits: 1 to 8, or 16 or 32 for the clip without rounding.
        channel_axes: Output-channel axes of the kernel; the layer's config sets it.
        standardize: Standardizes weights first: `(w - mean) / std` (`prepared`).
    """

    per_axis = True
    narrow_range = True

    def __init__(
        self,
        bits: int = 2,
        channel_axes: Sequence[int] = (-1,),
        standardize: bool = False,
    ):
        super().__init__(bits)
        self.channel_axes = checks.integers("channel_axes", channel_axes)
        self.standardize = checks.flag("standardize", standardize)

    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.quantize`."""
        weights = self.prepared(inputs)
        bits = self.rounding_bits(variables)
        return ste.odd_round(weights, self._scale(weights), bits)

    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Odd int32 codes in [-n, n], the shape of `inputs`."""
        weights = self.prepared(inputs)
        unit = ste.odd_unit(weights, self._scale(weights))
        return tf.cast(grid.odd_codes(unit, variables["bits"]), tf.int32)

    def step(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """`s / n`, for each channel."""
        scale = self._scale(self.prepared(inputs))
        return scale * grid.odd_step(variables["bits"])

    def level_codes(self, bits: int) -> range:
        """Returns the `2^k` odd codes; zero is not one of them."""
        return grid.level_codes(bits, signed=True, odd=True)

    def _scale(self, weights):
        axes = shared_axes(weights.shape, self.channel_axes)
        mean = tf.reduce_mean(tf.abs(weights), axis=axes, keepdims=True)
        return tf.stop_gradient(tf.maximum(2.0 * mean, SMALLEST_RANGE))
