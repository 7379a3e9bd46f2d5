"""Packed weights: indices of 1 to 7 bits into tables of values, for TFLite Micro.

An int8 weight tensor becomes two constants and an operator `TFLM_DECODE`, which writes
the tensor just before the layer that reads it:

- the indices of k bits, most significant bit first, without gaps; zeros fill the last
  byte;
- 16 bytes of header, then the values: one table for the tensor, or one for each channel
  along the axis of its scales. Header bytes: 0 the kind (0: a table), 1 its version
  (1), 4 the table's version (1), 5 the axis in the high half (15: one table) and k in
  the low half, 6 the stride: the distance in values to the next channel's table. All
  others are 0.

This is the format of TFLM's `compression` package, except for the stride of a single
table, which is the table's length there. Kernels that do not know the axis, such as
those in the wheel of 2026-10-23, step to the next table for each scale of the tensor
and would read past the only one. With a stride of 0 they stay at it.

This module does not use that package. Its own `decode` and TFLM's interpreter decode
the files independently.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_lowbit.export.tflite import flatbuffer
from tf_lowbit.export.tflite.flatbuffer import schema

OPERATOR = b"TFLM_DECODE"
WIDTHS = range(1, 8)
_HEADER = 16
_ONE_TABLE = 15
_CUSTOM = schema.BuiltinOperator.CUSTOM
_LINEAR = {
    schema.BuiltinOperator.CONV_2D,
    schema.BuiltinOperator.DEPTHWISE_CONV_2D,
    schema.BuiltinOperator.FULLY_CONNECTED,
}
# Bytes of an operator, two tensors and two buffers. Packing must save more.
_OVERHEAD = 256


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed int8 tensor.

    Attributes:
        indices: Bytes of the indices.
        tables: Bytes of header and values.
        width: Bits of an index.
    """

    indices: bytes
    tables: bytes
    width: int

    @property
    def size(self) -> int:
        """Bytes of both parts."""
        return len(self.indices) + len(self.tables)


def encode(values: np.ndarray, axis: int | None = None) -> Packed | None:
    """Packs a tensor with the narrowest indices.

    Args:
        values: int8 array.
        axis: Axis of the channels, which get a table each; None for one table.

    Returns:
        The packed tensor, or None if indices need more than 7 bits.
    """
    channels = [values] if axis is None else np.moveaxis(values, axis, 0)
    tables = [np.unique(channel) for channel in channels]
    stride = max(len(table) for table in tables)
    width = max(1, (stride - 1).bit_length())
    if width not in WIDTHS:
        return None
    indices = np.stack(
        [np.searchsorted(t, c) for t, c in zip(tables, channels, strict=True)]
    )
    indices = indices[0] if axis is None else np.moveaxis(indices, 0, axis)
    digits = np.ravel(indices)[:, np.newaxis] >> np.arange(width)[::-1] & 1
    header = np.zeros(_HEADER, np.uint8)
    header[[1, 4]] = 1
    header[5] = (_ONE_TABLE if axis is None else axis) << 4 | width
    header[6] = 0 if axis is None else stride
    padded = np.zeros((len(tables), stride), np.int8)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return Packed(
        np.packbits(digits.astype(np.uint8)).tobytes(),
        header.tobytes() + padded.tobytes(),
        width,
    )


def decode(indices: bytes, tables: bytes, shape: Sequence[int]) -> np.ndarray:
    """Unpacks a tensor.

    Args:
        indices: Bytes of the indices.
        tables: Bytes of header and values.
        shape: Shape of the tensor.

    Returns:
        Int8 array.

    Raises:
        ValueError: If `encode` cannot have made the parts.
    """
    shape = tuple(int(size) for size in shape)
    header = np.frombuffer(tables[:_HEADER], np.uint8)
    if len(header) < _HEADER:
        raise _damaged(f"a header of {len(header)} bytes")
    axis, width, stride = int(header[5]) >> 4, int(header[5]) & 15, int(header[6])
    fixed = np.zeros(_HEADER, np.uint8)
    fixed[[1, 4]] = 1
    fixed[5:7] = header[5:7]
    is_one = axis == _ONE_TABLE
    is_known = width in WIDTHS and (is_one or axis < len(shape))
    if not np.array_equal(fixed, header) or not is_known or is_one != (stride == 0):
        raise _damaged(f"a header {header.tolist()}")
    size = int(np.prod(shape))
    if len(indices) != -(-size * width // 8):
        raise _damaged(f"{len(indices)} bytes of {size} indices of {width} bits")
    bits = np.unpackbits(np.frombuffer(indices, np.uint8))
    if bits[size * width :].any():
        raise _damaged("bits behind the last index")
    places = bits[: size * width].reshape(size, width) @ (1 << np.arange(width)[::-1])
    places = places.reshape(shape)
    values = np.frombuffer(tables[_HEADER:], np.int8)
    count = 1 if is_one else shape[axis]
    length = len(values) if is_one else stride
    if len(values) != count * length or (size and places.max() >= length):
        raise _damaged(f"{len(values)} values in {count} tables")
    if is_one:
        return values[places]
    values = values.reshape(count, stride)
    rows = np.arange(count).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return values[rows, places]


def pack(data: bytes) -> bytes:
    """Packs the int8 weights of convolutions and dense layers in a file.

    Each tensor is packed in the smallest way, or not at all if that saves no bytes.

    Args:
        data: Bytes of a file of `FileBuilder`.

    Returns:
        The bytes of the packed file. Equal vectors are written once.
    """
    model = flatbuffer.unpack(data)
    (graph,) = model.subgraphs
    model.operatorCodes.append(schema.OperatorCodeT(32, OPERATOR, 1, _CUSTOM))
    code = len(model.operatorCodes) - 1
    shared: dict[bytes, int] = {}

    def constant(content: bytes) -> int:
        """The index of a tensor with these bytes, shared by equal ones."""
        if content not in shared:
            model.buffers.append(schema.BufferT(np.frombuffer(content, np.uint8)))
            tensor = schema.TensorT([len(content)], schema.TensorType.UINT8)
            tensor.buffer, tensor.hasRank = len(model.buffers) - 1, True
            shared[content] = len(graph.tensors)
            graph.tensors.append(tensor)
        return shared[content]

    readers = [int(i) for operator in graph.operators for i in operator.inputs]
    operators = []
    for operator in graph.operators:
        if flatbuffer.code_of(model, operator)[1] in _LINEAR:
            index = int(operator.inputs[1])
            parts = _smallest(model, graph.tensors[index])
            if parts is not None and readers.count(index) == 1:
                graph.tensors[index].buffer = 0
                inputs = [constant(parts.indices), constant(parts.tables)]
                operators.append(schema.OperatorT(code, inputs, [index]))
        operators.append(operator)
    graph.operators = operators
    return _bytes(model)


def unpack(data: bytes) -> bytes:
    """Unpacks a packed file.

    Args:
        data: Bytes of a packed file.

    Returns:
        The plain file of `pack`'s argument, up to the order of its bytes.

    Raises:
        ValueError: If the file is damaged.
    """
    model = flatbuffer.unpack(data)
    try:
        _unpack(model)
    except (AttributeError, IndexError, TypeError) as error:
        raise _damaged(str(error)) from error
    return _bytes(model)


def widths(data: bytes) -> dict[str, int]:
    """Name of each packed tensor of a file -> bits of its indices."""
    model = flatbuffer.unpack(data)
    (graph,) = model.subgraphs
    found = {}
    for operator in graph.operators:
        if is_decode(model, operator):
            header = _data(model, graph.tensors[operator.inputs[1]])
            name = graph.tensors[operator.outputs[0]].name.decode()
            found[name] = int(header[5]) & 15
    return found


def _unpack(model) -> None:
    (graph,) = model.subgraphs
    tensors, parts, operators = graph.tensors, set(), []
    for operator in graph.operators:
        if not is_decode(model, operator):
            operators.append(operator)
            continue
        (indices, tables), (output,) = operator.inputs, operator.outputs
        parts |= {int(indices), int(tables)}
        if min(indices, tables, output) < 0 or tensors[output].buffer != 0:
            raise _damaged("a decoded tensor that is a constant")
        values = decode(
            _data(model, tensors[indices]).tobytes(),
            _data(model, tensors[tables]).tobytes(),
            tensors[output].shape,
        )
        model.buffers.append(schema.BufferT(values.ravel().view(np.uint8)))
        tensors[output].buffer = len(model.buffers) - 1
    first = len(tensors) - len(parts)
    used = [graph.inputs, graph.outputs]
    used += [vector for o in operators for vector in (o.inputs, o.outputs)]
    if parts != set(range(first, len(tensors))) or any(
        np.max(vector, initial=-1) >= first for vector in used
    ):
        raise _damaged("indices or tables that something else reads")
    if model.operatorCodes[-1].customCode != OPERATOR or any(
        operator.opcodeIndex == len(model.operatorCodes) - 1 for operator in operators
    ):
        raise _damaged("no operator that decodes")
    model.operatorCodes.pop()
    graph.tensors, graph.operators = tensors[:first], operators


def _smallest(model, tensor) -> Packed | None:
    """The smallest packed form of a constant, or None if packing saves no bytes."""
    data = _data(model, tensor)
    if tensor.type != schema.TensorType.INT8 or not len(data):
        return None
    values = data.view(np.int8).reshape(tensor.shape)
    axis = tensor.quantization.quantizedDimension
    both = (encode(values), encode(values, axis))
    found = [parts for parts in both if parts is not None]
    best = min(found, key=lambda parts: parts.size, default=None)
    is_smaller = best is not None and best.size + _OVERHEAD < len(data)
    return best if is_smaller else None


def is_decode(model: Any, operator: Any) -> bool:
    """Whether an operator of a schema object is `TFLM_DECODE`."""
    return model.operatorCodes[operator.opcodeIndex].customCode == OPERATOR


def _data(model, tensor) -> np.ndarray:
    return flatbuffer.vector(model.buffers[tensor.buffer].data, np.uint8)


def _damaged(what: str) -> ValueError:
    return ValueError(
        "The packed file must be a complete one from tf_lowbit.export.to_tflite. "
        f"Received: {what}"
    )


def _bytes(model) -> bytes:
    """The bytes of a file, without unused buffers and with equal ones shared."""
    (graph,) = model.subgraphs
    kept: dict[bytes, int] = {b"": 0}
    buffers = [schema.BufferT()]
    for user in (*graph.tensors, *model.metadata):
        data = _data(model, user).tobytes()
        if data not in kept:
            kept[data] = len(buffers)
            buffers.append(schema.BufferT(np.frombuffer(data, np.uint8)))
        user.buffer = kept[data]
    model.buffers = buffers
    return flatbuffer.pack(model)
