"""The CIFAR experiments as data: which runs there are. Nothing imports TensorFlow."""

import dataclasses
from collections.abc import Collection

from benchmarks.accuracy import rows, tuning

FLOAT = "float"
# Trained from random weights. The tuning starts from one that is trained on its 45,000
# images: a given network has seen the held-out ones, too. A low rate forgets less of
# them, so that they favor it. Where no network is given, one that is trained on all
# images takes its place.
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
# Rungs of the progressive methods.
LADDER = (8, 4, 2)
# Of a user who fine-tunes.
LOW_RATE = 0.003


@dataclasses.dataclass(frozen=True)
class Method:
    """How a network is trained.

    Attributes:
        quantizers: Of weights and activations; None for a float network.
        is_recipe: Whether `tfl.recipes.low_bit` sets all.
        peer: A key of `peers.plan.PEERS` for a network of another library, whose first
            and last layer and sums stay float; None for ours.
        staging: One of `examples.experiment.METHODS`.
        distill: One of `examples.experiment.DISTILLATIONS`.
        learning_rate: None for the one that the tuning chooses.
    """

    quantizers: tuple[str, str] | None = ("dorefa", "dorefa")
    is_recipe: bool = False
    peer: str | None = None
    staging: str = "plain"
    distill: str = "none"
    learning_rate: float | None = None


LSQ = ("lsq", "lsq")
RECIPE = "recipes.low_bit"
STAGED = {name: Method(staging=name.lower()) for name in ("TS", "PQ", "TS+PQ")}
_LOW = {
    f"{name}, rate {LOW_RATE:g}": dataclasses.replace(method, learning_rate=LOW_RATE)
    for name, method in {"plain": Method(), **STAGED}.items()
}
METHODS = {
    FLOAT: Method(quantizers=None),
    START: Method(quantizers=None),
    "plain": Method(),
    "LSQ": Method(LSQ),
    RECIPE: Method(LSQ, is_recipe=True),
    **STAGED,
    "SP": Method(staging="sp"),
    "JKD": Method(distill="joint"),
    "QKeras": Method(peer="qkeras"),
    "Larq DoReFa": Method(peer="larq"),
    **_LOW,
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
        base: The method that others are compared with.
        target: Accuracy that a user asks for, in percent, or None.
        is_given: Whether the float network that all start from is given, not trained
            here.
    """

    network: str
    dataset: str
    epochs: int
    rows: tuple[tuple[str, tuple[int, int] | None], ...]
    tuned_at: tuple[int, int]
    seeds: int
    base: str = "LSQ"
    target: float | None = None
    is_given: bool = True


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
            ("JKD", (2, 2)),
            ("QKeras", (2, 2)),
            ("Larq DoReFa", (2, 2)),
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
            (RECIPE, (2, 2)),
            (RECIPE, (4, 4)),
            ("LSQ", (2, 2)),
            ("LSQ", (4, 4)),
        ),
        tuned_at=(2, 2),
        seeds=2,
        target=91.0,
    ),
    # The paper's claims, all at one length: two stages of 6 epochs, three of 4, or six
    # of 2.
    "claims": Experiment(
        network="resnet8_100",
        dataset="cifar100",
        epochs=12,
        rows=(
            ("plain", (2, 2)),
            ("TS+PQ", (2, 2)),
            ("JKD", (2, 2)),
            ("SP", (2, 2)),
            ("PQ", (2, 2)),
            ("TS", (2, 2)),
            (FLOAT, None),
            *((name, (2, 2)) for name in _LOW),
        ),
        tuned_at=(2, 2),
        seeds=3,
        base="plain",
        is_given=False,
    ),
    # As the paper compares: plain training as long as one stage of TS+PQ.
    "claims_stage": Experiment(
        network="resnet8_100",
        dataset="cifar100",
        epochs=2,
        rows=(("plain", (2, 2)),),
        tuned_at=(2, 2),
        seeds=3,
        base="plain",
        is_given=False,
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
        rate = rate_of(name, method, results)
        own = _tuning_left(name, method, results) or [
            Run(name, method, bits, seed, experiment.epochs, rate)
            for seed in range(experiment.seeds)
        ]
        start = start_run(name, own[0].is_held_out)
        needs_start = own[0].is_held_out or not experiment.is_given
        if needs_start and start.name not in results:
            own = [start]
        runs |= {run.name: run for run in own if run.name not in results}
    return list(runs.values())


def rate_of(name: str, method: str, results: dict[str, dict]) -> float | None:
    """The learning rate of a method: the best of the tuning so far, if there is one.

    Args:
        name: Of the experiment.
        method: A key of `METHODS`.
        results: Of the runs that are done, by name.
    """
    fixed = METHODS[method].learning_rate
    scores = _scores(name, method, _tuned_bits(name, method), results)
    return tuning.best_rate(scores) if fixed is None and scores else fixed


def start_run(name: str, is_held_out: bool) -> Run:
    """The training of a network that runs of an experiment start from.

    Experiments on the same network and data share it; it is named by the first one.

    Args:
        name: Of the experiment.
        is_held_out: Whether the runs are of the tuning.
    """
    own = EXPERIMENTS[name]
    first = next(
        other
        for other, each in EXPERIMENTS.items()
        if (each.network, each.dataset) == (own.network, own.dataset)
    )
    seed = TUNING_SEEDS[0] if is_held_out else 0
    return Run(first, START, None, seed, START_EPOCHS, START_RATE)


def _tuning_left(name, method, results) -> list[Run]:
    """The next runs of a method's tuning; none where the rate is known."""
    if METHODS[method].learning_rate is not None:
        return []
    bits = _tuned_bits(name, method)
    scores = _scores(name, method, bits, results)
    rates = tuning.next_rates(scores)
    return [run for rate in rates for run in _tuning_runs(name, method, bits, rate)]


def _tuned_bits(name, method):
    return None if method == FLOAT else EXPERIMENTS[name].tuned_at


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
