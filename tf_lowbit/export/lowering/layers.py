"""Lowering of each layer of a trained network into the integer model.

A lowering function takes (builder, value, sources, node): the builder of the integer
model, the node's output, which it fills in, the node's inputs, and the node.
"""

import dataclasses

import numpy as np

from tf_lowbit import quantizers
from tf_lowbit.compat import Node, keras
from tf_lowbit.export import layer_table, targets
from tf_lowbit.export.integer import int8_grids, plain_layers
from tf_lowbit.export.lowering import elementwise, inputs, joins, pools
from tf_lowbit.export.lowering import linear as linears
from tf_lowbit.export.lowering.builder import Builder, Value, Values, copy_of
from tf_lowbit.network import inspection, layer_registry

_layers = keras.layers


def alias(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Passes the input through."""
    del node
    builder.alias(value, sources[0])


def quantize(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Puts the input on the grid of an activation quantizer."""
    (source,) = sources
    step, low, high = builder.levels(builder.quantizer_of(node))
    if builder.can_be_codes(source):
        wanted = int8_grids.grid(step, low, high)
        if source.codes is not None and wanted.holds(source.grid):
            value.codes, value.grid = source.codes, source.grid
            return
        pending = source.linear if source.codes is None else None
        if pending is None or not builder.may_consume(source):
            pending = builder.rescale(source)
        builder.emit_integer(value, pending, wanted)
        return
    wanted = int8_grids.float_grid(step, low, high)
    value.codes = inputs.codes_of(builder, source, wanted, value.name)
    value.grid = wanted


def linear(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Makes a pending linear layer; the grid of its output is decided later."""
    (source,), outer = sources, node.layer
    layer = inspection.wrapped_layer(outer)
    kind = layer_table.kind_of(layer)
    (kernel,) = layer_registry.kernels(layer)
    weights = builder.by_layer.get(outer.name, {}).get(
        (quantizers.WEIGHT, kernel.attribute)
    )
    channels = int(value.tensor.shape[-1])
    bias = np.zeros(channels)
    if layer.use_bias:
        bias = layer.bias.numpy().astype(np.float64)
    integer = weights is not None and builder.can_be_codes(source)
    if not integer and _wants_int8_edge(builder, outer, source):
        integer = True
        if weights is None:
            weights = linears.eight_bits(layer, kernel)
            builder.note(
                value.name,
                "was trained in float; its weights are rounded to 8 bits here. To "
                "train with 8 bits, name the layer in a rule",
            )
    if integer and inputs.is_input(builder, source.tensor):
        inputs.make_codes(builder, source)
    value.linear = linears.Linear(
        kind, layer, weights, source, np.ones(channels), bias, None, integer
    )
    if weights is not None and not integer:
        builder.note(
            value.name,
            "reads floats, so it computes in float with its low-bit weights' "
            "values; a rule that quantizes what it reads makes it integer (behind "
            "global pooling: head='int8')",
        )
    builder.settle(value)


def _wants_int8_edge(builder, outer, source) -> bool:
    """Whether the options turn a first or last float layer into an integer layer."""
    if outer.name in builder.first and builder.options.first_layer == "int8":
        return inputs.is_input(builder, source.tensor)
    if outer.name in builder.last and builder.options.head == "int8":
        return builder.can_be_codes(source)
    return False


def scale(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Folds a gain and an offset per channel into the layer in front."""
    (source,) = sources
    gain, offset = elementwise.scale(node)
    if inputs.are_pixels(source):
        is_plain = gain.size == 1 and gain > 0 and not np.any(offset)
        if is_plain and builder.may_consume(source):
            inputs.scale_pixels(builder, value, source, gain.item())
            return
    value.linear = builder.scaled(source, gain, offset)
    if builder.reader_count(value.tensor) > 1 and inputs.are_scaled_pixels(
        builder, value
    ):
        inputs.make_codes(builder, value)
    builder.settle(value)


def relu(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Folds a ReLU or ReLU6 into the layer in front."""
    (source,) = sources
    kind = layer_registry.relu_kind(node.layer)
    pending = source.linear if builder.may_consume(source) else None
    if pending is not None and pending.relu in (None, kind, "relu6"):
        # A ReLU behind a ReLU6 changes nothing.
        value.linear = dataclasses.replace(pending, relu=pending.relu or kind)
    elif builder.can_be_codes(source):
        value.linear = dataclasses.replace(builder.rescale(source), relu=kind)
    else:
        value.values = builder.relu_layer(kind, value.name)(builder.values(source))
        return
    builder.settle(value)


def keep_floats(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Copies the layer, which computes in float."""
    (source,), layer = sources, node.layer
    made, weights = copy_of(layer, builder.name(value.name)), layer.get_weights()
    if isinstance(layer, _layers.LayerNormalization):
        made.scale = made.center = True
        ones = np.ones(value.tensor.shape[-1], np.float32)
        weights = [
            layer.gamma.numpy() if layer.scale else ones,
            layer.beta.numpy() if layer.center else 0.0 * ones,
        ]
    value.values = made(builder.values(source))
    made.set_weights(weights)


def keep_codes(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Copies the layer; it reads codes if its input has any."""
    (source,) = sources
    if inputs.are_scaled_pixels(builder, source):
        inputs.make_codes(builder, source)
    builder.copy_layer(value, source, node)


def activate(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Makes an activation, which computes in float."""
    (source,) = sources
    layer = _layers.Activation(
        elementwise.activation(node), name=builder.name(value.name), dtype="float32"
    )
    value.values = layer(builder.values(source))


def argmax(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Takes the largest code, or the largest value where the input has no codes."""
    (source,) = sources
    output_type = node.outputs.dtype.name
    if builder.options.target.interpreter == targets.TFLITE_MICRO:
        output_type = "int32"  # It has no other.
    layer = plain_layers.ArgMax(output_type, name=builder.name(value.name))
    value.values = layer(builder.codes_or_values(source))


FUNCTIONS = {
    layer_table.ACTIVATION: activate,
    layer_table.ADD: joins.add,
    layer_table.ALIAS: alias,
    layer_table.ARGMAX: argmax,
    layer_table.AVERAGE_POOL: pools.average_pool,
    layer_table.CODES: keep_codes,
    layer_table.CONCATENATE: joins.concatenate,
    layer_table.DOT: joins.dot,
    layer_table.FLOATS: keep_floats,
    layer_table.GLOBAL_POOL: pools.global_pool,
    layer_table.INTERPOLATE: pools.interpolate,
    layer_table.LINEAR: linear,
    layer_table.MULTIPLY: joins.multiply,
    layer_table.RELU: relu,
    layer_table.SCALE: scale,
}
