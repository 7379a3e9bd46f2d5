"""QONNX files: what FPGA tools (FINN, hls4ml) read.

QONNX (Pappalardo et al., arXiv:2206.07527) is ONNX with quantization as operators:
`Quant` (scale, zero point and bit-width as inputs), `BipolarQuant` (levels -s and +s)
and `MultiThreshold` (how many thresholds are at or below x). All tensors are float32
with values on the quantizers' grids, so that a file computes what training computes.

**Layout.** Images are (batch, channels, height, width) and series (batch, channels,
steps), as ONNX has them; so are the file's inputs and outputs. A Transpose stands only
where Keras's order of the elements shows: in front of Flatten, and around Reshape.

**Grids.** Zero points are 0. A grid becomes the smallest `Quant` that holds its codes:

| codes | operator |
|---|---|
| 0 .. 2^k - 1 | Relu, and Quant of k bits, signed=0 |
| -2^(k-1) (+ 1 if narrow) .. 2^(k-1) - 1 | Quant of k bits, signed=1, narrow as it |
| -n, -n + 2, ..., n = 2^k - 1 (odd) | Quant of k + 1 bits, signed=1, narrow=1 |
| -1, 1 | BipolarQuant |

The odd grid of k bits (DoReFa, StatsQ) has no zero. In k bits it would need a zero
point of one half, which qonnx's type inference does not take. Its odd codes are written
in k + 1 bits.

Names: each layer's result has the layer's name. A weight `conv_kernel` is a constant
with values on its grid, and `conv_kernel_quant` is what its quantizer puts out.
"""

import importlib
import math
from pathlib import Path

import numpy as np

from tf_lowbit import inspection
from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks as arguments
from tf_lowbit.export import checks, elementwise, files, forms
from tf_lowbit.export.linear import refusal
from tf_lowbit.scheme import graph, passing, registry
from tf_lowbit.version import __version__

# Imported by `require_onnx`: it takes its time, and few need it.
onnx = None

_layers = keras.layers
QUANT, MULTI_THRESHOLD = "quant", "multithreshold"
ACTIVATIONS = (QUANT, MULTI_THRESHOLD)
# Of the standard operators: the first at which all of QCDQ's are there.
_OPSET = 13
_IR_VERSION = 8
_DOMAIN = "qonnx.custom_op.general"
# Where qonnx looks for the bits of a tensor.
_ANNOTATION = "finn_datatype"
_LAYOUTS = {2: "NC", 3: "NCW", 4: "NCHW"}
_REMEDY = (
    "end the network in front of it and compute the rest outside, or train the network "
    "with a layer of docs/how_to/qonnx.md's list in its place"
)
_REMEDIES = dict.fromkeys(
    (_layers.SeparableConv1D, _layers.SeparableConv2D),
    "split it before quantizing: tf_lowbit.split_separable",
)


def to_qonnx(
    model,
    path,
    *,
    activations: str = QUANT,
    fold_batch_norm: bool = False,
    batch_size: int = 1,
) -> Path:
    """Writes a trained low-bitwidth network as a QONNX file.

    Weight codes, steps and activation grids are those of the trained quantizers; what
    was trained in float stays float, and biases and batch normalisation are float32.
    Images are (batch, channels, height, width) in the file.
    `tf_lowbit.export.compare_qonnx` runs a file against the network.

    Args:
        model: what `tf_lowbit.quantize` made, trained and calibrated, of fixed input
            sizes; or a `LowBitTrainer` of one student.
        path: where the file goes, `.onnx` by custom; written under a temporary name,
            then renamed.
        activations: "quant" for `Quant` operators; "multithreshold" for a
            `MultiThreshold` that puts integer codes out, and a Mul by the step. Its
            thresholds decide as the trained quantizer for every float32 input.
        fold_batch_norm: write batch normalisation as a Mul and an Add for each channel,
            not as a BatchNormalization operator.
        batch_size: examples that the file takes at a time.

    Returns:
        The path.

    Raises:
        ImportError: without the package `onnx`, of the extra `qonnx`.
        ValueError: for a model that is not quantized, or arguments that there are not.
        ExportError: (a ValueError) naming a layer without a form in QONNX, or a
            quantizer that is not at 1 to 8 bits or not calibrated.
        OSError: if the file cannot be written. No half file is left.
    """
    require_onnx()
    arguments.path("path", path)
    arguments.integer("batch_size", batch_size, at_least=1)
    arguments.flag("fold_batch_norm", fold_batch_norm)
    arguments.choice("activations", activations, ACTIVATIONS)
    model = checks.single_network(model)
    checks.require_exportable(model)
    writer = _Writer(activations, fold_batch_norm, batch_size)
    proto = writer.write(forms.split_activations(model), model.output_names)
    return files.replace_file(path, proto.SerializeToString())


def require_onnx() -> None:
    """Imports `onnx` for this module, or raises an ImportError that says how to."""
    global onnx
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            "QONNX files are written with the package onnx: pip install '.[qonnx]'"
        ) from error


def channels_first(rank: int) -> list[int]:
    """The axes of Keras's layout in the order of ONNX's: [0, 3, 1, 2] of an image."""
    return [0, rank - 1, *range(1, rank - 1)] if rank > 2 else list(range(rank))


def _channels_last(rank):
    return [0, *range(2, rank), 1] if rank > 2 else list(range(rank))


class _Writer:
    """The graph so far, and what a layer's form needs of the network.

    A form is a function (writer, node, layer, names of its inputs) -> name of the
    result; `layer` is the trained layer, unwrapped.
    """

    def __init__(self, activations, fold_batch_norm, batch_size):
        self.activations = activations
        self.fold_batch_norm = fold_batch_norm
        self._batch = batch_size
        self._nodes, self._constants, self._values, self._annotations = [], [], {}, []
        self._names: dict[int, str] = {}  # Of a Keras tensor, by its id.
        self._ends: dict[int, str] = {}  # Of the network's outputs, likewise.
        self._weights: dict[tuple[str, str], str] = {}
        self._quantizers: dict = {}
        self._taken: set[str] = set()
        self._layer = ""

    def write(self, model, ends):
        """The file of a network, as a `ModelProto`.

        Args:
            model: each weight layer's activation is a layer behind it.
            ends: names of the outputs.
        """
        self._quantizers = {
            (t.layer.name, t.attribute): t for t in inspection.quantized_tensors(model)
        }
        self._taken = {layer.name for layer in model.layers} | {*ends}
        for tensor in model.inputs:
            layer = graph.producer(tensor).layer
            if not tensor.dtype.is_floating:
                raise refusal(layer, "Inputs must be floats", "make them float32")
            self._names[id(tensor)] = layer.name
        inputs = [self._value(self._names[id(t)], self.shape(t)) for t in model.inputs]
        for tensor, name in zip(model.outputs, ends, strict=True):
            self._ends.setdefault(id(tensor), name)
        for node in graph.calls(model):
            self._write_node(node)
        for tensor, name in zip(model.outputs, ends, strict=True):
            source = self._names[id(tensor)]
            if source != name:  # Such as a layer that the file has no node for.
                made = self.add("Identity", [source], self.shape(tensor))
                self._rename(made, name)
        outputs = [self._values.pop(name) for name in ends]
        made = onnx.helper.make_graph(
            self._nodes,
            model.name,
            inputs,
            outputs,
            self._constants,
            value_info=list(self._values.values()),
        )
        made.quantization_annotation.extend(self._annotations)
        opsets = [
            onnx.helper.make_opsetid("", _OPSET),
            onnx.helper.make_opsetid(_DOMAIN, 1),
        ]
        return onnx.helper.make_model(
            made,
            opset_imports=opsets,
            ir_version=_IR_VERSION,
            producer_name="tf_lowbit",
            producer_version=__version__,
        )

    def _write_node(self, node):
        layer = inspection.wrapped_layer(node.layer)
        forms.require_inference(node, layer)
        if len(graph.outputs_of(node)) != 1:
            raise refusal(layer, "Every layer must have one output", _REMEDY)
        (output,) = graph.outputs_of(node)
        for tensor in (*node.keras_inputs, output):
            if None in tensor.shape[1:]:
                raise refusal(
                    layer,
                    "Tensors must have fixed sizes",
                    "build the network with a fixed input shape",
                    f"with a tensor of {tuple(tensor.shape)}",
                )
        self._layer = node.layer.name
        before = len(self._nodes)
        inputs = [self._names[id(tensor)] for tensor in node.keras_inputs]
        made = _form(node, layer)(self, node, layer, inputs)
        if len(self._nodes) > before and made == self._nodes[-1].output[0]:
            made = self._rename(made, self._name_of(output))
        self._names[id(output)] = made

    def _name_of(self, tensor):
        """The output's name, or the layer's if no other tensor has it."""
        name = self._ends.get(id(tensor), self._layer)
        is_used = name in self._values or name in self._ends.values()
        if is_used and id(tensor) not in self._ends:
            return graph.free_name(name, self._taken)
        return name

    def _rename(self, old, name) -> str:
        """Renames the last node's output, which nothing reads yet."""
        self._nodes[-1].output[0] = self._nodes[-1].name = name
        self._values[name] = self._values.pop(old)
        self._values[name].name = name
        for annotation in self._annotations[-1:]:
            if annotation.tensor_name == old:
                annotation.tensor_name = name
        return name

    def shape(self, tensor) -> list[int]:
        """The shape of a Keras tensor in the file."""
        shape = [self._batch, *tensor.shape[1:]]
        return [shape[axis] for axis in channels_first(len(shape))]

    def activation_quantizer(self, node):
        """The `QuantizedTensor` of what a layer puts out, or None."""
        return self._quantizers.get((node.layer.name, "output"))

    def add(self, operator, inputs, shape, suffix=None, domain="", **attributes) -> str:
        """Adds a node of one output, and gives its name."""
        suffix = suffix or operator.lower()
        name = graph.free_name(f"{self._layer}_{suffix}", self._taken)
        self._nodes.append(
            onnx.helper.make_node(
                operator, inputs, [name], name=name, domain=domain, **attributes
            )
        )
        self._values[name] = self._value(name, shape)
        return name

    def constant(self, suffix, values, dtype=np.float32) -> str:
        """Adds a constant, and gives its name."""
        name = graph.free_name(f"{self._layer}_{suffix}", self._taken)
        values = np.asarray(values, dtype)
        self._constants.append(onnx.numpy_helper.from_array(values, name))
        # qonnx runs node by node, and asks here for the shapes of all inputs.
        self._values[name] = self._value(name, values.shape, dtype)
        return name

    @staticmethod
    def _value(name, shape, dtype=np.float32):
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    def annotate(self, tensor, datatype) -> None:
        """Notes qonnx's data type of a tensor."""
        entry = onnx.StringStringEntryProto(key=_ANNOTATION, value=datatype)
        annotation = onnx.TensorAnnotation(tensor_name=tensor)
        annotation.quant_parameter_tensor_names.append(entry)
        self._annotations.append(annotation)

    def transpose(self, tensor, shape, order) -> str:
        """Adds a Transpose of a tensor of a shape, unless it changes nothing."""
        if order == list(range(len(order))):
            return tensor
        return self.add("Transpose", [tensor], [shape[i] for i in order], perm=order)

    def quant(self, tensor, shape, suffix, scale, levels) -> str:
        """Adds the quantizer of the levels: values -> values on the grid."""
        scale = self.constant(f"{suffix}_scale", scale)
        if _is_bipolar(levels):
            made = self.add(
                "BipolarQuant", [tensor, scale], shape, suffix, domain=_DOMAIN
            )
            self.annotate(made, "SCALEDINT<1>")
            return made
        bits, signed, narrow = _quant_of(levels)
        zero = self.constant(f"{suffix}_zero_point", 0.0)
        width = self.constant(f"{suffix}_bits", float(bits))
        made = self.add(
            "Quant",
            [tensor, scale, zero, width],
            shape,
            suffix,
            domain=_DOMAIN,
            signed=int(signed),
            narrow=int(narrow),
            rounding_mode="ROUND",
        )
        self.annotate(made, f"SCALEDINT<{bits}>")
        return made

    def weight(self, node, layer, attribute, arrange) -> str:
        """The name of a kernel, behind its quantizer if it has one; once a layer.

        Args:
            node: of the graph.
            layer: whose kernel it is.
            attribute: of the kernel.
            arrange: function from an array of the kernel's rank to ONNX's order.
        """
        key = node.layer.name, attribute
        if key in self._weights:
            return self._weights[key]
        tensor = self._quantizers.get(key)
        if tensor is None:
            values = arrange(getattr(layer, attribute).numpy())
            made = self.constant(attribute, values)
        else:
            step = np.asarray(
                tensor.quantizer.step(tensor.latent, tensor.variables), np.float32
            )
            values = arrange(tensor.codes().numpy() * step)
            scale = step.reshape(()) if step.size == 1 else arrange(step)
            constant = self.constant(attribute, values)
            levels = tensor.quantizer.level_codes(tensor.bits)
            made = self.quant(
                constant, values.shape, f"{attribute}_quant", scale, levels
            )
        self._weights[key] = made
        return made


# --- grids ----------------------------------------------------------------------------


def _is_bipolar(levels) -> bool:
    return levels == range(-1, 2, 2)


def _quant_of(levels) -> tuple[int, bool, bool]:
    """Bits, signed and narrow of the smallest Quant that holds all levels."""
    low, high = levels[0], levels[-1]
    if low >= 0:
        return max(high.bit_length(), 1), False, False
    bits = max(high, -low - 1).bit_length() + 1
    return bits, True, low > -(2 ** (bits - 1))


def _quantize(writer, node, layer, inputs):
    """The form of an activation quantizer."""
    tensor = writer.activation_quantizer(node)
    levels = tensor.quantizer.level_codes(tensor.bits)
    step = np.float32(tensor.quantizer.step(None, tensor.variables))
    _require_uniform(tensor, layer, levels, step)
    shape = writer.shape(node.keras_inputs[0])
    if writer.activations == MULTI_THRESHOLD:
        return _multi_threshold(writer, tensor, levels, step, shape, inputs)
    if levels[0] == 0:
        # Quant clips at 0 by itself; tools know a quantized ReLU by the pair.
        inputs = [writer.add("Relu", inputs, shape)]
    return writer.quant(inputs[0], shape, "quant", step, levels)


def _require_uniform(tensor, layer, levels, step) -> None:
    """Refuses a quantizer that does not round to the nearest of its Quant's codes."""
    low, high = levels[0], levels[-1]
    _, signed, narrow = _quant_of(levels)
    is_whole = levels.step == 1 and low == (-high - (not narrow) if signed else 0)
    is_whole &= (high + 1).bit_count() == 1
    # Away from the middles, where rounding in float32 decides.
    points = np.arange(low - 1, high + 1.5)[:, np.newaxis] + (0.25, 0.75)
    wanted = np.clip(np.rint(points), low, high)
    if _is_bipolar(levels):
        is_whole, wanted = True, np.where(points >= 0, 1, -1)
    values = tf.constant(points * step, tf.float32)
    found = tensor.quantizer.codes(values, tensor.variables).numpy()
    if not is_whole or (found != wanted).any():
        raise refusal(
            layer,
            "Activations must be rounded to the nearest of 2^k levels, or of 2^k - 1 "
            "about zero",
            "train with dorefa, lsq, pact or uniform activations",
            f"with {tensor.quantizer!r}",
        )


def _multi_threshold(writer, tensor, levels, step, shape, inputs):
    codes = np.asarray(levels)
    # The quantizer rounds in float32, half to even: the least value of each code lies
    # within a few floats of the middle.
    middles = ((codes[1:] + codes[:-1]) / 2 * step).astype(np.float32)
    candidates = [middles]
    for direction in (-np.inf, np.inf):
        value = middles
        for _ in range(4):
            value = np.nextafter(value, np.float32(direction))
            candidates.append(value)
    candidates = np.sort(np.stack(candidates), axis=0)
    found = tensor.quantizer.codes(tf.constant(candidates), tensor.variables).numpy()
    first = (found >= codes[1:]).argmax(axis=0)
    thresholds = candidates[first, np.arange(len(middles))]
    bits, signed, _ = _quant_of(levels)
    datatype = f"{'INT' if signed else 'UINT'}{bits}"
    datatype = "BIPOLAR" if _is_bipolar(levels) else datatype
    made = writer.add(
        "MultiThreshold",
        [inputs[0], writer.constant("thresholds", thresholds[np.newaxis])],
        shape,
        domain=_DOMAIN,
        out_dtype=datatype,
        out_scale=float(levels.step),
        out_bias=float(levels[0]),
        data_layout=_LAYOUTS[len(shape)],
    )
    writer.annotate(made, datatype)
    return writer.add("Mul", [made, writer.constant("step", step)], shape, "values")


# --- layers ---------------------------------------------------------------------------


def _output(writer, node):
    (tensor,) = graph.outputs_of(node)
    return writer.shape(tensor)


def _pads(layer, sizes, window, strides, dilation) -> list[int]:
    """Keras's padding, as ONNX counts it: before each axis, then behind each."""
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
    is_depthwise = type(layer) is _layers.DepthwiseConv2D
    attribute = "depthwise_kernel" if is_depthwise else "kernel"
    window, strides = list(layer.kernel_size), list(layer.strides)
    dilation = list(layer.dilation_rate)

    def arrange(kernel):
        if is_depthwise:
            # Channel i's multiples are consecutive in both.
            kernel = np.broadcast_to(kernel, (*kernel.shape[:2], *own[2:]))
            kernel = kernel.reshape(*kernel.shape[:2], 1, -1)
        return np.moveaxis(kernel, (-1, -2), (0, 1))

    own = tuple(getattr(layer, attribute).shape)
    weight = writer.weight(node, layer, attribute, arrange)
    return writer.add(
        "Conv",
        [inputs[0], weight, *_bias(writer, layer)],
        _output(writer, node),
        dilations=dilation,
        group=shape[1] if is_depthwise else layer.groups,
        kernel_shape=window,
        pads=_pads(layer, shape[2:], window, strides, dilation),
        strides=strides,
    )


def _bias(writer, layer):
    return [writer.constant("bias", layer.bias.numpy())] if layer.use_bias else []


def _dense(writer, node, layer, inputs):
    shape = _output(writer, node)
    if len(shape) == 2:
        weight = writer.weight(node, layer, "kernel", lambda kernel: kernel)
        made = writer.add("MatMul", [inputs[0], weight], shape)
        bias = _bias(writer, layer)
        return writer.add("Add", [made, *bias], shape) if bias else made
    # Over the last axis of images and series: a convolution of one point.
    ones = [1] * (len(shape) - 2)
    weight = writer.weight(
        node, layer, "kernel", lambda kernel: kernel.T.reshape(*kernel.T.shape, *ones)
    )
    return writer.add(
        "Conv",
        [inputs[0], weight, *_bias(writer, layer)],
        shape,
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
            _output(writer, node),
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
        if layer.keepdims:
            return made
        return writer.add("Flatten", [made], pooled[:2], axis=1)

    return form


def _batch_norm(writer, node, layer, inputs):
    rank = len(node.output_shapes)
    elementwise.require_last(layer, rank)
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
    return writer.add(
        "BatchNormalization",
        [*inputs, *names],
        _output(writer, node),
        epsilon=float(layer.epsilon),
    )


def _scale(writer, node, layer, inputs):
    """What multiplies each channel and adds to it."""
    shape, made = _output(writer, node), inputs[0]
    parts = zip(("Mul", "Add"), elementwise.scale(node), (1.0, 0.0), strict=True)
    for operator, values, neutral in parts:
        if (values != neutral).any():
            if values.size > 1:
                values = values.reshape(-1, *[1] * (len(shape) - 2))
            constant = writer.constant(f"{operator.lower()}_by", values)
            made = writer.add(operator, [made, constant], shape)
    return made


def _join(writer, node, layer, inputs):
    operator = "Add" if elementwise.join(node) is np.add else "Mul"
    if len({len(tensor.shape) for tensor in node.keras_inputs}) > 1:
        shapes = [tuple(tensor.shape) for tensor in node.keras_inputs]
        raise refusal(
            layer,
            "Tensors that are joined must have as many axes",
            "put a Reshape in front",
            f"of {shapes}",
        )
    shape = _output(writer, node)
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
        made = writer.add(operator, [made, part], shape)
    return made


def _activation(writer, node, layer, inputs):
    name = registry.relu_kind(layer) or elementwise.activation(node)
    shape, (x,) = _output(writer, node), inputs
    if name == "relu6":
        limits = [writer.constant("low", 0.0), writer.constant("high", 6.0)]
        return writer.add("Clip", [x, *limits], shape)
    if name == "softmax":
        return writer.add("Softmax", [x], shape, axis=1)
    if name == "swish":
        return writer.add("Mul", [x, writer.add("Sigmoid", [x], shape)], shape)
    if name == "gelu":
        scaled = writer.constant("scale", np.sqrt(0.5))
        made = writer.add("Mul", [x, scaled], shape)
        made = writer.add("Erf", [made], shape)
        made = writer.add("Add", [made, writer.constant("one", 1.0)], shape)
        made = writer.add("Mul", [x, made], shape)
        return writer.add("Mul", [made, writer.constant("half", 0.5)], shape)
    if name == "linear":
        return x
    return writer.add(name.capitalize(), [x], shape)


def _leaky_relu(writer, node, layer, inputs):
    return writer.add(
        "LeakyRelu", inputs, _output(writer, node), alpha=float(layer.alpha)
    )


def _prelu(writer, node, layer, inputs):
    slope = layer.alpha.numpy()
    order = [axis - 1 for axis in channels_first(slope.ndim + 1)[1:]]
    slope = writer.constant("alpha", slope.transpose(order))
    return writer.add("PRelu", [*inputs, slope], _output(writer, node))


def _concatenate(writer, node, layer, inputs):
    rank = len(node.output_shapes)
    axis = channels_first(rank).index(layer.axis % rank)
    return writer.add("Concat", inputs, _output(writer, node), axis=axis)


def _reshape(writer, node, layer, inputs):
    """Flatten and Reshape: of the elements in Keras's order."""
    shape, target = writer.shape(node.keras_inputs[0]), list(node.output_shapes)
    made = inputs[0]
    if len(target) > 2 or math.prod(shape[2:]) > 1:
        made = writer.transpose(made, shape, _channels_last(len(shape)))
    if len(target) == 2:
        return writer.add("Flatten", [made], _output(writer, node), axis=1)
    target = [shape[0], *target[1:]]
    # 0 is the batch as it is.
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
    sides = np.reshape(layer.padding, (-1, 2)).T.tolist()
    pads = writer.constant("pads", [0, 0, *sides[0], 0, 0, *sides[1]], np.int64)
    return writer.add("Pad", [*inputs, pads], _output(writer, node), mode="constant")


def _crop(writer, node, layer, inputs):
    before, behind = np.reshape(layer.cropping, (-1, 2)).T.tolist()
    sizes = writer.shape(node.keras_inputs[0])[2:]
    ends = [size - cut for size, cut in zip(sizes, behind, strict=True)]
    axes = list(range(2, 2 + len(sizes)))
    parts = {"starts": before, "ends": ends, "axes": axes}
    names = [writer.constant(name, part, np.int64) for name, part in parts.items()]
    return writer.add("Slice", [*inputs, *names], _output(writer, node))


def _upsample(writer, node, layer, inputs):
    how = {
        "nearest": ("nearest", "asymmetric"),
        "bilinear": ("linear", "half_pixel"),
    }.get(getattr(layer, "interpolation", "nearest"))
    if how is None:
        raise refusal(
            layer,
            "Upsampling must be by interpolation='nearest' or 'bilinear'",
            "train the network with it",
            f"with {layer.interpolation!r}",
        )
    scales = writer.constant("scales", [1, 1, *np.ravel(layer.size)])
    region = writer.constant("region", np.zeros(0))  # Not read, but asked for.
    return writer.add(
        "Resize",
        [*inputs, region, scales],
        _output(writer, node),
        mode=how[0],
        coordinate_transformation_mode=how[1],
        nearest_mode="floor",
    )


_AVERAGE = _pool("AveragePool", count_include_pad=0)
_MAX = _pool("MaxPool")
_FORMS = {
    _layers.AveragePooling1D: _AVERAGE,
    _layers.AveragePooling2D: _AVERAGE,
    _layers.Concatenate: _concatenate,
    _layers.Conv1D: _conv,
    _layers.Conv2D: _conv,
    _layers.Cropping1D: _crop,
    _layers.Cropping2D: _crop,
    _layers.Dense: _dense,
    _layers.DepthwiseConv2D: _conv,
    _layers.Flatten: _reshape,
    _layers.GlobalAveragePooling1D: _global_pool("GlobalAveragePool"),
    _layers.GlobalAveragePooling2D: _global_pool("GlobalAveragePool"),
    _layers.GlobalMaxPooling1D: _global_pool("GlobalMaxPool"),
    _layers.GlobalMaxPooling2D: _global_pool("GlobalMaxPool"),
    _layers.LeakyReLU: _leaky_relu,
    _layers.MaxPooling1D: _MAX,
    _layers.MaxPooling2D: _MAX,
    _layers.Permute: _permute,
    _layers.PReLU: _prelu,
    _layers.Reshape: _reshape,
    _layers.UpSampling1D: _upsample,
    _layers.UpSampling2D: _upsample,
    _layers.ZeroPadding1D: _zero_pad,
    _layers.ZeroPadding2D: _zero_pad,
    **dict.fromkeys(registry.BATCH_NORMS, _batch_norm),
}


def _form(node, layer):
    """The function that writes a node."""
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise refusal(
            layer,
            "Layers must have data_format='channels_last'",
            "build the network with it; the file has channels first anyway",
            f"with {layer.data_format!r}",
        )
    is_quantizer = layer is not node.layer and not registry.kernels(layer)
    if is_quantizer:
        return _quantize
    if type(layer) in _FORMS:
        return _FORMS[type(layer)]
    if passing.is_identity(node):
        return lambda writer, node, layer, inputs: inputs[0]
    if elementwise.scale(node) is not None:
        return _scale
    if elementwise.join(node) is not None:
        return _join
    if registry.relu_kind(layer) or elementwise.activation(node) is not None:
        return _activation
    raise refusal(
        layer,
        "Every layer must have a form in QONNX",
        _REMEDIES.get(type(layer), _REMEDY),
    )
