"""Runs files in TFLite Micro's interpreter."""

import contextlib
import os
import re
import sys
import tempfile

import numpy as np

from tf_lowbit.core import checks
from tf_lowbit.export import file_bytes
from tf_lowbit.export.tflite import flatbuffer, packed_weights
from tf_lowbit.export.tflite.runner import check_inputs

try:
    from tflite_micro import runtime as _runtime
except ImportError:
    _runtime = None

# Bytes of the arena besides tensors' data: per tensor or operator, and a fixed part.
_EACH, _REST = 1024, 1 << 20


def require_installed() -> None:
    """Raises ImportError if TFLite Micro's interpreter is missing."""
    if _runtime is None:
        raise ImportError(
            "Files for target='tflm' run in TFLite Micro's interpreter: pip install "
            "'.[micro]'"
        )


class MicroRunner:
    """Runs a file in TFLite Micro's interpreter, with the batch size of the file: 1.

    The interface is that of `Runner`.

    Args:
        data: The file's path, or its bytes.
        intermediates: Return every computed tensor except decoded weights.

    Raises:
        ImportError: If the interpreter is missing.
        ValueError: If `data` is not a TFLite file.
        OSError: If the file cannot be read.
        RuntimeError: If the interpreter refuses the file.
    """

    def __init__(
        self, data: str | os.PathLike[str] | bytes, intermediates: bool = False
    ):
        data = file_bytes.content_of("data", data)
        checks.flag("intermediates", intermediates)
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
                if not packed_weights.is_decode(model, operator)
            ]
        configs = _runtime.InterpreterConfig
        # Generous, because an arena that is too small can end the process.
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

    def __call__(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Name of each output tensor -> its values.

        Args:
            *inputs: An array for each input of the file, of its dtype. The first axis
                is the batch, a multiple of the file's batch size.

        Raises:
            ValueError: As `Runner`.
        """
        check_inputs(inputs, self.inputs)
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
        """Bytes of the arena that a run needs on this machine.

        The arena holds all tensors that live at one time, such as the largest decoded
        weights, and the interpreter's records. A 32-bit controller has smaller records.
        """
        with _standard_error() as written:
            self._interpreter.print_allocations()
            text = written()
        (size,) = re.findall(r"Arena allocation total (\d+) bytes", text)
        return int(size)


def _detail(graph, index) -> dict:
    """Details of a tensor, with the keys of `Runner`'s."""
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
    """Yields a function that returns what C++ code wrote to standard error so far.

    TFLite Micro reports its errors and its allocations only there.
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
