"""DoReFa quantizers, which arXiv:1908.04680 uses.

Zhou et al., DoReFa-Net, arXiv:1606.06160, in the form of the code released with
"Effective Training of CNNs with Low-bitwidth Weights and Activations".
"""

from collections.abc import Sequence

import numpy as np

from tf_lowbit.compat import as_float32, keras, tf
from tf_lowbit.core import checks, grid, ste
from tf_lowbit.quantizers import ranges
from tf_lowbit.quantizers.base import ActivationQuantizer, Variables, WeightQuantizer


@keras.utils.register_keras_serializable(package="tf_lowbit")
class DoReFaWeightQuantizer(WeightQuantizer):
    """Weights on the odd grid `{-n, -n + 2, ..., n} / n`, `n = 2^k - 1`.

    `t = tanh(w)`, `u = t / (2 max|t|) + 1/2`, `w_q = (2 round(n u) - n) / n`. The
    maximum is per tensor and part of the gradient (`ste.normalized_round`). There is
    **no zero level**. k-bit codes need k + 1 bits as two's complement integers.

    Args:
        bits: 1 to 8, or 16 or 32 for `2u - 1` without rounding.
        max_gradient: False treats the maximum as a constant in the gradient (an
            ablation).
        standardize: Standardizes weights first: `(w - mean) / std` (`prepared`).
    """

    narrow_range = True

    def __init__(
        self, bits: int = 2, max_gradient: bool = True, standardize: bool = False
    ):
        super().__init__(bits)
        self.max_gradient = checks.flag("max_gradient", max_gradient)
        self.standardize = checks.flag("standardize", standardize)

    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.quantize`."""
        bits = self.rounding_bits(variables)
        return ste.normalized_round(self.prepared(inputs), bits, self.max_gradient)

    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Odd int32 codes in [-n, n], the shape of `inputs`."""
        values = self.quantize(inputs, variables)
        return tf.cast(tf.round(values / self.step(inputs, variables)), tf.int32)

    def step(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """`1 / n`, for any weights."""
        return grid.odd_step(variables["bits"])

    def level_codes(self, bits: int) -> range:
        """Returns the `2^k` odd codes; zero is not one of them."""
        return grid.level_codes(bits, signed=True, odd=True)

    def exact(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """`2u - 1`: the weight on the scale of the grid."""
        unrounded = tf.constant(grid.UNROUNDED_BITS[-1])
        return self.quantize(inputs, {**variables, "rounding_bits": unrounded})

    def latent(
        self, codes: tf.Tensor, weights: tf.Tensor, variables: Variables
    ) -> tf.Tensor:
        """See `WeightQuantizer.latent`: `atanh(codes / n * max|t|)`."""
        largest = tf.reduce_max(tf.abs(self.prepared(weights)))
        share = tf.cast(codes, tf.float32) * self.step(weights, variables)
        values = tf.where(
            # The maximum is not recomputed, because rounding would move it each time.
            tf.abs(share) >= 1.0,
            tf.sign(share) * largest,
            tf.atanh(share * tf.tanh(largest)),
        )
        return self.unprepared(values, weights)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class DoReFaActivationQuantizer(ActivationQuantizer):
    """A quantized ReLU: `round(n clip(x, 0, 1)) / n`, `n = 2^k - 1`.

    Gradient: `dy/dx = 1` where `0 <= x <= 1`, else 0. It replaces the ReLU.

    Args:
        bits: 1 to 8, or 16 or 32 for the clip without rounding.
        implementation: "auto", "fused" or "composed" (`ste.clip_round`).
    """

    clip = 1.0
    has_fixed_clip = True

    def __init__(self, bits: int = 2, implementation: str = "auto"):
        super().__init__(bits)
        self.implementation = ste.validate_implementation(implementation)

    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.quantize`."""
        bits = self.rounding_bits(variables)
        return ste.clip_round(inputs, self.clip, bits, self.implementation)

    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Int32 codes in [0, n], the shape of `inputs`."""
        codes = grid.unsigned_codes(as_float32(inputs), self.clip, variables["bits"])
        return tf.cast(codes, tf.int32)

    def step(self, inputs: tf.Tensor | None, variables: Variables) -> tf.Tensor:
        """`1 / n`."""
        return grid.unsigned_step(self.clip, variables["bits"])

    def misfit(self, samples: Sequence[np.ndarray]) -> float:
        """Returns the clip of least squared error at `self.bits` over the fixed clip.

        `samples` is as in `calibrate`.
        """
        clip = ranges.least_error_clip(samples, self.bits, signed=False)
        return clip / self.clip
