"""Codes of a file's inputs: pixels, or an 8-bit grid over the range of the inputs."""

import dataclasses

import numpy as np

from tf_lowbit.compat import KerasTensor
from tf_lowbit.export.integer import int8_grids, twin
from tf_lowbit.export.lowering import elementwise, forms, stock_layers
from tf_lowbit.export.lowering.builder import Builder, Value, copy_of
from tf_lowbit.export.types import ExportError
from tf_lowbit.network import graph, passthrough

_IF_NO_PIXELS = {
    "int8": "normalize other data, such as a sensor's, outside of the network, and "
    "train it without the layer that scales its input",
    "uint8": "build the network with a Rescaling or Normalization layer in front, "
    "which preprocesses the pixels, and train it; or use 'float32', or 'int8' for the "
    "codes of an 8-bit first layer that reads the input itself",
}


def takes_pixels(builder: Builder, tensor: KerasTensor) -> bool:
    """Whether the file takes pixels for an input.

    With input_type="int8" it takes pixels minus 128 if a scaling reads the input.
    """
    if builder.options.input_type != "int8":
        return builder.options.input_type == "uint8"
    readers = builder.readers.get(id(tensor), [])
    return any(elementwise.scale(node) is not None for node in readers)


def take_pixels(builder: Builder, value: Value) -> None:
    """Makes an input's codes 0..255: its values are pixels, or pixels over 255."""
    low, high = builder.ranges(value.tensor)
    # Resizing can exceed 255 by half a pixel.
    is_unit = high <= 255.5 / 255
    is_pixels = low >= 0.0 and (is_unit or 2.0 <= high <= 255.5)
    if not is_pixels or _has_signed_reader(builder, value.tensor):
        raise ExportError(
            f"input_type={builder.options.input_type!r} takes pixels here, so the "
            "network's input must lie in [0, 1] or [0, 255]: "
            f"{_IF_NO_PIXELS[builder.options.input_type]}. "
            f"Received: {value.name!r} in [{low:g}, {high:g}] on the data"
            + (", but negative values in calibration" if is_pixels else "")
        )
    value.grid = int8_grids.UNIT_PIXELS if is_unit else int8_grids.RAW_PIXELS
    layer = twin.ToCodes(value.grid, name=builder.name(f"{value.name}_codes"))
    value.codes, value.values = layer(value.values), None


def _has_signed_reader(builder, tensor) -> bool:
    """Whether a quantizer that could be unsigned but is signed reads a tensor."""
    found = map(builder.quantizer_of, builder.readers.get(id(tensor), []))
    return any(q is not None and q.quantizer.unsigned() is not None for q in found)


def is_input(builder: Builder, tensor: KerasTensor) -> bool:
    """Whether a tensor is the model's input, up to padding and scaling."""
    node = graph.producer(tensor)
    # A loop: networks are deeper than Python's recursion limit.
    while not node.is_input:
        if not forms.moves_codes(node) and elementwise.scale(node) is None:
            return False
        node = graph.producer(node.keras_inputs[0])
    return True


def make_codes(builder: Builder, source: Value) -> None:
    """Puts an input, scaled or not, on the int8 grid over its range."""
    if source.codes is not None:
        return
    node = graph.producer(source.tensor)
    if not node.is_input and elementwise.scale(node) is None:
        behind = builder.known[id(node.keras_inputs[0])]
        make_codes(builder, behind)
        if passthrough.is_identity(node):
            builder.alias(source, behind)
        else:
            builder.copy_layer(source, behind, node)
        return
    low, high = builder.ranges(source.tensor)
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255 or 1 / 255
    lowest = max(round(low / step), -255)
    wanted = int8_grids.float_grid(float(np.float32(step)), lowest, lowest + 255)
    if builder.can_be_codes(source):  # Scaled pixels.
        builder.emit_integer(source, source.linear, wanted)
    else:
        layer = twin.ToCodes(wanted, name=builder.name(f"{source.name}_codes"))
        source.codes, source.grid = layer(builder.values(source)), wanted
    builder.note(
        source.name,
        f"is quantized to 8 bits over [{low:g}, {high:g}]. To train with this, give "
        "the first layer 8-bit activations by a rule",
    )


def codes_of(
    builder: Builder, source: Value, grid: int8_grids.Grid, name: str
) -> KerasTensor:
    """Quantizes a float tensor to codes on a quantizer's grid.

    If the file takes codes and only layers that move values stand between input and
    quantizer, the input is quantized instead, and these layers move its codes.
    """
    moves = []
    node = graph.producer(source.tensor)
    is_alone = builder.may_consume(source)
    while is_alone and not node.is_input and forms.moves_codes(node):
        moves.append(node)
        (tensor,) = node.keras_inputs
        is_alone, node = builder.reader_count(tensor) == 1, graph.producer(tensor)
    if builder.options.input_type != "int8" or not (is_alone and node.is_input):
        return twin.ToCodes(grid, name=builder.name(name))(builder.values(source))
    (tensor,) = graph.outputs_of(node)
    layer = twin.ToCodes(grid, name=builder.name(f"{name}_codes" if moves else name))
    codes = layer(builder.known[id(tensor)].values)
    for move in reversed(moves):
        if not passthrough.is_identity(move):
            made = copy_of(stock_layers.layer_of(move), builder.name(move.layer.name))
            codes = made(codes)
    return codes


def are_pixels(value: Value) -> bool:
    """Whether a tensor is an input's unscaled pixels."""
    return value.codes is not None and graph.producer(value.tensor).is_input


def are_scaled_pixels(builder: Builder, value: Value) -> bool:
    """Whether a tensor is an input's codes, scaled or not."""
    return builder.can_be_codes(value) and is_input(builder, value.tensor)


def scale_pixels(builder: Builder, value: Value, source: Value, gain: float) -> None:
    """Scales pixels by a gain: the codes stay, the step changes."""
    (pixels,) = graph.producer(source.codes).keras_inputs
    step = float(np.float32(source.grid.step * gain))
    value.grid = dataclasses.replace(source.grid, step=step)
    layer = twin.ToCodes(value.grid, name=builder.name(f"{value.name}_codes"))
    value.codes = layer(pixels)
