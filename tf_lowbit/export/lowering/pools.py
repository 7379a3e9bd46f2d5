"""Lowering of pooling and interpolation: depthwise sums of codes, or floats."""

import math

import numpy as np

from tf_lowbit.compat import Node, keras
from tf_lowbit.export.integer import int8_grids, plain_layers, twin
from tf_lowbit.export.integer.int8_grids import Grid
from tf_lowbit.export.lowering import linear as linears
from tf_lowbit.export.lowering import stock_layers
from tf_lowbit.export.lowering.builder import Builder, Value, Values

_layers = keras.layers
# Offset, in steps of the output, that rounds all exact halves of an average up.
_UP = 1e-6
_ROUNDED = (
    "the average is rounded to 8 bits. It is exact if window size times levels is "
    "below 256, with fewer bits or a smaller window"
)


def average_pool(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Averages codes in windows, exactly or rounded to 8 bits; or averages floats."""
    (source,), layer = sources, stock_layers.layer_of(node)
    is_same = layer.padding != "valid"
    if is_same or not builder.can_be_codes(source):
        if is_same and builder.can_be_codes(source):
            builder.note(
                value.name, "is computed in float: the borders of padding='same' "
                "average fewer codes; padding='valid' keeps codes",
            )  # fmt: skip
        builder.copy_layer_in_float(value, source, node)
        return
    _, grid = builder.codes(source)
    size = math.prod(layer.pool_size)
    value.linear = _window_means(value, source, layer.pool_size, tuple(layer.strides))
    if (grid.high - grid.low) * size < 256:
        exact = int8_grids.grid(grid.step / size, grid.low * size, grid.high * size)
        builder.emit_integer(value, value.linear, exact)
    else:
        coarse = _mean_grid(builder, value, grid)
        value.linear.offset += _UP * coarse.step
        builder.emit_integer(value, value.linear, coarse)
        builder.note(value.name, _ROUNDED)


def _window_means(value, source, window, strides, offset=0.0) -> linears.Linear:
    """Averages of codes over a window of the given sizes, plus an offset."""
    channels = int(value.tensor.shape[-1])
    return linears.Linear(
        twin.DEPTHWISE, None, None, source,
        np.full(channels, 1.0 / math.prod(window)), np.full(channels, offset),
        taps=np.ones((*window, channels, 1)), strides=strides,
    )  # fmt: skip


def _mean_grid(builder: Builder, value: Value, grid: Grid) -> Grid:
    """The 8-bit grid of averages of codes on `grid`.

    It covers their range on the data, as averages fill little of the range of the
    codes. Without data it covers the range of the codes.
    """
    low, high = grid.low * grid.step, grid.high * grid.step
    if builder.ranges.can_tell(value.tensor):
        measured_low, measured_high = builder.range_of(value)
        low, high = max(low, measured_low), min(high, measured_high)
    return int8_grids.over(low, high, signed=grid.low < 0)


def interpolate(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Bilinear interpolation by whole factors, as a linear layer of codes or in float.

    Repeating pixels s times and summing over a window gives the interpolation: each sum
    weights the two nearest pixels by their distances. TFLite's operator is not used:
    its kernels round interpolated values differently.
    """
    (source,), layer = sources, stock_layers.layer_of(node)
    if not builder.can_be_codes(source):
        builder.copy_layer_in_float(value, source, node)
        return
    codes, grid = builder.codes(source)
    channels = int(value.tensor.shape[-1])
    repeated = _layers.UpSampling2D(
        layer.size, name=builder.name(f"{value.name}_repeated"), dtype="float32"
    )
    around = plain_layers.EdgePadding(
        [size // 2 for size in layer.size], name=builder.name(f"{value.name}_padded")
    )
    pixels = Value(source.tensor, around.name, codes=around(repeated(codes)), grid=grid)
    rows, columns = (_triangle(size) for size in layer.size)
    taps = np.repeat(np.outer(rows, columns)[..., None, None], channels, axis=2)
    # A quantizer behind the layer may decide the grid, so the layer stays pending.
    # Without negative codes the averages are not negative, either.
    value.linear = linears.Linear(
        twin.DEPTHWISE, layer, None, pixels,
        np.full(channels, channels / taps.sum()), np.zeros(channels),
        "relu" if grid.low == 0 else None, taps=taps,
    )  # fmt: skip
    builder.settle(value)


def _triangle(size: int) -> np.ndarray:
    """Weights, along one axis, of the repeated pixels around an output pixel."""
    if size % 2:
        return np.ones(size)
    return np.array([1.0, *[2.0] * (size - 1), 1.0])


def global_pool(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Averages codes over an image for an int8 head; else averages floats."""
    (source,), layer = sources, stock_layers.layer_of(node)
    is_int8_head = builder.options.head == "int8" and builder.can_be_codes(source)
    sizes = source.tensor.shape[1:-1]
    if not is_int8_head or not all(sizes):
        builder.copy_layer_in_float(value, source, node)
        return
    _, grid = builder.codes(source)
    pooled = Value(value.tensor, f"{value.name}_sum")
    value.grid = _mean_grid(builder, value, grid)
    offset = _UP * value.grid.step
    linear = _window_means(value, source, sizes, (1,) * len(sizes), offset)
    builder.emit_integer(pooled, linear, value.grid)
    may_be_float = "float" in builder.options.target.head
    remedy = "; head='float' keeps it in float" if may_be_float else ""
    builder.note(value.name, f"the average is rounded to 8 bits{remedy}")
    flat = _layers.Flatten(name=builder.name(value.name), dtype="float32")
    value.codes = pooled.codes if layer.keepdims else flat(pooled.codes)
