"""`verify` finds deliberate damage, reports what is there, and survives garbage."""

import copy
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import flatbuffers
import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export import networks
from tf_lowbit import export, models
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import kernels, twin
from tf_lowbit.export.options import Options
from tf_lowbit.export.proof import arithmetic
from tf_lowbit.export.proof import verify as proof
from tf_lowbit.export.tflite import flatbuffer, writer
from tf_lowbit.export.tflite.flatbuffer import schema

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (8, 8, 1)
IMAGES = networks.images(12, SHAPE)
LABELS = np.random.default_rng(1).integers(10, size=12)
OTHER_ENDS = {"input_type": "uint8", "output_type": "float32"}
CHOICES = {
    "xnnpack": {},
    "portable": {"target": "portable"},
    "int4": {"storage": "int4"},
}
RELU, RELU6 = (
    schema.ActivationFunctionType.RELU,
    schema.ActivationFunctionType.RELU6,
)


def network(seed=0):
    net = models.preact_resnet(8, width=4, input_shape=SHAPE)
    networks.randomize(net, seed)
    return tfl.quantize(net, tfl.PrecisionRule(".*", 2, 2))


def snap(choice="xnnpack"):
    return export.snap(network(), [IMAGES], options=Options(**CHOICES[choice]))


@pytest.fixture(scope="module")
def trained():
    return network()


@pytest.fixture(scope="module")
def made(trained):
    """Choice -> (snapped, file)."""

    def build(options):
        snapped = export.snap(trained, [IMAGES], options=Options(**options))
        return snapped, writer.to_bytes(snapped)

    return {name: build(options) for name, options in CHOICES.items()}


@pytest.fixture(scope="module")
def snapped(made):
    return made["xnnpack"][0]


@pytest.fixture(scope="module")
def file(made):
    return made["xnnpack"][1]


def verify(content, model, data=None, **options):
    return export.verify(content, model, data, **{"verbose": 0, **options})


class Edit:
    """A file's contents, by the names of its tensors."""

    def __init__(self, content):
        self.model = flatbuffer.unpack(content)
        (self.graph,) = self.model.subgraphs

    def index(self, name):
        return [t.name for t in self.graph.tensors].index(name.encode())

    def tensor(self, name):
        return self.graph.tensors[self.index(name)]

    def operator(self, output):
        index = self.index(output)
        return next(o for o in self.graph.operators if index in list(o.outputs))

    def option(self, output, name, value):
        options = self.operator(output).builtinOptions
        assert getattr(options, name) != value
        setattr(options, name, value)

    def code_of(self, output, name, version):
        code = getattr(schema.BuiltinOperator, name)
        self.model.operatorCodes.append(
            schema.OperatorCodeT(min(code, 127), None, version, code)
        )
        self.operator(output).opcodeIndex = len(self.model.operatorCodes) - 1

    def constant(self, name, dtype, position, change):
        """Adds to one value; in a buffer of its own, for some are shared."""
        tensor = self.tensor(name)
        values = np.array(self.model.buffers[tensor.buffer].data, np.uint8).view(dtype)
        values[position] += change
        tensor.buffer = len(self.model.buffers)
        self.model.buffers.append(schema.BufferT(values.view(np.uint8)))

    def scale(self, name, channel, new):
        """Changes one scale: `new` of the old one."""
        quantization = self.tensor(name).quantization
        scales = np.array(quantization.scale, np.float32)
        scales[channel] = new(scales[channel])
        quantization.scale = scales

    def bytes(self):
        return flatbuffer.pack(self.model)


def edited(content, change):
    edit = Edit(content)
    change(edit)
    result = edit.bytes()
    assert result != content
    return result


def ulp(value):
    return np.nextafter(np.float32(value), np.float32(np.inf))


def test_an_edit_without_a_change_is_the_file(file):
    assert Edit(file).bytes() == file


# --- damage ---------------------------------------------------------------------------


def needless_reshape(edit):
    (operator,) = (o for o in edit.graph.operators if list(o.outputs) == list(
        edit.graph.outputs))  # fmt: skip
    copied = copy.copy(edit.tensor("head"))
    copied.name = b"head/again"
    edit.graph.tensors.append(copied)
    shape = copy.copy(edit.tensor("head/bias"))
    shape.name, shape.type, shape.shape = b"head/shape", schema.TensorType.INT32, [2]
    shape.quantization = None
    shape.buffer = len(edit.model.buffers)
    edit.model.buffers.append(
        schema.BufferT(np.array([-1, 10], np.int32).view(np.uint8))
    )
    edit.graph.tensors.append(shape)
    first = len(edit.graph.tensors) - 2
    made = copy.copy(operator)
    made.inputs, made.outputs = [edit.graph.outputs[0], first + 1], [first]
    edit.graph.operators.append(made)
    edit.code_of("head/again", "RESHAPE", 1)
    made.builtinOptionsType = schema.BuiltinOptions.ReshapeOptions
    made.builtinOptions = schema.ReshapeOptionsT([-1, 10])
    edit.graph.outputs = [first]


def swap_operators(edit):
    first = edit.graph.operators.index(edit.operator("stage2_block1_conv2"))
    second = edit.graph.operators.index(edit.operator("stage2_block1_shortcut"))
    operators = edit.graph.operators
    operators[first], operators[second] = operators[second], operators[first]


def rewire(output, position, source):
    def change(edit):
        inputs = [int(i) for i in edit.operator(output).inputs]
        inputs[position] = edit.index(source)
        edit.operator(output).inputs = inputs

    return change


def swap_inputs(edit):
    operator = edit.operator("stage2_block1_add")
    operator.inputs = list(operator.inputs)[::-1]


def earlier_output(edit):
    edit.graph.outputs = [edit.index("final_relu")]


def rename(edit):
    edit.tensor("stem").name = b"stem_"


def even_ratio(edit):
    """The first term's step becomes half of the sum's: every odd code ties."""
    step = edit.tensor("stage2_block1_add").quantization.scale[0]
    edit.scale("stage2_block1_conv2", 0, lambda _: step / 2)


def zero_point(name):
    def change(edit):
        quantization = edit.tensor(name).quantization
        quantization.zeroPoint = [int(quantization.zeroPoint[0]) + 1]

    return change


def axis(edit):
    edit.tensor("stage2_block1_conv2/weights").quantization.quantizedDimension = 3


def fixed_batch(edit):
    edit.tensor("image").shapeSignature = None


def weights_as_uint8(edit):
    edit.tensor("stem/weights").type = schema.TensorType.UINT8


def bias_as_float(edit):
    edit.tensor("stem/bias").type = schema.TensorType.FLOAT32


def sum_as_difference(edit):
    edit.code_of("stage1_block1_add", "SUB", 2)
    operator = edit.operator("stage1_block1_add")
    operator.builtinOptionsType = schema.BuiltinOptions.SubOptions
    operator.builtinOptions = schema.SubOptionsT()


CONV = "stage1_block1_conv1"
# (what is done, a part of what is said of it)
DAMAGE = {
    # Two bits have an upscale of 127 // 3 = 42.
    "a weight, one step": (
        lambda e: e.constant(f"{CONV}/weights", np.int8, 7, 42),
        f"{CONV}/weights: 1 of 144 codes differ",
    ),
    "a weight, one unit": (
        lambda e: e.constant(f"{CONV}/weights", np.int8, 7, 1),
        f"{CONV}/weights: 1 of 144 codes differ",
    ),
    "a weight of the float head, one ulp": (
        lambda e: e.constant("head/weights", np.int32, 3, 1),
        "head/weights: 1 of 160 codes differ",
    ),
    "a bias": (
        lambda e: e.constant(f"{CONV}/bias", np.int32, 0, 1),
        f"{CONV}/bias: 1 of 4 biases differ",
    ),
    "padding of the image": (
        lambda e: e.constant("stage2_block1_conv1_pad/paddings", np.int32, 2, 1),
        "stage2_block1_conv1_pad/paddings: 1 of 8 constants differ",
    ),
    "a weight scale": (
        lambda e: e.scale(f"{CONV}/weights", 2, ulp),
        f"{CONV}/weights: 1 of 4 scales differ",
    ),
    "an activation scale": (
        lambda e: e.scale(CONV, 0, ulp),
        f"{CONV}: 1 of 1 scales differ",
    ),
    "a bias scale": (
        lambda e: e.scale(f"{CONV}/bias", 0, ulp),
        f"{CONV}/bias: 1 of 4 scales differ",
    ),
    "a zero point": (zero_point(CONV), f"{CONV}: 1 of 1 zero points differ"),
    "the input's zero point": (zero_point("image_codes"), "zero points differ"),
    "even ratio in a sum": (even_ratio, "stage2_block1_conv2: 1 of 1 scales differ"),
    "axis of its channels": (axis, "axis of its channels is not the plan's"),
    "version too low": (
        lambda e: e.code_of(CONV, "CONV_2D", 2),
        "operator CONV_2D of version 2 is not allowed",
    ),
    "version unknown": (
        lambda e: e.code_of(CONV, "CONV_2D", 99),
        "operator CONV_2D of version 99 is not allowed",
    ),
    "version of another type": (
        lambda e: e.code_of(CONV, "CONV_2D", 7),
        f"operator of {CONV}: version 7, planned version 3",
    ),
    "activation dropped": (
        lambda e: e.option(CONV, "fusedActivationFunction", 0),
        f"operator of {CONV}: options",
    ),
    "activation changed": (
        lambda e: e.option(CONV, "fusedActivationFunction", RELU6),
        f"operator of {CONV}: options",
    ),
    "activation added": (
        lambda e: e.option("stage1_block1_conv2", "fusedActivationFunction", RELU),
        "operator of stage1_block1_conv2: options",
    ),
    "stride": (
        lambda e: e.option(CONV, "strideW", 2),
        f"operator of {CONV}: options",
    ),
    "padding": (
        lambda e: e.option(CONV, "padding", schema.Padding.VALID),
        f"operator of {CONV}: options",
    ),
    "dilation": (
        lambda e: e.option(CONV, "dilationHFactor", 2),
        f"operator of {CONV}: options",
    ),
    "operator replaced": (sum_as_difference, "operator SUB of version 2"),
    "operators swapped": (swap_operators, "operator of stage2_block1_conv2"),
    "input rewired": (
        rewire("stage1_block1_conv2", 0, "stem"),
        "operator of stage1_block1_conv2: inputs ['stem'",
    ),
    "weights rewired": (
        rewire("stage1_block1_conv2", 1, f"{CONV}/weights"),
        "operator of stage1_block1_conv2: inputs",
    ),
    "terms swapped": (swap_inputs, "operator of stage2_block1_add: inputs"),
    "tensor renamed": (rename, "tensor stem of the plan is missing"),
    "weights' type": (weights_as_uint8, "stem/weights: shape or type"),
    "bias' type": (bias_as_float, "stem/bias: shape or type"),
    "fixed batch": (fixed_batch, "image: shape or type"),
    "operator added": (needless_reshape, "operators, the plan"),
    "output replaced": (earlier_output, "inputs and outputs are"),
}


@pytest.mark.quick(12)
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_without_data(snapped, file, name):
    change, message = DAMAGE[name]
    report = verify(edited(file, change), snapped)
    assert not report.ok
    assert any(message in failure for failure in report.failures), report.failures


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_not_run(snapped, file, name, monkeypatch):
    def run(*arguments):
        raise AssertionError("the file was run")

    monkeypatch.setattr(proof, "compare_on_data", run)
    monkeypatch.setattr(proof, "Runner", run)
    monkeypatch.setattr(arithmetic, "Runner", run)
    change, _ = DAMAGE[name]
    report = verify(edited(file, change), snapped, [(IMAGES, LABELS)])
    assert "the file was not run, because it differs from the plan" in report.failures
    assert report.comparisons == []


def outside(offset, size):
    def change(edit):
        buffer = edit.model.buffers[edit.tensor("stem/weights").buffer]
        buffer.data, buffer.offset, buffer.size = None, offset, size

    return change


def test_constants_outside_of_the_flatbuffer_are_refused(snapped, file):
    edit = Edit(file)
    outside(len(file), 36)(edit)
    # `flatbuffer.pack` writes what `to_tflite` writes; the schema's class all fields.
    builder = flatbuffers.Builder(1 << 16)
    edit.model.buffers = [
        schema.BufferT(b.data, b.offset, b.size) for b in edit.model.buffers
    ]
    builder.Finish(edit.model.Pack(builder), file_identifier=flatbuffer.IDENTIFIER)
    content = bytes(builder.Output())
    with pytest.raises(ValueError, match="outside of the flatbuffer"):
        verify(content + bytes(36), snapped)


@pytest.mark.parametrize("more", [b"\0", bytes(16), b"weights"])
def test_bytes_behind_the_flatbuffer(snapped, file, more):
    report = verify(file + more, snapped)
    assert any("not laid out" in failure for failure in report.failures)


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", ["batches", "tensor_batches"])
@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1"])
def test_counts_of_batches(snapped, file, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .* Received: {name}="):
        verify(file, snapped, [IMAGES], **{name: value})


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", ["tolerance", "agreement"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, None, "0.1"])
def test_shares(snapped, file, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .* Received: {name}="):
        verify(file, snapped, [IMAGES], **{name: value})


def test_a_moved_bias_is_a_wrong_decision(snapped, file):
    """No input of the data needs to show it."""

    def change(edit):
        edit.constant(f"{CONV}/bias", np.int32, 0, 42 * 3)

    report = verify(edited(file, change), snapped)
    rows = {row.layer: row for row in report.decisions}
    assert rows[CONV].wrong[0] > 0
    assert sum(rows[CONV].wrong) == rows[CONV].wrong[0]
    assert any("accumulators are off by one" in f for f in report.failures)


def nibble(edit):
    """The low half of a byte of two codes, by one."""
    edit.constant(f"{CONV}/weights", np.uint8, 3, 1)


def test_int4_damage_is_found(made):
    snapped, file = made["int4"]
    assert Edit(file).tensor(f"{CONV}/weights").type == schema.TensorType.INT4
    before = np.array(Edit(file).model.buffers[
        Edit(file).tensor(f"{CONV}/weights").buffer].data)  # fmt: skip
    assert before[3] & 0xF != 0xF  # So that the other half stays.
    report = verify(edited(file, nibble), snapped)
    assert f"{CONV}/weights: 1 of 144 codes differ from the plan" in report.failures


@pytest.mark.quick(2)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["a bias", "a weight scale", "even ratio in a sum"])
def test_damage_is_found_in_every_kind_of_file(made, choice, name):
    snapped, file = made[choice]
    change, message = DAMAGE[name]
    report = verify(edited(file, change), snapped)
    assert any(message in failure for failure in report.failures), report.failures


def test_the_file_of_another_seed(file, snapped):
    other = export.snap(network(seed=1), [IMAGES])
    report = verify(file, other, [IMAGES])
    assert any("codes differ from the plan" in f for f in report.failures)
    report = verify(writer.to_bytes(other), snapped)
    assert not report.ok


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_sums_of_an_even_ratio_are_wrong(snapped, kernel):
    """What promise 4 is about: all 256 x 256 pairs, by the real kernel."""
    layer = next(x for x in snapped.twin.layers if isinstance(x, twin.IntegerAdd))
    first, second = (float(r * layer.grid.step) for r in layer.ratios)
    ends = [(first, 0), (second, 0), (layer.grid.scale, layer.grid.zero_point)]
    assert arithmetic.wrong_sums(layer, ends, 0, kernel) == 0
    ends[0] = (layer.grid.scale / 2, 0)
    assert arithmetic.wrong_sums(layer, ends, 0, kernel) > 1000


# What a comparison of tensors and operators by name does not see.
def signature_output(edit):
    edit.model.signatureDefs[0].outputs[0].tensorIndex = edit.index("final_relu")


def signature_key(edit):
    edit.model.signatureDefs[0].signatureKey = b"other"


def no_signature(edit):
    edit.model.signatureDefs = None


def sparse(edit):
    edit.tensor("stem/weights").sparsity = schema.SparsityParametersT(
        traversalOrder=[0, 1, 2, 3], blockMap=[], dimMetadata=[]
    )


def variable(edit):
    edit.tensor("stem").isVariable = True


def reduced_precision(edit):
    """Runtimes read it: floats may then be computed in half precision."""
    edit.model.metadata.append(
        schema.MetadataT("reduced_precision_support", len(edit.model.buffers))
    )
    edit.model.buffers.append(schema.BufferT(np.frombuffer(b"fp16accfp32", np.uint8)))


def custom_options(edit):
    edit.operator("stem").customOptions = [1, 2, 3]


def shadow(edit):
    """Damaged weights in front of good ones of the same name."""
    tensor = edit.tensor("stem/weights")
    edit.graph.tensors.append(copy.copy(tensor))
    edit.constant("stem/weights", np.int8, 0, -3)


UNNAMED = (
    signature_output,
    signature_key,
    no_signature,
    sparse,
    variable,
    reduced_precision,
    custom_options,
    shadow,
)


@pytest.mark.quick(3)
@pytest.mark.parametrize("change", UNNAMED, ids=lambda f: f.__name__)
def test_damage_of_what_is_seldom_read(snapped, file, change):
    assert not verify(edited(file, change), snapped).ok


# --- metadata -------------------------------------------------------------------------


def with_metadata(content, change):
    """The file with other metadata: `change` of the table, or bytes."""
    edit = Edit(content)
    (entry,) = edit.model.metadata
    buffer = edit.model.buffers[entry.buffer]
    if callable(change):
        table = json.loads(bytes(buffer.data))
        change(table)
        change = json.dumps(table).encode()
    buffer.data = np.frombuffer(change, np.uint8)
    return edit.bytes()


def drop(name):
    return lambda table: table.pop(name)


def put(**entries):
    return lambda table: table.update(entries)


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        drop("options"),
        drop("ranges"),
        put(options=None),
        put(options={"target": "gpu"}),
        put(options={"unknown": 1}),
        put(options={"input_type": "float16"}),
        put(options={"output_type": "int4"}),
        put(ranges=3),
    ],
)
def test_metadata_that_make_no_plan(snapped, file, change):
    with pytest.raises(ValueError, match="Received"):
        verify(with_metadata(file, change), snapped)


def test_missing_metadata(snapped, file):
    edit = Edit(file)
    edit.model.metadata = None
    with pytest.raises(ValueError, match="to_tflite"):
        verify(edit.bytes(), snapped)


def test_changed_options_make_another_plan(trained, made):
    _, file = made["int4"]
    damaged = with_metadata(file, lambda t: t["options"].update(storage="int8"))
    report = verify(damaged, trained)
    assert any("shape or type" in failure for failure in report.failures)


def test_changed_ranges_make_another_plan(trained, file):
    def widen(table):
        low, high = table["ranges"]["stage1_block1_add"]
        table["ranges"]["stage1_block1_add"] = [2 * low, 2 * high]

    report = verify(with_metadata(file, widen), trained)
    assert any("scales differ" in failure for failure in report.failures)


@pytest.mark.parametrize(
    "change",
    [put(ranges={}), put(ranges={"stem": [0, 1]})],
    ids=["none", "another tensor's"],
)
def test_ranges_that_are_missing(trained, file, change):
    with pytest.raises(ValueError, match=r"must be of this model.*without a range for"):
        verify(with_metadata(file, change), trained)


def test_changed_options_are_not_those_of_the_snapped(snapped, file):
    damaged = with_metadata(file, lambda t: t["options"].update(target="portable"))
    assert not verify(damaged, snapped).ok


@pytest.mark.slow
def test_changed_ends_make_another_plan(trained, snapped, file):
    change = put(options=OTHER_ENDS)
    report = verify(with_metadata(file, change), snapped)
    assert not report.ok
    report = verify(with_metadata(file, change), trained)
    assert any("shape or type" in failure for failure in report.failures)


def test_notes_and_description_do_not_matter(snapped, file):
    edit = Edit(with_metadata(file, put(notes=["none"])))
    edit.model.description = "something else"
    assert verify(edit.bytes(), snapped, [IMAGES]).ok


# --- files that are torn --------------------------------------------------------------


@pytest.mark.quick(3)
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_truncated_file(snapped, file, fraction):
    with pytest.raises(ValueError, match="complete"):
        verify(file[: int(fraction * len(file))], snapped)


@pytest.mark.quick(3)
@pytest.mark.parametrize("missing", [1, 2, 3, 4, 7, 8, 12, 16, 20, 32, 64])
def test_a_file_without_its_last_bytes(snapped, file, missing):
    try:
        report = verify(file[:-missing], snapped)
    except ValueError:
        return
    assert not report.ok


@pytest.mark.quick(3)
@pytest.mark.parametrize("content", [b"", b"TFL3", b"1234TFL3", bytes(1000)])
def test_what_is_no_file(snapped, content):
    with pytest.raises(ValueError, match="complete"):
        verify(content, snapped)


def test_a_file_of_another_maker(snapped):
    model = keras.Sequential([keras.layers.Dense(2, input_shape=(3,))])
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    with pytest.raises(ValueError, match=r"to_tflite.*another program wrote"):
        verify(converter.convert(), snapped)


def test_a_file_that_is_not_there(snapped, tmp_path):
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "none.tflite", snapped)


def break_tensor(field, value, name="stem"):
    return lambda edit: setattr(edit.tensor(name), field, value)


def break_operator(field, value):
    return lambda edit: setattr(edit.operator("stem"), field, value)


def break_graph(field, value):
    return lambda edit: setattr(edit.graph, field, value)


def several_graphs(edit):
    edit.model.subgraphs = edit.model.subgraphs * 2


def no_graph(edit):
    edit.model.subgraphs = []


def short(name, dtype):
    def change(edit):
        buffer = len(edit.model.buffers)
        edit.model.buffers.append(schema.BufferT(np.ones(2, dtype).view(np.uint8)))
        edit.tensor(name).buffer = buffer

    return change


INCONSISTENT = {
    "weights of a type that is not used": break_tensor("type", 4, "stem/weights"),
    "bias of a type that is not used": break_tensor("type", 1, "stem/bias"),
    "weights too short": short("stem/weights", np.int8),
    "bias too short": short("stem/bias", np.int32),
    "bias of another shape": break_tensor("shape", [2, 2], "stem/bias"),
    "weights of a negative shape": break_tensor(
        "shape", [-4, -3, 3, 1], "stem/weights"
    ),
    "no name": break_tensor("name", None),
    "name in no encoding": break_tensor("name", b"\xff\xfe"),
    "buffer out of range": break_tensor("buffer", 999, "stem/weights"),
    "input out of range": break_operator("inputs", [1, 2, 999]),
    "no inputs": break_operator("inputs", []),
    "output out of range": break_operator("outputs", [999]),
    "operator code out of range": break_operator("opcodeIndex", 99),
    "no operators": break_graph("operators", None),
    "no tensors": break_graph("tensors", None),
    "graph's input out of range": break_graph("inputs", [999]),
    "several graphs": several_graphs,
    "no graph": no_graph,
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", INCONSISTENT)
def test_a_file_that_contradicts_itself(snapped, file, name):
    content = edited(file, INCONSISTENT[name])
    try:
        failures = verify(content, snapped).failures
    except ValueError as error:
        failures = [text for text in [str(error)] if "Received" in text]
    assert failures


# Kernels check their arguments by ending the process, so this runs in another one.
def scales_of(name, value):
    return lambda edit: edit.scale(name, slice(None), lambda _: value)


DEADLY = {
    f"{name}: scale {value}": scales_of(name, value)
    for value in (0.0, -1.0, float("inf"), float("nan"))
    for name in ("stem", "image_codes", "stage1_block1_add", "stem/weights")
}


DEADLY["zero point"] = lambda edit: setattr(
    edit.tensor("stem").quantization, "zeroPoint", [2**40]
)
DEADLY["axis of its channels"] = lambda edit: setattr(
    edit.tensor("stem/weights").quantization, "quantizedDimension", 2**30
)
DEADLY["stride"] = lambda edit: edit.option("stem", "strideW", 0)


def _survives(group):
    """Runs `deadly` or `flips` in a process; what it printed for each."""
    code = f"from tests.export.proof import test_verify; test_verify.try_{group}()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("> ")]
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-1000:])
    return dict(line[2:].rsplit(" = ", 1) for line in lines)


def _attempt(name, content, snapped):
    print(f"> {name} = ", end="", flush=True)
    try:
        result = "ok" if verify(content, snapped).ok else "found"
    except ValueError:
        result = "refused"
    except Exception as error:
        result = type(error).__name__
    print(result, flush=True)


def try_deadly():
    keras.utils.set_random_seed(1234)
    snapped = snap()
    file = writer.to_bytes(snapped)
    for name, change in DEADLY.items():
        _attempt(name, edited(file, change), snapped)


def try_flips():
    keras.utils.set_random_seed(1234)
    snapped = snap()
    file = writer.to_bytes(snapped)
    rng = np.random.default_rng(0)
    for position in np.sort(rng.integers(len(file), size=60)):
        content = bytearray(file)
        content[position] ^= 1 << int(rng.integers(8))
        _attempt(f"{position}", bytes(content), snapped)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["stem", "stem/weights", "stem/bias"])
def test_a_tensor_of_another_name_is_reported(file, snapped, name):
    def rename(edit):
        edit.tensor(name).name = b"other"

    report = verify(edited(file, rename), snapped)
    assert not report.ok
    assert f"tensor {name} of the plan is missing" in report.failures
    assert "tensor other is not in the plan" in report.failures
    # The other layers are proved all the same.
    proved = {entry.layer for entry in report.decisions}
    assert "stem" not in proved
    assert proved == {entry.layer for entry in verify(file, snapped).decisions} - {
        "stem"
    }


@pytest.mark.slow
def test_scales_that_end_a_process():
    results = _survives("deadly")
    assert results.keys() == DEADLY.keys()
    assert set(results.values()) <= {"found", "refused"}


@pytest.mark.slow
def test_flipped_bits():
    results = _survives("flips")
    assert len(results) > 50
    # Some bits say nothing: padding, the description, notes.
    assert set(results.values()) <= {"found", "refused", "ok"}
    found = sum(result != "ok" for result in results.values())
    assert found > 0.7 * len(results)


# --- what is reported -----------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_file_keeps_its_promises(made, choice):
    snapped, file = made[choice]
    report = verify(file, snapped, [(IMAGES, LABELS)])
    assert report.ok, report.failures
    assert report.mismatches == report.end_to_end == 0
    assert report.codes > 10_000
    assert report.size == len(file)
    found = {d.kernel for d in report.decisions}
    expected = {
        "xnnpack": {"xnnpack"},
        "portable": {"xnnpack", "builtin"},
        "int4": {"xnnpack", "builtin"},
    }
    assert found == expected[choice]


@pytest.mark.slow
def test_counts_of_a_network_by_hand(tmp_path):
    """A dense net of 3-2-2: every number of the report can be counted."""
    net = keras.Sequential(
        [
            keras.layers.Dense(2, activation="relu", name="first", input_shape=(3,)),
            keras.layers.Dense(2, activation="relu", name="second"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    quantized = tfl.quantize(net, tfl.PrecisionRule(".*", 2, 2))
    x = np.random.default_rng(0).uniform(size=(5, 3)).astype(np.float32)
    made = export.to_tflite(quantized, tmp_path / "net.tflite", [x], verbose=0)
    report = export.verify(made.path, made, [x], verbose=0)
    assert report.ok, report.failures
    assert report.operators == {
        "QUANTIZE": 1,
        "FULLY_CONNECTED": 3,
        "DEQUANTIZE": 1,
    } | ({"MUL": 1} if "MUL" in report.operators else {})
    assert [d.layer for d in report.decisions] == ["first", "second"]
    assert [d.channels for d in report.decisions] == [2, 2]
    # Codes 0..3: at most three decision points a channel.
    assert 0 < report.decisions[0].points <= 2 * 3
    assert report.additions == {}
    rows = {c.tensor: (c.is_integer, c.elements) for c in report.comparisons}
    assert rows["first"] == rows["second"] == (True, 5 * 2)
    assert rows["head"] == (False, 5 * 2)
    # Codes: those of the input and of both layers.
    assert report.codes == 5 * 3 + 5 * 2 + 5 * 2
    assert report.predictions.examples == 5
    assert report.predictions.labels == 0
    assert report.predictions.right == {}
    assert report.predictions.trained_agrees is None
    assert report.size == made.size == made.path.stat().st_size
    assert report.gzip_size == made.gzip_size
    assert report.file == str(made.path)


def test_a_report_is_json(snapped, file):
    report = verify(file, snapped, [(IMAGES, LABELS)])
    table = json.loads(json.dumps(report.as_dict()))
    assert table["ok"] is True
    assert table["predictions"]["examples"] == 12
    assert table["operators"]["ADD"] == 4
    assert len(table["additions"]) == 3
    for entry in table["decisions"]:
        assert entry["wrong"] >= entry["wrong_channels"] >= 0


@pytest.mark.slow
def test_a_report_in_words(snapped, file, capsys):
    report = export.verify(file, snapped, [(IMAGES, LABELS)], verbose=1)
    text = capsys.readouterr().out
    assert "The file is proved equal to its integer model (twin)." in text
    # It has notes, and no trained model was given.
    assert "agrees exactly" not in text
    assert "Agreement with the trained model was not measured." in text
    assert f"{len(file):,} bytes" in text
    assert "12 of 12 are the twin's" in text
    assert "note: image: is quantized to 8 bits" in text
    assert "FAILED" not in text
    # In a notebook, the same.
    page = re.sub(r"<[^>]*>", "", report._repr_html_())
    assert html.unescape(page).split() == text.split()
    verify(file, snapped)
    assert capsys.readouterr().out == ""


def test_a_failure_in_words(snapped, file):
    text = str(verify(edited(file, DAMAGE["a bias"][0]), snapped))
    assert f"FAILED: {CONV}/bias: 1 of 4 biases differ from the plan" in text
    assert "Not proved." in text
    assert "agrees exactly" not in text


def test_a_path_with_brackets(snapped, file, tmp_path):
    path = tmp_path / "net[w2a2].tflite"
    path.write_bytes(file)
    assert "[w2a2]" in str(verify(path, snapped))


def test_a_report_on_bytes_does_not_print_them(snapped, file):
    assert verify(bytearray(file), snapped).file == "bytes"


# --- predictions ----------------------------------------------------------------------


def right(network, images=IMAGES, labels=LABELS):
    return int((network(images, training=False).numpy().argmax(-1) == labels).sum())


def test_accuracy_by_hand(trained, snapped, file):
    predictions = verify(file, snapped, [(IMAGES, LABELS)], trained=trained).predictions
    chosen = trained(IMAGES, training=False).numpy().argmax(-1)
    twin_chosen = snapped.twin(IMAGES, training=False).numpy().argmax(-1)
    assert predictions.examples == predictions.labels == 12
    assert predictions.twin_agrees == 12
    assert predictions.trained_agrees == (chosen == twin_chosen).sum()
    assert predictions.right == {
        "file": right(snapped.twin),
        "twin": right(snapped.twin),
        "trained": right(trained),
    }


@pytest.mark.slow
def test_batches_of_inputs_alone(snapped, file):
    predictions = verify(file, snapped, [(IMAGES,)]).predictions
    assert predictions.examples == 12
    assert predictions.labels == 0
    predictions = verify(file, snapped, [(IMAGES, LABELS, LABELS)]).predictions
    assert predictions.labels == 12


@pytest.mark.slow
def test_labels_that_are_all_right(snapped, file):
    labels = snapped.twin(IMAGES, training=False).numpy().argmax(-1)
    predictions = verify(file, snapped, [(IMAGES, labels)]).predictions
    assert predictions.right == {"file": 12, "twin": 12}
    predictions = verify(file, snapped, [(IMAGES, (labels + 1) % 10)]).predictions
    assert predictions.right == {"file": 0, "twin": 0}


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "labels",
    [LABELS[:, None], np.eye(10)[LABELS], LABELS.astype(np.float32), list(LABELS)],
    ids=["column", "one-hot", "float", "list"],
)
def test_forms_of_labels(snapped, file, labels):
    predictions = verify(file, snapped, [(IMAGES, labels)]).predictions
    assert predictions.labels == 12
    assert predictions.right["file"] == right(snapped.twin)


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES, None)], ids=["x", "(x, None)"])
def test_missing_labels(snapped, file, batch):
    predictions = verify(file, snapped, [batch]).predictions
    assert (predictions.examples, predictions.labels, predictions.right) == (12, 0, {})
    assert predictions.twin_agrees == 12


def test_labels_of_another_length(snapped, file):
    with pytest.raises(ValueError, match="label"):
        verify(file, snapped, [(IMAGES, LABELS[:-1])])


@pytest.mark.slow
def test_floats_that_are_not_numbers_are_no_agreement(trained):
    snapped = export.snap(trained, [IMAGES])
    head = snapped.twin.get_layer("head")
    kernel, bias = head.get_weights()
    head.set_weights([kernel, np.full_like(bias, np.nan)])
    report = verify(writer.to_bytes(snapped), snapped, [IMAGES])
    assert any("head: floats differ by nan" in f for f in report.failures)


# --- data -----------------------------------------------------------------------------


def batches():
    return [(IMAGES[i : i + 5], LABELS[i : i + 5]) for i in (0, 5, 10)]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "data",
    [
        batches,
        lambda: iter(batches()),
        lambda: (batch for batch in batches()),
        lambda: tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(5),
    ],
    ids=["list", "iterator", "generator", "dataset"],
)
def test_forms_of_data(snapped, file, data):
    whole = verify(file, snapped, [(IMAGES, LABELS)])
    report = verify(file, snapped, data())
    assert report.ok, report.failures
    assert report.predictions == whole.predictions
    assert report.codes == whole.codes
    # The last batch is smaller; two batches of three.
    assert verify(file, snapped, data(), batches=2).predictions.examples == 10


@pytest.mark.slow
def test_tensors_of_some_batches_only(snapped, file):
    every = verify(file, snapped, batches())
    some = verify(file, snapped, batches(), tensor_batches=1)
    assert some.codes * 12 == every.codes * 5
    assert some.predictions == every.predictions


@pytest.mark.parametrize("data", [[], iter(())], ids=["list", "iterator"])
def test_no_data(snapped, file, data):
    with pytest.raises(ValueError, match="at least one batch"):
        verify(file, snapped, data)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite(snapped, file, value):
    images = IMAGES.copy()
    images[3, 2, 1] = value
    with pytest.raises(ValueError, match="finite"):
        verify(file, snapped, [images])


def test_without_data_nothing_is_said_of_predictions(snapped, file):
    report = verify(file, snapped)
    assert report.ok
    assert report.predictions is None
    assert report.comparisons == []
    assert report.codes == 0
    assert report.decisions


# --- models ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_trained_model(trained, file):
    report = verify(file, trained, [(IMAGES, LABELS)])
    assert report.ok, report.failures
    assert report.predictions.right["trained"] == right(trained)


@pytest.mark.slow
def test_an_export(trained, snapped, tmp_path):
    made = export.to_tflite(snapped, tmp_path / "net.tflite", verbose=0)
    for model in (made, snapped):
        report = verify(made.path, model, [IMAGES], trained=trained)
        assert report.ok
        assert report.predictions.trained_agrees is not None
    assert verify(str(made.path), made).file == str(made.path)
    assert verify(made.path.read_bytes(), made).file == "bytes"


@pytest.mark.slow
def test_a_trainer_of_one_student(trained, file):
    trainer = tfl.LowBitTrainer(trained)
    report = verify(file, trainer, [(IMAGES, LABELS)])
    assert report.ok, report.failures
    assert report.predictions.right["trained"] == right(trained)


def test_a_model_that_is_not_quantized(file):
    net = models.preact_resnet(8, width=4, input_shape=SHAPE)
    with pytest.raises(ValueError, match="quantize"):
        verify(file, net)


def test_trained_beside_the_trained_model(trained, file):
    with pytest.raises(ValueError, match="trained"):
        verify(file, trained, trained=trained)


@pytest.mark.quick(1)
@pytest.mark.parametrize("input_type", ["int8", "uint8"])
def test_inputs_of_codes(trained, input_type):
    options = Options(input_type=input_type)
    snapped = export.snap(trained, [IMAGES], options=options)
    content = writer.to_bytes(snapped)
    report = verify(content, snapped, [(IMAGES, LABELS)])
    assert report.ok, report.failures
    assert report.not_delegated in ([], ["QUANTIZE"])
