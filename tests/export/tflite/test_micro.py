"""Files for TFLite Micro, in its own interpreter."""

import functools
import subprocess
import sys

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.kernels_in_files import DEPTHWISE, OPERATORS, all_codes, random_layer
from tests.export.networks import (
    EDGE,
    NETWORKS,
    Rule,
    conv_bn_relu,
    images,
    layers,
    network,
    quantize,
    randomize,
)
from tf_lowbit import export
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import kernels
from tf_lowbit.export.integer.kernels import BUILTIN, TFLM
from tf_lowbit.export.options import Options
from tf_lowbit.export.targets import TARGETS
from tf_lowbit.export.tflite import flatbuffer, micro, packed_weights, writer
from tf_lowbit.export.tflite.flatbuffer import schema
from tf_lowbit.export.tflite.micro import MicroRunner
from tf_lowbit.export.tflite.operators import FLOAT_VERSIONS, INTEGER_VERSIONS

RULES = [EDGE, Rule(".*", 2, 2)]
PACKED = {"target": "tflm", "storage": "packed", "head": "int8"}

# --- rounding -------------------------------------------------------------------------


def in_one_batch(data, rows):
    """The file with a fixed batch of `rows`: all accumulators in one run."""
    model = flatbuffer.unpack(data)
    (graph,) = model.subgraphs
    for index in (*graph.inputs, *graph.outputs):
        tensor = graph.tensors[index]
        tensor.shape = [rows, *(int(size) for size in tensor.shape[1:])]
        tensor.shapeSignature = None
    return flatbuffer.pack(model)


def micro_codes(layer, codes):
    """The codes that TFLite Micro computes, rows x channels."""
    rows, taps = codes.shape
    channels = layer.weights.shape[1]
    inputs = codes.astype(np.int8)
    if layer.operator == DEPTHWISE:
        inputs = np.repeat(inputs[:, None, :, None], channels, axis=3)
    elif layer.operator == "CONV_2D":
        inputs = inputs.reshape(rows, 1, 1, taps)
    runner = MicroRunner(in_one_batch(layer.data, rows))
    return runner(inputs)["output"].reshape(rows, channels)


@pytest.mark.quick(1)
@pytest.mark.parametrize("channels", [64, 12, 1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_accumulator(operator, channels):
    layer = random_layer(operator, channels=channels)
    codes = all_codes()
    got = micro_codes(layer, codes)
    accumulators = layer.accumulators(codes)
    multipliers = layer.multipliers(TFLM)
    want = kernels.requantize(TFLM, accumulators, multipliers, -128, 127)
    np.testing.assert_array_equal(got, want)
    # Which is no other kernel's rounding.
    for other in kernels.KERNELS:
        arguments = (accumulators, layer.multipliers(other), -128, 127)
        assert (kernels.requantize(other, *arguments) != got).any()


@pytest.mark.quick(2)
@pytest.mark.parametrize("operator", OPERATORS)
def test_steep_and_flat_multipliers(operator):
    codes = all_codes()[::7]
    for least, most in ((1.0, 180.0), (2.0**-14, 2.0**-11)):
        layer = random_layer(operator, least=least, most=most)
        multipliers = layer.multipliers(TFLM)
        want = kernels.requantize(
            TFLM, layer.accumulators(codes), multipliers, -128, 127
        )
        np.testing.assert_array_equal(micro_codes(layer, codes), want)


def test_requantize_tensor_is_the_same():
    layer = random_layer(DEPTHWISE)
    accumulators = layer.accumulators(all_codes()[::3])
    multipliers = layer.multipliers(TFLM)
    want = kernels.requantize(TFLM, accumulators, multipliers, -128, 127)
    got = kernels.requantize_tensor(
        TFLM,
        tf.constant(accumulators, tf.float64),
        kernels.stored(TFLM, multipliers),
        -128,
        127,
    )
    np.testing.assert_array_equal(got.numpy(), want)
    other = kernels.requantize(BUILTIN, accumulators, multipliers, -128, 127)
    assert (other != want).any()


# --- networks -------------------------------------------------------------------------


@functools.cache
def exported(name):
    """A quantized network, its input, its `Snapped`, and its plain and packed file."""
    model = quantize(NETWORKS[name](), RULES)
    data = images(5, model.input_shape[1:])
    snapped = export.snap(model, [data], options=Options(**PACKED))
    plain = writer.to_bytes(snapped)
    return model, data, snapped, plain, packed_weights.pack(plain)


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_proved(name):
    model, data, _, plain, packed = exported(name)
    report = export.verify(packed, model, [data], verbose=0)
    assert report.ok, report.failures
    assert report.mismatches == report.end_to_end == 0
    assert report.codes > 1000
    assert report.runtime == "tflite_micro"
    assert {d.kernel for d in report.decisions} == {TFLM}
    if name == "one unit":  # A number without labels is no class.
        assert report.values.examples == len(data)
    else:
        predictions = report.predictions
        assert predictions.twin_agrees == predictions.examples >= len(data)
    assert len(packed) < len(plain)
    assert 1 <= report.widths["inner/weights"] <= 3


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_files_put_out_what_plain_ones_do(name):
    _, data, snapped, plain, packed = exported(name)
    values = writer.input_codes(snapped.twin.layers[1], data, "int8")
    runners = [MicroRunner(content) for content in (plain, packed)]
    outputs = [runner(values) for runner in runners]
    assert outputs[0].keys() == outputs[1].keys()
    for tensor, have in outputs[0].items():
        np.testing.assert_array_equal(have, outputs[1][tensor])
        # A sigmoid computes in float behind the last layer.
        others = {"sigmoid": np.float32, "map of classes": np.int32}
        assert have.dtype == others.get(name, np.int8)
    inner = [MicroRunner(content, intermediates=True) for content in (plain, packed)]
    tensors = [runner(values) for runner in inner]
    assert tensors[0].keys() == tensors[1].keys()
    assert len(tensors[0]) > 3
    for tensor, have in tensors[0].items():
        np.testing.assert_array_equal(have, tensors[1][tensor])
    # Decoded weights live in the arena.
    assert runners[0].arena() > 1000
    assert runners[1].arena() > 1000


def test_output_codes_are_the_twins_values():
    _, data, snapped, _, packed = exported("plain")
    runner = MicroRunner(packed)
    values = writer.input_codes(snapped.twin.layers[1], data, "int8")
    (detail,) = runner.outputs
    scale, zero_point = detail["quantization"]
    got = (runner(values)[detail["name"]].astype(np.float32) - zero_point) * scale
    np.testing.assert_allclose(got, snapped.twin(data), rtol=1e-6)


def test_equal_tables_are_stored_once():
    _, _, _, _, packed = exported("depthwise")
    model = flatbuffer.unpack(packed)
    (graph,) = model.subgraphs
    tables = [
        o.inputs[1] for o in graph.operators if packed_weights.is_decode(model, o)
    ]
    contents = [bytes(model.buffers[graph.tensors[i].buffer].data) for i in tables]
    assert len(set(tables)) == len(set(contents))


def test_to_tflite_writes_what_verify_takes(tmp_path):
    model, data, _, plain, _ = exported("residual")
    path = tmp_path / "net.tflite"
    arguments = {"target": "tflm", "storage": "packed", "verbose": 0}
    result = export.to_tflite(model, path, [data], info={"mean": 0.5}, **arguments)
    assert result.size == len(path.read_bytes()) < len(plain)
    assert export.read_info(path) == {"mean": 0.5}
    report = export.verify(path, result, [data], verbose=0)
    assert report.ok
    text = str(report)
    assert f"{report.arena:,} bytes on this machine" in text
    assert "at 2 bits" in text
    assert {"arena", "widths"} <= report.as_dict().keys()


# --- damage ---------------------------------------------------------------------------


def parts_of(content, name):
    """Where a packed tensor's indices and tables lie in a file."""
    model = flatbuffer.unpack(content)
    (graph,) = model.subgraphs
    for operator in graph.operators:
        output = graph.tensors[operator.outputs[0]].name.decode()
        if packed_weights.is_decode(model, operator) and output == name:
            for index in operator.inputs:
                data = bytes(model.buffers[graph.tensors[index].buffer].data)
                start = content.index(data)
                yield range(start, start + len(data))


def is_found(content, snapped):
    try:
        return not export.verify(content, snapped, verbose=0).ok
    except ValueError:
        return True


@pytest.mark.quick(1)
@pytest.mark.parametrize("part", ["indices", "tables"])
def test_every_damaged_byte_is_found(part):
    _, _, snapped, _, packed = exported("plain")
    indices, tables = parts_of(packed, "inner/weights")
    assert not is_found(packed, snapped)
    places = tables if part == "tables" else [*indices[::12], indices[-1]]
    assert len(places) > 10
    for place in places:
        damaged = bytearray(packed)
        damaged[place] ^= 0x10
        assert is_found(bytes(damaged), snapped), place


def edited(content, change):
    model = flatbuffer.unpack(content)
    (graph,) = model.subgraphs
    decode = next(o for o in graph.operators if packed_weights.is_decode(model, o))
    change(model, graph, decode)
    return flatbuffer.pack(model)


def swap_parts(model, graph, decode):
    decode.inputs = decode.inputs[::-1]


def no_decoding(model, graph, decode):
    graph.operators.remove(decode)


def twice(model, graph, decode):
    graph.operators.insert(0, decode)


def later(model, graph, decode):
    graph.operators.remove(decode)
    graph.operators.append(decode)


def other_code(model, graph, decode):
    model.operatorCodes[-1].customCode = b"OTHER"


def other_version(model, graph, decode):
    model.operatorCodes[-1].version = 2


def other_type(model, graph, decode):
    graph.tensors[decode.inputs[0]].type = schema.TensorType.INT8


def other_shape(model, graph, decode):
    graph.tensors[decode.inputs[0]].shape = [3]


def a_constant_besides(model, graph, decode):
    tensor = graph.tensors[decode.outputs[0]]
    model.buffers.append(schema.BufferT(np.ones(int(np.prod(tensor.shape)), np.uint8)))
    tensor.buffer = len(model.buffers) - 1


def one_part(model, graph, decode):
    decode.inputs = decode.inputs[:1]


def no_tensor(model, graph, decode):
    decode.inputs = [decode.inputs[0], 999]


def options_of_it(model, graph, decode):
    decode.customOptions = np.ones(3, np.uint8)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "change",
    [
        swap_parts, no_decoding, twice, later, other_code, other_version, other_type,
        other_shape, a_constant_besides, one_part, no_tensor, options_of_it,
    ],
)  # fmt: skip
def test_a_damaged_operator_is_found(change):
    _, _, snapped, _, packed = exported("plain")
    assert is_found(edited(packed, change), snapped)


def test_the_file_itself_is_not():
    _, _, snapped, _, packed = exported("plain")
    assert not is_found(packed, snapped)


def test_other_weights_are_named_and_the_file_is_not_run():
    """Whole and canonical, but its weights are not the plan's."""
    _, data, snapped, plain, _ = exported("plain")
    changed = flatbuffer.unpack(plain)
    (graph,) = changed.subgraphs
    (tensor,) = [t for t in graph.tensors if t.name == b"inner/weights"]
    values = np.array(changed.buffers[tensor.buffer].data)
    changed.buffers[tensor.buffer].data = values[::-1].copy()
    content = packed_weights.pack(flatbuffer.pack(changed))
    report = export.verify(content, snapped, [data], verbose=0)
    assert any("codes differ from the plan" in f for f in report.failures)
    assert report.codes == 0


# --- what is refused ------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "portable", "storage": "packed"}, "needs target='tflm'"),
        ({"target": "xnnpack", "storage": "packed"}, "needs target='tflm'"),
        ({"target": "tflm", "storage": "int4"}, "Received: storage='int4'"),
        ({"target": "tflm", "head": "float"}, "Received: head='float'"),
        ({"target": "tflm", "first_layer": "float"}, "Received: first_layer='float'"),
        ({"target": "tflm", "input_type": "uint8"}, "Received: input_type='uint8'"),
        ({"target": "tflm", "input_type": "float32"}, "input_type must be 'int8'"),
        ({"target": "tflm", "output_type": "uint8"}, "Received: output_type='uint8'"),
    ],
)
def test_options_that_do_not_go_together(options, words, tmp_path):
    model, data, *_ = exported("plain")
    with pytest.raises(ValueError, match=words):
        export.to_tflite(model, tmp_path / "net.tflite", [data], verbose=0, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_defaults_of_other_targets_stay(tmp_path):
    model, data, *_ = exported("plain")
    export.to_tflite(model, tmp_path / "net.tflite", [data], verbose=0)
    (detail,) = export.Runner((tmp_path / "net.tflite").read_bytes()).inputs
    assert detail["dtype"] == np.float32


@pytest.mark.slow
def test_an_operator_that_is_missing_is_named(tmp_path):
    def body(x):
        x = conv_bn_relu(x, 4, name="inner")
        return layers.Activation("gelu", name="curved")(x)

    model = quantize(network(body), [EDGE, Rule("inner", 2, 2)])
    with pytest.raises(export.ExportError, match=r"'curved' of type .*needs GELU"):
        export.to_tflite(
            model, tmp_path / "net.tflite", [images()], target="tflm", verbose=0
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_open_size_is_named(tmp_path):
    image = keras.Input((None, None, 2), name="image")
    x = conv_bn_relu(conv_bn_relu(image, 4, name="first"), 4, name="inner")
    x = layers.Conv2D(3, 1, name="head")(x)
    model = quantize(randomize(keras.Model(image, x)), RULES)
    with pytest.raises(export.ExportError, match=r"'image' of \[None, None"):
        export.to_tflite(
            model, tmp_path / "net.tflite", [images()], target="tflm", verbose=0
        )


_CHILD = """
import sys
from tflite_micro import runtime
runtime.Interpreter.from_file(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*INTEGER_VERSIONS, *FLOAT_VERSIONS}))
def test_missing_operators_are_those_the_interpreter_lacks(name, tmp_path):
    """In a process of its own: a kernel may end it over a layer that is none of its."""
    model = flatbuffer.unpack(random_layer(DEPTHWISE).data)
    code = getattr(schema.BuiltinOperator, name)
    model.operatorCodes = [schema.OperatorCodeT(min(code, 127), None, 1, code)]
    (operator,) = model.subgraphs[0].operators
    operator.builtinOptions, operator.builtinOptionsType = None, 0
    path = tmp_path / "one.tflite"
    path.write_bytes(flatbuffer.pack(model))
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, path], capture_output=True, text=True
    )
    is_missing = "Didn't find op for builtin opcode" in child.stderr
    assert is_missing != TARGETS["tflm"].has(name), child.stderr


def test_a_missing_extra_is_named(monkeypatch):
    model, _, _, _, packed = exported("plain")
    monkeypatch.setattr(micro, "_runtime", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[micro\]'"):
        export.verify(packed, model, verbose=0)
    with pytest.raises(ImportError, match=r"pip install '\.\[micro\]'"):
        MicroRunner(packed)


def test_what_the_interpreter_says_is_in_the_error():
    model = flatbuffer.unpack(random_layer(DEPTHWISE).data)
    code = schema.BuiltinOperator.GELU
    model.operatorCodes = [schema.OperatorCodeT(127, None, 1, code)]
    with pytest.raises(RuntimeError, match="GELU"):
        MicroRunner(flatbuffer.pack(model))


def test_public_names():
    assert export.MicroRunner is MicroRunner
    assert tfl.export.MicroRunner is MicroRunner
