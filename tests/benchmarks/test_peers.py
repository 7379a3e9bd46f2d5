import dataclasses
import math
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from packaging.utils import canonicalize_name

from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy import rows as accuracy_rows
from benchmarks.accuracy import tuning
from benchmarks.common import store
from benchmarks.peers import files as peers_files
from benchmarks.peers import networks as peers_networks
from benchmarks.peers import plan as peers_plan
from benchmarks.peers import report as peers_report
from benchmarks.peers import setup as peers_setup
from benchmarks.peers import trials
from tests.examples import programs
from tf_lowbit.compat import keras, tf, tfmot

NETWORK = "plain_cnn"
SETTINGS = sweep.Settings()
FILE = {
    "bytes": 310,
    "float_bytes": 1000,
    "operators": {"CONV_2D": 5, "ROUND": 4, "MUL": 3},
    "float_operators": {"CONV_2D": 5, "MEAN": 1},
    "convolutions": {"float32 x float32": 4, "int8 x int8": 1},
    "accuracy": 0.6125,
    "trained_accuracy": 0.615,
    "trained_agrees": 399,
    "test_images": 400,
}


def put(folder, method, seed, accuracy, bits=(2, 2), purpose="equal", **more):
    """Adds a run's result with made-up figures."""
    run = sweep.Run(purpose, NETWORK, method, bits, seed, SETTINGS.epochs, 0.03)
    content = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    content |= {"accuracy": accuracy, "settings": SETTINGS.as_json(), **more}
    sweep.write(folder, run, content)


@pytest.fixture
def made_up(tmp_path):
    """Three seeds of ours, a peer that is 1, 2 and 3 points better, and one refusal."""
    for seed, (plain, peer) in enumerate([(0.59, 0.60), (0.60, 0.62), (0.61, 0.64)]):
        put(tmp_path, "float", seed, 0.9, None, "float")
        put(tmp_path, "plain", seed, plain)
        put(tmp_path, "larq", seed, peer, file=FILE)
        put(tmp_path, "tfmot", seed, None, refused="RuntimeError: no a|b")
        put(tmp_path, "qkeras", seed, None if seed == 1 else 0.5,
            diverged="loss nan" if seed == 1 else None,
            file={"refused": "ConverterError: no file"})  # fmt: skip
        put(tmp_path, peers_plan.POST_TRAINING, seed, None, (8, 8), "deployment",
            file={**FILE, "accuracy": 0.8 + seed / 100})  # fmt: skip
    return tmp_path


def cells(table):
    """The rows of a Markdown table, without heading and rule."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.splitlines()[2:]
    ]


# Tables


def test_differences_are_paired_by_seed_with_students_interval():
    ours = {0: 59.0, 1: 60.0, 2: 61.0, 7: 10.0}
    mean, half = accuracy_rows.paired({0: 60.0, 1: 62.0, 2: 64.0}, ours)
    assert mean == pytest.approx(2.0)
    # Deviation 1, standard error 1 / sqrt(3), quantile of t with 2 degrees of freedom.
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    one = accuracy_rows.paired({0: 60.0}, ours)
    assert one[0] == pytest.approx(1.0)
    assert math.isnan(one[1])
    assert all(math.isnan(x) for x in accuracy_rows.paired({3: 60.0}, ours))


def test_the_accuracy_table_has_means_errors_and_what_has_none(made_up):
    found = {row[0]: row[1:] for row in
             cells(peers_report.tables(made_up)[f"accuracy {NETWORK}"])}  # fmt: skip
    assert found == {
        "float, which all start from": ["", "", "90.00 ± 0.00", "—", "—"],
        "tf_lowbit DoReFa": ["W2A2", "0.03", "60.00 ± 0.58", "—", "—"],
        "TF-MOT n-bit": ["W2A2", "", "refused", "—", "—"],
        "QKeras": ["W2A2", "0.03", "diverged: 1 of 3", "-10.00 ± 12.71", "—"],
        "Larq DoReFa": ["W2A2", "0.03", "62.00 ± 1.15", "+2.00 ± 2.48", "—"],
        "TFLite post-training int8": ["W8A8", "", "81.00 ± 0.58", "—", "—"],
    }


def test_the_deployment_table_says_what_is_in_a_file(made_up):
    types = "4 float32 x float32, 1 int8 x int8"
    same = ["0.310", types, "12 (6)", "4", "99.75"]
    assert cells(peers_report.tables(made_up)["deployment"]) == [
        [NETWORK, "QKeras", "W2A2", "refused", *["—"] * 6],
        [NETWORK, "Larq DoReFa", "W2A2", *same, "61.25", "61.50"],
        [NETWORK, "TFLite post-training int8", "W8A8", *same, "80.00", "61.50"],
    ]


def test_refusals_are_told_once_in_their_own_words(made_up):
    put(made_up, "tfmot", 0, None, (4, 4), refused="RuntimeError: no a|b")
    # Of several messages the first one is shown.
    put(made_up, "qkeras", 2, 0.5, file={"refused": "ConverterError: scale 0.3"})
    assert cells(peers_report.tables(made_up)["refused"]) == [
        [NETWORK, "QKeras", "W2A2", "TFLite file", "ConverterError: no file"],
        [NETWORK, "TF-MOT n-bit", "W2A2, W4A4", "network", r"RuntimeError: no a\|b"],
    ]


def test_costs_are_shown_relative_to_float_and_to_ours(tmp_path):
    ratios = [
        {"step": step, "relative to": base, "median": value, "least": value - 0.1,
         "largest": value + 0.1}
        for step, base, value in [("larq", "float", 1.5), ("larq", "plain", 1.25)]
    ]  # fmt: skip
    costs = peers_plan.costs_file(tmp_path)
    store.write(costs, peers_plan.step_cost_name("1"), {"ratios": ratios})
    for repeat, growths in enumerate([(1024, 3072), (2048, 2048), (4096, 8192)]):
        for variant, growth in zip(("float", "larq"), growths, strict=True):
            for allocator, factor in (("in-use", 1), ("glibc", 2)):
                name = peers_plan.memory_name(variant, allocator, repeat)
                figures = {"growth_kilobytes": growth * factor}
                figures |= {"variant": variant, "allocator": allocator}
                store.write(costs, name, figures)
    made = peers_report.tables(tmp_path)
    assert list(made) == ["step cost", "memory"]
    steps = {row[0]: row[1:] for row in cells(made["step cost"])}
    assert steps["Larq DoReFa"] == ["1.50 (1.40 to 1.60)", "1.25 (1.15 to 1.35)", "—"]
    assert steps["QKeras"] == ["—"] * 3
    assert "oneDNN" in made["step cost"].splitlines()[0]
    assert cells(made["memory"]) == [
        ["float", "2", "1.00 (0.50 to 2.00)", "4", "1.00 (0.50 to 2.00)"],
        ["Larq DoReFa", "3", "1.50 (1.00 to 4.00)", "6", "1.50 (1.00 to 4.00)"],
    ]


def test_runs_of_other_settings_are_not_mixed(made_up):
    other = dataclasses.replace(SETTINGS, width=16).as_json()
    put(made_up, "LSQ", 0, 0.5, settings=other)
    with pytest.raises(ValueError, match="must have the same settings"):
        peers_report.tables(made_up)


# Which runs there are


def test_every_run_has_its_start():
    phases = ("float", "equal", "deployment")
    made = {phase: peers_plan.trainings(phase, SETTINGS, 3) for phase in phases}
    starts = {(run.network, run.seed) for run in made["float"]}
    # Two networks; two seeds of the tuning and three that are reported.
    assert len(starts) == 2 * (2 + 3)
    for runs in made.values():
        assert {(run.network, run.seed) for run in runs} <= starts
        assert len({run.name for run in runs}) == len(runs)
    assert all(run.learning_rate is None for run in made["equal"])
    # 2 networks, 2 bit-widths, 3 seeds; ours twice and four peers.
    assert len(made["equal"]) == 2 * 2 * 3 * 6


def tune(folder, method, accuracies, network=NETWORK, bits=(2, 2), **more):
    """Writes the files of a tuning: accuracy by learning rate."""
    runs = tuning.runs_of(network, method, bits, SETTINGS)
    for rate, accuracy in accuracies.items():
        for run in runs[rate]:
            sweep.write(folder, run, {"accuracy": accuracy, **more})


def test_the_tuning_goes_on_until_the_best_stands_between_others(tmp_path):
    def wanted(method, network=NETWORK, bits=(2, 2)):
        return [
            run.learning_rate
            for run in peers_plan.next_of_tuning(tmp_path, SETTINGS)
            if (run.method, run.network, run.bits) == (method, network, bits)
        ]

    # Of each of two seeds.
    assert wanted("larq") == wanted("plain") == [0.03, 0.03, 0.1, 0.1]
    runs = peers_plan.next_of_tuning(tmp_path, SETTINGS)
    # Two rates, two seeds, two bit-widths; ours twice and four peers; two networks.
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2 * (2 + 4) * 2
    assert {(run.seed, run.bits) for run in runs} == {
        (seed, bits) for seed in (100, 101) for bits in ((2, 2), (4, 4))
    }
    only = peers_plan.next_of_tuning(tmp_path, SETTINGS, ["plain_cnn"])
    assert {run.network for run in only} == {"plain_cnn"}
    tune(tmp_path, "larq", {0.03: 0.5, 0.1: 0.6})
    assert wanted("larq") == [0.3, 0.3]
    tune(tmp_path, "larq", {0.3: 0.5})
    assert wanted("larq") == []
    assert wanted("larq", "preact_resnet8") == [0.03, 0.03, 0.1, 0.1]
    assert wanted("larq", bits=(4, 4)) == [0.03, 0.03, 0.1, 0.1]
    tune(tmp_path, "tfmot", {0.03: None}, refused="RuntimeError: no")
    assert wanted("tfmot") == []


def test_the_learning_rate_is_that_of_the_tuning_at_the_same_bits(tmp_path):
    def rate(method, bits):
        run = sweep.Run("equal", NETWORK, method, bits, 0, SETTINGS.epochs)
        return peers_plan.with_rate(tmp_path, SETTINGS, run).learning_rate

    tune(tmp_path, "larq", {0.01: 0.5, 0.03: 0.6, 0.1: None})
    tune(tmp_path, "larq", {0.03: 0.5, 0.1: 0.6, 0.3: 0.5}, bits=(4, 4))
    assert rate("larq", (2, 2)) == 0.03
    assert rate("larq", (4, 4)) == 0.1
    tune(tmp_path, "plain", {0.03: 0.1, 0.1: 0.3, 0.3: 0.2}, bits=(4, 4))
    assert rate("plain", (4, 4)) == rate(peers_plan.FOR_FILE, (4, 4)) == 0.1
    tune(tmp_path, "tfmot", {0.03: None}, refused="RuntimeError: no")
    assert rate("tfmot", (2, 2)) == 0.03
    with pytest.raises(ValueError, match="must have been tuned"):
        rate("qkeras", (2, 2))


def test_what_the_sweep_has_is_copied_and_never_overwritten(tmp_path):
    source, folder = tmp_path / "sweep", tmp_path / "peers"
    run = sweep.Run("float", NETWORK, "float", None, 1, 8, 0.1)
    peers_plan.adopt(run, SETTINGS, source, folder)
    assert not folder.exists()
    content = {"settings": SETTINGS.as_json(), "learning_rate": 0.1, "accuracy": 0.5}
    sweep.write(source, run, content)
    sweep.write_start(source, NETWORK, 1, {"kernel": np.ones(2)})
    peers_plan.adopt(run, SETTINGS, source, folder)
    assert sweep.read_start(folder, NETWORK, 1)["kernel"].tolist() == [1, 1]
    assert sweep.is_done(folder, run, SETTINGS)
    sweep.write_start(source, NETWORK, 1, {"kernel": np.zeros(2)})
    peers_plan.adopt(run, SETTINGS, source, folder)
    assert sweep.read_start(folder, NETWORK, 1)["kernel"].tolist() == [1, 1]


# Networks


@pytest.fixture(scope="module")
def preactivation():
    """One pre-activation block: BN does not follow the convolution it belongs to."""
    layers = keras.layers
    image = keras.Input((6, 6, 1))
    x = shortcut = layers.Conv2D(2, 3, padding="same", name="stem")(image)
    for i in (1, 2):
        x = layers.BatchNormalization(name=f"bn{i}")(x)
        x = layers.ReLU(name=f"relu{i}")(x)
        x = layers.Conv2D(2, 3, padding="same", name=f"conv{i}")(x)
    x = layers.Add(name="add")([x, shortcut])
    x = layers.BatchNormalization(name="final_bn")(x)
    x = layers.ReLU(name="final_relu")(x)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return keras.Model(image, layers.Dense(3, name="head")(x))


def test_tfmot_refuses_preactivation_in_its_own_words(preactivation):
    with pytest.raises(RuntimeError, match="BatchNormalization'> is not supported"):
        peers_networks.build("tfmot", preactivation, (2, 2))


def test_tfmot_by_hand_quantizes_what_ours_does(preactivation):
    network = peers_networks.build("tfmot_by_hand", preactivation, (4, 2))
    found = {
        (layer.layer.name, kind[1])
        for layer in network.layers
        if isinstance(layer, tfmot.quantization.keras.QuantizeWrapper)
        for weight in layer.weights
        if (kind := re.search(r"(\w+)_min", weight.name.split("/")[-1]))
    }
    assert found == {
        *(("conv1", "kernel"), ("conv2", "kernel")),
        *(("relu1", "output"), ("relu2", "output")),
    }
    assert peers_networks.quantized_names(preactivation) == (
        {"conv1", "conv2"},
        {"relu1", "relu2"},
    )
    kernel = network.get_layer("stem").kernel
    np.testing.assert_array_equal(kernel, preactivation.get_layer("stem").kernel)
    # The bits are those that were asked for.
    inner = keras.Model(network.input, network.get_layer("quant_relu1").output)
    x = np.random.default_rng(0).normal(size=(64, 6, 6, 1)).astype(np.float32)
    levels = np.unique(inner(30 * x))
    assert 1 < len(levels) <= 4
    np.testing.assert_allclose(np.diff(levels), 12 / 3, rtol=1e-5)


def test_an_unknown_peer_is_refused(preactivation):
    with pytest.raises(ValueError, match="Received: 'nncf'"):
        peers_networks.build("nncf", preactivation, (2, 2))
    with pytest.raises(ValueError, match="Received: 'nncf'"):
        peers_networks.float_difference("nncf", preactivation)


# Files


def test_a_file_is_read_and_run_on_the_test_set():
    image = keras.Input((4, 4, 1))
    x = keras.layers.Conv2D(2, 3, name="stem")(image)
    x = keras.layers.GlobalAveragePooling2D()(tf.round(x))
    model = keras.Model(image, keras.layers.Dense(3)(x))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(10, 4, 4, 1)).astype(np.float32)
    labels = model.predict_on_batch(images).argmax(axis=-1)
    labels[:3] = (labels[:3] + 1) % 3
    batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(4)
    found = peers_files.deployed(
        model, peers_files.converted(model), model, SimpleNamespace(test=batches)
    )
    assert found["convolutions"] == {"float32 x float32": 1}
    assert found["operators"]["ROUND"] == found["operators"]["CONV_2D"] == 1
    assert found["operators"] == found["float_operators"]
    assert found["bytes"] == found["float_bytes"] > found["gzip_bytes"] > 0
    assert found["test_images"] == found["trained_agrees"] == 10
    assert found["accuracy"] == found["trained_accuracy"] == 0.7
    assert found["largest_logit_difference"] < 1e-5


def test_of_an_error_the_words_are_kept_and_places_left_out():
    converter = ValueError("/a/b.py:3:1: error: op #0 must be\n    code()\n    ^\n")
    assert peers_files.said(converter) == "ValueError: op #0 must be"
    assert peers_files.said(RuntimeError("\nno BN\nmore")) == "RuntimeError: no BN"
    assert peers_files.said(KeyError()) == "KeyError: "


# The environment


def test_the_environment_is_pinned():
    def names(path):
        lines = path.read_text().splitlines()
        lines = [line for line in lines if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
        return {canonicalize_name(line.split("==")[0]) for line in lines}

    own = names(programs.ROOT / "benchmarks" / "requirements-peers.txt")
    lock = names(programs.ROOT / "requirements.lock")
    assert set(peers_plan.PACKAGES.values()) <= own | lock
    # Versions of the lock are not replaced.
    assert not own & lock
    # What QKeras imports beyond its own.
    assert {"networkx", "pyparsing"} <= own | lock
    ignored = (programs.ROOT / ".gitignore").read_text().split()
    assert f"{peers_setup.FOLDER}/" in ignored


def test_the_environment_is_complete_only_when_all_is_installed(tmp_path, monkeypatch):
    folder = tmp_path / "environment"
    commands = []

    def run(command, check):
        assert check
        folder.mkdir(exist_ok=True)
        commands.append(command)
        if fails and len(commands) == 4:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    fails = True
    with pytest.raises(subprocess.CalledProcessError):
        peers_setup.set_up(folder)
    with pytest.raises(ValueError, match=r"run `python -m benchmarks\.peers --setup`"):
        peers_setup.python_of(folder)
    commands.clear()
    fails = False
    peers_setup.set_up(folder)
    assert peers_setup.python_of(folder) == folder / "bin" / "python"
    lock, own, library = (command[3:] for command in commands[1:])
    assert lock[-1].endswith("requirements.lock")
    assert own[-1].endswith("requirements-peers.txt")
    for command in (own, library):
        assert "--no-deps" in command


def test_the_comparison_says_what_a_trial_of_keras3_shows():
    """The other trials need packages that the lock does not have."""
    lines = trials.keras()
    for mode in ("int8", "int4", "float8"):
        # The convolution stays float.
        assert any(line.startswith(f"{mode}: Dense; outputs differ") for line in lines)
    assert "int8: kernels that fit trains: 1 of 2" in lines


def test_the_documents_have_the_versions_of_the_trials():
    pages = ("docs/comparison.md", "docs/how_to/qonnx.md")
    text = "".join((programs.ROOT / page).read_text() for page in pages)
    pins = (programs.ROOT / "benchmarks/requirements-trials.txt").read_text()
    versions = dict(re.findall(r"^([\w-]+)==(\S+)$", pins, re.M))
    for name, shown in {
        "aimet-onnx": "AIMET",
        "aimet-torch": "AIMET",
        "brevitas": "Brevitas",
        "hgq2": "HGQ2",
        "nncf": "NNCF",
        "model-compression-toolkit": "MCT",
        "qkeras-v3": "`qkeras-v3`",
        "finn-plus": "finn-plus",
        "hls4ml": "hls4ml",
        "torch": "PyTorch",
    }.items():
        assert f"{shown} {versions[name]}" in text


def test_a_trial_has_the_version_of_its_tool():
    """Keras is in the lock."""
    pins = (programs.ROOT / "benchmarks/requirements-trials.txt").read_text()
    pinned = set(re.findall(r"^([\w-]+)==", pins, re.M))
    assert {name for _, name in trials.TOOLS.values()} - {"keras"} <= pinned
