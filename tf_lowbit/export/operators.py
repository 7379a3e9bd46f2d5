"""Operators of a TFLite file: their versions, shapes and options."""

import numpy as np

from tf_lowbit.export import twin
from tf_lowbit.export.flatbuffer import FileBuilder, schema
from tf_lowbit.export.grids import Grid
from tf_lowbit.export.linear import ExportError

# The operators' versions that hold what is used here, by the type of their input.
INTEGER_VERSIONS = {
    "ADD": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 5,
    "MAX_POOL_2D": 2,
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
    "AVERAGE_POOL_2D": 1,
    "CONCATENATION": 1,
    "CONV_2D": 1,
    "DEPTHWISE_CONV_2D": 2,
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
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "RSQRT": 1,
    "SOFTMAX": 1,
    "STRIDED_SLICE": 1,
    "SUB": 1,
    "TANH": 1,
    "TRANSPOSE": 1,
}
# From unsigned to signed pixels.
REQUANTIZE_VERSION = 2


class OperatorWriter:
    """What all layers need to be written.

    Attributes:
        file: the file in the making. A tensor in it is an index, and a grid or None.
    """

    def __init__(self):
        self.file = FileBuilder("tf_lowbit")

    def integer(self, name, shape, grid: Grid) -> int:
        """Adds an int8 tensor of codes."""
        return self.file.activation(name, shape, np.int8, (grid.scale, grid.zero_point))

    def like(self, name, shape, grid) -> int:
        """Adds a tensor of codes on a grid, or of floats without one."""
        if grid is None:
            return self.file.activation(name, shape, np.float32)
        return self.integer(name, shape, grid)

    def operator(self, name, inputs, outputs, options=None, grid=None) -> None:
        """Adds an operator in the version for floats, or for codes on a grid."""
        versions = FLOAT_VERSIONS if grid is None else INTEGER_VERSIONS
        self.file.operator(name, versions[name], inputs, outputs, options)

    def reshaped(self, index, grid, name, shape) -> int:
        """Adds a tensor in another shape, and the operator that makes it.

        Raises:
            ExportError: if a size besides the batch is open.
        """
        if list(shape).count(None) > 1:
            raise ExportError(
                "A tensor that is reshaped must have one open size, the batch. "
                f"Received: {name!r} of shape {tuple(shape)}"
            )
        target = self.file.constant(
            f"{name}/shape", np.array([s or -1 for s in shape], np.int32)
        )
        result = self.like(name, shape, grid)
        options = schema.ReshapeOptionsT([s or -1 for s in shape])
        self.operator("RESHAPE", [index, target], [result], options, grid)
        return result


def four(shape):
    """A shape of rank 2 or 3 as (batch, height, width, channels)."""
    shape = tuple(shape)
    return (shape[0], *(1,) * (4 - len(shape)), *shape[1:])


def oriented(kind, kernel):
    """A Keras kernel in the file's order, its operator and its channels' axis."""
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
    """The schema's number of "same" or "valid"."""
    return getattr(schema.Padding, name.upper())


def linear_options(layer, name, activation, rank):
    """The schema's options of a linear operator."""
    if name == "FULLY_CONNECTED":
        return schema.FullyConnectedOptionsT(activation, keepNumDims=rank > 2)
    if getattr(layer, "kind", None) == twin.SCALE:
        strides, dilation, padding = (1, 1), (1, 1), "valid"
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
