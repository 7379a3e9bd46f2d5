"""Comparison of a file with its twin and the trained model, on data."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import plain_layers, twin
from tf_lowbit.export.lowering.walk import Snapped
from tf_lowbit.export.proof.agreement import Agreements, computes_floats, grid_of
from tf_lowbit.export.proof.outputs import FirstOutput, Numbers
from tf_lowbit.export.proof.verification import Comparison, Report
from tf_lowbit.export.tflite import writer
from tf_lowbit.export.tflite.runner import Runner
from tf_lowbit.network import graph, output_names
from tf_lowbit.network import predictions as classifying
from tf_lowbit.network.observation import in_order

# Allowed difference of float operators, which sum in another order than Keras, relative
# to the largest magnitude in the tensor.
FLOAT_TOLERANCE = 1e-4


def compare_on_data(
    content: bytes,
    snapped: Snapped,
    trained: keras.Model | None,
    batches: Iterable[Any],
    report: Report,
    tensor_batches: int | None = None,
    runner: type = Runner,
) -> None:
    """Runs a file, its twin and the trained model on the same batches.

    Args:
        content: The file's bytes.
        snapped: The twin.
        trained: The trained model, or None.
        batches: Iterable of batches.
        report: Comparisons, agreements, predictions or values, and failures are set.
        tensor_batches: Number of batches to compare every tensor on; None for all.
        runner: `Runner`, or `MicroRunner` for TFLite Micro.
    """
    model = snapped.twin
    nodes = list(graph.calls(model))
    outputs = [graph.outputs_of(node)[0] for node in nodes]
    # Called eagerly: tracing takes longer than running a usual test set.
    observer = keras.Model(model.inputs, outputs)
    networks = {"twin": model}
    agreements = None
    if trained is not None:
        networks["trained"] = trained
        agreements = Agreements(snapped, trained)
    everything, plain = runner(content, intermediates=True), runner(content)
    rows = [
        Comparison(
            node.layer.name,
            grid_of(node) is not None or isinstance(node.layer, plain_layers.ArgMax),
        )
        for node in nodes
    ]
    reference = model if trained is None else trained
    names = output_names.of_labels(reference)
    head = snapped.options.head
    first = FirstOutput(reference, head)
    further = [Numbers(name, head) for name in names[1:]]
    count = 0
    for count, batch in enumerate(batches, start=1):
        values, labels = _split(batch, model)
        fed = [_fed(snapped, index, v) for index, v in enumerate(values)]
        argument = values if len(values) > 1 else values[0]
        if tensor_batches is None or count <= tensor_batches:
            found = {d["name"]: x for d, x in zip(everything.inputs, fed, strict=True)}
            found |= everything(*fed)
            own = tf.nest.flatten(observer(argument, training=False))
            _compare_tensors(rows, nodes, model.inputs, values, found, own)
            if agreements is not None:
                by_name = {
                    node.layer.name: tensor.numpy()
                    for node, tensor in zip(nodes, own, strict=True)
                }
                agreements.add(argument, values, by_name)
        found = plain(*fed)
        made = [_dequantized(found[d["name"]], d) for d in plain.outputs]
        everyone = {"file": made}
        for name, network in networks.items():
            found = tf.nest.flatten(network(argument, training=False))
            everyone[name] = [tensor.numpy() for tensor in found]
        scores, *others = (
            {
                name: classifying.scores(end, values)
                for name, values in zip(everyone, found, strict=True)
            }
            for end, *found in zip(model.outputs, *everyone.values(), strict=True)
        )
        first.add(scores, classifying.of_first_output(labels, names))
        for numbers, values in zip(further, others, strict=True):
            numbers.add(values, None)
    if not count:
        raise ValueError("data must hold at least one batch. Received: none")
    report.comparisons = [row for row in rows if row.elements]
    is_tainted = _judge(report, _behind_float(nodes))
    parts: list[FirstOutput | Numbers] = [first, *further]
    for part in parts:
        part.judge(report, is_tainted)
    if agreements is not None:
        agreements.judge(report)


def _dequantized(values, detail):
    """Float values of an output tensor, which may hold codes."""
    scale, zero_point = detail["quantization"]
    if not scale:
        return values  # Floats, or class numbers.
    return (values.astype(np.float32) - zero_point) * np.float32(scale)


def _compare_tensors(rows, nodes, inputs, values, found, own) -> None:
    """Adds a batch to the rows: tensors of the file, by name, and of the twin."""
    known = {id(t): tf.constant(v) for t, v in zip(inputs, values, strict=True)}
    for node in nodes:
        name = node.layer.name
        if name in found:
            known[id(graph.outputs_of(node)[0])] = _as_twin(found[name], node)
    for row, node, computed in zip(rows, nodes, own, strict=True):
        if node.layer.name in found:
            _compare_tensor(row, node, known, computed.numpy())


def _split(batch, model):
    """Inputs as a list of float32 arrays in the model's order, and labels as given."""
    inputs, labels, *_ = (*batch, None) if isinstance(batch, tuple) else (batch, None)
    if isinstance(inputs, dict):
        inputs = in_order(model, inputs)
    values = [np.asarray(v, np.float32) for v in tf.nest.flatten(inputs)]
    if not all(np.isfinite(v).all() for v in values):
        raise ValueError("data must be finite. Received: NaN or inf in an input")
    return values, labels


def _fed(snapped, index, values):
    """An input's values in the type of the file's input."""
    input_type = snapped.options.input_type
    if input_type == "float32":
        return values
    tensor = snapped.twin.inputs[index]
    (reader,) = graph.readers(snapped.twin)[id(tensor)]
    return writer.input_codes(reader.layer, values, input_type)


def _as_twin(values, node):
    """A tensor of the file in the twin's form: codes without zero point, or floats."""
    grid = grid_of(node)
    if grid is None:
        return tf.constant(values)
    return tf.constant(values.astype(np.float32) - grid.zero_point)


def _behind_float(nodes) -> set[str]:
    """Names of the layers that compute in float or follow a layer that does."""
    tainted: set[int] = set()
    names = set()
    for node in nodes:
        if computes_floats(node.layer) or any(
            id(t) in tainted for t in node.keras_inputs
        ):
            tainted.add(id(graph.outputs_of(node)[0]))
            names.add(node.layer.name)
    return names


def _off_by_one(layer, inputs, codes) -> int:
    """Counts the codes of an integer layer that differ from its decision points."""
    total = layer.accumulate(inputs).numpy().astype(np.int64)
    total = total.reshape(-1, layer.channels)
    codes = codes.reshape(total.shape)
    points = np.sort(layer.thresholds.numpy().astype(np.int64), axis=1)
    count = 0
    for channel in range(layer.channels):
        reached = np.searchsorted(points[channel], total[:, channel], side="right")
        count += int((codes[:, channel] != layer.grid.low + reached).sum())
    return count


def _compare_tensor(row, node, known, own) -> None:
    output = graph.outputs_of(node)[0]
    have = known[id(output)].numpy()
    inputs = [known.get(id(t)) for t in node.keras_inputs]
    row.elements += have.size
    if row.is_integer:
        row.end_to_end += int((have != own).sum())
    if any(value is None for value in inputs):
        return
    wanted = node.layer(inputs[0] if len(inputs) == 1 else inputs).numpy()
    if row.is_integer:
        row.mismatches += int((have != wanted).sum())
        if isinstance(node.layer, twin.IntegerLinear):
            row.off_by_one += _off_by_one(node.layer, inputs[0], wanted)
        return
    error = float(np.abs(have - wanted).max(initial=0.0))
    error /= float(np.abs(wanted).max(initial=0.0)) or 1.0
    row.error = float(np.maximum(row.error, error))  # Keeps a NaN.


def _judge(report, tainted) -> bool:
    """Adds failures; returns whether an integer layer follows a float layer."""
    is_tainted = False
    for row in report.comparisons:
        if row.is_integer:
            is_tainted |= row.tensor in tainted
            if row.mismatches:
                report.failures.append(
                    f"{row.tensor}: {row.mismatches} of {row.elements} codes are not "
                    "what its inputs give"
                )
            elif row.end_to_end and row.tensor not in tainted:
                report.failures.append(
                    f"{row.tensor}: {row.end_to_end} of {row.elements} codes differ "
                    "from the twin's"
                )
        elif not row.error <= FLOAT_TOLERANCE:
            report.failures.append(
                f"{row.tensor}: floats differ by {row.error:.1e} of the largest, "
                f"allowed {FLOAT_TOLERANCE:.0e}"
            )
    return is_tainted
