"""Writer of QONNX files, for FPGA tools (FINN, hls4ml).

QONNX (Pappalardo et al., arXiv:2206.07527) is ONNX with quantization as operators:
`Quant` (scale, zero point and bit-width as inputs), `BipolarQuant` (levels -s and +s)
and `MultiThreshold` (the number of thresholds at or below x). All tensors are float32
with values on the quantizers' grids, so a file computes what training computes.

**Layout.** Images are (batch, channels, height, width) and series (batch, channels,
steps), as usual in ONNX. This holds for the file's inputs and outputs, too. A Transpose
is needed only in front of Flatten and around Reshape, where Keras's order matters.

**Grids.** Zero points are 0. A grid becomes the smallest `Quant` that has its codes:

| codes | operator |
|---|---|
| 0 .. 2^k - 1 | Relu, and Quant of k bits, signed=0 |
| -2^(k-1) (+ 1 if narrow) .. 2^(k-1) - 1 | Quant of k bits, signed=1, same narrow |
| -n, -n + 2, ..., n = 2^k - 1 (odd) | Quant of k + 1 bits, signed=1, narrow=1 |
| -1, 1 | BipolarQuant |

The odd grid of k bits (DoReFa, StatsQ) has no zero. In k bits it would need a zero
point of one half, which qonnx's type inference does not support. So its odd codes are
written in k + 1 bits.

**Names.** Each layer's result has the layer's name. A weight `conv_kernel` is a
constant with values on its grid, and `conv_kernel_quant` is its quantizer's output.
"""

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from tf_lowbit.compat import keras
from tf_lowbit.core import checks as arguments
from tf_lowbit.core.files import replace_file
from tf_lowbit.export.lowering import forms, problems, requirements, stock_layers
from tf_lowbit.export.qonnx import grids
from tf_lowbit.export.qonnx.layers import channels_first, form_of
from tf_lowbit.export.targets import TARGETS
from tf_lowbit.network import graph, inspection
from tf_lowbit.version import __version__

# Imported by `require_onnx`, because the import is slow and rarely needed.
onnx: Any = None

# Version of the standard operators: the first one with all of QCDQ's.
_OPSET = 13
_IR_VERSION = 8
# Key under which qonnx looks for the data type of a tensor.
_ANNOTATION = "finn_datatype"


def to_qonnx(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    activations: str = grids.QUANT,
    fold_batch_norm: bool = False,
    batch_size: int = 1,
) -> Path:
    """Writes a trained low-bitwidth network as a QONNX file.

    Weight codes, steps and activation grids come from the trained quantizers. Float
    layers stay float; biases and batch normalization are float32. Images are (batch,
    channels, height, width) in the file. `tf_lowbit.export.compare_qonnx` compares a
    file with the network.

    Args:
        model: Trained and calibrated model from `tf_lowbit.quantize`, with fixed input
            sizes; or a `LowBitTrainer` of one student.
        path: Path of the file, usually `.onnx`; it is written under a temporary name,
            then renamed.
        activations: "quant" for `Quant` operators; "multithreshold" for a
            `MultiThreshold`, which outputs integer codes, and a Mul by the step. Its
            codes equal the trained quantizer's for every float32 input.
        fold_batch_norm: Whether to write batch normalization as a Mul and an Add per
            channel, not as a BatchNormalization operator.
        batch_size: Number of examples that the file takes in each run.

    Returns:
        The path.

    Raises:
        ImportError: Without the package `onnx`, of the extra `qonnx`.
        ValueError: For a model that is not quantized, or an invalid argument.
        ExportError: (a ValueError) for a layer that `check(model, target="qonnx")`
            lists, or a quantizer that is not at 1 to 8 bits or not calibrated.
        OSError: If the file cannot be written. No partial file is left.
    """
    require_onnx()
    arguments.path("path", path)
    arguments.integer("batch_size", batch_size, at_least=1)
    arguments.flag("fold_batch_norm", fold_batch_norm)
    arguments.choice("activations", activations, grids.ACTIVATIONS)
    model = requirements.single_network(model)
    requirements.require_exportable(model)
    problems.require_exportable(model, TARGETS["qonnx"])
    writer = _Writer(activations, fold_batch_norm, batch_size)
    proto = writer.write(forms.as_layers(model), model.output_names)
    return replace_file(path, proto.SerializeToString())


def require_onnx() -> None:
    """Imports `onnx` for this module, or raises ImportError with the remedy."""
    global onnx
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            "QONNX files are written with the package onnx: pip install '.[qonnx]'"
        ) from error


class _Writer:
    """The graph so far, with methods for the functions of `layers`."""

    def __init__(self, activations, fold_batch_norm, batch_size):
        self.activations = activations
        self.fold_batch_norm = fold_batch_norm
        self._batch = batch_size
        self._nodes, self._constants, self._values, self._annotations = [], [], {}, []
        self._names: dict[int, str] = {}  # Id of a Keras tensor -> name.
        self._ends: dict[int, str] = {}  # Id of an output of the network -> name.
        self._weights: dict[tuple[str, str], str] = {}
        self._quantizers: dict = {}
        self._taken: set[str] = set()
        # Of the present node: the layer's name, and the shape of its output.
        self._layer, self._shape = "", []

    def write(self, model, ends):
        """The file of a network from `forms.as_layers`, as a `ModelProto`."""
        self._quantizers = {
            (t.layer.name, t.attribute): t for t in inspection.quantized_tensors(model)
        }
        self._taken = {layer.name for layer in model.layers} | {*ends}
        for tensor in model.inputs:
            self._names[id(tensor)] = graph.producer(tensor).layer.name
        inputs = [self._value(self._names[id(t)], self.shape(t)) for t in model.inputs]
        for tensor, name in zip(model.outputs, ends, strict=True):
            self._ends.setdefault(id(tensor), name)
        for node in graph.calls(model):
            self._write_node(node)
        for tensor, name in zip(model.outputs, ends, strict=True):
            source = self._names[id(tensor)]
            if source != name:  # For example, a layer without a node in the file.
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
        opset = onnx.helper.make_opsetid
        return onnx.helper.make_model(
            made,
            opset_imports=[opset("", _OPSET), opset(grids.DOMAIN, 1)],
            ir_version=_IR_VERSION,
            producer_name="tf_lowbit",
            producer_version=__version__,
        )

    def _write_node(self, node):
        layer = stock_layers.layer_of(node)
        (output,) = graph.outputs_of(node)
        self._layer, self._shape = node.layer.name, self.shape(output)
        before = len(self._nodes)
        inputs = [self._names[id(tensor)] for tensor in node.keras_inputs]
        made = form_of(node, layer)(self, node, layer, inputs)
        if len(self._nodes) > before and made == self._nodes[-1].output[0]:
            made = self._rename(made, self._name_of(output))
        self._names[id(output)] = made

    def _name_of(self, tensor):
        """The name of an output; for other tensors the layer's name, made unique."""
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
        if not tensor.dtype.is_floating:
            return shape  # Class numbers have no channels.
        return [shape[axis] for axis in channels_first(len(shape))]

    def activation_quantizer(self, node):
        """The activation quantizer of a node, or None."""
        return self._quantizers.get((node.layer.name, "output"))

    def add(
        self,
        operator,
        inputs,
        shape=None,
        suffix=None,
        domain="",
        dtype=np.float32,
        **attributes,
    ) -> str:
        """Adds a node with one output, of the layer's shape by default; its name."""
        suffix = suffix or operator.lower()
        name = graph.free_name(f"{self._layer}_{suffix}", self._taken)
        made = onnx.helper.make_node(
            operator, inputs, [name], name=name, domain=domain, **attributes
        )
        self._nodes.append(made)
        shape = self._shape if shape is None else shape
        self._values[name] = self._value(name, shape, dtype)
        return name

    def constant(self, suffix, values, dtype=np.float32) -> str:
        """Adds a constant, and returns its name."""
        name = graph.free_name(f"{self._layer}_{suffix}", self._taken)
        values = np.asarray(values, dtype)
        self._constants.append(onnx.numpy_helper.from_array(values, name))
        # qonnx runs node by node, and reads the shapes of all inputs here.
        self._values[name] = self._value(name, values.shape, dtype)
        return name

    @staticmethod
    def _value(name, shape, dtype=np.float32):
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    def annotate(self, tensor, datatype) -> None:
        """Sets qonnx's data type of a tensor."""
        entry = onnx.StringStringEntryProto(key=_ANNOTATION, value=datatype)
        annotation = onnx.TensorAnnotation(tensor_name=tensor)
        annotation.quant_parameter_tensor_names.append(entry)
        self._annotations.append(annotation)

    def transpose(self, tensor, shape, order) -> str:
        """Adds a Transpose of a tensor, unless it changes nothing."""
        if order == list(range(len(order))):
            return tensor
        return self.add("Transpose", [tensor], [shape[i] for i in order], perm=order)

    def quant(self, tensor, shape, suffix, scale, levels) -> str:
        """Adds a quantizer with the given levels: values -> values on the grid."""
        scale = self.constant(f"{suffix}_scale", scale)
        if grids.is_bipolar(levels):
            inputs = [tensor, scale]
            made = self.add("BipolarQuant", inputs, shape, suffix, domain=grids.DOMAIN)
            self.annotate(made, "SCALEDINT<1>")
            return made
        bits, signed, narrow = grids.quant_of(levels)
        zero = self.constant(f"{suffix}_zero_point", 0.0)
        width = self.constant(f"{suffix}_bits", float(bits))
        made = self.add(
            "Quant",
            [tensor, scale, zero, width],
            shape,
            suffix,
            domain=grids.DOMAIN,
            signed=int(signed),
            narrow=int(narrow),
            rounding_mode="ROUND",
        )
        self.annotate(made, f"SCALEDINT<{bits}>")
        return made

    def weight(self, node, layer, attribute, arrange) -> str:
        """The name of a kernel, or of its quantizer's output; added once for a layer.

        `arrange` takes an array of the kernel's rank to ONNX's layout.
        """
        key = node.layer.name, attribute
        if key in self._weights:
            return self._weights[key]
        tensor = self._quantizers.get(key)
        if tensor is None:
            values = arrange(getattr(layer, attribute).numpy())
            made = self.constant(attribute, values)
        else:
            step = tensor.quantizer.step(tensor.latent, tensor.variables)
            step = np.asarray(step, np.float32)
            values = arrange(tensor.codes().numpy() * step)
            scale = step.reshape(()) if step.size == 1 else arrange(step)
            constant = self.constant(attribute, values)
            levels = tensor.quantizer.level_codes(tensor.bits)
            name = f"{attribute}_quant"
            made = self.quant(constant, values.shape, name, scale, levels)
        self._weights[key] = made
        return made
