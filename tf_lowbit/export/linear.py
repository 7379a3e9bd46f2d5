"""Linear layers on their way from Keras to integers: codes, bounds, geometry."""

import dataclasses

import numpy as np

from tf_lowbit import quantizers
from tf_lowbit.export import transposed, twin
from tf_lowbit.scheme import registry


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer that has no form in a file.

    Attributes:
        layer: its name.
        type: name of its class.
        reason: what a layer must be, and this one is not.
        remedy: what to do.
        received: what this one is.
    """

    layer: str
    type: str
    reason: str
    remedy: str
    received: str

    def __str__(self):
        return f"{self.reason}: {self.remedy}. Received: {self.layer!r} {self.received}"


class ExportError(ValueError):
    """A network, or a layer of it, that has no form in a file.

    Args:
        message: text, or the `Problem` of one layer.

    Attributes:
        problem: the layer's `Problem`; None where it is not one layer's.
    """

    def __init__(self, message):
        super().__init__(str(message))
        self.problem = message if isinstance(message, Problem) else None


def refusal(layer, reason: str, remedy: str, received: str = "") -> ExportError:
    """The error that names a layer without a form.

    Args:
        layer: of the trained network, unwrapped.
        reason: what must be, as the start of a sentence.
        remedy: what to do, as its end.
        received: what the layer is; its type where nothing is said.
    """
    kind = type(layer).__name__
    received = received or f"of type {kind}"
    return ExportError(Problem(layer.name, kind, reason, remedy, received))


@dataclasses.dataclass
class Linear:
    """A linear layer whose output grid is still open.

    Attributes:
        kind: of `twin`.
        layer: the trained layer, unwrapped; None where there is none of its own.
        weights: its quantizer with variables; None for float weights.
        source: what it reads.
        gain: float64, a channel: from the layer's own output to the value.
        offset: float64, likewise.
        relu: None, "relu" or "relu6" behind it.
        is_integer: whether it can read and put out codes.
        taps: the fixed integers of a pooling's or an interpolation's window, shaped as
            the layer's weights would be; else None.
        strides: of such a window.
    """

    kind: str
    layer: object
    weights: object
    source: object
    gain: np.ndarray
    offset: np.ndarray
    relu: str | None = None
    is_integer: bool = True
    taps: np.ndarray | None = None
    strides: tuple[int, ...] = (1, 1)


def per_channel(linear, values):
    """Values of output channels, shaped to multiply the latent weights."""
    return values.reshape(twin.channel_shape(linear.kind, latent_shape(linear)))


def latent_shape(linear) -> tuple[int, ...]:
    """The shape of a linear layer's weights, as Keras has it."""
    if linear.weights is not None:
        return tuple(linear.weights.latent.shape)
    if linear.kind == twin.SCALE:
        return (len(linear.gain),)
    if linear.taps is not None:
        return linear.taps.shape
    (kernel,) = registry.kernels(linear.layer)
    return tuple(getattr(linear.layer, kernel.attribute).shape)


def weights(linear):
    """Codes, step a channel, latent weights, quantizer and its variables' values."""
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


def largest_code(linear, codes) -> int:
    """The largest magnitude of a code that the weights' grid has."""
    most = int(np.abs(codes).max(initial=1))
    if linear.weights is not None:
        bits = linear.weights.bits
        levels = linear.weights.quantizer.level_codes(bits)
        # -128 only if it is used: 8 bits without it are int8's -127..127.
        most = max(most, levels[-1], -levels[0] if bits < 8 else 1)
    if most > 127:
        raise ExportError(
            "Weight codes must lie in [-127, 127], what int8 weights hold. The odd "
            "grid of DoReFa and StatsQ does up to 7 bits; at 8 use 'uniform', or 'lsq' "
            "with narrow_range=True. "
            f"Received: {linear.layer.name!r}, codes up to {most}"
        )
    return most


def bounds(kind, codes, grid):
    """The smallest and the largest accumulator of each channel, over all inputs."""
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


def check_accumulator(name, smallest, largest, upscale) -> None:
    """Refuses a layer whose accumulator could leave int32.

    Raises:
        ExportError: naming the layer.
    """
    most = upscale * max(np.abs(smallest).max(), np.abs(largest).max())
    if most >= 2**30:
        raise ExportError(
            "Accumulators must stay below 2^30. "
            f"Received: {name}, which can reach {most}"
        )


def window(linear) -> dict:
    """Strides, padding and dilation, as arguments of the twin's layer.

    A causal convolution reads codes that are padded before it: `causal_padding`.
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


def causal_padding(layer) -> int:
    """How many zeros stand before the steps that a layer reads."""
    if getattr(layer, "padding", None) != "causal":
        return 0
    return layer.dilation_rate[0] * (layer.kernel_size[0] - 1)


@dataclasses.dataclass(frozen=True)
class PostTraining:
    """8-bit weights for a layer that was trained in float."""

    latent: object
    quantizer: object
    variables: dict
    bits: int = 8

    def codes(self):
        """Int32 codes."""
        return self.quantizer.codes(self.latent, self.variables)

    def quantized(self):
        """Their values."""
        return self.quantizer.quantize(self.latent, self.variables)


def eight_bits(layer, kernel) -> PostTraining:
    """8-bit weights, a scale for each channel, of a layer that was trained in float."""
    quantizer = quantizers.UniformWeightQuantizer(
        bits=8, per_axis=True, channel_axes=kernel.channel_axes
    )
    variables = {"bits": np.int32(8)}
    return PostTraining(getattr(layer, kernel.attribute), quantizer, variables)
