"""Builds, reads and changes TFLite flatbuffers, with TensorFlow's schema classes."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import flatbuffers
import numpy as np
from tensorflow.lite.python import schema_py_generated as schema

IDENTIFIER = b"TFL3"
METADATA = "tf_lowbit"
# Required by the schema, but not done by the generated Python classes.
_ALIGNMENT = 16

TYPES: dict[np.dtype, int] = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.uint8): schema.TensorType.UINT8,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int64): schema.TensorType.INT64,
}
DTYPES = {number: dtype for dtype, number in TYPES.items()}
OPERATORS = {
    code: name
    for name, code in vars(schema.BuiltinOperator).items()
    if isinstance(code, int)
}


def vector(values: Any, dtype: np.typing.DTypeLike) -> np.ndarray:
    """A vector of the schema as an array; None is an empty one."""
    return np.asarray([] if values is None else values, dtype)


def code_of(model: Any, operator: Any) -> tuple[Any, int]:
    """The entry of an operator in a schema object, and its number in the schema."""
    entry = model.operatorCodes[operator.opcodeIndex]
    return entry, max(entry.builtinCode, entry.deprecatedBuiltinCode)


class _AlignedBuffer(schema.BufferT):
    """A buffer whose bytes start at a multiple of 16."""

    def Pack(self, builder):  # noqa: N802
        """Writes the buffer."""
        if self.data is None or not len(self.data):
            schema.BufferStart(builder)
            return schema.BufferEnd(builder)
        data = np.asarray(self.data, np.uint8).tobytes()
        builder.StartVector(1, len(data), _ALIGNMENT)
        builder.head -= len(data)
        builder.Bytes[builder.head : builder.head + len(data)] = data
        offset = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, offset)
        return schema.BufferEnd(builder)


class _SharedQuantization:
    """Quantization parameters; equal ones are written once.

    The zero points of weights and biases are all 0, yet take 8 bytes per channel.
    """

    def __init__(self, quantization, written):
        self._written = written
        self._scale = vector(quantization.scale, np.float32)
        self._zero_point = vector(quantization.zeroPoint, np.int64)
        self._axis = quantization.quantizedDimension

    def Pack(self, builder):  # noqa: N802
        """Writes the parameters, or returns the offset of equal ones."""
        key = (self._scale.tobytes(), self._zero_point.tobytes(), self._axis)
        if key not in self._written:
            scale = self._vector(builder, self._scale)
            zero_point = self._vector(builder, self._zero_point)
            schema.QuantizationParametersStart(builder)
            schema.QuantizationParametersAddScale(builder, scale)
            schema.QuantizationParametersAddZeroPoint(builder, zero_point)
            schema.QuantizationParametersAddQuantizedDimension(builder, self._axis)
            self._written[key] = schema.QuantizationParametersEnd(builder)
        return self._written[key]

    def _vector(self, builder, values):
        key = (values.dtype, values.tobytes())
        if key not in self._written:
            self._written[key] = builder.CreateNumpyVector(values)
        return self._written[key]


class FileBuilder:
    """Collects tensors and operators of a file. Equal constants share one buffer."""

    def __init__(self, description: str):
        self._graph = schema.SubGraphT(tensors=[], inputs=[], outputs=[], operators=[])
        self._graph.name = "main"
        # Buffer 0 is empty; all activations share it.
        self._model = schema.ModelT(
            version=3, operatorCodes=[], subgraphs=[self._graph], buffers=[]
        )
        self._model.description = description
        self._model.metadata = []
        self._buffers: dict[bytes | None, int] = {}
        self._codes: dict[tuple[int, int], int] = {}
        self._buffer(None)

    def activation(
        self,
        name: str,
        shape: Sequence[int | None],
        dtype: np.typing.DTypeLike,
        quantization: tuple[float, int] | None = None,
    ) -> int:
        """Adds a computed tensor.

        Args:
            name: Name in the file.
            shape: Sizes; None for an open one, such as the batch.
            dtype: NumPy dtype.
            quantization: (scale, zero point), or None.

        Returns:
            The tensor's index.
        """
        tensor = self._tensor(name, [size or 1 for size in shape], dtype)
        if None in shape:
            tensor.shapeSignature = [-1 if size is None else size for size in shape]
        if quantization is not None:
            scale, zero_point = quantization
            tensor.quantization = _quantization([scale], [zero_point])
        return self._add(tensor)

    def constant(
        self,
        name: str,
        values: np.ndarray,
        scales: np.ndarray | None = None,
        axis: int = 0,
        int4: bool = False,
    ) -> int:
        """Adds a constant.

        Args:
            name: Name in the file.
            values: float32, int32, int8 or uint8 array.
            scales: float32 [channels]; None if not quantized.
            axis: Axis of the channels.
            int4: Store int8 values in [-8, 7] as INT4: see `pack_int4`.

        Returns:
            The tensor's index.
        """
        values = np.ascontiguousarray(values)
        tensor = self._tensor(name, values.shape, values.dtype)
        data = values.ravel().view(np.uint8)
        if int4:
            tensor.type = schema.TensorType.INT4
            data = pack_int4(values)
        tensor.buffer = self._buffer(data)
        if scales is not None:
            scales = np.ravel(scales)
            tensor.quantization = _quantization(scales, [0] * len(scales), axis)
        return self._add(tensor)

    def operator(
        self,
        name: str,
        version: int,
        inputs: Iterable[int],
        outputs: Iterable[int],
        options: Any = None,
    ) -> None:
        """Adds an operator.

        Args:
            name: Name in `BuiltinOperator`, such as "CONV_2D".
            version: Version of the operator.
            inputs: Tensor indices; -1 for a missing one.
            outputs: Tensor indices.
            options: The schema's options object (`Conv2DOptionsT(...)`), or None.
        """
        code = getattr(schema.BuiltinOperator, name)
        key = (code, version)
        if key not in self._codes:
            self._codes[key] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(
                schema.OperatorCodeT(min(code, 127), None, version, code)
            )
        operator = schema.OperatorT(opcodeIndex=self._codes[key])
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = options
        self._graph.operators.append(operator)

    def finish(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        metadata: bytes,
        signature: str,
    ) -> bytes:
        """The bytes of the file.

        Args:
            inputs: Name in the signature -> tensor index.
            outputs: Name in the signature -> tensor index.
            metadata: Stored under the name `METADATA`.
            signature: Key of the signature.
        """
        self._graph.inputs = list(inputs.values())
        self._graph.outputs = list(outputs.values())
        self._model.signatureDefs = [
            schema.SignatureDefT(_maps(inputs), _maps(outputs), signature, 0)
        ]
        index = self._buffer(np.frombuffer(metadata, np.uint8))
        self._model.metadata = [schema.MetadataT(METADATA, index)]
        return pack(self._model)

    def _tensor(self, name, shape, dtype):
        tensor = schema.TensorT(name=name, hasRank=True)
        tensor.shape = [int(size) for size in shape]
        tensor.type = TYPES[np.dtype(dtype)]
        return tensor

    def _add(self, tensor) -> int:
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def _buffer(self, data) -> int:
        key = None if data is None else data.tobytes()
        if key not in self._buffers:
            self._buffers[key] = len(self._model.buffers)
            self._model.buffers.append(_AlignedBuffer(data))
        return self._buffers[key]


def _quantization(scales, zero_points, axis=0):
    return schema.QuantizationParametersT(
        scale=[float(s) for s in scales],
        zeroPoint=[int(z) for z in zero_points],
        quantizedDimension=axis,
    )


def _maps(tensors):
    return [schema.TensorMapT(name, index) for name, index in tensors.items()]


def pack(model: Any) -> bytes:
    """The bytes of a schema object: buffers aligned, equal quantization shared.

    Of quantization parameters, only scales, zero points and the axis are written.
    """
    model.buffers = [
        buffer
        if isinstance(buffer, _AlignedBuffer)
        else _AlignedBuffer(buffer.data, buffer.offset, buffer.size)
        for buffer in model.buffers
    ]
    graphs = model.subgraphs or ()
    # By identity: a damaged file's graphs may share tensors.
    unique = {id(t): t for graph in graphs for t in graph.tensors or ()}
    tensors = [t for t in unique.values() if t.quantization]
    given = [t.quantization for t in tensors]
    written: dict[tuple, int] = {}
    for tensor in tensors:
        tensor.quantization = _SharedQuantization(tensor.quantization, written)
    builder = flatbuffers.Builder(1 << 16)
    try:
        builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    finally:
        for tensor, quantization in zip(tensors, given, strict=True):
            tensor.quantization = quantization
    return bytes(builder.Output())


def unpack(data: bytes) -> Any:
    """The schema object (`ModelT`) of a file's bytes.

    Raises:
        ValueError: If the bytes are not a TFLite file.
    """
    if data[4:8] != IDENTIFIER:
        raise ValueError(
            f"The file must be a TFLite flatbuffer. Received: identifier {data[4:8]!r}"
        )
    try:
        return schema.ModelT.InitFromPackedBuf(data, 0)
    except Exception as error:  # A torn flatbuffer fails in many ways.
        raise ValueError(
            "The file must be a complete TFLite flatbuffer. "
            f"Received: contents that cannot be read ({error})"
        ) from error


def read_metadata(data: bytes) -> dict:
    """The JSON metadata that `FileBuilder.finish` stored in a file.

    Raises:
        ValueError: If the bytes are not a file with such metadata.
    """
    name = METADATA.encode()
    try:
        model = unpack(data)
        own = [m.buffer for m in model.metadata or () if m.name == name]
        found = [json.loads(bytes(model.buffers[index].data)) for index in own]
        if len(found) > 1 or not all(isinstance(each, dict) for each in found):
            raise TypeError("not one table")
    except Exception as error:  # A torn flatbuffer fails in many ways.
        raise ValueError(
            "The file must be a complete one from tf_lowbit.export.to_tflite. "
            f"Received: contents that cannot be read ({error})"
        ) from error
    if not found:
        raise ValueError(
            "The file must be a complete one from tf_lowbit.export.to_tflite. "
            "Received: a file without its metadata, which another program wrote"
        )
    return found[0]


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Packs values as two's complement nibbles, elements of even index in the low half.

    Args:
        values: int8 array of any shape, in [-8, 7].

    Returns:
        Uint8 vector of ceil(size / 2) bytes.

    Raises:
        ValueError: If a value is out of range.
    """
    flat = np.ravel(values)
    if flat.size and (flat.min() < -8 or flat.max() > 7):
        raise ValueError(
            "Values must lie in [-8, 7]. "
            f"Received: values in [{flat.min()}, {flat.max()}]"
        )
    flat = flat.astype(np.int8)
    nibbles = np.zeros(flat.size + flat.size % 2, np.uint8)
    nibbles[: flat.size] = flat.view(np.uint8) & 0xF
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_int4(data: np.typing.ArrayLike, size: int) -> np.ndarray:
    """The int8 values [size] from the bytes of `pack_int4`."""
    data = np.asarray(data, np.uint8)
    nibbles = np.stack([data & 0xF, data >> 4], axis=1).ravel()[:size].astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)
