"""What the comparison runs, in which order; nothing here needs TensorFlow.

A training is a `sweep.Run` whose method is one of `PEERS` or of `OURS`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy import tuning

# Key -> what tables call it. "tfmot" annotates as its guide says; "tfmot_by_hand" names
# each tensor, so that it quantizes what the others quantize.
PEERS = {
    "tfmot": "TF-MOT n-bit",
    "tfmot_by_hand": "TF-MOT n-bit, by hand",
    "qkeras": "QKeras",
    "larq": "Larq DoReFa",
}
# Keys of `sweep.METHODS`.
OURS = {"plain": "tf_lowbit DoReFa", "LSQ": "tf_lowbit LSQ"}
# Ours with first and last layer and residual sums at 8 bits: trained as its file is.
FOR_FILE = "for_file"
POST_TRAINING = "tflite_int8"
NAMES = {
    **OURS,
    FOR_FILE: "tf_lowbit DoReFa, 8-bit edges",
    **PEERS,
    POST_TRAINING: "TFLite post-training int8",
}
# The distribution whose version is written beside a peer's results.
PACKAGES = {
    "tfmot": "tensorflow-model-optimization",
    "tfmot_by_hand": "tensorflow-model-optimization",
    "qkeras": "qkeras",
    "larq": "larq",
}
NETWORKS = ("preact_resnet8", "plain_cnn")
BITS = ((2, 2), (4, 4))
PHASES = ("float", "tuning", "equal", "deployment", "step cost", "memory")
# Of step cost and memory: TF-MOT as its guide says refuses that network.
MEASURED = ("float", "plain", "LSQ", "tfmot_by_hand", "qkeras", "larq")
# Environment variables that memory is measured with. With the first, freed tensors go
# back to the system at once, and the peak is of what is in use; without it glibc keeps
# some of them.
ALLOCATORS = {"in-use": {"MALLOC_MMAP_THRESHOLD_": "262144"}, "glibc": {}}
# Where TensorFlow is left alone, the processor decides: it must be said.
ONEDNN = ("0", "1")


def trainings(
    phase: str, settings: sweep.Settings, seeds: int, networks: Sequence[str] = NETWORKS
) -> list[sweep.Run]:
    """The trainings of a phase; those of the tuning are `next_of_tuning`'s.

    Args:
        phase: "float", "equal" or "deployment".
        settings: Of all runs.
        seeds: That accuracy is measured with.
        networks: Some of `NETWORKS`.

    Returns:
        The runs; but for the float networks' their learning rates are still to be set.
    """

    def runs(methods, bits, seed_list, epochs=settings.epochs, rate=None):
        return [
            sweep.Run(phase, network, method, pair, seed, epochs, rate)
            for network in networks
            for seed in seed_list
            for pair in bits
            for method in methods
        ]

    if phase == "float":
        every = [*sweep.TUNING_SEEDS, *range(seeds)]
        rate = settings.float_learning_rate
        return runs([sweep.FLOAT], [None], every, settings.float_epochs, rate)
    if phase == "equal":
        return runs([*OURS, *PEERS], BITS, range(seeds))
    # Post-training quantization trains nothing: its files are cheap.
    post_training = runs([POST_TRAINING], [(8, 8)], range(seeds), 0)
    return runs([*OURS, FOR_FILE], BITS, [0]) + post_training


def next_of_tuning(
    folder: Path, settings: sweep.Settings, networks: Sequence[str] = NETWORKS
) -> list[sweep.Run]:
    """The runs that the tuning still needs, as far as is known; none when it is done.

    All are tuned at `tuning.TUNED_AT`, in the way of the sweep.

    Args:
        folder: Of the results.
        settings: Of all runs.
        networks: Some of `NETWORKS`.
    """
    return [
        run
        for network in networks
        for method in (*OURS, *PEERS)
        for bits in tuning.TUNED_AT
        for run in _next_runs(folder, tuning.runs_of(network, method, bits, settings))
    ]


def _next_runs(folder, runs: dict[float, list[sweep.Run]]) -> list[sweep.Run]:
    """The runs that a method's tuning still needs, as far as is known."""
    every = [sweep.read(folder, run) for alike in runs.values() for run in alike]
    if any(found and found.get("refused") for found in every):
        return []  # Another learning rate would not change that.
    return tuning.next_runs(folder, runs)


def with_rate(folder: Path, settings: sweep.Settings, run: sweep.Run) -> sweep.Run:
    """A run with the learning rate that its method was tuned to.

    Args:
        folder: Of the results.
        settings: Of all runs.
        run: Of the phases "equal" or "deployment".

    Raises:
        ValueError: If the tuning is not done.
    """
    if run.method == POST_TRAINING:
        return dataclasses.replace(run, learning_rate=0.0)
    method = "plain" if run.method == FOR_FILE else run.method
    bits = tuning.tuned_at(run.bits)
    runs = tuning.runs_of(run.network, method, bits, settings)
    missing = _next_runs(folder, runs)
    if missing:
        raise ValueError(
            "The learning rates must have been tuned. "
            f"Received: no result {missing[0].name!r} in {str(folder)!r}"
        )
    scores = tuning.scores_of(folder, runs)
    return dataclasses.replace(run, learning_rate=tuning.chosen_rate(method, scores))


def adopt(run: sweep.Run, settings: sweep.Settings, source: Path, folder: Path) -> None:
    """Copies what the accuracy sweep has of a run, unless it is there already.

    Raises:
        ValueError: If either is of other settings.
    """
    if sweep.is_done(folder, run, settings) or not sweep.is_done(source, run, settings):
        return
    if run.is_start:
        start = sweep.read_start(source, run.network, run.seed)
        sweep.write_start(folder, run.network, run.seed, start)
    # The result last: it says that the run is done.
    sweep.write(folder, run, sweep.read(source, run))


def costs_file(folder: Path) -> Path:
    """Where the costs of a step are, in time and memory, in the folder of results."""
    return folder / "costs.jsonl"


def step_cost_name(onednn: str) -> str:
    """What the ratios of steps are named by."""
    return f"step_cost/onednn-{onednn}"


def memory_name(variant: str, allocator: str, repeat: int) -> str:
    """What one process's peak memory is named by."""
    return f"memory/{variant.lower()}-{allocator}-{repeat}"
