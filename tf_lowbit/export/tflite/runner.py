"""Runs TFLite files with LiteRT if it is installed, else with TensorFlow."""

import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.core import checks
from tf_lowbit.export import file_bytes
from tf_lowbit.export.integer import kernels
from tf_lowbit.export.tflite import flatbuffer

try:
    from ai_edge_litert import interpreter as _litert
except ImportError:
    _litert = None


def runtime() -> str:
    """The runtime of `interpreter`, its version and the machine's architecture."""
    if _litert is None:
        name = f"tf.lite {tf.__version__}"
    else:
        name = f"ai_edge_litert {importlib.metadata.version('ai-edge-litert')}"
    return f"{name} on {platform.machine()}"


def interpreter(
    data: str | os.PathLike[str] | bytes,
    kernel: str = kernels.XNNPACK,
    threads: int = 1,
) -> Any:
    """An interpreter of a file.

    Args:
        data: The file's path, or its bytes.
        kernel: "xnnpack", or "builtin" for TFLite's own kernels.
        threads: Number of threads.

    Raises:
        ValueError: If the runtime refuses the file.
        OSError: If the file cannot be read.
    """
    data = file_bytes.content_of("data", data)
    if data[4:8] != flatbuffer.IDENTIFIER:
        raise ValueError(
            f"data must be the content of a TFLite file. Received: {len(data)} bytes "
            "without the TFLite identifier"
        )
    checks.choice("kernel", kernel, (kernels.XNNPACK, kernels.BUILTIN))
    checks.integer("threads", threads, at_least=1)
    arguments = {"model_content": data, "num_threads": threads}
    if _litert is None:
        make, resolvers = tf.lite.Interpreter, tf.lite.experimental.OpResolverType
    else:
        make, resolvers = _litert.Interpreter, _litert.OpResolverType
    if kernel == kernels.BUILTIN:
        resolver = resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        arguments["experimental_op_resolver_type"] = resolver
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow warns that LiteRT replaces it.
        try:
            return make(**arguments)
        except ValueError as error:
            raise ValueError(
                "data must be the content of a whole TFLite file. "
                f"Received: {len(data)} bytes, of which the runtime says: "
                f"{str(error).strip()}"
            ) from error


class Runner:
    """Runs a file on batches of any size.

    Args:
        data: The file's path, or its bytes.
        kernel: "xnnpack", or "builtin" for TFLite's own kernels.
        threads: Number of threads.
        intermediates: Also return every computed tensor. The same operators run, but
            all tensors become outputs, because a delegate shows no others.

    Raises:
        ValueError: If the runtime refuses the file.
        OSError: If the file cannot be read.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | bytes,
        kernel: str = kernels.XNNPACK,
        threads: int = 1,
        intermediates: bool = False,
    ):
        if checks.flag("intermediates", intermediates):
            data = with_all_outputs(file_bytes.content_of("data", data))
        self._interpreter = interpreter(data, kernel, threads)
        self._shape: list[tuple[int, ...]] | None = None
        self.inputs = self._interpreter.get_input_details()
        self.outputs = self._interpreter.get_output_details()

    def __call__(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Name of each output tensor -> its values.

        Args:
            *inputs: A NumPy array for each input of the file, of its dtype and shape,
                [batch, ...].

        Raises:
            ValueError: For other inputs, an empty batch, NaN or infinity.
        """
        check_inputs(inputs, self.inputs)
        shapes = [x.shape for x in inputs]
        if shapes != self._shape:
            self._shape = None  # In case the file refuses the new shapes.
            for detail, x in zip(self.inputs, inputs, strict=True):
                self._interpreter.resize_tensor_input(detail["index"], x.shape)
            self._interpreter.allocate_tensors()
            self._shape = shapes
        for detail, x in zip(self.inputs, inputs, strict=True):
            self._interpreter.set_tensor(detail["index"], x)
        self._interpreter.invoke()
        return {
            detail["name"]: self._interpreter.get_tensor(detail["index"])
            for detail in self.outputs
        }

    def not_delegated(self) -> list[str]:
        """Names of the operators that run outside of the delegate."""
        if self._shape is None:
            self._interpreter.allocate_tensors()
        operators = self._interpreter._get_ops_details()
        producers: dict[int, dict] = {}
        for operator in operators:
            for output in operator["outputs"]:
                # Delegates come last, so they overwrite the operators they replace.
                producers[int(output)] = operator
        found, seen = [], set()
        waiting = [int(detail["index"]) for detail in self.outputs]
        while waiting:
            operator = producers.get(waiting.pop())
            if operator is None or operator["index"] in seen:
                continue
            seen.add(operator["index"])
            if operator["op_name"] != "DELEGATE":
                found.append(operator["op_name"])
            waiting += [int(i) for i in operator["inputs"] if i >= 0]
        return sorted(found)


def check_inputs(inputs: Sequence[Any], details: Sequence[Mapping[str, Any]]) -> None:
    """Refuses inputs for which a runtime would fail or compute garbage.

    Args:
        inputs: One array for each input of the file.
        details: The file's inputs.

    Raises:
        ValueError: If number, dtype or shape differ from the file's, an array has no
            example, or a value is not finite.
    """
    fit = len(inputs) == len(details) and all(map(_fits, inputs, details))
    if not fit:
        wanted = ", ".join(
            f"{np.dtype(d['dtype'])} {['batch', *_shape_of(d)[1:]]}" for d in details
        )
        given = ", ".join(
            f"{x.dtype} {list(x.shape)}"
            if isinstance(x, np.ndarray)
            else type(x).__name__
            for x in inputs
        )
        raise ValueError(
            "Inputs must be one NumPy array for each of the file's inputs, "
            f"{wanted}, of at least one example; -1 is any size. "
            f"Received: {given or 'none'}"
        )
    if not all(np.isfinite(x).all() for x in inputs):
        raise ValueError("Inputs must be finite. Received: NaN or infinity")


def _shape_of(detail) -> list[int]:
    """The shape of an input; -1 for an open size."""
    signature = detail.get("shape_signature", ())
    return [int(n) for n in (signature if len(signature) else detail["shape"])]


def _fits(x, detail) -> bool:
    if not isinstance(x, np.ndarray) or x.dtype != detail["dtype"]:
        return False
    wanted = _shape_of(detail)
    return (
        x.ndim == len(wanted)
        and min(x.shape, default=1) >= 1
        and all(w in (-1, n) for n, w in zip(x.shape[1:], wanted[1:], strict=True))
    )


def latencies(
    files: Mapping[str, str | os.PathLike[str] | bytes],
    *,
    kernel: str = kernels.XNNPACK,
    batch: int = 1,
    rounds: int = 15,
    seconds: float = 0.05,
) -> dict[str, list[float]]:
    """Measures the latency of files in seconds, on one thread and noise as input.

    The files take turns, so that drift of the machine affects all of them. Compare them
    by ratios within a round, not by seconds.

    Args:
        files: Name -> the file's path, or its bytes.
        kernel: As in `Runner`.
        batch: Batch size.
        rounds: Number of turns of each file, after one for warming up.
        seconds: Approximate length of a turn.

    Returns:
        Name -> mean latency in each turn.

    Raises:
        ValueError: If an argument is not as above, or the runtime refuses a file.
        OSError: If a file cannot be read.
    """
    checks.instance("files", files, Mapping)
    if not files:
        raise ValueError("files must hold at least one file. Received: files={}")
    checks.integer("batch", batch, at_least=1)
    checks.integer("rounds", rounds, at_least=1)
    checks.number("seconds", seconds, above=0)
    turns = {name: _turn(data, kernel, batch) for name, data in files.items()}
    counts = {}
    for name, turn in turns.items():
        turn(3)
        counts[name] = max(1, int(seconds / turn(3)))
    measured: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, turn in turns.items():
            measured[name].append(turn(counts[name]))
    return measured


def _turn(data, kernel, batch):
    """Returns a function (count) -> mean seconds of `count` runs."""
    made = interpreter(data, kernel)
    rng = np.random.default_rng(0)
    for detail in made.get_input_details():
        shape = (batch, *detail["shape"][1:])
        made.resize_tensor_input(detail["index"], shape)
        made.allocate_tensors()
        noise = rng.uniform(0, 100, shape)
        if detail["dtype"] == np.float32:
            noise /= 100
        made.set_tensor(detail["index"], noise.astype(detail["dtype"]))

    def run(count):
        start = time.perf_counter()
        for _ in range(count):
            made.invoke()
        return (time.perf_counter() - start) / count

    return run


def with_all_outputs(data: bytes) -> bytes:
    """A copy of the file in which every computed tensor is an output."""
    model = flatbuffer.unpack(data)
    (graph,) = model.subgraphs
    graph.outputs = [int(t) for op in graph.operators for t in op.outputs]
    model.signatureDefs = []
    return flatbuffer.pack(model)
