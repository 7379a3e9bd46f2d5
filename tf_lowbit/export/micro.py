"""Files for TFLite Micro: what it can run, and its own interpreter."""

import contextlib
import os
import re
import sys
import tempfile

import numpy as np

from tf_lowbit.export import flatbuffer, packing
from tf_lowbit.export.linear import ExportError

try:
    from tflite_micro import runtime as _runtime
except ImportError:
    _runtime = None

RUNTIME = "tflite_micro"
# Of the operators that files are written with; a test asks the interpreter for each.
MISSING_OPERATORS = ("GELU",)
# Bytes of the arena beside the tensors: for each tensor and operator, and for all.
_EACH, _REST = 1024, 1 << 20


def require_runnable(data: bytes) -> None:
    """Refuses a file that TFLite Micro does not run.

    Args:
        data: the file's bytes.

    Raises:
        ExportError: naming the layer with an operator that TFLite Micro lacks, or with
            a tensor whose size is open.
    """
    model = flatbuffer.unpack(data)
    (graph,) = model.subgraphs
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        name = flatbuffer.OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
        output = graph.tensors[operator.outputs[0]].name.decode()
        if name in MISSING_OPERATORS:
            raise ExportError(
                "target='tflm' takes the operators that TFLite Micro has. Use another "
                f"activation or target. Received: {name} in {output!r}"
            )
    for tensor in graph.tensors:
        signature = tensor.shapeSignature
        if signature is not None and -1 in signature[1:]:
            raise ExportError(
                "target='tflm' takes tensors of fixed sizes. Build the network with a "
                f"fixed input shape. Received: {tensor.name.decode()!r} of "
                f"{[None if size < 0 else int(size) for size in signature]}"
            )


def require_installed() -> None:
    """Raises an ImportError where TFLite Micro's interpreter is missing."""
    if _runtime is None:
        raise ImportError(
            "Files for target='tflm' run in TFLite Micro's interpreter: pip install "
            "'.[micro]'"
        )


class MicroRunner:
    """Runs a file in TFLite Micro's interpreter, by the batch that the file has: 1.

    Like `Runner`, which takes the batch's size from its inputs.

    Args:
        data: the file's bytes.
        intermediates: give every tensor that is computed, but decoded weights.

    Raises:
        ImportError: if the interpreter is missing.
        RuntimeError: if the interpreter does not take the file.
    """

    def __init__(self, data: bytes, intermediates: bool = False):
        require_installed()
        model = flatbuffer.unpack(data)
        (graph,) = model.subgraphs
        self.inputs = [_detail(graph, index) for index in graph.inputs]
        self.outputs = [_detail(graph, index) for index in graph.outputs]
        self._inner = []
        if intermediates:
            self._inner = [
                _detail(graph, index)
                for operator in graph.operators
                for index in operator.outputs
                if not packing.is_decode(model, operator)
            ]
        configs = _runtime.InterpreterConfig
        # Some arenas that are too small end the process, so this one has room.
        size = _REST + _EACH * (len(graph.tensors) + len(graph.operators))
        size += 2 * sum(_bytes_of(tensor) for tensor in graph.tensors)
        with _standard_error() as written:
            try:
                self._interpreter = _runtime.Interpreter.from_bytes(
                    data,
                    arena_size=size,
                    intrepreter_config=configs.kPreserveAllTensors
                    if intermediates
                    else configs.kAllocationRecording,
                )
            except RuntimeError as error:
                raise RuntimeError(f"{error}: {written()}") from error

    def __call__(self, *inputs) -> dict[str, np.ndarray]:
        """Outputs by the tensors' names in the file.

        Args:
            *inputs: one array for each of the file's inputs, of its dtype; the first
                axis is the batch, a multiple of the file's.
        """
        found: dict[str, list] = {}
        size = int(self.inputs[0]["shape"][0])
        for start in range(0, len(inputs[0]), size):
            for position, values in enumerate(inputs):
                values = np.ascontiguousarray(values[start : start + size])
                self._interpreter.set_input(values, position)
            self._interpreter.invoke()
            for position, detail in enumerate(self._inner or self.outputs):
                if self._inner:
                    index = detail["index"]
                    values = self._interpreter.GetTensor(index, 0)["tensor_data"]
                else:
                    values = self._interpreter.get_output(position)
                found.setdefault(detail["name"], []).append(np.array(values))
        return {name: np.concatenate(rows) for name, rows in found.items()}

    def arena(self) -> int:
        """Bytes of the arena that a run takes on this machine.

        All tensors that live at one time, among them the largest decoded weights, and
        the interpreter's own records; a 32-bit controller's records are smaller.
        """
        with _standard_error() as written:
            self._interpreter.print_allocations()
            text = written()
        (size,) = re.findall(r"Arena allocation total (\d+) bytes", text)
        return int(size)


def _detail(graph, index) -> dict:
    """What `Runner`'s details say of a tensor."""
    tensor = graph.tensors[index]
    quantization = (0.0, 0)
    if tensor.quantization is not None and tensor.quantization.scale is not None:
        (scale,), (point,) = tensor.quantization.scale, tensor.quantization.zeroPoint
        quantization = (float(scale), int(point))
    return {
        "name": tensor.name.decode(),
        "index": int(index),
        "shape": np.array(tensor.shape),
        "dtype": flatbuffer.DTYPES[tensor.type].type,
        "quantization": quantization,
    }


def _bytes_of(tensor) -> int:
    itemsize = flatbuffer.DTYPES[tensor.type].itemsize
    return int(np.prod(tensor.shape, dtype=np.int64)) * itemsize + 16


@contextlib.contextmanager
def _standard_error():
    """Yields a function that gives what C++ code wrote to standard error so far.

    TFLite Micro has no other way to say why it refuses a file, or how much it takes.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def written() -> str:
            file.seek(0)
            return file.read().decode(errors="replace").strip()

        try:
            yield written
        finally:
            os.dup2(kept, 2)
            os.close(kept)
