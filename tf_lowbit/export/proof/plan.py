"""Comparison of a file's tensors and operators with the plan."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tf_lowbit.export.proof.verification import Report
from tf_lowbit.export.tflite import flatbuffer, operators
from tf_lowbit.export.tflite.flatbuffer import schema

# Name, version, options, names of inputs, names of outputs.
Operator = tuple[str, int, dict[str, Any], list[str | None], list[str]]


class Tensors:
    """The tensors of a file, by name."""

    def __init__(self, model: Any):
        (self._graph,) = model.subgraphs
        self._model = model
        self._by_name = {t.name.decode(): t for t in self._graph.tensors}
        self._names = [t.name.decode() for t in self._graph.tensors]

    def __contains__(self, name):
        return name in self._by_name

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._by_name)

    def shape(self, name: str) -> tuple[list[int], list[int] | None, int]:
        """Shape, shape signature and type."""
        tensor = self._by_name[name]
        signature = tensor.shapeSignature
        return (
            [int(s) for s in np.ravel(tensor.shape)],
            None if signature is None else [int(s) for s in signature],
            tensor.type,
        )

    def scales(self, name: str) -> np.ndarray:
        """Float32 scales; empty if the tensor is not quantized."""
        return flatbuffer.vector(self._quantization(name).scale, np.float32)

    def zero_points(self, name: str) -> np.ndarray:
        """Zero points; empty if the tensor is not quantized."""
        return flatbuffer.vector(self._quantization(name).zeroPoint, np.int64)

    def axis(self, name: str) -> int:
        """The axis of the channels."""
        return self._quantization(name).quantizedDimension

    def _quantization(self, name):
        return self._by_name[name].quantization or schema.QuantizationParametersT()

    def values(self, name: str) -> np.ndarray | None:
        """The values of a constant; None for a computed tensor."""
        tensor = self._by_name[name]
        data = flatbuffer.vector(self._model.buffers[tensor.buffer].data, np.uint8)
        if not len(data):
            return None
        shape = [int(s) for s in np.ravel(tensor.shape)]
        if tensor.type == schema.TensorType.INT4:
            return flatbuffer.unpack_int4(data, int(np.prod(shape))).reshape(shape)
        return data.view(flatbuffer.DTYPES[tensor.type]).reshape(shape)

    def operators(self) -> Iterator[Operator]:
        """Yields each `Operator`, in the file's order."""
        for operator in self._graph.operators:
            code, number = flatbuffer.code_of(self._model, operator)
            options = operator.builtinOptions
            yield (
                flatbuffer.OPERATORS.get(number, f"operator {number}"),
                code.version,
                {} if options is None else _plain(vars(options)),
                [self._names[i] if i >= 0 else None for i in operator.inputs],
                [self._names[i] for i in operator.outputs],
            )

    def operator_of(self, output: str) -> Operator | None:
        """The `Operator` that outputs a tensor, or None."""
        return next((entry for entry in self.operators() if output in entry[4]), None)

    def ends(self) -> tuple[list[str], list[str]]:
        """Names of the graph's inputs and outputs."""
        inputs = [self._names[i] for i in self._graph.inputs]
        return inputs, [self._names[i] for i in self._graph.outputs]


def _plain(options: dict) -> dict:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }


def compare_plan(found: Any, expected: Any, report: Report) -> None:
    """Compares every tensor and operator of a file with the plan, both unpacked."""
    found, expected = Tensors(found), Tensors(expected)
    for name in expected.names():
        if name not in found:
            report.failures.append(f"tensor {name} of the plan is missing")
            continue
        if found.shape(name) != expected.shape(name):
            report.failures.append(
                f"{name}: shape or type {found.shape(name)}, planned "
                f"{expected.shape(name)}"
            )
            continue
        points = found.zero_points, expected.zero_points
        _compare_arrays(name, "scales", found.scales, expected.scales, report)
        _compare_arrays(name, "zero points", *points, report)
        if found.axis(name) != expected.axis(name):
            report.failures.append(
                f"{name}: the axis of its channels is not the plan's"
            )
        part = name.split("/")[-1]
        what = {"weights": "codes", "bias": "biases"}.get(part, "constants")
        _compare_arrays(name, what, found.values, expected.values, report)
    for name in sorted(set(found.names()) - set(expected.names())):
        report.failures.append(f"tensor {name} is not in the plan")
    if found.ends() != expected.ends():
        report.failures.append(
            f"inputs and outputs are {found.ends()}, planned {expected.ends()}"
        )
    present, planned = list(found.operators()), list(expected.operators())
    if len(present) != len(planned):
        report.failures.append(
            f"the file has {len(present)} operators, the plan {len(planned)}"
        )
    for have, want in zip(present, planned, strict=False):
        if have != want:
            report.failures.append(
                f"operator of {want[4][0]}: {_short(have, want)}, planned "
                f"{_short(want, have)}"
            )


def _compare_arrays(name, what, found, expected, report) -> None:
    have, want = found(name), expected(name)
    if have is None and want is None:
        return
    if have is None or want is None or have.shape != want.shape:
        report.failures.append(f"{name}: {what} are missing or of another shape")
        return
    # Compare bits, so that -0.0 differs from 0.0 and NaN equals itself.
    is_other = (have.view(np.uint8) != want.view(np.uint8)).any()
    different = (np.ravel(have) != np.ravel(want)).sum() if is_other else 0
    if different:
        report.failures.append(
            f"{name}: {different} of {have.size} {what} differ from the plan"
        )


def _short(entry, other) -> str:
    """The parts of an operator that differ from another's."""
    labels = ("", "version ", "options ", "inputs ", "outputs ")
    parts = zip(labels, entry, other, strict=True)
    return ", ".join(f"{label}{a}" for label, a, b in parts if a != b)


def check_operators(found: Any, report: Report) -> None:
    """Counts the operators in the report, and adds a failure for each forbidden one."""
    allowed = {
        *operators.INTEGER_VERSIONS.items(),
        *operators.FLOAT_VERSIONS.items(),
        *operators.INT4_VERSIONS.items(),
        ("QUANTIZE", operators.REQUANTIZE_VERSION),
    }
    for name, version, *_ in Tensors(found).operators():
        report.operators[name] = report.operators.get(name, 0) + 1
        if (name, version) not in allowed:
            report.failures.append(
                f"operator {name} of version {version} is not allowed"
            )
