"""Layers of the integer model (twin), a Keras model that computes what the file does.

Tensors between the layers hold integer codes without zero points in float32, so that
stock Keras layers which only move codes (pooling, padding, reshaping) can be used. The
forward pass gives exactly the kernel's codes. The backward pass uses straight-through
gradients, so that a twin can be fine-tuned. Its scales and biases are fixed.
"""

import fractions
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tf_lowbit import quantizers
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import kernels, thresholds
from tf_lowbit.export.integer.int8_grids import Grid

# Kinds of integer layers.
CONV = "conv"
DEPTHWISE = "depthwise"
DENSE = "dense"
SCALE = "scale"
TRANSPOSED = "transposed"
# Above this, float32 does not hold every integer.
_EXACT_IN_FLOAT32 = 2**24


@tf.custom_gradient
def _straight_through(smooth, exact):
    """`exact` forward, the gradient of `smooth` backward."""

    def gradient(dy):
        return dy, tf.zeros_like(exact)

    return tf.identity(exact), gradient


class _Layer(keras.layers.Layer):
    """A layer with an output grid, in float32 under any dtype policy."""

    def __init__(self, grid: Grid, name=None, **arguments):
        arguments["dtype"] = "float32"
        super().__init__(name=name, **arguments)
        self.grid = Grid(**grid) if isinstance(grid, dict) else grid

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "grid": self.grid.get_config()}


@keras.utils.register_keras_serializable(package="tf_lowbit")
class ToCodes(_Layer):
    """Quantizes values to codes by `round(clip(x / scale))`, as TFLite's QUANTIZE.

    Gradient: straight-through within the grid's range, 0 outside.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Float tensor of any shape -> float32 codes of the same shape."""
        # XNNPACK multiplies by the float32 reciprocal.
        scaled = tf.cast(inputs, tf.float32) * (
            np.float32(1.0) / np.float32(self.grid.scale)
        )
        clipped = tf.clip_by_value(scaled, float(self.grid.low), float(self.grid.high))
        return _straight_through(clipped, tf.round(clipped))


@keras.utils.register_keras_serializable(package="tf_lowbit")
class ToValues(_Layer):
    """Dequantizes codes by `code * scale`, as TFLite's DEQUANTIZE.

    If the grid's scale is not its step, a multiplication by `factor` follows.
    """

    @property
    def factor(self) -> float | None:
        """The factor of the dequantized values, or None."""
        if self.grid.scale == float(np.float32(self.grid.step)):
            return None
        return float(np.float32(self.grid.step / self.grid.scale))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Float32 codes -> float32 values of the same shape."""
        values = inputs * np.float32(self.grid.scale)
        return values if self.factor is None else values * np.float32(self.factor)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class IntegerAdd(_Layer):
    """Adds two tensors of codes by `round(clip(a r_a + b r_b))`, as an int8 ADD.

    The ratios have odd denominators, so no pair of codes is a tie.

    Args:
        grid: Grid of the output.
        ratios: Step of each input divided by the step of the output, as `Fraction` or
            pair (numerator, denominator).
    """

    def __init__(
        self,
        grid: Grid,
        ratios: Sequence[fractions.Fraction | list[int] | tuple[int, int]],
        name: str | None = None,
        **arguments: Any,
    ):
        super().__init__(grid, name, **arguments)
        self.ratios = tuple(
            fractions.Fraction(*r) if isinstance(r, list | tuple) else r for r in ratios
        )

    def call(self, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        """Two float32 tensors of codes -> float32 codes of the same shape."""
        first, second = self.ratios
        common = first.denominator * second.denominator
        # The integers are small, so sums are exact, and no quotient rounds to a tie.
        total = inputs[0] * float(first * common) + inputs[1] * float(second * common)
        smooth = tf.clip_by_value(
            total / float(common), float(self.grid.low), float(self.grid.high)
        )
        return _straight_through(smooth, tf.round(smooth))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        ratios = [[r.numerator, r.denominator] for r in self.ratios]
        return {**super().get_config(), "ratios": ratios}


@keras.utils.register_keras_serializable(package="tf_lowbit")
class IntegerLinear(_Layer):
    """A convolution or dense layer of codes, with requantization to codes.

    `A = sum(code * weight code)`, `acc = u A + bias`, `round(clip(acc M))`, where
    `M = s_in s_w / s_out` per output channel (`kernels`).

    Gradients: straight-through for the roundings, 0 where the output clips. Latent
    weights are trainable if they have a quantizer; scales, biases and signs are fixed.

    Args:
        grid: Grid of the output.
        kind: "conv", "depthwise", "dense", "transposed" or "scale" (one weight per
            channel).
        kernel_shape: Shape of the latent weights in Keras's layout; a grouped
            convolution counts the inputs of one group.
        quantizer: Quantizer of the weights, or its serialized dict; None if the latent
            weights are fixed codes.
        quantizer_state: Name -> shape of the quantizer's variables.
        input_grid: Grid of the input.
        upscale: u.
        strides: Strides of the window.
        padding: "valid" or "same".
        dilation: Dilation of the window.
        kernel: Kernel whose arithmetic it computes, "xnnpack", "builtin" or "tflm".
        storage: "int8" or "int4", the type of the file's weights.
        represents: Name of the trained network's tensor that it outputs.
        before: For a transposed convolution, rows and columns cut off in front.
        excess: For a transposed convolution, rows and columns of the output beyond
            stride times input.
    """

    def __init__(
        self,
        grid: Grid,
        kind: str,
        kernel_shape: Sequence[int],
        quantizer: quantizers.LowBitQuantizer | dict[str, Any] | None,
        quantizer_state: Mapping[str, Sequence[int]],
        input_grid: Grid,
        upscale: int,
        strides: Sequence[int] = (1, 1),
        padding: str = "valid",
        dilation: Sequence[int] = (1, 1),
        kernel: str = kernels.XNNPACK,
        storage: str = "int8",
        represents: str = "",
        before: Sequence[int] = (0, 0),
        excess: Sequence[int] = (0, 0),
        name: str | None = None,
        **arguments: Any,
    ):
        super().__init__(grid, name, **arguments)
        self.kind = kind
        self.kernel_shape = tuple(kernel_shape)
        self.quantizer = (
            quantizers.get(quantizer, quantizers.WEIGHT) if quantizer else None
        )
        self.quantizer_state = {k: list(v) for k, v in quantizer_state.items()}
        self.input_grid = (
            Grid(**input_grid) if isinstance(input_grid, dict) else input_grid
        )
        self.upscale = upscale
        self.strides = tuple(strides)
        self.padding = padding
        self.dilation = tuple(dilation)
        self.kernel = kernel
        self.storage = storage
        self.represents = represents
        self.before = tuple(before)
        self.excess = tuple(excess)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return int(np.prod(channel_shape(self.kind, self.kernel_shape)))

    def build(self, input_shape: tf.TensorShape) -> tf.Tensor:
        """Makes the latent weights and all constants."""
        self.latent = self.add_weight(
            "latent", self.kernel_shape, trainable=self.quantizer is not None
        )
        self.quantizer_variables = {
            name: self.add_weight(
                f"quantizer_{name}",
                shape,
                dtype=tf.int32 if name in ("bits", "calibrated") else tf.float32,
                trainable=False,
            )
            for name, shape in self.quantizer_state.items()
        }
        constant = {"shape": (self.channels,), "trainable": False}
        self.signs = self.add_weight("signs", **constant)
        self.weight_scales = self.add_weight("weight_scales", **constant)
        is_float = self.kernel == kernels.XNNPACK
        self.multipliers = self.add_weight(
            "multipliers",
            (self.channels,) if is_float else (2, self.channels),
            dtype=tf.float32 if is_float else tf.int64,
            trainable=False,
        )
        self.biases = self.add_weight("biases", dtype=tf.int32, **constant)
        self.thresholds = self.add_weight(
            "thresholds",
            (self.channels, self.grid.high - self.grid.low),
            dtype=tf.int32,
            trainable=False,
        )
        super().build(input_shape)

    def codes(self) -> tf.Tensor:
        """The signed weight codes: float32 integers of the latent weights' shape.

        The gradient is the quantizer's.
        """
        codes = self.latent
        if self.quantizer is not None:
            variables = {
                k: tf.convert_to_tensor(v) for k, v in self.quantizer_variables.items()
            }
            values = self.quantizer.quantize(self.latent, variables)
            step = tf.stop_gradient(self.quantizer.step(self.latent, variables))
            smooth = values / step
            codes = _straight_through(smooth, tf.round(smooth))
        shape = channel_shape(self.kind, self.kernel_shape)
        return codes * tf.reshape(tf.convert_to_tensor(self.signs), shape)

    def accumulate(self, inputs: tf.Tensor) -> tf.Tensor:
        """The accumulators `A`: exact integers, in float32 or float64."""
        # Every partial sum must be exact, whatever the order of summation.
        is_small = self.largest_sum() < _EXACT_IN_FLOAT32
        dtype = tf.float32 if is_small else tf.float64
        inputs, codes = tf.cast(inputs, dtype), tf.cast(self.codes(), dtype)
        if self.kind == SCALE:
            return inputs * codes
        if self.kind == DENSE:
            return tf.linalg.matmul(inputs, codes)
        if self.kind == TRANSPOSED:
            return self._accumulate_transposed(inputs, codes)
        is_1d = len(inputs.shape) == 3
        if is_1d:
            inputs = inputs[:, tf.newaxis]
            codes = codes[tf.newaxis]
        # With one row, any stride along the height takes that row.
        strides = self.strides * 2 if is_1d else self.strides
        dilation = window(self.dilation)
        padding = self.padding.upper()
        channels = inputs.shape[-1]
        is_grouped = self.kind == CONV and channels != codes.shape[-2]
        # Groups of one channel are a depthwise convolution, with the same order.
        is_by_channel = codes.shape[-2] == 1 and strides[0] == strides[1]
        if self.kind == DEPTHWISE or (is_grouped and is_by_channel):
            codes = tf.reshape(codes, (*codes.shape[:2], channels, -1))
            # TensorFlow has no unequal strides here. Only pooling needs them, always
            # with padding "valid".
            skipped = (1, 1) if strides[0] == strides[1] else strides
            strides = strides if skipped == (1, 1) else (1, 1)
            result = tf.nn.depthwise_conv2d(
                inputs, codes, [1, *strides, 1], padding, dilations=dilation
            )[:, :: skipped[0], :: skipped[1]]
        elif is_grouped:
            result = self._accumulate_groups(inputs, codes)
        else:
            result = tf.nn.conv2d(inputs, codes, strides, padding, dilations=dilation)
        return result[:, 0] if is_1d else result

    def _accumulate_transposed(self, inputs, codes):
        """The transposed convolution, cropped or filled up to the output's size."""
        batch, *open_sizes = tf.unstack(tf.shape(inputs)[:3])
        sizes = [a or b for a, b in zip(inputs.shape[1:3], open_sizes, strict=True)]
        places = zip(
            sizes, self.strides, self.before, self.excess, codes.shape, strict=False
        )
        ends, whole = [], []
        for size, stride, before, excess, kernel in places:
            ends.append(before + stride * size + excess)
            most = max if isinstance(size, int) else tf.maximum
            whole.append(most((size - 1) * stride + kernel, ends[-1]))
        shape = tf.stack([batch, *whole, self.channels])
        total = tf.nn.conv2d_transpose(inputs, codes, shape, self.strides, "VALID")
        (top, left), (bottom, right) = self.before, ends
        return total[:, top:bottom, left:right]

    # On CPUs only XLA has the gradient of grouped convolutions; Keras uses it, too.
    @tf.function(jit_compile=True)
    def _accumulate_groups(self, inputs, codes):
        strides, dilation = window(self.strides), window(self.dilation)
        padding = self.padding.upper()
        return tf.nn.conv2d(inputs, codes, strides, padding, dilations=dilation)

    def set_constants(
        self,
        affine: thresholds.Affine,
        latent: np.ndarray,
        signs: np.ndarray,
        quantizer_variables: Mapping[str, np.ndarray],
    ) -> None:
        """Sets all constants and the initial latent weights.

        Args:
            affine: Constants of the requantization.
            latent: The latent weights, or the codes if there is no quantizer.
            signs: [channels], -1, 0 or 1, multiplies the codes.
            quantizer_variables: Name -> value.
        """
        self.latent.assign(latent)
        for name, value in quantizer_variables.items():
            self.quantizer_variables[name].assign(value)
        self.signs.assign(signs)
        self.weight_scales.assign(affine.weight_scales)
        self.biases.assign(affine.biases)
        self.thresholds.assign(affine.thresholds)
        multipliers = kernels.multiplier(
            self.kernel, self.input_grid.scale, affine.weight_scales, self.grid.scale
        )
        self.multipliers.assign(kernels.stored(self.kernel, multipliers))

    def largest_sum(self) -> int:
        """A bound on `|A|` that holds for any weight codes."""
        terms = int(np.prod(self.kernel_shape)) // self.channels
        most = 127 // self.upscale
        return terms * most * max(-self.input_grid.low, self.input_grid.high)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Float32 codes -> float32 codes."""
        return self._outputs(inputs)

    # It does not need AutoGraph, whose conversion makes tracing slower.
    @tf.autograph.experimental.do_not_convert
    def _outputs(self, inputs):
        accumulators = tf.cast(self.accumulate(inputs), tf.float64) * self.upscale
        accumulators += tf.cast(self.biases, tf.float64)
        low, high = self.grid.low, self.grid.high
        exact = kernels.requantize_tensor(
            self.kernel,
            accumulators,
            tf.convert_to_tensor(self.multipliers),
            low,
            high,
            rounds_away(self.kind, self.channels),
        )
        # M before the kernel rounds it.
        slope = tf.convert_to_tensor(self.weight_scales) * np.float32(
            self.input_grid.scale / self.grid.scale
        )
        smooth = tf.cast(accumulators, tf.float32) * slope
        smooth = tf.clip_by_value(smooth, float(low), float(high))
        return _straight_through(smooth, tf.stop_gradient(exact))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        quantizer = self.quantizer and quantizers.serialize(self.quantizer)
        return {
            **super().get_config(),
            "kind": self.kind,
            "kernel_shape": list(self.kernel_shape),
            "quantizer": quantizer,
            "quantizer_state": self.quantizer_state,
            "input_grid": self.input_grid.get_config(),
            "upscale": self.upscale,
            "strides": list(self.strides),
            "padding": self.padding,
            "dilation": list(self.dilation),
            "kernel": self.kernel,
            "storage": self.storage,
            "represents": self.represents,
            "before": list(self.before),
            "excess": list(self.excess),
        }


def rounds_away(kind: str, channels: int) -> np.ndarray:
    """`kernels.rounds_away` for a kind of layer."""
    return kernels.rounds_away(kind in (DEPTHWISE, SCALE), channels)


def channel_axes(kind: str) -> tuple[int, ...]:
    """The axes of a kind's weights that are output channels, as negative numbers."""
    return {DEPTHWISE: (-2, -1), TRANSPOSED: (-2,)}.get(kind, (-1,))


def channel_shape(kind: str, kernel_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which a vector [channels] broadcasts over the weights."""
    axes = channel_axes(kind)
    return tuple(
        kernel_shape[axis] if axis in axes else 1 for axis in range(min(axes), 0)
    )


def window(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides or dilations in two dimensions, from one or two."""
    return (1, *sizes) if len(sizes) == 1 else tuple(sizes)


def input_names(model: keras.Model) -> list[str]:
    """Names of a model's inputs, in the model's order."""
    return [tensor._keras_history.layer.name for tensor in model.inputs]


def integer_layers(model: keras.Model) -> list[IntegerLinear]:
    """The integer layers of a twin, in the order of its layers."""
    return [layer for layer in model.layers if isinstance(layer, IntegerLinear)]
