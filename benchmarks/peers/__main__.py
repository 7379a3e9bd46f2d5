"""This library against TF-MOT, QKeras, Larq and TFLite's post-training int8.

  python -m benchmarks.peers --setup

makes a virtual environment with all of them. Then

  python -m benchmarks.peers

trains the same networks from the same float weights with each of them, converts what
they trained, and measures what a training step costs in time and memory. The same
command goes on where it was interrupted: each finished run is a line of
--results_dir. What `benchmarks.accuracy` has trained already is copied from
--sweep_dir.

`python -m benchmarks.report` draws the tables.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy import settings_flags as sweep_flags
from benchmarks.common import processes, store
from benchmarks.peers import plan as peers_plan
from benchmarks.peers import setup as peers_setup

# The CIFAR ResNet-20 of `benchmarks.cost.step_cost`.
NETWORK = {"depth": 20, "width": 16, "batch_size": 128}
# Steps of a process whose memory is measured: the peak comes with the first ones.
MEMORY_STEPS = 5

FLAGS = flags.FLAGS

flags.DEFINE_bool("setup", False, "Make the environment; run nothing.")
flags.DEFINE_string("environment", peers_setup.FOLDER, "Folder that --setup makes.")
flags.DEFINE_string("results_dir", "benchmarks/results/peers", "One line a run.")
flags.DEFINE_string(
    "sweep_dir", "benchmarks/results/accuracy", "Results of benchmarks.accuracy."
)
flags.DEFINE_multi_enum(
    "phase", list(peers_plan.PHASES), list(peers_plan.PHASES), "Which phases."
)
flags.DEFINE_multi_enum(
    "network",
    list(peers_plan.NETWORKS[:1]),
    list(peers_plan.NETWORKS),
    "Which networks; the second is what TF-MOT takes without being told each tensor.",
)
flags.DEFINE_integer("workers", 2, "Trainings at a time, of one thread each.")
flags.DEFINE_integer("seeds", 3, "Seeds of each training.")
flags.DEFINE_integer("rounds", 7, "Turns of each step that count, in the step cost.")
flags.DEFINE_integer("steps", 3, "Steps in a round of the step cost.")
flags.DEFINE_integer("repeats", 3, "Processes of each variant that measure memory.")
flags.adopt_module_key_flags(sweep_flags)


def in_process(
    program: str, arguments: list, variables: dict | None = None
) -> Callable[[], None]:
    """A call of `processes.run` in the peers' environment, to be made later.

    Raises:
        ValueError: If there is no such environment.
    """
    python = peers_setup.python_of(Path(FLAGS.environment).absolute())
    module = f"benchmarks.peers.{program}"
    return functools.partial(processes.run, python, module, arguments, variables)


def train_all(phase: str, settings: sweep.Settings, folder: Path) -> None:
    """Trains what a phase lacks."""
    if phase == "tuning":
        # What comes next depends on what the last ones gave.
        while runs := peers_plan.next_of_tuning(folder, settings, FLAGS.network):
            train(phase, runs, settings, folder)
    else:
        runs = peers_plan.trainings(phase, settings, FLAGS.seeds, FLAGS.network)
        train(phase, runs, settings, folder)


def train(
    phase: str, runs: list[sweep.Run], settings: sweep.Settings, folder: Path
) -> None:
    """Trains those of a phase's runs that nobody has done yet, several at a time."""
    if phase in ("equal", "deployment"):
        runs = [peers_plan.with_rate(folder, settings, run) for run in runs]
    for run in runs:
        peers_plan.adopt(run, settings, Path(FLAGS.sweep_dir), folder)
    left = [run for run in runs if not sweep.is_done(folder, run, settings)]
    print(f"{phase}: {len(runs)} runs, {len(left)} of them to do", flush=True)
    tasks = {
        run.name: in_process("run", [run, settings, folder, FLAGS.data_dir])
        for run in left
    }
    processes.perform(tasks, FLAGS.workers)


def measure_steps(folder: Path) -> None:
    """Measures the steps' CPU time with and without oneDNN, one after the other."""
    settings = {**NETWORK, "rounds": FLAGS.rounds, "steps": FLAGS.steps}
    file, tasks = peers_plan.costs_file(folder), {}
    done = store.read(file)
    for onednn in peers_plan.ONEDNN:
        name = peers_plan.step_cost_name(onednn)
        if name not in done:
            arguments = ["step cost", file, name, settings]
            tasks[name] = in_process("cost", arguments, variables(onednn))
    processes.perform(tasks, 1)


def measure_memory(folder: Path) -> None:
    """Measures the peak memory of each variant, in processes of its own."""
    settings = {**NETWORK, "steps": MEMORY_STEPS}
    file, tasks = peers_plan.costs_file(folder), {}
    done = store.read(file)
    for repeat in range(FLAGS.repeats):
        for variant in peers_plan.MEASURED:
            for allocator, its_own in peers_plan.ALLOCATORS.items():
                name = peers_plan.memory_name(variant, allocator, repeat)
                if name not in done:
                    arguments = ["memory", file, name, settings, variant, allocator]
                    tasks[name] = in_process(
                        "cost",
                        arguments,
                        {**variables("0"), **its_own},
                    )
    processes.perform(tasks, 1)


def variables(onednn: str) -> dict[str, str]:
    """The environment variables of a process with oneDNN asked for, or not."""
    return {**os.environ, "TF_ENABLE_ONEDNN_OPTS": onednn}


def main(argv):
    """Sets up, or runs what is missing."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    folder = Path(FLAGS.results_dir).absolute()
    if FLAGS.setup:
        peers_setup.set_up(Path(FLAGS.environment).absolute())
        return
    settings = sweep_flags.settings()
    measurements = {"step cost": measure_steps, "memory": measure_memory}
    for phase in FLAGS.phase:
        if phase in measurements:
            measurements[phase](folder)
        else:
            train_all(phase, settings, folder)


if __name__ == "__main__":
    app.run(main)
