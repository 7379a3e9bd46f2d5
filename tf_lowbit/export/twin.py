"""The layers of a snapped twin: a Keras model that computes what the file computes.

Tensors between them hold integer codes (zero points left out) in float32, so that
stock Keras layers that only move codes (pooling, padding, reshaping) work as they are.
Forward each layer gives the kernel's codes exactly; backward, rounding is passed
straight through, so that a twin can be fine-tuned. Its scales and biases are fixed.
"""

import fractions

import numpy as np

from tf_lowbit import quantizers
from tf_lowbit.compat import keras, tf
from tf_lowbit.export import kernels
from tf_lowbit.export.grids import Grid

# Kinds of integer layers.
CONV = "conv"
DEPTHWISE = "depthwise"
DENSE = "dense"
SCALE = "scale"
TRANSPOSED = "transposed"
# Above it float32 does not hold every integer.
EXACT_IN_FLOAT32 = 2**24


@tf.custom_gradient
def _straight_through(smooth, exact):
    """`exact` forward, the gradient of `smooth` backward."""

    def gradient(dy):
        return dy, tf.zeros_like(exact)

    return tf.identity(exact), gradient


class _Layer(keras.layers.Layer):
    """A layer with an output grid, in float32 under any policy."""

    def __init__(self, grid: Grid, name=None, **arguments):
        arguments["dtype"] = "float32"
        super().__init__(name=name, **arguments)
        self.grid = Grid(**grid) if isinstance(grid, dict) else grid

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "grid": self.grid.get_config()}


@keras.utils.register_keras_serializable(package="tf_lowbit")
class ToCodes(_Layer):
    """Values to codes: `round(clip(x / scale))`, as TFLite's QUANTIZE.

    Gradient: straight through within the grid's range, in codes.
    """

    def call(self, inputs):
        """Float tensor of any shape -> float32 codes of the same shape."""
        # XNNPACK multiplies with the float32 reciprocal.
        scaled = tf.cast(inputs, tf.float32) * (
            np.float32(1.0) / np.float32(self.grid.scale)
        )
        clipped = tf.clip_by_value(scaled, float(self.grid.low), float(self.grid.high))
        return _straight_through(clipped, tf.round(clipped))


@keras.utils.register_keras_serializable(package="tf_lowbit")
class ToValues(_Layer):
    """Codes to values: `code * scale`, as TFLite's DEQUANTIZE.

    Where the grid's scale is not its step, a multiplication follows.
    """

    @property
    def factor(self) -> float | None:
        """What the dequantized values are multiplied with; None for nothing."""
        if self.grid.scale == float(np.float32(self.grid.step)):
            return None
        return float(np.float32(self.grid.step / self.grid.scale))

    def call(self, inputs):
        """Float32 codes -> float32 values of the same shape."""
        values = inputs * np.float32(self.grid.scale)
        return values if self.factor is None else values * np.float32(self.factor)


@keras.utils.register_keras_serializable(package="tf_lowbit")
class IntegerAdd(_Layer):
    """`round(clip(a r_a + b r_b))` of two tensors of codes, as an int8 ADD.

    The ratios have odd denominators: no pair of codes is a tie.

    Args:
        grid: of the output.
        ratios: for both inputs the input's step divided by the output's, as
            `Fraction` or a pair (numerator, denominator).
    """

    def __init__(self, grid, ratios, name=None, **arguments):
        super().__init__(grid, name, **arguments)
        self.ratios = tuple(
            fractions.Fraction(*r) if isinstance(r, list | tuple) else r for r in ratios
        )

    def call(self, inputs):
        """Two float32 tensors of codes -> float32 codes of the same shape."""
        first, second = self.ratios
        common = first.denominator * second.denominator
        # Small integers: exact, and so is the quotient's distance from a tie.
        total = inputs[0] * float(first * common) + inputs[1] * float(second * common)
        smooth = tf.clip_by_value(
            total / float(common), float(self.grid.low), float(self.grid.high)
        )
        return _straight_through(smooth, tf.round(smooth))

    def get_config(self):
        """The constructor's arguments."""
        ratios = [[r.numerator, r.denominator] for r in self.ratios]
        return {**super().get_config(), "ratios": ratios}


@keras.utils.register_keras_serializable(package="tf_lowbit")
class IntegerLinear(_Layer):
    """A convolution or dense layer of codes, and the kernel's way back to codes.

    `A = sum(code * weight code)`, `acc = u A + bias`, `round(clip(acc M))`, where
    `M = s_in s_w / s_out` for each output channel (`kernels`).

    Gradients: straight through the roundings, 0 where the output clips. The latent
    weights are trained where there are any; scales, biases and signs are fixed.

    Args:
        grid: of the output.
        kind: "conv", "depthwise", "dense", "transposed" or "scale" (one weight a
            channel).
        kernel_shape: of the latent weights, as Keras has it; of a convolution in groups
            with the inputs of one group.
        quantizer: of the weights, or its serialized dict; None where the latent
            weights are fixed codes.
        quantizer_state: names and shapes of the quantizer's variables.
        input_grid: of the input.
        upscale: u.
        strides: of the window.
        padding: "valid" or "same".
        dilation: of the window.
        kernel: whose arithmetic it is, "xnnpack" or "builtin".
        storage: "int8" or "int4", how the file holds the weights.
        represents: name of the trained network's tensor that is put out here.
        before: of a transposed convolution: rows and columns that are cut off in front.
        excess: of one: rows and columns of the output beyond stride times input.
    """

    def __init__(
        self,
        grid,
        kind,
        kernel_shape,
        quantizer,
        quantizer_state,
        input_grid,
        upscale,
        strides=(1, 1),
        padding="valid",
        dilation=(1, 1),
        kernel=kernels.XNNPACK,
        storage="int8",
        represents="",
        before=(0, 0),
        excess=(0, 0),
        name=None,
        **arguments,
    ):
        super().__init__(grid, name, **arguments)
        self.kind = kind
        self.kernel_shape = tuple(kernel_shape)
        self.quantizer = quantizer and quantizers.get(quantizer, quantizers.WEIGHT)
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

    def build(self, input_shape):
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

    def codes(self):
        """The weight codes, signs in: float32 integers of the latent weights' shape.

        The gradient is that of the quantizer.
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

    def accumulate(self, inputs, codes):
        """`A`: exact integers in the dtype of the arguments."""
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
        # Of one row, any stride along the height takes that row.
        strides = self.strides * 2 if is_1d else self.strides
        dilation = window(self.dilation)
        padding = self.padding.upper()
        channels = inputs.shape[-1]
        is_grouped = self.kind == CONV and channels != codes.shape[-2]
        # Groups of one channel are the same, in the same order.
        is_by_channel = codes.shape[-2] == 1 and strides[0] == strides[1]
        if self.kind == DEPTHWISE or (is_grouped and is_by_channel):
            codes = tf.reshape(codes, (*codes.shape[:2], channels, -1))
            # TensorFlow has no unequal strides here. Only pooling has, always "valid".
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
        """All products, each at its place; cut and filled up to the output's size."""
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
        total = tf.nn.conv2d_transpose(
            inputs,
            codes,
            tf.stack([batch, *whole, self.channels]),
            self.strides,
            "VALID",
        )
        (top, left), (bottom, right) = self.before, ends
        return total[:, top:bottom, left:right]

    # On CPUs only XLA has the gradient of these; Keras's own layer does so, too.
    @tf.function(jit_compile=True)
    def _accumulate_groups(self, inputs, codes):
        return tf.nn.conv2d(
            inputs,
            codes,
            window(self.strides),
            self.padding.upper(),
            dilations=window(self.dilation),
        )

    def set_constants(self, affine, latent, signs, quantizer_variables) -> None:
        """Sets everything that is fixed, and the latent weights' start.

        Args:
            affine: `thresholds.Affine`.
            latent: the latent weights, or the codes where there is no quantizer.
            signs: -1, 0 or 1 for each output channel; multiplies the codes.
            quantizer_variables: name -> value.
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

    def call(self, inputs):
        """Float32 codes -> float32 codes."""
        return self._outputs(inputs)

    # Nothing in it needs AutoGraph, and converting it makes tracing slower.
    @tf.autograph.experimental.do_not_convert
    def _outputs(self, inputs):
        codes = self.codes()
        # Every partial sum must be exact, whatever the order of summation.
        dtype = tf.float32
        if self.largest_sum() >= EXACT_IN_FLOAT32:
            dtype = tf.float64
        total = self.accumulate(tf.cast(inputs, dtype), tf.cast(codes, dtype))
        accumulators = tf.cast(total, tf.float64) * self.upscale
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
        # The real M, of which the kernel's is a rounding.
        slope = tf.convert_to_tensor(self.weight_scales) * np.float32(
            self.input_grid.scale / self.grid.scale
        )
        smooth = tf.cast(accumulators, tf.float32) * slope
        smooth = tf.clip_by_value(smooth, float(low), float(high))
        return _straight_through(smooth, tf.stop_gradient(exact))

    def get_config(self):
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


@keras.utils.register_keras_serializable(package="tf_lowbit")
class EdgePadding(keras.layers.Layer):
    """Mirrors the borders of images outwards, with the edge itself: `a b` -> `a a b b`.

    Args:
        padding: rows and columns at each border, as (rows, columns).
    """

    def __init__(self, padding, name=None, **arguments):
        arguments["dtype"] = "float32"
        super().__init__(name=name, **arguments)
        self.padding = tuple(padding)

    def call(self, inputs):
        """(batch, height, width, channels), larger by twice the padding."""
        sides = [(n, n) for n in (0, *self.padding, 0)]
        return tf.pad(inputs, sides, "SYMMETRIC")

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "padding": list(self.padding)}


@keras.utils.register_keras_serializable(package="tf_lowbit")
class Affine(keras.layers.Layer):
    """`gain x + offset` for each channel, in float32: a folded batch normalisation."""

    def __init__(self, name=None, **arguments):
        arguments["dtype"] = "float32"
        super().__init__(name=name, **arguments)

    def build(self, input_shape):
        """Makes gain and offset."""
        self.gain = self.add_weight("gain", (input_shape[-1],), initializer="ones")
        self.offset = self.add_weight("offset", (input_shape[-1],))
        super().build(input_shape)

    def call(self, inputs):
        """Float32 tensor -> float32 tensor of the same shape."""
        return inputs * self.gain + self.offset


def rounds_away(kind: str, channels: int) -> np.ndarray:
    """`kernels.rounds_away` of a kind of layer."""
    return kernels.rounds_away(kind in (DEPTHWISE, SCALE), channels)


def channel_axes(kind: str) -> tuple[int, ...]:
    """The axes of a kind's weights that are output channels, from behind."""
    return {DEPTHWISE: (-2, -1), TRANSPOSED: (-2,)}.get(kind, (-1,))


def channel_shape(kind: str, kernel_shape) -> tuple[int, ...]:
    """The shape in which a vector of the output channels multiplies the weights."""
    axes = channel_axes(kind)
    return tuple(
        kernel_shape[axis] if axis in axes else 1 for axis in range(min(axes), 0)
    )


def window(sizes) -> tuple[int, int]:
    """Strides or dilations in two dimensions, of one or two."""
    return (1, *sizes) if len(sizes) == 1 else tuple(sizes)


def input_names(model: keras.Model) -> list[str]:
    """Names of a model's inputs, in its order."""
    return [tensor._keras_history.layer.name for tensor in model.inputs]


def integer_layers(model: keras.Model) -> list[IntegerLinear]:
    """The integer layers of a twin, in its layers' order."""
    return [layer for layer in model.layers if isinstance(layer, IntegerLinear)]
