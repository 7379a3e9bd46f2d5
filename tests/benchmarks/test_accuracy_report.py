import dataclasses
import math

import pytest

from benchmarks.accuracy import claims as accuracy_claims
from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy import plots as accuracy_plots
from benchmarks.accuracy import report as accuracy_report
from benchmarks.accuracy import rows as accuracy_rows
from tests.benchmarks.results import MACHINE, SETTINGS, low_bit, put


@pytest.fixture
def made_up(tmp_path):
    """Three seeds of two methods; differences of 1, 2 and 3 points."""
    for seed, (plain, other) in enumerate([(0.80, 0.81), (0.82, 0.84), (0.81, 0.84)]):
        anew = plain + 0.001 * (seed + 1)
        put(tmp_path, low_bit("plain", seed), plain, recalibrated_accuracy=anew)
        put(tmp_path, low_bit("SP", seed), other, 110.0 + seed)
    return tmp_path


def legend(figures):
    """What the plot of the cost names."""
    shown = figures["accuracy_cost.svg"].axes[0].get_legend()
    return [text.get_text() for text in shown.get_texts()]


def test_statistics_are_those_computed_by_hand(made_up):
    rows = accuracy_rows.rows(made_up)
    plain, other = (
        rows["equal", "preact_resnet8", method, (2, 2), 4] for method in ("plain", "SP")
    )
    assert plain.mean == pytest.approx(81.0)
    # Deviations -1, 1, 0: variance 1, over the root of 3.
    assert plain.error == pytest.approx(1 / math.sqrt(3))
    mean, half = accuracy_rows.paired(other.accuracies, plain.accuracies)
    assert mean == pytest.approx(2.0)
    # Student's t for 2 degrees of freedom at 97.5 %: 4.303.
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert accuracy_rows.cost_ratio(other, plain) == pytest.approx(1.11)


def test_times_of_different_processors_are_not_compared(made_up):
    faster = {**MACHINE, "instructions": ["avx2", "avx512f"], "platform": "another"}
    put(made_up, low_bit("SP", 2), 0.8, 50.0, machine=faster)
    put(made_up, low_bit("SP", 1), 0.8, 120.0, machine={**MACHINE, "platform": "x"})
    put(made_up, low_bit("TS", 2), 0.8, 50.0, machine=faster)
    rows = accuracy_rows.rows(made_up)
    plain, sampled, staged = (
        rows["equal", "preact_resnet8", m, (2, 2), 4] for m in ("plain", "SP", "TS")
    )
    assert accuracy_rows.cost_ratio(sampled, plain) == pytest.approx(1.15)
    assert math.isnan(accuracy_rows.cost_ratio(staged, plain))
    # No point in the plot, which is over the cost.
    assert legend(accuracy_plots.plots(made_up)) == ["plain", "SP", "4 epochs in total"]


def test_rates_at_greater_length_stand_side_by_side(made_up):
    assert "Not run" in accuracy_report.tables(made_up)["rates"]
    for seed, accuracy in enumerate([0.89, 0.91]):
        for rate, value in ((0.1, accuracy), (1.0, None)):
            run = low_bit("plain", seed, purpose="rates", epochs=16)
            put(made_up, dataclasses.replace(run, learning_rate=rate), value)
        longer = low_bit("plain", seed, purpose="per_stage", epochs=16)
        longer = dataclasses.replace(longer, learning_rate=0.3)
        put(made_up, longer, 0.88)
        # It is not trained again.
        again = dataclasses.replace(longer, purpose="rates")
        assert sweep.is_done(made_up, again, SETTINGS)
    (row,) = accuracy_report.tables(made_up)["rates"].splitlines()[2:]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "plain", "16", "90.00 ± 1.00 (2)", "88.00 ± 0.00 (2)", "diverged: 2 of 2", "—"
    ]  # fmt: skip
    # They are no rows of the other tables.
    assert not [key for key in accuracy_rows.rows(made_up) if key[0] == "rates"]


def test_pairs_are_of_the_same_seed(made_up):
    put(made_up, low_bit("TS", 1), 0.83)
    put(made_up, low_bit("TS", 7), 0.10)
    rows = accuracy_rows.rows(made_up)
    row, plain = (
        rows["equal", "preact_resnet8", method, (2, 2), 4] for method in ("TS", "plain")
    )
    mean, half = accuracy_rows.paired(row.accuracies, plain.accuracies)
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
        accuracy_rows.rows(made_up)


def test_other_settings_are_not_mixed_in(made_up):
    other = dataclasses.replace(SETTINGS, width=16)
    put(made_up, low_bit("TS", 0), 0.9, settings=other)
    with pytest.raises(ValueError, match="must have the same settings"):
        accuracy_rows.rows(made_up)
    with pytest.raises(ValueError, match="choose another --results_dir"):
        sweep.is_done(made_up, low_bit("TS", 0), SETTINGS)


def test_longer_trainings_stand_beside_plain_ones_as_long(made_up):
    for method, epochs, accuracy in (
        *(("TS", 8, 0.85), ("plain", 8, 0.84), ("plain", 16, 0.86)),
        *(("TS+PQ", 16, 0.87), ("JKD", 16, 0.88), ("float", 16, 0.9)),
    ):
        bits = None if method == "float" else (2, 2)
        run = low_bit(method, 0, bits, "per_stage", epochs)
        put(made_up, run, accuracy, 100.0 * epochs / 4)
    lines = accuracy_report.tables(made_up)["per stage"].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    # Plain training of four epochs has 80 % with that seed.
    assert cells == [
        ["plain", "8", "1", "84.00", "+4.00", "—", "2.00"],
        ["TS", "8", "1", "85.00", "+5.00", "+1.00", "2.00"],
        ["plain", "16", "1", "86.00", "+6.00", "—", "4.00"],
        ["TS+PQ", "16", "1", "87.00", "+7.00", "+1.00", "4.00"],
        ["float", "16", "1", "90.00", "+10.00", "+4.00", "4.00"],
        ["JKD", "16", "1", "88.00", "+8.00", "+2.00", "4.00"],
    ]


def test_mixed_bits_stand_beside_uniform_ones_of_the_same_cost(made_up):
    for seed, (uniform, mixed) in enumerate([(0.80, 0.81), (0.82, 0.83)]):
        put(made_up, low_bit("LSQ", seed, (3, 3)), uniform)
        run = low_bit("LSQ, mixed bits", seed, (3, 3), "mixed")
        assert run.name.endswith(f"/lsq-mixed-bits-w3a3-4epochs-seed{seed}")
        put(made_up, run, mixed, weight_bytes=980 + 10 * seed)
    lines = accuracy_report.tables(made_up)["mixed"].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["LSQ, W3A3", "2", "1000", "1.00", "81.00 ± 1.00", "—"],
        ["LSQ, mixed bits", "2", "990", "1.00", "82.00 ± 1.00", "+1.00 [+1.00, +1.00]"],
    ]


def test_bits_of_all_layers_stand_beside_uniform_ones(made_up):
    names = ["LSQ, all layers", "LSQ, all layers, mixed bits"]
    for name, accuracy in zip(names, (0.80, 0.82), strict=True):
        put(made_up, low_bit(name, 0, (4, 4), "mixed"), accuracy)
    lines = accuracy_report.tables(made_up)["all layers"].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["LSQ, all layers, W4A4", "1", "1000", "1.00", "80.00", "—"],
        ["LSQ, all layers, mixed bits", "1", "1000", "1.00", "82.00", "+2.00"],
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


def test_the_larger_network_stands_beside_its_own_rows(made_up):
    large = "preact_resnet20"
    for seed, full in enumerate([0.91, 0.92, 0.93]):
        put(made_up, sweep.Run("equal", large, "float", None, seed, 4, 0.1), full)
        for method, accuracy in (("plain", 0.90), ("SP", 0.91)):
            run = dataclasses.replace(low_bit(method, seed), network=large)
            put(made_up, run, accuracy)
    lines = accuracy_report.tables(made_up)["ResNet-20"].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    # By seed -1, -2, -3 to float: 4.303 times 1 over the root of 3.
    assert cells == [
        ["float, trained on as long", "3", "92.00 ± 0.58", "—", "—"],
        ["W2A2, plain", "3", "90.00 ± 0.00", "—", "-2.00 [-4.48, +0.48]"],
        [
            *("W2A2, SP", "3", "91.00 ± 0.00"),
            *("+1.00 [+1.00, +1.00]", "-1.00 [-3.48, +1.48]"),
        ],
    ]
    claims = accuracy_claims.claims_table(made_up).splitlines()
    (line,) = (x for x in claims if "ResNet-20: SP helps" in x)
    assert line.strip("| ").endswith("yes")


def test_an_ablation_stands_beside_its_method(made_up):
    run = low_bit("SP from 0.8", 0, purpose="ablation")
    assert run.name.endswith("/sp-from-0.8-w2a2-4epochs-seed0")
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
    shown = accuracy_plots.plots(made_up)
    assert len(shown["accuracy_cost.svg"].axes[0].containers) == 2


def test_another_start_stands_beside_the_usual_one(made_up):
    assert sweep.start_lengths("plain, from scratch", SETTINGS) == (12,)
    assert sweep.start_lengths("plain, abrupt", SETTINGS) == (4, 16)
    for method, epochs, accuracy in (
        *(("plain, from scratch", 12, 0.79), ("plain, abrupt", 4, 0.70)),
        *(("plain, abrupt", 16, 0.83), ("TS+PQ, abrupt", 16, 0.85)),
    ):
        put(made_up, low_bit(method, 0, purpose="start", epochs=epochs), accuracy)
    put(made_up, low_bit("plain", 0, purpose="per_stage", epochs=16), 0.86)
    lines = accuracy_report.tables(made_up)["starts"].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    # Plain training of four epochs has 80 % with that seed.
    assert cells == [
        ["plain, from scratch", "12", "1", "79.00", "-1.00", "—"],
        ["plain, abrupt", "4", "1", "70.00", "-10.00", "—"],
        ["plain, abrupt", "16", "1", "83.00", "-3.00", "—"],
        ["TS+PQ, abrupt", "16", "1", "85.00", "—", "+2.00"],
    ]
    claim = "TS+PQ helps after an abrupt start, each stage a full training"
    assert verdicts(made_up)[claim] == ("+2.00", "one seed")


def test_plots_show_every_row(made_up):
    for method, accuracy in (("plain", 0.7), ("SP", 0.72)):
        put(made_up, low_bit(method, 0, bits=(1, 2)), accuracy)
    found = accuracy_plots.plots(made_up)
    cost, bits = found["accuracy_cost.svg"].axes[0], found["accuracy_bits.svg"].axes[0]
    assert legend(found) == ["plain", "SP", "4 epochs in total"]
    assert len(cost.containers) == 2
    assert [c.get_label() for c in bits.containers] == ["plain", "SP"]
    # Plain training alone: by bytes, two points of one network.
    size = found["accuracy_bytes.svg"].axes[0]
    assert [c.get_label() for c in size.containers] == ["ResNet-8"]
    assert [text.get_text() for text in size.texts] == ["W2A2", "W1A2"]


def test_bit_widths_stand_beside_plain_training_of_the_same_bits(made_up):
    for seed, (full, plain) in enumerate([(0.90, 0.89), (0.91, 0.89), (0.92, 0.89)]):
        put(made_up, low_bit("float", seed, None), full)
        put(made_up, low_bit("plain", seed, (4, 4)), plain)
    tables = accuracy_report.tables(made_up)
    cells = {
        name: [[c.strip() for c in line.split("|")[1:-1]] for line in lines[2:]]
        for name in ("bits", "bits, against plain")
        for lines in [tables[name].splitlines()]
    }
    assert cells["bits"] == [
        ["plain", "89.00 ± 0.00 (3)", "—", "81.00 ± 0.58 (3)", "—"],
        ["SP", "—", "—", "83.00 ± 1.00 (3)", "—"],
    ]
    # By seed +1, +2, +3 and +10, +9, +11: 4.303 times 1 over the root of 3.
    floats = ["float", "+2.00 [-0.48, +4.48]", "—", "+10.00 [+7.52, +12.48]", "—"]
    assert cells["bits, against plain"] == [
        floats,
        ["SP", "—", "—", "+2.00 [-0.48, +4.48]", "—"],
    ]


def test_the_short_table_has_its_methods(made_up):
    put(made_up, low_bit("float", 0, None), 0.9)
    put(made_up, low_bit("LSQ", 0, (4, 4)), 0.89)
    put(made_up, low_bit("JKD", 0, purpose="per_stage", epochs=16), 0.87)
    put(made_up, low_bit("LSQ with JKD", 0, purpose="ablation"), 0.86)

    lines = accuracy_report.short_table(made_up).splitlines()[2:]
    assert [[c.strip() for c in line.split("|")[1:-1]] for line in lines] == [
        ["float", "90.00 (1)", "90.00 (1)", "—"],
        ["plain", "—", "81.00 ± 0.58 (3)", "—"],
        ["TS+PQ", "—", "—", "—"],
        ["SP", "—", "83.00 ± 1.00 (3)", "—"],
        ["JKD", "—", "—", "87.00 (1)"],
        ["LSQ", "89.00 (1)", "—", "—"],
        ["LSQ with JKD", "—", "86.00 (1)", "—"],
    ]


def test_repeats_stand_beside_the_runs_of_the_same_seed(made_up, tmp_path):
    again = tmp_path / "again"
    assert accuracy_report.repeats_table(made_up, again) == "Not run yet."
    put(again, low_bit("SP", 2), 0.83)
    put(again, low_bit("SP", 0), 0.82)
    lines = accuracy_report.repeats_table(made_up, again).splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["SP, W2A2", "0", "81.00", "82.00", "-1.00"],
        ["SP, W2A2", "2", "84.00", "83.00", "+1.00"],
    ]


def verdicts(folder):
    lines = accuracy_claims.claims_table(folder).splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return {claim: (difference, holds) for claim, difference, holds in cells}


def test_a_claim_holds_where_its_whole_interval_does(made_up):
    for seed, (plain, base) in enumerate([(0.80, 0.90), (0.82, 0.91), (0.81, 0.92)]):
        put(made_up, low_bit("TS", seed), plain + 0.01)
        put(made_up, low_bit("JKD", seed), plain - 0.01)
        put(made_up, low_bit("TS+PQ", seed, purpose="per_stage", epochs=16), 0.81)
        put(made_up, low_bit("plain", seed, (4, 4)), base - 0.001)
        put(made_up, low_bit("float", seed, None), base)
        put(made_up, low_bit("LSQ with JKD", seed, purpose="ablation"), base - 0.01)
        longer = {"purpose": "per_stage", "epochs": 16}
        put(made_up, low_bit("float", seed, None, **longer), base)
        put(made_up, low_bit("LSQ with JKD", seed, **longer), base - 0.004)
        put(made_up, low_bit("plain", seed, **longer), base - 0.014)
    assert verdicts(made_up) == {
        "TS helps, in no more epochs": ("+1.00 [+1.00, +1.00]", "yes"),
        "SP helps, in no more epochs": ("+2.00 [-0.48, +4.48]", "not significant"),
        "JKD helps, in no more epochs": ("-1.00 [-1.00, -1.00]", "no"),
        "TS+PQ helps, each stage a full training": (
            "-8.60 [-11.08, -6.12]",
            "no",
        ),
        "LSQ with JKD helps, as long as 4 full trainings": (
            "+1.00 [+1.00, +1.00]",
            "yes",
        ),
        # 81, 84, 84 against 81: 4.303 times the root of 3 over the root of 3.
        "SP in one stage reaches TS+PQ with full stages, to 0.2": (
            "+2.00 [-2.30, +6.30]",
            "not significant",
        ),
        "W4A4 loses nothing, to 0.2: plain": ("-0.10 [-0.10, -0.10]", "yes"),
        "W2A2 within 0.5 of float, as short: plain": ("-10.00 [-12.48, -7.52]", "no"),
        "W2A2 within 0.5 of float, as short: JKD": ("-11.00 [-13.48, -8.52]", "no"),
        "W2A2 within 0.5 of float, as short: LSQ with JKD": (
            "-1.00 [-1.00, -1.00]",
            "no",
        ),
        "W2A2 within 0.5 of float, as long: plain": ("-1.40 [-1.40, -1.40]", "no"),
        "W2A2 within 0.5 of float, as long: LSQ with JKD": (
            "-0.40 [-0.40, -0.40]",
            "yes",
        ),
    }


def test_a_teacher_is_measured_by_plain_training_that_takes_as_much_time(made_up):
    longer = {"purpose": "per_stage", "epochs": 16}
    put(made_up, low_bit("JKD", 0, **longer), 0.90)
    put(made_up, low_bit("plain", 0, purpose="per_stage", epochs=32), 0.91)
    claim = "JKD helps, 4 full trainings beside 8 plain ones"
    assert verdicts(made_up)[claim] == ("-1.00", "one seed")
    line = accuracy_report.tables(made_up)["per stage"].splitlines()[-1]
    assert [c.strip() for c in line.split("|")[1:5]] == ["plain", "32", "1", "91.00"]


def test_one_seed_proves_no_claim(tmp_path):
    put(tmp_path, low_bit("plain", 0), 0.80)
    put(tmp_path, low_bit("SP", 0), 0.90)
    assert verdicts(tmp_path) == {"SP helps, in no more epochs": ("+10.00", "one seed")}
