import dataclasses
import json

import numpy as np
import pytest

from benchmarks.cifar import networks
from benchmarks.cifar import plan as cifar_plan
from benchmarks.cifar import report as cifar_report
from benchmarks.cifar import run as cifar_run
from benchmarks.common import store
from tests.datasets import tfds_files
from tf_lowbit.compat import keras, tf

# What a run says to nobody must be heard by other tests.
pytestmark = pytest.mark.usefixtures("_loud_again")
TINY = cifar_plan.EXPERIMENTS["tiny"]
TUNING_SEED = cifar_plan.TUNING_SEEDS[0]


def result(run, accuracy):
    return {**dataclasses.asdict(run), "accuracy": accuracy}


def test_rates_are_tuned_first_and_then_each_row_takes_its_own():
    best = {"plain": 0.3, "LSQ": 0.01}
    results, rows = {}, []
    while runs := cifar_plan.next_runs("tiny", results):
        for run in runs[:2]:
            if not run.is_held_out:
                rows.append(run)
            far = abs(run.learning_rate - best.get(run.method, 0.1))
            # At rate 1 everything diverges.
            results[run.name] = result(
                run, None if run.learning_rate == 1 else 0.9 - far
            )
    assert {(run.method, run.bits, run.seed) for run in rows} == {
        (method, bits, seed) for method, bits in TINY.rows for seed in range(TINY.seeds)
    }
    # What matters most comes first, and nothing is run twice.
    firsts = {(run.method, run.bits) for run in rows[: TINY.seeds]}
    assert firsts == {TINY.rows[0]}
    assert len(rows) == len(TINY.rows) * TINY.seeds
    assert {run.method: run.learning_rate for run in rows} == {
        method: best.get(method, 0.1) for method, _ in TINY.rows
    }


def test_single_rows_can_be_asked_for():
    only = ["LSQ W2A2", "float"]
    results = {}
    while runs := cifar_plan.next_runs("tiny", results, only):
        results[runs[0].name] = result(runs[0], 0.9 - abs(runs[0].learning_rate - 0.1))
    found = {(r["method"], r["bits"]) for r in results.values()}
    assert found == {("LSQ", (2, 2)), ("float", None), (cifar_plan.START, None)}
    assert len(results) == 1 + 2 * (3 + TINY.seeds)  # Three rates.
    # The start comes first, and serves other experiments on the same network.
    start = next(iter(results))
    assert start == cifar_plan.start_run("tiny", True).name
    assert start == cifar_plan.start_run("tiny_long", True).name
    assert start != cifar_plan.start_run("resnet20", True).name
    (first, *_) = cifar_plan.next_runs("tiny_long", {start: results[start]})
    assert first.method == "LSQ"


def test_where_no_network_is_given_one_is_trained_first():
    results = {}
    only = ["plain W2A2", "plain, rate 0.003 W2A2"]
    while runs := cifar_plan.next_runs("claims", results, only):
        results[runs[0].name] = result(runs[0], 0.5)
    starts = [cifar_plan.start_run("claims", held) for held in (True, False)]
    assert [run.is_held_out for run in starts] == [True, False]
    assert [run.name in results for run in starts] == [True, True]
    order = list(results)
    tested = [name for name in order if name.endswith("seed1")]
    assert order.index(starts[1].name) < min(map(order.index, tested))
    # A rate that is set is not tuned.
    low = [r for r in results.values() if r["method"].endswith("0.003")]
    assert [(r["seed"], r["learning_rate"]) for r in low] == [
        (seed, cifar_plan.LOW_RATE) for seed in range(3)
    ]


def test_other_methods_stand_beside_lsq_seed_by_seed(tmp_path):
    path = tmp_path / "cifar.jsonl"
    more = {"measured_on": "test", "weight_bytes": 1, "bops": 1}
    accuracies = {"LSQ": [0.80, 0.83, 0.90], cifar_plan.RECIPE: [0.81, 0.85]}
    for method, found in accuracies.items():
        for seed, accuracy in enumerate(found):
            run = cifar_plan.Run("tiny", method, (2, 2), seed, 8, 0.03)
            store.write(path, run.name, {**result(run, accuracy), **more})
    run = cifar_plan.Run("tiny", cifar_plan.RECIPE, (4, 4), 0, 8, 0.03)
    store.write(path, run.name, {**result(run, 0.9), **more})
    run = cifar_plan.Run("tiny", "QKeras", (2, 2), 0, 8, 0.03)
    store.write(path, run.name, {**result(run, 0.7), **more})
    lines = cifar_report.tables(path)["cifar, tiny"].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    # One point and two; 12.706 is Student's t of one degree of freedom.
    assert {row[1]: row[5] for row in cells} == {
        "LSQ W2A2": "—",
        "recipes.low_bit W2A2": "+1.50 ± 6.35",
        "recipes.low_bit W4A4": "—",
        "QKeras W2A2": "-10.00",
    }


def test_each_rate_has_a_row_and_the_tuned_one_is_compared(tmp_path):
    path = tmp_path / "cifar.jsonl"
    more = {"measured_on": "test", "weight_bytes": 1, "bops": 1}
    for rate, tested, held_out in ((0.03, 0.80, 0.7), (0.1, 0.85, 0.8)):
        for seed in (0, 1):
            run = cifar_plan.Run("tiny", "LSQ", (2, 2), seed, 8, rate)
            store.write(path, run.name, {**result(run, tested), **more})
        tuned = cifar_plan.Run("tiny", "LSQ", (2, 2), TUNING_SEED, 8, rate)
        found = {**result(tuned, held_out), **more, "measured_on": "held-out"}
        store.write(path, tuned.name, found)
    run = cifar_plan.Run("tiny", "plain", (2, 2), 0, 8, 0.01)
    store.write(path, run.name, {**result(run, 0.83), **more})
    for seed, rate in ((0, 0.01), (0, 0.3), (1, 0.3)):
        run = cifar_plan.Run("tiny", "plain", (4, 4), seed, 8, rate)
        store.write(path, run.name, {**result(run, 0.9 - rate), **more})
    lines = cifar_report.tables(path)["cifar, tiny"].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [(row[1], row[3], row[5], row[8]) for row in cells] == [
        ("LSQ W2A2", "85.00 ± 0.00", "—", "0.1"),
        ("LSQ W2A2", "80.00 ± 0.00", "—", "0.03"),
        ("plain W2A2", "83.00", "-2.00", "0.01"),
        ("plain W4A4", "89.00", "—", "0.01"),
        ("plain W4A4", "60.00 ± 0.00", "—", "0.3"),
    ]
    # A rate with more runs stands first at all bits.
    for seed in (2, 3, 4):
        run = cifar_plan.Run("tiny", "LSQ", (4, 4), seed, 8, 0.03)
        store.write(path, run.name, {**result(run, 0.9), **more})
    first = cifar_report.tables(path)["cifar, tiny"].splitlines()[2]
    assert [cell.strip() for cell in first.split("|")][3] == "80.00 ± 0.00"


def test_the_table_has_each_row_and_its_distance_to_the_float_network(tmp_path):
    path = tmp_path / "cifar.jsonl"
    costs = {"weight_bytes": 25452, "bops": 76587008}
    for seed, accuracy in enumerate([0.82, 0.83, 0.87]):
        run = cifar_plan.Run("tiny", "LSQ", (2, 2), seed, 8, 0.03)
        more = {"measured_on": "test", "float_accuracy": 0.872, **costs}
        store.write(path, run.name, {**result(run, accuracy), **more})
    tuned = cifar_plan.Run("tiny", "LSQ", (2, 2), 100, 8, 0.1)
    more = {"measured_on": "held-out", **costs}
    store.write(path, tuned.name, {**result(tuned, None), **more})
    made = cifar_report.tables(path)
    _, _, given, row = made["cifar, tiny"].splitlines()
    assert [cell.strip() for cell in given.split("|")[1:4]] == [
        "float, as given", "—", "87.20"
    ]  # fmt: skip
    # Deviation 2.6458; 4.3027 is Student's t of two degrees of freedom.
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "LSQ W2A2", "3", "84.00 ± 6.57", "-3.20", "—", "25,452", "77", "0.03", "1 of 3"
    ]  # fmt: skip
    assert made["cifar, tuning of tiny"].splitlines()[-1].split() == [
        "|", "LSQ", "|", "float,", "as", "given", "|", "diverged", "|"
    ]  # fmt: skip
    sizes = {"float": 318292, "bits": {"W2A2": {"bytes": {"packed": 34896}}}}
    files = tmp_path / "tiny.json"
    files.write_text(json.dumps({"networks": {"ResNet-8": sizes}}))
    _, _, given, row = cifar_report.short_table(path, files).splitlines()
    assert [cell.strip() for cell in given.split("|")[1:-1]] == [
        "float32, as given", "87.20", "318,292", "—"
    ]  # fmt: skip
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "W2A2", "84.00 ± 6.57 (3)", "34,896", "77"
    ]  # fmt: skip
    ratios = {"DoReFa W2A2": 1.1, "LSQ W2A2": 1.25, "recipes.low_bit W2A2": 2.5}
    ratios["joint distillation"] = 2.0
    steps = tmp_path / "steps.json"
    steps.write_text(
        json.dumps(
            {
                "ratios": [
                    {"step": name, "relative to": "float", "median": ratio}
                    for name, ratio in ratios.items()
                ]
            }
        )
    )
    (figure,) = cifar_report.plots(path, steps).values()
    # Eight epochs of steps that take 1.25 times as long.
    for axes, cost in zip(figure.axes, (25.452, 76.587008, 10.0), strict=True):
        (points,) = axes.containers
        np.testing.assert_allclose(points[0].get_xydata(), [[cost, 84.0]])
        heights = [line.get_ydata()[0] for line in axes.lines[-2:]]
        assert heights == pytest.approx([85.0, 87.2])


def pytorch_weights():
    """Random weights of a ResNet-20 of PyTorch's names, of width 2."""
    rng = np.random.default_rng(0)
    found = {}

    def conv(name, norm, outputs, inputs):
        found[f"{name}.weight"] = rng.normal(size=(outputs, inputs, 3, 3)) / 3
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{part}"] = rng.uniform(0.5, 1.5, outputs)

    conv("conv1", "bn1", 2, 3)
    for stage, width in ((1, 2), (2, 4), (3, 8)):
        for index in range(3):
            name = f"layer{stage}.{index}"
            inputs = width // 2 if stage > 1 and index == 0 else width
            conv(f"{name}.conv1", f"{name}.bn1", width, inputs)
            conv(f"{name}.conv2", f"{name}.bn2", width, width)
    found["linear.weight"] = rng.normal(size=(10, 8))
    found["linear.bias"] = rng.normal(size=10)
    return {name: weight.astype(np.float32) for name, weight in found.items()}


def by_hand(weights, x):
    """The network in TensorFlow's operations, as it stands in PyTorch."""

    def conv(x, name, norm, strides=1):
        kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
        x = tf.nn.conv2d(x, kernel, strides, [[0, 0], [1, 1], [1, 1], [0, 0]])
        gamma, beta, mean, variance = (
            weights[f"{norm}.{part}"]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    x = tf.nn.relu(conv(x, "conv1", "bn1"))
    for stage in (1, 2, 3):
        for index in range(3):
            name = f"layer{stage}.{index}"
            halves = stage > 1 and index == 0
            y = tf.nn.relu(conv(x, f"{name}.conv1", f"{name}.bn1", 1 + halves))
            y = conv(y, f"{name}.conv2", f"{name}.bn2")
            if halves:
                x = x[:, ::2, ::2]
                zeros = tf.zeros_like(x)[..., : x.shape[-1] // 2]
                x = tf.concat([zeros, x, zeros], -1)
            x = tf.nn.relu(x + y)
    x = tf.reduce_mean(x, (1, 2))
    return x @ weights["linear.weight"].T + weights["linear.bias"]


def test_resnet20_is_pytorchs(tmp_path):
    weights = pytorch_weights()
    np.savez(tmp_path / "cifar10_resnet20_float.npz", **weights)
    model = networks.NETWORKS["resnet20"].load(tmp_path)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    outputs = by_hand(weights, images)
    assert np.std(outputs) > 0.1
    np.testing.assert_allclose(model(images), outputs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Records of CIFAR-10 and CIFAR-100, and a network of MLPerf's layer names."""
    folder = tmp_path_factory.mktemp("cifar")
    for name, classes, more in (
        ("cifar10", 10, {}),
        ("cifar100", 100, {"coarse_label": 0}),
    ):
        images = {
            split: [
                {**example, **more, "id": f"{split}_{index:05d}"}
                for index, example in enumerate(
                    tfds_files.images_with_labels(count, classes, (32, 32, 3), seed)
                )
            ]
            for split, count, seed in (("train", 200, 0), ("test", 50, 1))
        }
        tfds_files.write(name, folder / "data", images)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(4, 3, strides=4, name="conv2d"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(4, 3, name="conv2d_1"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(10, activation="softmax", name="dense"),
        ]
    )
    (folder / "models").mkdir()
    model.save(folder / "models" / "mlperf_tiny_ic_resnet8.h5")
    np.savez(folder / "models" / "cifar10_resnet20_float.npz", **pytorch_weights())
    return folder


def perform(run, files, folder, **changes):
    """Trains in `folder`; what was written."""
    run = dataclasses.replace(run, **changes)
    arguments = (str(files / "data"), files / "models", folder / "checkpoints")
    cifar_run.perform(run, *arguments, folder / "results.jsonl")
    return store.read(folder / "results.jsonl")[run.name]


@pytest.mark.parametrize(
    ("method", "bits", "seed"),
    [
        ("float", None, 0),
        ("plain", (2, 2), 0),
        (cifar_plan.RECIPE, (4, 4), 0),
    ],
)
@pytest.mark.filterwarnings("ignore::tf_lowbit.QuantizationWarning")
def test_a_run_trains_and_tells_what_it_cost(files, tmp_path, method, bits, seed):
    run = cifar_plan.Run("tiny", method, bits, seed, 1, 0.01)
    found = perform(run, files, tmp_path)
    assert 0.0 <= found["accuracy"] <= 1.0
    assert 0.0 <= found["float_accuracy"] <= 1.0
    assert found["measured_on"] == "test"
    weights = 4 * 3 * 9 + 4 * 4 * 9 + 10 * 144
    edges = 4 * 3 * 9 + 10 * 144
    low = (weights - edges) * (32 if bits is None else bits[0])
    assert found["weight_bytes"] >= (edges * (32 if bits is None else 8) + low) / 8
    assert found["weight_bytes"] < 4.5 * weights
    assert found["cpu_seconds_per_epoch"] > 0
    assert not (tmp_path / "checkpoints").exists()


def test_the_tuning_starts_from_weights_that_have_not_seen_its_images(files, tmp_path):
    start = cifar_plan.Run("tiny", cifar_plan.START, None, TUNING_SEED, 2, 0.1)
    trained = perform(start, files, tmp_path)
    assert trained["measured_on"] == "held-out"
    run = cifar_plan.Run("tiny", "plain", (2, 2), TUNING_SEED, 1, 0.01)
    tuned = perform(run, files, tmp_path)
    assert tuned["measured_on"] == "held-out"
    assert tuned["float_accuracy"] == pytest.approx(trained["accuracy"])
    # It does not begin with the given weights.
    given = networks.NETWORKS["mlperf_resnet8"].load(files / "models").get_weights()
    with np.load(tmp_path / "starts" / "mlperf_resnet8-held-out.npz") as file:
        own = list(file.values())
    assert [w.shape for w in own] == [w.shape for w in given]
    assert np.abs(own[0] - given[0]).max() > 0.01


@pytest.mark.parametrize("method", ["QKeras", "Larq DoReFa"])
def test_networks_of_peers_train_where_they_are_installed(files, tmp_path, method):
    pytest.importorskip(cifar_plan.METHODS[method].peer)
    found = perform(cifar_plan.Run("tiny", method, (2, 2), 0, 1, 0.01), files, tmp_path)
    assert 0 <= found["accuracy"] <= 1
    # Kernels, biases and batch normalization, in float.
    parts = 4 * 3 * 9 + 4 * 4 * 9 + 10 * 144, 4 + 4 + 10, 2 * 4 * 4
    assert found["weight_bytes"] == 4 * sum(parts)


@pytest.mark.filterwarnings("ignore::tf_lowbit.QuantizationWarning")
def test_stages_and_a_teacher_start_from_a_network_that_is_trained_here(
    files, tmp_path
):
    start = perform(cifar_plan.start_run("claims", False), files, tmp_path, epochs=1)
    assert start["measured_on"] == "test"
    for method, epochs in (("TS", 2), ("JKD", 1)):
        run = cifar_plan.Run("claims", method, (2, 2), 1, epochs, 0.01)
        found = perform(run, files, tmp_path)
        assert found["float_accuracy"] == pytest.approx(start["accuracy"])
        assert 0 <= found["accuracy"] <= 1


def test_images_are_normalized_as_the_network_reads_them(files, tmp_path):
    run = cifar_plan.Run("resnet20", "float", None, 0, 1, 0.01)
    assert perform(run, files, tmp_path)["weight_bytes"] == 4 * sum(
        weight.size for weight in pytorch_weights().values()
    )
    network = networks.NETWORKS["resnet20"]
    data = cifar_run.load_data("cifar10", network, run, str(files / "data"), 0, 0)
    images = np.concatenate([x for x, _ in data.test])
    # Uniform pixels: 127.5 on average, where the scale is 255.
    means = (0.5 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(images.mean((0, 1, 2)), means, atol=0.05)


def test_a_run_that_was_interrupted_goes_on(files, tmp_path, monkeypatch):
    run = cifar_plan.Run("tiny", "plain", (2, 2), 0, 2, 0.01)
    whole = perform(run, files, tmp_path / "whole")

    class Interrupted(cifar_run.EpochClock):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt
            super().on_epoch_begin(epoch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(cifar_run, "EpochClock", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            perform(run, files, tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoints").exists()
    resumed = perform(run, files, tmp_path / "cut")
    assert resumed["loss"] == whole["loss"]
    assert resumed["accuracy"] == whole["accuracy"]
