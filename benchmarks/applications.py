"""All networks of `tf_keras.applications`: quantized, trained a step, saved, exported.

  python benchmarks/applications.py

With random weights and small images, W4A4. Each network has a process and a JSON file
of its own; the same command goes on with what is missing. report.py draws the table of
docs/supported_models.md.
"""

import functools
import sys
from pathlib import Path

import applications_plan as plan
import processes
from absl import app, flags

FLAGS = flags.FLAGS

flags.DEFINE_multi_enum("network", plan.NAMES, plan.NAMES, "Which networks.")
flags.DEFINE_string("results_dir", "benchmarks/results/applications", "One file each.")
flags.DEFINE_integer("workers", 2, "Processes at a time; 1 for large networks.")


def main(argv):
    """Runs what is missing."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    folder = Path(FLAGS.results_dir).resolve()
    tasks = {
        name: functools.partial(
            processes.run, sys.executable, "applications_run.py", [name, folder]
        )
        for name in FLAGS.network
        if not (folder / f"{name}.json").exists()
    }
    processes.perform(tasks, FLAGS.workers)


if __name__ == "__main__":
    app.run(main)
