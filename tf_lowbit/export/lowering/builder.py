"""State of a lowering: the tensors of the network, and the layers made for them.

A convolution and the normalization behind it first become a *pending* linear layer.
It becomes an integer layer when a quantizer, or another reader of codes, decides the
grid of its output.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tf_lowbit import quantizers
from tf_lowbit.compat import KerasTensor, Node, keras
from tf_lowbit.core import grid as core_grid
from tf_lowbit.export.integer import int8_grids, plain_layers, thresholds, twin
from tf_lowbit.export.integer.int8_grids import Grid
from tf_lowbit.export.lowering import elementwise, stock_layers
from tf_lowbit.export.lowering import linear as linears
from tf_lowbit.export.lowering.tensor_ranges import Ranges, key
from tf_lowbit.export.options import Options
from tf_lowbit.export.types import ExportError, Note
from tf_lowbit.network import graph, inspection, layer_registry, passthrough
from tf_lowbit.scheme.placement import edge_layers

_layers = keras.layers


@dataclasses.dataclass
class Value:
    """One tensor of the trained network, and its counterparts in the integer model.

    Attributes:
        tensor: The trained network's Keras tensor.
        name: Name of the layer that outputs it.
        factor: The value is `factor * tensor`.
        linear: Pending linear layer, or None.
        codes: The integer model's tensor of codes, once made.
        grid: Grid of the codes.
        values: The integer model's tensor of float values, once made.
    """

    tensor: KerasTensor
    name: str
    factor: float = 1.0
    linear: linears.Linear | None = None
    codes: KerasTensor | None = None
    grid: Grid | None = None
    values: KerasTensor | None = None


Values: TypeAlias = Sequence[Value]


class Builder:
    """Makes the layers of the integer model, each on first use.

    Args:
        model: The trained network.
        data: Iterable of batches to measure ranges on, or None.
        options: Options of the export.
        ranges: Ranges measured before, by tensor.
        batches: Number of batches to measure on.

    Attributes:
        notes: The notes so far.
        known: Id of a tensor -> its `Value`.
        names: Names of the layers so far.
        by_layer: Layer's name -> (role, attribute) -> quantized tensor.
        first: Names of the first weight layers.
        last: Names of the last weight layers.
        readers: Id of a tensor -> nodes that read it, also through aliases.
    """

    def __init__(
        self,
        model: keras.Model,
        data: Iterable[Any] | None,
        options: Options,
        ranges: Mapping[str, tuple[float, float]] | None,
        batches: int,
    ):
        self.model = model
        self.options = options
        self.ranges = Ranges(model, data, batches, ranges)
        self.notes: list[Note] = []
        self.known: dict[int, Value] = {}
        self.names: set[str] = set()
        self.by_layer: dict[str, dict] = {}
        for tensor in inspection.quantized_tensors(model):
            table = self.by_layer.setdefault(tensor.layer.name, {})
            table[tensor.role, tensor.attribute] = tensor
        self.first, self.last = edges_of(model)
        self._outputs = {id(t) for t in model.outputs}
        self.readers: dict[int, list] = {}
        for node in reversed(list(graph.calls(model))):
            made = graph.outputs_of(node)[0]
            # Readers of an alias's output read its input.
            is_alias = passthrough.is_identity(node)
            readers = self.readers.get(id(made), []) if is_alias else [node]
            for tensor in node.keras_inputs:
                self.readers.setdefault(id(tensor), []).extend(readers)
                if is_alias and id(made) in self._outputs:
                    self._outputs.add(id(tensor))

    def quantizer_of(self, node: Node) -> inspection.QuantizedTensor | None:
        """The activation quantizer of a node, or None."""
        own = self.by_layer.get(node.layer.name, {})
        return own.get((quantizers.ACTIVATION, "output"))

    def levels(self, quantizer: inspection.QuantizedTensor) -> tuple[float, int, int]:
        """Step, lowest and highest code of an activation quantizer.

        Raises:
            ExportError: If the codes have gaps, or there are several steps.
        """
        kind, bits = quantizer.quantizer, quantizer.bits
        step = np.ravel(kind.step(None, quantizer.variables))
        codes = kind.level_codes(bits)
        if step.size != 1 or kind.level_count(bits) != codes[-1] - codes[0] + 1:
            raise ExportError(
                "Activations must have one step, and every integer between two codes "
                f"as a code. Received: {quantizer.name} with {kind!r}"
            )
        return float(step[0]), codes[0], codes[-1]

    def can_be_codes(self, value: Value) -> bool:
        """Whether a tensor has codes or can get them."""
        is_pending = value.linear is not None and value.linear.is_integer
        return value.codes is not None or is_pending

    def may_consume(self, value: Value) -> bool:
        """Whether a tensor has one reader only, which may then be folded into it."""
        return self.reader_count(value.tensor) == 1

    def reader_count(self, tensor: KerasTensor) -> int:
        """The number of layers that read a tensor, plus one for a model's output."""
        return len(self.readers.get(id(tensor), ())) + (id(tensor) in self._outputs)

    def settle(self, value: Value) -> None:
        """Fixes a pending layer at 8 bits if it has several readers, not all Adds."""
        is_shared = self.reader_count(value.tensor) > 1
        if not (is_shared and value.linear.is_integer) or self._is_float_head(value):
            return
        readers = self.readers.get(id(value.tensor), [])
        if all(isinstance(inspection.wrapped_layer(n.layer), _layers.Add)
               for n in readers):  # fmt: skip
            return  # The first Add fixes the step.
        self.codes(value)

    def only_quantizer(self, value: Value) -> Grid | None:
        """The grid of an unsigned or 8-bit quantizer that is a tensor's only reader."""
        readers = self.readers.get(id(value.tensor), [])
        if len(readers) != 1 or id(value.tensor) in self._outputs:
            return None
        quantizer = self.quantizer_of(readers[0])
        if quantizer is None:
            return None
        step, low, high = self.levels(quantizer)
        if low == 0 or (low, high) == int8_grids.INT8:
            return int8_grids.grid(step, low, high)
        return None

    def rescale(
        self,
        source: Value,
        gain: np.ndarray | float = 1.0,
        offset: np.ndarray | float = 0.0,
    ) -> linears.Linear:
        """A pending layer with one weight per channel: `gain * x + offset`."""
        channels = int(source.tensor.shape[-1])
        is_integer = self.can_be_codes(source)
        return linears.Linear(
            twin.SCALE, None, None, source,
            np.broadcast_to(np.float64(gain), channels).copy(),
            np.broadcast_to(np.float64(offset), channels).copy(),
            None, is_integer,
        )  # fmt: skip

    def scaled(
        self, source: Value, gain: np.ndarray | float, offset: np.ndarray | float = 0.0
    ) -> linears.Linear:
        """A pending `gain * x + offset` per channel, folded into `x` if possible."""
        linear = source.linear
        if linear is None or linear.relu is not None or not self.may_consume(source):
            return self.rescale(source, gain, offset)
        return dataclasses.replace(
            linear, gain=linear.gain * gain, offset=linear.offset * gain + offset
        )

    def alias(self, value: Value, source: Value) -> None:
        """Makes a tensor an alias of another one."""
        for field in ("linear", "codes", "grid", "values"):
            setattr(value, field, getattr(source, field))
        if value.linear is not None:
            # Both must become one layer of the file.
            self.known[id(value.tensor)] = source

    def copy_layer(self, value: Value, source: Value, node: Node) -> None:
        """Applies a node's layer to a tensor's codes, or to its float values."""
        if self.can_be_codes(source):
            made = copy_of(stock_layers.layer_of(node), self.name(node.layer.name))
            codes, value.grid = self.codes(source)
            value.codes = made(codes)
        else:
            self.copy_layer_in_float(value, source, node)

    def copy_layer_in_float(self, value: Value, source: Value, node: Node) -> None:
        """Applies a node's layer to a tensor's float values."""
        made = copy_of(stock_layers.layer_of(node), self.name(node.layer.name))
        value.values = made(self.values(source))

    def codes(self, value: Value) -> tuple[KerasTensor, Grid]:
        """A tensor's codes and grid: at 8 bits if the grid is not decided yet."""
        if value.codes is None:
            self.emit_integer(value, value.linear, self.eight_bit_grid(value))
            self.note_eight_bits(value)
        return value.codes, value.grid

    def values(self, value: Value) -> KerasTensor:
        """A tensor's float values."""
        if value.values is not None:
            return value.values
        if value.codes is None and not self._keeps_precision(value):
            self.codes(value)
        if value.codes is not None:
            layer = twin.ToValues(value.grid, name=self.name(f"{value.name}_values"))
            value.values = layer(value.codes)
        else:
            value.values = self.emit_float(value)
        return value.values

    def codes_or_values(self, value: Value) -> KerasTensor:
        """A tensor's codes if the file has any, else its float values."""
        values = self.values(value)
        return values if value.codes is None else value.codes

    def _keeps_precision(self, value) -> bool:
        """Whether a pending layer's float values are computed in float, unrounded."""
        is_scale = value.linear.kind == twin.SCALE
        return not value.linear.is_integer or is_scale or self._is_float_head(value)

    def _is_float_head(self, value) -> bool:
        """Whether a pending layer is a last one, which the options leave in float."""
        linear = value.linear
        is_head = linear.kind == twin.DENSE and linear.layer.name in self.last
        return is_head and self.options.head == "float"

    def eight_bit_step(self, value: Value) -> float:
        """The step of the signed 8-bit grid over a tensor's measured range."""
        return int8_grids.signed_step(*self.range_of(value))

    def eight_bit_grid(self, value: Value) -> Grid:
        """The 8-bit grid over a tensor's measured range."""
        is_relu = value.linear is not None and bool(value.linear.relu)
        return int8_grids.over(*self.range_of(value), signed=not is_relu)

    def range_of(self, value: Value) -> tuple[float, float]:
        """Minimum and maximum of a tensor on the data."""
        ends = [value.factor * end for end in self.ranges(value.tensor)]
        return min(ends), max(ends)

    def note_eight_bits(self, value: Value) -> None:
        """Notes that a tensor is rounded to 8 bits, unlike in training."""
        advice = ""
        node = graph.producer(value.tensor)
        if layer_registry.relu_kind(node.layer):
            node = graph.producer(node.keras_inputs[0])
        if elementwise.join(node) is np.add:
            advice = ". To train with this, use quantize(residual_bits=8)"
        elif reader := self._weight_layer_behind(value.tensor):
            advice = (
                f". To train with this, give {reader!r}, which reads it, activation "
                "bits by a rule"
            )
        self.note(value.name, f"is rounded to 8 bits over its measured range{advice}")

    def _weight_layer_behind(self, tensor) -> str | None:
        """The name of a layer whose rule would quantize a tensor, or None."""
        waiting = [tensor]
        while waiting:
            for node in self.readers.get(id(waiting.pop()), []):
                if layer_registry.kernels(inspection.wrapped_layer(node.layer)):
                    return node.layer.name
                if passthrough.is_transparent(node):
                    waiting += graph.outputs_of(node)
        return None

    def note(self, layer: str, text: str) -> None:
        """Adds a note on a layer, unless it is there already."""
        note = Note(layer, text)
        if note not in self.notes:
            self.notes.append(note)

    def name(self, wanted: str) -> str:
        """An unused layer name: the wanted one, with a number if it is taken."""
        return graph.free_name(wanted, self.names)

    def emit_float(self, value: Value) -> KerasTensor:
        """Makes the float layers that compute a pending tensor."""
        linear = value.linear
        inputs = self.values(linear.source)
        if linear.kind == twin.SCALE:
            layer = plain_layers.Affine(name=self.name(value.name))
            outputs = layer(inputs)
            layer.set_weights(
                [linear.gain.astype(np.float32), linear.offset.astype(np.float32)]
            )
        else:
            inputs = self._padded(linear, inputs)
            outputs = self._float_layer(linear, inputs)
        if linear.relu:
            outputs = self.relu_layer(linear.relu, f"{value.name}_relu")(outputs)
        return outputs

    def _float_layer(self, linear, inputs):
        config = {
            **linear.layer.get_config(),
            "name": self.name(linear.layer.name),
            "use_bias": True,
            "activation": "linear",
            "dtype": "float32",
            "kernel_regularizer": None,
            "depthwise_regularizer": None,
            "bias_regularizer": None,
        }
        if linear.kind != twin.DEPTHWISE:
            del config["depthwise_regularizer"]
        if config.get("padding") == "causal":
            config["padding"] = "valid"
        layer = type(linear.layer).from_config(config)
        outputs = layer(inputs)
        (attribute,) = layer_registry.kernels(linear.layer)
        kernel = (
            getattr(linear.layer, attribute.attribute)
            if linear.weights is None
            else linear.weights.quantized()
        )
        gain = linears.per_channel(linear, linear.gain)
        kernel = (np.asarray(kernel, np.float64) * gain).astype(np.float32)
        layer.set_weights([kernel, linear.offset.astype(np.float32)])
        return outputs

    def emit_integer(
        self, value: Value, linear: linears.Linear, grid: Grid, in_place: bool = False
    ) -> KerasTensor:
        """Makes the integer layer that computes a tensor's codes on a grid.

        Args:
            value: The tensor; its codes and grid are set.
            linear: The pending layer.
            grid: Grid of the output; a fused ReLU narrows it.
            in_place: Whether a narrowed grid keeps its scale and zero point.
        """
        if linear.relu and (linear.relu == "relu6" or grid.low < 0):
            grid = int8_grids.behind_relu(grid, linear.relu, in_place=in_place)
        inputs, input_grid = self.codes(linear.source)
        inputs = self._padded(linear, inputs)
        codes, steps, latent, quantizer, state = linears.weights(linear)
        sign = np.where(linear.gain < 0, -1.0, 1.0)
        gain = np.abs(linear.gain) * steps * input_grid.step / grid.step
        signed = codes * linears.per_channel(linear, sign)
        smallest, largest = linears.bounds(linear.kind, signed, input_grid)
        most = linears.largest_code(linear, codes)
        storage = self._storage(value, linear, most)
        upscale = (7 if storage == "int4" else 127) // most
        names = self.options.kernels_of(linear.kind, storage, latent.shape[0])
        linears.check_accumulator(value.name, smallest, largest, upscale)
        affine = thresholds.place(
            gain,
            linear.offset / grid.step,
            low=grid.low,
            high=grid.high,
            smallest=smallest,
            largest=largest,
            upscale=upscale,
            input_scale=input_grid.scale,
            output_scale=grid.scale,
            kernel_names=names,
            away=twin.rounds_away(linear.kind, len(gain)),
        )
        layer = twin.IntegerLinear(
            grid,
            linear.kind,
            latent.shape,
            quantizer,
            {name: list(np.shape(v)) for name, v in state.items()},
            input_grid,
            upscale,
            kernel=names[0],
            storage=storage,
            represents=key(value.tensor) if value.factor == 1.0 else "",
            name=self.name(self._layer_name(value, linear)),
            **linears.window(linear),
        )
        value.codes, value.grid = layer(inputs), grid
        # Over all accumulators of any weights, because the twin may be fine-tuned.
        ends = np.full(len(gain), layer.largest_sum())
        points = thresholds.ideal(
            gain, linear.offset / grid.step, grid.low, grid.high, -ends, ends
        )
        layer.set_constants(
            dataclasses.replace(affine, thresholds=np.minimum(points, 2**31 - 1)),
            latent,
            np.where(affine.constant, 0.0, sign),
            state,
        )
        return value.codes

    def _padded(self, linear, inputs):
        """A layer's input, with the zeros in front that a causal layer needs."""
        count = linears.causal_padding(linear.layer)
        if not count:
            return inputs
        name = self.name(f"{linear.layer.name}_padding")
        return _layers.ZeroPadding1D((count, 0), name=name, dtype="float32")(inputs)

    def _layer_name(self, value, linear) -> str:
        """The weight layer's own name if there is one."""
        if linear.weights is not None and linear.layer is not None:
            return linear.layer.name
        return value.name

    def _storage(self, value, linear, most) -> str:
        is_int4 = self.options.storage == "int4" and linear.kind != twin.SCALE
        if not is_int4 or linear.weights is None:
            return "int8"
        inputs, outputs = linears.latent_shape(linear)[-2:]
        if linear.kind == twin.DENSE and outputs == 1 and inputs % 2 == 0:
            return "int8"  # TensorFlow's runtime does not load this layer in INT4.
        if most <= 7:
            return "int4"
        bits = linear.weights.bits
        if bits == core_grid.MAX_BITS:
            return "int8"  # An 8-bit first or last layer keeps its bits.
        raise ExportError(
            "storage='int4' holds codes in [-7, 7]: the odd grid up to 3 bits, grids "
            "with a zero up to 4. Use storage='int8'. "
            f"Received: {value.name} with codes up to {most} at {bits} bits"
        )

    def relu_layer(self, kind: str, name: str) -> keras.layers.Layer:
        """A float ReLU or ReLU6."""
        return _layers.ReLU(
            6.0 if kind == "relu6" else None, name=self.name(name), dtype="float32"
        )


def edges_of(model: keras.Model) -> tuple[set[str], set[str]]:
    """Names of the first and of the last weight layers of a quantized network."""
    return edge_layers(
        model, lambda layer: layer_registry.kernels(inspection.wrapped_layer(layer))
    )


def copy_of(layer: keras.layers.Layer, name: str) -> keras.layers.Layer:
    """A copy of a stock layer in float32, under another name."""
    return type(layer).from_config(
        {**layer.get_config(), "name": name, "dtype": "float32"}
    )
