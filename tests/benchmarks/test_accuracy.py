import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.examples import programs

sys.path.insert(0, str(programs.ROOT / "benchmarks"))

import accuracy_report
import sweep

SETTINGS = sweep.Settings()


def put(folder, run, accuracy, cpu_seconds=100.0, settings=SETTINGS, **more):
    """Writes a run's file as the sweep does, with made-up figures."""
    sweep.write(
        folder / run.path,
        {
            **{f.name: getattr(run, f.name) for f in dataclasses.fields(run)},
            "measured_on": "held-out" if run.is_held_out else "test",
            "accuracy": accuracy,
            "cpu_seconds": cpu_seconds,
            "weight_bytes": 1000,
            "bops": 10**6,
            "diverged": None if accuracy is not None else "a loss of nan",
            "settings": settings.as_json(),
            **more,
        },
    )


def low_bit(method, seed, bits=(2, 2), purpose="equal", epochs=SETTINGS.epochs):
    return sweep.Run(purpose, "preact_resnet8", method, bits, seed, epochs, 0.03)


@pytest.fixture
def made_up(tmp_path):
    """Three seeds of two methods; differences of 1, 2 and 3 points."""
    for seed, (plain, other) in enumerate([(0.80, 0.81), (0.82, 0.84), (0.81, 0.84)]):
        anew = plain + 0.001 * (seed + 1)
        put(tmp_path, low_bit("plain", seed), plain, recalibrated_accuracy=anew)
        put(tmp_path, low_bit("SP", seed), other, 110.0 + seed)
    return tmp_path


def test_statistics_are_those_computed_by_hand(made_up):
    rows = accuracy_report.rows(made_up)
    plain, other = (
        rows["equal", "preact_resnet8", method, (2, 2), 4] for method in ("plain", "SP")
    )
    assert plain.mean == pytest.approx(81.0)
    # Deviations -1, 1, 0: variance 1, over the root of 3.
    assert plain.error == pytest.approx(1 / math.sqrt(3))
    mean, half = accuracy_report.paired(other.accuracies, plain.accuracies)
    assert mean == pytest.approx(2.0)
    # Student's t for 2 degrees of freedom at 97.5 %: 4.303.
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert accuracy_report.cost_ratio(other, plain) == pytest.approx(1.11)


def test_pairs_are_of_the_same_seed(made_up):
    put(made_up, low_bit("TS", 1), 0.83)
    put(made_up, low_bit("TS", 7), 0.10)
    rows = accuracy_report.rows(made_up)
    row, plain = (
        rows["equal", "preact_resnet8", method, (2, 2), 4] for method in ("TS", "plain")
    )
    mean, half = accuracy_report.paired(row.accuracies, plain.accuracies)
    assert mean == pytest.approx(1.0)
    assert math.isnan(half)


def test_the_table_says_what_the_files_say(made_up):
    table = accuracy_report.tables(made_up)["W2A2"]
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    headers = ["method", "seeds", "accuracy, %", "against plain", "recalibrated", "CPU"]
    assert lines[0] == headers
    # By seed +0.1, +0.2, +0.3: 4.303 times 0.1 over the root of 3.
    recalibrated = "+0.20 [-0.05, +0.45]"
    assert lines[2] == ["plain", "3", "81.00 ± 0.58", "—", recalibrated, "1.00"]
    # Deviations -2, 1, 1: variance 3, over the root of 3.
    other = ["SP", "3", "83.00 ± 1.00", "+2.00 [-0.48, +4.48]", "—", "1.11"]
    assert lines[3] == other
    assert len(lines) == 4


def test_a_diverged_run_is_no_accuracy(made_up):
    put(made_up, low_bit("TS", 0), None)
    with pytest.raises(ValueError, match=r"must not diverge. Received: .*ts-w2a2"):
        accuracy_report.rows(made_up)


def test_other_settings_are_not_mixed_in(made_up):
    other = dataclasses.replace(SETTINGS, width=16)
    put(made_up, low_bit("TS", 0), 0.9, settings=other)
    with pytest.raises(ValueError, match="must have the same settings"):
        accuracy_report.rows(made_up)
    with pytest.raises(ValueError, match="choose another --results_dir"):
        sweep.is_done(made_up, low_bit("TS", 0), SETTINGS)


def test_a_torn_file_is_named(tmp_path):
    run = low_bit("plain", 0)
    (tmp_path / run.path).parent.mkdir(parents=True)
    (tmp_path / run.path).write_text('{"accuracy": 0.')
    with pytest.raises(ValueError, match=r"must be JSON: .*plain-w2a2-4epochs-seed0"):
        sweep.is_done(tmp_path, run, SETTINGS)


def test_the_tuning_goes_on_until_the_best_rate_stands_between_others(tmp_path):
    best = {"SP": 0.3, "JKD": 0.01, "PQ": 1.0, "LSQ": 0.003}
    tried = 0
    while runs := sweep.next_of_tuning(tmp_path, SETTINGS):
        tried += len(runs)
        for run in runs:
            steps = sweep.RATES.index(run.learning_rate) - sweep.RATES.index(
                best.get(run.method, 0.1)
            )
            # TS diverges above its best rate.
            is_lost = run.method == "TS" and steps > 0
            put(tmp_path, run, None if is_lost else 0.9 - 0.1 * abs(steps))
    rates = sweep.tuned(tmp_path, SETTINGS)
    expected = {**dict.fromkeys([*sweep.METHODS, "float"], 0.1), **best}
    assert {method: rates.pop(method) for method in expected} == expected
    # An ablation has the rate of its method, if it is not about the rate.
    assert rates == {
        "JKD, rate 0.1": 0.1,
        "SP+JKD, rate 0.1": 0.1,
        "JKD, slow teacher": 0.01,
        "JKD, teacher by labels": 0.01,
        "JKD, frozen teacher": 0.01,
        "SP from 0.8": 0.3,
        "LSQ with PQ": 0.003,
        "LSQ with SP": 0.003,
        "LSQ with JKD": 0.003,
        "LSQ, mixed bits": 0.003,
    }
    # 0.03, 0.1 and 0.3 for seven; one or two more for the others.
    # Each with two seeds.
    assert tried == 2 * (7 * 3 + (4 + 4 + 4 + 4))
    lines = accuracy_report.tables(tmp_path)["tuning"].splitlines()
    cells = {line.split()[1]: line.replace("|", "").split()[1:] for line in lines[2:]}
    assert cells["SP"] == ["—", "—", "70.00", "80.00", "**90.00**", "80.00"]
    assert cells["TS"] == ["—", "—", "80.00", "**90.00**", "diverged", "—"]
    # Held-out accuracies are in no other table.
    assert accuracy_report.rows(tmp_path) == {}


def test_a_rate_is_judged_by_all_seeds_of_the_tuning(tmp_path):
    runs = sweep.tuning_runs("preact_resnet8", "SP", SETTINGS)
    for rate, accuracies in {0.03: (0.8, 0.9), 0.1: (0.9, None), 0.3: (0.9,)}.items():
        for run, accuracy in zip(runs[rate], accuracies, strict=False):
            put(tmp_path, run, accuracy)
    scores = sweep.tuning_scores(tmp_path, runs)
    # At 0.1 one diverged; of 0.3 one is not done.
    assert scores == {0.03: pytest.approx(0.85), 0.1: None}


def test_a_run_at_another_rate_is_not_done(tmp_path):
    run = low_bit("SP", 0)
    put(tmp_path, run, 0.8)
    assert sweep.is_done(tmp_path, run, SETTINGS)
    other = dataclasses.replace(run, learning_rate=0.1)
    assert not sweep.is_done(tmp_path, other, SETTINGS)


def test_rates_are_not_guessed(tmp_path):
    with pytest.raises(ValueError, match=r"must have been tuned\. Received: no file"):
        sweep.tuned(tmp_path, SETTINGS)


def test_all_runs_of_a_seed_start_and_are_measured_alike():
    every = [run for runs in sweep.phases(SETTINGS).values() for run in runs]
    names = [run.path for run in every]
    # Plain training at the same length is asked for by one phase only.
    assert len(set(names)) == len(names)
    starts = {(r.network, r.seed) for r in every if r.is_start}
    assert {(r.network, r.seed) for r in every} == starts
    for run in every:
        assert run.is_held_out == (run.seed in sweep.TUNING_SEEDS)
        if run.purpose == "equal":
            assert run.epochs == SETTINGS.epochs
        if run.purpose == "per_stage" and run.method != "plain":
            assert run.epochs == SETTINGS.epochs * sweep.LENGTHS[run.method]


def test_longer_trainings_stand_beside_plain_ones_as_long(made_up):
    for method, epochs, accuracy in (
        *(("TS", 8, 0.85), ("plain", 8, 0.84), ("plain", 16, 0.86)),
        *(("TS+PQ", 16, 0.87), ("JKD", 16, 0.88)),
    ):
        run = low_bit(method, 0, purpose="per_stage", epochs=epochs)
        put(made_up, run, accuracy, 100.0 * epochs / 4)
    lines = accuracy_report.tables(made_up)["per stage"].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    # Plain training of four epochs has 80 % with that seed.
    assert cells == [
        ["plain", "8", "1", "84.00", "+4.00", "—", "2.00"],
        ["TS", "8", "1", "85.00", "+5.00", "+1.00", "2.00"],
        ["plain", "16", "1", "86.00", "+6.00", "—", "4.00"],
        ["TS+PQ", "16", "1", "87.00", "+7.00", "+1.00", "4.00"],
        ["JKD", "16", "1", "88.00", "+8.00", "+2.00", "4.00"],
    ]


def test_mixed_bits_stand_beside_uniform_ones_of_the_same_cost(made_up):
    for seed, (uniform, mixed) in enumerate([(0.80, 0.81), (0.82, 0.83)]):
        put(made_up, low_bit("LSQ", seed, (3, 3)), uniform)
        run = low_bit("LSQ, mixed bits", seed, (3, 3), "mixed")
        assert run.path.name == f"lsq-mixed-bits-w3a3-4epochs-seed{seed}.json"
        put(made_up, run, mixed, weight_bytes=990)
    lines = accuracy_report.tables(made_up)["mixed"].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["LSQ, W3A3", "2", "1000", "1.00", "81.00 ± 1.00", "—"],
        ["LSQ, mixed bits", "2", "990", "1.00", "82.00 ± 1.00", "+1.00 [+1.00, +1.00]"],
    ]


def test_wider_networks_stand_beside_their_own_float_network(made_up):
    wide = sweep.at_width("preact_resnet8", 16)
    assert sweep.name_and_width(wide, SETTINGS) == ("preact_resnet8", 16)
    assert sweep.name_and_width("preact_resnet8", SETTINGS) == ("preact_resnet8", 8)
    for seed, (full, plain) in enumerate([(0.90, 0.89), (0.91, 0.89), (0.92, 0.89)]):
        put(made_up, sweep.Run("equal", wide, "float", None, seed, 4, 0.1), full)
        put(made_up, dataclasses.replace(low_bit("plain", seed), network=wide), plain)
    lines = accuracy_report.tables(made_up)["widths"].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == ["8", "16"]
    assert cells[0][3:6] == ["—", "81.00 ± 0.58", "—"]
    # By seed -1, -2, -3: 4.303 times 1 over the root of 3.
    assert cells[1] == [
        *("16", "3", "1.0", "91.00 ± 0.58", "89.00 ± 0.00", "-2.00 [-4.48, +0.48]"),
        *("—", "—"),
    ]


def test_an_ablation_stands_beside_its_method(made_up):
    run = low_bit("SP from 0.8", 0, purpose="ablation")
    assert run.path.name == "sp-from-0.8-w2a2-4epochs-seed0.json"
    for seed, accuracy in enumerate([0.82, 0.84, 0.83]):
        run = dataclasses.replace(run, seed=seed)
        put(made_up, run, accuracy, 120.0)
    line = accuracy_report.tables(made_up)["ablations"].splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["SP from 0.8", "3", "83.00 ± 0.58"]
    # By seed +2, +2, +2 to plain; +1, 0, -1 to SP: 4.303 times 1 over the root of 3.
    assert cells[3] == "+2.00 [+2.00, +2.00]"
    assert cells[4] == "+0.00 [-2.48, +2.48]"
    assert cells[5] == "1.20"
    # The plot is of the methods.
    shown = accuracy_report.plots(made_up)["accuracy_cost.svg"].axes[0].texts
    assert "SP from 0.8" not in {text.get_text() for text in shown}


def test_plots_show_every_row(made_up):
    for method, accuracy in (("plain", 0.7), ("SP", 0.72)):
        put(made_up, low_bit(method, 0, bits=(1, 2)), accuracy)
    found = accuracy_report.plots(made_up)
    cost, bits = found["accuracy_cost.svg"].axes[0], found["accuracy_bits.svg"].axes[0]
    assert {text.get_text() for text in cost.texts} == {"plain", "SP"}
    assert len(cost.containers) == 2
    assert [c.get_label() for c in bits.containers] == ["plain", "SP"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Folder and outputs of a tiny sweep, run twice."""
    folder = tmp_path_factory.mktemp("sweep")
    command = [
        sys.executable,
        str(programs.ROOT / "benchmarks" / "accuracy.py"),
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
    assert {path.name for path in folder.rglob("*.*")} == {
        "float-1epochs-seed0.json",
        "float-1epochs-seed100.json",
        "float-1epochs-seed101.json",
        "seed0.npz",
        "seed100.npz",
        "seed101.npz",
    }


def test_a_file_says_how_it_was_made(swept):
    folder, _ = swept
    path = folder / "preact_resnet8" / "float" / "float-1epochs-seed0.json"
    found = json.loads(path.read_text())
    assert found["measured_on"] == "test"
    assert 0 <= found["accuracy"] <= 1
    assert len(found["training_loss"]) == found["epochs"] == 1
    assert found["settings"]["dataset"] == "digits"
    assert found["machine"]["onednn"] == os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1")
    assert found["versions"]["tensorflow"]


def test_runs_start_from_the_float_weights_of_their_seed(swept, tmp_path):
    folder, _ = swept
    with np.load(folder / "preact_resnet8" / "float" / "seed0.npz") as file:
        start = {name: file[name] for name in file.files}
    # At a vanishing learning rate the float network stays as it started.
    script = """
import dataclasses, sys, pathlib
sys.path.insert(0, sys.argv[1])
import accuracy_run, sweep, numpy as np
settings = sweep.Settings(dataset="digits", limit=40, float_epochs=1)
folder = pathlib.Path(sys.argv[2])
run = sweep.Run("equal", "preact_resnet8", "SP+JKD", (2, 2), 0, 2, 0.03)
from tf_lowbit import models
from examples import experiment
data = accuracy_run.load_data(run, settings, None)
model = models.get(run.network, classes=10, input_shape=data.input_shape, width=8)
accuracy_run.load_start(model, folder / sweep.start_file(run.network, 0))
np.savez(sys.argv[3], **{w.name: w.numpy() for w in model.weights})
accuracy_run.perform(run, settings, folder)
changed = sweep.Run("ablation", "preact_resnet8", "", (2, 2), 0, 4, 0.03)
for method in sys.argv[4:]:
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
costs = []
for purpose, method in (("equal", "LSQ"), ("mixed", "LSQ, mixed bits")):
    network = models.get(run.network, classes=10, input_shape=data.input_shape, width=8)
    one = dataclasses.replace(run, purpose=purpose, method=method)
    trainer, _, _ = accuracy_run.prepared(network, one, settings, data)
    costs.append(accuracy_run.tfl.cost(getattr(trainer, "student", trainer)))
uniform, mixed = costs
print("mixed within the budget:", mixed.weight_bytes <= uniform.weight_bytes,
    mixed.bops <= uniform.bops)
print("bits differ:", len({c.weight_bits + c.activation_bits for c in mixed.layers
    if c.weight_bits and 32 not in c.weight_bits}) > 1)
for purpose, method, bits in (("equal", "plain", (2, 2)), ("float", "float", None)):
    run = sweep.Run(purpose, "preact_resnet8", method, bits, 0, 2, 1e30)
    try:
        accuracy_run.perform(run, settings, folder)
    except ValueError as error:
        print(f"{purpose}: {error}")
"""
    loaded = tmp_path / "loaded.npz"
    # One for each thing that a method can change.
    changed = ("JKD, slow teacher", "JKD, frozen teacher", "SP from 0.8")
    done = subprocess.run(
        [sys.executable, "-c", script, str(programs.ROOT / "benchmarks"), str(folder),
         str(loaded), *changed],
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
    assert "SP from 0.8: False None 0.8\n" in done.stdout
    assert "mixed within the budget: True True\n" in done.stdout
    assert "bits differ: True\n" in done.stdout
    with np.load(folder / sweep.start_file("preact_resnet8", 0)) as file:
        for name, value in start.items():
            np.testing.assert_array_equal(file[name], value)
