"""Tensors of a network that is becoming integers, and the layers made for them.

What a tensor is stays open as long as possible: a convolution and the normalisation
behind it are a *pending* linear layer, which becomes an integer layer when a quantizer,
or whatever else wants codes, says on which grid.
"""

import dataclasses

import numpy as np

from tf_lowbit import inspection, quantizers
from tf_lowbit.compat import keras
from tf_lowbit.core import grid as core_grid
from tf_lowbit.export import grids, thresholds, twin
from tf_lowbit.export import linear as linears
from tf_lowbit.export.grids import Grid
from tf_lowbit.export.linear import ExportError
from tf_lowbit.export.ranges import Ranges, key
from tf_lowbit.scheme import graph, passing, registry
from tf_lowbit.scheme.plan import edge_layers

_layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Note:
    """Something that a user should know of one layer of the file.

    Attributes:
        layer: its name.
        text: what was done, in one sentence.
    """

    layer: str
    text: str

    def __str__(self):
        return f"{self.layer}: {self.text}"


@dataclasses.dataclass
class Value:
    """What is known of one tensor of the trained network.

    Attributes:
        tensor: the trained network's Keras tensor.
        name: of the layer that puts it out.
        factor: of the tensor, that the value is.
        linear: pending, or None.
        codes: the twin's tensor of codes, once made.
        grid: of the codes.
        values: the twin's tensor of float values, once made.
    """

    tensor: object
    name: str
    factor: float = 1.0
    linear: linears.Linear | None = None
    codes: object = None
    grid: Grid | None = None
    values: object = None


class Builder:
    """Makes a twin's layers, each when it is asked for.

    Args:
        model: the trained network.
        data: iterable of batches to measure ranges on, or None.
        options: the choices.
        ranges: measured before, by tensor.
        batches: how many batches are measured on.
    """

    def __init__(self, model, data, options, ranges, batches):
        self.model = model
        self.options = options
        self.ranges = Ranges(model, data, batches, ranges)
        self.notes: list[Note] = []
        self._values: dict[int, Value] = {}
        self._names: set[str] = set()
        self._by_layer: dict[str, dict] = {}
        for tensor in inspection.quantized_tensors(model):
            table = self._by_layer.setdefault(tensor.layer.name, {})
            table[tensor.role, tensor.attribute] = tensor
        self._first, self._last = edge_layers(
            model, lambda layer: registry.kernels(inspection.wrapped_layer(layer))
        )
        self._outputs = {id(t) for t in model.outputs}
        self._readers: dict[int, list] = {}
        for node in reversed(list(graph.calls(model))):
            made = graph.outputs_of(node)[0]
            # What reads behind an alias reads what stands in front of it.
            is_alias = passing.is_identity(node)
            readers = self._readers.get(id(made), []) if is_alias else [node]
            for tensor in node.keras_inputs:
                self._readers.setdefault(id(tensor), []).extend(readers)
                if is_alias and id(made) in self._outputs:
                    self._outputs.add(id(tensor))

    def levels(self, quantizer) -> tuple[float, int, int]:
        """Step, lowest and highest code of an activation quantizer."""
        kind, bits = quantizer.quantizer, quantizer.bits
        step = float(np.ravel(kind.step(None, quantizer.variables))[0])
        if not kind.signed:
            return step, 0, 2**bits - 1
        negative, positive = core_grid.signed_limits(bits, kind.narrow_range)
        return step, -int(negative), int(positive)

    def can_be_codes(self, value) -> bool:
        """Whether a tensor is codes, or can be made so."""
        if value.codes is not None:
            return True
        return value.linear is not None and value.linear.is_integer

    def may_consume(self, value) -> bool:
        """Whether one reader may fold a tensor into itself: it is the only one."""
        return self.reader_count(value.tensor) == 1

    def reader_count(self, tensor) -> int:
        """How many layers read a tensor, the outside of the model included."""
        return len(self._readers.get(id(tensor), ())) + (id(tensor) in self._outputs)

    def settle(self, value) -> None:
        """Fixes a pending layer at 8 bits if several, different things read it."""
        if self.reader_count(value.tensor) < 2 or not value.linear.is_integer:
            return
        readers = self._readers.get(id(value.tensor), [])
        if all(isinstance(inspection.wrapped_layer(n.layer), _layers.Add)
               for n in readers):  # fmt: skip
            return  # The first Add fixes the step.
        self.codes(value)

    def only_quantizer(self, value) -> Grid | None:
        """The grid of the unsigned quantizer that alone reads a tensor."""
        readers = self._readers.get(id(value.tensor), [])
        if len(readers) != 1 or id(value.tensor) in self._outputs:
            return None
        quantizer = self._by_layer.get(readers[0].layer.name, {}).get(
            (quantizers.ACTIVATION, "output")
        )
        if quantizer is None:
            return None
        step, low, high = self.levels(quantizer)
        if low == 0 or (low, high) == grids.INT8:
            return grids.grid(step, low, high)
        return None

    def rescale(self, source, gain=1.0, offset=0.0) -> linears.Linear:
        """One weight a channel: a normalisation without a layer to fold it into."""
        channels = int(source.tensor.shape[-1])
        is_integer = self.can_be_codes(source)
        return linears.Linear(
            twin.SCALE, None, None, source,
            np.broadcast_to(np.float64(gain), channels).copy(),
            np.broadcast_to(np.float64(offset), channels).copy(),
            None, is_integer,
        )  # fmt: skip

    def scaled(self, source, gain, offset=0.0) -> linears.Linear:
        """A tensor times a gain, a channel, and an offset: folded in where possible."""
        linear = source.linear
        if linear is None or linear.relu is not None or not self.may_consume(source):
            return self.rescale(source, gain, offset)
        return dataclasses.replace(
            linear, gain=linear.gain * gain, offset=linear.offset * gain + offset
        )

    def codes(self, value):
        """A tensor's codes and grid; at 8 bits where nothing else is said."""
        if value.codes is None:
            self.emit_integer(value, value.linear, self.eight_bit_grid(value))
            self.note_eight_bits(value)
        return value.codes, value.grid

    def values(self, value):
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

    def _keeps_precision(self, value) -> bool:
        """Whether floats are computed in float, rather than rounded to 8 bits first."""
        linear = value.linear
        if not linear.is_integer or linear.kind == twin.SCALE:
            return True
        is_head = linear.kind == twin.DENSE and value.linear.layer.name in self._last
        return is_head and self.options.head == "float"

    def eight_bit_step(self, value) -> float:
        """The step of signed 8 bits over a tensor's measured range."""
        low, high = self._range(value)
        return max(-low / 128, high / 127) or 1.0

    def eight_bit_grid(self, value) -> Grid:
        """The 8-bit grid over a tensor's measured range."""
        if value.linear is not None and value.linear.relu:
            _, high = self._range(value)
            return grids.grid(high / 255 or 1.0, 0, 255)
        return grids.grid(self.eight_bit_step(value), *grids.INT8)

    def _range(self, value) -> tuple[float, float]:
        ends = [value.factor * end for end in self.ranges(value.tensor)]
        return min(ends), max(ends)

    def note_eight_bits(self, value) -> None:
        """Notes that a tensor is rounded as its training did not."""
        self.note(
            value.name,
            "is rounded to 8 bits over its measured range; quantize(residual_bits=8) "
            "trains sums so, a rule for the layer that reads it other tensors",
        )

    def note(self, layer, text) -> None:
        """Notes something of a layer, once."""
        note = Note(layer, text)
        if note not in self.notes:
            self.notes.append(note)

    def name(self, wanted: str) -> str:
        """The wanted name of a layer, or with the first number that makes it new."""
        name, count = wanted, 1
        while name in self._names:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name

    def emit_float(self, value):
        """Makes the float layers that put a pending tensor out."""
        linear = value.linear
        inputs = self.values(linear.source)
        if linear.kind == twin.SCALE:
            layer = twin.Affine(name=self.name(value.name))
            outputs = layer(inputs)
            layer.set_weights(
                [linear.gain.astype(np.float32), linear.offset.astype(np.float32)]
            )
        else:
            inputs = self._padded(linear, inputs)
            layer, outputs = self._float_layer(value, linear, inputs)
        if linear.relu:
            outputs = self.relu_layer(linear.relu, f"{value.name}_relu")(outputs)
        return outputs

    def _float_layer(self, value, linear, inputs):
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
        (attribute,) = registry.kernels(linear.layer)
        kernel = (
            getattr(linear.layer, attribute.attribute)
            if linear.weights is None
            else linear.weights.quantized()
        )
        gain = linears.per_channel(linear, linear.gain)
        kernel = (np.asarray(kernel, np.float64) * gain).astype(np.float32)
        layer.set_weights([kernel, linear.offset.astype(np.float32)])
        return layer, outputs

    def emit_integer(self, value, linear, grid, in_place=False):
        """Makes the integer layer that puts a tensor out on a grid.

        Args:
            value: the tensor; gets codes and grid.
            linear: the pending layer.
            grid: of the output; a fused ReLU narrows it.
            in_place: whether a narrowed grid keeps its scale and zero point.
        """
        if linear.relu and (linear.relu == "relu6" or grid.low < 0):
            grid = grids.behind_relu(grid, linear.relu, in_place=in_place)
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
        # Over all accumulators that any weights could give: they may be fine-tuned.
        most = np.full(len(gain), layer.largest_sum())
        points = thresholds.ideal(
            gain, linear.offset / grid.step, grid.low, grid.high, -most, most
        )
        layer.set_constants(
            dataclasses.replace(affine, thresholds=np.minimum(points, 2**31 - 1)),
            latent,
            np.where(affine.constant, 0.0, sign),
            state,
        )
        return value.codes

    def _padded(self, linear, inputs):
        """What a layer reads, with the zeros in front that a causal one is to have."""
        count = linears.causal_padding(linear.layer)
        if not count:
            return inputs
        name = self.name(f"{linear.layer.name}_padding")
        return _layers.ZeroPadding1D((count, 0), name=name, dtype="float32")(inputs)

    def _layer_name(self, value, linear) -> str:
        """The weight layer's own name where there is one."""
        if linear.weights is not None and linear.layer is not None:
            return linear.layer.name
        return value.name

    def _storage(self, value, linear, most) -> str:
        if self.options.storage != "int4" or linear.kind == twin.SCALE:
            return "int8"
        if linear.weights is None:
            return "int8"
        inputs, outputs = linears.latent_shape(linear)[-2:]
        if linear.kind == twin.DENSE and outputs == 1 and inputs % 2 == 0:
            return "int8"  # TensorFlow's runtime does not load such a layer in INT4.
        if most <= 7:
            return "int4"
        bits = linear.weights.bits
        if bits == core_grid.MAX_BITS:
            return "int8"  # An 8-bit edge layer is what its bits say.
        raise ExportError(
            "storage='int4' holds codes in [-7, 7]: the odd grid up to 3 bits, grids "
            "around zero up to 4. Use storage='int8'. "
            f"Received: {value.name} with codes up to {most} at {bits} bits"
        )

    def relu_layer(self, kind, name):
        """A float ReLU or ReLU6."""
        return _layers.ReLU(
            6.0 if kind == "relu6" else None, name=self.name(name), dtype="float32"
        )


def copy_of(layer, name):
    """A stock layer in float32, under a name that is free."""
    return type(layer).from_config(
        {**layer.get_config(), "name": name, "dtype": "float32"}
    )
