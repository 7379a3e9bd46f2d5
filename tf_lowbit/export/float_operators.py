"""Layers of a twin that compute with floats, as operators of a TFLite file."""

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.export import forms, transposed, twin
from tf_lowbit.export.flatbuffer import schema
from tf_lowbit.export.operators import (
    OperatorWriter,
    copies,
    is_transposed,
    linear_options,
    oriented,
)

_layers = keras.layers
_ACTIVATIONS = {
    "gelu": "GELU",
    "relu": "RELU",
    "relu6": "RELU6",
    "sigmoid": "LOGISTIC",
    "softmax": "SOFTMAX",
    "tanh": "TANH",
}


class FloatWriter(OperatorWriter):
    """Writes float layers: each method takes (layer, sources, node).

    Sources are tensors as in `OperatorWriter`; so is what comes back.
    """

    def linear(self, layer, sources, node):
        """A convolution or a dense layer."""
        ((index, _),) = sources
        kernel, bias = (np.asarray(w, np.float32) for w in layer.get_weights())
        (inputs,) = node.keras_inputs
        kind = forms.KINDS[type(layer)]
        if is_transposed(layer):
            kernel = transposed.plain_kernel(kernel, *transposed.axes(layer))
        kernel, name, _ = oriented(kind, kernel)
        kernel = self.file.constant(f"{layer.name}/weights", kernel)
        bias = np.tile(bias, copies(layer))
        bias = self.file.constant(f"{layer.name}/bias", bias)
        rank = len(inputs.shape)

        def add(index, output, shape, padding):
            result = self.like(output, shape, None)
            options = linear_options(layer, name, 0, rank, padding)
            self.operator(name, [index, kernel, bias], [result], options)
            return result

        shapes = inputs.shape, node.output_shapes
        return self.around(layer, name, index, (None, None), shapes, add), None

    def affine(self, layer, sources, node):
        """A gain and an offset for each channel."""
        ((index, _),) = sources
        shape = node.output_shapes
        gain, offset = layer.get_weights()
        gain = self.file.constant(f"{layer.name}/gain", gain)
        offset = self.file.constant(f"{layer.name}/offset", offset)
        scaled = self.file.activation(f"{layer.name}/scaled", shape, np.float32)
        result = self.file.activation(layer.name, shape, np.float32)
        self.operator("MUL", [index, gain], [scaled], schema.MulOptionsT())
        self.operator("ADD", [scaled, offset], [result], schema.AddOptionsT())
        return result, None

    def relu(self, layer, sources, node):
        """A ReLU or a ReLU6."""
        ((index, _),) = sources
        result = self.file.activation(layer.name, node.output_shapes, np.float32)
        self.operator("RELU6" if layer.max_value else "RELU", [index], [result])
        return result, None

    def activation(self, layer, sources, node):
        """An activation by its name."""
        ((index, _),) = sources
        kind = keras.activations.serialize(layer.activation)
        if kind == "linear":
            return index, None
        if kind == "swish":
            return self._swish(layer, index, node.output_shapes), None
        result = self.file.activation(layer.name, node.output_shapes, np.float32)
        options = {
            "gelu": schema.GeluOptionsT(False),
            "softmax": schema.SoftmaxOptionsT(1.0),
        }.get(kind)
        self.operator(_ACTIVATIONS[kind], [index], [result], options)
        return result, None

    def _swish(self, layer, index, shape) -> int:
        gate = self.file.activation(f"{layer.name}/sigmoid", shape, np.float32)
        result = self.file.activation(layer.name, shape, np.float32)
        self.operator("LOGISTIC", [index], [gate])
        self.operator("MUL", [index, gate], [result], schema.MulOptionsT())
        return result

    def mean(self, layer, sources, node):
        """The average over steps, or over height and width."""
        ((index, _),) = sources
        rank = len(node.keras_inputs[0].shape)
        axes = np.arange(1, rank - 1, dtype=np.int32)
        axes = self.file.constant(f"{layer.name}/axes", axes)
        result = self.file.activation(layer.name, node.output_shapes, np.float32)
        options = schema.ReducerOptionsT(bool(layer.keepdims))
        self.operator("MEAN", [index, axes], [result], options)
        return result, None

    def add(self, layer, sources, node):
        """A sum."""
        return self._joined("ADD", schema.AddOptionsT, layer, sources, node)

    def multiply(self, layer, sources, node):
        """A product."""
        return self._joined("MUL", schema.MulOptionsT, layer, sources, node)

    def _joined(self, operator, options, layer, sources, node):
        """Two tensors become one, which is joined with the next."""
        total, shape = sources[0][0], node.keras_inputs[0].shape
        for position, (index, _) in enumerate(sources[1:], start=1):
            is_last = position == len(sources) - 1
            name = layer.name if is_last else f"{layer.name}/part{position}"
            shape = tf.broadcast_static_shape(shape, node.keras_inputs[position].shape)
            result = self.file.activation(name, shape, np.float32)
            self.operator(operator, [total, index], [result], options())
            total = result
        return total, None

    def leaky_relu(self, layer, sources, node):
        """A ReLU with a fixed slope below 0."""
        ((index, _),) = sources
        result = self.like(layer.name, node.output_shapes, None)
        options = schema.LeakyReluOptionsT(float(layer.alpha))
        self.operator("LEAKY_RELU", [index], [result], options)
        return result, None

    def prelu(self, layer, sources, node):
        """A ReLU with learned slopes below 0."""
        ((index, _),) = sources
        alpha = self.file.constant(f"{layer.name}/alpha", layer.alpha.numpy())
        result = self.like(layer.name, node.output_shapes, None)
        self.operator("PRELU", [index, alpha], [result])
        return result, None

    def layer_norm(self, layer, sources, node):
        """Mean and variance over the last axis, then a gain and an offset."""
        ((index, _),) = sources
        shape = tuple(node.output_shapes)
        reduced = (*shape[:-1], 1)
        axis = self.file.constant(
            f"{layer.name}/axis", np.array([len(shape) - 1], np.int32)
        )
        epsilon = np.array([layer.epsilon], np.float32)
        epsilon = self.file.constant(f"{layer.name}/epsilon", epsilon)

        def made(name, part, size, inputs, options=None):
            result = self.like(f"{layer.name}/{part}", size, None)
            self.operator(name, inputs, [result], options)
            return result

        mean_options, mul = schema.ReducerOptionsT(True), schema.MulOptionsT
        mean = made("MEAN", "mean", reduced, [index, axis], mean_options)
        centred = made("SUB", "centred", shape, [index, mean], schema.SubOptionsT())
        squares = made("MUL", "squares", shape, [centred, centred], mul())
        variance = made("MEAN", "variance", reduced, [squares, axis], mean_options)
        variance = made(
            "ADD", "above_zero", reduced, [variance, epsilon], schema.AddOptionsT()
        )
        inverse = made("RSQRT", "inverse", reduced, [variance])
        last = made("MUL", "normal", shape, [centred, inverse], mul())
        gain = self.file.constant(f"{layer.name}/gain", layer.gamma.numpy())
        last = made("MUL", "scaled", shape, [last, gain], mul())
        offset = self.file.constant(f"{layer.name}/offset", layer.beta.numpy())
        result = self.like(layer.name, shape, None)
        self.operator("ADD", [last, offset], [result], schema.AddOptionsT())
        return result, None


FLOAT_METHODS = {
    twin.Affine: FloatWriter.affine,
    _layers.Activation: FloatWriter.activation,
    _layers.Add: FloatWriter.add,
    **dict.fromkeys(forms.KINDS, FloatWriter.linear),
    _layers.GlobalAveragePooling1D: FloatWriter.mean,
    _layers.GlobalAveragePooling2D: FloatWriter.mean,
    _layers.LayerNormalization: FloatWriter.layer_norm,
    _layers.LeakyReLU: FloatWriter.leaky_relu,
    _layers.Multiply: FloatWriter.multiply,
    _layers.PReLU: FloatWriter.prelu,
    _layers.ReLU: FloatWriter.relu,
}
