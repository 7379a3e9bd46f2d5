"""`to_tflite`: writes a trained network as a TFLite file."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tf_lowbit.calibration import batch_norm
from tf_lowbit.compat import keras
from tf_lowbit.core import checks as arguments
from tf_lowbit.core import progress
from tf_lowbit.core.files import replace_file
from tf_lowbit.export import file_bytes
from tf_lowbit.export.integer import twin
from tf_lowbit.export.lowering import requirements
from tf_lowbit.export.lowering.walk import Snapped, snap
from tf_lowbit.export.options import Options
from tf_lowbit.export.targets import Target
from tf_lowbit.export.tflite import packed_weights, target_check, writer
from tf_lowbit.export.tflite.flatbuffer import read_metadata
from tf_lowbit.export.types import Note


@dataclasses.dataclass(frozen=True)
class Export:
    """An exported file and its integer model.

    Attributes:
        path: Path of the file.
        snapped: The integer model (twin) with its notes and ranges.
        size: Bytes of the file.
    """

    path: Path
    snapped: Snapped
    size: int

    @functools.cached_property
    def gzip_size(self) -> int:
        """Bytes of the file after `gzip -9`, computed on first use."""
        return file_bytes.gzip_bytes(self.path.read_bytes())

    @property
    def twin(self) -> keras.Model:
        """The Keras model that computes what the file computes; not compiled."""
        return self.snapped.twin

    @property
    def notes(self) -> tuple[Note, ...]:
        """The layers that differ from the trained ones."""
        return self.snapped.notes

    def __str__(self):
        layers = len(twin.integer_layers(self.twin))
        lines = [f"{self.path}: {self.size:,} bytes; {layers} integer layers"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def to_tflite(
    model: keras.Model,
    path: str | os.PathLike[str],
    data: Iterable[Any] | None = None,
    *,
    target: str | Target = "xnnpack",
    storage: str | None = None,
    first_layer: str | None = None,
    head: str | None = None,
    input_type: str | None = None,
    output_type: str | None = None,
    batches: int = 8,
    info: dict | None = None,
    verbose: int = 1,
) -> Export:
    """Writes a trained low-bitwidth network as a TFLite file of integer arithmetic.

    The file has the codes of the trained weights. Batch normalization and activation
    clips are folded into scales and integer biases, chosen so that each layer outputs
    the trained layer's code for every possible accumulator, if one scale and one bias
    per channel can do this. The result's `notes` list what differs from the trained
    model. `tf_lowbit.export.verify` proves the file equal to its integer model and
    measures it against the trained one.

    Args:
        model: Trained model from `tf_lowbit.quantize`; a `LowBitTrainer` of one
            student; or the `Snapped` of an earlier export, whose twin may have been
            fine-tuned.
        path: Path of the file, which is written under a temporary name, then renamed.
        data: Iterable of batches, `x` or `(x, y)`, to measure ranges that training did
            not fix: the input of a first layer that was trained in float, or of a file
            that takes pixels; sums of residual branches without `residual_bits`; the
            outputs of an int8 head. Otherwise not needed. If moving statistics of batch
            normalization lag behind on the data, a `QuantizationWarning` says so
            (`tf_lowbit.batch_norm.lag`).
        target: Where the file runs, a name of `tf_lowbit.export.TARGETS` or a
            `tf_lowbit.export.Target`. "xnnpack": right under XNNPACK, to which TFLite
            delegates; "portable": right under both XNNPACK and TFLite's builtin kernels
            on x86, wherever this is possible; "int8": as "portable", with int8
            operators only; "tflm": right under TFLite Micro's reference kernels, with
            int8 inputs and outputs, except that a softmax or the like at the end stays
            float. Other kernels were not checked. For each option below, None takes the
            target's default; a target refuses values that it does not allow.
        storage: "int8"; "int4": half the bytes, but four times as slow on a CPU; or
            "packed", for "tflm": weights take their 1 to 7 bits and a table of values.
        first_layer: "int8" or "float", for a first layer that was trained in float.
        head: "float" or "int8", for the last layer. Int8 logits can tie. None is also
            "int8" if `output_type` is "int8" or "uint8".
        input_type: "float32"; "uint8": the file takes camera pixels 0..255, if the
            network's input lies in [0, 1] or [0, 255] on `data`, also in front of
            Rescaling or Normalization layers; or "int8": codes of the first quantizer,
            by the input tensor's scale and zero point, or pixels minus 128 in front of
            such layers.
        output_type: "float32"; or "int8" or "uint8": the file outputs codes, by the
            output tensor's scale and zero point. The default of "tflm" is "int8" for
            each output that is quantized. The classes of an argmax stay int32 or int64.
        batches: Number of batches of `data` to measure on.
        info: JSON-ready facts to store in the file, such as the normalization of its
            input; `read_info` returns them.
        verbose: 1 shows a progress bar on a terminal or in a notebook if it takes long,
            0 is silent.

    Returns:
        The file's path and sizes, the twin and the notes.

    Raises:
        ValueError: For a model that is not quantized, an unknown option, or missing
            `data`.
        ExportError: (a ValueError) for a layer that cannot be exported or that the
            target cannot run, bits that the target lacks, weights or ranges that are
            not ready, an input that is not pixels, or an output without codes.
        OSError: If the file cannot be written. No partial file is left.
    """
    options = Options(target, storage, first_layer, head, input_type, output_type)
    writer.check_info(info)
    _check_path(path)
    if isinstance(model, Snapped):
        if data is not None:
            raise ValueError(
                "data must be None for a Snapped, whose ranges are measured already. "
                f"Received: data={data!r}"
            )
        snapped = model
        requirements.require_finite(snapped.twin)
        if snapped.options != options:
            raise ValueError(
                "The options must be those that the Snapped was made with: "
                f"{snapped.options}. Received: {options}"
            )
    else:
        with progress.bar("Placing thresholds", verbose) as update:
            snapped = snap(
                model, data, options=options, batches=batches, progress=update
            )
        if data is not None:
            batch_norm.warn_of_lag(model, data, batches)
    content = writer.to_bytes(snapped, info)
    target_check.require_runnable(content, options.target)
    if options.storage == "packed":
        content = packed_weights.pack(content)
    written = replace_file(path, content)
    return Export(written, snapped, len(content))


def read_info(file: str | os.PathLike[str] | bytes) -> dict:
    """Reads the `info` that `to_tflite` stored in a file.

    Args:
        file: Path of the file, or its bytes.

    Returns:
        The dict `info`.

    Raises:
        ValueError: If the file is not from `to_tflite`.
        OSError: If the file cannot be read.
    """
    return read_metadata(file_bytes.content_of("file", file))["info"]


def _check_path(path) -> None:
    """Raises FileNotFoundError for a missing folder, before the work starts."""
    folder = Path(arguments.path("path", path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The file's folder must exist. Received: {str(path)!r}"
        )
