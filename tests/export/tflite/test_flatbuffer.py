"""Files: bytes by hand, what a real interpreter reads, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.export import kernels_in_files
from tests.export.kernels_in_files import DENSE, Layer
from tf_lowbit.export.integer import kernels
from tf_lowbit.export.tflite import flatbuffer
from tf_lowbit.export.tflite.flatbuffer import FileBuilder, schema

_LAYER = Layer(
    DENSE,
    weights=np.array([[1, -2, 3], [4, 5, -6]], np.int8),
    scales=np.array([0.25, 0.5, 0.75], np.float32),
    biases=np.array([7, -8, 9], np.int32),
)


def _file(metadata=b"{}", extra=()):
    """x -> (y, z): y = x + c, z = x * c; and constants that nothing reads."""
    file = FileBuilder("two outputs")
    inputs = file.activation("in", (None, 3), np.float32)
    constant = file.constant("c", np.array([1.0, 2.0, 4.0], np.float32))
    for name, values in extra:
        file.constant(name, values)
    total = file.activation("sum", (None, 3), np.float32)
    product = file.activation("product", (None, 3), np.float32)
    file.operator("ADD", 1, [inputs, constant], [total], schema.AddOptionsT())
    file.operator("MUL", 1, [inputs, constant], [product], schema.MulOptionsT())
    outputs = {"y": total, "z": product}
    return file.finish({"x": inputs}, outputs, metadata, "both")


def _buffers(data):
    """Bytes of each buffer, and where they start in the file."""
    model = schema.Model.GetRootAs(data, 0)
    found = []
    for i in range(model.BuffersLength()):
        buffer = model.Buffers(i)
        if not buffer.DataLength():
            found.append((None, b""))
            continue
        # 4 is the place of `data` in the buffer's table.
        start = buffer._tab.Vector(buffer._tab.Offset(4))
        found.append((start, data[start : start + buffer.DataLength()]))
    return found


@pytest.mark.parametrize("odd", range(1, 40, 3))
def test_buffers_are_aligned(odd):
    extra = [(f"c{i}", np.arange(odd + i, dtype=np.int8)) for i in range(5)]
    data = _file(b"m" * odd, extra)
    for file in (data, flatbuffer.pack(flatbuffer.unpack(data))):
        found = _buffers(file)
        starts = [start for start, _ in found if start is not None]
        assert len(starts) >= 7
        assert [start % 16 for start in starts] == [0] * len(starts)
        contents = [content for _, content in found]
        assert all(values.tobytes() in contents for _, values in extra)


def test_first_buffer_is_empty():
    assert _buffers(_file())[0] == (None, b"")


def test_equal_constants_share_a_buffer():
    ones = np.ones(1000, np.float32)
    model = flatbuffer.unpack(_file(extra=[("a", ones), ("b", ones), ("d", 2 * ones)]))
    (graph,) = model.subgraphs
    buffers = {t.name: t.buffer for t in graph.tensors}
    assert buffers[b"a"] == buffers[b"b"]
    assert len({buffers[b"a"], buffers[b"d"], buffers[b"c"], 0}) == 4
    # Computed tensors all have the empty one.
    assert {buffers[n] for n in (b"in", b"sum", b"product")} == {0}


def test_equal_bytes_of_two_types_keep_their_types():
    zeros = [("f", np.zeros(2, np.float32)), ("i", np.zeros(8, np.int8))]
    (graph,) = flatbuffer.unpack(_file(extra=zeros)).subgraphs
    tensors = {t.name: t for t in graph.tensors}
    assert tensors[b"f"].type == schema.TensorType.FLOAT32
    assert tensors[b"i"].type == schema.TensorType.INT8
    assert list(tensors[b"i"].shape) == [8]


def test_constants_read_back():
    model = flatbuffer.unpack(_LAYER.data)
    (graph,) = model.subgraphs
    tensors = {t.name: t for t in graph.tensors}
    kernel = tensors[b"kernel"]
    assert list(kernel.shape) == [3, 2]
    data = model.buffers[kernel.buffer].data
    assert np.array(data, np.uint8).view(np.int8).tolist() == [1, 4, -2, 5, 3, -6]
    assert list(kernel.quantization.scale) == [0.25, 0.5, 0.75]
    assert list(kernel.quantization.zeroPoint) == [0, 0, 0]
    assert kernel.quantization.quantizedDimension == 0
    data = model.buffers[tensors[b"biases"].buffer].data
    assert np.array(data, np.uint8).view(np.int32).tolist() == [7, -8, 9]
    assert list(tensors[b"biases"].quantization.scale) == [0.125, 0.25, 0.375]


def test_operator_codes_are_shared_by_version():
    file = FileBuilder("codes")
    tensors = [file.activation(str(i), (None, 2), np.float32) for i in range(4)]
    for i, version in enumerate((1, 2, 1)):
        file.operator("RELU", version, [tensors[i]], [tensors[i + 1]])
    data = file.finish({"x": tensors[0]}, {"y": tensors[3]}, b"", "s")
    model = flatbuffer.unpack(data)
    assert [code.version for code in model.operatorCodes] == [1, 2]
    operators = model.subgraphs[0].operators
    assert [operator.opcodeIndex for operator in operators] == [0, 1, 0]


def test_code_above_127_has_the_old_field_at_its_end():
    file = FileBuilder("codes")
    x = file.activation("x", (None, 2), np.float32)
    y = file.activation("y", (None, 2), np.float32)
    file.operator("GELU", 1, [x], [y], schema.GeluOptionsT())
    (code,) = flatbuffer.unpack(file.finish({"x": x}, {"y": y}, b"", "s")).operatorCodes
    assert code.builtinCode == schema.BuiltinOperator.GELU == 150
    assert code.deprecatedBuiltinCode == 127


def test_signature_and_batch():
    lite = kernels_in_files.interpreter(_file(), kernels.BUILTIN)
    assert lite.get_signature_list() == {
        "both": {"inputs": ["x"], "outputs": ["y", "z"]}
    }
    run = lite.get_signature_runner("both")
    for batch in (1, 5):
        x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
        result = run(x=x)
        np.testing.assert_array_equal(result["y"], x + np.float32([1, 2, 4]))
        np.testing.assert_array_equal(result["z"], x * np.float32([1, 2, 4]))
    (detail,) = lite.get_input_details()
    assert detail["shape_signature"].tolist() == [-1, 3]


def test_quantization_of_activations():
    lite = kernels_in_files.interpreter(
        Layer(
            DENSE,
            _LAYER.weights,
            _LAYER.scales,
            _LAYER.biases,
            input_scale=0.5,
            input_zero_point=-3,
            output_scale=0.125,
            output_zero_point=100,
        ).data,
        kernels.BUILTIN,
    )
    assert lite.get_input_details()[0]["quantization"] == (0.5, -3)
    assert lite.get_output_details()[0]["quantization"] == (0.125, 100)


def test_metadata():
    about = {"name": "ü", "list": [1, 2.5]}
    text = json.dumps(about).encode()
    model = flatbuffer.unpack(_file(text))
    (entry,) = model.metadata
    assert entry.name.decode() == flatbuffer.METADATA
    assert json.loads(bytes(bytearray(model.buffers[entry.buffer].data))) == about


@pytest.mark.parametrize("data", [_file(b"about"), _LAYER.data])
def test_unpack_and_pack_keep_everything(data):
    once = flatbuffer.pack(flatbuffer.unpack(data))
    assert _dump(flatbuffer.unpack(once)) == _dump(flatbuffer.unpack(data))
    assert flatbuffer.pack(flatbuffer.unpack(once)) == once
    # Bigger by nothing: sharing survives.
    assert len(once) <= len(data)


def _dump(thing):
    """A schema object as plain Python."""
    if isinstance(thing, bytes):
        return thing.decode()
    if isinstance(thing, list | tuple | np.ndarray):
        return [_dump(item) for item in thing]
    if hasattr(thing, "__dict__"):
        # `_AlignedBuffer` is a buffer.
        return {name: _dump(value) for name, value in vars(thing).items()}
    return thing.item() if isinstance(thing, np.generic) else thing


def test_what_the_dump_compares():
    dump = _dump(flatbuffer.unpack(_LAYER.data))
    (graph,) = dump["subgraphs"]
    assert dump["description"] == "one operator"
    assert dump["signatureDefs"][0]["signatureKey"] == "serving"
    assert graph["operators"][0]["builtinOptions"]["keepNumDims"] is False
    assert graph["tensors"][0]["shapeSignature"] == [-1, 2]


@pytest.mark.parametrize(
    "data", [b"", b"TFL3", b"\0" * 64, b"\x1c\0\0\0TFL2" + b"\0" * 64, b"PK\3\4" * 9]
)
def test_unpack_refuses_what_is_no_file(data):
    with pytest.raises(ValueError, match="must be a TFLite flatbuffer"):
        flatbuffer.unpack(data)


def test_unknown_dtype_and_operator():
    file = FileBuilder("bad")
    with pytest.raises(KeyError):
        file.constant("c", np.zeros(2, np.float64))
    with pytest.raises(AttributeError):
        file.operator("NO_SUCH", 1, [], [])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([1], [0x01]),
        ([-1], [0x0F]),
        ([1, 2], [0x21]),
        ([-8, 7], [0x78]),
        ([7, -8], [0x87]),
        ([-1, -2, -3], [0xEF, 0x0D]),
        ([[0, 1], [2, 3]], [0x10, 0x32]),
    ],
)
def test_int4_by_hand(values, expected):
    packed = flatbuffer.pack_int4(np.array(values, np.int8))
    assert packed.dtype == np.uint8
    assert packed.tolist() == expected
    flat = np.ravel(np.array(values, np.int8))
    unpacked = flatbuffer.unpack_int4(packed, flat.size)
    assert unpacked.dtype == np.int8
    assert unpacked.tolist() == flat.tolist()


@given(
    hnp.arrays(
        np.int8,
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7),
        elements=st.integers(-8, 7),
    )
)
def test_int4_round_trip(values):
    packed = flatbuffer.pack_int4(values)
    assert packed.size == (values.size + 1) // 2
    unpacked = flatbuffer.unpack_int4(packed, values.size)
    np.testing.assert_array_equal(unpacked, values.ravel())


def test_int4_constant_in_a_file():
    layer = Layer(DENSE, _LAYER.weights, _LAYER.scales, _LAYER.biases, int4=True)
    model = flatbuffer.unpack(layer.data)
    tensor = next(t for t in model.subgraphs[0].tensors if t.name == b"kernel")
    assert tensor.type == schema.TensorType.INT4
    assert list(tensor.shape) == [3, 2]
    data = model.buffers[tensor.buffer].data
    assert bytes(bytearray(data)) == bytes([0x41, 0x5E, 0xA3])
