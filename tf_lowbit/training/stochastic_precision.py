"""Stochastic precision: sampled sub-networks are quantized, the rest is not.

Zhuang et al., arXiv:1908.04680, "randomly sample and quantize sub-networks while
keeping other parts in full-precision", so that one stage does the work of several. This
is our reading of the abstract: unit and schedule are not verified against the paper.
It is not stochastic rounding, and not Stochastic Quantization (arXiv:1708.01001).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks
from tf_lowbit.core.schedules import LinearRamp
from tf_lowbit.quantizers import sampling
from tf_lowbit.training import units
from tf_lowbit.training.settings import Settings

_CHECKED_POINTS = 100


@keras.utils.register_keras_serializable(package="tf_lowbit")
@dataclasses.dataclass(frozen=True)
class StochasticPrecision(Settings):
    """How sub-networks are sampled in training.

    At each step every unit is quantized with probability p, else in full precision:
    its weights and activations keep their scale and clip, and are not rounded. p
    follows a schedule over the training. Evaluation, export and checkpoints are
    fully quantized at any time.

    The draw is a pure function of (seed, step, unit): every replica draws the same
    sub-network, and a resumed training draws what the uninterrupted one would have.

    Attributes:
        start: p at the start, in [0, 1]; None for 0.5. It rises linearly to 1.
        tail: share of the training at its end with p = 1, in [0, 1]; None for 0.2.
            With less than that, see `tf_lowbit.recalibrate_batch_norm`.
        schedule: another course of p: a function from the share of the training that
            has passed, scalar float32 tensor in [0, 1], to a scalar in [0, 1]. In
            place of `start` and `tail`. A trainer that is to be saved needs it
            registered (`keras.saving.register_keras_serializable`).
        unit: "layer", "block" or a list of patterns (`find_units`).
        seed: of the draws, an int in [0, 2**63).
        steps: steps of the whole training; None for what `fit` is to do, from epoch 0
            on.
        raw_weights: in full precision, weights pass as they are instead of on the
            quantizer's scale (an ablation: a draw then changes their scale too).

    Raises:
        ValueError: for a value outside of what is said above.
    """

    start: float | None = None
    tail: float | None = None
    schedule: Callable | None = None
    unit: str | Sequence[str] = units.LAYER
    seed: int = 0
    steps: int | None = None
    raw_weights: bool = False

    def __post_init__(self):
        shape = self._shape()
        LinearRamp(**shape)  # Checks them.
        if self.schedule is not None and shape:
            raise ValueError(
                "schedule must be given in place of start and tail, not with them. "
                f"Received: schedule={self.schedule!r}, {shape}"
            )
        if self.schedule is not None and not callable(self.schedule):
            raise ValueError(
                f"schedule must be a function. Received: schedule={self.schedule!r}"
            )
        units.check_unit(self.unit)
        if isinstance(self.unit, list):
            object.__setattr__(self, "unit", tuple(self.unit))
        checks.integer("seed", self.seed, at_least=0, below=2**63)
        checks.flag("raw_weights", self.raw_weights)
        if self.steps is not None:
            checks.integer("steps", self.steps, at_least=1, below=2**63)

    def _shape(self) -> dict:
        """What is given of the linear ramp."""
        shape = {"start": self.start, "tail": self.tail}
        return {name: value for name, value in shape.items() if value is not None}

    def _course(self, progress):
        """p after a share of the training."""
        return (self.schedule or LinearRamp(**self._shape()))(progress)

    def check_schedule(self) -> None:
        """Raises where the schedule leaves [0, 1].

        Not part of the constructor, since it runs TensorFlow, which must not start
        before a `MultiWorkerMirroredStrategy` is made.

        Raises:
            ValueError: naming the share of the training and the probability.
        """
        for point in range(_CHECKED_POINTS + 1):
            progress = point / _CHECKED_POINTS
            probability = float(self._course(tf.constant(progress, tf.float32)))
            if not 0.0 <= probability <= 1.0:
                raise ValueError(
                    "The probability of stochastic precision must be in [0, 1]. "
                    f"Received: p={probability} after {progress:.0%} of the training"
                )

    def probability(self, step, total_steps):
        """p at a step.

        Args:
            step: scalar int64 tensor, from 0.
            total_steps: scalar int64 tensor, the steps of the whole training.

        Returns:
            Scalar float32 tensor in [0, 1].
        """
        progress = tf.cast(step, tf.float64) / tf.cast(total_steps, tf.float64)
        progress = tf.cast(tf.minimum(progress, 1.0), tf.float32)
        return tf.cast(self._course(progress), tf.float32)

    def draw(self, step, count: int, probability):
        """Which units are quantized at a step.

        Args:
            step: scalar int64 tensor.
            count: how many units there are.
            probability: scalar float32 tensor in [0, 1].

        Returns:
            Bool tensor [count].
        """
        seed = tf.stack([tf.constant(self.seed, tf.int64), tf.cast(step, tf.int64)])
        # The generator is named, since the automatic choice differs between devices,
        # and integers are drawn, since XLA makes other floats of the same ones.
        integers = tf.random.stateless_uniform(
            [count], seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
        )
        # 24 bits are exact in float32: in [0, 1), so that p = 1 always quantizes.
        uniform = tf.cast(tf.bitwise.right_shift(integers, 8), tf.float32) * 2.0**-24
        return uniform < probability


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Stochastic precision on given networks.

    Attributes:
        precision: the settings.
        units: the units of all networks.
    """

    precision: StochasticPrecision
    units: tuple[units.Unit, ...]

    @classmethod
    def of(
        cls, precision: StochasticPrecision, networks: Sequence[keras.Model]
    ) -> "Sampler":
        """Finds the networks' units, and checks the schedule."""
        precision.check_schedule()
        found = [u for n in networks for u in units.find_units(n, precision.unit)]
        return cls(precision, tuple(found))

    def draw(self, step, total_steps) -> tuple:
        """Draws a sub-network.

        Args:
            step: scalar int64 tensor.
            total_steps: scalar int64 tensor.

        Returns:
            Bool tensor [units], and the scalar probability that it was drawn with.
        """
        probability = self.precision.probability(step, total_steps)
        return self.precision.draw(step, len(self.units), probability), probability

    def applied(self, is_quantized) -> contextlib.AbstractContextManager:
        """A context in which the networks round as drawn.

        Args:
            is_quantized: bool tensor [units].
        """
        draws = [
            (tensor.variables, unit_is_quantized)
            for unit, unit_is_quantized in zip(
                self.units, tf.unstack(is_quantized, len(self.units)), strict=True
            )
            for tensor in unit.tensors
        ]
        return sampling.sampled(draws, self.precision.raw_weights)
