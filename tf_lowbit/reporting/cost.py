"""Parameters, bytes, MACs and bit operations of a network, layer by layer."""

import dataclasses
import math

from tf_lowbit import inspection, keras3
from tf_lowbit.compat import is_keras3, keras
from tf_lowbit.quantizers import WEIGHT
from tf_lowbit.scheme import graph, registry

FLOAT_BITS = 32

_TRANSPOSED = (keras.layers.Conv2DTranspose,)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The cost of one layer.

    Attributes:
        name: the layer's name.
        kind: its class, such as "Conv2D".
        output_shape: of its first call, without the batch; None for an open size.
        parameters: number of weights that inference needs.
        weight_bits: bits of its kernels, in their order; 32 is float. Empty for a layer
            without kernels.
        activation_bits: bits of what it reads, likewise one for each kernel; the widest
            where it reads several tensors.
        weight_bytes: size of its parameters: kernels at `weight_bits`, padded to whole
            bytes, everything else (bias, normalisation, steps) at float32.
        macs: multiply-accumulates for one example, over all its calls; None where a
            size is open or the layer's arithmetic is unknown (LSTM, attention).
        bops: bit operations, `macs * weight_bits * activation_bits`; None likewise.
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
class Cost:
    """The cost of a network.

    Attributes:
        name: the model's name.
        layers: the layers that have parameters.
    """

    name: str
    layers: tuple[LayerCost, ...]

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters at their bits."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters at float32."""
        return self.parameters * FLOAT_BITS // 8

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates for one example; None where one is unknown."""
        return _sum(layer.macs for layer in self.layers)

    @property
    def bops(self) -> int | None:
        """Bit operations for one example; None where one is unknown."""
        return _sum(layer.bops for layer in self.layers)

    def as_dict(self) -> dict:
        """The same as JSON-ready data, totals included."""
        totals = ("parameters", "weight_bytes", "float_bytes", "macs", "bops")
        return {
            "name": self.name,
            **{total: getattr(self, total) for total in totals},
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }


def cost(model: keras.Model) -> Cost:
    """Counts what a network costs at the bits that its quantizers have now.

    "Not rounded" (16 and 32 bits) counts as float32. One MAC of a b_w-bit weight and a
    b_a-bit activation counts as `b_w * b_a` bit operations (BOPs), the common
    definition without the accumulator's term.

    Args:
        model: functional or sequential model, quantized or float; or a
            `LowBitTrainer` of one student.

    Returns:
        The cost.

    Raises:
        ValueError: if the model is subclassed or not built, or a trainer has several
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
    kernels = registry.kernels(inner)
    # By identity: a composite layer may have several weights of one name.
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
        macs=None if registry.is_unsupported(inner) else _sum(macs),
        bops=None if registry.is_unsupported(inner) else _sum(bops),
    )


def _activation_bits(layer, kernels, sources) -> tuple[int, ...]:
    bits = max((_counted(s.bits) if s else FLOAT_BITS for s in sources), default=None)
    if not kernels or bits is None:
        return ()
    # Between the two kernels of a separable convolution nothing is quantized.
    behind = FLOAT_BITS if isinstance(layer, _SEPARABLE) else bits
    return (bits,) + (behind,) * (len(kernels) - 1)


def _counted(bits: int) -> int:
    return bits if bits <= 8 else FLOAT_BITS


def _size(variable) -> int:
    return math.prod(variable.shape)


def _macs(layer, kernel_shape, node) -> int | None:
    """Multiply-accumulates of one kernel in one call, for one example."""
    # A transposed convolution applies its kernel at each position of its input,
    # everything else at each position of its output.
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
