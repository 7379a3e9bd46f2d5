"""Counts the steps of a training."""

from typing import Any

from tf_lowbit.compat import keras, tf
from tf_lowbit.training.counters import counter
from tf_lowbit.training.stochastic_precision import StochasticPrecision


class StepCount(keras.callbacks.Callback):
    """Counts the steps of a trainer, which stochastic precision draws by.

    It is a callback of each `fit`. The first step is computed from epoch and batch, so
    that it is right if a training starts, continues after another `fit`, or resumes
    within an epoch.

    Args:
        precision: stochastic precision, which needs the number of steps and may give
            it; or None.

    Attributes:
        progress: checkpointed counters: `step`, the steps since epoch 0 of the present
            training, and `total_steps`.
        is_known: whether `total_steps` is known for the present training.
    """

    def __init__(self, precision: StochasticPrecision | None):
        super().__init__()
        self._is_needed = precision is not None
        self._total = total = precision and precision.steps
        self._epoch = 0
        self._is_first_batch = True
        self._has_trained = False
        self.is_known = total is not None
        # In a tf.train.Checkpoint, so that checkpoints save the counters, but they are
        # not weights of the model.
        self.progress = tf.train.Checkpoint(
            step=counter(), total_steps=counter(total or 0)
        )

    def variables(self) -> dict[str, tf.Variable]:
        """The counters by name."""
        return {n: getattr(self.progress, n) for n in ("step", "total_steps")}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that the length of the training is known, if it is needed."""
        del logs
        self._is_first_batch = True
        self.is_known = self._total is not None or bool(self.params.get("steps"))
        if self._is_needed and not self.is_known:
            raise ValueError(
                "StochasticPrecision must know the number of steps: give fit "
                "steps_per_epoch, or StochasticPrecision steps. Received: data of "
                "unknown length"
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the first step of `fit`, unless a checkpoint is within the epoch."""
        del logs
        self._epoch = epoch
        steps, done = self.params.get("steps"), int(self.progress.step.numpy())
        if self._is_first_batch and steps:
            first = epoch * steps
            self._begin_at(done if first <= done < first + steps else first)
        elif self._is_first_batch and epoch == 0 and self._has_trained:
            # The count is from another training: a checkpoint would be restored into a
            # trainer that has not trained yet.
            self.progress.step.assign(0)

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Sets the first step by the batch; a `CallbackList` may skip this hook."""
        del logs
        steps = self.params.get("steps")
        if self._is_first_batch and steps:
            self._begin_at(self._epoch * steps + batch)
        self._is_first_batch = False

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Remembers that the counters are from a finished training."""
        del logs
        self._has_trained = True

    def _begin_at(self, step: int):
        if self._total is None:
            total = self.params["epochs"] * self.params["steps"]
            self.progress.total_steps.assign(total)
        self.progress.step.assign(step)
