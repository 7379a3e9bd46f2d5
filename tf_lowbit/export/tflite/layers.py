"""Functions that write layers of a twin as TFLite operators.

A function takes (writer, layer, sources, node) and returns the layer's output. Sources
and output are tensors of the file: (index, its grid or None for floats).
"""

from typing import Any

import numpy as np

from tf_lowbit.compat import Node, keras
from tf_lowbit.export import layer_table
from tf_lowbit.export.integer import int8_grids, transposed, twin
from tf_lowbit.export.tflite import flatbuffer, float_operators
from tf_lowbit.export.tflite.flatbuffer import schema
from tf_lowbit.export.tflite.operators import (
    INT4_VERSIONS,
    INTEGER_VERSIONS,
    Layer,
    Source,
    Sources,
    copies,
    is_transposed,
    oriented,
    padding_code,
    to_4d,
)
from tf_lowbit.export.tflite.operators import OperatorWriter as Writer
from tf_lowbit.export.types import ExportError

_layers = keras.layers
_GLOBAL_MAX_POOLS = (_layers.GlobalMaxPooling1D, _layers.GlobalMaxPooling2D)


def ends_in_codes(node: Node) -> bool:
    """Whether a node dequantizes codes by one scale, without a further factor."""
    return isinstance(node.layer, twin.ToValues) and node.layer.factor is None


def to_codes(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a QUANTIZE, with a clamp in front if the grid ends within int8."""
    ((index, present),) = sources
    if present is not None:
        return index, present  # An input of the file that takes codes.
    shape = node.output_shapes
    grid = layer.grid
    if grid.low + grid.zero_point > int8_grids.INT8[0]:
        clamped = writer.file.activation(f"{layer.name}/clamp", shape, np.float32)
        if grid.low == 0:
            writer.operator("RELU", [index], [clamped])
        else:
            lowest = np.float32(grid.low) * np.float32(grid.scale)
            bound = writer.file.constant(f"{layer.name}/lowest", np.array([lowest]))
            options = schema.MaximumMinimumOptionsT()
            writer.operator("MAXIMUM", [index, bound], [clamped], options)
        index = clamped
    options = schema.QuantizeOptionsT()
    return writer.made("QUANTIZE", [index], layer.name, shape, grid, options), grid


def to_values(writer: Any, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a DEQUANTIZE, and a MUL if the scale is not the step."""
    ((index, grid),) = sources
    shape = node.output_shapes
    # The last tensor has the layer's name.
    is_scaled = layer.factor is not None
    is_needed = writer.output_type == "float32" or writer.is_read(node)
    if not is_needed and ends_in_codes(node):
        return index, grid
    name = f"{layer.name}/dequantized" if is_scaled else layer.name
    result = writer.file.activation(name, shape, np.float32)
    writer.operator("DEQUANTIZE", [index], [result], schema.DequantizeOptionsT(), grid)
    if is_scaled:
        factor = np.array([layer.factor], np.float32)
        factor = writer.file.constant(f"{layer.name}/factor", factor)
        mul = schema.MulOptionsT()
        result = writer.made("MUL", [result, factor], layer.name, shape, options=mul)
    return result, None


def integer_linear(
    writer: Writer, layer: Layer, sources: Sources, node: Node
) -> Source:
    """Writes a convolution or a dense layer of codes."""
    (source,) = sources
    assert source[1] is not None  # It reads codes.
    scales = np.tile(layer.weight_scales.numpy(), copies(layer))
    weights = np.rint(layer.codes().numpy()).astype(np.int64) * layer.upscale
    if is_transposed(layer):
        weights = transposed.plain_kernel(weights, *transposed.axes(layer))
    weights, name, axis = oriented(layer.kind, weights.astype(np.int8))
    is_int4 = layer.storage == "int4"
    weights = writer.file.constant(
        f"{layer.name}/weights", weights, scales, axis, is_int4
    )
    bias = writer.file.constant(
        f"{layer.name}/bias",
        np.tile(layer.biases.numpy(), copies(layer)),
        np.float32(source[1].scale) * scales,
    )
    versions = INT4_VERSIONS if is_int4 else INTEGER_VERSIONS
    constants, grid = (weights, bias), layer.grid
    return writer.add_linear(layer, name, source, constants, node, grid, versions)


def integer_add(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a sum of codes."""
    indices, shape, grid = [i for i, _ in sources], node.output_shapes, layer.grid
    options = schema.AddOptionsT(getattr(schema.ActivationFunctionType, grid.clamp))
    return writer.made("ADD", indices, layer.name, shape, grid, options), grid


def reshape(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a RESHAPE."""
    ((index, grid),) = sources
    return writer.reshaped(index, grid, layer.name, node.output_shapes), grid


def pad(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes padding with zeros."""
    ((index, grid),) = sources
    sides = np.reshape(layer.padding, (-1, 2))
    shape = node.output_shapes
    return writer.padded(index, grid, layer.name, shape, sides), grid


def edge_pad(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes symmetric padding."""
    ((index, grid),) = sources
    table = np.array([(n, n) for n in (0, *layer.padding, 0)], np.int32)
    table = writer.file.constant(f"{layer.name}/paddings", table)
    options = schema.MirrorPadOptionsT(schema.MirrorPadMode.SYMMETRIC)
    inputs, shape = [index, table], node.output_shapes
    return writer.made("MIRROR_PAD", inputs, layer.name, shape, grid, options), grid


def crop(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a crop."""
    ((index, grid),) = sources
    sides = layer.cropping
    if isinstance(layer, _layers.Cropping1D):
        sides = [sides]
    shape = node.output_shapes
    return writer.cropped(index, grid, layer.name, shape, sides), grid


def upsample(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes an upsampling by nearest, or a bilinear one between pixel centers."""
    ((index, grid),) = sources
    shape = tuple(node.output_shapes)
    is_1d = len(shape) == 3
    if is_1d:
        (inputs,) = node.keras_inputs
        index = writer.reshaped(index, grid, f"{layer.name}/in", to_4d(inputs.shape))
    inner = to_4d(shape) if is_1d else shape
    size = writer.file.constant(f"{layer.name}/size", np.array(inner[1:3], np.int32))
    output = f"{layer.name}/out" if is_1d else layer.name
    # With half-pixel centers, no position lies on the border of two pixels.
    if getattr(layer, "interpolation", "nearest") == "bilinear":  # Floats only.
        name, options = "RESIZE_BILINEAR", schema.ResizeBilinearOptionsT
    else:
        name, options = "RESIZE_NEAREST_NEIGHBOR", schema.ResizeNearestNeighborOptionsT
    result = writer.made(name, [index, size], output, inner, grid, options(False, True))
    if is_1d:
        result = writer.reshaped(result, grid, layer.name, shape)
    return result, grid


def permute(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a TRANSPOSE."""
    ((index, grid),) = sources
    order = np.array((0, *layer.dims), np.int32)
    order = writer.file.constant(f"{layer.name}/order", order)
    inputs, shape = [index, order], node.output_shapes
    options = schema.TransposeOptionsT()
    return writer.made("TRANSPOSE", inputs, layer.name, shape, grid, options), grid


def pool(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a max or average pooling."""
    ((index, grid),) = sources
    (inputs,) = node.keras_inputs
    shape, in_shape = tuple(node.output_shapes), tuple(inputs.shape)
    name = "MAX_POOL_2D"
    padding = "same"
    if isinstance(layer, _GLOBAL_MAX_POOLS):
        size = strides = to_4d(in_shape)[1:3]
        if None in size:
            raise ExportError(
                "Global max pooling needs a fixed image size. "
                f"Received: {layer.name!r} of {in_shape}"
            )
    else:
        size, strides = twin.window(layer.pool_size), twin.window(layer.strides)
        padding = layer.padding
    if isinstance(layer, _layers.AveragePooling1D | _layers.AveragePooling2D):
        name = "AVERAGE_POOL_2D"
    options = schema.Pool2DOptionsT(
        padding_code(padding), strides[1], strides[0], size[1], size[0]
    )
    is_2d = len(in_shape) == len(shape) == 4
    if len(in_shape) != 4:
        index = writer.reshaped(index, grid, f"{layer.name}/in", to_4d(in_shape))
    inner = shape if is_2d else to_4d(shape)
    output = layer.name if is_2d else f"{layer.name}/out"
    result = writer.made(name, [index], output, inner, grid, options)
    if not is_2d:
        result = writer.reshaped(result, grid, layer.name, shape)
    return result, grid


def concatenate(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes a concatenation."""
    grid, shape = sources[0][1], node.output_shapes
    options = schema.ConcatenationOptionsT(layer.axis % len(shape))
    indices = [index for index, _ in sources]
    return writer.made("CONCATENATION", indices, layer.name, shape, grid, options), grid


def argmax(writer: Writer, layer: Layer, sources: Sources, node: Node) -> Source:
    """Writes an ARG_MAX over the last axis, of codes or floats."""
    ((index, grid),) = sources
    axis = np.array(len(node.output_shapes), np.int32)
    axis = writer.file.constant(f"{layer.name}/axis", axis)
    dtype = np.dtype(layer.output_type)
    result = writer.file.activation(layer.name, node.output_shapes, dtype)
    options = schema.ArgMaxOptionsT(flatbuffer.TYPES[dtype])
    writer.operator("ARG_MAX", [index, axis], [result], options, grid)
    return result, None


# From the kind of a layer (`layer_table`) to its function.
FUNCTIONS = {
    **float_operators.FUNCTIONS,
    **dict.fromkeys(layer_table.INTEGER_KINDS, integer_linear),
    "argmax": argmax,
    "average_pool": pool,
    "concatenate": concatenate,
    "crop": crop,
    "edge_pad": edge_pad,
    "flatten": reshape,
    "global_max_pool": pool,
    "integer_add": integer_add,
    "interpolate": upsample,
    "max_pool": pool,
    "permute": permute,
    "reshape": reshape,
    "to_codes": to_codes,
    "to_values": to_values,
    "upsample": upsample,
    "zero_pad": pad,
}
