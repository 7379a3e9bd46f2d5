"""All networks of `tf_keras.applications`: quantized, trained a step, saved, exported.

  python -m benchmarks.applications

With random weights and small images, W4A4. Each network has a process of its own and a
line of --results; the same command goes on with what is missing.
`python -m benchmarks.report` draws the table of docs/supported_models.md.
"""

import functools
import sys
from pathlib import Path

from absl import app, flags

from benchmarks.applications import plan
from benchmarks.common import processes, store

FLAGS = flags.FLAGS

flags.DEFINE_multi_enum("network", plan.NAMES, plan.NAMES, "Which networks.")
flags.DEFINE_string(
    "results", "benchmarks/results/applications.jsonl", "One line each."
)
flags.DEFINE_integer("workers", 2, "Processes at a time; 1 for large networks.")


def main(argv):
    """Runs what is missing."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    results = Path(FLAGS.results).resolve()
    done = store.read(results)
    tasks = {
        name: functools.partial(
            processes.run,
            sys.executable,
            "benchmarks.applications.run",
            [name, results],
        )
        for name in FLAGS.network
        if name not in done
    }
    processes.perform(tasks, FLAGS.workers)


if __name__ == "__main__":
    app.run(main)
