"""The accuracy sweep as data: which runs there are, in which order, and their files.

Nothing here imports TensorFlow: tables are drawn from the committed files alone.
"""

import dataclasses
import json
from pathlib import Path

from benchmarks.common import store

# Of the tuning: none of those whose accuracy is reported. With one of them alone rates
# won at which single trainings lose their way.
TUNING_SEEDS = (100, 101)
FLOAT = "float"
# Share of each stage over which the learning rate rises, of all that start from a float
# network: at the full rate at once, a network just quantized may lose its way.
WARMUP = 0.1
# Equal total epochs, longer trainings, one thing changed, other rates at these lengths;
# and what is before them.
PURPOSES = (
    *("float", "tuning", "equal", "per_stage", "ablation", "start", "mixed", "rates"),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a low-bit network is trained.

    Attributes:
        staging: One of `examples.experiment.METHODS`.
        distill: One of `examples.experiment.DISTILLATIONS`.
        quantizers: Of weights and activations.
        lsq_start: Of LSQ, the `initialization` of its steps.
        teacher_rate: The teacher's learning rate relative to the student's.
        start: Of stochastic precision, the probability at the start.
        mixed: Bits for each layer, at no more of these costs than uniform ones have.
        edges: Bits of the first and the last layer: "float", "8 bits", or "few" as all
            others.
        learning_rate: Where it is not what the tuning chose for the method.
        from_float: Whether it starts from the float weights of its seed.
        freezing: Whether weights that oscillate are frozen.
        phases: Whether the epochs are QKD's: the student alone, both, a frozen teacher.
        task_weight: Of the labels in the student's loss; None for the default.
        is_gentle: Whether ranges are calibrated first, and every stage warms up.
        measures: Whether a stage of other bits measures ranges anew.
    """

    staging: str = "plain"
    distill: str = "none"
    quantizers: tuple[str, str] = ("dorefa", "dorefa")
    lsq_start: str = "paper"
    teacher_rate: float = 1.0
    start: float = 0.5
    mixed: tuple[str, ...] = ()
    edges: str = "float"
    learning_rate: float | None = None
    from_float: bool = True
    freezing: bool = False
    phases: bool = False
    task_weight: float | None = None
    is_gentle: bool = True
    measures: bool = False


METHODS = {
    "plain": Method(),
    "TS": Method("ts"),
    "PQ": Method("pq"),
    "TS+PQ": Method("ts+pq"),
    "SP": Method("sp"),
    "JKD": Method(distill="joint"),
    "TS+PQ+JKD": Method("ts+pq", "joint"),
    "SP+JKD": Method("sp", "joint"),
    "LSQ": Method(quantizers=("lsq", "lsq")),
    "PACT": Method(quantizers=("dorefa", "pact")),
}
# What a method does where one thing about it is changed: name -> (method, changed).
# The learning rate is the method's, where nothing else is said.
ABLATIONS = {
    "JKD, slow teacher": ("JKD", Method(distill="joint", teacher_rate=0.2)),
    "JKD, teacher by labels": ("JKD", Method(distill="task")),
    "JKD, frozen teacher": ("JKD", Method(distill="frozen")),
    "JKD, frozen teacher, no labels": (
        "JKD",
        Method(distill="frozen", task_weight=0.0),
    ),
    "JKD in three phases": ("JKD", Method(distill="joint", phases=True)),
    "JKD, rate 0.1": ("JKD", Method(distill="joint", learning_rate=0.1)),
    "SP+JKD, rate 0.1": ("SP+JKD", Method("sp", "joint", learning_rate=0.1)),
    "SP from 0.8": ("SP", Method("sp", start=0.8)),
    "LSQ, least error": (
        "LSQ",
        Method(quantizers=("lsq", "lsq"), lsq_start="least_error"),
    ),
    "LSQ with PQ, least error": (
        "LSQ",
        Method("pq", quantizers=("lsq", "lsq"), lsq_start="least_error"),
    ),
    "LSQ with PQ, measured anew": (
        "LSQ",
        Method("pq", quantizers=("lsq", "lsq"), measures=True),
    ),
    # PACT's clip has no decay in the runs of the method itself, which are older.
    "PACT with decay": ("PACT", Method(quantizers=("dorefa", "pact"))),
    "LSQ with SP": ("LSQ", Method("sp", quantizers=("lsq", "lsq"))),
    # At LSQ's rate by an earlier rule, at which it was run; it is JKD's too.
    "LSQ with JKD": (
        "LSQ",
        Method(distill="joint", quantizers=("lsq", "lsq"), learning_rate=0.3),
    ),
    "LSQ with JKD, rate 0.1": (
        "LSQ",
        Method(distill="joint", quantizers=("lsq", "lsq"), learning_rate=0.1),
    ),
    "LSQ with freezing": ("LSQ", Method(quantizers=("lsq", "lsq"), freezing=True)),
}
# What starts otherwise: progressive training leads gently to few bits, and so do float
# weights, calibrated ranges and a warmup, which plain training has here, too.
SCRATCH = "plain, from scratch"
STARTS = {
    SCRATCH: ("plain", Method(from_float=False)),
    "plain, abrupt": ("plain", Method(is_gentle=False)),
    "TS+PQ, abrupt": ("TS+PQ", Method("ts+pq", is_gentle=False)),
}
MIXED = {
    "LSQ, mixed bits": (
        "LSQ",
        Method(quantizers=("lsq", "lsq"), mixed=("weight_bytes", "bops")),
    ),
    # Activations then keep their bits.
    "LSQ, mixed weights": (
        "LSQ",
        Method(quantizers=("lsq", "lsq"), mixed=("weight_bytes",)),
    ),
}
# With nothing left in float: uniform bits are those of the first layer, of the image
# that it reads and of the last layer, too.
ALL_LAYERS = {
    "LSQ, all layers": ("LSQ", Method(quantizers=("lsq", "lsq"), edges="few")),
    "LSQ, all layers, mixed bits": (
        "LSQ",
        Method(quantizers=("lsq", "lsq"), edges="few", mixed=("weight_bytes", "bops")),
    ),
    # More bytes than the two above.
    "LSQ, all layers, edges at 8 bits": (
        "LSQ",
        Method(quantizers=("lsq", "lsq"), edges="8 bits"),
    ),
}
VARIANTS = ABLATIONS | STARTS | MIXED | ALL_LAYERS
# What mixed bits are chosen from, and the uniform ones whose cost they may have.
MIXED_FROM = (1, 2, 3, 4, 6, 8)
MIXED_AS = ((2, 2), (3, 3))
ALL_LAYERS_AS = ((2, 2), (3, 3), (4, 4))
# Stages at two bits, ladder 8, 4, 2; weights and activations apart at the last rung.
STAGES = {"TS": 2, "PQ": 3, "TS+PQ": 4}
# What is of one stage, trained as long as the most stages take.
LONG = (FLOAT, "SP", "JKD", "LSQ", "LSQ with JKD")
# Of these, with as many seeds as the main table; plain training of that length, too.
LONG_IN_FULL = (FLOAT, "SP", "JKD")
# Plain training that takes about as much time as the longest with a teacher.
AS_DEAR = 2 * max(STAGES.values())
# Rates that plain training and JKD are tried at, at the longest lengths: the tuning's
# are of a short training.
RATES_AGAIN = (0.1, 0.3, 1.0)
RATES_OF = ("plain", "JKD")
RATE_LENGTHS = (max(STAGES.values()), AS_DEAR)
# How many times as long the longer trainings are.
LENGTHS = STAGES | dict.fromkeys(LONG, max(STAGES.values()))
# What the larger network is trained with, and the wider ones.
LEADING = ("plain", "SP", "JKD", "LSQ")
AT_WIDTHS = ("plain", "LSQ")
WIDTHS = (16, 32)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a sweep share.

    Attributes:
        dataset: Name of the data set.
        limit: Examples used, None for all.
        width: Channels of the networks' first stage.
        float_epochs: Of the float networks that all start from.
        epochs: Of each low-bit training, over all its stages.
        float_learning_rate: Of the float networks.
        batch_size: Images in a batch.
        held_out: Share of the training images that the tuning is measured on.
        ladder: Rungs of the progressive methods.
    """

    dataset: str = "fashion_mnist"
    limit: int | None = None
    width: int = 8
    float_epochs: int = 8
    epochs: int = 4
    float_learning_rate: float = 0.1
    batch_size: int = 128
    held_out: float = 0.1
    ladder: tuple[int, ...] = (8, 4, 2)

    def as_json(self) -> dict:
        """The same, as it comes back from a JSON file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        purpose: One of `PURPOSES`.
        network: A name of `tf_lowbit.models`, or one with a width: `at_width`.
        method: A key of `METHODS` or `VARIANTS`, or `FLOAT`.
        bits: Of weights and activations; None for a float network. Of mixed bits, the
            uniform ones whose cost they may have.
        seed: Of data order, augmentation, initial weights and draws.
        epochs: In total.
        learning_rate: At the start of each stage; None until the tuning has told.
    """

    purpose: str
    network: str
    method: str
    bits: tuple[int, int] | None
    seed: int
    epochs: int
    learning_rate: float | None = None

    @property
    def is_start(self) -> bool:
        """Whether this trains a float network that others start from."""
        return self.purpose == "float"

    @property
    def is_held_out(self) -> bool:
        """Whether it is measured on held-out training images, not on the test set."""
        return self.seed in TUNING_SEEDS

    @property
    def name(self) -> str:
        """What its result is named by."""
        bits = "" if self.bits is None else f"-w{self.bits[0]}a{self.bits[1]}"
        method = self.method.lower().replace(", ", "-").replace(" ", "-")
        name = f"{method}{bits}-{self.epochs}epochs"
        if self.purpose in ("tuning", "rates"):
            name += f"-rate{self.learning_rate:g}"
        return f"{self.network}/{self.purpose}/{name}-seed{self.seed}"


def at_width(network: str, width: int) -> str:
    """The name of a network that has another width than the sweep's."""
    return f"{network}-width{width}"


def name_and_width(network: str, settings: Settings) -> tuple[str, int]:
    """The model's name, and the channels of its first stage."""
    name, _, width = network.partition("-width")
    return name, int(width or settings.width)


def method_of(run: Run) -> Method:
    """How a low-bit run trains."""
    if run.method in METHODS:
        return METHODS[run.method]
    return VARIANTS[run.method][1]


def warmup_of(run: Run) -> float:
    """Share of each stage over which the learning rate of a run rises."""
    _, changed = VARIANTS.get(run.method, (None, Method()))
    return 0.0 if run.is_start or not changed.is_gentle else WARMUP


def start_lengths(name: str, settings: Settings) -> tuple[int, ...]:
    """Epochs that a key of `STARTS` is trained for.

    From scratch, for as long as the float network and what starts from it together.
    """
    if name == SCRATCH:
        return (settings.float_epochs + settings.epochs,)
    return settings.epochs, max(STAGES.values()) * settings.epochs


def results_file(folder: Path) -> Path:
    """Where the results of all runs are, in the folder of results."""
    return folder / "runs.jsonl"


def read_start(folder: Path, network: str, seed: int) -> dict | None:
    """The float weights that a seed's runs start from, by name; None if there are none.

    Args:
        folder: Of the results.
        network: As in `Run`.
        seed: Likewise.
    """
    return store.read_weights(_starts_file(folder, network), f"seed{seed}")


def write_start(folder: Path, network: str, seed: int, weights: dict) -> None:
    """Writes what `read_start` reads."""
    store.write_weights(_starts_file(folder, network), f"seed{seed}", weights)


def _starts_file(folder, network):
    return folder / f"starts-{network}.npz"


def phases(settings: Settings, seeds: int = 5, dear: int = 3) -> dict[str, list[Run]]:
    """All runs by phase; a phase needs those before it.

    Args:
        settings: Of the sweep.
        seeds: Of the small network's 2-bit and 4-bit rows, and of `LONG_IN_FULL`.
        dear: Seeds of the other rows.

    Returns:
        Name -> runs, their learning rates still to be set but for the float networks.
    """
    small, large = "preact_resnet8", "preact_resnet20"
    two = (2, 2)

    def rows(purpose, network, methods, bits, count, epochs=settings.epochs):
        return [
            Run(purpose, network, method, bits, seed, epochs)
            for seed in range(count)
            for method in methods
        ]

    def starts(network, seed_list):
        rate = settings.float_learning_rate
        return [
            Run("float", network, FLOAT, None, seed, settings.float_epochs, rate)
            for seed in seed_list
        ]

    longest = max(STAGES.values())
    per_stage = [
        run
        for method, count in STAGES.items()
        for name, its_seeds in (
            (method, dear),
            ("plain", seeds if count == longest else dear),
        )
        for run in rows(
            "per_stage", small, [name], two, its_seeds, count * settings.epochs
        )
    ]
    wider = {}
    for width in WIDTHS:
        wide = at_width(small, width)
        wider[f"float width {width}"] = starts(wide, range(dear))
        wider[f"W2A2 width {width}"] = [
            *rows("equal", wide, AT_WIDTHS, two, dear),
            *rows("equal", wide, [FLOAT], None, dear),
        ]
    return {
        "float": starts(small, [*TUNING_SEEDS, *range(seeds)]),
        # Each run of it says which come next: `next_of_tuning`.
        "tuning": [],
        "W2A2": rows("equal", small, METHODS, two, seeds)
        + rows("equal", small, [FLOAT], None, seeds),
        "ablations": rows("ablation", small, ABLATIONS, two, dear),
        "per stage": per_stage,
        "long": [
            run
            for method in LONG
            for run in rows(
                "per_stage",
                small,
                [method],
                None if method == FLOAT else two,
                seeds if method in LONG_IN_FULL else dear,
                longest * settings.epochs,
            )
        ]
        + rows("per_stage", small, ["plain"], two, dear, AS_DEAR * settings.epochs),
        "rates": [
            dataclasses.replace(run, learning_rate=rate)
            for length in RATE_LENGTHS
            for rate in RATES_AGAIN
            for run in rows(
                "rates", small, RATES_OF, two, seeds, length * settings.epochs
            )
        ]
        + rows("per_stage", small, [FLOAT], None, seeds, AS_DEAR * settings.epochs),
        "W4A4": rows("equal", small, METHODS, (4, 4), seeds),
        "starts": [
            run
            for name in STARTS
            for epochs in start_lengths(name, settings)
            for run in rows("start", small, [name], two, dear, epochs)
        ],
        "W1A2": rows("equal", small, METHODS, (1, 2), dear),
        "W3A3": rows("equal", small, METHODS, (3, 3), dear),
        "mixed": [
            run
            for bits in MIXED_AS
            # As many as the uniform bits have that they stand beside.
            for run in rows("mixed", small, MIXED, bits, seeds if bits == two else dear)
        ],
        "all layers": [
            run
            for bits in ALL_LAYERS_AS
            for run in rows(
                "mixed", small, ALL_LAYERS, bits, seeds if bits == two else dear
            )
        ],
        "float 20": starts(large, range(dear)),
        "W2A2 20": rows("equal", large, LEADING, two, dear),
        "W4A4 20": rows("equal", large, ["plain"], (4, 4), dear)
        + rows("equal", large, [FLOAT], None, dear),
        **wider,
    }


def read(folder: Path, run: Run) -> dict | None:
    """What a run gave, or None where it was not done.

    Raises:
        ValueError: If the file of results is damaged.
    """
    return store.read(results_file(folder)).get(run.name)


def write(folder: Path, run: Run, content: dict) -> None:
    """Adds what a run gave to the results."""
    store.write(results_file(folder), run.name, content)


def is_done(folder: Path, run: Run, settings: Settings) -> bool:
    """Whether a run's result is there, and is of these settings.

    Raises:
        ValueError: If it is of other settings: they must not be mixed.
    """
    if run.purpose == "rates":
        # The longer trainings have some of them, at the tuned rate.
        same = dataclasses.replace(run, purpose="per_stage")
        if is_done(folder, same, settings):
            return True
    found = read(folder, run)
    if found is None or found["learning_rate"] != run.learning_rate:
        return False  # Of a tuning that has gone on since.
    if found["settings"] != settings.as_json():
        raise ValueError(
            "The results of a sweep must have the same settings: choose another "
            f"--results_dir. Received: {run.name!r} in {str(folder)!r} with "
            f"{found['settings']}"
        )
    return not run.is_start or read_start(folder, run.network, run.seed) is not None
