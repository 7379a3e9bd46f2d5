"""Pending linear layers: their codes, accumulator bounds and geometry."""

import dataclasses
from typing import Any

import numpy as np

from tf_lowbit import quantizers
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import transposed, twin
from tf_lowbit.export.integer.int8_grids import Grid
from tf_lowbit.export.types import ExportError
from tf_lowbit.network import layer_registry
from tf_lowbit.network.inspection import QuantizedTensor
from tf_lowbit.quantizers import LowBitQuantizer


@dataclasses.dataclass
class Linear:
    """A linear layer whose output grid is not decided yet.

    Attributes:
        kind: One of the kinds in `twin`.
        layer: The trained layer, unwrapped, or None.
        weights: Its quantized weights; None for float weights.
        source: The `builder.Value` that it reads.
        gain: float64 [channels], multiplies the layer's output.
        offset: float64 [channels], added after the gain.
        relu: Activation that follows: None, "relu" or "relu6".
        is_integer: Whether it can read and output codes.
        taps: Fixed integer weights of a pooling or interpolation window, in the
            layout of the kind's weights; else None.
        strides: Strides of that window.
    """

    kind: str
    layer: keras.layers.Layer | None
    weights: "QuantizedTensor | PostTraining | None"
    source: Any
    gain: np.ndarray
    offset: np.ndarray
    relu: str | None = None
    is_integer: bool = True
    taps: np.ndarray | None = None
    strides: tuple[int, ...] = (1, 1)


def per_channel(linear: Linear, values: np.ndarray) -> np.ndarray:
    """Reshapes values [channels] so that they broadcast over the latent weights."""
    return values.reshape(twin.channel_shape(linear.kind, latent_shape(linear)))


def latent_shape(linear: Linear) -> tuple[int, ...]:
    """The shape of a linear layer's weights in Keras's layout."""
    if linear.weights is not None:
        return tuple(linear.weights.latent.shape)
    if linear.kind == twin.SCALE:
        return (len(linear.gain),)
    if linear.taps is not None:
        return linear.taps.shape
    (kernel,) = layer_registry.kernels(linear.layer)
    return tuple(getattr(linear.layer, kernel.attribute).shape)


def weights(
    linear: Linear,
) -> tuple[
    np.ndarray, np.ndarray, np.ndarray, LowBitQuantizer | None, dict[str, np.ndarray]
]:
    """Codes, step per channel, latent weights, quantizer and its variables' values."""
    if linear.weights is None:
        taps = linear.taps
        taps = np.ones(latent_shape(linear)) if taps is None else taps
        taps = taps.astype(np.float32)
        return taps, np.ones(len(linear.gain)), taps, None, {}
    tensor = linear.weights
    codes = tensor.codes().numpy().astype(np.float64)
    step = np.asarray(tensor.quantizer.step(tensor.latent, tensor.variables))
    if linear.kind == twin.DEPTHWISE:
        channels = np.broadcast_to(
            step.reshape(step.shape[-2:] if step.ndim else ()), codes.shape[-2:]
        )
    else:
        channels = np.broadcast_to(np.ravel(step), len(linear.gain))
    state = {
        name: np.asarray(variable)
        for name, variable in tensor.variables.items()
        if name != "calibrated"
    }
    latent = tensor.latent.numpy().astype(np.float32)
    steps = np.ravel(channels).astype(np.float64)
    return codes, steps, latent, tensor.quantizer, state


def largest_code(linear: Linear, codes: np.ndarray) -> int:
    """The largest magnitude of the codes on the weights' grid."""
    most = int(np.abs(codes).max(initial=1))
    if linear.weights is not None:
        bits = linear.weights.bits
        levels = linear.weights.quantizer.level_codes(bits)
        # At 8 bits -128 counts only if it occurs: else the codes fit -127..127.
        most = max(most, levels[-1], -levels[0] if bits < 8 else 1)
    if most > 127:
        raise ExportError(
            "Weight codes must lie in [-127, 127], the range of int8 weights. The odd "
            "grid of DoReFa and StatsQ fits up to 7 bits; at 8 use 'uniform', or 'lsq' "
            "with narrow_range=True. "
            f"Received: {linear.layer.name!r}, codes up to {most}"
        )
    return most


def bounds(kind: str, codes: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest accumulator of each channel, for any input codes."""
    positive = np.maximum(codes, 0.0)
    negative = np.minimum(codes, 0.0)
    low = positive * grid.low + negative * grid.high
    high = positive * grid.high + negative * grid.low
    kept = twin.channel_axes(kind)
    axes = tuple(a for a in range(codes.ndim) if a - codes.ndim not in kept)
    return (
        np.ravel(low.sum(axis=axes)).astype(np.int64),
        np.ravel(high.sum(axis=axes)).astype(np.int64),
    )


def check_accumulator(
    name: str, smallest: np.ndarray, largest: np.ndarray, upscale: int
) -> None:
    """Raises `ExportError` if a layer's accumulator can reach 2^30."""
    most = upscale * max(np.abs(smallest).max(), np.abs(largest).max())
    if most >= 2**30:
        raise ExportError(
            "Accumulators must stay below 2^30. "
            f"Received: {name}, which can reach {most}"
        )


def window(linear: Linear) -> dict:
    """Strides, padding and dilation, as arguments of `twin.IntegerLinear`.

    A causal convolution becomes "valid", behind a layer that pads: `causal_padding`.
    """
    layer = linear.layer
    if linear.kind in (twin.SCALE, twin.DENSE):
        return {}
    if linear.taps is not None:
        return {"strides": linear.strides}
    arguments = {"strides": tuple(layer.strides)}
    if linear.kind == twin.TRANSPOSED:
        return arguments | transposed.placement(layer)
    padding = "valid" if layer.padding == "causal" else layer.padding
    return arguments | {"padding": padding, "dilation": tuple(layer.dilation_rate)}


def causal_padding(layer: keras.layers.Layer) -> int:
    """The number of zeros that a causal convolution pads in front."""
    if getattr(layer, "padding", None) != "causal":
        return 0
    return layer.dilation_rate[0] * (layer.kernel_size[0] - 1)


@dataclasses.dataclass(frozen=True)
class PostTraining:
    """Post-training 8-bit weights, with the interface of `QuantizedTensor`."""

    latent: tf.Variable
    quantizer: LowBitQuantizer
    variables: dict[str, Any]
    bits: int = 8

    def codes(self) -> tf.Tensor:
        """Int32 codes."""
        return self.quantizer.codes(self.latent, self.variables)

    def quantized(self) -> tf.Tensor:
        """Dequantized weights."""
        return self.quantizer.quantize(self.latent, self.variables)


def eight_bits(
    layer: keras.layers.Layer, kernel: layer_registry.Kernel
) -> PostTraining:
    """Quantizes the weights of a float layer to 8 bits with a scale per channel."""
    quantizer = quantizers.UniformWeightQuantizer(
        bits=8, per_axis=True, channel_axes=kernel.channel_axes
    )
    variables = {"bits": np.int32(8)}
    return PostTraining(getattr(layer, kernel.attribute), quantizer, variables)
