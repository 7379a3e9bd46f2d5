import json

import pytest

from benchmarks import report
from benchmarks.cost import report as costs_report


def test_tables_stand_between_their_marks():
    text = "a\n<!-- table: bits -->\nold\n<!-- end -->\nb\n"
    done = report.drawn(text, {"bits": "new"})
    assert done == "a\n<!-- table: bits -->\n\nnew\n\n<!-- end -->\nb\n"
    assert report.drawn(done, {"bits": "new"}) == done
    with pytest.raises(ValueError, match="must have the marks"):
        report.drawn(text, {"W2A2": "new"})


def named(path):
    return "/".join(path.parts[-2:])


@pytest.mark.parametrize("path", report.texts(), ids=named)
def test_a_text_has_what_the_committed_results_give(path):
    text = path.read_text()
    assert report.drawn(text, report.texts()[path]) == text


@pytest.mark.parametrize("path", report.texts(), ids=named)
def test_every_mark_has_a_table(path):
    marks = {
        line.removeprefix("<!-- table: ").removesuffix(" -->")
        for line in path.read_text().splitlines()
        if line.startswith("<!-- table: ")
    }
    assert marks == set(report.texts()[path])


def cells(table):
    return [[c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()]


def test_costs_are_those_of_the_files(tmp_path):
    base = {"batch": 64, "width": 16, "depth": 20, "input": 32}
    statistics = {"median": 1.05, "least": 1.0, "largest": 1.1234}
    ratio = {**base, "batch": 128, "axis": "batch", **statistics}
    (tmp_path / "scaling.json").write_text(json.dumps({"ratios": [ratio]}))
    parts = {"import": 4.04, "build": 2, "first step": 3, "second step": 1}
    found = {"step": "float", "cpu_seconds": parts, "to_first_step": 9.04, **statistics}
    (tmp_path / "startup.json").write_text(json.dumps({"startup": [found]}))
    times = {"batches alone": 1.5, "step alone": 30.0, "together": 30.5}
    pipeline = {
        "dataset": "digits",
        "batch_size": 128,
        "milliseconds": times,
        "batches to step": 0.05,
        "together to step": 1.017,
    }
    path = tmp_path / "input_pipeline.json"
    path.write_text(json.dumps({"datasets": [pipeline]}))
    made = costs_report.tables(tmp_path)
    assert set(made) == {"scaling", "startup", "input pipeline"}
    line = ["**128**", "16", "20", "32", "1.050", "1.000", "1.123"]
    assert cells(made["scaling"])[2] == line
    line = ["float", "4.0", "2.0", "3.0", "1.0", "9.0", "1.05 (1.00 to 1.12)"]
    assert cells(made["startup"])[2] == line
    line = ["digits", "128", "1.5", "30.0", "30.5", "0.05", "1.017"]
    assert cells(made["input pipeline"])[2] == line
