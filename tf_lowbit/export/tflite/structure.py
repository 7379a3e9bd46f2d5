"""Checks that a TFLite file is self-consistent, and compares two files."""

import dataclasses
import math
from typing import Any

import numpy as np

from tf_lowbit.export.tflite import flatbuffer
from tf_lowbit.export.tflite.flatbuffer import schema


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field that differs from the plan.

    Attributes:
        path: Path of the field.
        have: Its value.
        want: Its value in the plan.
    """

    path: str
    have: object
    want: object


def differences(found: Any, expected: Any) -> list[Difference]:
    """Lists every field of a consistent file that differs from the plan, both unpacked.

    The description and the contents of the metadata are not compared. Constants are
    compared by tensor, not by buffer.
    """
    return list(_walk(_contents(found), _contents(expected), ""))


def _contents(model) -> dict:
    (graph,) = model.subgraphs
    return {
        "version": model.version,
        "codes": model.operatorCodes,
        "metadata": sorted(entry.name for entry in model.metadata or ()),
        "signatures": model.signatureDefs,
        "graph": graph,
        "data": [model.buffers[t.buffer].data for t in graph.tensors],
    }


def _walk(have, want, path):
    if isinstance(want, np.ndarray) or isinstance(have, np.ndarray):
        # An empty vector may be missing.
        a, b = (np.ravel([] if x is None else x) for x in (have, want))
        if a.tobytes() != b.tobytes() and not np.array_equal(a, b):
            is_other_size = len(a) != len(b)
            yield Difference(f"{path}.length" if is_other_size else path, a, b)
    elif isinstance(want, list) or isinstance(have, list):
        have, want = have or [], want or []
        if len(have) != len(want):
            yield Difference(f"{path}.length", len(have), len(want))
            return
        for index, pair in enumerate(zip(have, want, strict=True)):
            yield from _walk(*pair, f"{path}[{index}]")
    elif isinstance(want, dict) or hasattr(want, "__dict__"):
        if type(have) is not type(want):
            yield Difference(path, type(have), type(want))
            return
        if not isinstance(want, dict):
            have, want = vars(have), vars(want)
        for name, value in want.items():
            if name != "buffer":
                yield from _walk(have[name], value, f"{path}.{name}".lstrip("."))
    elif have != want:
        yield Difference(path, have, want)


def require_consistent(model: Any) -> None:
    """Raises ValueError for a file that contradicts itself."""
    if problem := _problem(model):
        raise ValueError(
            "The file must be a complete one from tf_lowbit.export.to_tflite. "
            f"Received: contents that contradict themselves ({problem})"
        )


def _problem(model) -> str | None:
    if len(model.subgraphs or ()) != 1:
        return f"{len(model.subgraphs or ())} graphs"
    (graph,) = model.subgraphs
    tensors, operators = _sized(graph.tensors), _sized(graph.operators)
    if not tensors or not operators:
        return "no tensors or no operators"
    for index, tensor in enumerate(tensors):
        problem = _problem_of_tensor(tensor, _sized(model.buffers))
        if problem:
            return f"tensor {index}: {problem}"
    used = [graph.inputs, graph.outputs]
    for index, operator in enumerate(operators):
        if not 0 <= operator.opcodeIndex < len(_sized(model.operatorCodes)):
            return f"operator {index} has no code"
        if not len(_sized(operator.inputs)) or not len(_sized(operator.outputs)):
            return f"operator {index} reads or makes nothing"
        if np.min(operator.outputs) < 0:
            return f"operator {index} makes no tensor"
        used += [operator.inputs, operator.outputs]
    for indices in used:
        if not len(_sized(indices)):
            return "no inputs or no outputs"
        if np.min(indices) < -1 or np.max(indices) >= len(tensors):
            return "a tensor that does not exist"
    if min(np.min(graph.inputs), np.min(graph.outputs)) < 0:
        return "a tensor that does not exist"
    return None


def _problem_of_tensor(tensor, buffers) -> str | None:
    try:
        name = (tensor.name or b"").decode()
    except UnicodeDecodeError:
        name = ""
    if not name:
        return "no name"
    if not 0 <= tensor.buffer < len(buffers):
        return "no buffer"
    shape = [int(size) for size in _sized(tensor.shape)]
    if any(size < 0 for size in shape):
        return "a negative size"
    buffer = buffers[tensor.buffer]
    if buffer.offset or buffer.size or getattr(tensor, "externalBuffer", 0):
        return "a constant outside of the flatbuffer"
    data = _sized(buffer.data)
    if not len(data):
        return None
    if tensor.type == schema.TensorType.INT4:
        size = (math.prod(shape) + 1) // 2
    elif tensor.type in flatbuffer.DTYPES:
        size = math.prod(shape) * flatbuffer.DTYPES[tensor.type].itemsize
    else:
        return f"a constant of type {tensor.type}"
    return None if size == len(data) else f"{len(data)} bytes, not {size}"


def _sized(values):
    """A vector of the schema, which may be None if it is empty."""
    return () if values is None else values
