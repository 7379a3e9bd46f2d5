"""Running files: batches, kernels, runtimes, delegation."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export import networks
from tf_lowbit import export, models
from tf_lowbit.export.integer import kernels
from tf_lowbit.export.options import Options
from tf_lowbit.export.tflite import flatbuffer, writer
from tf_lowbit.export.tflite.flatbuffer import FileBuilder
from tf_lowbit.export.tflite.runner import Runner, runtime, with_all_outputs

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def snapped():
    net = networks.randomize(models.preact_resnet(8, width=4, input_shape=SHAPE))
    quantized = tfl.quantize(net, tfl.PrecisionRule(".*", 2, 2))
    options = Options(target="portable")
    return export.snap(quantized, [networks.images(shape=SHAPE)], options=options)


@pytest.fixture(scope="module")
def file(snapped):
    return writer.to_bytes(snapped)


def one_operator(name, dtype=np.float32):
    """A file whose only operator has one input and one output of the same shape."""
    builder = FileBuilder("one operator")
    shape = (None, 4)
    first = builder.activation("in", shape, dtype)
    last = builder.activation("out", shape, dtype)
    builder.operator(name, 1, [first], [last])
    return builder.finish({"in": first}, {"out": last}, b"{}", "main")


# --- batches --------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_batches_of_any_size_in_any_order(snapped, file, kernel):
    images = networks.images(9, SHAPE)
    runner = Runner(file, kernel)
    one_by_one = np.concatenate([runner(x[None])["head"] for x in images])
    for start, stop in ((0, 9), (2, 4), (4, 6), (8, 9), (0, 9)):
        found = runner(images[start:stop])
        assert list(found) == ["head"]
        np.testing.assert_allclose(
            found["head"], one_by_one[start:stop], rtol=1e-5, atol=1e-5
        )
    if kernel == kernels.BUILTIN:
        return  # The twin computes as XNNPACK does.
    expected = snapped.twin(images, training=False)
    np.testing.assert_allclose(one_by_one, expected, rtol=1e-4, atol=1e-4)


def test_outputs_are_not_overwritten_by_the_next_run(file):
    images = networks.images(2, SHAPE)
    runner = Runner(file)
    first = runner(images[:1])["head"]
    kept = first.copy()
    assert (runner(images[1:])["head"] != kept).any()
    np.testing.assert_array_equal(first, kept)


def test_inputs_that_the_file_does_not_take(file):
    runner = Runner(file)
    image = networks.images(1, SHAPE)
    with pytest.raises(ValueError):
        runner(image.astype(np.float64))
    with pytest.raises(ValueError):
        runner(image, image)
    with pytest.raises(ValueError):
        runner()
    assert runner(image)["head"].shape == (1, 10)


def test_a_runner_recovers_from_a_wrong_rank(file):
    runner = Runner(file)
    image = networks.images(1, SHAPE)
    before = runner(image)["head"]
    with pytest.raises((ValueError, RuntimeError)):
        runner(image[:, :, :, 0])
    np.testing.assert_array_equal(runner(image)["head"], before)


# --- intermediates --------------------------------------------------------------------


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_intermediates_change_nothing(file, kernel):
    images = networks.images(5, SHAPE)
    everything = Runner(file, kernel, intermediates=True)(images)
    plain = Runner(file, kernel)(images)
    np.testing.assert_array_equal(everything["head"], plain["head"])
    model = flatbuffer.unpack(file)
    (graph,) = model.subgraphs
    computed = {
        graph.tensors[i].name.decode() for o in graph.operators for i in o.outputs
    }
    assert everything.keys() == computed
    for name, values in everything.items():
        assert len(values) == 5, name


def test_the_file_itself_is_not_changed(file):
    before = bytes(file)
    with_all_outputs(file)
    assert file == before


# --- delegation -----------------------------------------------------------------------


def test_all_of_a_network_is_delegated(file):
    runner = Runner(file)
    assert runner.not_delegated() == []
    runner(networks.images(3, SHAPE))
    assert runner.not_delegated() == []


def test_builtin_kernels_delegate_nothing(file):
    model = flatbuffer.unpack(file)
    operators = model.subgraphs[0].operators
    assert len(Runner(file, kernels.BUILTIN).not_delegated()) == len(operators)


def test_an_operator_that_the_delegate_does_not_take():
    # XNNPACK has no logarithm of a softmax.
    data = one_operator("LOG_SOFTMAX")
    runner = Runner(data)
    x = np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)
    expected = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(runner(x)["out"], expected, atol=1e-5)
    assert runner.not_delegated() == ["LOG_SOFTMAX"]


def test_operators_that_no_output_needs_do_not_count():
    builder = FileBuilder("a branch without a reader")
    first = builder.activation("in", (None, 4), np.float32)
    dead = builder.activation("dead", (None, 4), np.float32)
    last = builder.activation("out", (None, 4), np.float32)
    builder.operator("LOG_SOFTMAX", 1, [first], [dead])
    builder.operator("TANH", 1, [first], [last])
    data = builder.finish({"in": first}, {"out": last}, b"{}", "main")
    assert "TANH" not in Runner(data).not_delegated()


@pytest.mark.slow
def test_int4_layers_are_not_delegated(snapped):
    (images,) = (networks.images(2, SHAPE),)
    net = networks.randomize(models.preact_resnet(8, width=4, input_shape=SHAPE))
    quantized = tfl.quantize(net, tfl.PrecisionRule(".*", 2, 2))
    packed = export.snap(quantized, [images], options=Options(storage="int4"))
    found = Runner(writer.to_bytes(packed)).not_delegated()
    layers = [
        layer for layer in packed.twin.layers if getattr(layer, "storage", "") == "int4"
    ]
    assert found == ["CONV_2D"] * len(layers)
    assert layers


def test_what_is_no_file():
    with pytest.raises(ValueError):
        Runner(b"no file of this kind, but long enough to look at")
    with pytest.raises(ValueError):
        Runner(one_operator("LOG_SOFTMAX")[:60])


# --- runtimes -------------------------------------------------------------------------

_WITHOUT = """
import sys
sys.modules["ai_edge_litert"] = None
import json, warnings
import numpy as np
from tf_lowbit.export.integer import kernels
from tf_lowbit.export.tflite import runner as running
warnings.simplefilter("error")
data = open(sys.argv[1], "rb").read()
images = np.load(sys.argv[2])
results = {}
for kernel in kernels.KERNELS:
    runner = running.Runner(data, kernel, intermediates=True)
    found = runner(images)
    runner(images[:1])
    results[kernel] = {
        "not_delegated": len(runner.not_delegated()),
        "codes": {n: v.tolist() for n, v in found.items() if v.dtype == np.int8},
        "head": found["head"].tolist(),
    }
print(json.dumps({"runtime": running.runtime(), "results": results}))
"""


@pytest.mark.slow
def test_without_litert_tensorflow_runs_the_file(file, tmp_path):
    (tmp_path / "net.tflite").write_bytes(file)
    images = networks.images(3, SHAPE)
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _WITHOUT,
            str(tmp_path / "net.tflite"),
            str(tmp_path / "images.npy"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runtime"].startswith("tf.lite ")
    for kernel, result in found["results"].items():
        here = Runner(file, kernel, intermediates=True)(images)
        assert (result["not_delegated"] == 0) == (kernel == kernels.XNNPACK)
        for name, codes in result["codes"].items():
            np.testing.assert_array_equal(codes, here[name], err_msg=name)
        np.testing.assert_allclose(result["head"], here["head"], rtol=1e-4, atol=1e-4)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", [str, Path])
def test_files_are_given_by_path(kind, file, tmp_path):
    path = kind(tmp_path / "net.tflite")
    Path(path).write_bytes(file)
    images = networks.images(1, SHAPE)
    for intermediates in (False, True):
        found = Runner(path, intermediates=intermediates)(images)
        wanted = Runner(file, intermediates=intermediates)(images)
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)
    assert len(export.latencies({"a": path}, rounds=2, seconds=0.001)["a"]) == 2
    with pytest.raises(FileNotFoundError, match=r"data must be the path.*none'$"):
        Runner(kind(tmp_path / "none"))


def test_the_runtime_says_which_it_is():
    litert = pytest.importorskip("ai_edge_litert")
    assert litert is not None
    assert runtime().startswith("ai_edge_litert ")


def test_the_interpreter_does_not_warn(file, recwarn):
    Runner(file)
    assert [str(w.message) for w in recwarn if "Interpreter" in str(w.message)] == []


def test_latencies_of_files_that_take_turns(file):
    found = export.latencies(
        {"net": file, "softmax": one_operator("LOG_SOFTMAX")}, rounds=3, seconds=0.001
    )
    assert found.keys() == {"net", "softmax"}
    for turns in found.values():
        assert len(turns) == 3
        assert min(turns) > 0
    assert np.median(found["softmax"]) < np.median(found["net"])
