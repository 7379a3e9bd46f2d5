"""Statistics of batch normalisation that are those of the network as it stands."""

import warnings

from tf_lowbit.batch_norm import recalibrate_batch_norm
from tf_lowbit.compat import keras
from tf_lowbit.observation import require_rereadable, validate_batches


class BatchNormReestimation(keras.callbacks.Callback):
    """Measures the moving statistics anew before each evaluation.

    Moving averages lag behind the weights: with Keras's default momentum of 0.99 a
    short training ends with those of another network, and low-bit networks lose many
    points by it. This callback calls `tf_lowbit.recalibrate_batch_norm` before each
    validation of `fit`, and at the end of each epoch that has none. So metrics,
    checkpoints and the trained model all have the measured statistics.

    Training itself does not change by it, for it normalises by each batch's own
    statistics: the averages go on from what was measured. They are variables of the
    model, so that a resumed run goes on exactly, provided that the data are the same
    ones each time. Put the callback ahead of those that save the model, such as
    `Recovery`.

    Where a statistic is NaN or infinite the averages stay as they are, and a warning
    says so.

    Args:
        dataset: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, as training
            sees them, at best of the same size; it is read from its start each time.
        batches: how many of them to use, at least 1.

    Raises:
        ValueError: if `batches` is below 1, or `dataset` is arrays or can be read only
            once; and in training as `recalibrate_batch_norm` says.
    """

    def __init__(self, dataset, batches: int = 32):
        super().__init__()
        validate_batches(batches)
        require_rereadable(dataset)
        self.dataset = dataset
        self.batches = batches
        self._is_measured = False

    def on_epoch_begin(self, epoch, logs=None):
        """Notes that the weights are going to move."""
        del epoch, logs
        self._is_measured = False

    def on_test_begin(self, logs=None):
        """Measures."""
        del logs
        self._measure()

    def on_epoch_end(self, epoch, logs=None):
        """Measures, unless a validation has done so in this epoch."""
        del epoch, logs
        if not self._is_measured:
            self._measure()

    def _measure(self):
        try:
            recalibrate_batch_norm(self.model, self.dataset, self.batches)
        except ValueError as error:
            if "must be finite" not in str(error):
                raise
            # A training that diverges is for others to end.
            warnings.warn(
                f"Batch statistics are not measured in this epoch: {error}",
                stacklevel=3,
            )
        self._is_measured = True
