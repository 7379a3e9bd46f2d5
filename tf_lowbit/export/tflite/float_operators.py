"""Functions that write float layers of a twin as TFLite operators.

A function takes (writer, layer, sources, node), as in `layers`.
"""

import numpy as np

from tf_lowbit.compat import Node, keras, tf
from tf_lowbit.export import layer_table
from tf_lowbit.export.integer import transposed, twin
from tf_lowbit.export.lowering import elementwise
from tf_lowbit.export.tflite.flatbuffer import schema
from tf_lowbit.export.tflite.operators import (
    Layer,
    Source,
    Sources,
    copies,
    is_transposed,
    oriented,
)
from tf_lowbit.export.tflite.operators import OperatorWriter as Writer

_layers = keras.layers


def linear(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a convolution or a dense layer."""
    (source,) = sources
    kernel, bias = (np.asarray(w, np.float32) for w in layer.get_weights())
    if is_transposed(layer):
        kernel = transposed.plain_kernel(kernel, *transposed.axes(layer))
    kernel, name, _ = oriented(layer_table.kind_of(layer), kernel)
    weights = writer.shared(f"{layer.name}/weights", kernel)
    biases = writer.shared(f"{layer.name}/bias", np.tile(bias, copies(layer)))
    return writer.add_linear(layer, name, source, (weights, biases), node)


def affine(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a gain and an offset per channel."""
    ((index, _),) = sources
    shape = node.output_shapes
    gain, offset = layer.get_weights()
    gain = writer.file.constant(f"{layer.name}/gain", gain)
    offset = writer.file.constant(f"{layer.name}/offset", offset)
    mul, add = schema.MulOptionsT(), schema.AddOptionsT()
    scaled = f"{layer.name}/scaled"
    index = writer.made("MUL", [index, gain], scaled, shape, options=mul)
    return writer.made("ADD", [index, offset], layer.name, shape, options=add), None


def relu(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a ReLU or a ReLU6."""
    ((index, _),) = sources
    name = "RELU6" if layer.max_value else "RELU"
    return writer.made(name, [index], layer.name, node.output_shapes), None


def activation(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes an activation, by its name."""
    ((index, _),) = sources
    kind = keras.activations.serialize(layer.activation)
    if kind == "linear":
        return index, None
    shape = node.output_shapes
    if kind == "swish":
        gate = writer.made("LOGISTIC", [index], f"{layer.name}/sigmoid", shape)
        mul = schema.MulOptionsT()
        return writer.made("MUL", [index, gate], layer.name, shape, options=mul), None
    options = {
        "gelu": schema.GeluOptionsT(False),
        "softmax": schema.SoftmaxOptionsT(1.0),
    }.get(kind)
    (name,) = elementwise.OPERATORS[kind]
    return writer.made(name, [index], layer.name, shape, options=options), None


def mean(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes an average over steps, or over height and width."""
    ((index, _),) = sources
    rank = len(node.keras_inputs[0].shape)
    axes = np.arange(1, rank - 1, dtype=np.int32)
    axes = writer.file.constant(f"{layer.name}/axes", axes)
    shape, options = node.output_shapes, schema.ReducerOptionsT(bool(layer.keepdims))
    return writer.made("MEAN", [index, axes], layer.name, shape, None, options), None


def add(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a sum."""
    return _joined(writer, "ADD", schema.AddOptionsT, layer, sources, node)


def multiply(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a product."""
    return _joined(writer, "MUL", schema.MulOptionsT, layer, sources, node)


def _joined(writer, operator, options, layer, sources, node):
    """Combines the first two tensors, then the result with the next, and so on."""
    total, shape = sources[0][0], node.keras_inputs[0].shape
    for position, (index, _) in enumerate(sources[1:], start=1):
        is_last = position == len(sources) - 1
        name = layer.name if is_last else f"{layer.name}/part{position}"
        shape = tf.broadcast_static_shape(shape, node.keras_inputs[position].shape)
        total = writer.made(operator, [total, index], name, shape, options=options())
    return total, None


def leaky_relu(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a ReLU with a fixed slope below 0."""
    ((index, _),) = sources
    shape, options = node.output_shapes, schema.LeakyReluOptionsT(float(layer.alpha))
    return writer.made("LEAKY_RELU", [index], layer.name, shape, None, options), None


def prelu(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a ReLU with learned slopes below 0."""
    ((index, _),) = sources
    alpha = writer.file.constant(f"{layer.name}/alpha", layer.alpha.numpy())
    return writer.made("PRELU", [index, alpha], layer.name, node.output_shapes), None


def layer_norm(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a normalization over the last axis, a gain and an offset."""
    ((index, _),) = sources
    shape = tuple(node.output_shapes)
    reduced = (*shape[:-1], 1)
    axis = writer.file.constant(
        f"{layer.name}/axis", np.array([len(shape) - 1], np.int32)
    )
    epsilon = np.array([layer.epsilon], np.float32)
    epsilon = writer.file.constant(f"{layer.name}/epsilon", epsilon)

    def made(name, part, size, inputs, options=None):
        return writer.made(name, inputs, f"{layer.name}/{part}", size, None, options)

    mean_options = schema.ReducerOptionsT(True)
    mul, add = schema.MulOptionsT(), schema.AddOptionsT()
    mean = made("MEAN", "mean", reduced, [index, axis], mean_options)
    centred = made("SUB", "centred", shape, [index, mean], schema.SubOptionsT())
    squares = made("MUL", "squares", shape, [centred, centred], mul)
    variance = made("MEAN", "variance", reduced, [squares, axis], mean_options)
    variance = made("ADD", "above_zero", reduced, [variance, epsilon], add)
    inverse = made("RSQRT", "inverse", reduced, [variance])
    last = made("MUL", "normal", shape, [centred, inverse], mul)
    gain = writer.file.constant(f"{layer.name}/gain", layer.gamma.numpy())
    last = made("MUL", "scaled", shape, [last, gain], mul)
    offset = writer.file.constant(f"{layer.name}/offset", layer.beta.numpy())
    return writer.made("ADD", [last, offset], layer.name, shape, options=add), None


def dot(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a matrix product for each example."""
    indices, shape = [index for index, _ in sources], node.output_shapes
    options = schema.BatchMatMulOptionsT(adjY=layer.axes[1] == 2)
    return writer.made("BATCH_MATMUL", indices, layer.name, shape, None, options), None


FUNCTIONS = {
    "activation": activation,
    "add": add,
    "affine": affine,
    "dot": dot,
    **dict.fromkeys((twin.CONV, twin.DENSE, twin.DEPTHWISE, twin.TRANSPOSED), linear),
    "global_average_pool": mean,
    "layer_norm": layer_norm,
    "leaky_relu": leaky_relu,
    "multiply": multiply,
    "prelu": prelu,
    "relu": relu,
}
