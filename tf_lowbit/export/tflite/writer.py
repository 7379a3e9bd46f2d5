"""Writes an integer model (twin) as a TFLite file, operator by operator."""

import json
from typing import Any

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.core import checks
from tf_lowbit.export import layer_table
from tf_lowbit.export.integer import plain_layers, twin
from tf_lowbit.export.integer.int8_grids import Grid
from tf_lowbit.export.lowering.walk import Snapped
from tf_lowbit.export.tflite.flatbuffer import schema
from tf_lowbit.export.tflite.layers import FUNCTIONS, ends_in_codes
from tf_lowbit.export.tflite.operators import REQUANTIZE_VERSION, OperatorWriter
from tf_lowbit.export.types import ExportError
from tf_lowbit.network import graph
from tf_lowbit.version import __version__

SIGNATURE = "serving_default"


def metadata(snapped: Snapped, info: dict | None) -> dict:
    """A file's metadata: enough to make its plan again from the trained model."""
    return {
        "tf_lowbit": __version__,
        "options": snapped.options.as_dict(),
        "ranges": {name: list(pair) for name, pair in snapped.ranges.items()},
        "info": info or {},
    }


def to_bytes(snapped: Snapped, info: dict | None = None) -> bytes:
    """The file of a twin, with the twin's present weights.

    Args:
        snapped: The twin, from `snap`.
        info: JSON-ready facts to store in the file.

    Raises:
        ExportError: If the options ask for codes at an input that is not quantized, or
            at an output without codes.
    """
    writer = _Writer(snapped.twin, snapped.options)
    about = json.dumps(metadata(snapped, info), sort_keys=True)
    return writer.run(about.encode())


def check_info(info: Any) -> None:
    """Raises ValueError unless `info` is None or a JSON-ready dict."""
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


class _Writer(OperatorWriter):
    """Writes one twin. A tensor is (index in the file, its grid or None)."""

    def __init__(self, model, options):
        super().__init__()
        self.model = model
        self.input_type = options.input_type
        self.output_type = options.output_type
        self._tensors: dict[int, tuple[int, Grid | None]] = {}
        self._inputs: dict[str, int] = {}
        self._readers = graph.readers(model)

    def run(self, about: bytes) -> bytes:
        """Walks the twin; `about` becomes the file's metadata."""
        model = self.model
        for node in graph.nodes(model):
            if node.is_input:
                self._input(node)
            else:
                self._visit(node)
        outputs = {
            name: self._output(name, tensor)
            for name, tensor in zip(model.output_names, model.outputs, strict=True)
        }
        # In the model's order, which need not be that of its graph.
        inputs = {name: self._inputs[name] for name in twin.input_names(model)}
        return self.file.finish(inputs, outputs, about, SIGNATURE)

    def _input(self, node) -> None:
        (tensor,) = graph.outputs_of(node)
        name = node.layer.name
        if self.input_type == "float32":
            index = self.file.activation(name, tensor.shape, np.float32)
            self._inputs[name] = index
            self._tensors[id(tensor)] = (index, None)
            return
        readers = self._readers.get(id(tensor), [])
        if len(readers) != 1 or not isinstance(readers[0].layer, twin.ToCodes):
            raise ExportError(
                f"input_type={self.input_type!r} needs an input that only a quantizer "
                "reads: begin the network with a weight layer (one that a rule "
                "quantizes, or first_layer='int8'), with only layers that move values "
                f"in front. Received: {name!r}, read by "
                f"{[reader.layer.name for reader in readers]}"
            )
        grid = readers[0].layer.grid
        if self.input_type == "int8":
            index = self.integer(name, tensor.shape, grid)
        else:
            pixels = self._unsigned(name, tensor.shape, grid)
            index = self.integer(f"{name}/int8", tensor.shape, grid)
            self._requantize(pixels, index)
            self._inputs[name] = pixels
        self._inputs.setdefault(name, index)
        # `to_codes`, the reader, finds that its input has codes.
        self._tensors[id(tensor)] = (index, grid)

    def _output(self, name, tensor) -> int:
        """The file's output for an output of the twin."""
        index, grid = self._tensors[id(tensor)]
        node = graph.producer(tensor)
        if self.output_type == "float32" or isinstance(node.layer, plain_layers.ArgMax):
            return index  # Class numbers are neither codes nor floats.
        if grid is None and ends_in_codes(node):
            # Another layer reads the float values; the output takes the codes.
            index, grid = self._tensors[id(node.keras_inputs[0])]
        if grid is None and self.output_type is not None:
            raise ExportError(
                f"output_type={self.output_type!r} needs a network that ends in codes: "
                "a weight layer with 8-bit weights that reads codes (head='int8'), or "
                "a quantized ReLU. End the network in logits, without softmax or "
                "sigmoid, which do not change their order, or use "
                "output_type='float32'. "
                f"Received: {name!r}, floats of {node.layer.name!r}"
            )
        if self.output_type != "uint8":
            return index
        assert grid is not None  # As checked: codes.
        result = self._unsigned(f"{name}/uint8", tensor.shape, grid)
        self._requantize(index, result)
        return result

    def _unsigned(self, name, shape, grid) -> int:
        """Adds a uint8 tensor of codes."""
        quantization = grid.scale, grid.zero_point + 128
        return self.file.activation(name, shape, np.uint8, quantization)

    def _requantize(self, source, result) -> None:
        """Adds the operator between int8 and uint8 codes of one scale."""
        options = schema.QuantizeOptionsT()
        self.file.operator("QUANTIZE", REQUANTIZE_VERSION, [source], [result], options)

    def _visit(self, node) -> None:
        sources = [self._tensors[id(t)] for t in node.keras_inputs]
        (output,) = graph.outputs_of(node)
        write = FUNCTIONS[layer_table.kind_of(node.layer)]
        self._tensors[id(output)] = write(self, node.layer, sources, node)

    def is_read(self, node) -> bool:
        """Whether a layer reads a node's output."""
        (output,) = graph.outputs_of(node)
        return id(output) in self._readers


def input_codes(layer: twin.ToCodes, values: np.ndarray, input_type: str) -> np.ndarray:
    """The input codes of a file for float values.

    Args:
        layer: The twin's layer that reads the input.
        values: float array.
        input_type: "int8" or "uint8", the file's input type.
    """
    codes = layer(tf.convert_to_tensor(values)).numpy() + layer.grid.zero_point
    if input_type == "uint8":
        return (codes + 128).astype(np.uint8)
    return codes.astype(np.int8)
