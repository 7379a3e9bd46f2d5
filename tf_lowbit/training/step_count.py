"""How many steps a training has, and which of them comes next."""

from tf_lowbit.compat import keras, tf
from tf_lowbit.core.counters import counter


class StepCount:
    """The counters that a trainer draws by, and what keeps them right.

    Args:
        total: steps of every training; None takes what `fit` says.
        is_needed: whether there must be a total.

    Attributes:
        progress: checkpointed counters: `step`, the steps done since epoch 0 of the
            present training, and `total_steps`.
        is_known: whether the total is the present training's.
    """

    def __init__(self, total: int | None, *, is_needed: bool):
        self._total = total
        self._is_needed = is_needed
        self._has_trained = False
        self.is_known = total is not None
        # A tf.train.Checkpoint is tracked by checkpoints, yet its variables are no
        # weights of the model.
        self.progress = tf.train.Checkpoint(step=counter(), total_steps=counter())
        if total is not None:
            self.progress.total_steps.assign(total)

    def variables(self) -> dict:
        """The counters by name."""
        return {
            "step": self.progress.step,
            "total_steps": self.progress.total_steps,
        }

    def expect(self, steps_per_epoch: int | None) -> None:
        """Checks that the length of the training that `fit` begins is known.

        Raises:
            ValueError: if it is not, and is needed.
        """
        self.is_known = self._total is not None or bool(steps_per_epoch)
        if self._is_needed and not self.is_known:
            raise ValueError(
                "StochasticPrecision must know how many steps the training has: give "
                "fit steps_per_epoch, or StochasticPrecision steps. Received: "
                "data of unknown length"
            )

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None) -> None:
        """Sets the counters where `fit` begins, when what restores them has done so.

        Args:
            epoch: that `fit` begins with.
            epochs: at whose end it is done.
            steps: of an epoch; None where that is not known.
        """
        if steps:
            done, first = int(self.progress.step.numpy()), epoch * steps
            is_within = first <= done < first + steps
            self.begin_at(done if is_within else first, epochs * steps)
        elif epoch == 0 and self._has_trained:
            # What was counted is another training's: a checkpoint's would come to a
            # trainer that has not trained yet.
            self.progress.step.assign(0)

    def begin_at(self, step: int, total: int) -> None:
        """Sets the number of the step to come, and the length that `fit` says."""
        if self._total is None:
            self.progress.total_steps.assign(total)
        self.progress.step.assign(step)

    def end(self) -> None:
        """Remembers that the counters are those of a training that is done."""
        self._has_trained = True


class CountSteps(keras.callbacks.Callback):
    """Tells a `StepCount` what `fit` knows.

    The first step's number follows from epoch and batch, so that it is right whether
    the training starts, goes on after another `fit`, or resumes in mid-epoch.

    Args:
        count: of the trainer that `fit` trains.
    """

    def __init__(self, count: StepCount):
        super().__init__()
        self._count = count
        self._epoch = 0
        self._is_first = True

    def on_train_begin(self, logs=None):
        """Checks that there is a total."""
        del logs
        self._count.expect(self.params.get("steps"))

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the counters to the epoch that `fit` begins with."""
        del logs
        self._epoch = epoch
        if self._is_first:
            epochs, steps = self.params["epochs"], self.params.get("steps")
            self._count.begin_epoch(epoch, epochs, steps)

    def on_train_batch_begin(self, batch, logs=None):
        """Sets them to the very batch; a `CallbackList` may leave this hook out."""
        del logs
        steps = self.params.get("steps")
        if self._is_first and steps:
            first = self._epoch * steps + batch
            self._count.begin_at(first, self.params["epochs"] * steps)
        self._is_first = False

    def on_train_end(self, logs=None):
        """Closes the training."""
        del logs
        self._count.end()
