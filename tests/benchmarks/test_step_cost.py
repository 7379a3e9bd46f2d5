import json
import math

import pytest

from tests.examples import programs
from tf_lowbit.analysis import environment

SUM = "float + DoReFa W2A2, each for itself"
# Step -> the steps that it is compared with.
COMPARISONS = {
    "DoReFa W2A2": ["float"],
    "DoReFa W2A2, composed": ["float"],
    "PACT activations": ["float"],
    "LSQ activations": ["float"],
    "LSQ W2A2": ["float"],
    "recipes.low_bit W2A2": ["float"],
    "trainer without options": ["float", "DoReFa W2A2"],
    "stochastic precision, layers": ["float", "DoReFa W2A2"],
    "stochastic precision, blocks": ["float", "DoReFa W2A2"],
    "joint distillation": ["float", SUM],
    "joint distillation, hints": ["float", SUM],
    "frozen teacher": ["float", SUM],
    SUM: ["float"],
}
SETTINGS = {"depth": 8, "width": 4, "batch_size": 8, "rounds": 1, "steps": 1}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Output and JSON of a tiny run."""
    folder = tmp_path_factory.mktemp("step_cost")
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    cases = {"run": (folder, [*flags, "--output=new/step_cost.json"])}
    ran, _ = programs.run_each(
        "benchmarks.cost.step_cost", cases, programs.WITHOUT_TRACING, folder="."
    )
    code, error, shown = ran["run"]
    assert code == 0, error
    (path,) = folder.rglob("*.json")
    assert path == folder / "new" / "step_cost.json"
    return shown, json.loads(path.read_text())


def test_every_comparison_has_positive_ratios(measured):
    _, result = measured
    found = [(ratio["step"], ratio["relative to"]) for ratio in result["ratios"]]
    expected = {(step, o) for step, others in COMPARISONS.items() for o in others}
    assert set(found) == expected
    assert len(found) == len(expected)
    for ratio in result["ratios"]:
        # Of one round.
        assert ratio["least"] == ratio["median"] == ratio["largest"]
        assert 0 < ratio["median"] < math.inf
    figures = {(r["step"], r["relative to"]): r["median"] for r in result["ratios"]}
    assert figures[SUM, "float"] == pytest.approx(
        1 + figures["DoReFa W2A2", "float"], abs=2e-3
    )
    assert figures["joint distillation", SUM] == pytest.approx(
        figures["joint distillation", "float"] / figures[SUM, "float"], rel=0.02
    )


def test_the_table_shows_what_is_written(measured):
    shown, result = measured
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line[1:-1].split("│")] for line in lines]
    assert cells == [[str(v) for v in ratio.values()] for ratio in result["ratios"]]


def test_says_with_what_it_was_measured(measured):
    _, result = measured
    settings = result["settings"]
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    assert result["versions"] == environment()["versions"]
    assert result["machine"]["devices"] == ["CPU"]
