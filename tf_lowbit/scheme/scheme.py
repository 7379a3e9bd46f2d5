"""The `QuantizeScheme` for TF-MOT's `quantize_apply`."""

from collections.abc import Sequence

from tf_lowbit.compat import tfmot
from tf_lowbit.core import checks
from tf_lowbit.network.layer_registry import LowBitRegistry
from tf_lowbit.scheme import residual_blocks
from tf_lowbit.scheme.layout import LowBitLayout
from tf_lowbit.scheme.rules import PrecisionRule, as_rules


class LowBitScheme(tfmot.quantization.keras.QuantizeScheme):
    """Low-bitwidth quantization by a list of rules.

    `tf_lowbit.quantize` uses it. TF-MOT's own calls do the same:

        annotated = tfmot.quantization.keras.quantize_annotate_model(model)
        quantized = tfmot.quantization.keras.quantize_apply(
            annotated, scheme=tf_lowbit.LowBitScheme(rules))
        tf_lowbit.inspection.initialize_weight_ranges(quantized)

    Without the last line, the learned steps of weights stay at 1. Separable
    convolutions are not split here.

    Args:
        rules: `PrecisionRule`s, of which the first match applies; None for W2A2.
        strict: Whether an unused rule or a layer that cannot be quantized raises an
            error instead of a `QuantizationWarning`.
        residual_bits: 8 for quantizers on residual Adds (`scheme.residual_blocks`), or
            None for none.
        shortcut_bits: 1 to 8 for the shortcuts of residual blocks
            (`scheme.residual_blocks`), or None for the rules' bits.

    Raises:
        ValueError: If `rules` is not a list of rules, `residual_bits` is neither 8 nor
            None, or `shortcut_bits` is neither 1 to 8 nor None.
    """

    def __init__(
        self,
        rules: PrecisionRule | Sequence[PrecisionRule] | None = None,
        strict: bool = False,
        residual_bits: int | None = None,
        shortcut_bits: int | None = None,
    ):
        self.rules = as_rules(rules)
        self.strict = checks.flag("strict", strict)
        self.residual_bits = residual_blocks.validate_residual_bits(residual_bits)
        self.shortcut_bits = residual_blocks.validate_shortcut_bits(shortcut_bits)

    def get_layout_transformer(self) -> LowBitLayout:
        """Returns the layout transform, which places the quantizers."""
        return LowBitLayout(
            self.rules, self.strict, self.residual_bits, self.shortcut_bits
        )

    def get_quantize_registry(self) -> LowBitRegistry:
        """Returns the table of layers."""
        return LowBitRegistry()
