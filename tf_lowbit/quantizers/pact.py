"""PACT: a quantized ReLU with a learned clip.

Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural
Networks, arXiv:1805.06085.
"""

from tf_lowbit.compat import as_float32, keras, tf
from tf_lowbit.core import checks, grid, ste
from tf_lowbit.quantizers import ranges
from tf_lowbit.quantizers.base import (
    SMALLEST_RANGE,
    ActivationQuantizer,
    Variables,
    scaled_gradient,
)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class PACTActivationQuantizer(ranges.FittedClip, ActivationQuantizer):
    """`alpha / n * round(clip(x, 0, alpha) * n / alpha)`, alpha learned.

    Gradients: `dy/dx = 1` where `0 <= x <= alpha`, else 0; `dy/dalpha = 1` where `x >
    alpha`, else 0. Alpha stays positive. It replaces the ReLU.

    Args:
        bits: 1 to 8, or 16 or 32 for the clip without rounding.
        alpha: Initial clip, in the unit of the activations; `calibrate` replaces it.
        alpha_decay: The paper's L2 penalty on alpha, as a Keras `l2` factor; 0 for
            none. 1e-4 adds the gradient `2e-4 alpha`, the weight decay in the paper's
            CIFAR-10 training (recalled, not verified).
        implementation: "auto", "fused" or "composed".
        gradient_factor: Factor on alpha's gradient, without the penalty's. With SGD it
            is alpha's learning rate relative to that of the weights. Adam and similar
            optimizers cancel it.

    Raises:
        ValueError: If `alpha` is not positive, or `alpha_decay` or `gradient_factor` is
            negative.
    """

    needs_calibration = True
    clip_name = "alpha"

    def __init__(
        self,
        bits: int = 2,
        alpha: float = 6.0,
        alpha_decay: float = 1e-4,
        implementation: str = "auto",
        gradient_factor: float = 1.0,
    ):
        super().__init__(bits)
        checks.number("alpha", alpha, above=0)
        checks.number("alpha_decay", alpha_decay, at_least=0)
        self.alpha = alpha
        self.alpha_decay = alpha_decay
        self.gradient_factor = checks.number(
            "gradient_factor", gradient_factor, at_least=0
        )
        self.implementation = ste.validate_implementation(implementation)

    def build_range(
        self,
        tensor_shape: tf.TensorShape | None,
        name: str,
        layer: keras.layers.Layer,
        variables: Variables,
    ) -> None:
        """See `LowBitQuantizer.build_range`."""
        penalty = keras.regularizers.l2(self.alpha_decay) if self.alpha_decay else None
        variables["alpha"] = self.add_learned(
            layer, f"{name}_alpha", self.alpha, regularizer=penalty
        )
        self._add_calibrated(name, layer, variables)

    def quantize(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """See `LowBitQuantizer.quantize`."""
        bits = self.rounding_bits(variables)
        alpha = scaled_gradient(self._alpha(variables), self.gradient_factor)
        return ste.learned_clip_round(inputs, alpha, bits, self.implementation)

    def codes(self, inputs: tf.Tensor, variables: Variables) -> tf.Tensor:
        """Int32 codes in [0, n], the shape of `inputs`."""
        codes = grid.unsigned_codes(
            as_float32(inputs), self._alpha(variables), variables["bits"]
        )
        return tf.cast(codes, tf.int32)

    def step(self, inputs: tf.Tensor | None, variables: Variables) -> tf.Tensor:
        """`alpha / n`."""
        return grid.unsigned_step(self._alpha(variables), variables["bits"])

    @staticmethod
    def _alpha(variables):
        # Some optimizers ignore constraints; a clip of zero would divide by zero.
        return tf.maximum(as_float32(variables["alpha"]), SMALLEST_RANGE)
