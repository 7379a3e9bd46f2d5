"""Proving a file equal to its integer model, and measuring it against the trained."""

import copy

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.core import checks as arguments
from tf_lowbit.export import (
    checks,
    files,
    flatbuffer,
    kernels,
    micro,
    operators,
    packing,
    structure,
    tflite,
    thresholds,
    twin,
)
from tf_lowbit.export.comparing import compare_on_data
from tf_lowbit.export.contents import Tensors, check_operators, compare_plan
from tf_lowbit.export.convert import Export
from tf_lowbit.export.flatbuffer import FileBuilder, schema
from tf_lowbit.export.options import Options
from tf_lowbit.export.report import Decisions, Report
from tf_lowbit.export.running import Runner, runtime
from tf_lowbit.export.snapping import Snapped, snap
from tf_lowbit.observation import batches_for, require_end, validate_batches

_UPSAMPLINGS = (keras.layers.UpSampling1D, keras.layers.UpSampling2D)
_MAX_POOLS = (keras.layers.MaxPooling1D, keras.layers.MaxPooling2D)
_INT8 = np.arange(-128, 128, dtype=np.int8)


def verify(
    file,
    model,
    data=None,
    *,
    trained: keras.Model | None = None,
    batches: int | None = None,
    tensor_batches: int | None = None,
    tolerance: float = 0.01,
    agreement: float = 0.75,
    verbose: int = 1,
) -> Report:
    """Proves a file equal to its integer model, and measures it against the trained.

    Proved, of the twin (the Keras model of the same integer arithmetic):

    1. Every code, bias, scale, zero point, shape and operator is that of the plan,
       which is made anew from the model; so are the file's bytes. A file that differs
       in any of them has failed, and is not run: kernels end the process on some.
    2. Operators are of the allowed kinds and versions, and XNNPACK runs all of them;
       INT4 layers and the conversion of uint8 ends apart; or TFLite Micro does, with
       target="tflm". Packed weights are decoded for (1), and are what the plan's
       weights are packed to.
    3. Over all accumulators, no more are off by one than in the plan: accumulator
       values whose output comes out one level off.
    4. In every Add, every pair of int8 codes has the right sum.
    5. On `data`, every layer computes the twin's codes; and, where no float layer comes
       before, so does the whole network.
    6. Predictions equal the twin's, unless a float layer comes before an integer one.

    Measured on `data`, of the trained model:

    7. The file's accuracy is not below the trained model's by more than `tolerance`
       and what chance could be. Without labels, `agreement` of the predictions are the
       trained model's. Outputs that are no classes have errors instead: the mean one
       may grow by `tolerance` of the outputs' standard deviation; without labels, it
       may be `1 - agreement` of it.
    8. Each layer of the twin, given the trained model's own inputs, gives its outputs,
       as far as no note names a rounding; and ranges that were measured fit the data.
       Not of a twin that was trained further.

    The kernels are XNNPACK and TFLite's builtin ones on this machine, of the runtime's
    version in the report. Other kernels (ARM's, TFLite Micro's) may round otherwise.

    Args:
        file: path of the file, or its bytes.
        model: the trained, quantized model; or the `Export` or `Snapped` that the file
            was made of (wanted where the twin was fine-tuned).
        data: iterable of batches, `x` or `(x, y)`; `y` integer labels or probabilities
            of the classes, or the numbers of a regression; of a network with several
            outputs a tuple or dict of which those of the first output count. One unit
            is a binary classifier's if labels are 0 and 1 or a sigmoid is in front:
            class 1 above 0, or behind a sigmoid above 0.5. None leaves (5) to (8) out.
        trained: the trained model, where `model` is an `Export` or a `Snapped`; not
            given else. Without it (7) and (8) are left out there.
        batches: how many batches of `data` to use, 1 or more; None for all.
        tensor_batches: on how many of them every tensor is compared, 1 or more, which
            takes longer than the predictions; None for all.
        tolerance: how much accuracy the file may lose, a share from 0 to 1.
        agreement: what share of the trained model's predictions it must keep where
            there are no labels, from 0 to 1.
        verbose: 1 prints the report.

    Returns:
        The report.

    Raises:
        ValueError: if the file is no whole TFLite file of `to_tflite`, or an argument
            is not as above.
        ImportError: for a file for "tflm" where `tflite-micro` is missing.
        OSError: if it cannot be read.
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
    content = files.content_of("file", file)
    report = Report(
        "bytes" if isinstance(file, bytes) else str(file),
        runtime(),
        content,
        float(tolerance),
        float(agreement),
    )
    found, about = _read(content, report)
    is_micro = Options(**about["options"]).target == "tflm"
    if is_micro:
        micro.require_installed()
        report.runtime = micro.RUNTIME
    snapped, trained = _plan(model, about, trained, report)
    report.notes = [str(note) for note in snapped.notes]
    report.is_tuned = snapped.is_tuned
    expected = flatbuffer.unpack(tflite.to_bytes(snapped))
    compare_plan(found, expected, report)
    check_operators(found, report)
    differences = structure.differences(found, expected)
    if differences and not report.failures:
        paths = ", ".join(d.path for d in differences[:3])
        report.failures.append(f"the file differs from the plan in {paths}")
    if not differences and _written(expected, found, about) != content:
        report.failures.append(
            "the file's bytes are not laid out as to_tflite writes them: there may be "
            "contents that its schema does not know"
        )
    is_planned = not report.failures
    tensors = Tensors(found)
    _check_decisions(snapped, tensors, Tensors(expected), report)
    if is_planned:
        _check_additions(snapped, tensors, report)
        check = _check_micro if is_micro else _check_delegation
        runs = check(content, snapped, report)
        if data is not None and runs:
            batch = batches_for(snapped.twin, data, batches)
            compare_on_data(
                content,
                snapped,
                trained,
                batch,
                report,
                tensor_batches,
                micro.MicroRunner if is_micro else Runner,
            )
    else:
        report.failures.append("the file is not run: it is not the plan's")
    if verbose:
        print(report)
    return report


def _written(expected, found, about) -> bytes:
    """The bytes of the plan, as `to_tflite` writes them."""
    content = flatbuffer.pack(_described(expected, found))
    is_packed = Options(**about["options"]).storage == "packed"
    return packing.pack(content) if is_packed else content


def _described(expected, found):
    """The plan under the file's description and metadata, which may say anything."""
    made = copy.copy(expected)
    made.description = found.description
    made.buffers = list(expected.buffers)
    if [m.name for m in made.metadata] == [m.name for m in found.metadata]:
        for ours, theirs in zip(made.metadata, found.metadata, strict=True):
            made.buffers[ours.buffer] = found.buffers[theirs.buffer]
    return made


def _read(content, report):
    """The file, unpacked, as schema objects, and what it says of its making."""
    about = flatbuffer.read_metadata(content)
    try:
        Options(**about["options"])
        dict(about["ranges"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "The file's metadata must be those of tf_lowbit.export.to_tflite. "
            f"Received: {error}"
        ) from error
    if Options(**about["options"]).storage == "packed":
        plain = packing.unpack(content)
        report.widths = packing.widths(content)
        content = plain
    found = flatbuffer.unpack(content)
    structure.require_consistent(found)
    return found, about


def _plan(model, about, trained, report):
    if isinstance(model, Export):
        model = model.snapped
    options = Options(**about["options"])
    if isinstance(model, Snapped):
        if model.options != options:
            report.failures.append(
                f"the file says that it was made with {options}, planned "
                f"{model.options}"
            )
        return model, None if trained is None else checks.single_network(trained)
    if trained is not None:
        raise ValueError(
            "trained must only be given beside an Export or a Snapped: model is the "
            f"trained one. Received: model={model!r}, trained={trained!r}"
        )
    network = checks.single_network(model)
    return snap(network, options=options, ranges=about["ranges"]), network


def _check_micro(content, snapped, report) -> bool:
    """Whether TFLite Micro takes the file, and the arena that it needs."""
    del snapped
    try:
        report.arena = micro.MicroRunner(content).arena()
    except RuntimeError as error:
        report.failures.append(f"the file cannot be run: {error}")
        return False
    return True


def _check_delegation(content, snapped, report) -> bool:
    """Promise 2, second half; whether the file can be run at all."""
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


_OPERATOR = {
    twin.CONV: "CONV_2D",
    twin.DENSE: "FULLY_CONNECTED",
    twin.DEPTHWISE: "DEPTHWISE_CONV_2D",
    twin.SCALE: "DEPTHWISE_CONV_2D",
    twin.TRANSPOSED: "CONV_2D",
}


def _left_out(layer) -> str | None:
    """The operator of a layer that XNNPACK does not take, or None.

    But for INT4 weights, all that these do is to move codes, in whichever kernel.
    """
    if isinstance(layer, twin.IntegerLinear) and layer.storage == "int4":
        return _OPERATOR[layer.kind]
    if isinstance(layer, _MAX_POOLS) and set(layer.pool_size) == {1}:
        return "MAX_POOL_2D"
    if isinstance(layer, keras.layers.Concatenate) and len(layer.input) > 5:
        return "CONCATENATION"
    if isinstance(layer, twin.EdgePadding):
        return "MIRROR_PAD"
    if isinstance(layer, _UPSAMPLINGS):
        return "RESIZE_NEAREST_NEIGHBOR"
    return None


def _check_decisions(snapped, tensors, expected, report) -> None:
    """Promise 3, of the layers whose tensors are there as they were planned."""
    for layer in twin.integer_layers(snapped.twin):
        output = layer.name
        if f"{layer.name}/out" in expected:
            output = f"{layer.name}/out"
        weights, biases = f"{layer.name}/weights", f"{layer.name}/bias"
        if any(
            name not in tensors or tensors.shape(name) != expected.shape(name)
            for name in (weights, biases, output)
        ):
            continue  # Named by the comparison with the plan.
        operator = tensors.operator_of(output)
        if operator is None or not operator[3][0]:
            continue  # Likewise.
        codes = tensors.values(weights)
        bias = tensors.values(biases)
        in_scale = tensors.scales(operator[3][0])
        out_scale = tensors.scales(output)
        scales = tensors.scales(weights)
        sizes = (codes is None, bias is None, len(in_scale) != 1, len(out_scale) != 1)
        # A transposed convolution's channels are there once for each pixel of a cell.
        copies = operators.copies(layer)
        channels = copies * layer.channels
        if any(sizes) or {len(scales), bias.size} != {channels} or bias.ndim > 1:
            continue
        axis = tensors.axis(weights)
        total = np.moveaxis(codes.astype(np.int64), axis, 0).reshape(channels, -1)
        low, high = layer.input_grid.low, layer.input_grid.high
        positive, negative = np.maximum(total, 0), np.minimum(total, 0)
        smallest = (positive * low + negative * high).sum(axis=1) // layer.upscale
        largest = (positive * high + negative * low).sum(axis=1) // layer.upscale
        points = np.tile(np.asarray(layer.thresholds, np.int64), (copies, 1))
        points = np.clip(points, smallest[:, None], largest[:, None] + 1)
        inside = (points > smallest[:, None]) & (points <= largest[:, None])
        for kernel in snapped.options.kernels_of(
            layer.kind, layer.storage, layer.kernel_shape[0]
        ):
            wrong = _wrong(
                layer, kernel, in_scale[0], scales, out_scale[0], bias,
                smallest, largest, points,
            )  # fmt: skip
            planned = _wrong(
                layer, kernel, layer.input_grid.scale,
                np.tile(layer.weight_scales.numpy(), copies), layer.grid.scale,
                np.tile(layer.biases.numpy(), copies), smallest, largest, points,
            )  # fmt: skip
            report.decisions.append(
                Decisions(
                    layer.name,
                    kernel,
                    channels,
                    int(inside.sum()),
                    tuple(int(w) for w in wrong),
                )
            )
            if (wrong > planned).any():
                report.failures.append(
                    f"{layer.name}: {int(wrong.sum())} accumulators are off by one "
                    f"under {kernel}, planned {int(planned.sum())}"
                )


def _wrong(layer, kernel, in_scale, scales, out_scale, bias, smallest, largest, points):
    multipliers = kernels.multiplier(kernel, in_scale, scales, out_scale)
    with np.errstate(all="ignore"):
        reached = thresholds.reached_by(
            kernel, multipliers, bias, layer.upscale,
            layer.grid.low, layer.grid.high, smallest, largest,
            twin.rounds_away(layer.kind, len(scales)),
        )  # fmt: skip
    return thresholds.wrong_decisions(points, reached)


def _check_additions(snapped, tensors, report) -> None:
    """Promise 4: every pair of int8 codes, through the real kernels."""
    seen: dict[tuple, int] = {}
    for layer in snapped.twin.layers:
        if not isinstance(layer, twin.IntegerAdd) or layer.name not in tensors:
            continue
        operator = tensors.operator_of(layer.name)
        if operator is None:
            continue
        ends = []
        for name in (*operator[3], layer.name):
            scales, points = tensors.scales(name), tensors.zero_points(name)
            if len(scales) != 1 or len(points) != 1:
                break
            ends.append((float(scales[0]), int(points[0])))
        if len(ends) != 3:
            continue
        clamp = operator[2].get("fusedActivationFunction", 0)
        # Scales beside one another; what they are apart from that does not matter.
        for kernel in snapped.options.kernels:
            key = (*ends, clamp, kernel, layer.ratios, layer.grid)
            if key not in seen:
                seen[key] = wrong_sums(layer, ends, clamp, kernel)
            report.additions[f"{layer.name} ({kernel})"] = seen[key]
            if seen[key]:
                report.failures.append(
                    f"{layer.name}: {seen[key]} of 65536 pairs of codes have a wrong "
                    f"sum under {kernel}"
                )


def wrong_sums(layer: twin.IntegerAdd, ends, clamp: int, kernel: str) -> int:
    """How many pairs of int8 codes an ADD of the given tensors sums wrongly.

    Args:
        layer: what the sum should be.
        ends: (scale, zero point) of both inputs and of the output.
        clamp: the schema's fused activation.
        kernel: of `kernels`.
    """
    builder = FileBuilder("one addition")
    shape = (1, 256, 256, 1)
    first, second, output = (
        builder.activation(name, shape, np.int8, end)
        for name, end in zip(("first", "second", "sum"), ends, strict=True)
    )
    builder.operator(
        "ADD",
        operators.INTEGER_VERSIONS["ADD"],
        [first, second],
        [output],
        schema.AddOptionsT(clamp),
    )
    data = builder.finish(
        {"first": first, "second": second}, {"sum": output}, b"{}", "sum"
    )
    pairs = [p.reshape(shape) for p in np.meshgrid(_INT8, _INT8)]
    is_micro = kernel == kernels.TFLM
    try:
        runner = micro.MicroRunner(data) if is_micro else Runner(data, kernel)
        found = runner(*pairs)["sum"]
    except (ValueError, RuntimeError):
        return pairs[0].size
    codes = [p.astype(np.float32) - z for p, (_, z) in zip(pairs, ends, strict=False)]
    wanted = layer([tf.constant(c) for c in codes]).numpy() + layer.grid.zero_point
    return int((found != wanted).sum())
