"""From a trained quantized network to its snapped twin.

The graph is walked once, layer by layer; `building` makes the twin's layers.
"""

import dataclasses

import numpy as np

from tf_lowbit import inspection, quantizers
from tf_lowbit.compat import deep_graphs, keras
from tf_lowbit.core import checks as arguments
from tf_lowbit.export import checks, elementwise, grids, joins, pools, twin
from tf_lowbit.export import linear as linears
from tf_lowbit.export.building import DROPOUTS, Builder, Note, Value, copy_of
from tf_lowbit.export.linear import ExportError
from tf_lowbit.export.options import Options
from tf_lowbit.scheme import graph, registry

_layers = keras.layers
# Layers that only move or select codes.
_CODE_KEEPING = (
    _layers.Cropping1D,
    _layers.Cropping2D,
    _layers.Flatten,
    _layers.GlobalMaxPooling2D,
    _layers.MaxPooling1D,
    _layers.MaxPooling2D,
    _layers.Permute,
    _layers.Reshape,
    _layers.UpSampling2D,
    _layers.ZeroPadding1D,
    _layers.ZeroPadding2D,
)
# Layers that compute with floats, as they are.
_FLOAT_LAYERS = (_layers.LayerNormalization, _layers.LeakyReLU, _layers.PReLU)
_FLOAT_ACTIVATIONS = (
    *("gelu", "linear", "relu", "relu6"),
    *("sigmoid", "softmax", "swish", "tanh"),
)
_KINDS = {
    _layers.Conv1D: twin.CONV,
    _layers.Conv2D: twin.CONV,
    _layers.Dense: twin.DENSE,
    _layers.DepthwiseConv2D: twin.DEPTHWISE,
}


@dataclasses.dataclass(frozen=True)
class Snapped:
    """A twin, and how it was made.

    Attributes:
        twin: Keras model, not compiled; computes what the file computes.
        options: the choices.
        ranges: the measured ranges that were used, by tensor.
        notes: layers that are not exactly what was trained, and why.
    """

    twin: keras.Model
    options: Options
    ranges: dict[str, tuple[float, float]]
    notes: tuple[Note, ...]


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
    return _Snapper(network, data, options, ranges, batches).run(progress)


class _Snapper(Builder):
    """One walk over one network."""

    def run(self, progress) -> Snapped:
        """Walks the graph and builds the twin."""
        self._note_other_bits()
        inputs = []
        for tensor in self.model.inputs:
            made = keras.Input(
                tensor.shape[1:], name=_layer_name(tensor), dtype=tensor.dtype
            )
            if not tensor.dtype.is_floating:
                raise ExportError(
                    "Inputs must be floats. "
                    f"Received: {_layer_name(tensor)!r} of {tensor.dtype.name}"
                )
            self._names.add(_layer_name(tensor))
            inputs.append(made)
            self._values[id(tensor)] = Value(tensor, _layer_name(tensor), values=made)
        nodes = list(graph.calls(self.model))
        for done, node in enumerate(nodes, start=1):
            self._visit(node)
            if progress is not None:
                progress(done, len(nodes))
        outputs = [self.values(self._values[id(t)]) for t in self.model.outputs]
        with deep_graphs():
            made = keras.Model(inputs, outputs, name=f"{self.model.name}_twin")
        return Snapped(made, self.options, self.ranges.used, tuple(self.notes))

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
        layer = inspection.wrapped_layer(node.layer)
        sources = [self._values[id(t)] for t in node.keras_inputs]
        if len(graph.outputs_of(node)) != 1:
            raise ExportError(
                "Every layer must have one output. "
                f"Received: {layer.name!r} of type {type(layer).__name__}"
            )
        (tensor,) = graph.outputs_of(node)
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            raise ExportError(
                "Layers must have data_format='channels_last'. "
                f"Received: {layer.name!r} with {layer.data_format!r}"
            )
        value = Value(tensor, node.layer.name)
        self._values[id(tensor)] = value
        quantizer = self._by_layer.get(node.layer.name, {}).get(
            (quantizers.ACTIVATION, "output")
        )
        if quantizer is not None:
            self._quantize(value, sources[0], quantizer)
        elif registry.kernels(layer):
            self._linear(value, sources[0], node.layer)
        elif (numbers := elementwise.scale(node)) is not None:
            self._scale(value, sources[0], *numbers)
        elif registry.relu_kind(layer):
            self._relu(value, sources[0], layer)
        elif type(layer) in DROPOUTS:
            self._alias(value, sources[0])
        elif elementwise.join(node) is np.add:
            joins.add(self, value, sources, elementwise.factors(node))
        elif elementwise.join(node) is np.multiply:
            joins.multiply(self, value, sources)
        elif type(layer) is _layers.Concatenate:
            joins.concatenate(self, value, sources, layer)
        elif type(layer) is _layers.AveragePooling2D:
            pools.average_pool(self, value, sources[0], layer)
        elif type(layer) is _layers.GlobalAveragePooling2D:
            pools.global_pool(self, value, sources[0], layer)
        elif type(layer) in _FLOAT_LAYERS:
            self._keep_floats(value, sources[0], layer)
        elif type(layer) in _CODE_KEEPING:
            self._keep_codes(value, sources[0], layer)
        elif (function := elementwise.activation(node)) is not None:
            values = self.values(sources[0])
            value.values = self._activate(values, function, value.name)
        else:
            raise ExportError(
                "Every layer must have a form in the file; split or replace the layer. "
                f"Received: {layer.name!r} of type {type(layer).__name__}"
            )

    def _alias(self, value, source) -> None:
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

    def _linear(self, value, source, outer) -> None:
        layer = inspection.wrapped_layer(outer)
        if type(layer) not in _KINDS:
            raise ExportError(
                "Weight layers must be Dense, Conv1D, Conv2D or DepthwiseConv2D; "
                "tf_lowbit.split_separable makes the last two of a SeparableConv2D. "
                f"Received: {layer.name!r} of type {type(layer).__name__}"
            )
        linears.check_geometry(layer)
        kind = _KINDS[type(layer)]
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
            self._input_codes(source)
            if weights is None:
                weights = linears.eight_bits(layer, kernel)
                self.note(
                    value.name, "was trained in float; its weights have 8 bits here"
                )
        value.linear = linears.Linear(
            kind, layer, weights, source, np.ones(channels), bias, None, integer
        )
        own = registry.own_relu(layer)
        if own:
            value.linear.relu = own
        elif layer.activation is not keras.activations.linear:
            value.values = self._activate(
                self.values(value),
                keras.activations.serialize(layer.activation),
                f"{value.name}_activation",
            )
            value.linear = None
        if weights is not None and not integer:
            self.note(
                value.name, "reads floats, so it computes in float with its low-bit "
                "weights' values",
            )  # fmt: skip
        self.settle(value)

    def _wants_int8_edge(self, outer, source) -> bool:
        """Whether a layer that was trained to read floats is to read codes."""
        if outer.name in self._first and self.options.first_layer == "int8":
            return not self.can_be_codes(source) and self._is_input(source.tensor)
        if outer.name in self._last and self.options.head == "int8":
            return self.can_be_codes(source)
        return False

    def _is_input(self, tensor) -> bool:
        """Whether a tensor is the model's input, padding and scaling apart."""
        node = graph.producer(tensor)
        if node.is_input:
            return True
        kept = type(node.layer) in (*_CODE_KEEPING, *DROPOUTS)
        kept = kept or elementwise.scale(node) is not None
        return kept and self._is_input(node.keras_inputs[0])

    def _input_codes(self, source) -> None:
        """Codes of a float input, on the int8 grid over its measured range."""
        if self.can_be_codes(source):
            return
        node = graph.producer(source.tensor)
        if not node.is_input and elementwise.scale(node) is None:
            behind = self._values[id(node.keras_inputs[0])]
            self._input_codes(behind)
            if type(node.layer) in DROPOUTS:
                self._alias(source, behind)
            else:
                name = self.name(node.layer.name)
                self._keep_codes(source, behind, node.layer, name)
            return
        low, high = self.ranges(source.tensor)
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255 or 1.0
        lowest = max(round(low / step), -255)
        wanted = grids.float_grid(float(np.float32(step)), lowest, lowest + 255)
        layer = twin.ToCodes(wanted, name=self.name(f"{source.name}_codes"))
        source.codes, source.grid = layer(self.values(source)), wanted
        self.note(source.name, f"is quantized to 8 bits over [{low:g}, {high:g}]")

    def _scale(self, value, source, gain, offset) -> None:
        value.linear = self.scaled(source, gain, offset)
        self.settle(value)

    def _relu(self, value, source, layer) -> None:
        kind = registry.relu_kind(layer)
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

    def _keep_floats(self, value, source, layer) -> None:
        made, weights = copy_of(layer, self.name(value.name)), layer.get_weights()
        if isinstance(layer, _layers.LayerNormalization):
            elementwise.require_last(layer, len(value.tensor.shape))
            made.scale = made.center = True
            ones = np.ones(value.tensor.shape[-1], np.float32)
            weights = [
                layer.gamma.numpy() if layer.scale else ones,
                layer.beta.numpy() if layer.center else 0.0 * ones,
            ]
        value.values = made(self.values(source))
        made.set_weights(weights)

    def _keep_codes(self, value, source, layer, name=None) -> None:
        if getattr(layer, "interpolation", "nearest") != "nearest":
            raise ExportError(
                "Upsampling must be by interpolation='nearest', which moves codes. "
                f"Received: {layer.name!r} with {layer.interpolation!r}"
            )
        made = copy_of(layer, name or self.name(value.name))
        if self.can_be_codes(source):
            codes, value.grid = self.codes(source)
            value.codes = made(codes)
        else:
            value.values = made(self.values(source))

    def _activate(self, tensor, function, name):
        if function not in _FLOAT_ACTIVATIONS:
            raise ExportError(
                f"Float activations must be one of {_FLOAT_ACTIVATIONS}. "
                f"Received: {name!r} with {function!r}"
            )
        layer = _layers.Activation(function, name=self.name(name), dtype="float32")
        return layer(tensor)


def _layer_name(tensor) -> str:
    return tensor._keras_history.layer.name
