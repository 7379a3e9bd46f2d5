"""Functions that write layers as QONNX operators.

A function takes (writer, node, layer, names of the inputs) and returns the name of the
result. `layer` is the trained layer, unwrapped, or the stock layer that computes the
same.
"""

import math
from collections.abc import Callable

import numpy as np

from tf_lowbit.compat import Node, keras
from tf_lowbit.export import layer_table
from tf_lowbit.export.integer import twin
from tf_lowbit.export.lowering import elementwise, forms
from tf_lowbit.export.qonnx.grids import quantize
from tf_lowbit.network import inspection, layer_registry, passthrough

_layers = keras.layers


def channels_first(rank: int) -> list[int]:
    """The axes of Keras's layout in ONNX's order: [0, 3, 1, 2] for an image."""
    return [0, rank - 1, *range(1, rank - 1)] if rank > 2 else list(range(rank))


def _channels_last(rank):
    return [0, *range(2, rank), 1] if rank > 2 else list(range(rank))


def _pads(layer, sizes, window, strides, dilation) -> list[int]:
    """Keras's padding in ONNX's format: before each axis, then behind each axis."""
    before, behind = [], []
    for size, width, stride, gap in zip(sizes, window, strides, dilation, strict=True):
        width = (width - 1) * gap + 1
        total = 0
        if layer.padding == "same":
            total = max((math.ceil(size / stride) - 1) * stride + width - size, 0)
        first = total // 2
        if layer.padding == "causal":
            first = total = width - 1
        before.append(first)
        behind.append(total - first)
    return before + behind


def _conv(writer, node, layer, inputs):
    shape = writer.shape(node.keras_inputs[0])
    is_depthwise = layer_table.kind_of(layer) == twin.DEPTHWISE
    attribute = "depthwise_kernel" if is_depthwise else "kernel"
    window, strides = list(layer.kernel_size), list(layer.strides)
    dilation = list(layer.dilation_rate)

    def arrange(kernel):
        if is_depthwise:
            # The outputs of a channel are consecutive in both layouts.
            kernel = np.broadcast_to(kernel, (*kernel.shape[:-2], *own[-2:]))
            kernel = kernel.reshape(*kernel.shape[:-2], 1, -1)
        return np.moveaxis(kernel, (-1, -2), (0, 1))

    own = tuple(getattr(layer, attribute).shape)
    weight = writer.weight(node, layer, attribute, arrange)
    return writer.add(
        "Conv",
        [inputs[0], weight, *_bias(writer, layer)],
        dilations=dilation,
        group=shape[1] if is_depthwise else layer.groups,
        kernel_shape=window,
        pads=_pads(layer, shape[2:], window, strides, dilation),
        strides=strides,
    )


def _conv_transpose(writer, node, layer, inputs):
    window, strides = list(layer.kernel_size), list(layer.strides)
    wide = [(k - 1) * d + 1 for k, d in zip(window, layer.dilation_rate, strict=True)]
    sizes = zip(wide, strides, strict=True)
    # Keras outputs stride times input, plus, with padding="valid", what the kernel
    # reaches beyond.
    over = [0 if layer.padding == "valid" else max(k - s, 0) for k, s in sizes]
    weight = writer.weight(
        node, layer, "kernel", lambda kernel: np.moveaxis(kernel, (-1, -2), (0, 1))
    )
    return writer.add(
        "ConvTranspose",
        [inputs[0], weight, *_bias(writer, layer)],
        dilations=list(layer.dilation_rate),
        group=1,
        kernel_shape=window,
        output_padding=[max(s - k, 0) for k, s in zip(wide, strides, strict=True)],
        pads=[o // 2 for o in over] + [o - o // 2 for o in over],
        strides=strides,
    )


def _bias(writer, layer):
    return [writer.constant("bias", layer.bias.numpy())] if layer.use_bias else []


def _dense(writer, node, layer, inputs):
    rank = len(node.output_shapes)
    if rank == 2:
        weight = writer.weight(node, layer, "kernel", lambda kernel: kernel)
        made = writer.add("MatMul", [inputs[0], weight])
        bias = _bias(writer, layer)
        return writer.add("Add", [made, *bias]) if bias else made
    # Over the last axis of images and series: a convolution with kernel size 1.
    ones = [1] * (rank - 2)
    weight = writer.weight(
        node, layer, "kernel", lambda kernel: kernel.T.reshape(*kernel.T.shape, *ones)
    )
    return writer.add(
        "Conv",
        [inputs[0], weight, *_bias(writer, layer)],
        dilations=ones,
        group=1,
        kernel_shape=ones,
        pads=[0] * 2 * len(ones),
        strides=ones,
    )


def _pool(operator, **attributes):
    def form(writer, node, layer, inputs):
        sizes = writer.shape(node.keras_inputs[0])[2:]
        window, strides = np.ravel(layer.pool_size), np.ravel(layer.strides)
        window, strides = window.tolist(), strides.tolist()
        return writer.add(
            operator,
            inputs,
            kernel_shape=window,
            pads=_pads(layer, sizes, window, strides, [1] * len(sizes)),
            strides=strides,
            **attributes,
        )

    return form


def _global_pool(operator):
    def form(writer, node, layer, inputs):
        shape = writer.shape(node.keras_inputs[0])
        pooled = [*shape[:2], *[1] * (len(shape) - 2)]
        made = writer.add(operator, inputs, pooled)
        return made if layer.keepdims else writer.add("Flatten", [made], axis=1)

    return form


def _batch_norm(writer, node, layer, inputs):
    if writer.fold_batch_norm:
        return _scale(writer, node, layer, inputs)
    count = node.output_shapes[-1]
    parameters = {
        "scale": layer.gamma.numpy() if layer.scale else np.ones(count),
        "shift": layer.beta.numpy() if layer.center else np.zeros(count),
        "mean": layer.moving_mean.numpy(),
        "variance": layer.moving_variance.numpy(),
    }
    names = [writer.constant(name, values) for name, values in parameters.items()]
    epsilon = float(layer.epsilon)
    return writer.add("BatchNormalization", [*inputs, *names], epsilon=epsilon)


def _layer_norm(writer, node, layer, inputs):
    shape, (x,) = writer.shape(node.keras_inputs[0]), inputs
    reduced, channels = [shape[0], 1, *shape[2:]], [-1, *[1] * (len(shape) - 2)]

    def mean(of):
        return writer.add("ReduceMean", [of], reduced, axes=[1], keepdims=1)

    centred = writer.add("Sub", [x, mean(x)])
    variance = mean(writer.add("Mul", [centred, centred]))
    epsilon = writer.constant("epsilon", layer.epsilon)
    above = writer.add("Add", [variance, epsilon], reduced)
    deviation = writer.add("Sqrt", [above], reduced)
    made = writer.add("Div", [centred, deviation])
    if layer.scale:
        gain = writer.constant("gain", layer.gamma.numpy().reshape(channels))
        made = writer.add("Mul", [made, gain])
    if layer.center:
        offset = writer.constant("offset", layer.beta.numpy().reshape(channels))
        made = writer.add("Add", [made, offset])
    return made


def _scale(writer, node, layer, inputs):
    """Writes a gain and an offset per channel."""
    rank, made = len(node.output_shapes), inputs[0]
    parts = zip(("Mul", "Add"), elementwise.scale(node), (1.0, 0.0), strict=True)
    for operator, values, neutral in parts:
        if (values != neutral).any():
            if values.size > 1:
                values = values.reshape(-1, *[1] * (rank - 2))
            constant = writer.constant(f"{operator.lower()}_by", values)
            made = writer.add(operator, [made, constant])
    return made


def _join(writer, node, layer, inputs):
    operator = "Add" if elementwise.join(node) is np.add else "Mul"
    parts = [
        name
        if factor == 1.0
        else writer.add(
            "Mul", [name, writer.constant("factor", factor)], writer.shape(tensor)
        )
        for name, factor, tensor in zip(
            inputs, elementwise.factors(node), node.keras_inputs, strict=True
        )
    ]
    made = parts[0]
    for part in parts[1:]:
        made = writer.add(operator, [made, part])
    return made


def _activation(writer, node, layer, inputs):
    name = layer_registry.relu_kind(layer) or elementwise.activation(node)
    (x,) = inputs
    if name == "relu6":
        limits = [writer.constant("low", 0.0), writer.constant("high", 6.0)]
        return writer.add("Clip", [x, *limits])
    if name == "softmax":
        return writer.add("Softmax", [x], axis=1)
    if name == "swish":
        return writer.add("Mul", [x, writer.add("Sigmoid", [x])])
    if name == "gelu":
        scaled = writer.constant("scale", np.sqrt(0.5))
        made = writer.add("Mul", [x, scaled])
        made = writer.add("Erf", [made])
        made = writer.add("Add", [made, writer.constant("one", 1.0)])
        made = writer.add("Mul", [x, made])
        return writer.add("Mul", [made, writer.constant("half", 0.5)])
    if name == "linear":
        return x
    return writer.add(name.capitalize(), [x])


def _leaky_relu(writer, node, layer, inputs):
    return writer.add("LeakyRelu", inputs, alpha=float(layer.alpha))


def _prelu(writer, node, layer, inputs):
    slope = layer.alpha.numpy()
    order = [axis - 1 for axis in channels_first(slope.ndim + 1)[1:]]
    slope = writer.constant("alpha", slope.transpose(order))
    return writer.add("PRelu", [*inputs, slope])


def _dot(writer, node, layer, inputs):
    """Writes a matrix product, transposed for channels first: `(x y)^T = y^T x^T`."""
    first, second = inputs
    if forms.dot_axes(layer) == (2, 2):
        second = writer.transpose(second, writer.shape(node.keras_inputs[1]), [0, 2, 1])
    return writer.add("MatMul", [second, first])


def _argmax(writer, node, layer, inputs):
    how = {"axis": 1, "keepdims": 0, "select_last_index": 0}
    return writer.add("ArgMax", inputs, dtype=np.int64, **how)


def _concatenate(writer, node, layer, inputs):
    rank = len(node.output_shapes)
    axis = channels_first(rank).index(layer.axis % rank)
    return writer.add("Concat", inputs, axis=axis)


def _reshape(writer, node, layer, inputs):
    """Writes a Flatten or Reshape of the elements in Keras's order."""
    shape, target = writer.shape(node.keras_inputs[0]), list(node.output_shapes)
    made = inputs[0]
    if len(target) > 2 or math.prod(shape[2:]) > 1:
        made = writer.transpose(made, shape, _channels_last(len(shape)))
    if len(target) == 2:
        return writer.add("Flatten", [made], axis=1)
    target = [shape[0], *target[1:]]
    # 0 keeps the batch.
    sizes = writer.constant("sizes", [0, *target[1:]], np.int64)
    made = writer.add("Reshape", [made, sizes], target)
    return writer.transpose(made, target, channels_first(len(target)))


def _permute(writer, node, layer, inputs):
    rank = len(node.output_shapes)
    place = channels_first(rank)
    dims = [0, *layer.dims]
    order = [place.index(dims[axis]) for axis in place]
    return writer.transpose(inputs[0], writer.shape(node.keras_inputs[0]), order)


def _zero_pad(writer, node, layer, inputs):
    rank = len(node.output_shapes)
    sides = np.zeros((rank, 2), np.int64)
    given = np.reshape(layer.padding, (-1, 2))
    sides[1 : len(given) + 1] = given
    pads = sides[list(channels_first(rank))].T.ravel()
    pads = writer.constant("pads", pads, np.int64)
    return writer.add("Pad", [*inputs, pads], mode="constant")


def _crop(writer, node, layer, inputs):
    before, behind = np.reshape(layer.cropping, (-1, 2)).T.tolist()
    sizes = writer.shape(node.keras_inputs[0])[2:]
    ends = [size - cut for size, cut in zip(sizes, behind, strict=True)]
    axes = list(range(2, 2 + len(sizes)))
    parts = {"starts": before, "ends": ends, "axes": axes}
    names = [writer.constant(name, part, np.int64) for name, part in parts.items()]
    return writer.add("Slice", [*inputs, *names])


def _upsample(writer, node, layer, inputs):
    is_linear = getattr(layer, "interpolation", "nearest") == "bilinear"
    scales = writer.constant("scales", [1, 1, *np.ravel(layer.size)])
    region = writer.constant("region", np.zeros(0))  # Required, but not read.
    return writer.add(
        "Resize",
        [*inputs, region, scales],
        mode="linear" if is_linear else "nearest",
        coordinate_transformation_mode="half_pixel" if is_linear else "asymmetric",
        nearest_mode="floor",
    )


# From the kind of a layer (`layer_table`) to its function.
_FUNCTIONS = {
    "argmax": _argmax,
    "average_pool": _pool("AveragePool", count_include_pad=0),
    "concatenate": _concatenate,
    "conv": _conv,
    "crop": _crop,
    "dense": _dense,
    "dot": _dot,
    "depthwise": _conv,
    "flatten": _reshape,
    "global_average_pool": _global_pool("GlobalAveragePool"),
    "global_max_pool": _global_pool("GlobalMaxPool"),
    "interpolate": _upsample,
    "layer_norm": _layer_norm,
    "leaky_relu": _leaky_relu,
    "max_pool": _pool("MaxPool"),
    "permute": _permute,
    "prelu": _prelu,
    "reshape": _reshape,
    "transposed": _conv_transpose,
    "upsample": _upsample,
    "zero_pad": _zero_pad,
}


def form_of(node: Node, layer: keras.layers.Layer) -> Callable[..., str]:
    """The function that writes a node."""
    own = inspection.wrapped_layer(node.layer)
    if own is not node.layer and not layer_registry.kernels(own):
        return quantize
    if isinstance(layer, layer_registry.BATCH_NORMS):
        return _batch_norm
    row = layer_table.row_of(layer)
    if row is not None and row.kind in _FUNCTIONS:
        return _FUNCTIONS[row.kind]
    if passthrough.is_identity(node):
        return lambda writer, node, layer, inputs: inputs[0]
    if elementwise.scale(node) is not None:
        return _scale
    if elementwise.join(node) is not None:
        return _join
    return _activation  # As `lowering.problems` made sure.
