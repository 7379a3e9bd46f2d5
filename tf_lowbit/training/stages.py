"""Stages: lists that set bits and learning rates by epoch.

A `Stage` is a number of epochs with their bits and learning rate. `two_stage`,
`progressive` and `two_stage_progressive` return lists of stages after Zhuang et al.,
arXiv:1908.04680, and `three_phase` after Kim et al., arXiv:1911.12491. The callback
`tf_lowbit.callbacks.StagedPrecision` trains by any such list. This module does not use
TensorFlow.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from tf_lowbit.core import checks, grid

DECAYS = ("constant", "cosine", "step")
FROZEN, ABSENT = "frozen", "absent"
ROLES = (None, FROZEN, ABSENT)
# The paper's ladder, as recalled.
DEFAULT_LADDER = (32, 16, 8, 4, 2)
FLOAT_BITS = 32
# The authors' CIFAR-100 baseline: x 0.1 at epochs 60 and 120 of 200.
STEP_MILESTONES = (0.3, 0.6)
_STEP_FACTOR = 0.1

Bits = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a training: a number of epochs with their bits and learning rate.

    A quantizer never goes below the bits of its rule. In a stage it has
    `max(stage bits, rule's bits)`.

    Attributes:
        epochs: Length in epochs, at least 1.
        weight_bits: Bits of the weights: 1 to 8, or 16 or 32 for "not rounded". None
            for the bits of each quantizer's rule.
        activation_bits: Bits of the activations, as `weight_bits`. "Not rounded"
            activations are still clipped.
        learning_rate: Learning rate at the stage's start; None does not change it.
        decay: "constant"; "cosine" from `learning_rate` to 0 over the stage; or "step":
            x 0.1 at each of `milestones`.
        milestones: Shares of the stage, strictly rising, each in (0, 1). `15 / 30` is
            exactly the start of epoch 15 of 30. For decay="step" only.
        warmup: Share of the stage, in [0, 1). During it, the learning rate is
            multiplied by progress / warmup, so that it rises from 0.
        teacher: Role of the teacher in a `LowBitTrainer`. None trains student and
            teacher by the trainer's `JointDistillation`. "frozen" does not train the
            teacher. "absent" trains the student alone, on the compiled loss with weight
            1.

    Raises:
        ValueError: If a value is not one of those above, or milestones or a warmup have
            no effect.
    """

    epochs: int
    weight_bits: int | None = None
    activation_bits: int | None = None
    learning_rate: float | None = None
    decay: str = "constant"
    milestones: tuple[float, ...] = STEP_MILESTONES
    warmup: float = 0.0
    teacher: str | None = None

    def __post_init__(self):
        checks.integer("epochs", self.epochs, at_least=1)
        for name in ("weight_bits", "activation_bits"):
            if getattr(self, name) is not None:
                grid.validate_bits(getattr(self, name), name)
        rate = self.learning_rate
        if rate is not None:
            checks.number("learning_rate", rate, above=0)
        checks.choice("decay", self.decay, DECAYS)
        if self.decay != "constant" and rate is None:
            raise ValueError(
                f"decay={self.decay!r} needs a learning_rate to start from. "
                "Received: learning_rate=None"
            )
        object.__setattr__(self, "milestones", _rising_shares(self.milestones))
        if self.decay != "step" and self.milestones != STEP_MILESTONES:
            raise ValueError(
                'milestones need decay="step". '
                f"Received: milestones={self.milestones}, decay={self.decay!r}"
            )
        checks.number("warmup", self.warmup, at_least=0, below=1)
        if self.warmup and rate is None:
            raise ValueError(
                f"warmup={self.warmup} needs a learning_rate to rise to. "
                "Received: learning_rate=None"
            )
        checks.choice("teacher", self.teacher, ROLES)

    def learning_rate_at(self, progress: float) -> float | None:
        """Returns the learning rate after a share of the stage.

        >>> Stage(4, learning_rate=0.1, decay="cosine").learning_rate_at(0.5)
        0.05
        >>> Stage(4, learning_rate=0.1, warmup=0.5).learning_rate_at(0.25)
        0.05

        Args:
            progress: Share of the stage that has passed, in [0, 1].

        Returns:
            The learning rate, or None if the stage does not set it.
        """
        if self.learning_rate is None:
            return None
        progress = min(max(progress, 0.0), 1.0)
        rate = self.learning_rate * self._decayed(progress)
        return rate * progress / self.warmup if progress < self.warmup else rate

    def _decayed(self, progress: float) -> float:
        """Returns the factor of `decay` after a share of the stage."""
        if self.decay == "step":
            passed = sum(progress >= milestone for milestone in self.milestones)
            return _STEP_FACTOR**passed
        if self.decay == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0


def two_stage(
    bits: Bits,
    epochs: Sequence[int] | int,
    learning_rate: float | Sequence[float] | None = None,
    decay: str = "constant",
    milestones: Sequence[float] = STEP_MILESTONES,
) -> list[Stage]:
    """TS, two-stage training: quantizes the weights first, then the activations too.

    >>> [(s.weight_bits, s.activation_bits) for s in two_stage(2, (10, 10))]
    [(2, 32), (2, 2)]

    Args:
        bits: Final bits, one int or (weight, activation).
        epochs: Epochs of each stage, or one int for both.
        learning_rate: One for both, one for each, or None.
        decay: As in `Stage`.
        milestones: As in `Stage`, shares of each stage.

    Returns:
        Two stages. In the first, activations are clipped but not rounded.
    """
    weight_bits, activation_bits = _pair(bits)
    pairs = [(weight_bits, FLOAT_BITS), (weight_bits, activation_bits)]
    return _stages(pairs, epochs, learning_rate, decay, milestones)


def progressive(
    bits: Bits,
    epochs: Sequence[int] | int,
    ladder: Sequence[int] = DEFAULT_LADDER,
    learning_rate: float | Sequence[float] | None = None,
    decay: str = "constant",
    milestones: Sequence[float] = STEP_MILESTONES,
) -> list[Stage]:
    """PQ, progressive quantization: from many bits to few.

    >>> [(s.weight_bits, s.activation_bits) for s in progressive(2, 5, (8, 4, 2))]
    [(8, 8), (4, 4), (2, 2)]

    Args:
        bits: Final bits, one int or (weight, activation).
        epochs: Epochs of each stage, or one int for every stage.
        ladder: Bit-widths in falling order. Weights and activations both step down it,
            but not below their final bits. A stage at the final bits is added if the
            ladder does not end there.
        learning_rate: One for all, one for each, or None.
        decay: As in `Stage`.
        milestones: As in `Stage`, shares of each stage.

    Returns:
        One stage for each rung of the ladder.
    """
    return _stages(
        _rungs(_pair(bits), ladder), epochs, learning_rate, decay, milestones
    )


def two_stage_progressive(
    bits: Bits,
    epochs: Sequence[int] | int,
    ladder: Sequence[int] = DEFAULT_LADDER,
    learning_rate: float | Sequence[float] | None = None,
    decay: str = "constant",
    last_only: bool = False,
    milestones: Sequence[float] = STEP_MILESTONES,
) -> list[Stage]:
    """TS+PQ: at each rung of the ladder the weights first, then the activations.

    >>> [(s.weight_bits, s.activation_bits)
    ...  for s in two_stage_progressive(2, 5, (4, 2))]
    [(4, 32), (4, 4), (2, 4), (2, 2)]

    Args:
        bits: Final bits, one int or (weight, activation).
        epochs: Epochs of each stage, or one int for every stage.
        ladder: As in `progressive`.
        learning_rate: One for all, one for each, or None.
        decay: As in `Stage`.
        last_only: Whether only the last rung has two stages.
        milestones: As in `Stage`, shares of each stage.

    Returns:
        Up to two stages for each rung. A stage that changes no bits is left out.
    """
    checks.flag("last_only", last_only)
    rungs = _rungs(_pair(bits), ladder)
    pairs: list[tuple[int, int]] = []
    for weight_bits, activation_bits in rungs:
        before = pairs[-1][1] if pairs else FLOAT_BITS
        if not last_only or (weight_bits, activation_bits) == rungs[-1]:
            pairs.append((weight_bits, before))
        pairs.append((weight_bits, activation_bits))
    return _stages(_without_repeats(pairs), epochs, learning_rate, decay, milestones)


def three_phase(
    bits: Bits,
    epochs: Sequence[int] | int,
    learning_rate: float | Sequence[float] | None = None,
    decay: str = "constant",
    milestones: Sequence[float] = STEP_MILESTONES,
) -> list[Stage]:
    """QKD: the student alone, then with its teacher, then under a frozen teacher.

    Kim et al., QKD: Quantization-aware Knowledge Distillation, arXiv:1911.12491: a
    teacher that starts too early hurts a student of few bits. Their phases are:

    1. Self-studying: trains the student on the task alone.
    2. Co-studying: trains both by the trainer's `JointDistillation`.
    3. Tutoring: trains the student; the teacher stays as it is.

    >>> [(s.weight_bits, s.activation_bits, s.teacher) for s in three_phase(2, 5)]
    [(2, 2, 'absent'), (2, 2, None), (2, 2, 'frozen')]

    Args:
        bits: Bits of all phases, one int or (weight, activation).
        epochs: Epochs of each phase, or one int for every phase.
        learning_rate: The student's learning rate: one for all phases, one for each, or
            None.
        decay: As in `Stage`.
        milestones: As in `Stage`, shares of each phase.

    Returns:
        Three stages, for a `LowBitTrainer` whose teacher is "joint" or "task".
    """
    stages = _stages([_pair(bits)] * 3, epochs, learning_rate, decay, milestones)
    return [
        dataclasses.replace(stage, teacher=teacher)
        for stage, teacher in zip(stages, (ABSENT, None, FROZEN), strict=True)
    ]


def split_epochs(total: int, parts: int) -> tuple[int, ...]:
    """Divides epochs among stages; the last stages get what remains.

    >>> split_epochs(20, 3)
    (6, 7, 7)

    Args:
        total: Number of epochs.
        parts: Number of stages.

    Returns:
        Epochs of each stage.

    Raises:
        ValueError: If there are fewer epochs than stages.
    """
    checks.integer("total", total, at_least=1)
    checks.integer("parts", parts, at_least=1)
    if total < parts:
        raise ValueError(
            f"{parts} stages need at least {parts} epochs. Received: total={total}"
        )
    share, rest = divmod(total, parts)
    return (share,) * (parts - rest) + (share + 1,) * rest


def stage_at(stages: Sequence[Stage], epoch: int) -> tuple[int, int]:
    """Finds the stage of an epoch.

    >>> stage_at([Stage(3), Stage(2)], 3)
    (1, 3)

    Args:
        stages: The stages.
        epoch: Epoch, from 0.

    Returns:
        The stage's index and the epoch at which it starts.

    Raises:
        ValueError: If `epoch` is negative or the stages end before it.
    """
    checks.integer("epoch", epoch, at_least=0)
    start = 0
    for index, stage in enumerate(stages):
        if epoch < start + stage.epochs:
            return index, start
        start += stage.epochs
    raise ValueError(
        f"epoch must be below the stages' total of {start} epochs. "
        f"Received: epoch={epoch}"
    )


def _pair(bits: Bits) -> tuple[int, int]:
    pair = bits if isinstance(bits, tuple | list) else (bits, bits)
    if len(pair) != 2:
        raise ValueError(
            f"bits must be one integer or a pair (weight, activation). "
            f"Received: bits={bits!r}"
        )
    return grid.validate_bits(pair[0]), grid.validate_bits(pair[1])


def _rungs(final: tuple[int, int], ladder: Sequence[int]) -> list[tuple[int, int]]:
    is_list = isinstance(ladder, Sequence) and not isinstance(ladder, str)
    rungs = [grid.validate_bits(rung, "ladder") for rung in ladder] if is_list else []
    if not rungs or sorted(rungs, reverse=True) != rungs:
        raise ValueError(
            f"ladder must be falling bit-widths. Received: ladder={ladder!r}"
        )
    pairs = [(max(rung, final[0]), max(rung, final[1])) for rung in rungs]
    return _without_repeats([*pairs, final])


def _without_repeats(pairs):
    return [pair for pair, _ in itertools.groupby(pairs)]


def _each(values, count: int, name: str) -> list:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list:
        return [values] * count
    if len(values) != count:
        raise ValueError(
            f"{name} must be one value or one for each of the {count} stages. "
            f"Received: {name}={values!r}"
        )
    return list(values)


def _rising_shares(milestones) -> tuple[float, ...]:
    is_sequence = isinstance(milestones, Sequence) and not isinstance(milestones, str)
    shares = tuple(milestones) if is_sequence else ()
    are_shares = all(checks.is_number(s) and 0 < s < 1 for s in shares)
    if not shares or not are_shares or sorted(set(shares)) != list(shares):
        raise ValueError(
            "milestones must be shares of the stage in (0, 1), strictly rising. "
            f"Received: milestones={milestones!r}"
        )
    return shares


def _stages(pairs, epochs, learning_rate, decay, milestones) -> list[Stage]:
    epochs = _each(epochs, len(pairs), "epochs")
    rates = _each(learning_rate, len(pairs), "learning_rate")
    return [
        Stage(count, weight_bits, activation_bits, rate, decay, milestones)
        for (weight_bits, activation_bits), count, rate in zip(
            pairs, epochs, rates, strict=True
        )
    ]
