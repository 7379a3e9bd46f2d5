"""Transposed convolutions as plain convolutions that output cells of s x s pixels.

Output pixel `o` of a transposed convolution of stride s sums `x[i] * w[j]` over all
`i * s + j = o + before`. For `o = s * q + r` these are the taps
`j = s * t + r + before` on the inputs `x[q - t]`: a convolution of the same inputs for
each of the s remainders r. A convolution with s * s times the channels computes all of
them, and DEPTH_TO_SPACE puts each pixel in its place. The accumulators are then those
of a plain convolution, whose rounding is known. TFLite's own TRANSPOSE_CONV would also
need the size of the batch in the file.
"""

import dataclasses
import itertools

import numpy as np

from tf_lowbit.compat import keras


def placement(layer: keras.layers.Layer) -> dict:
    """The cropping of a trained layer's output, as arguments of `twin.IntegerLinear`.

    Args:
        layer: `Conv2DTranspose` with dilation 1.

    Returns:
        "before": rows and columns that padding "same" cuts off in front; "excess": rows
        and columns of the output beyond stride times input.
    """
    paddings = layer.output_padding or (None,) * len(layer.strides)
    before, excess = [], []
    for size, stride, more in zip(
        layer.kernel_size, layer.strides, paddings, strict=True
    ):
        is_same = layer.padding == "same"
        if more is None:  # See `keras.utils.conv_utils.deconv_output_length`.
            beyond = 0 if is_same else max(size - stride, 0)
        else:
            beyond = size - stride + more - (2 * (size // 2) if is_same else 0)
        excess.append(beyond)
        before.append(max(size - stride - beyond, 0) // 2 if is_same else 0)
    return {"before": tuple(before), "excess": tuple(excess)}


@dataclasses.dataclass(frozen=True)
class Axis:
    """The height or the width of a transposed convolution.

    Attributes:
        size: Size of the kernel.
        stride: Stride of the output.
        before: Number of outputs that are cut off in front.
        excess: Number of outputs beyond stride times input; may be negative.
    """

    size: int
    stride: int
    before: int
    excess: int

    @property
    def first(self) -> int:
        """Distance of the farthest input in front of a cell that the cell reads."""
        return (self.size - 1 - self.before) // self.stride

    @property
    def last(self) -> int:
        """Distance of the farthest input behind a cell that the cell reads."""
        return (self.stride - 1 + self.before) // self.stride

    @property
    def taps(self) -> int:
        """The size of the plain convolution's kernel."""
        return self.first + self.last + 1

    @property
    def more(self) -> int:
        """Number of cells beyond one for each input."""
        return -(-self.excess // self.stride)

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros in front of and behind the inputs of a "valid" convolution."""
        return self.first, self.last + self.more

    @property
    def rest(self) -> int:
        """Number of outputs of the last cell that are cut off."""
        return self.more * self.stride - self.excess

    @property
    def is_same(self) -> bool:
        """Whether padding "same" equals `padding`."""
        return self.padding == ((self.taps - 1) // 2, self.taps // 2)


def axes(layer: keras.layers.Layer) -> tuple[Axis, Axis]:
    """Height and width of a transposed layer, of the twin or trained."""
    if hasattr(layer, "kernel_shape"):
        sizes, before, excess = layer.kernel_shape[:2], layer.before, layer.excess
    else:
        sizes, (before, excess) = layer.kernel_size, placement(layer).values()
    height, width = map(Axis, sizes, layer.strides, before, excess)
    return height, width


def plain_kernel(kernel: np.ndarray, height: Axis, width: Axis) -> np.ndarray:
    """The plain convolution's kernel for a kernel [height, width, channels, inputs].

    Returns:
        [taps, taps, inputs, stride * stride * channels], where channel
        `(row * stride + column) * channels + c` is channel c of that pixel of a cell.
    """
    channels, inputs = kernel.shape[2:]
    strides = height.stride, width.stride
    made = np.zeros((height.taps, width.taps, inputs, *strides, channels), kernel.dtype)
    for (row, tap_row, own_row), (column, tap_column, own_column) in itertools.product(
        _places(height), _places(width)
    ):
        made[tap_row, tap_column, :, row, column] = kernel[own_row, own_column].T
    return made.reshape(height.taps, width.taps, inputs, -1)


def _places(axis: Axis):
    """Yields (place in a cell, tap of the plain kernel, tap of the transposed one)."""
    for own in range(axis.size):
        distance, place = divmod(own - axis.before, axis.stride)
        yield place, axis.first - distance, own
