"""Schedules: pure functions of the share of the training that has passed."""

import dataclasses
import numbers

from tf_lowbit.compat import tf


def validate_share(value, name: str) -> float:
    """Returns `value` as a float, or raises an error that says what is allowed.

    Args:
        value: a number in [0, 1].
        name: how the error message names it.

    Raises:
        ValueError: for anything else.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1]. Received: {name}={value!r}")
    return float(value)


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
        validate_share(self.start, "start")
        validate_share(self.tail, "tail")

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
