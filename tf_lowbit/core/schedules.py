"""Schedules: pure functions of the share of the training that has passed."""

import dataclasses

from tf_lowbit.compat import tf
from tf_lowbit.core import checks


@dataclasses.dataclass(frozen=True)
class LinearRamp:
    """From `start` linearly up to 1, then a tail at 1.

    >>> ramp = LinearRamp(start=0.5, tail=0.2)
    >>> [round(float(ramp(progress)), 3) for progress in (0.0, 0.4, 0.8, 1.0)]
    [0.5, 0.75, 1.0, 1.0]

    Attributes:
        start: value at the start, in [0, 1].
        tail: share of the training at its end with the value 1, in [0, 1].

    Raises:
        ValueError: for a value out of its range.
    """

    start: float = 0.5
    tail: float = 0.2

    def __post_init__(self):
        for name in ("start", "tail"):
            checks.number(name, getattr(self, name), at_least=0, at_most=1)

    def __call__(self, progress):
        """The value after a share of the training.

        Args:
            progress: scalar float or float tensor in [0, 1].

        Returns:
            Scalar float32 tensor in [0, 1]; exactly `start` at 0 and 1 in the tail.
        """
        progress, ramp = tf.cast(progress, tf.float32), 1.0 - self.tail
        rise = (1.0 - self.start) * progress / max(ramp, 1e-30)
        # Compared, not only computed: compilers round the quotient as they like.
        return tf.where(progress >= ramp, 1.0, tf.minimum(self.start + rise, 1.0))
