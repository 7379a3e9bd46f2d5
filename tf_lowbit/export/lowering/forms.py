"""The form of each layer: how it is lowered, or why it cannot be exported."""

import inspect

import numpy as np

from tf_lowbit.compat import KerasTensor, Node, keras
from tf_lowbit.export import layer_table
from tf_lowbit.export.integer import twin
from tf_lowbit.export.layer_table import (
    ACTIVATION,
    ADD,
    ALIAS,
    CODES,
    DOT,
    LINEAR,
    MULTIPLY,
    PARTS,
    RELU,
    SCALE,
)
from tf_lowbit.export.lowering import attention, elementwise, recurrent, stock_layers
from tf_lowbit.export.types import refusal
from tf_lowbit.network import graph, inspection, layer_registry, passthrough
from tf_lowbit.scheme.wrapper import LowBitWrapper

_layers = keras.layers
_SPLIT = "quantize the float network again: tf_lowbit.quantize splits it now"
_SUBTRACT = "write it as x + (-1.0 * y), which computes the same"
_RESIZE = (
    "make images larger by whole factors, by interpolation 'nearest' or 'bilinear', "
    "and smaller by strides or pooling; or resize them in the data"
)
_ARGMAX = (
    "take the argmax over the last axis at the end of the network, or end the network "
    "in front of it"
)
_FUNCTION_REMEDIES = {
    "image.resize": _RESIZE,
    "math.argmax": _ARGMAX,
    "math.subtract": _SUBTRACT,
}
_REMEDIES = {
    _layers.SeparableConv2D: _SPLIT,
    _layers.SeparableConv1D: _SPLIT,
    _layers.Conv3D: "use Conv2D, with the slices of the depth as channels",
    _layers.Conv1DTranspose: "use UpSampling1D and a Conv1D, and train them",
    _layers.Subtract: _SUBTRACT,
    _layers.Average: "write it as Add and a Rescaling behind it",
    _layers.ELU: "use ReLU, LeakyReLU or Activation('swish'), and continue training",
    _layers.Resizing: _RESIZE,
    _layers.CenterCrop: "use Cropping2D",
    _layers.Attention: "write it as Dot(axes=2), Softmax and Dot(axes=(2, 1))",
    _layers.Bidirectional: "use two layers, one of them with go_backwards=True, and "
    "join their outputs by Concatenate",
}
_ELSE = (
    "end the network in front of it and compute the rest outside, or replace it by a "
    "layer in the table of docs/how_to/deployment.md and train the network"
)


def form(node: Node) -> str:
    """The form of a node, one of `layer_table`'s: it decides how the node is lowered.

    TFLite has one more rule, `require_transposed`.

    Raises:
        ExportError: With the `Problem` of a layer that cannot be exported.
    """
    layer = stock_layers.layer_of(node)
    if len(graph.outputs_of(node)) != 1:
        raise refusal(layer, "Every layer must have one output", _ELSE)
    require_channels_last(layer)
    require_inference(node, layer)
    _require_fixed_size(node, layer)
    _require_no_classes(node, layer)
    if layer_registry.kernels(layer):
        _require_linear(layer)
        return LINEAR
    if inspection.wrapped_layer(node.layer) is not node.layer:
        return ALIAS  # A quantizer's wrapper; it holds an identity.
    if elementwise.scale(node) is not None:
        return SCALE
    if layer_registry.relu_kind(layer):
        return RELU
    if passthrough.is_identity(node):
        return ALIAS
    joined = elementwise.join(node)
    if joined is not None:
        return ADD if joined is np.add else MULTIPLY
    interpolation = getattr(layer, "interpolation", "nearest")
    if interpolation not in ("nearest", "bilinear"):
        raise refusal(
            layer,
            "Upsampling must be by interpolation='nearest' or 'bilinear'",
            "train the network with one of them",
            f"with {interpolation!r}",
        )
    if isinstance(layer, _layers.LayerNormalization):
        elementwise.require_last(layer, len(node.output_shapes))
    found = layer_table.form_of(layer)
    if found == DOT:
        _require_matrices(node, layer)
    if found == PARTS and isinstance(layer, _layers.MultiHeadAttention):
        attention.require_plain(node, layer)
    elif found == PARTS:
        recurrent.require_plain(layer, len(node.keras_inputs))
    if found is not None:
        return found
    if elementwise.activation(node) is not None:
        return ACTIVATION
    raise refusal(layer, "Every layer must be exportable", _remedy(layer))


def moves_codes(node: Node) -> bool:
    """Whether a node outputs only values of its input, and zeros."""
    return form(node) == CODES or passthrough.is_identity(node)


def _remedy(layer) -> str:
    if type(layer) is _layers.ReLU:
        return (
            "use ReLU() or ReLU(max_value=6), without slope and threshold, and "
            "continue training"
        )
    if getattr(layer, "symbol", None):
        return remedy(
            layer,
            f"replace {layer.symbol} by a layer in the table of "
            "docs/how_to/deployment.md, or compute it outside of the network",
        )
    return remedy(layer, _ELSE)


def remedy(layer: keras.layers.Layer, otherwise: str) -> str:
    """The remedy for a layer that cannot be exported; `otherwise` for other types."""
    found = _FUNCTION_REMEDIES.get(getattr(layer, "symbol", None))
    return found or _REMEDIES.get(type(layer), otherwise)


def require_channels_last(layer: keras.layers.Layer) -> None:
    """Raises `ExportError` for a layer with data_format='channels_first'."""
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise refusal(
            layer,
            "Layers must have data_format='channels_last'",
            "build the network with it; its kernels stay the same",
            f"with {layer.data_format!r}",
        )


def require_inference(node: Node, layer: keras.layers.Layer) -> None:
    """Raises `ExportError` for a layer that is called with training=True."""
    is_frozen_norm = (
        isinstance(layer, layer_registry.BATCH_NORMS) and not layer.trainable
    )
    if not _is_training(node, layer) or is_frozen_norm:
        return
    remedy = "call it without `training`"
    if isinstance(layer, layer_registry.BATCH_NORMS):
        remedy += (
            ", so that it uses its moving averages, and measure these by "
            "tf_lowbit.recalibrate_batch_norm"
        )
    raise refusal(
        layer,
        "Layers must be called in inference mode, because a file has no training mode",
        remedy,
        f"of type {type(layer).__name__}, called with training=True",
    )


def _is_training(node, layer) -> bool:
    parameters = list(inspect.signature(layer.call).parameters)
    if "training" not in parameters:
        return False
    given = node.call_kwargs.get("training")
    position = parameters.index("training")
    if given is None and len(node.call_args) > position:
        given = node.call_args[position]
    return bool(given)


def _require_fixed_size(node, layer) -> None:
    shapes = [tuple(tensor.shape) for tensor in node.keras_inputs]
    row = layer_table.row_of(layer)
    needs_size = row is not None and row.needs_size
    if needs_size and any(None in shape[1:] for shape in shapes):
        raise refusal(
            layer,
            "This layer must read tensors of fixed size, with one open size: the batch",
            "build the network with a fixed image size, keras.Input((height, width, "
            "channels)), give it these weights by set_weights, and quantize that",
            f"of type {type(layer).__name__}, which reads {shapes}",
        )


def _require_no_classes(node, layer) -> None:
    """Refuses a layer that reads class numbers: an argmax ends a network."""
    for tensor in node.keras_inputs:
        if passthrough.operation(graph.producer(tensor).layer) == "argmax":
            raise refusal(
                layer,
                "Layers must not read the class numbers of an argmax",
                "end the network in the argmax, and compute the rest outside",
                f"of type {type(layer).__name__}, which reads {tensor.dtype.name}",
            )


def dot_axes(layer: keras.layers.Dot) -> tuple[int, int]:
    """The axes of two series that a Dot sums over."""
    first, second = np.broadcast_to(layer.axes, 2).tolist()
    return first % 3, second % 3


def _require_matrices(node, layer) -> None:
    """Refuses a Dot that is not a matrix product of two series."""
    shapes = [tuple(tensor.shape) for tensor in node.keras_inputs]
    is_known = dot_axes(layer) in ((2, 2), (2, 1)) and not layer.normalize
    if not is_known or [len(shape) for shape in shapes] != [3, 3]:
        raise refusal(
            layer,
            "A Dot must be over series, (batch, steps, features), along axes=2 or "
            "axes=(2, 1)",
            "put Permute or Reshape layers in front, and do not set normalize",
            f"with axes={layer.axes} and normalize={layer.normalize} of {shapes}",
        )


def _require_linear(layer) -> None:
    """Refuses weight layers that the file's operators cannot compute."""
    if layer_table.form_of(layer) != LINEAR:
        raise refusal(
            layer,
            "Weight layers must be Dense, Conv1D, Conv2D, Conv2DTranspose, "
            "DepthwiseConv1D or DepthwiseConv2D",
            _remedy(layer),
        )


def require_transposed(node: Node) -> None:
    """Raises `ExportError` for a transposed convolution that TFLite cannot compute."""
    layer = stock_layers.layer_of(node)
    row = layer_table.row_of(layer)
    if row is None or row.kind != twin.TRANSPOSED:
        return
    if len(set(layer.strides)) > 1 or set(layer.dilation_rate) != {1}:
        raise refusal(
            layer,
            "Transposed convolutions must have one stride for height and width, and no "
            "dilation",
            "train the network with such a layer",
            f"with strides={layer.strides} and dilation_rate={layer.dilation_rate}",
        )


def as_layers(model: keras.Model) -> keras.Model:
    """Splits layers that compute several functions into layers with one form each.

    The own activation of a weight layer becomes a layer: `conv` is followed by
    `conv_activation`. The tensor between them then has a measured range, too.
    Recurrent layers and attention become stock layers, and an Add of many tensors
    becomes Adds of two.

    Args:
        model: Functional model, quantized or not; it is not changed.

    Returns:
        A copy with the same weights and output names, or the given model if there is
        nothing to split.
    """
    return split(model)[0]


def split(
    model: keras.Model,
) -> tuple[keras.Model, list[tuple[KerasTensor, KerasTensor]]]:
    """Splits layers as `as_layers`; returns its result and the tensors of both models.

    The second result pairs each tensor of the model with the one in the copy that
    stands for it. It is empty if there is nothing to split.
    """
    owners = {layer.name for layer in model.layers if has_own_activation(layer)}
    unrolled = {x.name for x in model.layers if layer_table.form_of(x) == PARTS}
    unrolled |= {
        node.layer.name
        for node in graph.calls(model)
        if type(node.layer) is _layers.Add and len(node.keras_inputs) > 2
    }
    ends = {layer.name for layer in model.layers} - unrolled
    if not owners and not unrolled:
        return model, []
    taken = {layer.name for layer in model.layers}
    copies, behind = {}, {}
    for layer in model.layers:
        copies[layer.name] = copy = _copy(layer)
        if layer.name in owners:
            own = inspection.wrapped_layer(copy)
            name = graph.free_name(f"{layer.name}_activation", taken)
            behind[layer.name] = _as_layer(own.activation, name, own.dtype_policy)
            own.activation = keras.activations.linear

    def call(node, args, kwargs):
        name = node.layer.name
        if name in unrolled:

            def free(part):
                return graph.free_name(f"{name}_{part}", taken)

            end = graph.free_name(name, ends)  # A layer may be called several times.
            if isinstance(node.layer, _layers.MultiHeadAttention):
                return attention.split(node.layer, args, kwargs, end, free)
            if isinstance(node.layer, _layers.Add):
                return _adds_of_two(node.layer, args[0], end, free)
            return recurrent.unroll(node.layer, args[0], end, free)
        outputs = graph.call_copy(copies[name], node, args, kwargs)
        return behind[name](outputs) if name in behind else outputs

    pairs = []

    def record(old, new):
        pairs.append((old, new))
        return new

    result = graph.rebuild(model, call, behind=record)
    for layer in model.layers:
        if layer.name not in unrolled:
            _copy_values(layer, copies[layer.name])
            graph.copy_flags(layer, copies[layer.name])
    return result, pairs


def _adds_of_two(layer, terms, name, free):
    """What an `Add` computes, from left to right."""
    total, *others = terms
    for count, term in enumerate(others, 1):
        own = name if count == len(others) else free("part")
        total = _layers.Add(name=own, dtype=layer.dtype_policy)([total, term])
    return total


def has_own_activation(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a weight layer with an activation of its own."""
    own = inspection.wrapped_layer(layer)
    activation = getattr(own, "activation", None)
    is_linear = activation is None or activation is keras.activations.linear
    return bool(layer_registry.kernels(own)) and not is_linear


def _as_layer(activation, name, policy):
    if isinstance(activation, _layers.Layer):
        return graph.copy_layer(activation, name=name)
    return _layers.Activation(activation, name=name, dtype=policy)


def _copy(layer):
    if inspection.wrapped_layer(layer) is layer or isinstance(layer, LowBitWrapper):
        return graph.copy_layer(layer)
    config = layer.get_config()
    # In TF-MOT's wrapper, building the layer first changes the order of its weights.
    config["layer"].pop("build_config", None)
    return LowBitWrapper.from_config(config)


def _copy_values(source, target) -> None:
    if not isinstance(source, LowBitWrapper):
        graph.set_weights(source, target)
        return
    values: dict = {}
    source.save_own_variables(values)  # By name: the order depends on the building.
    target.load_own_variables(values)
