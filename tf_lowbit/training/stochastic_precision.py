"""Stochastic precision: each step quantizes a random part of the network.

Zhuang et al., arXiv:1908.04680, "randomly sample and quantize sub-networks while
keeping other parts in full-precision", so that one stage replaces several. We know only
the abstract: unit and schedule are not verified against the paper. The method is not
stochastic rounding, and not Stochastic Quantization (arXiv:1708.01001).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks
from tf_lowbit.quantizers import sampling
from tf_lowbit.training import units
from tf_lowbit.training.schedules import LinearRamp
from tf_lowbit.training.settings import Settings

_CHECKED_POINTS = 100


@keras.utils.register_keras_serializable(package="tf_lowbit")
@dataclasses.dataclass(frozen=True)
class StochasticPrecision(Settings):
    """Settings of stochastic precision.

    At each step every unit is quantized with probability p. A unit in full precision
    keeps the scales and clips of its weights and activations, but does not round. p
    rises with t, the share of the training that has passed:

        p(t) = start + (1 - start) min(1, t / (1 - tail)),   t = step / total_steps
        unit i is quantized if u(seed, step)_i < p(t),       u uniform in [0, 1)

    Evaluation, export and checkpoints are always fully quantized. The draw is a pure
    function of (seed, step, unit). So every replica draws the same units, and a resumed
    training draws as an uninterrupted one would.

    Attributes:
        start: The p at the start, in [0, 1]; None for 0.5. It rises linearly to 1.
        tail: Share of the training, at its end, with p = 1; in [0, 1]. None for 0.2.
            With a shorter tail, see `tf_lowbit.recalibrate_batch_norm`.
        schedule: Replaces `start` and `tail`: a function from t, scalar float32 tensor
            in [0, 1], to p, a scalar in [0, 1]. To save a trainer, register it with
            `keras.saving.register_keras_serializable`.
        unit: "layer", "block" or a list of patterns (`find_units`).
        seed: Seed of the draws, an int in [0, 2**63).
        steps: Steps of the whole training; None for the steps of `fit`, counted from
            epoch 0. If you call `fit` several times, give it `initial_epoch`, or
            each call starts at `start` again.
        raw_weights: Whether weights in full precision lose the quantizer's scale and
            are the latent weights (an ablation: each draw changes their scale).

    Raises:
        ValueError: If a value is out of its range.
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
        LinearRamp(**shape)  # Checks `start` and `tail`.
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
        """Returns the arguments of the linear ramp that are not None."""
        shape = {"start": self.start, "tail": self.tail}
        return {name: value for name, value in shape.items() if value is not None}

    def _p(self, t):
        return (self.schedule or LinearRamp(**self._shape()))(t)

    def check_schedule(self) -> None:
        """Raises ValueError if the schedule leaves [0, 1].

        The constructor does not call it, because it runs TensorFlow, which must not
        start before a `MultiWorkerMirroredStrategy` is made.
        """
        for t in (point / _CHECKED_POINTS for point in range(_CHECKED_POINTS + 1)):
            p = float(self._p(tf.constant(t, tf.float32)))
            if not 0.0 <= p <= 1.0:
                raise ValueError(
                    "The probability of stochastic precision must be in [0, 1]. "
                    f"Received: p={p} after {t:.0%} of the training"
                )

    def probability(self, step: tf.Tensor, total_steps: tf.Tensor) -> tf.Tensor:
        """Returns p(t) at a step: scalar float32 tensor in [0, 1].

        Args:
            step: Scalar int64 tensor, from 0.
            total_steps: Scalar int64 tensor, the steps of the whole training.
        """
        t = tf.cast(step, tf.float64) / tf.cast(total_steps, tf.float64)
        return tf.cast(self._p(tf.cast(tf.minimum(t, 1.0), tf.float32)), tf.float32)

    def draw(self, step: tf.Tensor, count: int, probability: tf.Tensor) -> tf.Tensor:
        """Draws the units that are quantized at a step: bool tensor [count].

        Args:
            step: Scalar int64 tensor.
            count: Number of units.
            probability: Scalar float32 tensor in [0, 1].
        """
        seed = tf.stack([tf.constant(self.seed, tf.int64), tf.cast(step, tf.int64)])
        # A named generator, because the default one differs between devices. Integers,
        # because XLA's floats differ from TensorFlow's.
        integers = tf.random.stateless_uniform(
            [count], seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
        )
        # 24 bits are exact in float32, so u < 1, and p = 1 always quantizes.
        uniform = tf.cast(tf.bitwise.right_shift(integers, 8), tf.float32) * 2.0**-24
        return uniform < probability


class Sampler:
    """Draws the quantized units of networks by stochastic precision.

    Raises:
        ValueError: If the schedule leaves [0, 1], or a unit cannot be found.
    """

    def __init__(self, settings: StochasticPrecision, networks: Sequence[keras.Model]):
        settings.check_schedule()
        self.settings = settings
        self.units = [u for n in networks for u in units.find_units(n, settings.unit)]
        self.metrics: list[keras.metrics.Mean] = []

    def compile(self) -> None:
        """Makes the logged means: share of quantized units, and p."""
        names = ("quantized_share", "quantization_probability")
        self.metrics = [keras.metrics.Mean(name) for name in names]

    def sampled(
        self, step: tf.Tensor, total_steps: tf.Tensor
    ) -> contextlib.AbstractContextManager:
        """Draws for a step; returns a context in which only the drawn units round."""
        p = self.settings.probability(step, total_steps)
        is_quantized = self.settings.draw(step, len(self.units), p)
        mean_share, mean_p = self.metrics
        mean_share.update_state(tf.cast(is_quantized, tf.float32))
        mean_p.update_state(p)
        return self.applied(is_quantized)

    def logs(self) -> dict:
        """Returns name in the logs -> mean so far."""
        return {mean.name: mean.result() for mean in self.metrics}

    def applied(self, is_quantized: tf.Tensor) -> contextlib.AbstractContextManager:
        """Returns a context in which only the drawn units round.

        Args:
            is_quantized: The draw, bool tensor [units].
        """
        draws = [
            (tensor.variables, unit_is_quantized)
            for unit, unit_is_quantized in zip(
                self.units, tf.unstack(is_quantized, len(self.units)), strict=True
            )
            for tensor in unit.tensors
        ]
        return sampling.sampled(draws, self.settings.raw_weights)
