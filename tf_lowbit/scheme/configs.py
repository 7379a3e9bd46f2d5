"""The `QuantizeConfig` classes: what TF-MOT quantizes in one layer, and how."""

from tf_lowbit import quantizers
from tf_lowbit.compat import keras, tfmot

_QuantizeConfig = tfmot.quantization.keras.QuantizeConfig


@keras.utils.register_keras_serializable(package="tf_lowbit")
class WeightQuantizeConfig(_QuantizeConfig):
    """Quantizes named weights of a layer, and nothing else.

    Args:
        weight_quantizers: dict from attribute name ("kernel", "depthwise_kernel",
            "pointwise_kernel") to weight quantizer, or to its serialized dict.
        shortcut: whether `shortcut_bits` set the bits.
    """

    def __init__(self, weight_quantizers: dict, shortcut: bool = False):
        self.shortcut = shortcut
        self.weight_quantizers = {
            attribute: quantizers.get(quantizer, quantizers.WEIGHT)
            for attribute, quantizer in weight_quantizers.items()
        }

    def get_weights_and_quantizers(self, layer):
        """Pairs of weight variable and quantizer."""
        return [(getattr(layer, a), q) for a, q in self.weight_quantizers.items()]

    def set_quantize_weights(self, layer, quantize_weights):
        """Puts the quantized tensors in the variables' places."""
        for attribute, tensor in zip(
            self.weight_quantizers, quantize_weights, strict=True
        ):
            setattr(layer, attribute, tensor)

    def get_activations_and_quantizers(self, layer):
        """None: activations are layers of their own (`layout`)."""
        return []

    def set_quantize_activations(self, layer, quantize_activations):
        """Nothing to set."""
        del layer, quantize_activations

    def get_output_quantizers(self, layer):
        """None."""
        return []

    def get_config(self):
        """The constructor's arguments, serialized."""
        return {
            "weight_quantizers": {
                a: quantizers.serialize(q) for a, q in self.weight_quantizers.items()
            },
            "shortcut": self.shortcut,
        }


@keras.utils.register_keras_serializable(package="tf_lowbit")
class ActivationQuantizeConfig(_QuantizeConfig):
    """Quantizes the output of a layer that otherwise does nothing.

    Args:
        quantizer: activation quantizer, or its serialized dict.
        replaces: the activation that stood here ("relu", "relu6"), or "linear" where
            the quantizer was inserted. Stripping and export read it.
        shortcut: whether `shortcut_bits` set the bits.
    """

    def __init__(self, quantizer, replaces: str = "linear", shortcut: bool = False):
        self.shortcut = shortcut
        self.quantizer = quantizers.get(quantizer, quantizers.ACTIVATION)
        self.replaces = replaces

    def get_weights_and_quantizers(self, layer):
        """None."""
        return []

    def set_quantize_weights(self, layer, quantize_weights):
        """Nothing to set."""
        del layer, quantize_weights

    def get_activations_and_quantizers(self, layer):
        """None: the output is quantized as a whole."""
        return []

    def set_quantize_activations(self, layer, quantize_activations):
        """Nothing to set."""
        del layer, quantize_activations

    def get_output_quantizers(self, layer):
        """The quantizer."""
        return [self.quantizer]

    def get_config(self):
        """The constructor's arguments, serialized."""
        return {
            "quantizer": quantizers.serialize(self.quantizer),
            "replaces": self.replaces,
            "shortcut": self.shortcut,
        }
