"""Running a TFLite file: with LiteRT where it is installed, else with TensorFlow."""

import importlib.metadata
import platform
import time
import warnings
from collections.abc import Mapping

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.core import checks
from tf_lowbit.export import flatbuffer, kernels

try:
    from ai_edge_litert import interpreter as _litert
except ImportError:
    _litert = None


def runtime() -> str:
    """Which runtime `interpreter` uses, its version and the machine's kind."""
    if _litert is None:
        name = f"tf.lite {tf.__version__}"
    else:
        name = f"ai_edge_litert {importlib.metadata.version('ai-edge-litert')}"
    return f"{name} on {platform.machine()}"


def interpreter(data: bytes, kernel: str = kernels.XNNPACK, threads: int = 1):
    """An interpreter of a file.

    Args:
        data: the file's bytes.
        kernel: "xnnpack", or "builtin" for TFLite's own kernels.
        threads: how many it may use.

    Raises:
        ValueError: if the runtime does not take the file.
    """
    checks.instance("data", data, bytes | bytearray, remedy="the file's content")
    if data[4:8] != flatbuffer.IDENTIFIER:
        raise ValueError(
            f"data must be the content of a TFLite file. Received: {len(data)} bytes "
            "without its identifier"
        )
    checks.choice("kernel", kernel, (kernels.XNNPACK, kernels.BUILTIN))
    checks.integer("threads", threads, at_least=1)
    arguments = {"model_content": bytes(data), "num_threads": threads}
    resolvers = (
        tf.lite.experimental.OpResolverType
        if _litert is None
        else _litert.OpResolverType
    )
    if kernel == kernels.BUILTIN:
        arguments["experimental_op_resolver_type"] = (
            resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's says that LiteRT replaces it.
        if _litert is None:
            return tf.lite.Interpreter(**arguments)
        return _litert.Interpreter(**arguments)


class Runner:
    """Runs a file on batches of any size.

    Args:
        data: the file's bytes.
        kernel: as in `interpreter`.
        threads: as in `interpreter`.
        intermediates: also give every tensor that is computed. The same operators run;
            the tensors become outputs of the graph, since a delegate shows no others.
    """

    def __init__(
        self,
        data: bytes,
        kernel: str = kernels.XNNPACK,
        threads: int = 1,
        intermediates: bool = False,
    ):
        if checks.flag("intermediates", intermediates):
            data = with_all_outputs(data)
        self._interpreter = interpreter(data, kernel, threads)
        self._shape = None
        self.inputs = self._interpreter.get_input_details()
        self.outputs = self._interpreter.get_output_details()

    def __call__(self, *inputs) -> dict[str, np.ndarray]:
        """Outputs by the tensors' names in the file.

        Args:
            *inputs: one NumPy array for each of the file's inputs, of its dtype and
                shape, [batch, ...].

        Raises:
            ValueError: for other ones, without an example, or with NaN or infinity.
        """
        self._check(inputs)
        shapes = [x.shape for x in inputs]
        if shapes != self._shape:
            self._shape = None  # Until the file has taken the new one.
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

    def _check(self, inputs) -> None:
        """Refuses what would end in an error of the runtime, or in chance."""
        fit = len(inputs) == len(self.inputs) and all(
            isinstance(x, np.ndarray)
            and x.dtype == detail["dtype"]
            and _has_shape(x.shape, detail)
            for x, detail in zip(inputs, self.inputs, strict=True)
        )
        if not fit:
            wanted = ", ".join(
                f"{np.dtype(d['dtype'])} {['batch', *_shape_of(d)[1:]]}"
                for d in self.inputs
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

    def not_delegated(self) -> list[str]:
        """Names of the operators that run outside the delegate.

        Asked of an interpreter whose tensors are allocated.
        """
        if self._shape is None:
            self._interpreter.allocate_tensors()
        operators = self._interpreter._get_ops_details()
        producers: dict[int, dict] = {}
        for operator in operators:
            for output in operator["outputs"]:
                # Delegates come last: they take the place of what they replace.
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


def _shape_of(detail) -> list[int]:
    """The shape of a file's input; -1 for an open size."""
    signature = detail.get("shape_signature", ())
    return [int(n) for n in (signature if len(signature) else detail["shape"])]


def _has_shape(shape, detail) -> bool:
    wanted = _shape_of(detail)
    return (
        len(shape) == len(wanted)
        and min(shape, default=1) >= 1
        and all(w in (-1, n) for n, w in zip(shape[1:], wanted[1:], strict=True))
    )


def latencies(
    files: dict[str, bytes],
    *,
    kernel: str = kernels.XNNPACK,
    batch: int = 1,
    rounds: int = 15,
    seconds: float = 0.05,
) -> dict[str, list[float]]:
    """Seconds of one run of each file, on one thread, on noise.

    The files take turns, so that the machine's drift hits all of them: compare them by
    the ratios within a round, never by the seconds.

    Args:
        files: name -> bytes.
        kernel: as in `interpreter`.
        batch: size of the batch.
        rounds: how many times each file has its turn; one more warms up.
        seconds: about how long a turn is.

    Returns:
        Name -> the mean over each of its turns.

    Raises:
        ValueError: if an argument is not as above, or the runtime does not take a file.
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
    """A function (count) -> mean seconds of `count` runs."""
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
    """The same file, with every computed tensor an output."""
    model = flatbuffer.unpack(data)
    (graph,) = model.subgraphs
    graph.outputs = [int(t) for op in graph.operators for t in op.outputs]
    model.signatureDefs = []
    return flatbuffer.pack(model)
