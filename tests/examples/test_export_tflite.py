import json
import re

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.examples import programs
from tf_lowbit import datasets, models
from tf_lowbit.analysis import environment
from tf_lowbit.compat import keras

LIMIT = 40
WRITTEN = ["archive.npz", "network.tflite", "report.json", "report.txt"]
# None of the defaults; the twin is fine-tuned too.
CHOICES = {
    "target": "portable",
    "storage": "int4",
    "head": "int8",
    "input_type": "int8",
    "output_type": "uint8",
    "finetune_epochs": 1,
    "learning_rate": 0.01,
}
# Of each kind of mistake one: its flags, and what the message must hold.
BAD = {
    "not a flag": (["net.h5"], r"^UsageError: .*arguments that are no flags: \['net"),
    "target": (
        ["--target=nope"],
        r"--target=nope: .*one of <xnnpack\|portable\|int8\|tflm>",
    ),
    "dataset": (["--dataset=nope"], r"--dataset=nope: .*digits"),
    "no model": (["--model="], r"^ValueError: path must be a path"),
    "missing model": (["--model=nope.h5"], r"^FileNotFoundError: .*nope\.h5"),
    "a run's folder": (["--model=.."], r"^ValueError: path must be .*SavedModel"),
    "torn model": (["--model=../torn.h5"], r"^ValueError: path must be a whole"),
    "missing .keras": (["--model=net.keras"], r"^FileNotFoundError: .*net\.keras"),
    "float network": (["--model=../float.h5"], r"^ValueError: .*nothing is quantized"),
    "other images": (
        ["--model=../six.h5"],
        r"^ValueError: The images of digits are \(8, 8, 1\)\. Received: .*\(6, 6, 1\)",
    ),
    "no pixels": (
        ["--input_type=uint8"],
        r"^ExportError: input_type='uint8' takes pixels.*Received: ",
    ),
    "output_dir": (
        ["--output_dir=../file/out"],
        r"^OSError: .*writable.*'\.\./file/out'",
    ),
    "limit": (["--limit=0"], r"^ValueError: limit .*Received: limit=0"),
    "finetune_epochs": (
        ["--finetune_epochs=-1"],
        r"^ValueError: --finetune_epochs must be >= 0\. Received: .*-1",
    ),
    "idle rate": (
        ["--learning_rate=0.1"],
        r"^ValueError: A flag must have an effect\. Received: --learning_rate",
    ),
    "falling rate": (
        ["--finetune_epochs=1", "--learning_rate=-1"],
        r"^ValueError: learning_rate must .*above 0.*Received: learning_rate=-1",
    ),
}
# As a bad disk would: one bit of the first layer's weights, in a file just written.
DAMAGE = """
def to_tflite_then_damage(model, path, *arguments, **options):
    result = to_tflite(model, path, *arguments, **options)
    if path.parent.name.startswith("damaged"):
        codes = result.twin.get_layer("stem").codes().numpy().round()
        weights = codes.astype("int8").transpose(3, 0, 1, 2).tobytes()
        content = bytearray(path.read_bytes())
        assert content.count(weights) == 1
        content[content.index(weights)] ^= 1
        path.write_bytes(content)
    return result

to_tflite = program.tfl.export.to_tflite
program.tfl.export.to_tflite = to_tflite_then_damage
"""


def own_flags():
    source = (programs.ROOT / "examples" / "export_tflite.py").read_text()
    return set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))


def small(size):
    """A quantized network: exported in a moment."""
    layers = keras.layers
    net = [
        layers.Conv2D(
            2, 3, activation="relu", input_shape=(size, size, 1), name="stem"
        ),
        layers.Conv2D(4, 3, activation="relu", name="mid"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(10, name="head"),
    ]
    edges = tfl.PrecisionRule("stem|head", 8, 8, "lsq", "lsq")
    inner = tfl.PrecisionRule(".*", 2, 2, "lsq", "lsq")
    model = tfl.quantize(keras.Sequential(net), [edges, inner])
    rng = np.random.default_rng(0)
    tfl.calibrate(model, [rng.normal(size=(16, size, size, 1)).astype(np.float32)])
    return model


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def exports(tmp_path_factory, trained_for_deployment):
    """Runs of the program: function from name to exit code, error, output, folder."""
    folder = tmp_path_factory.mktemp("exports")
    _, run = trained_for_deployment
    trained = run / "quantized" / "model.keras"
    small(8).save(folder / "small.keras")
    small(6).save(folder / "six.h5", include_optimizer=False)
    models.plain_cnn(width=2, input_shape=(8, 8, 1)).save(folder / "float.h5")
    (folder / "torn.h5").write_bytes((folder / "six.h5").read_bytes()[:9000])
    (folder / "file").write_text("")
    cases = {}

    def add(name, *flags, model="../small.keras", out="out"):
        (folder / name).mkdir()
        # Without a folder: the default, as with train.py.
        common = ("--dataset=digits", "--data_dir=", "--batch_size=16")
        common = (*common, f"--limit={LIMIT}")
        flags = (f"--model={model}", *common, f"--output_dir={out}", *flags)
        cases[name] = folder / name, flags

    add("good", "--strict", model=trained)
    add("chosen", *(f"--{name}={value}" for name, value in CHOICES.items()))
    add("untouched")
    add("damaged", out="damaged")
    add("damaged, strict", "--strict", out="damaged")
    add("blocked")
    (folder / "blocked" / "out" / "network.tflite").mkdir(parents=True)
    add("diverging", "--finetune_epochs=1", "--learning_rate=1e38")
    (folder / "diverging" / "out").mkdir()
    (folder / "diverging" / "out" / "report.json").write_text("of an earlier file")
    for name, (flags, _) in BAD.items():
        add(name, *flags)
    found, _ = programs.run_each("export_tflite", cases, before=DAMAGE)
    return lambda name: (*found[name], folder / name)


def reported(out):
    return json.loads((out / "report.json").read_text())


def test_a_trained_network_becomes_a_proved_file(exports, trained_for_deployment):
    code, error, shown, folder = exports("good")
    assert (code, error) == (0, "")
    out = folder / "out"
    assert files(folder) == WRITTEN
    for name in WRITTEN:
        assert f"Written: out/{name}\n" in shown
    report = reported(out)
    assert report["ok"]
    assert report["failures"] == []
    assert report["size"] == (out / "network.tflite").stat().st_size
    assert report["predictions"]["examples"] == LIMIT
    assert report["predictions"]["twin_agrees"] == LIMIT
    assert sum(c["elements"] for c in report["comparisons"]) > 0
    text = (out / "report.txt").read_text()
    assert text in shown
    assert "proved equal to its integer model (twin)" in text
    # What was trained is what is in the file: seen from outside the program.
    _, run = trained_for_deployment
    model = tfl.load_model(run / "quantized" / "model.keras", compile=False)
    runner = tfl.export.Runner((out / "network.tflite").read_bytes())
    right = {}
    data = datasets.load("digits", batch_size=LIMIT, limit=LIMIT)
    ((images, labels),) = data.test.as_numpy_iterator()
    (logits,) = runner(images).values()
    right["file"] = int((logits.argmax(-1) == labels).sum())
    logits = model(images, training=False).numpy()
    right["trained"] = int((logits.argmax(-1) == labels).sum())
    found = report["predictions"]["right"]
    assert found == {**right, "twin": right["file"]}


def test_the_report_says_with_what_it_was_made(exports):
    *_, folder = exports("good")
    report = reported(folder / "out")
    assert set(report["settings"]) == own_flags() - {"output_dir"}
    assert report["settings"]["strict"] is True
    assert report["settings"]["limit"] == LIMIT
    assert report["versions"] == environment()["versions"]
    assert "machine" in report


def test_the_archive_holds_the_trained_2_bit_codes(exports, trained_for_deployment):
    *_, folder = exports("good")
    archive = tfl.export.load_archive(folder / "out" / "archive.npz")
    _, run = trained_for_deployment
    model = tfl.load_model(run / "quantized" / "model.keras", compile=False)
    weights = [
        t
        for t in tfl.inspection.quantized_tensors(model)
        if t.role == "weight" and t.bits == 2
    ]
    assert len(weights) == 8
    for tensor in weights:
        layer = archive.layer(tensor.layer.layer.name)
        assert layer.settings["bits"] == 2
        codes = layer.codes() * layer.arrays["signs"]
        assert set(np.unique(codes)) <= {-2, -1, 0, 1}
        values = codes * layer.arrays["steps"]
        np.testing.assert_allclose(values, tensor.quantized(), rtol=1e-5)
    assert archive.weight_bytes < (folder / "out" / "network.tflite").stat().st_size / 4


def test_the_file_says_how_pixels_are_normalised(exports):
    *_, folder = exports("good")
    info = tfl.export.read_info(folder / "out" / "network.tflite")
    normalization = datasets.load("digits", batch_size=1).normalization
    assert info["dataset"] == "digits"
    assert info["normalization"] == {
        "mean": list(normalization.mean),
        "deviation": list(normalization.deviation),
    }


def test_all_choices_reach_the_file_and_the_twin_can_be_finetuned(exports):
    code, error, shown, folder = exports("chosen")
    assert (code, error) == (0, "")
    out = folder / "out"
    assert files(folder) == WRITTEN
    report = reported(out)
    assert report["ok"]
    assert {n: report["settings"][n] for n in CHOICES} == CHOICES
    assert {d["kernel"] for d in report["decisions"]} == {"xnnpack", "builtin"}
    runner = tfl.export.Runner((out / "network.tflite").read_bytes())
    assert runner.inputs[0]["dtype"] == np.int8
    assert runner.outputs[0]["dtype"] == np.uint8
    assert report["operators"]["FULLY_CONNECTED"] == 1
    assert "MEAN" not in report["operators"]  # The average is a sum of codes here.
    archive = tfl.export.load_archive(out / "archive.npz")
    assert archive.options == {
        "target": "portable",
        "storage": "int4",
        "first_layer": "int8",
        "head": "int8",
        "input_type": "int8",
        "output_type": "uint8",
    }
    assert "val_accuracy" in shown
    # Fine-tuned: these are no longer the trained codes.
    *_, folder = exports("untouched")
    untouched = tfl.export.load_archive(folder / "out" / "archive.npz")
    assert any(
        (untouched.layer(name).codes() != archive.layer(name).codes()).any()
        for name in ("stem", "mid")
    )


@pytest.mark.parametrize(("name", "code"), [("damaged", 0), ("damaged, strict", 1)])
def test_a_broken_promise_is_told_and_ends_strict_runs_with_1(exports, name, code):
    ended, error, shown, folder = exports(name)
    assert (ended, error) == (code, "")
    assert "FAILED: stem" in shown
    assert "proved equal" not in shown
    report = reported(folder / "damaged")
    assert not report["ok"]
    assert any("stem" in failure for failure in report["failures"])
    text = (folder / "damaged" / "report.txt").read_text()
    assert text.endswith("\nNot proved.\n")


def test_a_file_that_cannot_be_written_leaves_nothing(exports):
    code, error, _, folder = exports("blocked")
    assert code == 1
    assert re.search(r"must be writable.*Received: 'out/network\.tflite'", error)
    assert files(folder) == []
    assert [path.name for path in (folder / "out").iterdir()] == ["network.tflite"]


def test_a_diverging_finetuning_is_an_error_and_no_report(exports):
    code, error, _, folder = exports("diverging")
    assert code == 1
    assert re.search(r"^ValueError: The training loss must stay finite", error)
    assert not {"report.json", "report.txt", "archive.npz"} & set(files(folder))


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_refused_with_a_reason(exports, name):
    code, error, _, _ = exports(name)
    assert code == 1
    assert re.search(BAD[name][1], error), error


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_leave_no_file(exports, name):
    *_, folder = exports(name)
    assert files(folder) == []
