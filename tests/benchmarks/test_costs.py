"""The programs that measure what training costs, with tiny settings."""

import json

import pytest

from tests.examples import programs
from tf_lowbit.analysis import environment

# In place of a ResNet-20 on batches of 64.
# With oneDNN, on by default where a CPU has VNNI, narrower ones corrupt memory.
BASE = {"batch": 2, "width": 8, "depth": 8, "input": 12}
PROGRAMS = {
    "scaling": "--rounds=1 --batch=3 --width=16 --depth= --input=16",
    "input_pipeline": "--rounds=1 --steps=1 --batch_size=2 --dataset=digits,cifar10",
    "startup": "--rounds=1 --depth=8 --batch_size=2",
}
BEFORE = {
    "scaling": f"program.BASE = {BASE}; program._MOST_PIXELS = 300",
    # In this process: nothing is asked here of how long the import takes.
    "startup": "program.in_process = program.once",
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Name -> output and JSON of a tiny run."""
    found = {}
    for name, arguments in PROGRAMS.items():
        folder = tmp_path_factory.mktemp(name)
        command = [*arguments.split(), "--output=new/figures.json"]
        runs = {"run": (folder, command)}
        ran, _ = programs.run_each(
            f"benchmarks.cost.{name}",
            runs,
            programs.WITHOUT_TRACING + BEFORE.get(name, ""),
            folder=".",
        )
        code, error, shown = ran["run"]
        assert code == 0, error
        found[name] = shown, json.loads((folder / "new" / "figures.json").read_text())
    return found


def rows(shown):
    """The cells of the table that was printed."""
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in lines]


def test_scaling_changes_one_thing_at_a_time(measured):
    shown, result = measured["scaling"]
    assert [r["axis"] for r in result["ratios"]] == ["batch", "width", "input"]
    for ratio, cells in zip(result["ratios"], rows(shown), strict=True):
        changed = {name for name, value in BASE.items() if ratio[name] != value}
        # Large inputs come in smaller batches.
        also = {"batch"} if ratio["axis"] == "input" else set()
        assert changed == {ratio["axis"]} | also
        assert ratio["median"] > 0
        columns = (*BASE, "median", "least", "largest")
        assert cells == [str(ratio[column]) for column in columns]
    assert result["ratios"][-1]["batch"] == 1


def test_pipelines_are_measured_beside_the_step(measured):
    shown, result = measured["input_pipeline"]
    assert [found["dataset"] for found in result["datasets"]] == ["digits", "cifar10"]
    for found, cells in zip(result["datasets"], rows(shown), strict=True):
        times = found["milliseconds"]
        assert min(times.values()) > 0
        # Of one round: the ratio of what is written, as far as it is rounded.
        assert found["together to step"] == pytest.approx(
            times["together"] / times["step alone"], rel=0.02
        )
        assert cells[:2] == [found["dataset"], "2"]
        assert cells[-1] == str(found["together to step"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_says_with_what_it_was_measured(measured, name):
    _, result = measured[name]
    assert result["settings"]["rounds"] == 1
    assert result["versions"] == environment()["versions"]
    assert "output" not in result["settings"]


def test_startup_is_told_by_part_and_relative_to_float(measured):
    shown, result = measured["startup"]
    assert [found["step"] for found in result["startup"]] == ["float", "W2A2", "SP+JKD"]
    base = result["startup"][0]["to_first_step"]
    for found, cells in zip(result["startup"], rows(shown), strict=True):
        parts = found["cpu_seconds"]
        assert list(parts) == ["import", "build", "first step", "second step"]
        total = sum(parts.values()) - parts["second step"]
        assert found["to_first_step"] == pytest.approx(total)
        assert found["median"] == pytest.approx(total / base, abs=1e-3)
        assert cells[0] == found["step"]
        assert cells[-1] == f"{found['median']:.2f}"
