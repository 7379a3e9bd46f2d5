"""From a snapped twin to a TFLite file, operator by operator."""

import json

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks
from tf_lowbit.export import grids, transposed, twin
from tf_lowbit.export.flatbuffer import schema
from tf_lowbit.export.float_operators import FLOAT_METHODS, FloatWriter
from tf_lowbit.export.grids import Grid
from tf_lowbit.export.operators import (
    INT4_VERSIONS,
    INTEGER_VERSIONS,
    REQUANTIZE_VERSION,
    copies,
    four,
    is_transposed,
    linear_options,
    oriented,
    padding_code,
)
from tf_lowbit.export.snapping import ExportError, Snapped
from tf_lowbit.scheme import graph
from tf_lowbit.version import __version__

_layers = keras.layers
_GLOBAL_MAX_POOLS = (_layers.GlobalMaxPooling1D, _layers.GlobalMaxPooling2D)
SIGNATURE = "serving_default"


def metadata(snapped: Snapped, info: dict | None) -> dict:
    """What a file says of its own making: enough to make its plan again."""
    options = snapped.options
    return {
        "tf_lowbit": __version__,
        "options": {name: getattr(options, name) for name in options.__match_args__},
        "ranges": {name: list(pair) for name, pair in snapped.ranges.items()},
        "notes": [str(note) for note in snapped.notes],
        "info": info or {},
    }


def to_bytes(snapped: Snapped, info: dict | None = None) -> bytes:
    """The file of a twin, with the weights that the twin has now.

    Args:
        snapped: of `snap`.
        info: JSON-ready, kept in the file as it is.

    Raises:
        ExportError: if an input is to take codes and is not quantized, or an output is
            to put out codes and has none.
    """
    writer = _Writer(snapped.twin, snapped.options)
    about = json.dumps(metadata(snapped, info), sort_keys=True)
    return writer.run(about.encode())


def check_info(info) -> None:
    """Raises a ValueError for what JSON cannot hold, or is no dict."""
    if info is None:
        return
    try:
        is_dict = isinstance(info, dict) and bool(json.dumps(info, allow_nan=False))
    except (TypeError, ValueError):
        is_dict = False
    if not is_dict:
        raise ValueError(
            "info must be a dict that JSON can hold, of texts, finite numbers, lists "
            f"and dicts. {checks.received('info', info)}"
        )


class _Writer(FloatWriter):
    """One walk over one twin. A tensor is (index in the file, its grid or None)."""

    def __init__(self, model, options):
        super().__init__()
        self.model = model
        self.input_type = options.input_type
        self.output_type = options.output_type
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
            name: self._output(name, tensor)
            for name, tensor in zip(
                self.model.output_names, self.model.outputs, strict=True
            )
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
            index = self.integer(name, tensor.shape, grid)
        else:
            zero_point = grid.zero_point + 128
            pixels = self.file.activation(
                name, tensor.shape, np.uint8, (grid.scale, zero_point)
            )
            index = self.integer(f"{name}/int8", tensor.shape, grid)
            self._requantize(pixels, index)
            self._inputs[name] = pixels
        self._inputs.setdefault(name, index)
        # The layer that would make the codes finds them here.
        self._tensors[id(tensor)] = (index, grid)

    def _output(self, name, tensor) -> int:
        """The tensor that the file puts out for one of the twin."""
        index, grid = self._tensors[id(tensor)]
        if self.output_type == "float32":
            return index
        node = graph.producer(tensor)
        if grid is None and _ends_in_codes(node):
            # Something else reads the values.
            index, grid = self._tensors[id(node.keras_inputs[0])]
        if grid is None and self.output_type is not None:
            raise ExportError(
                f"output_type={self.output_type!r} needs a network that ends in codes: "
                "a weight layer with 8-bit weights that reads codes (head='int8'), or "
                "a quantized ReLU. End the network in logits, without softmax or "
                "sigmoid, which keep their order, or take output_type='float32'. "
                f"Received: {name!r}, floats of {node.layer.name!r}"
            )
        if self.output_type != "uint8":
            return index
        zero_point = grid.zero_point + 128
        result = self.file.activation(
            f"{name}/uint8", tensor.shape, np.uint8, (grid.scale, zero_point)
        )
        self._requantize(index, result)
        return result

    def _requantize(self, source, result) -> None:
        """Adds the operator between int8 and uint8 codes of one scale."""
        options = schema.QuantizeOptionsT()
        self.file.operator("QUANTIZE", REQUANTIZE_VERSION, [source], [result], options)

    def _visit(self, node) -> None:
        layer = node.layer
        sources = [self._tensors[id(t)] for t in node.keras_inputs]
        (output,) = graph.outputs_of(node)
        method = _METHODS[type(layer)]
        self._tensors[id(output)] = method(self, layer, sources, node)

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
                self.operator("RELU", [index], [clamped])
            else:
                lowest = np.float32(grid.low) * np.float32(grid.scale)
                bound = self.file.constant(f"{layer.name}/lowest", np.array([lowest]))
                options = schema.MaximumMinimumOptionsT()
                self.operator("MAXIMUM", [index, bound], [clamped], options)
            index = clamped
        result = self.integer(layer.name, shape, grid)
        self.operator("QUANTIZE", [index], [result], schema.QuantizeOptionsT(), grid)
        return result, grid

    def _to_values(self, layer, sources, node):
        ((index, grid),) = sources
        shape = node.output_shapes
        # The layer's name is that of what it puts out.
        is_scaled = layer.factor is not None
        is_needed = self.output_type == "float32" or self._is_read(node)
        if not is_needed and _ends_in_codes(node):
            return index, grid
        name = f"{layer.name}/dequantized" if is_scaled else layer.name
        result = self.file.activation(name, shape, np.float32)
        self.operator(
            "DEQUANTIZE", [index], [result], schema.DequantizeOptionsT(), grid
        )
        if is_scaled:
            factor = np.array([layer.factor], np.float32)
            factor = self.file.constant(f"{layer.name}/factor", factor)
            scaled = self.file.activation(layer.name, shape, np.float32)
            self.operator("MUL", [result, factor], [scaled], schema.MulOptionsT())
            result = scaled
        return result, None

    def _is_read(self, node) -> bool:
        """Whether a layer reads a node's output, the model's or not."""
        (output,) = graph.outputs_of(node)
        inputs = [t for reader in graph.calls(self.model) for t in reader.keras_inputs]
        return any(t is output for t in inputs)

    def _integer_linear(self, layer, sources, node):
        ((index, input_grid),) = sources
        (inputs,) = node.keras_inputs
        scales = layer.weight_scales.numpy()
        scales = np.tile(scales, copies(layer))
        weights = np.rint(layer.codes().numpy()).astype(np.int64) * layer.upscale
        if is_transposed(layer):
            weights = transposed.plain_kernel(weights, *transposed.axes(layer))
        weights, name, axis = oriented(layer.kind, weights.astype(np.int8))
        is_int4 = layer.storage == "int4"
        weights = self.file.constant(
            f"{layer.name}/weights", weights, scales, axis, is_int4
        )
        bias = self.file.constant(
            f"{layer.name}/bias",
            np.tile(layer.biases.numpy(), copies(layer)),
            np.float32(input_grid.scale) * scales,
        )
        activation = getattr(schema.ActivationFunctionType, layer.grid.clamp)
        versions = INT4_VERSIONS if is_int4 else INTEGER_VERSIONS
        rank = len(inputs.shape)

        def add(index, output, shape, padding):
            result = self.integer(output, shape, layer.grid)
            options = linear_options(layer, name, activation, rank, padding)
            tensors = [index, weights, bias]
            self.file.operator(name, versions[name], tensors, [result], options)
            return result

        shapes = inputs.shape, node.output_shapes
        grids_of_both = input_grid, layer.grid
        index = self.around(layer, name, index, grids_of_both, shapes, add)
        return index, layer.grid

    def _integer_add(self, layer, sources, node):
        result = self.integer(layer.name, node.output_shapes, layer.grid)
        activation = getattr(schema.ActivationFunctionType, layer.grid.clamp)
        options = schema.AddOptionsT(activation)
        indices = [index for index, _ in sources]
        self.operator("ADD", indices, [result], options, layer.grid)
        return result, layer.grid

    # --- either ---------------------------------------------------------------------

    def _reshape(self, layer, sources, node):
        ((index, grid),) = sources
        return self.reshaped(index, grid, layer.name, node.output_shapes), grid

    def _pad(self, layer, sources, node):
        ((index, grid),) = sources
        sides = layer.padding
        if isinstance(layer, _layers.ZeroPadding1D):
            sides = [sides]
        shape = node.output_shapes
        return self.padded(index, grid, layer.name, shape, sides), grid

    def _edge_pad(self, layer, sources, node):
        ((index, grid),) = sources
        table = np.array([(n, n) for n in (0, *layer.padding, 0)], np.int32)
        table = self.file.constant(f"{layer.name}/paddings", table)
        result = self.like(layer.name, node.output_shapes, grid)
        options = schema.MirrorPadOptionsT(schema.MirrorPadMode.SYMMETRIC)
        self.operator("MIRROR_PAD", [index, table], [result], options, grid)
        return result, grid

    def _crop(self, layer, sources, node):
        ((index, grid),) = sources
        sides = layer.cropping
        if isinstance(layer, _layers.Cropping1D):
            sides = [sides]
        shape = node.output_shapes
        return self.cropped(index, grid, layer.name, shape, sides), grid

    def _upsample(self, layer, sources, node):
        ((index, grid),) = sources
        shape = tuple(node.output_shapes)
        is_1d = len(shape) == 3
        if is_1d:
            (inputs,) = node.keras_inputs
            index = self.reshaped(index, grid, f"{layer.name}/in", four(inputs.shape))
        inner = four(shape) if is_1d else shape
        size = self.file.constant(f"{layer.name}/size", np.array(inner[1:3], np.int32))
        result = self.like(f"{layer.name}/out" if is_1d else layer.name, inner, grid)
        # By centres, no position comes to lie on the border of two.
        name, options = (
            "RESIZE_NEAREST_NEIGHBOR",
            schema.ResizeNearestNeighborOptionsT(False, True),
        )
        if getattr(layer, "interpolation", "nearest") == "bilinear":  # Of floats.
            name, options = (
                "RESIZE_BILINEAR",
                schema.ResizeBilinearOptionsT(False, True),
            )
        self.operator(name, [index, size], [result], options, grid)
        if is_1d:
            result = self.reshaped(result, grid, layer.name, shape)
        return result, grid

    def _permute(self, layer, sources, node):
        ((index, grid),) = sources
        order = np.array((0, *layer.dims), np.int32)
        order = self.file.constant(f"{layer.name}/order", order)
        result = self.like(layer.name, node.output_shapes, grid)
        options = schema.TransposeOptionsT()
        self.operator("TRANSPOSE", [index, order], [result], options, grid)
        return result, grid

    def _pool(self, layer, sources, node):
        ((index, grid),) = sources
        (inputs,) = node.keras_inputs
        shape = in_shape = tuple(node.output_shapes)
        in_shape = tuple(inputs.shape)
        name = "MAX_POOL_2D"
        padding = "same"
        if isinstance(layer, _GLOBAL_MAX_POOLS):
            size = strides = four(in_shape)[1:3]
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
            index = self.reshaped(index, grid, f"{layer.name}/in", four(in_shape))
        inner = shape if is_2d else four(shape)
        result = self.like(layer.name if is_2d else f"{layer.name}/out", inner, grid)
        self.operator(name, [index], [result], options, grid)
        if not is_2d:
            result = self.reshaped(result, grid, layer.name, shape)
        return result, grid

    def _concatenate(self, layer, sources, node):
        grid = sources[0][1]
        rank = len(node.output_shapes)
        result = self.like(layer.name, node.output_shapes, grid)
        options = schema.ConcatenationOptionsT(layer.axis % rank)
        indices = [index for index, _ in sources]
        self.operator("CONCATENATION", indices, [result], options, grid)
        return result, grid


def _ends_in_codes(node) -> bool:
    """Whether a node gives values of codes whose scale is their step."""
    return isinstance(node.layer, twin.ToValues) and node.layer.factor is None


_METHODS = {
    **FLOAT_METHODS,
    twin.EdgePadding: _Writer._edge_pad,
    twin.ToCodes: _Writer._to_codes,
    twin.ToValues: _Writer._to_values,
    twin.IntegerLinear: _Writer._integer_linear,
    twin.IntegerAdd: _Writer._integer_add,
    _layers.AveragePooling1D: _Writer._pool,
    _layers.AveragePooling2D: _Writer._pool,
    _layers.Concatenate: _Writer._concatenate,
    _layers.Cropping1D: _Writer._crop,
    _layers.Cropping2D: _Writer._crop,
    _layers.Flatten: _Writer._reshape,
    _layers.GlobalMaxPooling1D: _Writer._pool,
    _layers.GlobalMaxPooling2D: _Writer._pool,
    _layers.MaxPooling1D: _Writer._pool,
    _layers.MaxPooling2D: _Writer._pool,
    _layers.Permute: _Writer._permute,
    _layers.Reshape: _Writer._reshape,
    _layers.UpSampling1D: _Writer._upsample,
    _layers.UpSampling2D: _Writer._upsample,
    _layers.ZeroPadding1D: _Writer._pad,
    _layers.ZeroPadding2D: _Writer._pad,
}


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
