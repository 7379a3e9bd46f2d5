"""Operators of a TFLite file: their versions, shapes and options."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tf_lowbit.compat import Node, keras
from tf_lowbit.export.integer import int8_grids, transposed, twin
from tf_lowbit.export.integer.int8_grids import Grid
from tf_lowbit.export.tflite.flatbuffer import FileBuilder, schema
from tf_lowbit.export.types import ExportError

Layer: TypeAlias = keras.layers.Layer
Shape: TypeAlias = Sequence[int | None]
# A tensor of the file: its index, and its grid or None for floats.
Source: TypeAlias = tuple[int, Grid | None]
Sources: TypeAlias = Sequence[Source]
# Version of each operator that has the features used here, by the type of its input.
INTEGER_VERSIONS = {
    "ADD": 2,
    "ARG_MAX": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEPTH_TO_SPACE": 1,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 5,
    "MAX_POOL_2D": 2,
    "MIRROR_PAD": 2,
    "PAD": 2,
    "QUANTIZE": 1,
    "RESHAPE": 1,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "STRIDED_SLICE": 2,
    "TRANSPOSE": 2,
}
INT4_VERSIONS = {"CONV_2D": 7, "DEPTHWISE_CONV_2D": 7, "FULLY_CONNECTED": 10}
FLOAT_VERSIONS = {
    "ADD": 1,
    "ARG_MAX": 1,
    "AVERAGE_POOL_2D": 1,
    "BATCH_MATMUL": 1,
    "CONCATENATION": 1,
    "CONV_2D": 1,
    "DEPTHWISE_CONV_2D": 2,
    "DEPTH_TO_SPACE": 1,
    "FULLY_CONNECTED": 1,
    "GELU": 1,
    "LEAKY_RELU": 1,
    "LOGISTIC": 1,
    "MAXIMUM": 1,
    "MAX_POOL_2D": 1,
    "MEAN": 1,
    "MUL": 1,
    "PAD": 1,
    "PRELU": 1,
    "QUANTIZE": 1,
    "RELU": 1,
    "RELU6": 1,
    "RESHAPE": 1,
    "RESIZE_BILINEAR": 3,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "RSQRT": 1,
    "SOFTMAX": 1,
    "STRIDED_SLICE": 1,
    "SUB": 1,
    "TANH": 1,
    "TRANSPOSE": 1,
}
# QUANTIZE between uint8 and int8.
REQUANTIZE_VERSION = 2


class OperatorWriter:
    """Adds tensors and operators to a file; a tensor is an index, and a grid or None.

    Attributes:
        file: Builder of the file.
    """

    def __init__(self):
        self.file = FileBuilder("tf_lowbit")
        self._shared: dict[tuple, int] = {}

    def integer(self, name: str, shape: Shape, grid: Grid) -> int:
        """Adds an int8 tensor of codes."""
        return self.file.activation(name, shape, np.int8, (grid.scale, grid.zero_point))

    def like(self, name: str, shape: Shape, grid: Grid | None) -> int:
        """Adds a tensor of codes on a grid, or of floats without one."""
        if grid is None:
            return self.file.activation(name, shape, np.float32)
        return self.integer(name, shape, grid)

    def shared(self, name: str, values: np.ndarray) -> int:
        """Adds a float constant, or returns the one with the same values.

        The file then holds the weights of a layer with several calls once.
        """
        key = values.shape, values.tobytes()
        if key not in self._shared:
            self._shared[key] = self.file.constant(name, values)
        return self._shared[key]

    def operator(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Any = None,
        grid: Grid | None = None,
    ) -> None:
        """Adds an operator in the version for floats, or for codes on a grid."""
        versions = FLOAT_VERSIONS if grid is None else INTEGER_VERSIONS
        self.file.operator(name, versions[name], inputs, outputs, options)

    def made(
        self,
        operator: str,
        inputs: Sequence[int],
        name: str,
        shape: Shape,
        grid: Grid | None = None,
        options: Any = None,
    ) -> int:
        """Adds an operator and its output, as `like`; returns the output's index."""
        result = self.like(name, shape, grid)
        self.operator(operator, inputs, [result], options, grid)
        return result

    def reshaped(self, index: int, grid: Grid | None, name: str, shape: Shape) -> int:
        """Adds a RESHAPE; returns the index of its output.

        Raises:
            ExportError: If a size besides the batch is open.
        """
        if list(shape).count(None) > 1:
            raise ExportError(
                "A reshaped tensor must have one open size, the batch. "
                f"Received: {name!r} of shape {tuple(shape)}"
            )
        sizes = [size or -1 for size in shape]
        target = self.file.constant(f"{name}/shape", np.array(sizes, np.int32))
        options = schema.ReshapeOptionsT(sizes)
        return self.made("RESHAPE", [index, target], name, shape, grid, options)

    def padded(
        self,
        index: int,
        grid: Grid | None,
        name: str,
        shape: Shape,
        sides: Sequence[tuple[int, int]] | np.ndarray,
    ) -> int:
        """Adds a PAD with zeros; returns the index of its output.

        Args:
            index: Index of the input.
            grid: Grid of both tensors, or None.
            name: Name of the output.
            shape: Shape of the output.
            sides: (before, behind) for each axis behind the batch; where the channels'
                are left out, they are not padded.
        """
        table = np.zeros((len(shape), 2), np.int32)
        table[1 : len(sides) + 1] = sides
        table = self.file.constant(f"{name}/paddings", table)
        options = schema.PadOptionsT()
        return self.made("PAD", [index, table], name, shape, grid, options)

    def add_linear(
        self,
        layer: Layer,
        name: str,
        source: Source,
        constants: Sequence[int],
        node: Node,
        grid: Grid | None = None,
        versions: Mapping[str, int] = FLOAT_VERSIONS,
    ) -> Source:
        """Writes a linear operator, with operators that reshape its input and output.

        Args:
            layer: Layer of the twin.
            name: Name of the operator.
            source: The layer's input.
            constants: Indices of weights and bias.
            node: Node of the layer.
            grid: Grid of the output; None for floats.
            versions: Versions of operators, for the type of the weights.
        """
        index, in_grid = source
        in_shape, shape = tuple(node.keras_inputs[0].shape), tuple(node.output_shapes)
        clamp = int8_grids.NO_CLAMP if grid is None else grid.clamp
        activation = getattr(schema.ActivationFunctionType, clamp)

        def add(index, output, shape, padding=None):
            result = self.like(output, shape, grid)
            options = linear_options(layer, name, activation, len(in_shape), padding)
            tensors = [index, *constants]
            self.file.operator(name, versions[name], tensors, [result], options)
            return result

        if is_transposed(layer):
            grids, shapes = (in_grid, grid), (in_shape, shape)
            return self._transposed(layer, index, grids, shapes, add), grid
        if name == "FULLY_CONNECTED" or len(in_shape) == 4:
            return add(index, layer.name, shape), grid
        index = self.reshaped(index, in_grid, f"{layer.name}/in", to_4d(in_shape))
        result = add(index, f"{layer.name}/out", to_4d(shape))
        return self.reshaped(result, grid, layer.name, shape), grid

    def _transposed(self, layer, index, grids, shapes, add) -> int:
        """Adds a plain convolution and a DEPTH_TO_SPACE: see `integer.transposed`."""
        (batch, *sizes, inputs), shape = shapes
        axes, channels = transposed.axes(layer), shapes[1][-1]
        stride, padding = axes[0].stride, "same"
        if not all(axis.is_same for axis in axes):
            padding, sides = "valid", [axis.padding for axis in axes]
            pairs = zip(sizes, sides, strict=True)
            around = (batch, *(s and s + sum(side) for s, side in pairs), inputs)
            index = self.padded(index, grids[0], f"{layer.name}/padded", around, sides)
        if stride == 1:
            return add(index, layer.name, shape, padding)
        cells = [s and s + axis.more for s, axis in zip(sizes, axes, strict=True)]
        deep = (batch, *cells, channels * stride**2)
        index = add(index, f"{layer.name}/out", deep, padding)
        sides = [(0, axis.rest) for axis in axes]
        is_whole = not np.any(sides)
        wide = (batch, *(s and s * stride for s in cells), channels)
        name = layer.name if is_whole else f"{layer.name}/cells"
        options = schema.DepthToSpaceOptionsT(stride)
        result = self.made("DEPTH_TO_SPACE", [index], name, wide, grids[1], options)
        if is_whole:
            return result
        return self.cropped(result, grids[1], layer.name, shape, sides)

    def cropped(
        self,
        index: int,
        grid: Grid | None,
        name: str,
        shape: Shape,
        sides: Sequence[tuple[int, int]],
    ) -> int:
        """Adds a STRIDED_SLICE that crops borders; arguments as in `padded`."""
        begin = np.array([0, *(before for before, _ in sides), 0], np.int32)
        end = np.array([0, *(-behind for _, behind in sides), 0], np.int32)
        # The mask turns an end of 0 into the end of the axis.
        mask = sum(1 << axis for axis, stop in enumerate(end) if not stop)
        parts = {"begin": begin, "end": end, "strides": np.ones_like(end)}
        tables = [self.file.constant(f"{name}/{n}", t) for n, t in parts.items()]
        options = schema.StridedSliceOptionsT(beginMask=1, endMask=mask)
        return self.made("STRIDED_SLICE", [index, *tables], name, shape, grid, options)


def is_transposed(layer: Layer) -> bool:
    """Whether a twin's layer is a transposed convolution, of codes or floats."""
    is_float = isinstance(layer, keras.layers.Conv2DTranspose)
    return is_float or getattr(layer, "kind", None) == twin.TRANSPOSED


def copies(layer: Layer) -> int:
    """Number of channels of the file's operator for each channel of a layer."""
    return layer.strides[0] * layer.strides[1] if is_transposed(layer) else 1


def to_4d(shape: Shape) -> tuple[int | None, ...]:
    """A shape of rank 2 to 4 as (batch, height, width, channels)."""
    return (shape[0], *(1,) * (4 - len(shape)), *shape[1:])


def oriented(kind: str, kernel: np.ndarray) -> tuple[np.ndarray, str, int]:
    """A Keras kernel in TFLite's layout, its operator and the axis of its channels.

    A transposed convolution passes the kernel from `transposed.plain_kernel`.
    """
    if kind == twin.DENSE:
        return kernel.T, "FULLY_CONNECTED", 0
    if kind == twin.SCALE:
        return kernel.reshape(1, 1, 1, -1), "DEPTHWISE_CONV_2D", 3
    if kernel.ndim == 3:
        kernel = kernel[np.newaxis]
    if kind == twin.DEPTHWISE:
        kernel = kernel.reshape(1, *kernel.shape[:2], -1)
        return kernel, "DEPTHWISE_CONV_2D", 3
    return kernel.transpose(3, 0, 1, 2), "CONV_2D", 0


def padding_code(name: str) -> int:
    """The schema's number for "same" or "valid"."""
    return getattr(schema.Padding, name.upper())


def linear_options(
    layer: Layer, name: str, activation: int, rank: int, padding: str | None = None
) -> Any:
    """The schema's options of a linear operator.

    `padding` replaces the layer's padding in a transposed convolution.
    """
    if name == "FULLY_CONNECTED":
        return schema.FullyConnectedOptionsT(activation, keepNumDims=rank > 2)
    is_scale = getattr(layer, "kind", None) == twin.SCALE
    strides: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    if is_scale or is_transposed(layer):
        padding = padding or "valid"
    else:
        strides = twin.window(layer.strides)
        dilation = twin.window(getattr(layer, "dilation", None) or layer.dilation_rate)
        padding = layer.padding
    common = (padding_code(padding), strides[1], strides[0])
    last = (activation, dilation[1], dilation[0])
    if name == "CONV_2D":
        return schema.Conv2DOptionsT(*common, *last)
    multiplier = 1
    if getattr(layer, "kind", twin.DEPTHWISE) == twin.DEPTHWISE:
        shape = getattr(layer, "kernel_shape", None)
        multiplier = shape[-1] if shape else layer.depth_multiplier
    return schema.DepthwiseConv2DOptionsT(*common, multiplier, *last)
