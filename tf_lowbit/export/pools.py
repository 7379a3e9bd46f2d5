"""Means in a twin, of pooling and interpolation: depthwise sums of codes, or floats."""

import math

import numpy as np

from tf_lowbit.compat import keras
from tf_lowbit.export import grids, twin
from tf_lowbit.export import linear as linears
from tf_lowbit.export.building import Value, copy_of

_layers = keras.layers
# Of an output's step: what makes the ties of an average go up, all of them, as an
# integer bias can.
_UP = 1e-6
_ROUNDED = (
    "the average is rounded to 8 bits; it is exact where window size times levels is "
    "below 256: fewer bits or a smaller window"
)
_ROUNDED_HEAD = "the average is rounded to 8 bits; head='float' keeps it in float"


def average_pool(builder, value, source, layer) -> None:
    """Codes of window averages, as finely as they fit into 8 bits; or floats.

    Args:
        builder: of the twin.
        value: what the layer puts out; is set.
        source: its input.
        layer: the trained network's.
    """

    is_same = layer.padding != "valid"
    if is_same or not builder.can_be_codes(source):
        if is_same and builder.can_be_codes(source):
            builder.note(
                value.name, "is computed in float: the borders of padding='same' "
                "average fewer codes; padding='valid' keeps codes",
            )  # fmt: skip
        made = copy_of(layer, builder.name(value.name))
        value.values = made(builder.values(source))
        return
    _, grid = builder.codes(source)
    size = math.prod(layer.pool_size)
    channels = int(value.tensor.shape[-1])
    value.linear = linears.Linear(
        twin.DEPTHWISE, layer, None, source,
        np.full(channels, 1.0 / size), np.zeros(channels),
        taps=np.ones((*layer.pool_size, channels, 1)), strides=tuple(layer.strides),
    )  # fmt: skip
    if (grid.high - grid.low) * size < 256:
        exact = grids.grid(grid.step / size, grid.low * size, grid.high * size)
        builder.emit_integer(value, value.linear, exact)
    else:
        span = grid.high - grid.low
        coarse = grids.grid(grid.step * span / 255, 0, 255)
        if grid.low < 0:
            coarse = grids.grid(grid.step * -grid.low / 128, *grids.INT8)
        value.linear.offset += _UP * coarse.step
        builder.emit_integer(value, value.linear, coarse)
        builder.note(value.name, _ROUNDED)


def interpolate(builder, value, source, layer) -> None:
    """A linear layer of codes for bilinear interpolation by whole factors, or floats.

    Pixels repeated by a factor s and summed over a window are the interpolation: each
    sum weighs the two nearest pixels by their distances. So no kernel's own rounding of
    interpolated values counts, in which TFLite's differ.

    Args:
        builder: of the twin.
        value: what the layer puts out; is set.
        source: its input.
        layer: `UpSampling2D`.
    """
    if not builder.can_be_codes(source):
        made = copy_of(layer, builder.name(value.name))
        value.values = made(builder.values(source))
        return
    codes, grid = builder.codes(source)
    channels = int(value.tensor.shape[-1])
    repeated = _layers.UpSampling2D(
        layer.size, name=builder.name(f"{value.name}_repeated"), dtype="float32"
    )
    around = twin.EdgePadding(
        [size // 2 for size in layer.size], name=builder.name(f"{value.name}_padded")
    )
    pixels = Value(source.tensor, around.name, codes=around(repeated(codes)), grid=grid)
    rows, columns = (_triangle(size) for size in layer.size)
    taps = np.repeat(np.outer(rows, columns)[..., None, None], channels, axis=2)
    # What quantizes the values, if anything does, stands behind the layer: it decides
    # the grid. Means of no negative codes are none, either.
    value.linear = linears.Linear(
        twin.DEPTHWISE, layer, None, pixels,
        np.full(channels, channels / taps.sum()), np.zeros(channels),
        "relu" if grid.low == 0 else None, taps=taps,
    )  # fmt: skip
    builder.settle(value)


def _triangle(size: int) -> np.ndarray:
    """Weights of repeated pixels around one of the output, for one axis."""
    if size % 2:
        return np.ones(size)
    return np.array([1.0, *[2.0] * (size - 1), 1.0])


def global_pool(builder, value, source, layer) -> None:
    """Codes of averages over an image for an int8 head, or floats.

    Args:
        builder: of the twin.
        value: what the layer puts out; is set.
        source: its input.
        layer: the trained network's.
    """

    is_int8_head = builder.options.head == "int8" and builder.can_be_codes(source)
    sizes = source.tensor.shape[1:-1]
    if is_int8_head and all(sizes):
        _, grid = builder.codes(source)
        channels = int(source.tensor.shape[-1])
        size = math.prod(sizes)
        pooled = Value(value.tensor, f"{value.name}_sum")
        finer = 255 // (grid.high - grid.low)
        step = grid.step * (grid.high - grid.low) / 255
        wanted = (
            grids.grid(step, 0, 255)
            if grid.low == 0
            else grids.grid(grid.step / finer, grid.low * finer, grid.high * finer)
        )
        linear = linears.Linear(
            twin.DEPTHWISE, layer, None, source,
            np.full(channels, 1.0 / size), np.full(channels, _UP * wanted.step),
            taps=np.ones((*sizes, channels, 1)), strides=(1,) * len(sizes),
        )  # fmt: skip
        builder.emit_integer(pooled, linear, wanted)
        builder.note(value.name, _ROUNDED_HEAD)
        flat = _layers.Flatten(name=builder.name(value.name), dtype="float32")
        if layer.keepdims:
            value.codes, value.grid = pooled.codes, wanted
        else:
            value.codes, value.grid = flat(pooled.codes), wanted
        return
    made = copy_of(layer, builder.name(value.name))
    value.values = made(builder.values(source))
