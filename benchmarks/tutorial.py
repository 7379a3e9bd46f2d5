"""Accuracies that docs/tutorial.md gives its reader: their spread over seeds.

  python -m benchmarks.tutorial --output=benchmarks/results/tutorial.json

Runs the page's own code, up to the trained 2-bit network, with seeds 0, 1, 2, ... in
four kinds of process: oneDNN off and on, one thread and two. Every run has a seed of
its own, so that the spread holds both.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS

flags.DEFINE_integer("seeds", 5, "Runs in each kind of process.", lower_bound=1)
flags.DEFINE_list("only", None, "Seeds to run in this process alone.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
# Names of the page's code: what is measured.
FOUND = ("float_accuracy", "accuracy")
PROCESSES = [(onednn, threads) for onednn in (0, 1) for threads in (1, 2)]


def run_page(seed: int) -> dict[str, float]:
    """Accuracies of the page's networks, trained from a seed in this process."""
    from tf_lowbit.compat import keras

    keras.utils.set_random_seed(seed)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, PAGE.name, "exec"), names)
        if "accuracy" in names:
            return {name: names[name] for name in FOUND}
    raise ValueError(f"{PAGE} must set {FOUND}. Received: {sorted(names)}")


def in_process(seeds: range, onednn: int, threads: int) -> list[dict]:
    """`run_page` of some seeds, in a fresh process."""
    settings = {
        "TF_ENABLE_ONEDNN_OPTS": onednn,
        "TF_NUM_INTRAOP_THREADS": threads,
        "TF_NUM_INTEROP_THREADS": threads,
        "TF_CPP_MIN_LOG_LEVEL": 3,
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.tutorial",
            f"--only={','.join(map(str, seeds))}",
        ],
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        {"seed": seed, "onednn": onednn, "threads": threads, **row}
        for seed, row in zip(seeds, found, strict=True)
    ]


def summarize(rows: list[dict], name: str) -> dict[str, float]:
    """Mean, standard deviation and lowest value of an accuracy, in percent."""
    values = 100 * np.array([row[name] for row in rows])
    return {
        "mean": float(values.mean()),
        "deviation": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "lowest": float(values.min()),
    }


def main(argv):
    """Runs the seeds, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    if FLAGS.only:
        print(json.dumps([run_page(int(seed)) for seed in FLAGS.only]))
        return
    rows = []
    for index, (onednn, threads) in enumerate(PROCESSES):
        first = index * FLAGS.seeds
        rows += in_process(range(first, first + FLAGS.seeds), onednn, threads)
    found = {name: summarize(rows, name) for name in FOUND}
    for name, row in found.items():
        print(name, ", ".join(f"{key} {value:.2f} %" for key, value in row.items()))
    if FLAGS.output:
        from benchmarks.cost import stepping

        stepping.write(FLAGS.output, {**found, "runs": rows}, __name__)


if __name__ == "__main__":
    app.run(main)
