"""Accuracy of all methods and bit-widths on Fashion-MNIST, over several seeds.

  python -m benchmarks.accuracy

The same command goes on with an interrupted sweep: each finished run is a line of
runs.jsonl in --results_dir, and is not done again. The phases (float networks, tuning
of the learning rates, W2A2, ...) follow one another; --phases picks some. Two processes
of one thread each do more than one of two threads.

`python -m benchmarks.report` draws the tables and plots.
"""

import dataclasses
import functools
import sys
from pathlib import Path

from absl import app, flags

from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy import settings_flags as sweep_flags
from benchmarks.accuracy import tuning
from benchmarks.common import processes

FLAGS = flags.FLAGS

flags.DEFINE_string("results_dir", "benchmarks/results/accuracy", "One line a run.")
flags.DEFINE_list("phases", None, "Only these phases; all without it.")
flags.DEFINE_integer("workers", 2, "Processes, of one thread each.")
flags.DEFINE_integer("seeds", 5, "Seeds of the small network at 2 and 4 bits.")
flags.DEFINE_integer("dear_seeds", 3, "Seeds of the other rows.")
flags.adopt_module_key_flags(sweep_flags)


def with_rates(runs, rates: dict[tuple, float]) -> list[sweep.Run]:
    """The runs, with the learning rates that `tuning.rates` gives."""
    return [
        run
        if run.learning_rate is not None
        else dataclasses.replace(
            run, learning_rate=rates[run.method, tuning.tuned_at(run.bits)]
        )
        for run in runs
    ]


def perform_all(runs, settings, folder) -> None:
    """Trains what is not done yet, several at a time, each in a process of its own."""
    tasks = {
        run.name: functools.partial(
            processes.run,
            sys.executable,
            "benchmarks.accuracy.run",
            [run, settings, folder.resolve(), FLAGS.data_dir],
        )
        for run in runs
        if not sweep.is_done(folder, run, settings)
    }
    processes.perform(tasks, FLAGS.workers)


def main(argv):
    """Trains what is missing."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    folder = Path(FLAGS.results_dir)
    settings = sweep_flags.settings()
    every = sweep.phases(settings, FLAGS.seeds, FLAGS.dear_seeds)
    unknown = set(FLAGS.phases or []) - set(every)
    if unknown:
        raise ValueError(
            f"--phases must be of {list(every)}. Received: {sorted(unknown)}"
        )
    for name in FLAGS.phases or every:
        runs = every[name]
        while name == "tuning" and (left := tuning.left(folder, settings)):
            print(f"tuning: {len(left)} runs, and perhaps more", flush=True)
            perform_all(left, settings, folder)
        if any(run.learning_rate is None for run in runs):
            runs = with_rates(runs, tuning.rates(folder, settings))
        left = [run for run in runs if not sweep.is_done(folder, run, settings)]
        print(f"{name}: {len(runs)} runs, {len(left)} of them to do", flush=True)
        perform_all(runs, settings, folder)


if __name__ == "__main__":
    app.run(main)
