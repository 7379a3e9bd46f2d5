"""Lowering of a trained quantized network to its integer model, the *twin*.

One pass over the graph; `layers` has the function that lowers each node.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from tf_lowbit.compat import deep_graphs, keras, tf
from tf_lowbit.core import checks
from tf_lowbit.export import layer_table
from tf_lowbit.export.lowering import forms, layers, problems, requirements
from tf_lowbit.export.lowering.builder import Builder, Value, edges_of
from tf_lowbit.export.lowering.inputs import take_pixels, takes_pixels
from tf_lowbit.export.lowering.tensor_ranges import key
from tf_lowbit.export.options import Options
from tf_lowbit.export.types import Note
from tf_lowbit.network import graph, inspection, output_names


@dataclasses.dataclass(frozen=True)
class Snapped:
    """The integer model (twin) of a trained network, and how it was made.

    Attributes:
        twin: Keras model, not compiled; computes what the file computes.
        options: The options of the export.
        ranges: The measured ranges that were used, by tensor.
        notes: Layers that differ from the trained ones, and why.
        tensors: Tensor of the trained network (`tensor_ranges.key`) -> name of the
            twin's layer that outputs it, in the network's order.
        fingerprint: Hash of the twin's weights when it was made.
    """

    twin: keras.Model
    options: Options
    ranges: dict[str, tuple[float, float]]
    notes: tuple[Note, ...]
    tensors: dict[str, str] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""

    @property
    def is_tuned(self) -> bool:
        """Whether the twin's weights changed since it was made."""
        return self.fingerprint != fingerprint(self.twin)


def fingerprint(model: keras.Model) -> str:
    """A hash of a model's weights."""
    found = hashlib.sha256()
    for weight in model.weights:
        found.update(weight.numpy().tobytes())
    return found.hexdigest()


def snap(
    model: keras.Model,
    data: Iterable[Any] | None = None,
    *,
    options: Options | None = None,
    ranges: dict | None = None,
    batches: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Snapped:
    """Makes the integer model of a trained network.

    Args:
        model: Trained network from `tf_lowbit.quantize`, or a `LowBitTrainer` of one
            student.
        data: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`. Needed for
            ranges that training did not fix: the input of a first layer that was
            trained in float, and residual sums without `residual_bits`.
        options: Options of the export; None for the defaults.
        ranges: Ranges measured before, as `Snapped.ranges`.
        batches: Number of batches to measure ranges on.
        progress: Called with (done, total) after each layer.

    Returns:
        The integer model with its ranges and notes.

    Raises:
        ValueError: If the model is not quantized, a range is not calibrated, a weight
            is not finite, or `data` is missing.
        ExportError: Naming a layer that has no form in a file.
    """
    options = checks.instance(
        "options", Options() if options is None else options, Options
    )
    if progress is not None and not callable(progress):
        raise ValueError(
            "progress must be a function (done, total). "
            f"{checks.received('progress', progress)}"
        )
    network = requirements.single_network(model)
    requirements.require_exportable(network)
    problems.require_exportable(network, options.target)
    builder = Builder(forms.as_layers(network), data, options, ranges, batches)
    # From the trained layers: the layers of an unrolled cell are not first or last.
    builder.first, builder.last = edges_of(network)
    _note_other_bits(builder)
    for node in graph.calls(network):
        if forms.form(node) == layer_table.PARTS:
            builder.note(node.layer.name, "computes in float, as it was trained")
    return _walk(builder, output_names.of_labels(network), progress)


def _walk(builder, names, progress) -> Snapped:
    """Builds the twin node by node, with outputs of the given names."""
    inputs = []
    for tensor in builder.model.inputs:
        name = builder.name(_layer_name(tensor))
        made = keras.Input(tensor.shape[1:], name=name, dtype=tensor.dtype)
        inputs.append(made)
        value = builder.known[id(tensor)] = Value(tensor, name, values=made)
        if takes_pixels(builder, tensor):
            take_pixels(builder, value)
    nodes = list(graph.calls(builder.model))
    for done, node in enumerate(nodes, start=1):
        _visit(builder, node)
        if progress is not None:
            progress(done, len(nodes))
    outputs = [builder.values(builder.known[id(t)]) for t in builder.model.outputs]
    # A dict's keys may differ from the layers' names: the same data fit both.
    inputs = tf.nest.pack_sequence_as(builder.model.input, inputs)
    with deep_graphs():
        made = output_names.NamedOutputs(
            inputs, outputs, name=f"{builder.model.name}_twin"
        )
    made.output_names[:] = names
    return Snapped(
        made,
        builder.options,
        builder.ranges.used,
        tuple(builder.notes),
        _tensors(builder, made),
        fingerprint(made),
    )


def _visit(builder, node) -> None:
    """Lowers one node of the trained network."""
    form = forms.form(node)
    sources = [builder.known[id(tensor)] for tensor in node.keras_inputs]
    (tensor,) = graph.outputs_of(node)
    value = builder.known[id(tensor)] = Value(tensor, node.layer.name)
    is_quantizer = builder.quantizer_of(node) is not None
    build = layers.quantize if is_quantizer else layers.FUNCTIONS[form]
    build(builder, value, sources, node)


def _note_other_bits(builder) -> None:
    """Notes that tensors are not at the bits of their rules."""
    tensors = inspection.quantized_tensors(builder.model)
    others = [t for t in tensors if t.bits != t.quantizer.bits]
    if others:
        first = others[0]
        builder.note(
            first.layer.name,
            f"its {first.attribute} is at {first.bits} bits, but its rule says "
            f"{first.quantizer.bits}. In all, {len(others)} tensors are not at the "
            "bits of their rules: was the last stage not trained?",
        )


def _tensors(builder, made) -> dict[str, str]:
    """Trained tensor -> name of the twin's layer that outputs it."""
    names = {layer.name for layer in made.layers}
    found = {}
    for value in builder.known.values():
        tensor = value.values if value.codes is None else value.codes
        if tensor is not None and _layer_name(tensor) in names:
            found[key(value.tensor)] = _layer_name(tensor)
    return found


def _layer_name(tensor) -> str:
    return tensor._keras_history.layer.name
