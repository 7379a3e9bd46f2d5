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
DEPLOYMENT = ["deployment.json", "float.tflite", "network.tflite"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One tiny demo, over the leftovers of an earlier one."""
    folder = tmp_path_factory.mktemp("demo")
    stale = folder / "out" / "w2a2-plain" / "checkpoints" / "stale"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    arguments = ("--float_epochs=3", "--epochs=3", "--width=2", "--batch_size=256")
    done = programs.run("demo.py", *arguments, "--output_dir=out", folder=folder)
    assert done.returncode == 0, done.stderr
    assert not stale.exists()
    return done.stdout, folder


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
        expected = ["checkpoints", "log.csv", "model.h5", "result.json", "tensorboard"]
        expected += DEPLOYMENT if name == "w2a2-deployed" else []
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
        model = tfl.load_model(folder / "out" / name / "model.h5", compile=False)
        found = {tensor.bits for tensor in tfl.inspection.quantized_tensors(model)}
        expected = {2, 8} if name == "w2a2-deployed" else {int(bits[0])}
        assert found == expected


def test_ends_with_a_proved_file(demo):
    shown, folder = demo
    assert "Every promise is kept." in shown
    deployed = folder / "out" / "w2a2-deployed"
    found = json.loads((deployed / "deployment.json").read_text())
    path = deployed / "network.tflite"
    assert found["proved"]
    model = tfl.load_model(deployed / "model.h5", compile=False)
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
