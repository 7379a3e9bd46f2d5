"""Freezes the weights whose codes oscillate."""

import math

import numpy as np

from tf_lowbit.compat import Logs, keras, tf
from tf_lowbit.core import checks
from tf_lowbit.network import oscillation
from tf_lowbit.network.inspection import networks, require_quantized
from tf_lowbit.network.oscillation import WeightOscillation


class OscillationFreezing(keras.callbacks.Callback):
    """Freezes weights that keep jumping between two levels of their grid.

    Iterative weight freezing after Nagel et al., arXiv:2203.11086. The straight-through
    gradient moves a latent weight back and forth over the threshold between two
    levels. Its code then flips: it changes against the direction of its last change.
    This callback measures how often each weight flips, as a moving average over the
    steps. A weight that flips more often than a threshold is frozen: it is put on the
    level of its averaged and rounded code, and stays there until the training ends.
    The threshold falls from `threshold` to `final_threshold` along half a cosine, over
    all epochs of `fit`.

    The shares of the weights that oscillate (flip in more than 0.5 % of the steps) and
    that are frozen are added to the logs, as `oscillating_weights` and
    `frozen_weights`: put this callback ahead of loggers. `tfl.statistics` has both for
    each tensor. `threshold=1, final_threshold=1` freezes nothing, and only measures.

    Quantizers made for more than 4 bits are left alone, as in the authors' code. Where
    a stage changes the bits of a tensor, its weights are free again and the measurement
    starts anew.

    It looks once after each step, or with `steps_per_execution` once after each
    execution: in between, frozen weights move with the others.

    The state hangs on each network as `network.oscillation`, 15 bytes for each weight,
    so that `Recovery` and `tf.train.Checkpoint` save it and a resumed run goes on
    exactly. A checkpoint of a training without this callback has no such state, and
    cannot be resumed with it. A SavedModel holds it too, a `.keras` or `.h5` file does
    not. A later `fit` with this callback goes on with the frozen weights of the
    earlier one, unless weights were loaded or trained without it in between: then all
    are free again.

    Args:
        threshold: Frequency above which a weight is frozen at the start, in (0, 1].
        final_threshold: The same at the end, at most `threshold`.
        momentum: Of the moving averages of flips and codes, in (0, 1): the share of the
            newest step. A `final_threshold` below it freezes at the first flip.

    Attributes:
        weights: While it trains, one `WeightOscillation` for each weight tensor, with
            `tensor`, `frequency` and `frozen`.

    Raises:
        ValueError: If a value is out of its range; and when training begins, if the
            model is not quantized, or no weights of it at 4 bits or fewer.
    """

    def __init__(
        self,
        threshold: float = 0.1,
        final_threshold: float = 0.01,
        momentum: float = 0.01,
    ):
        super().__init__()
        # The logs are not read: without this flag Keras would wait for them and fetch
        # them from the device after each step.
        self._supports_tf_logs = True
        self.threshold = checks.number("threshold", threshold, above=0, at_most=1)
        self.final_threshold = checks.number(
            "final_threshold", final_threshold, above=0, at_most=threshold
        )
        self.momentum = checks.number("momentum", momentum, above=0, below=1)
        self.weights: list[WeightOscillation] = []
        self._epoch = self._batch = 0
        # Whether the weights have moved since it looked.
        self._is_behind = False

    def on_train_begin(self, logs: Logs = None) -> None:
        """Makes the state, where no earlier training has."""
        self._is_behind = False
        require_quantized(self.model)
        self.weights = [w for n in networks(self.model) for w in oscillation.track(n)]
        if not self.weights:
            raise ValueError(
                f"A weight must be quantized to {oscillation.MOST_BITS} bits or fewer: "
                "more are not frozen. Leave OscillationFreezing out. "
                f"Received: {self.model.name!r}"
            )
        self._look = tf.function(self._look_at_all)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Notes that a step begins."""
        self._is_behind = True
        self._batch = batch

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Measures and freezes."""
        self._batch = batch
        self._catch_up()

    def after_fit(self) -> None:
        """Measures the last step, if an interruption came between."""
        if self._is_behind:
            self._catch_up()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Adds the shares to the logs."""
        if logs is not None:
            sizes = [own.weights.shape.num_elements() for own in self.weights]
            for name, shares in (
                ("oscillating_weights", [w.oscillating_share() for w in self.weights]),
                ("frozen_weights", [w.frozen_share() for w in self.weights]),
            ):
                logs[name] = float(np.average(shares, weights=sizes))

    def threshold_at(self, progress: float) -> float:
        """Returns the threshold after a share of the training.

        Args:
            progress: Share of the steps that are done, in [0, 1].
        """
        fall = 0.5 * (1.0 - math.cos(math.pi * min(progress, 1.0)))
        return self.threshold + (self.final_threshold - self.threshold) * fall

    def _catch_up(self):
        steps = self.params.get("steps")
        within = (self._batch + 1) / steps if steps else 0.0
        progress = (self._epoch + within) / self.params["epochs"]
        self._look(tf.constant(self.threshold_at(progress), tf.float32))
        self._is_behind = False

    def _look_at_all(self, threshold):
        for weight in self.weights:
            weight.look(threshold, self.momentum)
