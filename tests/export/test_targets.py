"""The table of targets: what each row says is what files and documents hold."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import EDGE, Rule, conv_bn_relu, images, network, quantize
from tf_lowbit import export
from tf_lowbit.export import targets
from tf_lowbit.export.options import Options
from tf_lowbit.export.targets import TARGETS
from tf_lowbit.export.tflite import flatbuffer
from tf_lowbit.export.tflite.operators import FLOAT_VERSIONS, INTEGER_VERSIONS

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "deployment.md"
MINE = dataclasses.replace(TARGETS["tflm"], name="mine", weight_bits=(2, 8))

# Of https://coral.ai/docs/edgetpu/models-intro/#supported-operations. The names to
# ResizeBilinear were read in Axis's copy for ARTPEC-7, which sorts them; the others in
# an older copy, and Transpose and TransposeConv in google-coral/edgetpu, issues 193
# and 684.
CORAL = """
    Add AveragePool2d Concatenation Conv2d DepthwiseConv2d ExpandDims FullyConnected
    L2Normalization Logistic LSTM Maximum MaxPool2d Mean Minimum Mul Pack Pad PReLU
    Quantize ReduceMax ReduceMin ReLU ReLU6 ReLUN1To1 Reshape ResizeBilinear
    ResizeNearestNeighbor Slice Softmax SpaceToDepth Split Squeeze StridedSlice Sub Tanh
    Transpose TransposeConv
""".lower().split()


@pytest.fixture(scope="module")
def model():
    body = network(lambda x: conv_bn_relu(x, 4, name="inner"))
    return quantize(body, [EDGE, Rule(".*", 2, 2)])


# --- the rows -------------------------------------------------------------------------


def test_names_are_keys():
    assert {name: target.name for name, target in TARGETS.items()} == {
        name: name for name in ("xnnpack", "portable", "int8", "tflm", "qonnx")
    }


@pytest.mark.parametrize("name", TARGETS)
def test_operators_are_some_that_files_are_written_with(name):
    operators = TARGETS[name].operators
    if operators is not None:
        assert len(set(operators)) == len(operators)
        assert {*operators} <= {*INTEGER_VERSIONS, *FLOAT_VERSIONS}


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "qonnx"])
def test_defaults_are_the_first_that_is_allowed(name):
    target, options = TARGETS[name], Options(target=name)
    for choice in targets.CHOICES:
        assert getattr(options, choice) == getattr(target, choice)[0]
        for value in getattr(target, choice):
            Options(target=name, **{choice: value})


def test_a_target_of_qonnx_has_a_function_of_its_own(model, tmp_path):
    with pytest.raises(ValueError) as refused:
        export.to_tflite(model, tmp_path / "n", target="qonnx")
    assert str(refused.value) == (
        "target must be one of TFLite files: tf_lowbit.export.to_qonnx writes those of "
        "QONNX. Received: target='qonnx'"
    )
    assert export.check(model, target="qonnx").ok


def test_codes_as_output_want_an_int8_head():
    assert Options(output_type="int8").head == "int8"
    assert Options(output_type="int8", head="float").head == "float"
    only_float = dataclasses.replace(TARGETS["xnnpack"], name="m", head=("float",))
    assert Options(target=only_float, output_type="int8").head == "float"


def test_what_a_target_does_not_allow_is_refused_with_those_that_do():
    with pytest.raises(ValueError) as refused:
        Options(target="int8", storage="packed")
    assert str(refused.value) == (
        "With target='int8', storage must be 'int8'; storage='packed' needs "
        "target='tflm'. Received: storage='packed'"
    )


# --- a user's own ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": 3}, "name must"),
        ({"kernels": ()}, "kernels must be a tuple of one or more of"),
        ({"kernels": ("neon",)}, r"kernels must .*Received: kernels=\('neon',\)"),
        ({"storage": ["int8"]}, "storage must be a tuple"),
        ({"weight_bits": (9,)}, "weight_bits must"),
        ({"activation_bits": ([],)}, "activation_bits must"),
        ({"operators": "ADD"}, "operators must be a tuple"),
        ({"operators": (1,)}, "operators must be a tuple"),
        ({"interpreter": "onnx"}, "interpreter must be one of"),
        (
            {"interpreter": "tflite"},
            "'packed' needs interpreter='tflite_micro'",
        ),
        ({"floats": 1}, "floats must"),
        ({"open_sizes": None}, "open_sizes must"),
    ],
    ids=str,
)
def test_a_target_that_there_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(MINE, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernels": ("xnnpack",)}, r"kernels must be \(\) with interpreter='qonnx'"),
        ({"storage": ("int8",)}, "storage must"),
        ({"head": ("int8",)}, "head must"),
        ({"output_type": (None,)}, "output_type must"),
        ({"operators": ("ADD",)}, "operators must be None"),
        ({"open_sizes": True}, "open_sizes must be False"),
        ({"floats": False}, "floats must be True"),
        ({"weight_bits": ()}, "weight_bits must be a tuple"),
        ({"activation_bits": (9,)}, "activation_bits must be a tuple"),
        ({"interpreter": "tflite"}, "kernels must be a tuple of one or more"),
    ],
    ids=str,
)
def test_a_target_of_qonnx_has_nothing_of_tflites(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TARGETS["qonnx"], **changes)


def test_rows_are_kept_by_name_and_others_whole():
    assert targets.described(TARGETS["tflm"]) == "tflm"
    kept = json.loads(json.dumps(targets.described(MINE)))
    assert kept["weight_bits"] == [2, 8]
    assert targets.find(kept) == MINE
    # A row's name does not make it that row.
    impostor = dataclasses.replace(MINE, name="tflm")
    assert targets.find(targets.described(impostor)) == impostor


@pytest.mark.parametrize("target", [None, "gpu", 3, {"name": "mine"}, {"nope": 1}])
def test_what_is_no_target(target):
    with pytest.raises(ValueError, match=r"target must .*Received"):
        targets.find(target)


def test_a_file_for_a_users_own_target_says_how_it_is_proved(model, tmp_path):
    path = tmp_path / "net.tflite"
    made = export.to_tflite(
        model, path, [images()], target=MINE, storage="packed", verbose=0
    )
    about = flatbuffer.read_metadata(path.read_bytes())
    assert Options(**about["options"]) == made.snapped.options
    assert export.verify(path, model, [images()], verbose=0).ok
    export.save_archive(made.snapped, tmp_path / "net.npz")
    archive = export.load_archive(tmp_path / "net.npz")
    assert targets.find(archive.options["target"]) == MINE


def test_bits_of_a_users_own_target_are_those_that_are_chosen(model):
    tensors = [
        t.name for t in tfl.inspection.quantized_tensors(model) if not t.is_residual
    ]
    losses = {2: 3.0, 4: 1.0, 8: 2.0}
    found = tfl.Sensitivity("accuracy", (2, 4, 8), dict.fromkeys(tensors, losses), 90.0)
    target = dataclasses.replace(MINE, activation_bits=(2, 8))
    own = dataclasses.replace(TARGETS["qonnx"], name="own", weight_bits=(2, 8))
    limits = {None: {4}, "tflm": {4}, "qonnx": {4}, target: {8}}
    for limit, bits in limits.items():
        rules = tfl.allocate_bits(model, found, bops=10**9, target=limit)
        assert {rule.weight_bits for rule in rules if rule.weight_bits} == bits
        read = {rule.activation_bits for rule in rules if rule.weight_bits}
        assert read == bits
    rules = tfl.allocate_bits(model, found, bops=10**9, target=own)
    assert {rule.weight_bits for rule in rules if rule.weight_bits} == {8}
    few = dataclasses.replace(target, activation_bits=(3,))
    with pytest.raises(ValueError, match=r"activation bits of target='mine': \(3,\)"):
        tfl.allocate_bits(model, found, bops=10**9, target=few)


# --- int8 -----------------------------------------------------------------------------


def test_int8_has_the_operators_of_int8_files_that_an_edge_tpu_has():
    on_list = {n for n in INTEGER_VERSIONS if n.replace("_", "").lower() in CORAL}
    assert {*TARGETS["int8"].operators} == on_list


@pytest.mark.slow
def test_an_int8_file_has_int8_operators_alone(model, tmp_path):
    path = tmp_path / "net.tflite"
    export.to_tflite(model, path, [images()], target="int8", verbose=0)
    file = flatbuffer.unpack(path.read_bytes())
    (graph,) = file.subgraphs
    types = {flatbuffer.DTYPES[tensor.type] for tensor in graph.tensors}
    assert types <= {np.dtype(np.int8), np.dtype(np.int32)}
    ends = [graph.tensors[i] for i in (*graph.inputs, *graph.outputs)]
    assert {flatbuffer.DTYPES[tensor.type] for tensor in ends} == {np.dtype(np.int8)}
    report = export.verify(path, model, [images()], verbose=0)
    assert report.ok
    assert {d.kernel for d in report.decisions} == {"xnnpack", "builtin"}


# --- the table ------------------------------------------------------------------------


def in_words(bits):
    assert bits == tuple(range(bits[0], bits[-1] + 1))
    return f"{bits[0]} to {bits[-1]}"


def listed(values):
    return (
        NOTHING
        if not values
        else ", ".join(
            "codes where an end has some" if v is None else v for v in values
        )
    )


def lacking(target):
    if target.interpreter == targets.QONNX:
        return NOTHING
    written = {*INTEGER_VERSIONS, *(FLOAT_VERSIONS if target.floats else ())}
    return ", ".join(sorted(n for n in written if not target.has(n))) or "none"


NOTHING = "—"  # Of a target without such an option.
CELLS = {
    "runs on": lambda target: target.runs_on,
    "weight bits": lambda target: in_words(target.weight_bits),
    "activation bits": lambda target: in_words(target.activation_bits),
    "`storage`": lambda target: listed(target.storage),
    "`first_layer`": lambda target: listed(target.first_layer),
    "`head`": lambda target: listed(target.head),
    "`input_type`": lambda target: listed(target.input_type),
    "`output_type`": lambda target: listed(target.output_type),
    "float layers": lambda target: "yes" if target.floats else "refused",
    "open sizes": lambda target: "yes" if target.open_sizes else "refused",
    "operators it lacks": lacking,
    "rounding": lambda target: target.rounding,
    "checked here": lambda target: target.checked,
}


def table() -> str:
    rows = [
        ["", *(f"`{name}`" for name in TARGETS)],
        ["---"] * (1 + len(TARGETS)),
        *([what, *map(cell, TARGETS.values())] for what, cell in CELLS.items()),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def test_the_table_of_the_docs_is_that_of_the_rows():
    """Where it fails, its own table belongs into the page."""
    assert table() in PAGE.read_text()


def test_the_docs_tell_the_rules_of_zero_points():
    rules = {target.zero_points for target in TARGETS.values()}
    assert len(rules) == 2
    for rule in rules:
        assert rule in " ".join(PAGE.read_text().split())
