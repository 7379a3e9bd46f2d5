"""Re-estimation of batch normalization's moving statistics in training."""

from collections.abc import Iterable
from typing import Any

from tf_lowbit.calibration.batch_norm import recalibrate_batch_norm
from tf_lowbit.compat import Logs, keras
from tf_lowbit.core import user_warnings
from tf_lowbit.network.observation import require_rereadable, validate_batches


class BatchNormReestimation(keras.callbacks.Callback):
    """Measures the moving statistics again before each evaluation.

    Moving averages lag behind the weights. With Keras's default momentum of 0.99, a
    short training ends with the statistics of an earlier network, which costs low-bit
    networks many points of accuracy. This callback calls
    `tf_lowbit.recalibrate_batch_norm` before each validation of `fit`, and at the end
    of each epoch without one. So metrics, checkpoints and the trained model have the
    measured statistics.

    Training itself does not change, because it normalizes by the statistics of each
    batch. The averages continue from the measured values. They are variables of the
    model, so a resumed run continues exactly if the data are the same each time. Put
    the callback before those that save the model, such as `Recovery`.

    If a statistic is NaN or infinite, the averages are not changed, and a warning says
    so.

    Args:
        dataset: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`, like those of
            the training and ideally of the same size; it is read from its start each
            time.
        batches: Number of batches to use, at least 1.

    Raises:
        ValueError: If `batches` is below 1, or `dataset` is arrays or can be read only
            once; and in training as in `recalibrate_batch_norm`.
    """

    def __init__(self, dataset: Iterable[Any], batches: int = 32):
        super().__init__()
        validate_batches(batches)
        require_rereadable(dataset)
        self.dataset = dataset
        self.batches = batches
        self._is_measured = False

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Notes that the statistics become outdated."""
        self._is_measured = False

    def on_test_begin(self, logs: Logs = None) -> None:
        """Measures the statistics."""
        self._measure()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Measures the statistics, unless a validation of this epoch did."""
        if not self._is_measured:
            self._measure()

    def _measure(self):
        try:
            recalibrate_batch_norm(self.model, self.dataset, self.batches)
        except ValueError as error:
            if "must be finite" not in str(error):
                raise
            # Ending a diverging training is up to other callbacks.
            user_warnings.warn(
                f"Batch statistics are not measured in this epoch: {error}",
            )
        self._is_measured = True
