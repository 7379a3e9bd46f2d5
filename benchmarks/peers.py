"""This library against TF-MOT, QKeras, Larq and TFLite's post-training int8.

  python benchmarks/peers.py --setup

makes a virtual environment with all of them. Then

  python benchmarks/peers.py

trains the same networks from the same float weights with each of them, converts what
they trained, and measures what a training step costs in time and memory. The same
command goes on where it was interrupted: each finished run is a JSON file in
--results_dir. What accuracy.py has trained already is copied from --sweep_dir.

report.py draws the tables.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import peers_plan
import peers_setup
import processes
import sweep
import sweep_flags
from absl import app, flags

# The CIFAR ResNet-20 of step_cost.py.
NETWORK = {"depth": 20, "width": 16, "batch_size": 128}
# Steps of a process whose memory is measured: the peak comes with the first ones.
MEMORY_STEPS = 5

FLAGS = flags.FLAGS

flags.DEFINE_bool("setup", False, "Make the environment; run nothing.")
flags.DEFINE_string("environment", peers_setup.FOLDER, "Folder that --setup makes.")
flags.DEFINE_string("results_dir", "benchmarks/results/peers", "One file a run.")
flags.DEFINE_string(
    "sweep_dir", "benchmarks/results/accuracy", "Results of accuracy.py."
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
        ValueError: if there is no such environment.
    """
    python = peers_setup.python_of(Path(FLAGS.environment).absolute())
    return functools.partial(processes.run, python, program, arguments, variables)


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
        str(run.path): in_process(
            "peers_run.py", [run, settings, folder, FLAGS.data_dir]
        )
        for run in left
    }
    processes.perform(tasks, FLAGS.workers)


def measure_steps(folder: Path) -> None:
    """Measures the steps' CPU time with and without oneDNN, one after the other."""
    settings = {**NETWORK, "rounds": FLAGS.rounds, "steps": FLAGS.steps}
    tasks = {}
    for onednn in peers_plan.ONEDNN:
        path = folder / peers_plan.step_cost_file(onednn)
        if not path.exists():
            arguments = ["step cost", path, settings]
            tasks[str(path)] = in_process("peers_cost.py", arguments, variables(onednn))
    processes.perform(tasks, 1)


def measure_memory(folder: Path) -> None:
    """Measures the peak memory of each variant, in processes of its own."""
    settings = {**NETWORK, "steps": MEMORY_STEPS}
    tasks = {}
    for repeat in range(FLAGS.repeats):
        for variant in peers_plan.MEASURED:
            for allocator, its_own in peers_plan.ALLOCATORS.items():
                path = folder / peers_plan.memory_file(variant, allocator, repeat)
                if not path.exists():
                    arguments = ["memory", path, settings, variant, allocator]
                    tasks[str(path)] = in_process(
                        "peers_cost.py", arguments, {**variables("0"), **its_own}
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
