"""What becomes of each tensor during a training, for TensorBoard."""

import os
import warnings

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks
from tf_lowbit.inspection import networks, require_quantized
from tf_lowbit.observation import require_rereadable, validate_batches
from tf_lowbit.tensor_statistics import statistics


class QuantizationMonitor(keras.callbacks.Callback):
    """Writes to TensorBoard how well the values of each tensor sit on their grid.

    At the end of an epoch, for every quantizer: `bits`, `step`, `sqnr` (decibels; left
    out where it is infinite), `clip_rate` and `entropy` (bits), as `TensorStatistics`
    has them, and a histogram of the levels that are used. And whatever is in the logs:
    loss, its parts, metrics, and the share of units that stochastic precision
    quantizes.

    The tags are `<what>/<tensor>`, so that TensorBoard shows a quantity of all layers
    side by side; of several students `<student's name>/<what>/<tensor>`.

    Where values are NaN or infinite there is nothing to measure: a warning tells, and
    the network's tensors are left out in that epoch.

    It needs the package `tensorboard`.

    Args:
        log_dir: folder of TensorBoard's files; the callback writes to `quantization/`
            in it.
        dataset: iterable of batches for the activations, as in `statistics`: the same
            ones each time, so no generator; None for the weights alone.
        batches: how many of them to use.
        every: epochs between two measurements.

    Raises:
        ValueError: if `every` or `batches` is below 1, or `dataset` is arrays or can
            be read only once; and when training begins, if nothing in the model is
            quantized.
    """

    def __init__(self, log_dir, dataset=None, batches: int = 1, every: int = 1):
        super().__init__()
        checks.integer("every", every, at_least=1)
        validate_batches(batches)
        if dataset is not None:
            require_rereadable(dataset)
        self.log_dir = checks.path("log_dir", log_dir)
        self.dataset = dataset
        self.batches = batches
        self.every = every
        self._writer = None

    def on_train_begin(self, logs=None):
        """Opens the file."""
        del logs
        require_quantized(self.model)
        folder = os.path.join(self.log_dir, "quantization")
        self._writer = tf.summary.create_file_writer(folder)

    def on_epoch_end(self, epoch, logs=None):
        """Measures and writes."""
        with self._writer.as_default(step=epoch):
            for name, value in (logs or {}).items():
                tf.summary.scalar(f"training/{name}", value)
            if (epoch + 1) % self.every == 0:
                self._write_tensors()
        self._writer.flush()

    def on_train_end(self, logs=None):
        """Closes the file."""
        del logs
        self._writer.close()

    def _write_tensors(self):
        found = networks(self.model)
        names = getattr(self.model, "student_names", [""])
        for name, network in zip(names, found, strict=True):
            front = f"{name}/" if len(found) > 1 else ""
            try:
                measured = statistics(network, self.dataset, self.batches)
            except ValueError as error:
                if "must be finite" not in str(error):
                    raise
                # A training that diverges is for others to end.
                warnings.warn(
                    f"The tensors are not written in this epoch: {error}", stacklevel=3
                )
                continue
            for tensor in measured:
                for what in ("bits", "step", "sqnr", "clip_rate", "entropy"):
                    value = getattr(tensor, what)
                    if abs(value) != float("inf"):
                        tf.summary.scalar(f"{front}{what}/{tensor.name}", value)
                if tensor.codes:
                    tf.summary.histogram(
                        f"{front}levels/{tensor.name}",
                        _as_sample(tensor),
                        buckets=len(tensor.codes),
                    )


def _as_sample(tensor):
    """Codes as often as they occur among a thousand values, for a histogram."""
    counts = [round(1000 * share) for share in tensor.occupancy]
    return tf.repeat(tf.constant(tensor.codes, tf.float32), counts)
