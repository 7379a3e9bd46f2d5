"""The CIFAR experiments as data: which runs there are. Nothing imports TensorFlow."""

import dataclasses
from collections.abc import Collection

from benchmarks.accuracy import rows, tuning

FLOAT = "float"
# Trained from random weights on the 45,000 images of the tuning. The tuning starts from
# it: the given networks have seen the held-out images, too. A low rate forgets less of
# them, so that they favor it.
START = "float from scratch"
START_EPOCHS = 30
START_RATE = 0.1
# Seeds of the tuning. They train on 45,000 images and measure on the other 5,000.
TUNING_SEEDS = (101,)
# Share of the training images that the tuning measures on.
HELD_OUT = 0.1
# Share of a training over which the learning rate rises from 0.
WARMUP = 0.05
BATCH_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Method:
    """How a network is trained.

    Attributes:
        quantizers: Of weights and activations; None for a float network.
        is_recipe: Whether `tfl.recipes.low_bit` sets all.
    """

    quantizers: tuple[str, str] | None = ("dorefa", "dorefa")
    is_recipe: bool = False


LSQ = ("lsq", "lsq")
RECIPE = "recipes.low_bit"
METHODS = {
    FLOAT: Method(quantizers=None),
    START: Method(quantizers=None),
    "plain": Method(),
    "LSQ": Method(LSQ),
    RECIPE: Method(LSQ, is_recipe=True),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One question, and the runs that answer it.

    Attributes:
        network: A key of `networks.NETWORKS`.
        dataset: "cifar10" or "cifar100".
        epochs: Of each run.
        rows: Pairs of a method, a key of `METHODS`, and its bits (weights,
            activations), None for float; what matters most comes first.
        tuned_at: The pair of bits at which the rate of each low-bit method is tuned.
        seeds: Of each row.
        target: Accuracy that a user asks for, in percent.
    """

    network: str
    dataset: str
    epochs: int
    rows: tuple[tuple[str, tuple[int, int] | None], ...]
    tuned_at: tuple[int, int]
    seeds: int
    target: float


EXPERIMENTS = {
    # How many bits keep MLPerf Tiny's 85 %?
    "tiny": Experiment(
        network="mlperf_resnet8",
        dataset="cifar10",
        epochs=8,
        rows=(
            ("LSQ", (2, 2)),
            ("LSQ", (4, 4)),
            ("LSQ", (3, 3)),
            (RECIPE, (2, 2)),
            (FLOAT, None),
            ("plain", (2, 2)),
            (RECIPE, (4, 4)),
            (RECIPE, (3, 3)),
            ("plain", (4, 4)),
            (RECIPE, (1, 2)),
            (RECIPE, (8, 8)),
        ),
        tuned_at=(2, 2),
        seeds=3,
        # What MLPerf Tiny asks of a network for CIFAR-10.
        target=85.0,
    ),
    # LSQ for twice as long: a step of the recipe takes about as long as two of LSQ.
    "tiny_long": Experiment(
        network="mlperf_resnet8",
        dataset="cifar10",
        epochs=16,
        rows=(("LSQ", (2, 2)),),
        tuned_at=(2, 2),
        seeds=3,
        target=85.0,
    ),
    # On which low bits are compared: APoT has 90.96 % at W2A2 (arXiv:1909.13144).
    "resnet20": Experiment(
        network="resnet20",
        dataset="cifar10",
        epochs=8,
        rows=(
            ("LSQ", (2, 2)),
            (RECIPE, (2, 2)),
            ("LSQ", (4, 4)),
            (RECIPE, (4, 4)),
        ),
        tuned_at=(2, 2),
        seeds=2,
        target=91.0,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        experiment: A key of `EXPERIMENTS`.
        method: A key of `METHODS`.
        bits: Of weights and activations; None for a float network.
        seed: Of data order, augmentation and draws.
        epochs: In all.
        learning_rate: After the warmup.
    """

    experiment: str
    method: str
    bits: tuple[int, int] | None
    seed: int
    epochs: int
    learning_rate: float

    @property
    def is_held_out(self) -> bool:
        """Whether it measures on held-out training images, not on the test set."""
        return self.seed in TUNING_SEEDS

    @property
    def name(self) -> str:
        """What its result is named by; a file name, too."""
        bits = "" if self.bits is None else f"-w{self.bits[0]}a{self.bits[1]}"
        method = self.method.lower().replace(",", "").replace(" ", "-")
        return (
            f"{self.experiment}-{method}{bits}-{self.epochs}epochs-"
            f"rate{self.learning_rate:g}-seed{self.seed}"
        )


def row_name(method: str, bits: tuple[int, int] | None) -> str:
    """What a row of the tables is named: "LSQ W2A2"; a float one by its method."""
    return method if bits is None else f"{method} {rows.label(bits)}"


def next_runs(
    name: str, results: dict[str, dict], only: Collection[str] = ()
) -> list[Run]:
    """The runs that an experiment still needs, as far as is known, the first one first.

    A row whose method is not tuned yet needs the runs of the tuning, and these the
    network that they start from.

    Args:
        name: Of the experiment.
        results: Of the runs that are done, by name.
        only: Names of the rows that are wanted; empty for all.
    """
    experiment = EXPERIMENTS[name]
    runs: dict[str, Run] = {}
    for method, bits in experiment.rows:
        if only and row_name(method, bits) not in only:
            continue
        tuned_bits = None if method == FLOAT else experiment.tuned_at
        scores = _scores(name, method, tuned_bits, results)
        rates = tuning.next_rates(scores)
        own = [
            run
            for rate in rates
            for run in _tuning_runs(name, method, tuned_bits, rate)
        ] or [
            Run(name, method, bits, seed, experiment.epochs, tuning.best_rate(scores))
            for seed in range(experiment.seeds)
        ]
        start = start_run(name)
        if rates and start.name not in results:
            own = [start]
        runs |= {run.name: run for run in own if run.name not in results}
    return list(runs.values())


def start_run(name: str) -> Run:
    """The training of the network that an experiment's tuning starts from.

    Experiments on the same network and data share it; it is named by the first one.
    """
    own = EXPERIMENTS[name]
    first = next(
        other
        for other, each in EXPERIMENTS.items()
        if (each.network, each.dataset) == (own.network, own.dataset)
    )
    return Run(first, START, None, TUNING_SEEDS[0], START_EPOCHS, START_RATE)


def _tuning_runs(name, method, bits, rate):
    epochs = EXPERIMENTS[name].epochs
    return [Run(name, method, bits, seed, epochs, rate) for seed in TUNING_SEEDS]


def _scores(name, method, bits, results):
    """Mean accuracy by rate, None where it diverged, of the rates that are done."""
    scores = {}
    for rate in tuning.RATES:
        found = [results.get(r.name) for r in _tuning_runs(name, method, bits, rate)]
        if None not in found:
            accuracies = [result["accuracy"] for result in found]
            lost = None in accuracies
            scores[rate] = None if lost else sum(accuracies) / len(accuracies)
    return scores
