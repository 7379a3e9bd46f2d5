"""The arithmetic of a file's kernels: codes of accumulators, and sums of codes."""

from collections.abc import Sequence

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.export.integer import kernels, thresholds, twin
from tf_lowbit.export.lowering.walk import Snapped
from tf_lowbit.export.proof.plan import Tensors
from tf_lowbit.export.proof.verification import Decisions, Report
from tf_lowbit.export.tflite import micro, operators
from tf_lowbit.export.tflite.flatbuffer import FileBuilder, schema
from tf_lowbit.export.tflite.runner import Runner

_INT8 = np.arange(-128, 128, dtype=np.int8)


def check_decisions(
    snapped: Snapped, tensors: Tensors, expected: Tensors, report: Report
) -> None:
    """Adds (3) of `verify` to a report: which accumulators become other codes.

    Layers whose tensors do not have the planned shapes are left to the plan's check.
    """
    for layer in twin.integer_layers(snapped.twin):
        inner = f"{layer.name}/out"
        output = inner if inner in expected else layer.name
        weights, biases = f"{layer.name}/weights", f"{layer.name}/bias"
        if any(
            name not in tensors or tensors.shape(name) != expected.shape(name)
            for name in (weights, biases, output)
        ):
            continue  # The comparison with the plan reports it.
        operator = tensors.operator_of(output)
        if operator is None or not operator[3][0]:
            continue  # Reported, too.
        codes = tensors.values(weights)
        bias = tensors.values(biases)
        in_scale = tensors.scales(operator[3][0])
        out_scale = tensors.scales(output)
        scales = tensors.scales(weights)
        if codes is None or bias is None or (len(in_scale), len(out_scale)) != (1, 1):
            continue
        # A transposed convolution has its channels once for each pixel of a cell.
        copies = operators.copies(layer)
        channels = copies * layer.channels
        if {len(scales), bias.size} != {channels} or bias.ndim > 1:
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
            decisions = int(inside.sum()), tuple(wrong.tolist())
            report.decisions.append(Decisions(layer.name, kernel, channels, *decisions))
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


def check_additions(snapped: Snapped, tensors: Tensors, report: Report) -> None:
    """Adds (4) of `verify` to a report: each pair's sum, by the real kernels."""
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
        # Adds with the same scales and grids need only one run.
        for kernel in snapped.options.target.kernels:
            key = (*ends, clamp, kernel, layer.ratios, layer.grid)
            if key not in seen:
                seen[key] = wrong_sums(layer, ends, clamp, kernel)
            report.additions[f"{layer.name} ({kernel})"] = seen[key]
            if seen[key]:
                report.failures.append(
                    f"{layer.name}: {seen[key]} of 65536 pairs of codes have a wrong "
                    f"sum under {kernel}"
                )


def wrong_sums(
    layer: twin.IntegerAdd, ends: Sequence[tuple[float, int]], clamp: int, kernel: str
) -> int:
    """Counts the pairs of int8 codes whose sum an ADD operator gets wrong.

    Args:
        layer: The twin's layer, which computes the right sums.
        ends: (scale, zero point) of both inputs and of the output.
        clamp: Fused activation of the TFLite schema.
        kernel: One of `kernels`.
    """
    builder = FileBuilder("one addition")
    shape = (1, 256, 256, 1)
    first, second, output = (
        builder.activation(name, shape, np.int8, end)
        for name, end in zip(("first", "second", "sum"), ends, strict=True)
    )
    version, options = operators.INTEGER_VERSIONS["ADD"], schema.AddOptionsT(clamp)
    builder.operator("ADD", version, [first, second], [output], options)
    inputs = {"first": first, "second": second}
    data = builder.finish(inputs, {"sum": output}, b"{}", "sum")
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
