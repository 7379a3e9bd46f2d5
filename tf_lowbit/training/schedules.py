"""Schedules of a training: a linear ramp, and weight decay by bit-width."""

import dataclasses

from tf_lowbit.compat import tf
from tf_lowbit.core import checks, grid

# LSQ, arXiv:1902.08153: half of the decay at 3 bits, a quarter at 2. 1 bit: ours.
_DECAY_SHARES = {1: 0.25, 2: 0.25, 3: 0.5}


@dataclasses.dataclass(frozen=True)
class LinearRamp:
    """A linear rise from `start` to 1, then a tail at 1.

    >>> ramp = LinearRamp(start=0.5, tail=0.2)
    >>> [round(float(ramp(progress)), 3) for progress in (0.0, 0.4, 0.8, 1.0)]
    [0.5, 0.75, 1.0, 1.0]

    Attributes:
        start: Value at the start, in [0, 1].
        tail: Share of the training, at its end, with the value 1; in [0, 1].

    Raises:
        ValueError: If a value is out of its range.
    """

    start: float = 0.5
    tail: float = 0.2

    def __post_init__(self):
        for name in ("start", "tail"):
            checks.number(name, getattr(self, name), at_least=0, at_most=1)

    def __call__(self, progress: float | tf.Tensor) -> float | tf.Tensor:
        """Returns the value after a share of the training.

        Args:
            progress: Share of the training, scalar float or float tensor in [0, 1].

        Returns:
            Scalar float32 tensor in [0, 1]; exactly `start` at 0 and 1 in the tail.
        """
        progress, ramp = tf.cast(progress, tf.float32), 1.0 - self.tail
        rise = (1.0 - self.start) * progress / max(ramp, 1e-30)
        # Compares progress too: compilers may round the quotient below 1.
        return tf.where(progress >= ramp, 1.0, tf.minimum(self.start + rise, 1.0))


def weight_decay_at_bits(decay: float, bits: int) -> float:
    """Reduces a weight decay for few bits: to half at 3 bits, to a quarter at 1 and 2.

    From LSQ (Esser et al., arXiv:1902.08153), which has no 1-bit case. Give the result
    to the optimizer or regularizer yourself.

    >>> weight_decay_at_bits(1e-4, 2)
    2.5e-05

    Args:
        decay: Weight decay for 4 or more bits, at least 0.
        bits: Bits of the weights, 1 to 8, or 16 or 32.

    Returns:
        The weight decay for `bits`.

    Raises:
        ValueError: If the decay is negative or the bits are others.
    """
    decay = checks.number("decay", decay, at_least=0)
    return decay * _DECAY_SHARES.get(grid.validate_bits(bits), 1.0)
