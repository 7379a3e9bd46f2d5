"""Accuracy on CIFAR-10 and CIFAR-100, from trained float networks.

  python -m benchmarks.cifar --data_dir=FOLDER --models_dir=FOLDER

Each finished run is a line of --results. The same command goes on where it stopped: a
run that was interrupted goes on from its last epoch, in --work_dir.

Networks of other libraries need the environment that `benchmarks.peers --setup` makes.
Elsewhere they are left out.
"""

import functools
import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path

from absl import app, flags

from benchmarks.cifar import plan as cifar_plan
from benchmarks.common import processes, store

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Data as TensorFlow Datasets prepares them.")
flags.DEFINE_string("models_dir", None, "Folder of the trained float networks.")
flags.DEFINE_list("experiments", list(cifar_plan.EXPERIMENTS), "Which, in their order.")
flags.DEFINE_list("rows", [], "Only these of the table, such as 'LSQ W2A2'.")
flags.DEFINE_string("results", "benchmarks/results/cifar.jsonl", "One line a run.")
flags.DEFINE_string("work_dir", "runs/cifar", "Checkpoints of unfinished runs.")
flags.DEFINE_integer("workers", 2, "Processes, of one thread each.")
flags.mark_flags_as_required(["data_dir", "models_dir"])


def perform(run: cifar_plan.Run, results: Path) -> None:
    """Trains in a process of its own, and adds a line to the results."""
    folder = Path(FLAGS.work_dir).resolve() / run.name
    processes.run(
        sys.executable,
        "benchmarks.cifar.run",
        [run, FLAGS.data_dir, Path(FLAGS.models_dir).resolve(), folder, results],
    )


def require(flag: str, names: Collection[str]) -> None:
    """Refuses values of a flag that are not of some names."""
    unknown = set(getattr(FLAGS, flag)) - set(names)
    if unknown:
        raise app.UsageError(
            f"--{flag} must be of {sorted(names)}. Received: {sorted(unknown)}"
        )


def is_here(peer: str | None) -> bool:
    """Whether the library of a method is installed."""
    return peer is None or importlib.util.find_spec(peer) is not None


def main(argv):
    """Trains what is missing."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    require("experiments", cifar_plan.EXPERIMENTS)
    chosen = [cifar_plan.EXPERIMENTS[name] for name in FLAGS.experiments]
    require("rows", {cifar_plan.row_name(*row) for each in chosen for row in each.rows})
    rows = FLAGS.rows or [
        cifar_plan.row_name(method, bits)
        for each in chosen
        for method, bits in each.rows
        if is_here(cifar_plan.METHODS[method].peer)
    ]
    results = Path(FLAGS.results).resolve()
    for name in FLAGS.experiments:
        while left := cifar_plan.next_runs(name, store.read(results), rows):
            print(f"{name}: {len(left)} runs, and perhaps more", flush=True)
            # What is left may change with each result.
            now = left[: FLAGS.workers]
            tasks = {r.name: functools.partial(perform, r, results) for r in now}
            processes.perform(tasks, FLAGS.workers)


if __name__ == "__main__":
    app.run(main)
