"""The `QuantizeConfig` classes: what TF-MOT quantizes in one layer, and how."""

from collections.abc import Sequence
from typing import Any

from tf_lowbit import quantizers
from tf_lowbit.compat import keras, tf, tfmot
from tf_lowbit.quantizers import LowBitQuantizer


class _NothingQuantized(tfmot.quantization.keras.QuantizeConfig):
    """Quantizes nothing. A subclass overrides the methods of what it quantizes."""

    def get_weights_and_quantizers(self, layer):
        return []

    def set_quantize_weights(self, layer, quantize_weights):
        del layer, quantize_weights

    def get_activations_and_quantizers(self, layer):
        return []  # Activations are separate layers (`layout`).

    def set_quantize_activations(self, layer, quantize_activations):
        del layer, quantize_activations

    def get_output_quantizers(self, layer):
        return []


@keras.utils.register_keras_serializable(package="tf_lowbit")
class WeightQuantizeConfig(_NothingQuantized):
    """Quantizes named weights of a layer.

    Args:
        weight_quantizers: Attribute name ("kernel", "depthwise_kernel",
            "pointwise_kernel") -> weight quantizer, or its serialized dict.
        shortcut: Whether `shortcut_bits` set the bits.
    """

    def __init__(self, weight_quantizers: dict, shortcut: bool = False):
        self.shortcut = shortcut
        self.weight_quantizers = {
            attribute: quantizers.get(quantizer, quantizers.WEIGHT)
            for attribute, quantizer in weight_quantizers.items()
        }

    def get_weights_and_quantizers(
        self, layer: keras.layers.Layer
    ) -> list[tuple[tf.Variable, LowBitQuantizer]]:
        """Returns pairs of weight variable and quantizer."""
        return [(getattr(layer, a), q) for a, q in self.weight_quantizers.items()]

    def set_quantize_weights(
        self, layer: keras.layers.Layer, quantize_weights: Sequence[tf.Tensor]
    ) -> None:
        """Replaces the variables by the quantized tensors."""
        for attribute, tensor in zip(
            self.weight_quantizers, quantize_weights, strict=True
        ):
            setattr(layer, attribute, tensor)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialized."""
        return {
            "weight_quantizers": {
                a: quantizers.serialize(q) for a, q in self.weight_quantizers.items()
            },
            "shortcut": self.shortcut,
        }


@keras.utils.register_keras_serializable(package="tf_lowbit")
class ActivationQuantizeConfig(_NothingQuantized):
    """Quantizes the output of a layer that is otherwise the identity.

    Args:
        quantizer: Activation quantizer, or its serialized dict.
        replaces: The replaced activation, "relu" or "relu6", or "linear" for an
            inserted quantizer. Stripping and export read it.
        shortcut: Whether `shortcut_bits` set the bits.
    """

    def __init__(
        self,
        quantizer: LowBitQuantizer | dict[str, Any],
        replaces: str = "linear",
        shortcut: bool = False,
    ):
        self.shortcut = shortcut
        self.quantizer = quantizers.get(quantizer, quantizers.ACTIVATION)
        self.replaces = replaces

    def get_output_quantizers(self, layer: keras.layers.Layer) -> list[LowBitQuantizer]:
        """Returns the quantizer."""
        return [self.quantizer]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialized."""
        return {
            "quantizer": quantizers.serialize(self.quantizer),
            "replaces": self.replaces,
            "shortcut": self.shortcut,
        }
