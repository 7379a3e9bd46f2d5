"""Tables of what training costs, drawn from the results of the programs beside this."""

import json
from pathlib import Path

from benchmarks.common.tables import table

_AXES = ("batch", "width", "depth", "input")


def tables(folder: Path) -> dict[str, str]:
    """The tables in Markdown, by name; of results that are there.

    Args:
        folder: Of the results.
    """
    makers = {
        "scaling": ("scaling.json", scaling),
        "scaling, oneDNN": ("scaling-onednn.json", scaling),
        "input pipeline": ("input_pipeline.json", input_pipeline),
        "startup": ("startup.json", startup),
    }
    made = {
        name: make(json.loads((folder / file).read_text()))
        for name, (file, make) in makers.items()
        if (folder / file).exists()
    }
    steps = [folder / f"step_cost-onednn-{onednn}.json" for onednn in ("0", "1")]
    if all(path.exists() for path in steps):
        made["step cost"] = step_cost(*(json.loads(path.read_text()) for path in steps))
    return made


def step_cost(without: dict, with_onednn: dict) -> str:
    """Ratios of steps, without oneDNN and with it."""
    lines = [
        [ratio["step"], ratio["relative to"], _spread(ratio), _spread(other)]
        for ratio, other in zip(without["ratios"], with_onednn["ratios"], strict=True)
    ]
    return table(["step", "relative to", "without oneDNN", "with oneDNN"], lines)


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
            _spread(found),
        ]
        for found in result["startup"]
    ]
    parts = [f"{part}, s" for part in result["startup"][0]["cpu_seconds"]]
    return table(["network", *parts, "to the first step, s", "relative"], lines)


def _spread(ratio: dict) -> str:
    least, largest = ratio["least"], ratio["largest"]
    return f"{ratio['median']:.2f} ({least:.2f} to {largest:.2f})"


def _as_they_are(found: list[dict]) -> str:
    lines = [[str(value) for value in row.values()] for row in found]
    return table(list(found[0]), lines)
