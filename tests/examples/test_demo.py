import csv
import json
import re

import pytest

import tf_lowbit as tfl
from tests.examples import programs
from tf_lowbit import datasets

# Label, folder, bits.
NETWORKS = [
    ("float", "float", "32 / 32"),
    ("W2A2 plain", "w2a2-plain", "2 / 2"),
    ("W2A2 two-stage", "w2a2-two-stage", "2 / 2"),
    ("W2A2 progressive", "w2a2-progressive", "2 / 2"),
    ("W2A2 stochastic", "w2a2-stochastic", "2 / 2"),
    ("W2A2 distilled", "w2a2-distilled", "2 / 2"),
    ("W4A4 plain", "w4a4-plain", "4 / 4"),
    ("W2A2 deployed", "w2a2-deployed", "2 / 2"),
]
# In the results of demos before there were marks.
OLD_FLAGS = ("float_epochs", "epochs", "width", "batch_size", "float_learning_rate")
OLD_RESULT = {"settings": dict.fromkeys((*OLD_FLAGS, "learning_rate", "seed"))}
DEPLOYMENT = ["deployment.json", "float.tflite", "network.tflite"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One tiny demo, over the leftovers of an earlier version's that was broken off."""
    folder = tmp_path_factory.mktemp("demo")
    write(folder / "out" / "float" / "result.json", json.dumps(OLD_RESULT))
    stale = write(folder / "out" / "w2a2-plain" / "checkpoints" / "stale")
    write(folder / "out" / "w2a2-plain" / "notes.txt")  # No demo's.
    arguments = ("--float_epochs=3", "--epochs=3", "--width=2", "--batch_size=256")
    done = programs.run("demo.py", *arguments, "--output_dir=out", folder=folder)
    assert done.returncode == 0, done.stderr
    assert not stale.exists()
    return done.stdout, folder


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def result(folder, name):
    return json.loads((folder / "out" / name / "result.json").read_text())


def test_ends_with_a_table_of_all_networks(demo):
    shown, folder = demo
    table = shown[shown.index("scikit-learn digits") :]
    for heading in ("network", "W / A bits", "test accuracy", "weight bytes"):
        assert heading in table
    for label, name, bits in NETWORKS:
        pattern = (
            rf"{label} +│ {bits} +│ +(\d+\.\d\d) % │ +([\d,]+) │ +(\d+) │ +(\d+) │"
        )
        match = re.search(pattern, table)
        assert match, label
        accuracy, size, epochs, seconds = match.groups()
        written = result(folder, name)
        assert float(accuracy) == pytest.approx(
            100 * written["test_accuracy"], abs=0.01
        )
        assert int(size.replace(",", "")) == written["cost"]["weight_bytes"]
        assert int(epochs) == written["epochs"] == 3
        assert int(seconds) == pytest.approx(written["seconds"], abs=0.6)


def test_says_where_the_files_are_and_leaves_them(demo):
    shown, folder = demo
    for _, name, _ in NETWORKS:
        assert f"  out/{name}\n" in shown
        expected = ["checkpoints", "log.csv", "model.keras", "result.json"]
        expected += ["tensorboard", ".demo"]
        expected += DEPLOYMENT if name == "w2a2-deployed" else []
        expected += ["notes.txt"] if name == "w2a2-plain" else []
        found = sorted(path.name for path in (folder / "out" / name).iterdir())
        assert found == sorted(expected)
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(
        name for _, name, _ in NETWORKS
    )


def test_shows_a_progress_bar_for_each_network(demo):
    shown, _ = demo
    for label, *_ in NETWORKS:
        assert re.search(rf"^{label} .* 3/3 ", shown, re.M)


def test_each_method_trained_as_it_says(demo):
    _, folder = demo
    logged = {}
    for _, name, _ in NETWORKS:
        with (folder / "out" / name / "log.csv").open(newline="") as file:
            logged[name] = list(csv.DictReader(file))
    for name, log in logged.items():
        assert ("quantized_share" in log[0]) == (name == "w2a2-stochastic")
        assert ("distillation_loss" in log[0]) == (name == "w2a2-distilled")
    bits = {
        name: [(row.get("weight_bits"), row.get("activation_bits")) for row in log]
        for name, log in logged.items()
    }
    assert bits == {
        "float": [(None, None)] * 3,
        "w2a2-plain": [("2", "2")] * 3,
        "w2a2-two-stage": [("2", "32"), ("2", "2"), ("2", "2")],
        "w2a2-progressive": [("8", "8"), ("4", "4"), ("2", "2")],
        "w2a2-stochastic": [("2", "2")] * 3,
        "w2a2-distilled": [("2", "2")] * 3,
        "w4a4-plain": [("4", "4")] * 3,
        "w2a2-deployed": [("2", "2")] * 3,
    }


def test_quantized_networks_are_smaller_and_at_their_bits(demo):
    _, folder = demo
    sizes = {
        name: result(folder, name)["cost"]["weight_bytes"] for _, name, _ in NETWORKS
    }
    deployed = sizes.pop("w2a2-deployed")  # Its first and last layer have 8 bits.
    assert deployed < sizes["float"]
    assert len({size for name, size in sizes.items() if name[:4] == "w2a2"}) == 1
    assert sizes["w2a2-plain"] < sizes["w4a4-plain"] < sizes["float"]
    for _, name, bits in NETWORKS[1:]:
        model = tfl.load_model(folder / "out" / name / "model.keras", compile=False)
        found = {tensor.bits for tensor in tfl.inspection.quantized_tensors(model)}
        expected = {2, 8} if name == "w2a2-deployed" else {int(bits[0])}
        assert found == expected


def test_ends_with_a_verified_file(demo):
    shown, folder = demo
    assert "proved equal to its integer model" in shown
    deployed = folder / "out" / "w2a2-deployed"
    found = json.loads((deployed / "deployment.json").read_text())
    path = deployed / "network.tflite"
    assert found["verified"]
    model = tfl.load_model(deployed / "model.keras", compile=False)
    assert tfl.export.verify(path, model, verbose=0).ok
    assert found["latency_ratio"] > 0
    contents = path.read_bytes(), (deployed / "float.tflite").read_bytes()
    assert tfl.export.read_info(contents[0])["dataset"] == "digits"
    data = datasets.load("digits", batch_size=100)
    table = shown[shown.index("TFLite files") :]
    labels = ("W2A2 deployed", ""), ("float32", "float_")
    for content, (label, prefix) in zip(contents, labels, strict=True):
        assert found[f"{prefix}bytes"] == len(content)
        assert found[f"{prefix}gzip_bytes"] == tfl.export.gzip_bytes(content)
        runner, right = tfl.export.Runner(content), 0
        for images, classes in data.test.as_numpy_iterator():
            (logits,) = runner(images).values()
            right += int((logits.argmax(axis=-1) == classes).sum())
        assert found[f"{prefix}accuracy"] == right / data.test_size
        row = rf"{label} +│ +{len(content):,} │ .*│ +{100 * right / data.test_size:.2f}"
        assert re.search(row, table)


# Folders before a demo, by file; its flags; what the message must hold, if it fails.
TRAINED = json.dumps({"settings": {**OLD_RESULT["settings"], "method": "plain"}})
CASES = {
    "a run of train.py": (
        {"float/result.json": TRAINED, "float/model.keras": "weights"},
        [],
        r"^FileExistsError: --output_dir must .*Received: \['out/float'\]",
    ),
    "a run of train.py that was broken off": (
        {
            "float/settings.json": "{}",
            "float/.demo": "",
            "float/checkpoints/epoch-00001-step-0000000/variables": "weights",
            "w2a2-plain/.demo": "",
            "w2a2-plain/model.keras": "weights",
        },
        [],
        r"^FileExistsError: .*Received: \['out/float'\]",
    ),
    "files without a mark": (
        {"float/model.keras": "weights"},
        [],
        r"^FileExistsError: .*Received: \['out/float'\]",
    ),
    **{
        name: (
            {"float/.demo": "", "float/model.keras": "weights"},
            [flag],
            message,
        )
        for name, flag, message in (
            ("an epoch for two stages", "--epochs=1", r"2 stages need at least 2"),
            ("two epochs for three rungs", "--epochs=2", r"3 stages need at least 3"),
            ("a falling rate", "--learning_rate=-1", r"Received: learning_rate=-1"),
            ("no float epochs", "--float_epochs=0", r"Received: .*0"),
            ("seed", "--seed=9999999999", r"--seed=9999999999"),
        )
    },
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Runs of all `CASES`, and their folder."""
    folder = tmp_path_factory.mktemp("refused")
    runs = {}
    tiny = ("--float_epochs=1", "--epochs=3", "--width=2", "--batch_size=512")
    for name, (files, flags, _) in CASES.items():
        for path, text in files.items():
            write(folder / name / "out" / path, text)
        runs[name] = folder / name, [*tiny, "--output_dir=out", *flags]
    return programs.run_each("demo", runs)[0], folder


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_to_a_demo_that_cannot_be(refused, name):
    found, folder = refused
    files, _, message = CASES[name]
    code, error, _ = found[name]
    assert code == 1
    assert re.search(message, error), error
    left = [path for path in (folder / name).rglob("*") if path.is_file()]
    found = {str(path.relative_to(folder / name / "out")): path for path in left}
    assert {path: file.read_text() for path, file in found.items()} == files
