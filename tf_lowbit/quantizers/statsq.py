"""StatsQ: weights on the odd grid, scaled by a statistic of each channel.

After Liu et al., Nonuniform-to-Uniform Quantization (N2UQ), arXiv:2111.14826.
"""

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import grid, ste
from tf_lowbit.quantizers.base import SMALLEST_RANGE, WeightQuantizer, shared_axes


@keras.utils.register_keras_serializable(package="tf_lowbit")
class StatsQWeightQuantizer(WeightQuantizer):
    """`s (2 round(n u) - n) / n`, `u = clip(w / s, -1, 1) / 2 + 1/2`, `s = 2 mean|w|`.

    `n = 2^k - 1`. The scale is that of each output channel and is computed from the
    weights at each step: nothing is learned. There is no zero level. The authors' code
    has `(2^k - 1) / 2^(k-1)` in place of the 2, which is 1.5 at 2 bits; here the scale
    does not depend on the bits. It clips what is beyond `2 mean|w|`, so it is meant for
    1 to 4 bits.

    Gradient: `dy/dw = 1` everywhere, also beyond the clip; none through `s`.

    Args:
        bits: 1 to 8, or 16 or 32 for the clip alone.
        channel_axes: the kernel's output-channel axes; the layer's config sets it.
        standardize: `(w - mean) / std` in front of the grid (`prepared`).
    """

    per_axis = True
    narrow_range = True

    def __init__(self, bits: int = 2, channel_axes=(-1,), standardize: bool = False):
        super().__init__(bits)
        self.channel_axes = tuple(channel_axes)
        self.standardize = standardize

    def quantize(self, inputs, variables):
        """See `LowBitQuantizer.quantize`."""
        weights = self.prepared(inputs)
        bits = self.rounding_bits(variables)
        return ste.odd_round(weights, self._scale(weights), bits)

    def codes(self, inputs, variables):
        """Odd int32 codes in [-n, n], the shape of `inputs`."""
        weights = self.prepared(inputs)
        unit = ste.odd_unit(weights, self._scale(weights))
        return tf.cast(grid.odd_codes(unit, variables["bits"]), tf.int32)

    def step(self, inputs, variables):
        """`s / n`, for each channel."""
        scale = self._scale(self.prepared(inputs))
        return scale * grid.odd_step(variables["bits"])

    def level_codes(self, bits):
        """`2^k` odd codes: there is no zero."""
        return grid.level_codes(bits, signed=True, odd=True)

    def _scale(self, weights):
        axes = shared_axes(weights.shape, self.channel_axes)
        mean = tf.reduce_mean(tf.abs(weights), axis=axes, keepdims=True)
        return tf.stop_gradient(tf.maximum(2.0 * mean, SMALLEST_RANGE))

    def get_config(self):
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "channel_axes": list(self.channel_axes),
            "standardize": self.standardize,
        }
