import dataclasses
import json

import numpy as np
import pytest

from benchmarks.cifar import plan as cifar_plan
from benchmarks.cifar import report as cifar_report
from benchmarks.cifar import run as cifar_run
from benchmarks.common import store
from tests.datasets import tfds_files
from tf_lowbit.compat import keras

# What a run says to nobody must be heard by other tests.
pytestmark = pytest.mark.usefixtures("_loud_again")
TINY = cifar_plan.EXPERIMENTS["tiny"]


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
        "LSQ W2A2", "3", "84.00 ± 6.57", "-3.20", "1 of 3", "25,452", "77", "0.03"
    ]  # fmt: skip
    assert made["cifar, tuning"].splitlines()[-1].split() == [
        "|", "LSQ", "|", "diverged", "|"
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
    (figure,) = cifar_report.plots(path).values()
    for axes, cost in zip(figure.axes, (25.452, 76.587008), strict=True):
        (points,) = axes.containers
        np.testing.assert_allclose(points[0].get_xydata(), [[cost, 84.0]])
        heights = [line.get_ydata()[0] for line in axes.lines[-2:]]
        assert heights == pytest.approx([85.0, 87.2])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Records of CIFAR-10, and a network of MLPerf's layer names."""
    folder = tmp_path_factory.mktemp("cifar")
    images = {
        split: [
            {**example, "id": f"{split}_{index:05d}"}
            for index, example in enumerate(
                tfds_files.images_with_labels(count, 10, (32, 32, 3), seed)
            )
        ]
        for split, count, seed in (("train", 200, 0), ("test", 50, 1))
    }
    tfds_files.write("cifar10", folder / "data", images)
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
    return folder


def perform(run, files, folder):
    """Trains in `folder`; what was written."""
    arguments = (str(files / "data"), files / "models", folder / "checkpoints")
    cifar_run.perform(run, *arguments, folder / "results.jsonl")
    return store.read(folder / "results.jsonl")[run.name]


@pytest.mark.parametrize(
    ("method", "bits", "seed"),
    [
        ("float", None, 0),
        ("plain", (2, 2), 100),
        (cifar_plan.RECIPE, (4, 4), 0),
    ],
)
@pytest.mark.filterwarnings("ignore::tf_lowbit.QuantizationWarning")
def test_a_run_trains_and_tells_what_it_cost(files, tmp_path, method, bits, seed):
    run = cifar_plan.Run("tiny", method, bits, seed, 1, 0.01)
    found = perform(run, files, tmp_path)
    assert 0.0 <= found["accuracy"] <= 1.0
    assert 0.0 <= found["float_accuracy"] <= 1.0
    assert found["measured_on"] == ("held-out" if seed == 100 else "test")
    weights = 4 * 3 * 9 + 4 * 4 * 9 + 10 * 144
    edges = 4 * 3 * 9 + 10 * 144
    low = (weights - edges) * (32 if bits is None else bits[0])
    assert found["weight_bytes"] >= (edges * (32 if bits is None else 8) + low) / 8
    assert found["weight_bytes"] < 4.5 * weights
    assert found["cpu_seconds_per_epoch"] > 0
    assert not (tmp_path / "checkpoints").exists()


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
