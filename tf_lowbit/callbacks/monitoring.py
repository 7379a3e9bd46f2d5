"""Logs the quantization error of each tensor to TensorBoard."""

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from tf_lowbit.compat import Logs, keras, tf
from tf_lowbit.core import checks, user_warnings
from tf_lowbit.core.grid import MAX_BITS
from tf_lowbit.network.inspection import networks, quantized_tensors, require_quantized
from tf_lowbit.network.observation import require_rereadable, validate_batches
from tf_lowbit.network.tensor_statistics import statistics
from tf_lowbit.quantizers import WEIGHT

_MEASURED = (
    *("bits", "step", "sqnr", "clip_rate", "entropy"),
    *("oscillating", "frozen"),  # None without OscillationFreezing.
)


class QuantizationMonitor(keras.callbacks.Callback):
    """Writes the quantization error of each tensor to TensorBoard.

    At the end of an epoch it writes, for every quantizer, `bits`, `step`, `sqnr` (dB,
    if finite), `clip_rate` and `entropy` (bits), as defined in `TensorStatistics`, and
    a histogram of the levels. With `OscillationFreezing` it also writes `oscillating`
    and `frozen` for weights. It also writes the logs: loss, its terms, metrics, and the
    share of units that stochastic precision quantizes.

    The tags are `<quantity>/<tensor>`, so that TensorBoard shows a quantity of all
    layers side by side; for several students `<student's name>/<quantity>/<tensor>`.

    The card `overview` describes the whole network: the means of `sqnr` and `clip_rate`
    over its tensors, `lowest_sqnr`, and `changed_codes`, the share of weights whose
    code changed since the last measurement, for tensors whose bits did not.

    If values are NaN or infinite, a warning says so, and the network's tensors are
    skipped in that epoch.

    It needs the package `tensorboard`.

    Args:
        log_dir: Folder of TensorBoard's files; the callback writes to `quantization/`
            in it.
        dataset: Iterable of batches for the activations, as in `statistics`, the same
            each time, so not a generator; None for the weights alone.
        batches: Number of batches to use.
        every: Epochs between two measurements.

    Raises:
        ValueError: If `every` or `batches` is below 1, or `dataset` is arrays or can
            be read only once; and when training begins, if nothing in the model is
            quantized.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        dataset: Iterable[Any] | None = None,
        batches: int = 1,
        every: int = 1,
    ):
        super().__init__()
        checks.integer("every", every, at_least=1)
        validate_batches(batches)
        if dataset is not None:
            require_rereadable(dataset)
        self.log_dir = checks.path("log_dir", log_dir)
        self.dataset = dataset
        self.batches = batches
        self.every = every
        self._writer: Any = None  # Open from the start of a training to its end.
        # Name of a network -> tensor -> bits and codes at the last measurement.
        self._codes: dict[str, dict] = {}

    def on_train_begin(self, logs: Logs = None) -> None:
        """Opens the log file."""
        require_quantized(self.model)
        folder = os.path.join(self.log_dir, "quantization")
        self._writer = tf.summary.create_file_writer(folder)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Measures the tensors, and writes the logs."""
        with self._writer.as_default(step=epoch):
            for name, value in (logs or {}).items():
                tf.summary.scalar(f"training/{name}", value)
            if (epoch + 1) % self.every == 0:
                self._write_tensors()
        self._writer.flush()

    def on_train_end(self, logs: Logs = None) -> None:
        """Closes the log file."""
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
                # Ending a diverging training is up to other callbacks.
                user_warnings.warn(
                    f"The tensors are not written in this epoch: {error}"
                )
                continue
            self._write_overview(front, network, measured)
            for tensor in measured:
                for what in _MEASURED:
                    value = getattr(tensor, what)
                    if value is not None and math.isfinite(value):
                        tf.summary.scalar(f"{front}{what}/{tensor.name}", value)
                if tensor.codes:
                    tf.summary.histogram(
                        f"{front}levels/{tensor.name}",
                        _as_sample(tensor),
                        buckets=len(tensor.codes),
                    )

    def _write_overview(self, front, network, measured):
        sqnr = [tensor.sqnr for tensor in measured if math.isfinite(tensor.sqnr)]
        if sqnr:
            tf.summary.scalar(f"{front}overview/sqnr", np.mean(sqnr))
            tf.summary.scalar(f"{front}overview/lowest_sqnr", min(sqnr))
        clip_rate = np.mean([tensor.clip_rate for tensor in measured])
        tf.summary.scalar(f"{front}overview/clip_rate", clip_rate)
        before = self._codes.get(front, {})
        self._codes[front] = codes = _weight_codes(network)
        pairs = [
            (before[name][1], own)
            for name, (bits, own) in codes.items()
            if before.get(name, (None,))[0] == bits
        ]
        if pairs:
            changed = sum(np.count_nonzero(old != new) for old, new in pairs)
            share = changed / sum(new.size for _, new in pairs)
            tf.summary.scalar(f"{front}overview/changed_codes", share)


def _weight_codes(network):
    """Name of each rounded weight tensor -> bits, codes."""
    return {
        tensor.name: (tensor.bits, tensor.codes().numpy().astype(np.int16))
        for tensor in quantized_tensors(network)
        if tensor.role == WEIGHT and tensor.bits <= MAX_BITS
    }


def _as_sample(tensor):
    """A sample of about 1000 codes with their frequencies, for a histogram."""
    counts = [round(1000 * share) for share in tensor.occupancy]
    return tf.repeat(tf.constant(tensor.codes, tf.float32), counts)
