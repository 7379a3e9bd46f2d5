"""A file against its twin, on data."""

import numpy as np

from tf_lowbit import predictions as classifying
from tf_lowbit.compat import keras, tf
from tf_lowbit.export import tflite, twin
from tf_lowbit.export.float_operators import FLOAT_METHODS
from tf_lowbit.export.report import Comparison, Predictions, Report
from tf_lowbit.export.running import Runner
from tf_lowbit.scheme import graph

# Float operators sum in another order than Keras: what they may differ by, relative to
# the largest magnitude in the tensor.
FLOAT_TOLERANCE = 1e-4


def compare_on_data(
    content: bytes,
    input_type: str,
    model,
    trained,
    batches,
    report: Report,
    tensor_batches: int | None = None,
    runner=Runner,
) -> None:
    """Runs a file, its twin and the trained model side by side.

    Args:
        content: the file.
        input_type: what it takes.
        model: the twin.
        trained: the trained model, or None.
        batches: iterable of batches.
        report: gets comparisons, predictions and failures.
        tensor_batches: on how many batches every tensor is compared; None for all.
        runner: `Runner`, or `MicroRunner` for TFLite Micro.
    """
    nodes = list(graph.calls(model))
    outputs = [graph.outputs_of(node)[0] for node in nodes]
    # Called eagerly: tracing takes longer than a test set of this field's size.
    observer = keras.Model(model.inputs, outputs)
    limit = classifying.threshold(model)
    networks = {"twin": model}
    if trained is not None:
        networks["trained"] = trained
    names = (model if trained is None else trained).output_names
    everything, plain = runner(content, intermediates=True), runner(content)
    rows = [Comparison(node.layer.name, _grid_of(node) is not None) for node in nodes]
    predictions = report.predictions = Predictions(
        trained_agrees=None if trained is None else 0
    )
    for count, batch in enumerate(batches):
        values, labels = _split(batch, twin.input_names(model))
        fed = [_fed(model, input_type, index, v) for index, v in enumerate(values)]
        argument = values if len(values) > 1 else values[0]
        if tensor_batches is None or count < tensor_batches:
            found = {d["name"]: x for d, x in zip(everything.inputs, fed, strict=True)}
            found |= everything(*fed)
            own = tf.nest.flatten(observer(argument, training=False))
            _compare_tensors(rows, nodes, model.inputs, values, found, own)
        first = plain.outputs[0]["name"]
        scores = _dequantized(plain(*fed)[first], plain.outputs[0])
        chosen = {"file": classifying.classes(scores, limit)}
        for name, network in networks.items():
            found = tf.nest.flatten(network(argument, training=False))[0]
            chosen[name] = classifying.classes(found.numpy(), limit)
        if labels is not None:
            labels = classifying.labels(labels, scores, names)
        _count_predictions(predictions, chosen, labels)
    if not predictions.examples:
        raise ValueError("data must hold at least one batch. Received: none")
    report.comparisons = [row for row in rows if row.elements]
    _judge(report, _behind_float(nodes))


def _dequantized(values, detail):
    """Values of an output tensor, whose codes the file may put out."""
    scale, zero_point = detail["quantization"]
    if values.dtype == np.float32:
        return values
    return (values.astype(np.float32) - zero_point) * np.float32(scale)


def _compare_tensors(rows, nodes, inputs, values, found, own) -> None:
    """Adds one batch to the rows.

    Args:
        rows: a comparison for each node.
        nodes: those of the twin.
        inputs: the twin's input tensors.
        values: what it was given.
        found: the file's tensors, by name.
        own: the twin's tensors, one for each node.
    """
    known = {id(t): tf.constant(v) for t, v in zip(inputs, values, strict=True)}
    for node in nodes:
        name = node.layer.name
        if name in found:
            known[id(graph.outputs_of(node)[0])] = _as_twin(found[name], node)
    for row, node, computed in zip(rows, nodes, own, strict=True):
        if node.layer.name in found:
            _compare_tensor(row, node, known, computed.numpy())


def _split(batch, names):
    """Inputs as a list of float32 arrays in the model's order, and labels as given."""
    inputs, labels, *_ = (*batch, None) if isinstance(batch, tuple) else (batch, None)
    if isinstance(inputs, dict):
        inputs = [inputs[name] for name in names]
    values = [np.asarray(v, np.float32) for v in tf.nest.flatten(inputs)]
    if not all(np.isfinite(v).all() for v in values):
        raise ValueError("data must be finite. Received: NaN or inf in an input")
    return values, labels


def _fed(model, input_type, index, values):
    """What the file's input wants."""
    if input_type == "float32":
        return values
    tensor = model.inputs[index]
    (reader,) = [
        node.layer
        for node in graph.calls(model)
        if any(t is tensor for t in node.keras_inputs)
    ]
    return tflite.input_codes(reader, values, input_type)


def _grid_of(node):
    """The grid of what a node of the twin puts out; None for floats."""
    if isinstance(node.layer, twin.ToCodes | twin.IntegerLinear | twin.IntegerAdd):
        return node.layer.grid
    if isinstance(node.layer, twin.ToValues) or _computes_floats(node.layer):
        return None
    source = graph.producer(node.keras_inputs[0])
    return None if source.is_input else _grid_of(source)


def _computes_floats(layer) -> bool:
    """Whether a layer of a twin computes with floats."""
    return type(layer) in (*FLOAT_METHODS, keras.layers.AveragePooling2D)


def _as_twin(values, node):
    """A tensor of the file as the twin has it: codes without zero point, or floats."""
    grid = _grid_of(node)
    if grid is None:
        return tf.constant(values)
    return tf.constant(values.astype(np.float32) - grid.zero_point)


def _behind_float(nodes) -> set[str]:
    """Names of layers that a float computation comes before, or that are one."""
    tainted: set[int] = set()
    names = set()
    for node in nodes:
        if _computes_floats(node.layer) or any(
            id(t) in tainted for t in node.keras_inputs
        ):
            tainted.add(id(graph.outputs_of(node)[0]))
            names.add(node.layer.name)
    return names


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
        return
    error = float(np.abs(have - wanted).max(initial=0.0))
    error /= float(np.abs(wanted).max(initial=0.0)) or 1.0
    row.error = float(np.maximum(row.error, error))  # Which keeps a NaN.


def _count_predictions(predictions, chosen, labels) -> None:
    """Adds one batch: `chosen` holds the classes that each network takes."""
    size = len(chosen["file"])
    predictions.examples += size
    predictions.twin_agrees += int((chosen["file"] == chosen["twin"]).sum())
    if "trained" in chosen:
        agrees = int((chosen["file"] == chosen["trained"]).sum())
        predictions.trained_agrees += agrees
    if labels is not None:
        predictions.labels += size
        for name, classes in chosen.items():
            right = int((classes == labels).sum())
            predictions.right[name] = predictions.right.get(name, 0) + right


def _judge(report, tainted) -> None:
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
    found = report.predictions
    if found.twin_agrees != found.examples and not is_tainted:
        report.failures.append(
            f"{found.examples - found.twin_agrees} of {found.examples} predictions are "
            "not the twin's"
        )
