"""`to_tflite`: from a trained network to a file."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import rich.console
import rich.progress

from tf_lowbit import batch_norm
from tf_lowbit.compat import keras
from tf_lowbit.core import checks as arguments
from tf_lowbit.export import checks, files, micro, packing, tflite, twin
from tf_lowbit.export.flatbuffer import read_metadata
from tf_lowbit.export.options import Options
from tf_lowbit.export.snapping import Note, Snapped, snap


@dataclasses.dataclass(frozen=True)
class Export:
    """A file, and what it was made of.

    Attributes:
        path: the file.
        snapped: the twin with its notes and ranges; `verify` takes it too.
        size: bytes of the file.
    """

    path: Path
    snapped: Snapped
    size: int

    @functools.cached_property
    def gzip_size(self) -> int:
        """Bytes of the file behind `gzip -9`; read and computed at the first use."""
        return files.gzip_bytes(self.path.read_bytes())

    @property
    def twin(self) -> keras.Model:
        """The Keras model that computes what the file computes; not compiled."""
        return self.snapped.twin

    @property
    def notes(self) -> tuple[Note, ...]:
        """The layers that are not exactly what was trained."""
        return self.snapped.notes

    def __str__(self):
        layers = len(twin.integer_layers(self.twin))
        lines = [f"{self.path}: {self.size:,} bytes; {layers} integer layers"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def to_tflite(
    model,
    path,
    data=None,
    *,
    target: str = "xnnpack",
    storage: str = "int8",
    first_layer: str = "int8",
    head: str | None = None,
    input_type: str | None = None,
    output_type: str | None = None,
    batches: int = 8,
    info: dict | None = None,
    verbose: int = 1,
) -> Export:
    """Writes a trained low-bitwidth network as a TFLite file of integer arithmetic.

    Weight codes are those of the training's quantizers, batch normalisation and the
    activations' clips are folded into scales and integer biases, and these are placed
    so that each layer decides as the trained one for every possible accumulator,
    wherever one scale and one bias can. What is not exactly what was trained is in the
    result's `notes`. `tf_lowbit.export.verify` proves the file equal to its
    integer model and measures it against the trained one.

    Args:
        model: what `tf_lowbit.quantize` made, trained; a `LowBitTrainer` of one
            student; or the `Snapped` of an earlier export, whose twin may have been
            fine-tuned.
        path: where the file goes; written under a temporary name, then renamed.
        data: iterable of batches, `x` or `(x, y)`, to measure ranges on that the
            training did not fix: the input of a first layer that was trained in float,
            or of a file that takes pixels; sums of residual branches without
            `residual_bits`; an int8 head's outputs. Not needed else. Where moving
            statistics of batch normalisation lag on them, a `QuantizationWarning` says
            so (`tf_lowbit.batch_norm.lag`).
        target: "xnnpack": right under XNNPACK, to which TFLite delegates; "portable":
            right under XNNPACK and TFLite's builtin kernels on x86, wherever both can
            be; "tflm": right under TFLite Micro's reference kernels, with int8 inputs
            and outputs. Other kernels were not checked. A softmax or the like at the
            end stays float.
        storage: "int8"; "int4": half the bytes, four times as slow on a CPU; or
            "packed", for "tflm": weights take their 1 to 7 bits and a table of values.
        first_layer: "int8" or "float": a first layer that was trained in float.
        head: "float" or "int8": the last layer. Int8 logits tie now and then. None for
            "float", or "int8" for "tflm" or where `output_type` is of codes.
        input_type: "float32"; "uint8": the file takes pixels 0..255 as a camera gives
            them, if the network's input lies in [0, 1] or [0, 255] on `data`, also in
            front of Rescaling or Normalization layers; or "int8": the codes of the
            first quantizer, by the input tensor's scale and zero point, and pixels
            less 128 in front of such layers. None for "float32", or "int8" for "tflm".
        output_type: "float32"; or "int8", "uint8": the file puts out codes, by the
            output tensor's scale and zero point. None for "float32"; for "tflm" for
            "int8" wherever an end is quantized.
        batches: how many batches of `data` to measure on.
        info: JSON-ready facts to be kept in the file, such as how its input is
            normalised; `read_info` gives them back.
        verbose: 1 shows a progress bar, 0 is silent.

    Returns:
        The file's path and sizes, the twin and the notes.

    Raises:
        ValueError: for a model that is not quantized, options that there are not, or
            missing `data`.
        ExportError: (a ValueError) naming a layer that has no form in a file or for
            the target, weights or ranges that are not ready, an input that is no
            pixels, or an end that has no codes.
        OSError: if the file cannot be written. No half file is left.
    """
    options = Options(target, storage, first_layer, head, input_type, output_type)
    tflite.check_info(info)
    _check_path(path)
    if isinstance(model, Snapped):
        if data is not None:
            raise ValueError(
                "data must be None where model is a Snapped: its ranges were measured "
                f"when it was made. Received: data={data!r}"
            )
        snapped = model
        checks.require_finite(snapped.twin)
        if snapped.options != options:
            raise ValueError(
                "The options of a Snapped are those that it was made with: "
                f"{snapped.options}. Received: {options}"
            )
    else:
        if data is not None:
            batch_norm.warn_of_lag(model, data, batches)
        with _progress(verbose) as progress:
            snapped = snap(
                model, data, options=options, batches=batches, progress=progress
            )
    content = tflite.to_bytes(snapped, info)
    if target == "tflm":
        micro.require_runnable(content)
    if storage == "packed":
        content = packing.pack(content)
    written = files.replace_file(path, content)
    return Export(written, snapped, len(content))


def read_info(file) -> dict:
    """What `to_tflite(info=...)` put into a file.

    Args:
        file: path of the file, or its bytes.

    Returns:
        The dict that was given.

    Raises:
        ValueError: if it is no file of `to_tflite`.
        OSError: if it cannot be read.
    """
    return read_metadata(files.content_of("file", file))["info"]


def _check_path(path) -> None:
    """Says before the work that there is no such folder."""
    folder = Path(arguments.path("path", path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The file's folder must exist. Received: {str(path)!r}"
        )


@contextlib.contextmanager
def _progress(verbose):
    """Yields a function (done, total) that moves a bar; None where silent."""
    if not verbose:
        yield None
        return
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task("Placing thresholds", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
