"""Counts the steps of a training."""

from tf_lowbit.compat import Logs, keras, tf
from tf_lowbit.training.counters import counter
from tf_lowbit.training.stochastic_precision import StochasticPrecision


class StepCount(keras.callbacks.Callback):
    """Counts the steps of a trainer; stochastic precision draws by them.

    It is a callback of each `fit`. It computes the first step from epoch and batch, so
    that the step is right if a training starts, continues after another `fit`, or
    resumes within an epoch.

    Args:
        precision: Stochastic precision, which needs the number of steps, or None. Its
            `steps`, if given, is that number.

    Attributes:
        progress: Counters in checkpoints: `step`, the steps since epoch 0 of the
            current training, and `total_steps`.
        is_known: Whether `total_steps` is known for the current training.
    """

    def __init__(self, precision: StochasticPrecision | None):
        super().__init__()
        self._is_needed = precision is not None
        self._total = total = precision and precision.steps
        self._epoch = 0
        self._is_first_batch = True
        self._has_trained = False
        self.is_known = total is not None
        # In a tf.train.Checkpoint, checkpoints save the counters, but they are not
        # weights of the model.
        self.progress = tf.train.Checkpoint(
            step=counter(), total_steps=counter(total or 0)
        )

    def variables(self) -> dict[str, tf.Variable]:
        """Returns the counters by name."""
        return {n: getattr(self.progress, n) for n in ("step", "total_steps")}

    def on_train_begin(self, logs: Logs = None) -> None:
        """Checks that the number of steps is known, if it is needed."""
        self._is_first_batch = True
        self.is_known = self._total is not None or bool(self.params.get("steps"))
        if self._is_needed and not self.is_known:
            raise ValueError(
                "StochasticPrecision must know the number of steps: give fit "
                "steps_per_epoch, or StochasticPrecision steps. Received: data of "
                "unknown length"
            )

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Sets the first step of `fit`, unless a checkpoint within the epoch did."""
        self._epoch = epoch
        steps, done = self.params.get("steps"), int(self.progress.step.numpy())
        if self._is_first_batch and steps:
            first = epoch * steps
            self._begin_at(done if first <= done < first + steps else first)
        elif self._is_first_batch and epoch == 0 and self._has_trained:
            # The count is from an earlier training. It is not from a checkpoint, which
            # is restored into a trainer that has not trained yet.
            self.progress.step.assign(0)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Sets the first step from the batch; Keras may skip this hook."""
        steps = self.params.get("steps")
        if self._is_first_batch and steps:
            self._begin_at(self._epoch * steps + batch)
        self._is_first_batch = False

    def on_train_end(self, logs: Logs = None) -> None:
        """Stores that the counters are from a finished training."""
        self._has_trained = True

    def _begin_at(self, step: int):
        if self._total is None:
            total = self.params["epochs"] * self.params["steps"]
            self.progress.total_steps.assign(total)
        self.progress.step.assign(step)
