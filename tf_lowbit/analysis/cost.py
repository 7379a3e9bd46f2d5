"""Parameters, bytes, MACs and bit operations of a network, layer by layer."""

import dataclasses
import math

import rich.box
import rich.table
import rich.text

from tf_lowbit.compat import is_keras3, keras
from tf_lowbit.core import tables
from tf_lowbit.network import graph, inspection, keras3, layer_registry
from tf_lowbit.quantizers import WEIGHT

FLOAT_BITS = 32

_COLUMNS = (
    "layer",
    "type",
    "output",
    "parameters",
    "weight bits",
    "activation bits",
    "weight bytes",
    "MACs",
    "BOPs",
)
_TEXT_COLUMNS = 3

_TRANSPOSED = (keras.layers.Conv2DTranspose,)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The cost of one layer.

    Attributes:
        name: The layer's name.
        kind: Its class, such as "Conv2D".
        output_shape: Shape of its first output, without the batch; None for an open
            size.
        parameters: Number of weights that inference needs.
        weight_bits: Bits of each kernel; 32 is float. Empty for a layer without
            kernels.
        activation_bits: Bits of the input of each kernel; the maximum if the layer
            reads several tensors.
        weight_bytes: Size of its parameters: kernels at `weight_bits`, padded to whole
            bytes, everything else (bias, normalization, steps) in float32.
        macs: Multiply-accumulates for one example, over all its calls; None if a size
            is open or the layer's arithmetic is unknown (LSTM, attention).
        bops: Bit operations, `macs * weight_bits * activation_bits`; None if `macs` is.
    """

    name: str
    kind: str
    output_shape: tuple[int | None, ...]
    parameters: int
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    weight_bytes: int
    macs: int | None
    bops: int | None


@dataclasses.dataclass(frozen=True)
class Cost(tables.Table):
    """The cost of a network.

    Attributes:
        name: The model's name.
        layers: The layers that have parameters.
    """

    name: str
    layers: tuple[LayerCost, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters at their bits."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in float32."""
        return self.parameters * FLOAT_BITS // 8

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates for one example; None if a layer's are unknown."""
        return _sum(layer.macs for layer in self.layers)

    @property
    def bops(self) -> int | None:
        """Bit operations for one example; None if a layer's are unknown."""
        return _sum(layer.bops for layer in self.layers)

    def as_dict(self) -> dict:
        """The cost as JSON-ready data, with totals."""
        totals = ("parameters", "weight_bytes", "float_bytes", "macs", "bops")
        return {
            "name": self.name,
            **{total: getattr(self, total) for total in totals},
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }

    def __rich__(self):
        """The table for a rich console."""
        return _table(self)


def cost(model: keras.Model) -> Cost:
    """Computes the cost of a network at the present bits of its quantizers.

    16 and 32 bits (not rounded) count as float32. A MAC of a b_w-bit weight and a
    b_a-bit activation counts as `b_w * b_a` bit operations (BOPs). This is the common
    definition without the accumulator's term.

    Args:
        model: Functional or sequential model, quantized or float; or a
            `LowBitTrainer` of one student.

    Returns:
        The cost.

    Raises:
        ValueError: If the model is subclassed or not built, or a trainer has several
            students.
    """
    if is_keras3(model):
        model = keras3.from_keras3(model)
    model = inspection.single_network(model)
    if not getattr(model, "_is_graph_network", False):
        raise ValueError(
            "model must be a built Sequential or Functional tf_keras model. "
            f"Received: {type(model).__name__} {getattr(model, 'name', '')!r}"
        )
    read = inspection.input_activations(model)
    quantized: dict[str, dict[str, inspection.QuantizedTensor]] = {}
    for tensor in inspection.quantized_tensors(model):
        if tensor.role == WEIGHT:
            quantized.setdefault(tensor.layer.name, {})[tensor.attribute] = tensor
    calls: dict[str, list] = {}
    for node in graph.calls(model):
        calls.setdefault(node.layer.name, []).append(node)
    return Cost(
        model.name,
        tuple(
            _layer_cost(layer, calls[layer.name], quantized.get(layer.name, {}), read)
            for layer in model.layers
            if inspection.parameters(layer)
        ),
    )


def _layer_cost(layer, nodes, quantized, read) -> LayerCost:
    inner = inspection.wrapped_layer(layer)
    kernels = layer_registry.kernels(inner)
    # By identity: a composite layer can have several weights of one name.
    weights = inspection.parameters(layer)
    bits = {t.latent.ref(): _counted(t.bits) for t in quantized.values()}
    variables = [
        quantized[kernel.attribute].latent
        if kernel.attribute in quantized
        else getattr(inner, kernel.attribute)
        for kernel in kernels
    ]
    weight_bits = tuple(bits.get(v.ref(), FLOAT_BITS) for v in variables)
    activation_bits = _activation_bits(inner, kernels, read.get(layer.name, []))
    macs = [
        _sum(_macs(inner, variable.shape, node) for node in nodes)
        for variable in variables
    ]
    bops = [
        None if m is None else m * w * a
        for m, w, a in zip(macs, weight_bits, activation_bits, strict=True)
    ]
    return LayerCost(
        name=layer.name,
        kind=type(inner).__name__,
        output_shape=tuple(graph.outputs_of(nodes[0])[0].shape[1:]),
        parameters=sum(_size(v) for v in weights),
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_bytes=sum(
            math.ceil(_size(v) * bits.get(v.ref(), FLOAT_BITS) / 8) for v in weights
        ),
        macs=None if layer_registry.is_unsupported(inner) else _sum(macs),
        bops=None if layer_registry.is_unsupported(inner) else _sum(bops),
    )


def _activation_bits(layer, kernels, sources) -> tuple[int, ...]:
    bits = max((_counted(s.bits) if s else FLOAT_BITS for s in sources), default=None)
    if not kernels or bits is None:
        return ()
    # A separable convolution does not quantize between its two kernels.
    behind = FLOAT_BITS if isinstance(layer, _SEPARABLE) else bits
    return (bits,) + (behind,) * (len(kernels) - 1)


def _counted(bits: int) -> int:
    return bits if bits <= 8 else FLOAT_BITS


def _size(variable) -> int:
    return math.prod(variable.shape)


def _macs(layer, kernel_shape, node) -> int | None:
    """Multiply-accumulates of one kernel in one call, for one example."""
    # A transposed convolution applies its kernel at each position of its input, other
    # layers at each position of their output.
    shape = (
        node.keras_inputs[0].shape
        if isinstance(layer, _TRANSPOSED)
        else graph.outputs_of(node)[0].shape
    )
    channels_first = getattr(layer, "data_format", None) == "channels_first"
    positions = shape[2:] if channels_first else shape[1:-1]
    if None in positions:
        return None
    return math.prod(kernel_shape) * math.prod(positions)


def _sum(values) -> int | None:
    values = list(values)
    return None if None in values else sum(values)


def _table(total: Cost) -> rich.table.Table:
    share = total.weight_bytes / max(total.float_bytes, 1)
    table = rich.table.Table(
        title=rich.text.Text(total.name),
        box=rich.box.SIMPLE_HEAD,
        show_footer=True,
        caption=f"{share:.3f} of the {total.float_bytes:,} bytes at float32",
    )
    sums = (total.weight_bytes, total.macs, total.bops)
    footers = ("total", "", "", _number(total.parameters), "", "", *map(_number, sums))
    for index, (column, footer) in enumerate(zip(_COLUMNS, footers, strict=True)):
        table.add_column(
            column,
            footer=footer,
            justify="left" if index < _TEXT_COLUMNS else "right",
            no_wrap=True,
        )
    for layer in total.layers:
        # Text, not str: a name such as net[v1] is not markup.
        table.add_row(*map(rich.text.Text, _row(layer)))
    return table


def _row(layer: LayerCost) -> tuple[str, ...]:
    has_kernels = bool(layer.weight_bits)
    return (
        layer.name,
        layer.kind,
        " x ".join("?" if size is None else str(size) for size in layer.output_shape),
        _number(layer.parameters),
        _bits(layer.weight_bits),
        _bits(layer.activation_bits),
        _number(layer.weight_bytes),
        _number(layer.macs) if has_kernels else "",
        _number(layer.bops) if has_kernels else "",
    )


def _bits(bits: tuple[int, ...]) -> str:
    distinct = bits[:1] if len(set(bits)) == 1 else bits
    return "/".join("float" if b > 8 else str(b) for b in distinct)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
