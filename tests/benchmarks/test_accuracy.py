import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy import report as accuracy_report
from benchmarks.accuracy import rows as accuracy_rows
from benchmarks.accuracy import tuning
from benchmarks.common import store
from tests.benchmarks.results import SETTINGS, low_bit, put
from tests.examples import programs


def test_a_torn_line_is_named(tmp_path):
    run = low_bit("plain", 0)
    put(tmp_path, run, 0.8)
    with open(tmp_path / "runs.jsonl", "a") as file:
        file.write('{"accuracy": 0.')
    with pytest.raises(ValueError, match=r"must be JSON: .*line 2 of .*runs\.jsonl"):
        sweep.is_done(tmp_path, run, SETTINGS)


def test_the_tuning_goes_on_until_the_best_rate_stands_between_others(tmp_path):
    best = {"SP": 0.3, "JKD": 0.01, "PQ": 1.0, "LSQ": 0.003}
    tried = 0
    while runs := tuning.left(tmp_path, SETTINGS):
        tried += len(runs)
        for run in runs:
            steps = tuning.RATES.index(run.learning_rate) - tuning.RATES.index(
                best.get(run.method, 0.1)
            )
            # TS diverges above its best rate.
            is_lost = run.method == "TS" and steps > 0
            put(tmp_path, run, None if is_lost else 0.9 - 0.1 * abs(steps))
    rates = tuning.rates(tmp_path, SETTINGS)
    # Every other method is tuned to 0.1, at both bit-widths.
    for bits in ((2, 2), (4, 4)):
        for method in sweep.METHODS:
            assert rates.pop((method, bits)) == best.get(method, 0.1)
        # An ablation has the rate of its method, if it is not about the rate.
        assert {n: rate for (n, b), rate in rates.items() if b == bits} == {
            "JKD, rate 0.1": 0.1,
            "SP+JKD, rate 0.1": 0.1,
            "JKD, slow teacher": 0.01,
            "JKD, teacher by labels": 0.01,
            "JKD, frozen teacher": 0.01,
            "JKD, frozen teacher, no labels": 0.01,
            "JKD in three phases": 0.01,
            "SP from 0.8": 0.3,
            "LSQ, least error": 0.003,
            "LSQ with PQ, least error": 0.003,
            "LSQ with PQ, measured anew": 0.003,
            "PACT with decay": 0.1,
            "LSQ with SP": 0.003,
            "LSQ with JKD": 0.3,
            "LSQ with JKD, rate 0.1": 0.1,
            "LSQ with freezing": 0.003,
            "plain, from scratch": 0.1,
            "plain, abrupt": 0.1,
            "TS+PQ, abrupt": 0.1,
            "LSQ, mixed bits": 0.003,
            "LSQ, mixed weights": 0.003,
            **dict.fromkeys(sweep.ALL_LAYERS, 0.003),
        }
    assert rates["float", None] == 0.1
    # 0.03, 0.1 and 0.3 for six and float; one or two more for the others.
    # Each with two seeds; the low-bit ones at two bit-widths.
    assert tried == 2 * (2 * (6 * 3 + (4 + 4 + 4 + 4)) + 3)
    lines = accuracy_report.tables(tmp_path)["tuning"].splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]]
    cells = {name: row for name, *row in cells}
    for bits in ("W2A2", "W4A4"):
        row = ["—", "—", "70.00", "80.00", "**90.00**", "80.00"]
        assert cells[f"SP, {bits}"] == row
        row = ["—", "—", "80.00", "**90.00**", "diverged", "—"]
        assert cells[f"TS, {bits}"] == row
    assert cells["float"] == ["—", "—", "80.00", "**90.00**", "80.00", "—"]
    # Held-out accuracies are in no other table.
    assert accuracy_rows.rows(tmp_path) == {}


def test_a_rate_is_judged_by_all_seeds_of_the_tuning(tmp_path):
    runs = tuning.runs_of("preact_resnet8", "SP", (2, 2), SETTINGS)
    for rate, accuracies in {0.03: (0.8, 0.9), 0.1: (0.9, None), 0.3: (0.9,)}.items():
        for run, accuracy in zip(runs[rate], accuracies, strict=False):
            put(tmp_path, run, accuracy)
    scores = tuning.scores_of(tmp_path, runs)
    # At 0.1 one diverged; of 0.3 one is not done.
    assert scores == {0.03: pytest.approx(0.85), 0.1: None}


def test_of_rates_as_good_as_the_best_the_lowest_is_taken():
    close = {0.03: 0.890, 0.1: 0.8975, 0.3: 0.9, 1.0: None}
    assert tuning.chosen_rate("SP", close) == 0.1
    assert tuning.chosen_rate("SP", {**close, 0.1: 0.8965}) == 0.3
    assert tuning.chosen_rate("SP", {0.03: None, 0.1: None}) == 0.03
    # What the others are measured by has its best.
    assert tuning.chosen_rate("float", close) == 0.3
    # The search goes on at the best itself.
    assert tuning.next_rates({0.03: 0.89, 0.1: 0.899, 0.3: 0.9}) == [1.0]


def test_others_take_the_rates_of_the_nearer_bits():
    at = {bits: tuning.tuned_at(bits) for bits in ((2, 2), (1, 2), (3, 3), (4, 4))}
    assert at == {(2, 2): (2, 2), (1, 2): (2, 2), (3, 3): (4, 4), (4, 4): (4, 4)}
    assert tuning.tuned_at(None) is None


def test_a_run_at_another_rate_is_not_done(tmp_path):
    run = low_bit("SP", 0)
    put(tmp_path, run, 0.8)
    assert sweep.is_done(tmp_path, run, SETTINGS)
    other = dataclasses.replace(run, learning_rate=0.1)
    assert not sweep.is_done(tmp_path, other, SETTINGS)


def test_rates_are_not_guessed(tmp_path):
    with pytest.raises(ValueError, match=r"must have been tuned\. Received: no result"):
        tuning.rates(tmp_path, SETTINGS)


def test_all_runs_of_a_seed_start_and_are_measured_alike():
    every = [run for runs in sweep.phases(SETTINGS).values() for run in runs]
    names = [run.name for run in every]
    # Plain training at the same length is asked for by one phase only.
    assert len(set(names)) == len(names)
    starts = {(r.network, r.seed) for r in every if r.is_start}
    assert {(r.network, r.seed) for r in every} == starts
    for run in every:
        assert run.is_held_out == (run.seed in sweep.TUNING_SEEDS)
        if run.purpose == "equal":
            assert run.epochs == SETTINGS.epochs
        if run.purpose == "per_stage" and run.method not in ("plain", sweep.FLOAT):
            assert run.epochs == SETTINGS.epochs * sweep.LENGTHS[run.method]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Folder and outputs of a tiny sweep, run twice."""
    folder = tmp_path_factory.mktemp("sweep")
    command = [
        sys.executable,
        *("-m", "benchmarks.accuracy"),
        *("--dataset=digits", "--limit=40", "--width=8", "--float_epochs=1"),
        *("--seeds=1", "--dear_seeds=1", "--phases=float", "--results_dir=results"),
    ]
    done = [
        subprocess.run(
            command,
            cwd=folder,
            env=programs.environment(),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        for _ in range(2)
    ]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    return folder / "results", [d.stdout for d in done]


def test_the_same_command_goes_on(swept):
    folder, shown = swept
    assert "float: 3 runs, 3 of them to do" in shown[0]
    assert "float: 3 runs, 0 of them to do" in shown[1]
    assert {path.name for path in folder.rglob("*")} == {
        "runs.jsonl",
        "starts-preact_resnet8.npz",
    }
    assert set(store.read(folder / "runs.jsonl")) == {
        f"preact_resnet8/float/float-1epochs-seed{seed}" for seed in (0, 100, 101)
    }
    for seed in (0, 100, 101):
        assert sweep.read_start(folder, "preact_resnet8", seed)


def test_a_file_says_how_it_was_made(swept):
    folder, _ = swept
    results = store.read(folder / "runs.jsonl")
    found = results["preact_resnet8/float/float-1epochs-seed0"]
    assert found["measured_on"] == "test"
    assert 0 <= found["accuracy"] <= 1
    assert len(found["training_loss"]) == found["epochs"] == 1
    assert found["settings"]["dataset"] == "digits"
    assert found["machine"]["onednn"] == os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1")
    assert found["versions"]["tensorflow"]


def test_runs_start_from_the_float_weights_of_their_seed(swept, tmp_path):
    folder, _ = swept
    start = sweep.read_start(folder, "preact_resnet8", 0)
    # At a vanishing learning rate the float network stays as it started.
    script = """
import dataclasses, sys, pathlib
import numpy as np
from benchmarks.accuracy import plan as sweep, run as accuracy_run
settings = sweep.Settings(dataset="digits", limit=40, float_epochs=1)
folder = pathlib.Path(sys.argv[1])
run = sweep.Run("equal", "preact_resnet8", "SP+JKD", (2, 2), 0, 2, 0.03)
from tf_lowbit import models
from examples import experiment
data = accuracy_run.load_data(run, settings, None)
model = models.get(run.network, classes=10, input_shape=data.input_shape, width=8)
accuracy_run.load_start(model, folder, run)
np.savez(sys.argv[2], **{w.name: w.numpy() for w in model.weights})
accuracy_run.perform(run, settings, folder)
changed = sweep.Run("ablation", "preact_resnet8", "", (2, 2), 0, 4, 0.03)
for method in sys.argv[3:]:
    experiment.quiet()
    network = models.get(run.network, classes=10, input_shape=data.input_shape, width=8)
    one = dataclasses.replace(changed, method=method)
    trainer, _, _ = accuracy_run.prepared(network, one, settings, data)
    teacher = trainer.teacher_optimizer
    precision = trainer.get_config()["stochastic_precision"]
    rate = teacher and teacher._learning_rate
    print(f"{method}:", trainer.teacher is not None,
        rate and (rate.rate.initial_learning_rate, rate.steps),
        precision and precision["config"]["start"])
for method in ("plain", *sweep.STARTS):
    network = models.get(run.network, classes=10, input_shape=data.input_shape, width=8)
    one = dataclasses.replace(changed, purpose="start", method=method)
    is_from_float = accuracy_run.starts_from_float(one)
    if is_from_float:
        accuracy_run.load_start(network, folder, run)
    names = {layer.name: layer for layer in network.layers if "_bn" in layer.name}
    before = {name: layer.gamma.numpy() for name, layer in names.items()}
    trained, stages, _ = accuracy_run.prepared(network, one, settings, data)
    norms = {
        name: layer for layer in getattr(trained, "student", trained).layers
        if (name := layer.name.removeprefix("quant_")) in names
    }
    assert len(norms) == len(names) == 7
    # Calibrating takes what lies beyond the clip into the normalisations.
    is_same = all(np.array_equal(before[n], layer.gamma) for n, layer in norms.items())
    print(f"{method}:", is_from_float, {s.warmup for s in stages}, is_same)
# Hundreds of evaluations take more time than to trace them.
mixed_rules = accuracy_run.mixed_rules
def traced(*arguments):
    tf.config.run_functions_eagerly(False)
    rules = mixed_rules(*arguments)
    tf.config.run_functions_eagerly(True)
    return rules
accuracy_run.mixed_rules = traced
low = [*sweep.MIXED, *sweep.ALL_LAYERS]
for purpose, method in [("equal", "LSQ"), *(("mixed", name) for name in low)]:
    one = dataclasses.replace(run, purpose=purpose, method=method)
    accuracy_run.perform(one, settings, folder)
for purpose, method, bits in (("equal", "plain", (2, 2)), ("float", "float", None)):
    run = sweep.Run(purpose, "preact_resnet8", method, bits, 0, 2, 1e30)
    try:
        accuracy_run.perform(run, settings, folder)
    except ValueError as error:
        print(f"{purpose}: {error}")
"""
    loaded = tmp_path / "loaded.npz"
    # A few steps take less time than tracing them.
    eagerly = programs.WITHOUT_TRACING
    # One for each thing that a method can change.
    changed = ("JKD, slow teacher", "JKD, frozen teacher", "SP from 0.8")
    changed += ("JKD in three phases",)
    done = subprocess.run(
        [sys.executable, "-c", eagerly + script, str(folder), str(loaded), *changed],
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(loaded) as file:
        assert set(file.files) == set(start)
        for name, value in start.items():
            np.testing.assert_array_equal(file[name], value)
    run = sweep.Run("equal", "preact_resnet8", "SP+JKD", (2, 2), 0, 2, 0.03)
    result = sweep.read(folder, run)
    assert result["stages"] == [[2, 2, 2]]
    assert result["warmup"] == 0.1
    assert 0 <= result["recalibrated_accuracy"] <= 1
    assert result["bops"] > 0
    assert len(result["training_loss"]) == 2
    # A low-bit training that diverges is a result; nothing starts from a float one.
    lost = sweep.Run("equal", "preact_resnet8", "plain", (2, 2), 0, 2, 1e30)
    result = sweep.read(folder, lost)
    assert result["accuracy"] is None
    assert "must stay finite" in result["diverged"]
    assert 0 <= result["wall_seconds"] < 600
    assert "float: The training loss must stay finite" in done.stdout
    assert "equal: " not in done.stdout
    # The teacher, its rate and steps of warmup; where stochastic precision starts.
    assert "JKD, slow teacher: True (0.006, 0.4) None\n" in done.stdout
    assert "JKD, frozen teacher: True None None\n" in done.stdout
    # One of its four epochs, of one step each.
    assert "JKD in three phases: True (0.03, 0.1) None\n" in done.stdout
    assert "SP from 0.8: False None 0.8\n" in done.stdout
    # From the float weights; the warmup; whether the normalisations are as they were.
    assert "plain: True {0.1} False\n" in done.stdout
    assert "plain, from scratch: False {0.1} False\n" in done.stdout
    assert "plain, abrupt: True {0.0} True\n" in done.stdout
    assert "TS+PQ, abrupt: True {0.0} True\n" in done.stdout
    # Trained at bits of which some differ, within the cost of uniform ones.
    uniform = sweep.read(folder, dataclasses.replace(run, method="LSQ"))
    for method, costs in (
        ("LSQ, mixed bits", ["weight_bytes", "bops"]),
        ("LSQ, mixed weights", ["weight_bytes"]),
    ):
        mixed = dataclasses.replace(run, purpose="mixed", method=method)
        mixed = sweep.read(folder, mixed)
        assert all(mixed[cost] <= uniform[cost] for cost in costs)
        quantized = [bits for bits in mixed["layer_bits"].values() if [32] not in bits]
        assert len({str(bits) for bits in quantized}) > 1
    assert {str(activations) for _, activations in quantized} == {"[2]"}
    # Nothing is left in float; again some differ, within the cost of uniform ones.
    bare, mixed, safe = (
        sweep.read(folder, dataclasses.replace(run, purpose="mixed", method=method))
        for method in sweep.ALL_LAYERS
    )
    assert {str(bits) for bits in bare["layer_bits"].values()} == {"[[2], [2]]"}
    assert all(mixed[cost] <= bare[cost] for cost in ("weight_bytes", "bops"))
    assert len({str(bits) for bits in mixed["layer_bits"].values()}) > 1
    assert not any([32] in bits for bits in mixed["layer_bits"].values())
    assert safe["layer_bits"].pop("stem") == [[8], [8]]
    assert safe["layer_bits"].pop("head") == [[8], [8]]
    assert {str(bits) for bits in safe["layer_bits"].values()} == {"[[2], [2]]"}
    for name, value in sweep.read_start(folder, "preact_resnet8", 0).items():
        np.testing.assert_array_equal(start[name], value)
