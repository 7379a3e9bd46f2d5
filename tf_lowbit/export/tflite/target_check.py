"""Checks that a target can run a file."""

from typing import Any

from tf_lowbit.export.targets import Target
from tf_lowbit.export.tflite import flatbuffer
from tf_lowbit.export.tflite.flatbuffer import schema
from tf_lowbit.export.types import ExportError


def require_runnable(data: bytes, target: Target) -> None:
    """Raises `ExportError` with the first of `problems` for a file's unpacked bytes."""
    for problem in problems(flatbuffer.unpack(data), target):
        raise ExportError(problem)


def problems(model: Any, target: Target) -> list[str]:
    """Lists what a target cannot run in a file, a schema object.

    Returns:
        A message for each operator that the target lacks, for each float operator if
        the target has no floats, and for each open size if sizes must be fixed.
    """
    (graph,) = model.subgraphs
    found = []
    for operator in graph.operators:
        _, number = flatbuffer.code_of(model, operator)
        name = flatbuffer.OPERATORS.get(number, str(number))
        output = graph.tensors[operator.outputs[0]]
        where = f"{name} in {output.name.decode()!r}"
        if not target.has(name):
            found.append(
                f"target={target.name!r} supports only some operators. Use another "
                f"layer or target. Received: {where}"
            )
        elif not target.floats and output.type == schema.TensorType.FLOAT32:
            found.append(
                f"target={target.name!r} computes in int8 only. Quantize the layer's "
                f"input, or end the network in logits. Received: {where} of floats"
            )
    for tensor in graph.tensors:
        signature = tensor.shapeSignature
        is_open = signature is not None and -1 in signature[1:]
        if is_open and not target.open_sizes:
            shape = [None if size < 0 else int(size) for size in signature]
            found.append(
                f"target={target.name!r} takes tensors of fixed sizes. Build the "
                "network with a fixed input shape. Received: "
                f"{tensor.name.decode()!r} of {shape}"
            )
    return found
