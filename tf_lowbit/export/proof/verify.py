"""`verify`: proves a file equal to its integer model, and measures it on data."""

import copy
import operator
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from tf_lowbit.compat import keras
from tf_lowbit.core import checks as arguments
from tf_lowbit.core import progress
from tf_lowbit.export import file_bytes, layer_table, targets
from tf_lowbit.export.integer import plain_layers, twin
from tf_lowbit.export.lowering import requirements
from tf_lowbit.export.lowering.tensor_ranges import MissingRangeError
from tf_lowbit.export.lowering.walk import Snapped, snap
from tf_lowbit.export.options import Options
from tf_lowbit.export.proof import arithmetic
from tf_lowbit.export.proof.comparison import compare_on_data
from tf_lowbit.export.proof.plan import Tensors, check_operators, compare_plan
from tf_lowbit.export.proof.verification import Report
from tf_lowbit.export.tflite import (
    flatbuffer,
    micro,
    packed_weights,
    structure,
    target_check,
    writer,
)
from tf_lowbit.export.tflite.export import Export
from tf_lowbit.export.tflite.runner import Runner, runtime
from tf_lowbit.network.observation import batches_for, require_end, validate_batches

_UPSAMPLINGS = (keras.layers.UpSampling1D, keras.layers.UpSampling2D)
_MAX_POOLS = (keras.layers.MaxPooling1D, keras.layers.MaxPooling2D)


def verify(
    file: str | os.PathLike[str] | bytes,
    model: keras.Model,
    data: Iterable[Any] | None = None,
    *,
    trained: keras.Model | None = None,
    batches: int | None = None,
    tensor_batches: int | None = None,
    tolerance: float = 0.01,
    agreement: float = 0.75,
    verbose: int = 1,
) -> Report:
    """Proves a file equal to its integer model, and measures it against the trained.

    Proved against the integer model (twin), a Keras model with the same arithmetic:

    1. Every code, bias, scale, zero point, shape and operator equals the plan, which is
       made again from the model. So do the file's bytes. A file that differs fails and
       is not run, because kernels can crash on it.
    2. Operators have allowed kinds and versions, and the target has them. XNNPACK runs
       all of them except INT4 layers and the conversion of uint8 inputs and outputs;
       with target="tflm", TFLite Micro runs all. Packed weights are decoded for (1),
       and equal the packed weights of the plan.
    3. Over all possible accumulators, no more are off by one than in the plan. Off by
       one means that the output is one level away from the right one.
    4. In every Add, every pair of int8 codes has the right sum.
    5. On `data`, every layer computes the twin's codes from the same inputs. So does
       the whole network up to the first float layer.
    6. Predictions equal the twin's, unless an integer layer follows a float layer.

    Measured against the trained model, on `data`:

    7. The file's accuracy is below the trained model's by at most `tolerance` plus
       chance. Without labels, `agreement` of the predictions equal the trained model's.
       If outputs are not classes, the mean error may grow by `tolerance` of the
       outputs' standard deviation; without labels, it may be `1 - agreement` of it.
       So may that of each output after the first. A note counts the units that differ
       by more than this part of their own standard deviation.
    8. Each layer of the twin, given the trained model's inputs, gives its outputs,
       except where a note names a rounding; and measured ranges fit the data. A
       fine-tuned twin skips this.

    The kernels are XNNPACK and TFLite's builtin ones on this machine, in the version
    that the report names. Other kernels (ARM's, TFLite Micro's) may round differently.

    Args:
        file: Path of the file, or its bytes.
        model: The trained, quantized model; or the `Export` or `Snapped` of the file,
            which is needed if the twin was fine-tuned.
        data: Iterable of batches, `x` or `(x, y)`; `y` are integer labels or
            probabilities of classes, or the numbers of a regression. For several
            outputs `y` is a tuple or dict, of which the first output's counts. Outputs
            are class scores if all labels are classes; for one unit, 0 and 1. Without
            labels an argmax, the compiled loss or the last activation decides. One unit
            means class 1 above 0, or above 0.5 behind a sigmoid. None skips (5) to (8).
        trained: The trained model, only if `model` is an `Export` or a `Snapped`.
            Without it these skip (7) and (8).
        batches: Number of batches of `data` to use, 1 or more; None for all.
        tensor_batches: Number of these on which every tensor is compared, 1 or more,
            which takes longer than comparing predictions; None for all.
        tolerance: Accuracy that the file may lose, a share from 0 to 1.
        agreement: Share of the trained model's predictions that it must keep if there
            are no labels, from 0 to 1.
        verbose: 1 prints the report, and shows a progress bar on a terminal or in a
            notebook if it takes long; 0 is silent.

    Returns:
        The report.

    Raises:
        ValueError: If the file is not a complete TFLite file of `to_tflite`, or an
            argument is not as above.
        ImportError: For a file for TFLite Micro if `tflite-micro` is not installed.
        OSError: If the file cannot be read.
    """
    if batches is None:
        require_end(data)
    else:
        validate_batches(batches)
    if tensor_batches is not None:
        arguments.integer("tensor_batches", tensor_batches, at_least=1)
    if trained is not None:
        arguments.instance("trained", trained, keras.Model)
    arguments.number("tolerance", tolerance, at_least=0, at_most=1)
    arguments.number("agreement", agreement, at_least=0, at_most=1)
    content = file_bytes.content_of("file", file)
    report = Report(
        "bytes" if isinstance(file, bytes | bytearray) else str(file),
        runtime(),
        content,
        float(tolerance),
        float(agreement),
    )
    found, about, options = _read(content, report)
    is_micro = options.target.interpreter == targets.TFLITE_MICRO
    if is_micro:
        micro.require_installed()
        report.runtime = targets.TFLITE_MICRO
    snapped, trained = _plan(model, about, options, trained, report, verbose)
    report.notes = [str(note) for note in snapped.notes]
    report.is_tuned = snapped.is_tuned
    expected = flatbuffer.unpack(writer.to_bytes(snapped))
    compare_plan(found, expected, report)
    check_operators(found, report)
    report.failures += target_check.problems(found, options.target)
    differences = structure.differences(found, expected)
    if differences and not report.failures:
        paths = ", ".join(d.path for d in differences[:3])
        report.failures.append(f"the file differs from the plan in {paths}")
    if not differences and _written(expected, found, options) != content:
        report.failures.append(
            "the file's bytes are not laid out as to_tflite writes them: it may have "
            "contents outside of the schema"
        )
    is_planned = not report.failures
    tensors = Tensors(found)
    arithmetic.check_decisions(snapped, tensors, Tensors(expected), report)
    if is_planned:
        arithmetic.check_additions(snapped, tensors, report)
        if is_micro:
            runs = _check_micro(content, report)
        else:
            runs = _check_delegation(content, snapped, report)
        if data is not None and runs:
            with progress.bar("Running the file", verbose) as update:
                compare_on_data(
                    content,
                    snapped,
                    trained,
                    _tracked(snapped.twin, data, batches, update),
                    report,
                    tensor_batches,
                    micro.MicroRunner if is_micro else Runner,
                )
    else:
        report.failures.append("the file was not run, because it differs from the plan")
    if verbose:
        print(report)
    return report


def _tracked(network, data, batches, update):
    """Yields the batches to run, and moves the progress bar after each."""
    # TensorFlow does not know the number of batches of some data sets.
    total = operator.length_hint(data) or None if batches is None else batches
    for count, batch in enumerate(batches_for(network, data, batches), 1):
        yield batch
        update(count, total)


def _written(expected, found, options) -> bytes:
    """The bytes of the plan, as `to_tflite` writes them."""
    made = copy.copy(expected)
    # The file's own description and metadata, which may differ.
    made.description = found.description
    made.buffers = list(expected.buffers)
    if [m.name for m in made.metadata] == [m.name for m in found.metadata]:
        for ours, theirs in zip(made.metadata, found.metadata, strict=True):
            made.buffers[ours.buffer] = found.buffers[theirs.buffer]
    content = flatbuffer.pack(made)
    return packed_weights.pack(content) if options.storage == "packed" else content


def _read(content, report):
    """The unpacked file, its metadata and the export options in these."""
    about = flatbuffer.read_metadata(content)
    try:
        options = Options(**about["options"])
        dict(about["ranges"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "The file's metadata must be those of tf_lowbit.export.to_tflite. "
            f"Received: {error}"
        ) from error
    if options.storage == "packed":
        packed, content = content, packed_weights.unpack(content)
        report.widths = packed_weights.widths(packed)
    found = flatbuffer.unpack(content)
    structure.require_consistent(found)
    return found, about, options


def _plan(model, about, options, trained, report, verbose):
    if isinstance(model, Export):
        model = model.snapped
    if isinstance(model, Snapped):
        if model.options != options:
            report.failures.append(
                f"the file was made with {options}, but the plan has {model.options}"
            )
        if trained is None:
            return model, None
        trained = requirements.single_network(trained)
        _require_same_ends(trained, model.twin)
        return model, trained
    if trained is not None:
        raise ValueError(
            "trained must only be given with an Export or a Snapped; else model is the "
            f"trained one. Received: model={model!r}, trained={trained!r}"
        )
    network = requirements.single_network(model)
    with progress.bar("Placing thresholds", verbose) as update:
        try:
            snapped = snap(
                network, options=options, ranges=about["ranges"], progress=update
            )
        except MissingRangeError as error:
            raise ValueError(
                "The file must be of this model: export it again. "
                f"Received: a file without a range for {error.tensor!r}"
            ) from error
    return snapped, network


def _require_same_ends(trained, twin) -> None:
    """Refuses a trained network that another file was made of."""
    shapes = [
        [tuple(t.shape[1:]) for t in ends]
        for ends in (trained.inputs, trained.outputs, twin.inputs, twin.outputs)
    ]
    if shapes[:2] != shapes[2:]:
        raise ValueError(
            "trained must be the network that the file was made of, with inputs and "
            f"outputs of {shapes[2]} and {shapes[3]}. Received: {shapes[0]} and "
            f"{shapes[1]}"
        )


def _check_micro(content, report) -> bool:
    """Reports the arena of TFLite Micro; returns whether the file can be run."""
    try:
        report.arena = micro.MicroRunner(content).arena()
    except RuntimeError as error:
        report.failures.append(f"the file cannot be run: {error}")
        return False
    return True


def _check_delegation(content, snapped, report) -> bool:
    """Checks (2), delegation to XNNPACK; returns whether the file can be run."""
    try:
        runner = Runner(content)
        report.not_delegated = runner.not_delegated()
    except (ValueError, RuntimeError) as error:
        report.failures.append(
            f"the file cannot be run: {str(error).strip().splitlines()[0]}"
        )
        return False
    expected = [name for layer in snapped.twin.layers if (name := _left_out(layer))]
    ends = (*runner.inputs, *runner.outputs)
    expected += ["QUANTIZE" for d in ends if d["dtype"] == np.uint8]
    for name in set(report.not_delegated):
        extra = report.not_delegated.count(name) - expected.count(name)
        if extra > 0:
            report.failures.append(f"{extra} operators {name} are not delegated")
    return True


def _left_out(layer) -> str | None:
    """The operator of a layer that XNNPACK does not run, or None.

    Except for INT4 weights, these operators only move codes, the same in every kernel.
    """
    if isinstance(layer, twin.IntegerLinear) and layer.storage == "int4":
        row = layer_table.row_of(layer)
        return row.operators[0] if row else None
    if isinstance(layer, _MAX_POOLS) and set(layer.pool_size) == {1}:
        return "MAX_POOL_2D"
    if isinstance(layer, keras.layers.Concatenate) and len(layer.input) > 5:
        return "CONCATENATION"
    if isinstance(layer, plain_layers.EdgePadding):
        return "MIRROR_PAD"
    if isinstance(layer, plain_layers.ArgMax):
        return "ARG_MAX"
    if isinstance(layer, keras.layers.Reshape) and not layer.target_shape:
        return "RESHAPE"
    if isinstance(layer, _UPSAMPLINGS):
        return "RESIZE_NEAREST_NEIGHBOR"
    return None
