"""From a snapped twin to a TFLite file, operator by operator."""

import json

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.export import grids, twin
from tf_lowbit.export.flatbuffer import FileBuilder, schema
from tf_lowbit.export.grids import Grid
from tf_lowbit.export.snapping import ExportError, Snapped
from tf_lowbit.scheme import graph
from tf_lowbit.version import __version__

_layers = keras.layers
INPUT_TYPES = ("float32", "int8", "uint8")
SIGNATURE = "serving_default"

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
    "LOGISTIC": 1,
    "MAXIMUM": 1,
    "MAX_POOL_2D": 1,
    "MEAN": 1,
    "MUL": 1,
    "PAD": 1,
    "QUANTIZE": 1,
    "RELU": 1,
    "RELU6": 1,
    "RESHAPE": 1,
    "SOFTMAX": 1,
    "TANH": 1,
    "TRANSPOSE": 1,
}
# From unsigned to signed pixels.
REQUANTIZE_VERSION = 2
_ACTIVATIONS = {
    "relu": "RELU",
    "relu6": "RELU6",
    "sigmoid": "LOGISTIC",
    "softmax": "SOFTMAX",
    "tanh": "TANH",
}


def metadata(snapped: Snapped, input_type: str, info: dict | None) -> dict:
    """What a file says of its own making: enough to make its plan again."""
    options = snapped.options
    return {
        "tf_lowbit": __version__,
        "options": {name: getattr(options, name) for name in options.__match_args__},
        "input_type": input_type,
        "ranges": {name: list(pair) for name, pair in snapped.ranges.items()},
        "notes": [str(note) for note in snapped.notes],
        "info": info or {},
    }


def to_bytes(
    snapped: Snapped, input_type: str = "float32", info: dict | None = None
) -> bytes:
    """The file of a twin, with the weights that the twin has now.

    Args:
        snapped: of `snap`.
        input_type: "float32"; or "int8", "uint8": the input takes codes.
        info: JSON-ready, kept in the file as it is.

    Raises:
        ExportError: if the input is not quantized and `input_type` is not float32.
    """
    check_input_type(input_type)
    writer = _Writer(snapped.twin, input_type)
    about = json.dumps(metadata(snapped, input_type, info), sort_keys=True)
    return writer.run(about.encode())


def check_input_type(input_type) -> None:
    """Raises a ValueError for a type that there is not."""
    if input_type not in INPUT_TYPES:
        raise ValueError(
            f"input_type must be one of {INPUT_TYPES}. "
            f"Received: input_type={input_type!r}"
        )


class _Writer:
    """One walk over one twin. A tensor is (index in the file, its grid or None)."""

    def __init__(self, model, input_type):
        self.model = model
        self.input_type = input_type
        self.file = FileBuilder("tf_lowbit")
        self._tensors: dict[int, tuple[int, Grid | None]] = {}
        self._inputs: dict[str, int] = {}

    def run(self, about: bytes) -> bytes:
        """Walks the twin; `about` becomes the file's metadata."""
        for node in graph.nodes(self.model):
            if node.is_input:
                self._input(node)
            else:
                self._visit(node)
        outputs = {
            tensor._keras_history.layer.name: self._tensors[id(tensor)][0]
            for tensor in self.model.outputs
        }
        # In the model's order, which need not be that of its graph.
        inputs = {name: self._inputs[name] for name in twin.input_names(self.model)}
        return self.file.finish(inputs, outputs, about, SIGNATURE)

    def _input(self, node) -> None:
        (tensor,) = graph.outputs_of(node)
        name = node.layer.name
        if self.input_type == "float32":
            index = self.file.activation(name, tensor.shape, np.float32)
            self._inputs[name] = index
            self._tensors[id(tensor)] = (index, None)
            return
        readers = [
            reader
            for reader in graph.calls(self.model)
            if any(t is tensor for t in reader.keras_inputs)
        ]
        if len(readers) != 1 or not isinstance(readers[0].layer, twin.ToCodes):
            raise ExportError(
                f"input_type={self.input_type!r} needs an input that is quantized and "
                "read by nothing else: use first_layer='int8' or quantize the first "
                f"layer. Received: {name!r}, read by "
                f"{[reader.layer.name for reader in readers]}"
            )
        grid = readers[0].layer.grid
        if self.input_type == "int8":
            index = self._integer(name, tensor.shape, grid)
        else:
            zero_point = grid.zero_point + 128
            pixels = self.file.activation(
                name, tensor.shape, np.uint8, (grid.scale, zero_point)
            )
            index = self._integer(f"{name}/int8", tensor.shape, grid)
            self.file.operator(
                "QUANTIZE",
                REQUANTIZE_VERSION,
                [pixels],
                [index],
                schema.QuantizeOptionsT(),
            )
            self._inputs[name] = pixels
        self._inputs.setdefault(name, index)
        # The layer that would make the codes finds them here.
        self._tensors[id(tensor)] = (index, grid)

    def _visit(self, node) -> None:
        layer = node.layer
        sources = [self._tensors[id(t)] for t in node.keras_inputs]
        (output,) = graph.outputs_of(node)
        method = _METHODS[type(layer)]
        self._tensors[id(output)] = method(self, layer, sources, node)

    # --- helpers --------------------------------------------------------------------

    def _integer(self, name, shape, grid: Grid) -> int:
        return self.file.activation(name, shape, np.int8, (grid.scale, grid.zero_point))

    def _like(self, name, shape, grid) -> int:
        if grid is None:
            return self.file.activation(name, shape, np.float32)
        return self._integer(name, shape, grid)

    def _operator(self, name, inputs, outputs, options=None, grid=None) -> None:
        versions = FLOAT_VERSIONS if grid is None else INTEGER_VERSIONS
        self.file.operator(name, versions[name], inputs, outputs, options)

    def _reshaped(self, index, grid, name, shape) -> int:
        if list(shape).count(None) > 1:
            raise ExportError(
                "A tensor that is reshaped must have one open size, the batch. "
                f"Received: {name!r} of shape {tuple(shape)}"
            )
        target = self.file.constant(
            f"{name}/shape", np.array([s or -1 for s in shape], np.int32)
        )
        result = self._like(name, shape, grid)
        options = schema.ReshapeOptionsT([s or -1 for s in shape])
        self._operator("RESHAPE", [index, target], [result], options, grid)
        return result

    # --- integers -------------------------------------------------------------------

    def _to_codes(self, layer, sources, node):
        ((index, present),) = sources
        if present is not None:
            return index, present  # The model's input: codes already.
        shape = node.output_shapes
        grid = layer.grid
        if grid.low + grid.zero_point > grids.INT8[0]:
            clamped = self.file.activation(f"{layer.name}/clamp", shape, np.float32)
            if grid.low == 0:
                self._operator("RELU", [index], [clamped])
            else:
                lowest = np.float32(grid.low) * np.float32(grid.scale)
                bound = self.file.constant(f"{layer.name}/lowest", np.array([lowest]))
                options = schema.MaximumMinimumOptionsT()
                self._operator("MAXIMUM", [index, bound], [clamped], options)
            index = clamped
        result = self._integer(layer.name, shape, grid)
        self._operator("QUANTIZE", [index], [result], schema.QuantizeOptionsT(), grid)
        return result, grid

    def _to_values(self, layer, sources, node):
        ((index, grid),) = sources
        shape = node.output_shapes
        result = self.file.activation(layer.name, shape, np.float32)
        self._operator(
            "DEQUANTIZE", [index], [result], schema.DequantizeOptionsT(), grid
        )
        if layer.factor is not None:
            factor = np.array([layer.factor], np.float32)
            factor = self.file.constant(f"{layer.name}/factor", factor)
            scaled = self.file.activation(f"{layer.name}/scaled", shape, np.float32)
            self._operator("MUL", [result, factor], [scaled], schema.MulOptionsT())
            result = scaled
        return result, None

    def _integer_linear(self, layer, sources, node):
        ((index, input_grid),) = sources
        (inputs,) = node.keras_inputs
        scales = layer.weight_scales.numpy()
        weights = np.rint(layer.codes().numpy()).astype(np.int64) * layer.upscale
        weights, name, axis = _file_weights(layer, weights.astype(np.int8))
        is_int4 = layer.storage == "int4"
        weights = self.file.constant(
            f"{layer.name}/weights", weights, scales, axis, is_int4
        )
        bias = self.file.constant(
            f"{layer.name}/bias",
            layer.biases.numpy(),
            np.float32(input_grid.scale) * scales,
        )
        activation = getattr(schema.ActivationFunctionType, layer.grid.clamp)
        shape = in_shape = tuple(node.output_shapes)
        in_shape = tuple(inputs.shape)
        needs_reshape = name != "FULLY_CONNECTED" and len(in_shape) != 4
        if needs_reshape:
            in_shape = _four(in_shape)
            index = self._reshaped(index, input_grid, f"{layer.name}/in", in_shape)
        inner = _four(shape) if needs_reshape else shape
        result = self._integer(
            f"{layer.name}/out" if needs_reshape else layer.name, inner, layer.grid
        )
        versions = INT4_VERSIONS if is_int4 else INTEGER_VERSIONS
        self.file.operator(
            name,
            versions[name],
            [index, weights, bias],
            [result],
            _linear_options(layer, name, activation, len(in_shape)),
        )
        if needs_reshape:
            result = self._reshaped(result, layer.grid, layer.name, shape)
        return result, layer.grid

    def _integer_add(self, layer, sources, node):
        result = self._integer(layer.name, node.output_shapes, layer.grid)
        activation = getattr(schema.ActivationFunctionType, layer.grid.clamp)
        options = schema.AddOptionsT(activation)
        indices = [index for index, _ in sources]
        self._operator("ADD", indices, [result], options, layer.grid)
        return result, layer.grid

    # --- either ---------------------------------------------------------------------

    def _reshape(self, layer, sources, node):
        ((index, grid),) = sources
        return self._reshaped(index, grid, layer.name, node.output_shapes), grid

    def _pad(self, layer, sources, node):
        ((index, grid),) = sources
        sides = layer.padding
        if isinstance(layer, _layers.ZeroPadding1D):
            sides = [sides]
        table = np.array([(0, 0), *sides, (0, 0)], np.int32)
        table = self.file.constant(f"{layer.name}/paddings", table)
        result = self._like(layer.name, node.output_shapes, grid)
        self._operator("PAD", [index, table], [result], schema.PadOptionsT(), grid)
        return result, grid

    def _permute(self, layer, sources, node):
        ((index, grid),) = sources
        order = np.array((0, *layer.dims), np.int32)
        order = self.file.constant(f"{layer.name}/order", order)
        result = self._like(layer.name, node.output_shapes, grid)
        options = schema.TransposeOptionsT()
        self._operator("TRANSPOSE", [index, order], [result], options, grid)
        return result, grid

    def _pool(self, layer, sources, node):
        ((index, grid),) = sources
        (inputs,) = node.keras_inputs
        shape = in_shape = tuple(node.output_shapes)
        in_shape = tuple(inputs.shape)
        name = "MAX_POOL_2D"
        padding = "same"
        if isinstance(layer, _layers.GlobalMaxPooling2D):
            size = strides = in_shape[1:3]
            if None in size:
                raise ExportError(
                    "Global max pooling needs a fixed image size. "
                    f"Received: {layer.name!r} of {in_shape}"
                )
        else:
            size, strides = twin.window(layer.pool_size), twin.window(layer.strides)
            padding = layer.padding
        if isinstance(layer, _layers.AveragePooling2D):
            name = "AVERAGE_POOL_2D"
        options = schema.Pool2DOptionsT(
            _padding(padding), strides[1], strides[0], size[1], size[0]
        )
        is_2d = len(in_shape) == len(shape) == 4
        if len(in_shape) != 4:
            index = self._reshaped(index, grid, f"{layer.name}/in", _four(in_shape))
        inner = shape if is_2d else _four(shape)
        result = self._like(layer.name if is_2d else f"{layer.name}/out", inner, grid)
        self._operator(name, [index], [result], options, grid)
        if not is_2d:
            result = self._reshaped(result, grid, layer.name, shape)
        return result, grid

    def _concatenate(self, layer, sources, node):
        grid = sources[0][1]
        rank = len(node.output_shapes)
        result = self._like(layer.name, node.output_shapes, grid)
        options = schema.ConcatenationOptionsT(layer.axis % rank)
        indices = [index for index, _ in sources]
        self._operator("CONCATENATION", indices, [result], options, grid)
        return result, grid

    # --- floats ---------------------------------------------------------------------

    def _float_linear(self, layer, sources, node):
        ((index, _),) = sources
        kernel, bias = (np.asarray(w, np.float32) for w in layer.get_weights())
        (inputs,) = node.keras_inputs
        kind = {
            _layers.Conv1D: twin.CONV,
            _layers.Conv2D: twin.CONV,
            _layers.DepthwiseConv2D: twin.DEPTHWISE,
            _layers.Dense: twin.DENSE,
        }[type(layer)]
        kernel, name, _ = _oriented(kind, kernel)
        kernel = self.file.constant(f"{layer.name}/weights", kernel)
        bias = self.file.constant(f"{layer.name}/bias", bias)
        shape, in_shape = tuple(node.output_shapes), tuple(inputs.shape)
        needs_reshape = kind == twin.CONV and len(in_shape) == 3
        if needs_reshape:
            in_shape = _four(in_shape)
            index = self._reshaped(index, None, f"{layer.name}/in", in_shape)
        inner = _four(shape) if needs_reshape else shape
        result = self._like(
            f"{layer.name}/out" if needs_reshape else layer.name, inner, None
        )
        options = _linear_options(layer, name, 0, len(in_shape))
        self._operator(name, [index, kernel, bias], [result], options)
        if needs_reshape:
            result = self._reshaped(result, None, layer.name, shape)
        return result, None

    def _affine(self, layer, sources, node):
        ((index, _),) = sources
        shape = node.output_shapes
        gain, offset = layer.get_weights()
        gain = self.file.constant(f"{layer.name}/gain", gain)
        offset = self.file.constant(f"{layer.name}/offset", offset)
        scaled = self.file.activation(f"{layer.name}/scaled", shape, np.float32)
        result = self.file.activation(layer.name, shape, np.float32)
        self._operator("MUL", [index, gain], [scaled], schema.MulOptionsT())
        self._operator("ADD", [scaled, offset], [result], schema.AddOptionsT())
        return result, None

    def _relu(self, layer, sources, node):
        ((index, _),) = sources
        result = self.file.activation(layer.name, node.output_shapes, np.float32)
        self._operator("RELU6" if layer.max_value else "RELU", [index], [result])
        return result, None

    def _activation(self, layer, sources, node):
        ((index, _),) = sources
        kind = keras.activations.serialize(layer.activation)
        if kind == "linear":
            return index, None
        if kind == "swish":
            return self._swish(layer, index, node.output_shapes), None
        result = self.file.activation(layer.name, node.output_shapes, np.float32)
        options = schema.SoftmaxOptionsT(1.0) if kind == "softmax" else None
        self._operator(_ACTIVATIONS[kind], [index], [result], options)
        return result, None

    def _swish(self, layer, index, shape) -> int:
        gate = self.file.activation(f"{layer.name}/sigmoid", shape, np.float32)
        result = self.file.activation(layer.name, shape, np.float32)
        self._operator("LOGISTIC", [index], [gate])
        self._operator("MUL", [index, gate], [result], schema.MulOptionsT())
        return result

    def _mean(self, layer, sources, node):
        ((index, _),) = sources
        axes = self.file.constant(f"{layer.name}/axes", np.array([1, 2], np.int32))
        result = self.file.activation(layer.name, node.output_shapes, np.float32)
        options = schema.ReducerOptionsT(bool(layer.keepdims))
        self._operator("MEAN", [index, axes], [result], options)
        return result, None

    def _float_add(self, layer, sources, node):
        return self._joined("ADD", schema.AddOptionsT, layer, sources, node)

    def _multiply(self, layer, sources, node):
        return self._joined("MUL", schema.MulOptionsT, layer, sources, node)

    def _joined(self, operator, options, layer, sources, node):
        """Two tensors become one, which is joined with the next."""
        total, shape = sources[0][0], node.keras_inputs[0].shape
        for position, (index, _) in enumerate(sources[1:], start=1):
            is_last = position == len(sources) - 1
            name = layer.name if is_last else f"{layer.name}/part{position}"
            shape = tf.broadcast_static_shape(shape, node.keras_inputs[position].shape)
            result = self.file.activation(name, shape, np.float32)
            self._operator(operator, [total, index], [result], options())
            total = result
        return total, None


_METHODS = {
    twin.ToCodes: _Writer._to_codes,
    twin.ToValues: _Writer._to_values,
    twin.IntegerLinear: _Writer._integer_linear,
    twin.IntegerAdd: _Writer._integer_add,
    twin.Affine: _Writer._affine,
    _layers.Activation: _Writer._activation,
    _layers.Add: _Writer._float_add,
    _layers.AveragePooling2D: _Writer._pool,
    _layers.Concatenate: _Writer._concatenate,
    _layers.Conv1D: _Writer._float_linear,
    _layers.Conv2D: _Writer._float_linear,
    _layers.Dense: _Writer._float_linear,
    _layers.DepthwiseConv2D: _Writer._float_linear,
    _layers.Flatten: _Writer._reshape,
    _layers.GlobalAveragePooling2D: _Writer._mean,
    _layers.GlobalMaxPooling2D: _Writer._pool,
    _layers.MaxPooling1D: _Writer._pool,
    _layers.MaxPooling2D: _Writer._pool,
    _layers.Multiply: _Writer._multiply,
    _layers.Permute: _Writer._permute,
    _layers.ReLU: _Writer._relu,
    _layers.Reshape: _Writer._reshape,
    _layers.ZeroPadding1D: _Writer._pad,
    _layers.ZeroPadding2D: _Writer._pad,
}


def _four(shape):
    """A shape of rank 2 or 3 as (batch, height, width, channels)."""
    shape = tuple(shape)
    return (shape[0], *(1,) * (4 - len(shape)), *shape[1:])


def _oriented(kind, kernel):
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


def _file_weights(layer, weights):
    return _oriented(layer.kind, weights)


def _padding(name: str) -> int:
    return getattr(schema.Padding, name.upper())


def _linear_options(layer, name, activation, rank):
    """The schema's options of a linear operator."""
    if name == "FULLY_CONNECTED":
        return schema.FullyConnectedOptionsT(activation, keepNumDims=rank > 2)
    if getattr(layer, "kind", None) == twin.SCALE:
        strides, dilation, padding = (1, 1), (1, 1), "valid"
    else:
        strides = twin.window(layer.strides)
        dilation = twin.window(getattr(layer, "dilation", None) or layer.dilation_rate)
        padding = layer.padding
    common = (_padding(padding), strides[1], strides[0])
    last = (activation, dilation[1], dilation[0])
    if name == "CONV_2D":
        return schema.Conv2DOptionsT(*common, *last)
    multiplier = 1
    if getattr(layer, "kind", twin.DEPTHWISE) == twin.DEPTHWISE:
        shape = getattr(layer, "kernel_shape", None)
        multiplier = shape[-1] if shape else layer.depth_multiplier
    return schema.DepthwiseConv2DOptionsT(*common, multiplier, *last)


def input_codes(layer: twin.ToCodes, values, input_type: str) -> np.ndarray:
    """What a file with an int8 or uint8 input wants for float values.

    Args:
        layer: the twin's layer behind the input.
        values: float array.
        input_type: "int8" or "uint8".
    """
    codes = layer(tf.convert_to_tensor(values)).numpy() + layer.grid.zero_point
    if input_type == "uint8":
        return (codes + 128).astype(np.uint8)
    return codes.astype(np.int8)
