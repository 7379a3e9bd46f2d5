"""Stock layers of Keras for TensorFlow operations in a graph, and for `Resizing`.

`tf.reshape(x, (-1, 12))` in a functional model is a Keras layer that calls the
operation. If a stock layer computes the same, it is exported in its place. For an
argmax, which Keras lacks, this is `plain_layers.ArgMax`.
"""

import math

import numpy as np

from tf_lowbit.compat import Node, keras
from tf_lowbit.export.integer import plain_layers
from tf_lowbit.network import graph, inspection, passthrough

_layers = keras.layers


def layer_of(node: Node) -> keras.layers.Layer:
    """The stock layer that computes what a node does, or its own layer, unwrapped."""
    layer = inspection.wrapped_layer(node.layer)
    if type(layer) is _layers.Resizing:
        made = (
            None if layer.crop_to_aspect_ratio else _resize(node, layer.interpolation)
        )
    else:
        make = _MAKERS.get(passthrough.operation(layer))
        # `tf.shape(x)[0]` is an operation, too, on a tensor without examples.
        has_examples = (node.keras_inputs[0].shape.rank or 0) > 1
        made = make(node) if make is not None and has_examples else None
    if made is None:
        return layer
    made._name = layer.name  # For messages.
    return made


def _shapes(node) -> tuple[tuple, tuple]:
    (made,) = graph.outputs_of(node)
    return tuple(node.keras_inputs[0].shape), tuple(made.shape)


def _argument(node, position: int, *names: str, default=None):
    if len(node.call_args) > position:
        return node.call_args[position]
    return next((node.call_kwargs[n] for n in names if n in node.call_kwargs), default)


def _resize(node, method):
    """Enlarges images by whole factors."""
    (_, *sizes, _), (_, *wanted, _) = _shapes(node)
    if None in (*sizes, *wanted) or len(sizes) != 2:
        return None
    factors = [b // a for a, b in zip(sizes, wanted, strict=True)]
    if [a * f for a, f in zip(sizes, factors, strict=True)] != wanted:
        return None
    return _layers.UpSampling2D(factors, interpolation=str(method).lower())


def _image_resize(node):
    method = _argument(node, 2, "method", default="bilinear")
    others = {"preserve_aspect_ratio", "antialias"} & set(node.call_kwargs)
    if len(node.call_args) > 3 or any(node.call_kwargs[name] for name in others):
        return None
    return _resize(node, getattr(method, "value", method))


def _reshape(node):
    """Reshapes each example in C order."""
    shape, wanted = _shapes(node)
    sizes = (*shape[1:], *wanted[1:])
    if shape[:1] != wanted[:1] or None in sizes:
        return None
    is_same_size = math.prod(shape[1:]) == math.prod(wanted[1:])
    return _layers.Reshape(wanted[1:]) if is_same_size else None


def _transpose(node):
    order = _argument(node, 1, "perm")
    if order is None or _argument(node, 3, "conjugate", default=False):
        return None
    order = [int(axis) for axis in np.ravel(order)]
    return _layers.Permute(order[1:]) if order[0] == 0 else None


def _concat(node):
    axis = int(_argument(node, 1, "axis"))
    if axis % len(node.keras_inputs[0].shape) == 0:
        return None
    return _layers.Concatenate(axis=axis)


def _pad(node):
    """Pads steps, height and width, or channels with zeros."""
    if passthrough.kept(node) is not passthrough.Kept.GRID:
        return None
    mode = str(_argument(node, 2, "mode", default="CONSTANT")).upper()
    sides = np.asarray(_argument(node, 1, "paddings"))
    if mode != "CONSTANT" or sides[0].any():
        return None
    *inner, channels = [tuple(map(int, side)) for side in sides[1:]]
    if any(channels):
        return plain_layers.ZeroPadding([*inner, channels])
    if len(inner) == 1:
        return _layers.ZeroPadding1D(inner[0])
    return _layers.ZeroPadding2D(inner) if len(inner) == 2 else None


def _slice(node):
    """Crops steps, or height and width, or takes every nth of them."""
    (_, *sizes, _), wanted = _shapes(node)
    given = _argument(node, 1, "slice_spec")
    given = tuple(given) if isinstance(given, tuple | list) else (given,)
    # Keras stores a slice as a dict.
    given = tuple(slice(*g.values()) if isinstance(g, dict) else g for g in given)
    if len(wanted) != len(sizes) + 2 or None in sizes:
        return None
    place = next((i for i, part in enumerate(given) if part is Ellipsis), None)
    if place is not None:
        more = len(sizes) + 3 - len(given)
        given = (*given[:place], *[slice(None)] * more, *given[place + 1 :])
    parts = [*given, *[slice(None)] * (len(sizes) + 2 - len(given))]
    if not all(_is_fixed(part) for part in parts):
        return None
    if parts[0] != slice(None) or parts[-1] != slice(None):
        return None
    spans = [part.indices(size) for part, size in zip(parts[1:-1], sizes, strict=True)]
    steps = [step for _, _, step in spans]
    if any(step != 1 for step in steps):
        is_whole = all(
            step > 0 and (a, b) == (0, size)
            for (a, b, step), size in zip(spans, sizes, strict=True)
        )
        pools = {1: _layers.MaxPooling1D, 2: _layers.MaxPooling2D}
        pool = pools.get(len(sizes)) if is_whole else None
        # The largest of a single one.
        return None if pool is None else pool(1, steps)
    cut = [(a, size - b) for (a, b, _), size in zip(spans, sizes, strict=True)]
    if len(cut) == 1:
        return _layers.Cropping1D(cut[0])
    return _layers.Cropping2D(cut) if len(cut) == 2 else None


def _is_fixed(part) -> bool:
    """Whether it is a slice with integer bounds."""
    if not isinstance(part, slice):
        return False
    numbers = (part.start, part.stop, part.step)
    return all(n is None or isinstance(n, int) for n in numbers)


def _argmax(node):
    """Class numbers of the last axis."""
    shape, _ = _shapes(node)
    axis = _argument(node, 1, "axis")
    is_last = axis is not None and int(axis) % len(shape) == len(shape) - 1
    if not is_last or len(shape) < 2 or shape[-1] is None:
        return None
    (made,) = graph.outputs_of(node)
    return plain_layers.ArgMax(made.dtype.name)


def _mean(node):
    """Averages over steps, or height and width."""
    shape, _ = _shapes(node)
    axes = _argument(node, 1, "axis")
    if axes is None:
        return None
    keepdims = bool(_argument(node, 2, "keepdims", default=False))
    axes = sorted(int(axis) % len(shape) for axis in np.ravel(axes))
    if axes != list(range(1, len(shape) - 1)):
        return None
    pools = {3: _layers.GlobalAveragePooling1D, 4: _layers.GlobalAveragePooling2D}
    pool = pools.get(len(shape))
    return None if pool is None else pool(keepdims=keepdims)


_MAKERS = {
    "argmax": _argmax,
    "concat": _concat,
    "expand_dims": _reshape,
    "getitem": _slice,
    "pad": _pad,
    "reduce_mean": _mean,
    "reshape": _reshape,
    "resize": _image_resize,
    "squeeze": _reshape,
    "transpose": _transpose,
}
