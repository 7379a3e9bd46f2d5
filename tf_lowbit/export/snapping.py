"""From a trained quantized network to its snapped twin.

The graph is walked once, layer by layer; `building` makes the twin's layers.
"""

import dataclasses
import hashlib

import numpy as np

from tf_lowbit import inspection, quantizers
from tf_lowbit.compat import deep_graphs, keras
from tf_lowbit.core import checks as arguments
from tf_lowbit.export import (
    checks,
    elementwise,
    forms,
    grids,
    joins,
    pools,
    stock,
    twin,
)
from tf_lowbit.export import linear as linears
from tf_lowbit.export.building import Builder, Note, Value, copy_of
from tf_lowbit.export.linear import ExportError
from tf_lowbit.export.options import Options
from tf_lowbit.export.ranges import key
from tf_lowbit.scheme import graph, passing, registry
from tf_lowbit.scheme.output_names import NamedOutputs

_layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Snapped:
    """A twin, and how it was made.

    Attributes:
        twin: Keras model, not compiled; computes what the file computes.
        options: the choices.
        ranges: the measured ranges that were used, by tensor.
        notes: layers that are not exactly what was trained, and why.
        tensors: which tensor of the trained network (`ranges.key`) the twin's layer of
            which name puts out, in the network's order.
        fingerprint: of the twin's weights as they were made.
    """

    twin: keras.Model
    options: Options
    ranges: dict[str, tuple[float, float]]
    notes: tuple[Note, ...]
    tensors: dict[str, str] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""

    @property
    def is_tuned(self) -> bool:
        """Whether the twin was trained further since it was made."""
        return self.fingerprint != fingerprint(self.twin)


def fingerprint(model: keras.Model) -> str:
    """A hash of a model's weights."""
    found = hashlib.sha256()
    for weight in model.weights:
        found.update(weight.numpy().tobytes())
    return found.hexdigest()


def snap(
    model: keras.Model,
    data=None,
    *,
    options: Options | None = None,
    ranges: dict | None = None,
    batches: int = 8,
    progress=None,
) -> Snapped:
    """Makes the snapped twin of a trained network.

    Args:
        model: what `tf_lowbit.quantize` made, trained; or a `LowBitTrainer` of one
            student.
        data: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`. Wanted where the
            training fixed no range: the input of a first layer that was trained in
            float, and residual sums without `residual_bits`.
        options: the choices; None for the defaults.
        ranges: measured before, as `Snapped.ranges`.
        batches: how many batches are measured on.
        progress: called with (done, total) behind each layer.

    Returns:
        The twin and what there is to say of it.

    Raises:
        ValueError: if the model is not quantized, a range is not calibrated, a weight
            is not finite, or `data` is missing.
        ExportError: naming a layer that has no form in a file.
    """
    options = arguments.instance(
        "options", Options() if options is None else options, Options
    )
    network = checks.single_network(model)
    checks.require_exportable(network)
    for problem in forms.problems(network):
        raise ExportError(problem)
    split = forms.split_activations(network)
    snapper = _Snapper(split, data, options, ranges, batches)
    return snapper.run(_output_names(network), progress)


class _Snapper(Builder):
    """One walk over one network."""

    def run(self, names, progress) -> Snapped:
        """Walks the graph and builds the twin, whose outputs get the names."""
        self._note_other_bits()
        inputs = []
        for tensor in self.model.inputs:
            made = keras.Input(
                tensor.shape[1:], name=_layer_name(tensor), dtype=tensor.dtype
            )
            self._names.add(_layer_name(tensor))
            inputs.append(made)
            value = Value(tensor, _layer_name(tensor), values=made)
            self._values[id(tensor)] = value
            if self._takes_pixels(tensor):
                self._pixel_codes(value)
        nodes = list(graph.calls(self.model))
        for done, node in enumerate(nodes, start=1):
            self._visit(node)
            if progress is not None:
                progress(done, len(nodes))
        outputs = [self.values(self._values[id(t)]) for t in self.model.outputs]
        with deep_graphs():
            made = NamedOutputs(inputs, outputs, name=f"{self.model.name}_twin")
        made.output_names[:] = names
        return Snapped(
            made,
            self.options,
            self.ranges.used,
            tuple(self.notes),
            self._tensors(made),
            fingerprint(made),
        )

    def _takes_pixels(self, tensor) -> bool:
        """Whether the file is to take an input's pixels: "int8" less 128, if scaled."""
        if self.options.input_type != "int8":
            return self.options.input_type == "uint8"
        readers = self._readers.get(id(tensor), [])
        return any(elementwise.scale(node) is not None for node in readers)

    def _pixel_codes(self, value) -> None:
        """Codes 0..255 of an input: its values are the pixels, or these over 255."""
        low, high = self.ranges(value.tensor)
        # Half a pixel over, as of images that were resized.
        is_unit = high <= 255.5 / 255
        is_pixels = low >= 0.0 and (is_unit or 2.0 <= high <= 255.5)
        if not is_pixels or self._has_signed_reader(value.tensor):
            raise ExportError(
                f"input_type={self.options.input_type!r} takes pixels here, so the "
                "network's input must lie in [0, 1] or [0, 255]: build the network "
                "with a Rescaling or Normalization layer in front, which does what is "
                "done to the pixels, and train it so; or take 'float32', or 'int8' for "
                "the codes of an 8-bit first layer that reads the input itself. "
                f"Received: {value.name!r} in [{low:g}, {high:g}]"
                + (" by data, below 0 when calibrated" if is_pixels else " by data")
            )
        value.grid = grids.UNIT_PIXELS if is_unit else grids.RAW_PIXELS
        layer = twin.ToCodes(value.grid, name=self.name(f"{value.name}_codes"))
        value.codes, value.values = layer(value.values), None

    def _has_signed_reader(self, tensor) -> bool:
        """Whether a quantizer that can be unsigned reads a tensor and is not."""
        found = (
            self._by_layer.get(node.layer.name, {}).get(
                (quantizers.ACTIVATION, "output")
            )
            for node in self._readers.get(id(tensor), [])
        )
        return any(q is not None and q.quantizer.unsigned() is not None for q in found)

    def _tensors(self, made) -> dict[str, str]:
        """Which tensors of the trained network the twin's layers put out."""
        layers = {layer.name for layer in made.layers}
        found = {}
        for value in self._values.values():
            tensor = value.values if value.codes is None else value.codes
            if tensor is not None and _layer_name(tensor) in layers:
                found[key(value.tensor)] = _layer_name(tensor)
        return found

    def _note_other_bits(self) -> None:
        """Notes tensors whose bits are those of a stage, not of the rules."""
        tensors = inspection.quantized_tensors(self.model)
        others = [t for t in tensors if t.bits != t.quantizer.bits]
        if others:
            first = others[0]
            self.note(
                first.layer.name,
                f"its {first.attribute} is at {first.bits} bits, its rule says "
                f"{first.quantizer.bits}; {len(others)} tensors in all are at other "
                "bits than their rules: those of a stage before the last?",
            )

    def _visit(self, node) -> None:
        form = forms.form(node)
        sources = [self._values[id(t)] for t in node.keras_inputs]
        (tensor,) = graph.outputs_of(node)
        value = Value(tensor, node.layer.name)
        self._values[id(tensor)] = value
        quantizer = self._by_layer.get(node.layer.name, {}).get(
            (quantizers.ACTIVATION, "output")
        )
        if quantizer is not None:
            self._quantize(value, sources[0], quantizer)
        else:
            _METHODS[form](self, value, sources, node)

    def _alias(self, value, sources, node) -> None:
        (source,) = sources
        for field in ("linear", "codes", "grid", "values"):
            setattr(value, field, getattr(source, field))
        if value.linear is not None:
            # Both names must come to one layer in the file.
            self._values[id(value.tensor)] = source

    def _quantize(self, value, source, quantizer) -> None:
        step, low, high = self.levels(quantizer)
        if self.can_be_codes(source):
            wanted = grids.grid(step, low, high)
            if source.codes is not None and wanted.holds(source.grid):
                value.codes, value.grid = source.codes, source.grid
                return
            pending = source.linear if source.codes is None else None
            if pending is None or not self.may_consume(source):
                pending = self.rescale(source)
            self.emit_integer(value, pending, wanted)
            return
        wanted = grids.float_grid(step, low, high)
        layer = twin.ToCodes(wanted, name=self.name(value.name))
        value.codes, value.grid = layer(self.values(source)), wanted

    def _linear(self, value, sources, node) -> None:
        (source,), outer = sources, node.layer
        layer = inspection.wrapped_layer(outer)
        kind = forms.KINDS[type(layer)]
        (kernel,) = registry.kernels(layer)
        weights = self._by_layer.get(outer.name, {}).get(
            (quantizers.WEIGHT, kernel.attribute)
        )
        channels = int(value.tensor.shape[-1])
        bias = np.zeros(channels)
        if layer.use_bias:
            bias = layer.bias.numpy().astype(np.float64)
        integer = weights is not None and self.can_be_codes(source)
        if not integer and self._wants_int8_edge(outer, source):
            integer = True
            if weights is None:
                weights = linears.eight_bits(layer, kernel)
                self.note(
                    value.name,
                    "was trained in float; its weights have 8 bits here: train it so "
                    "by a rule that names it",
                )
        if integer and self._is_input(source.tensor):
            self._input_codes(source)
        value.linear = linears.Linear(
            kind, layer, weights, source, np.ones(channels), bias, None, integer
        )
        if weights is not None and not integer:
            self.note(
                value.name,
                "reads floats, so it computes in float with its low-bit weights' "
                "values; a rule that quantizes what it reads makes it integer (behind "
                "global pooling: head='int8')",
            )
        self.settle(value)

    def _wants_int8_edge(self, outer, source) -> bool:
        """Whether a layer that was trained to read floats is to read codes."""
        if outer.name in self._first and self.options.first_layer == "int8":
            return self._is_input(source.tensor)
        if outer.name in self._last and self.options.head == "int8":
            return self.can_be_codes(source)
        return False

    def _is_input(self, tensor) -> bool:
        """Whether a tensor is the model's input, padding and scaling apart."""
        node = graph.producer(tensor)
        # A loop: networks are deeper than Python's recursion limit.
        while not node.is_input:
            if not forms.moves_codes(node) and elementwise.scale(node) is None:
                return False
            node = graph.producer(node.keras_inputs[0])
        return True

    def _input_codes(self, source) -> None:
        """Codes of an input, scaled or not, on the int8 grid over its range."""
        if source.codes is not None:
            return
        node = graph.producer(source.tensor)
        if not node.is_input and elementwise.scale(node) is None:
            behind = self._values[id(node.keras_inputs[0])]
            self._input_codes(behind)
            if passing.is_identity(node):
                self._alias(source, [behind], node)
            else:
                self._keep_codes(source, [behind], node)
            return
        low, high = self.ranges(source.tensor)
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255 or 1.0
        lowest = max(round(low / step), -255)
        wanted = grids.float_grid(float(np.float32(step)), lowest, lowest + 255)
        if self.can_be_codes(source):  # Scaled pixels.
            self.emit_integer(source, source.linear, wanted)
        else:
            layer = twin.ToCodes(wanted, name=self.name(f"{source.name}_codes"))
            source.codes, source.grid = layer(self.values(source)), wanted
        self.note(
            source.name,
            f"is quantized to 8 bits over [{low:g}, {high:g}]; train it so "
            "by a rule that gives the first layer 8-bit activations",
        )

    def _scale(self, value, sources, node) -> None:
        (source,) = sources
        gain, offset = elementwise.scale(node)
        if self._are_pixels(source):
            is_plain = gain.size == 1 and gain > 0 and not np.any(offset)
            if is_plain and self.may_consume(source):
                self._scale_pixels(value, source, gain.item())
                return
        value.linear = self.scaled(source, gain, offset)
        if self.reader_count(value.tensor) > 1 and self._are_scaled_pixels(value):
            self._input_codes(value)
        self.settle(value)

    def _are_pixels(self, value) -> bool:
        return value.codes is not None and graph.producer(value.tensor).is_input

    def _are_scaled_pixels(self, value) -> bool:
        """Whether a tensor is an input's codes, scaled or not."""
        return self.can_be_codes(value) and self._is_input(value.tensor)

    def _scale_pixels(self, value, source, gain) -> None:
        """Codes of pixels as they are, of another step."""
        (pixels,) = graph.producer(source.codes).keras_inputs
        step = float(np.float32(source.grid.step * gain))
        value.grid = dataclasses.replace(source.grid, step=step)
        layer = twin.ToCodes(value.grid, name=self.name(f"{value.name}_codes"))
        value.codes = layer(pixels)

    def _relu(self, value, sources, node) -> None:
        (source,) = sources
        kind = registry.relu_kind(node.layer)
        if source.linear is not None and self.may_consume(source):
            if source.linear.relu is None:
                value.linear = dataclasses.replace(source.linear, relu=kind)
            elif kind == "relu" or source.linear.relu == "relu6":
                value.linear = source.linear
        if value.linear is None and self.can_be_codes(source):
            value.linear = dataclasses.replace(self.rescale(source), relu=kind)
        if value.linear is None:
            value.values = self.relu_layer(kind, value.name)(self.values(source))
            return
        self.settle(value)

    def _keep_floats(self, value, sources, node) -> None:
        (source,), layer = sources, node.layer
        made, weights = copy_of(layer, self.name(value.name)), layer.get_weights()
        if isinstance(layer, _layers.LayerNormalization):
            made.scale = made.center = True
            ones = np.ones(value.tensor.shape[-1], np.float32)
            weights = [
                layer.gamma.numpy() if layer.scale else ones,
                layer.beta.numpy() if layer.center else 0.0 * ones,
            ]
        value.values = made(self.values(source))
        made.set_weights(weights)

    def _keep_codes(self, value, sources, node) -> None:
        (source,) = sources
        made = copy_of(stock.layer_of(node), self.name(node.layer.name))
        if self._are_scaled_pixels(source):
            self._input_codes(source)
        if self.can_be_codes(source):
            codes, value.grid = self.codes(source)
            value.codes = made(codes)
        else:
            value.values = made(self.values(source))

    def _activate(self, value, sources, node) -> None:
        (source,) = sources
        layer = _layers.Activation(
            elementwise.activation(node), name=self.name(value.name), dtype="float32"
        )
        value.values = layer(self.values(source))

    def _add(self, value, sources, node) -> None:
        joins.add(self, value, sources, elementwise.factors(node))

    def _multiply(self, value, sources, node) -> None:
        del node
        joins.multiply(self, value, sources)

    def _concatenate(self, value, sources, node) -> None:
        joins.concatenate(self, value, sources, stock.layer_of(node))

    def _average_pool(self, value, sources, node) -> None:
        pools.average_pool(self, value, sources[0], stock.layer_of(node))

    def _interpolate(self, value, sources, node) -> None:
        pools.interpolate(self, value, sources[0], stock.layer_of(node))

    def _global_pool(self, value, sources, node) -> None:
        pools.global_pool(self, value, sources[0], stock.layer_of(node))


_METHODS = {
    forms.ACTIVATION: _Snapper._activate,
    forms.ADD: _Snapper._add,
    forms.ALIAS: _Snapper._alias,
    forms.AVERAGE_POOL: _Snapper._average_pool,
    forms.CODES: _Snapper._keep_codes,
    forms.CONCATENATE: _Snapper._concatenate,
    forms.FLOATS: _Snapper._keep_floats,
    forms.GLOBAL_POOL: _Snapper._global_pool,
    forms.INTERPOLATE: _Snapper._interpolate,
    forms.LINEAR: _Snapper._linear,
    forms.MULTIPLY: _Snapper._multiply,
    forms.RELU: _Snapper._relu,
    forms.SCALE: _Snapper._scale,
}


def _output_names(model) -> list[str]:
    """The keys of a model's outputs where these are a dict; else their names."""
    nested = model._nested_outputs
    # Keras flattens a dict by its sorted keys.
    return sorted(nested) if isinstance(nested, dict) else list(model.output_names)


def _layer_name(tensor) -> str:
    return tensor._keras_history.layer.name
