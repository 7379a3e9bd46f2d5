"""The CIFAR experiments as data: which runs there are. Nothing imports TensorFlow."""

import dataclasses

from benchmarks.accuracy import tuning

FLOAT = "float"
# Seeds of the tuning. They train on 45,000 images and measure on the other 5,000.
TUNING_SEEDS = (100,)
# Share of the training images that the tuning measures on.
HELD_OUT = 0.1
# Share of a training over which the learning rate rises from 0.
WARMUP = 0.05
BATCH_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Method:
    """How a network is trained.

    Attributes:
        quantizers: of weights and activations; None for a float network.
        staging: one of `examples.experiment.METHODS`.
        distill: one of `examples.experiment.DISTILLATIONS`.
    """

    quantizers: tuple[str, str] | None = ("dorefa", "dorefa")
    staging: str = "plain"
    distill: str = "none"


METHODS = {
    FLOAT: Method(quantizers=None),
    "plain": Method(),
    "JKD": Method(distill="joint"),
    "LSQ": Method(("lsq", "lsq")),
    "LSQ with JKD": Method(("lsq", "lsq"), distill="joint"),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One question, and the runs that answer it.

    Attributes:
        network: a key of `cifar_run.NETWORKS`.
        dataset: "cifar10" or "cifar100".
        epochs: of each run.
        methods: keys of `METHODS`. The rate of each is tuned at each of `tuned_at`.
        bits: pairs (weights, activations) of the low-bit rows.
        tuned_at: pairs of bits. Other pairs take the rate of the first one with as
            many weight bits or fewer.
        seeds: of each row.
    """

    network: str
    dataset: str
    epochs: int
    methods: tuple[str, ...]
    bits: tuple[tuple[int, int], ...]
    tuned_at: tuple[tuple[int, int], ...]
    seeds: int


EXPERIMENTS = {
    # How many bits keep MLPerf Tiny's 85 %?
    "tiny": Experiment(
        network="mlperf_resnet8",
        dataset="cifar10",
        epochs=20,
        methods=(FLOAT, "plain", "JKD", "LSQ", "LSQ with JKD"),
        bits=((8, 8), (4, 4), (3, 3), (2, 2), (1, 2)),
        tuned_at=((4, 4), (2, 2)),
        seeds=3,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        experiment: a key of `EXPERIMENTS`.
        method: a key of `METHODS`.
        bits: of weights and activations; None for a float network.
        seed: of data order, augmentation and draws.
        epochs: in all.
        learning_rate: after the warmup.
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
        method = self.method.lower().replace(" ", "-")
        return (
            f"{self.experiment}-{method}{bits}-{self.epochs}epochs-"
            f"rate{self.learning_rate:g}-seed{self.seed}"
        )


def next_runs(name: str, results: dict[str, dict]) -> list[Run]:
    """The runs that an experiment still needs, as far as is known.

    While rates are being tuned these are runs of the tuning; then those of the rows.

    Args:
        name: of the experiment.
        results: of the runs that are done, by name.
    """
    experiment = EXPERIMENTS[name]
    rows, tuned = [], []
    for method in experiment.methods:
        pairs = (None,) if method == FLOAT else experiment.tuned_at
        for bits in pairs:
            scores = _scores(name, method, bits, results)
            rates = tuning.next_rates(scores)
            tuned += [
                run
                for rate in rates
                for run in _tuning_runs(name, method, bits, rate)
                if run.name not in results
            ]
            if not rates:
                rate = tuning.best_rate(scores)
                rows += [
                    Run(name, method, own, seed, experiment.epochs, rate)
                    for seed in range(experiment.seeds)
                    for own in _pairs_like(experiment, bits)
                ]
    return tuned + sorted(
        (run for run in rows if run.name not in results), key=lambda run: run.seed
    )


def _pairs_like(experiment, bits):
    """The bits of the rows whose rate is tuned at the given ones."""
    if bits is None:
        return (None,)
    return tuple(
        own
        for own in experiment.bits
        if next((t for t in experiment.tuned_at if t[0] <= own[0]),
                experiment.tuned_at[-1]) == bits
    )  # fmt: skip


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
