"""Layers of a network that cannot be exported at all, or not for a target."""

import dataclasses
from collections.abc import Iterator

from tf_lowbit import quantizers
from tf_lowbit.compat import is_keras3, keras
from tf_lowbit.export import layer_table, targets
from tf_lowbit.export.integer import twin
from tf_lowbit.export.lowering import elementwise, forms, stock_layers
from tf_lowbit.export.lowering.builder import edges_of
from tf_lowbit.export.targets import Target
from tf_lowbit.export.types import ExportError, Problem, refusal
from tf_lowbit.network import graph, inspection, layer_registry, separable
from tf_lowbit.network.keras3 import from_keras3

_layers = keras.layers
_POOLS = (_layers.AveragePooling1D, _layers.AveragePooling2D)
_IN_FLOAT = (
    layer_table.ACTIVATION,
    layer_table.DOT,
    layer_table.FLOATS,
    layer_table.MULTIPLY,
    layer_table.PARTS,
)


@dataclasses.dataclass(frozen=True)
class Check:
    """The layers of a network that cannot be exported for a target.

    Attributes:
        problems: One for each such layer, in the graph's order.
    """

    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self):
        if self.ok:
            return "Every layer can be exported."
        lines = [f"{len(self.problems)} layers cannot be exported:"]
        for p in self.problems:
            lines.append(f"  {p.layer} ({p.type}): {p.reason}; it is {p.received}.")
            lines.append(f"    Remedy: {p.remedy}.")
        return "\n".join(lines)


def check(model: keras.Model, target: str | Target = "xnnpack") -> Check:
    """Lists every layer of a network that `to_tflite` or `to_qonnx` would refuse.

    Call it on the float network before training: most problems are a layer's type or
    setting. Call it again after `quantize`: it then checks the bits of the rules, too.

    Args:
        model: Built Sequential or Functional model of `tf_keras` or Keras 3, float or
            quantized; or a `LowBitTrainer`, for its students. Nested models are
            included.
        target: As in `to_tflite`; or "qonnx" for `to_qonnx`.

    Returns:
        The problems. If there are none, the layers' types and settings can be exported,
        and the target has the operators. Only `to_tflite` and `to_qonnx` check the
        present bits, missing ranges, and what depends on the data.

    Raises:
        ValueError: If the model is not built, or is subclassed, or the target does not
            exist; or if `from_keras3` cannot convert it.
    """
    target = targets.find(target)
    found: dict[str, Problem] = {}
    if is_keras3(model):
        model = from_keras3(model)
    for network in inspection.networks(model):
        is_graph = isinstance(network, keras.Model) and network._is_graph_network
        if not is_graph:
            raise ValueError(
                "model must be a built Sequential or Functional model. "
                f"Received: {type(network).__name__} {getattr(network, 'name', '')!r}"
            )
        network = graph.flatten(network)
        if not any(inspection.quantized_tensors(network)):
            network, _ = separable.split_in_graph(network)  # As `quantize` does.
        for problem in (
            *problems(network, target),
            *target_problems(network, target),
            *_bit_problems(network, target),
        ):
            found.setdefault(problem.layer, problem)
    return Check(tuple(found.values()))


def require_exportable(network: keras.Model, target: Target) -> None:
    """Raises `ExportError` for the first quantizer or layer that a target refuses.

    The network is functional, without nested models.
    """
    for tensor in inspection.quantized_tensors(network):
        if problem := bit_problem(tensor, tensor.bits, target):
            raise ExportError(problem)
    for problem in (*problems(network, target), *target_problems(network, target)):
        raise ExportError(problem)


def problems(
    network: keras.Model, target: Target = targets.TARGETS["xnnpack"]
) -> Iterator[Problem]:
    """Yields the `Problem` of each input, node and quantizer that cannot be exported.

    Args:
        network: Functional model without nested models.
        target: Target of the file, which is one of TFLite or of QONNX.
    """
    is_qonnx = target.interpreter == targets.QONNX
    tensors = [] if is_qonnx else inspection.quantized_tensors(network)
    for requirement, subjects in (
        (_require_floats, network.inputs),
        (_require_in_qonnx if is_qonnx else _require_in_tflite, graph.calls(network)),
        (_require_own_activation, network.layers),
        (_require_zero, tensors),
    ):
        for subject in subjects:
            try:
                requirement(subject)
            except ExportError as error:
                yield error.problem


def target_problems(network: keras.Model, target: Target) -> Iterator[Problem]:
    """Yields the `Problem` of each layer that can be exported, but not for a target.

    The network is functional, without nested models. `to_tflite` and `verify` check
    what depends on data or on neighbouring layers.
    """
    if not target.open_sizes:
        for node in graph.nodes(network):
            shapes = [list(t.shape) for t in graph.outputs_of(node) if _is_open(t)]
            # What reads it is open, too.
            if shapes and not any(map(_is_open, node.keras_inputs)):
                yield refusal(
                    inspection.wrapped_layer(node.layer),
                    f"target={target.name!r} takes tensors of fixed sizes",
                    "build the network with a fixed input shape",
                    f"of {shapes[0]}",
                ).problem
    in_float = set() if target.floats else _float_layers(network)
    for node in graph.calls(network):
        try:
            form = forms.form(node)
            operators = _operators(node, form, target)
        except ExportError:
            continue  # `problems` yields it.
        layer = inspection.wrapped_layer(node.layer)
        missing = [name for name in operators if not target.has(name)]
        if missing:
            yield refusal(
                layer,
                f"target={target.name!r} supports only some operators",
                "use another layer or target",
                f"of type {type(layer).__name__}, which needs {', '.join(missing)}",
            ).problem
        elif not target.floats and (
            form in _IN_FLOAT
            or node.layer.name in in_float
            or (type(layer) in _POOLS and layer.padding != "valid")
            or _own_operators(layer)
        ):
            yield refusal(
                layer,
                f"target={target.name!r} computes in int8 only",
                "quantize the layer by a rule, use a layer with an integer form in the "
                "table of docs/how_to/deployment.md, or end the network in front of it",
                f"of type {type(layer).__name__}, which computes in float",
            ).problem


def _is_open(tensor) -> bool:
    return None in tensor.shape[1:]


def _operators(node, form, target) -> tuple[str, ...]:
    """TFLite operators that a node always needs in a file for a target."""
    layer = inspection.wrapped_layer(stock_layers.layer_of(node))
    row = layer_table.row_of(layer)
    own = () if row is None else row.operators
    if form == layer_table.LINEAR:
        is_cells = row.kind == twin.TRANSPOSED and max(layer.strides) > 1
        cells = ["DEPTH_TO_SPACE"] * is_cells
        return (*own, *cells, *_own_operators(layer))
    if form == layer_table.ACTIVATION:
        return elementwise.OPERATORS.get(elementwise.activation(node), ())
    if form == layer_table.INTERPOLATE:
        # Needed for codes. Floats use one operator, RESIZE_BILINEAR.
        parts = ("RESIZE_NEAREST_NEIGHBOR", "MIRROR_PAD", "DEPTHWISE_CONV_2D")
        return () if target.floats else parts
    if form in (layer_table.ADD, layer_table.MULTIPLY):
        join = _layers.Add if form == layer_table.ADD else _layers.Multiply
        return layer_table.TABLE[join].operators
    return own


def _own_operators(layer) -> tuple[str, ...]:
    """Operators of a weight layer's own activation."""
    if not forms.has_own_activation(layer):
        return ()
    own = layer.activation
    if isinstance(own, _layers.Layer):
        row = layer_table.row_of(own)
        return () if row is None else row.operators
    name = elementwise.function_name(own)
    # A ReLU is fused into the layer.
    return () if name in ("relu", "relu6") else elementwise.OPERATORS.get(name, ())


def _float_layers(network) -> set[str]:
    """Names of the weight layers that stay float: without a rule, not first or last."""
    quantized = {
        tensor.layer.name
        for tensor in inspection.quantized_tensors(network)
        if tensor.role == quantizers.WEIGHT
    }
    if not quantized:
        return set()
    first, last = edges_of(network)
    weighted = {
        layer.name
        for layer in network.layers
        if layer_registry.kernels(inspection.wrapped_layer(layer))
    }
    return weighted - quantized - first - last


def _bit_problems(network, target):
    """Yields the `Problem` of each quantizer whose rule has bits a target lacks."""
    for tensor in inspection.quantized_tensors(network):
        problem = bit_problem(tensor, tensor.quantizer.bits, target)
        if problem is not None:
            yield problem


def bit_problem(
    tensor: inspection.QuantizedTensor, bits: int, target: Target
) -> Problem | None:
    """The `Problem` of a quantizer whose bits the target does not support, or None.

    Args:
        tensor: The quantized tensor.
        bits: The bits of its rule, or its present bits.
        target: Target of the file.
    """
    is_weight = tensor.role == quantizers.WEIGHT
    allowed = target.weight_bits if is_weight else target.activation_bits
    if bits in allowed:
        return None
    what = "weights" if is_weight else "activations"
    return refusal(
        inspection.wrapped_layer(tensor.layer),
        f"target={target.name!r} takes {what} of {', '.join(map(str, allowed))} bits",
        "give it these by a rule, or by allocate_bits(..., target=...)",
        f"with its {tensor.attribute} at {bits} bits",
    ).problem


def _require_in_tflite(node) -> None:
    """Refuses a node that a TFLite file cannot compute."""
    forms.form(node)
    forms.require_transposed(node)


def _require_in_qonnx(node) -> None:
    """Refuses a node that a QONNX file cannot compute."""
    form = forms.form(node)
    shapes = [tuple(tensor.shape) for tensor in node.keras_inputs]
    is_join = form in (layer_table.ADD, layer_table.MULTIPLY)
    if is_join and len(set(map(len, shapes))) > 1:
        raise refusal(
            inspection.wrapped_layer(node.layer),
            "Joined tensors must have the same number of axes",
            "put a Reshape in front",
            f"of {shapes}",
        )


def _require_floats(tensor) -> None:
    """Refuses an input that is not float."""
    if not tensor.dtype.is_floating:
        raise refusal(
            tensor._keras_history.layer,
            "Inputs must be floats",
            "make the input float32, and export with input_type='uint8' if the file "
            "takes pixels",
            f"of {tensor.dtype.name}",
        )


def _require_own_activation(layer) -> None:
    """Refuses a weight layer with an activation that cannot be exported."""
    own = inspection.wrapped_layer(layer)
    is_linear = layer_table.form_of(own) == layer_table.LINEAR
    if not (is_linear and forms.has_own_activation(layer)):
        return
    if isinstance(own.activation, _layers.Layer):
        relu = layer_registry.relu_kind(own.activation)
        known = layer_table.form_of(own.activation) or relu
    else:
        known = elementwise.function_name(own.activation)
    if not known:
        raise elementwise.unknown_activation(own)


def _require_zero(tensor) -> None:
    """Refuses signed 1-bit activations, which have no zero."""
    is_activation = tensor.role == quantizers.ACTIVATION
    if is_activation and tensor.quantizer.signed and tensor.bits == 1:
        raise refusal(
            tensor.layer,
            "A signed activation needs 2 bits or more: at 1 bit its levels -s and +s "
            "include no zero, which padding needs",
            "give it 2 bits or more, or put a ReLU in front",
            "at 1 bit",
        )
