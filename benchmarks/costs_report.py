"""Tables of what training costs, drawn from the results of the programs beside this."""

import json
from pathlib import Path

from accuracy_report import table

_AXES = ("batch", "width", "depth", "input")


def tables(folder: Path) -> dict[str, str]:
    """The tables in Markdown, by name; of results that are there.

    Args:
        folder: of the results.
    """
    makers = {
        "step cost": ("step_cost.json", step_cost),
        "scaling": ("scaling.json", scaling),
        "scaling, oneDNN": ("scaling-onednn.json", scaling),
        "input pipeline": ("input_pipeline.json", input_pipeline),
        "startup": ("startup.json", startup),
    }
    return {
        name: make(json.loads((folder / file).read_text()))
        for name, (file, make) in makers.items()
        if (folder / file).exists()
    }


def step_cost(result: dict) -> str:
    """Ratios of steps."""
    return _as_they_are(result["ratios"])


def scaling(result: dict) -> str:
    """Ratios to float, with what was changed in bold."""
    lines = []
    for ratio in result["ratios"]:
        cells = [
            f"**{ratio[axis]}**" if axis == ratio["axis"] else str(ratio[axis])
            for axis in _AXES
        ]
        figures = [f"{ratio[name]:.3f}" for name in ("median", "least", "largest")]
        lines.append([*cells, *figures])
    return table([*_AXES, "median", "least", "largest"], lines)


def input_pipeline(result: dict) -> str:
    """Milliseconds per batch and ratios."""
    return _as_they_are(
        [
            {
                "dataset": found["dataset"],
                "batch": found["batch_size"],
                **{f"{k}, ms": v for k, v in found["milliseconds"].items()},
                "batches to step": found["batches to step"],
                "together to step": found["together to step"],
            }
            for found in result["datasets"]
        ]
    )


def startup(result: dict) -> str:
    """CPU seconds by part."""
    lines = [
        [
            found["step"],
            *(f"{seconds:.1f}" for seconds in found["cpu_seconds"].values()),
            f"{found['to_first_step']:.1f}",
            f"{found['median']:.2f} ({found['least']:.2f} to {found['largest']:.2f})",
        ]
        for found in result["startup"]
    ]
    parts = [f"{part}, s" for part in result["startup"][0]["cpu_seconds"]]
    return table(["network", *parts, "to the first step, s", "relative"], lines)


def _as_they_are(found: list[dict]) -> str:
    lines = [[str(value) for value in row.values()] for row in found]
    return table(list(found[0]), lines)
