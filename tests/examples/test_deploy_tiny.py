import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import tf_lowbit as tfl
from examples import micro_deployment
from tests.examples import programs
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.targets import TARGETS

SHAPE = (8, 8, 1)
PAIRS = {"W4A8": "w4a8", "W2A2": "w2a2"}
WRITTEN = [
    "int8.tflite",
    "model_data.cc",
    "model_data.h",
    "model_setup.h",
    "packed.tflite",
]
# Puts out the array, if it is aligned.
MAIN = """
#include <cstdint>
#include <cstdio>
#include "model_data.h"

int main() {
  if (reinterpret_cast<std::uintptr_t>(g_model_data) % 16) return 1;
  return std::fwrite(g_model_data, 1, g_model_data_size, stdout) != g_model_data_size;
}
"""
# Methods of MicroMutableOpResolver that add a built-in operator or DECODE, as TFLite
# Micro's sources name them: `python/tflite_micro/python_ops_resolver.cc` of
# tensorflow/tflite-micro at commit 85e19ddd calls all but AddDecode, which pull request
# 3132 added. AmbiqAI/helia-rt at 1b6f554e, a later copy, declares it in
# `tensorflow/lite/micro/micro_mutable_op_resolver.h`.
METHODS = """
    AddAbs AddAdd AddAddN AddArgMax AddArgMin AddAveragePool2D AddBatchMatMul
    AddBatchToSpaceNd AddBroadcastTo AddCast AddCeil AddConcatenation AddConv2D AddCos
    AddCumSum AddDecode AddDepthToSpace AddDepthwiseConv2D AddDequantize AddDiv AddElu
    AddEqual AddExp AddExpandDims AddFill AddFloor AddFloorDiv AddFloorMod
    AddFullyConnected AddGather AddGatherNd AddGreater AddGreaterEqual AddHardSwish
    AddL2Normalization AddL2Pool2D AddLeakyRelu AddLess AddLessEqual AddLog
    AddLogSoftmax AddLogicalAnd AddLogicalNot AddLogicalOr AddLogistic AddMaxPool2D
    AddMaximum AddMean AddMinimum AddMirrorPad AddMul AddNeg AddNotEqual AddPack AddPad
    AddPadV2 AddPrelu AddQuantize AddReduceMax AddRelu AddRelu6 AddReshape
    AddResizeBilinear AddResizeNearestNeighbor AddRound AddRsqrt AddSelectV2 AddShape
    AddSin AddSlice AddSoftmax AddSpaceToBatchNd AddSpaceToDepth AddSplit AddSplitV
    AddSqrt AddSquare AddSquaredDifference AddSqueeze AddStridedSlice AddSub AddSum
    AddSvdf AddTanh AddTranspose AddTransposeConv AddUnpack AddZerosLike
""".split()
# Declarations of what the firmware uses, under the names of TFLite Micro's headers.
HEADERS = {
    "micro/micro_mutable_op_resolver.h": """
#pragma once
#include <cstddef>
#include <cstdint>
enum TfLiteStatus { kTfLiteOk, kTfLiteError };
#define TF_LITE_ENSURE_STATUS(a) \\
  do { const TfLiteStatus s = (a); if (s != kTfLiteOk) return s; } while (0)
namespace tflite {
struct MicroOpResolver {};
template <unsigned int tOpCount> struct MicroMutableOpResolver : MicroOpResolver {
METHODS
};
}
""".replace("METHODS", "\n".join(f"  TfLiteStatus {name}();" for name in METHODS)),
    "micro/micro_interpreter.h": """
#pragma once
#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
union TfLitePtrUnion { std::int8_t* int8; };
struct TfLiteTensor { TfLitePtrUnion data; };
namespace tflite {
struct Model;
struct MicroInterpreter {
  MicroInterpreter(const Model*, const MicroOpResolver&, std::uint8_t*, std::size_t);
  TfLiteStatus AllocateTensors();
  TfLiteStatus Invoke();
  TfLiteTensor* input(std::size_t);
  TfLiteTensor* output(std::size_t);
};
}
""",
    "schema/schema_generated.h": """
#pragma once
namespace tflite { struct Model; const Model* GetModel(const void*); }
""",
}
# Runs a file in an arena of a size: too small a one may end the process.
IN_ARENA = """
import sys
from tflite_micro import runtime
interpreter = runtime.Interpreter.from_file(sys.argv[1], arena_size=int(sys.argv[2]))
interpreter.invoke()
"""
PAGE = programs.ROOT / "docs" / "how_to" / "microcontroller.md"
BAD = {
    "not a flag": (["net.h5"], r"^UsageError: .*no flags: \['net\.h5'\]"),
    "no model": (["--model=nope.h5"], r"^FileNotFoundError: .*nope\.h5"),
    "bits": (["--bits=8/8,2"], r"^ValueError: --bits must be pairs.*--bits='2'"),
    "too many bits": (["--bits=9/8"], r"^ValueError: .*bits.*9"),
    "no labels": (["--epochs=1"], r"^ValueError: --epochs needs labels.*--data=None"),
    "other images": (
        ["--data=six.npz"],
        r"^ValueError: The data must have .*\(8, 8, 1\)\. Received: 'six\.npz'.*6, 6",
    ),
    "other labels": (
        ["--data=shares.npz"],
        r"^ValueError: The labels 'y' must be one integer for each of 10 .*float64",
    ),
    "missing operator": (
        ["--model=gelu.h5"],
        r"^ExportError: target='tflm' supports only some operators.*'curved'.*GELU",
    ),
}


def network(activation="relu"):
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Conv2D(2, 3, activation="relu", input_shape=SHAPE, name="stem"),
            layers.Conv2D(64, 3, name="mid"),
            layers.Activation(activation, name="curved"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dense(3, activation="softmax", name="head"),
        ]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the program by name: exit code, error, output; and their folder."""
    folder = tmp_path_factory.mktemp("deploy")
    keras.utils.set_random_seed(0)
    network().save(folder / "net.h5")
    network("gelu").save(folder / "gelu.h5")
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 1, (40, *SHAPE)), rng.integers(0, 3, (40, 1))
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(folder / "six.npz", x=x[:, :6, :6])
    np.savez(folder / "shares.npz", x=x[:10], y=rng.uniform(0, 1, (10, 3)))
    cases = {
        "all": [
            *("--data=data.npz", "--bits=4/8,2/2", "--epochs=1", "--examples=5"),
            "--output_dir=out",
        ],
        "random": ["--bits=2/2", "--examples=2"],
        **{name: arguments for name, (arguments, _) in BAD.items()},
    }
    cases = {n: (folder, ["--model=net.h5", *flags]) for n, flags in cases.items()}
    found, _ = programs.run_each("deploy_tiny", cases)
    return found, folder


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(runs, name):
    code, error, _ = runs[0][name]
    assert code == 1
    assert re.search(BAD[name][1], error), error


def cells(shown):
    """The table's rows: name -> cells."""
    rows = [re.split("[│┃]", line)[1:-1] for line in shown.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if row}


def test_the_table_has_what_was_measured(runs):
    found, folder = runs
    code, error, shown = found["all"]
    assert (code, error) == (0, ""), shown
    assert "Calibration and training: 32 examples; test: the last 8." in shown
    table = cells(shown)
    result = json.loads((folder / "out" / "deployment.json").read_text())
    assert list(result["deployments"]) == sorted(PAIRS)
    assert result["settings"]["epochs"] == 1
    for position, name in enumerate(PAIRS, start=1):
        row = result["deployments"][name]
        for storage in ("int8", "packed"):
            flash = table[f"flash, {storage}, bytes"][position]
            arena = table[f"arena, {storage}, bytes"][position]
            assert flash == f"{row['bytes'][storage]:,}"
            assert arena == f"{row['arena'][storage]:,}"
        assert table["bit operations"][position] == f"{row['bops']:,}"
        assert row["verified"]
        assert row["equal"]
        assert row["codes"] > 0 == row["mismatches"]
        share = 100 * row["accuracy"]["file"]
        assert table["accuracy, file in TFLite Micro, %"][position] == f"{share:.2f}"
    float_bytes = result["float"]["bytes"]
    assert table["flash, int8, bytes"][0] == f"{float_bytes:,}"
    fewer, more = (result["deployments"][name]["bytes"] for name in ("W2A2", "W4A8"))
    assert fewer["packed"] < more["packed"]


@pytest.mark.parametrize("name", PAIRS)
def test_files_are_what_a_firmware_includes(runs, name):
    folder = runs[1] / "out" / PAIRS[name]
    assert sorted(path.name for path in folder.iterdir()) == WRITTEN
    packed = (folder / "packed.tflite").read_bytes()
    source = (folder / "model_data.cc").read_text()
    array = re.search(r"g_model_data\[\] = \{(.*?)\};", source, re.DOTALL).group(1)
    assert bytes(int(byte, 16) for byte in re.findall("0x(..),", array)) == packed
    assert f"g_model_data_size = {len(packed)};" in source
    setup = (folder / "model_setup.h").read_text()
    runner = tfl.export.MicroRunner(packed)
    assert f"kArenaSize = {runner.arena()};" in setup
    added = re.findall(r"resolver\.Add(\w+)\(\)", setup)
    assert f"MicroMutableOpResolver<{len(added)}>" in setup
    assert {"Conv2D", "Decode", "Dequantize", "FullyConnected", "Softmax"} <= {*added}
    result = json.loads((runs[1] / "out" / "deployment.json").read_text())
    operators = result["deployments"][name]["operators"]["packed"]
    assert [n.lower() for n in added] == [n.replace("_", "").lower() for n in operators]


def test_a_network_that_ends_in_an_argmax():
    image = keras.Input(SHAPE, name="image")
    x = keras.layers.Conv2D(4, 3, activation="relu", name="first")(image)
    x = keras.layers.Conv2D(4, 3, activation="relu", name="inner")(x)
    x = keras.layers.Dense(3, name="head")(keras.layers.Flatten()(x))
    model = keras.Model(image, tf.argmax(x, axis=-1))
    data = micro_deployment.random_data(SHAPE)
    deployment = micro_deployment.deploy(model, (2, 2), data, examples=4)
    assert deployment.report.ok
    assert deployment.equal
    assert deployment.agreement > 0.5
    setup = micro_deployment.source_files(deployment)["model_setup.h"]
    assert "resolver.AddArgMax()" in setup


def test_float_accuracy_counts_the_classes_of_an_argmax():
    image = keras.Input((3,), name="image")
    model = keras.Model(image, tf.argmax(image, axis=-1))
    rows = np.eye(3, dtype=np.float32)
    data = micro_deployment.Data(rows, rows, np.arange(3), np.array([0, 1, 0]))
    found = micro_deployment.float_accuracy(model, data, examples=3)
    assert found == pytest.approx(2 / 3)


def test_methods_of_the_resolver_are_tflite_micros():
    names = [*TARGETS["tflm"].operators, "DECODE"]
    assert {micro_deployment.add_method(name) for name in names} <= {*METHODS}


@pytest.mark.parametrize("name", PAIRS)
def test_the_file_runs_in_an_arena_of_the_size(runs, name):
    folder = runs[1] / "out" / PAIRS[name]
    setup = (folder / "model_setup.h").read_text()
    size = int(re.search(r"kArenaSize = (\d+);", setup).group(1))
    for share, is_enough in ((1.0, True), (0.5, False)):
        command = [sys.executable, "-c", IN_ARENA, folder / "packed.tflite"]
        child = subprocess.run([*command, str(int(share * size))], capture_output=True)
        assert (child.returncode == 0) == is_enough, child.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="wants a C++ compiler")
@pytest.mark.parametrize("name", PAIRS)
def test_the_firmware_of_the_page_compiles(runs, name, tmp_path):
    """Against declarations of the names that it uses."""
    folder = runs[1] / "out" / PAIRS[name]
    for header, text in HEADERS.items():
        path = tmp_path / "tensorflow" / "lite" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (firmware,) = re.findall(r"```cpp\n(.*?)```", PAGE.read_text(), re.DOTALL)
    count = (folder / "model_setup.h").read_text().count("resolver.Add")
    firmware, changed = re.subn(r"(OpResolver)<\d+>", rf"\1<{count}>", firmware)
    assert changed == 1
    (tmp_path / "main.cc").write_text(firmware)
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    command += [f"-I{folder}", f"-I{tmp_path}", tmp_path / "main.cc"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="wants a C++ compiler")
def test_the_array_compiles_and_is_the_file(runs, tmp_path):
    folder, program = runs[1] / "out" / "w2a2", tmp_path / "program"
    (tmp_path / "main.cc").write_text(MAIN)
    subprocess.run(
        [
            *("g++", "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror"),
            *(f"-I{folder}", tmp_path / "main.cc", folder / "model_data.cc"),
            *("-o", program),
        ],
        check=True,
    )
    found = subprocess.run([program], capture_output=True, check=True).stdout
    assert found == (folder / "packed.tflite").read_bytes()


def test_random_images_are_said_to_be_such(runs):
    code, error, shown = runs[0]["random"]
    assert (code, error) == (0, "")
    assert "Without --data the calibration uses random images" in shown
    assert cells(shown)["accuracy, file in TFLite Micro, %"] == ["-", "-"]
    assert "Written" not in shown


def test_the_last_fifth_is_for_the_test(tmp_path):
    x = np.arange(10, dtype=np.uint8).reshape(10, 1)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(10))
    data = micro_deployment.load_data(tmp_path / "data.npz", (1,))
    assert data.train.dtype == np.float32
    np.testing.assert_array_equal(data.train[:, 0], np.arange(8))
    np.testing.assert_array_equal(data.test[:, 0], [8, 9])
    np.testing.assert_array_equal(data.test_labels, [8, 9])
    assert not data.is_random


def test_no_data_set_is_too_small_for_a_test(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 1)))
    data = micro_deployment.load_data(tmp_path / "data.npz", (1,))
    assert len(data.train) == len(data.test) == 1
    assert data.train_labels is None


@pytest.mark.parametrize("bits", [(1, 2), (2, 8), (8, 8)])
def test_inner_layers_get_the_bits_and_edges_eight(bits):
    model = micro_deployment.quantized(network(), bits)
    found = {
        (tensor.layer.name, tensor.role): tensor.bits
        for tensor in tfl.inspection.quantized_tensors(model)
    }
    assert found["mid", "weight"] == bits[0]
    assert found["stem_relu", "activation"] == bits[1]
    assert found["stem", "weight"] == found["head", "weight"] == 8
