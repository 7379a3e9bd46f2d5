"""Which layers have a form in a file, and what each becomes."""

import dataclasses
import inspect

import numpy as np

from tf_lowbit import inspection, quantizers
from tf_lowbit.compat import keras
from tf_lowbit.export import elementwise, stock, twin
from tf_lowbit.export.linear import ExportError, Problem, refusal
from tf_lowbit.scheme import graph, passing, registry
from tf_lowbit.scheme.wrapper import LowBitWrapper

_layers = keras.layers
# What layers become in a twin.
ADD = "add"
ACTIVATION = "activation"
ALIAS = "alias"
AVERAGE_POOL = "average pool"
CODES = "codes"
CONCATENATE = "concatenate"
FLOATS = "floats"
GLOBAL_POOL = "global pool"
INTERPOLATE = "interpolate"
LINEAR = "linear"
MULTIPLY = "multiply"
RELU = "relu"
SCALE = "scale"

# Layers that only move or select codes.
_CODE_KEEPING = (
    _layers.Cropping1D,
    _layers.Cropping2D,
    _layers.Flatten,
    _layers.GlobalMaxPooling1D,
    _layers.GlobalMaxPooling2D,
    _layers.MaxPooling1D,
    _layers.MaxPooling2D,
    _layers.Permute,
    _layers.Reshape,
    _layers.UpSampling1D,
    _layers.UpSampling2D,
    _layers.ZeroPadding1D,
    _layers.ZeroPadding2D,
)
# Layers that compute with floats, as they are.
_FLOAT_LAYERS = (_layers.LayerNormalization, _layers.LeakyReLU, _layers.PReLU)
_FORMS = {
    **dict.fromkeys(_CODE_KEEPING, CODES),
    **dict.fromkeys(_FLOAT_LAYERS, FLOATS),
    _layers.AveragePooling1D: AVERAGE_POOL,
    _layers.AveragePooling2D: AVERAGE_POOL,
    _layers.Concatenate: CONCATENATE,
    _layers.GlobalAveragePooling1D: GLOBAL_POOL,
    _layers.GlobalAveragePooling2D: GLOBAL_POOL,
}
KINDS = {
    _layers.Conv1D: twin.CONV,
    _layers.Conv2D: twin.CONV,
    _layers.Conv2DTranspose: twin.TRANSPOSED,
    _layers.Dense: twin.DENSE,
    _layers.DepthwiseConv1D: twin.DEPTHWISE,
    _layers.DepthwiseConv2D: twin.DEPTHWISE,
}
# Layers that write a size, which must therefore be known.
_FIXED_SIZE = (
    _layers.AveragePooling1D,
    _layers.AveragePooling2D,
    _layers.Conv1D,
    _layers.Cropping1D,
    _layers.Cropping2D,
    _layers.DepthwiseConv1D,
    _layers.Flatten,
    _layers.GlobalMaxPooling1D,
    _layers.GlobalMaxPooling2D,
    _layers.MaxPooling1D,
    _layers.Reshape,
    _layers.UpSampling1D,
    _layers.UpSampling2D,
)
# What a network with layers of one type is to do about them.
_REMEDIES = {
    _layers.SeparableConv2D: "split it before quantizing: tf_lowbit.split_separable",
    _layers.SeparableConv1D: "split it before quantizing: tf_lowbit.split_separable",
    _layers.Conv3D: "take Conv2D over images of the depth's slices as channels",
    _layers.Conv1DTranspose: "take UpSampling1D and a Conv1D behind it, and train them",
    _layers.Subtract: "write it as x - y of tensors, or as Add of x and -1.0 * y",
    _layers.Average: "write it as Add and a Rescaling behind it",
    _layers.ELU: "take ReLU, LeakyReLU or Activation('swish'), and train on",
    _layers.Resizing: "resize by a whole factor, or resize the images in the data",
    _layers.CenterCrop: "take Cropping2D",
}
_ELSE = (
    "end the network in front of it and compute the rest outside, or train the network "
    "with a layer of docs/how_to/deployment.md's table in its place"
)


@dataclasses.dataclass(frozen=True)
class Check:
    """The layers of a network that have no form in a file.

    Attributes:
        problems: one for each such layer, in the graph's order.
    """

    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether there is none."""
        return not self.problems

    def __str__(self):
        if self.ok:
            return "Every layer has a form in a file."
        lines = [f"{len(self.problems)} layers have no form in a file:"]
        for p in self.problems:
            lines.append(f"  {p.layer} ({p.type}): {p.reason}; it is {p.received}.")
            lines.append(f"    Remedy: {p.remedy}.")
        return "\n".join(lines)


def check(model) -> Check:
    """Lists every layer of a network that `to_tflite` would refuse.

    Call it on the float network before it is trained: most that stops an export is
    a layer's type or setting.

    Args:
        model: built Sequential or Functional model, float or quantized; or a
            `LowBitTrainer`, for its students. Models among its layers are looked into.

    Returns:
        The problems. None in it means that the layers' types and settings have a form;
        the bits that quantizers are at and missing ranges are looked at by `to_tflite`.

    Raises:
        ValueError: if the model is not built, or subclassed.
    """
    found: dict[str, Problem] = {}
    for network in inspection.networks(model):
        is_graph = isinstance(network, keras.Model) and network._is_graph_network
        if not is_graph:
            raise ValueError(
                "model must be a built Sequential or Functional model of tf_keras. "
                f"Received: {type(network).__name__} {getattr(network, 'name', '')!r}"
            )
        for problem in problems(graph.flatten(network)):
            found.setdefault(problem.layer, problem)
    return Check(tuple(found.values()))


def problems(network):
    """Yields the `Problem` of each input, call and quantizer without a form in a file.

    Args:
        network: functional model without models among its layers.
    """
    for requirement, things in (
        (_require_floats, network.inputs),
        (form, graph.calls(network)),
        (_require_own_activation, network.layers),
        (_require_zero, inspection.quantized_tensors(network)),
    ):
        for thing in things:
            try:
                requirement(thing)
            except ExportError as error:
                yield error.problem


def form(node) -> str:
    """What a node of a network becomes, one of this module's constants.

    Raises:
        ExportError: with the `Problem` of a layer that has no form in a file.
    """
    layer = stock.layer_of(node)
    if len(graph.outputs_of(node)) != 1:
        raise refusal(layer, "Every layer must have one output", _ELSE)
    require_channels_last(layer)
    require_inference(node, layer)
    _require_fixed_size(node, layer)
    if registry.kernels(layer):
        _require_linear(layer)
        return LINEAR
    if inspection.wrapped_layer(node.layer) is not node.layer:
        return ALIAS  # A quantizer's wrapper; it holds an identity.
    if elementwise.scale(node) is not None:
        return SCALE
    if registry.relu_kind(layer):
        return RELU
    if passing.is_identity(node):
        return ALIAS
    joined = elementwise.join(node)
    if joined is not None:
        return ADD if joined is np.add else MULTIPLY
    interpolation = getattr(layer, "interpolation", "nearest")
    if interpolation not in ("nearest", "bilinear"):
        raise refusal(
            layer,
            "Upsampling must be by interpolation='nearest' or 'bilinear'",
            "train the network with one of these",
            f"with {interpolation!r}",
        )
    if type(layer) is _layers.UpSampling2D and interpolation == "bilinear":
        return INTERPOLATE
    if isinstance(layer, _layers.LayerNormalization):
        elementwise.require_last(layer, len(node.output_shapes))
    if type(layer) in _FORMS:
        return _FORMS[type(layer)]
    if elementwise.activation(node) is not None:
        return ACTIVATION
    raise refusal(layer, "Every layer must have a form in the file", _remedy(layer))


def moves_codes(node) -> bool:
    """Whether a node puts out nothing but values that it reads, and zeros."""
    return form(node) == CODES or passing.is_identity(node)


def _remedy(layer) -> str:
    if type(layer) is _layers.ReLU:
        return "take ReLU or ReLU6 without slope and threshold, and train on"
    if getattr(layer, "symbol", None):
        return (
            f"write what {layer.symbol} does as a layer of "
            "docs/how_to/deployment.md's table, or compute it outside of the network"
        )
    return _REMEDIES.get(type(layer), _ELSE)


def require_channels_last(layer) -> None:
    """Refuses a layer that takes channels first.

    Raises:
        ExportError: naming it.
    """
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise refusal(
            layer,
            "Layers must have data_format='channels_last'",
            "build the network with it; kernels are the same in both",
            f"with {layer.data_format!r}",
        )


def require_inference(node, layer) -> None:
    """Refuses a layer that is called to do at inference what it does in training."""
    is_frozen_norm = isinstance(layer, registry.BATCH_NORMS) and not layer.trainable
    if not _is_training(node, layer) or is_frozen_norm:
        return
    remedy = "call it without `training`"
    if isinstance(layer, registry.BATCH_NORMS):
        remedy += (
            ", so that it uses its moving averages, and measure these by "
            "tf_lowbit.recalibrate_batch_norm"
        )
    raise refusal(
        layer,
        "Layers must be called as at inference, for a file has no training",
        remedy,
        f"of type {type(layer).__name__}, called with training=True",
    )


def _is_training(node, layer) -> bool:
    """Whether a call in a graph says training=True."""
    parameters = list(inspect.signature(layer.call).parameters)
    if "training" not in parameters:
        return False
    given = node.call_kwargs.get("training")
    position = parameters.index("training")
    if given is None and len(node.call_args) > position:
        given = node.call_args[position]
    return given is not None and bool(given)


def _require_fixed_size(node, layer) -> None:
    shapes = [tuple(tensor.shape) for tensor in node.keras_inputs]
    if type(layer) in _FIXED_SIZE and any(None in shape[1:] for shape in shapes):
        raise refusal(
            layer,
            "This layer must read a fixed size, and one open size, the batch",
            "build the network with a fixed image size, keras.Input((height, width, "
            "channels)), give it these weights by set_weights, and quantize that",
            f"of type {type(layer).__name__}, which reads {shapes}",
        )


def _require_linear(layer) -> None:
    """Refuses weight layers that the file's operators cannot compute."""
    kind = f"of type {type(layer).__name__}"
    if type(layer) not in KINDS:
        raise refusal(
            layer,
            "Weight layers must be Dense, Conv1D, Conv2D, Conv2DTranspose, "
            "DepthwiseConv1D or DepthwiseConv2D",
            _remedy(layer),
            kind,
        )
    if KINDS[type(layer)] != twin.TRANSPOSED:
        return
    if len(set(layer.strides)) > 1 or set(layer.dilation_rate) != {1}:
        raise refusal(
            layer,
            "Transposed convolutions must have one stride for height and width, and no "
            "dilation",
            "train the network with such a one",
            f"with strides={layer.strides} and dilation_rate={layer.dilation_rate}",
        )


def _require_floats(tensor) -> None:
    """Refuses an input that is not of floats."""
    if not tensor.dtype.is_floating:
        raise refusal(
            tensor._keras_history.layer,
            "Inputs must be floats",
            "make the input float32, and export with input_type='uint8' if the file is "
            "to take pixels",
            f"of {tensor.dtype.name}",
        )


def _require_own_activation(layer) -> None:
    """Refuses a weight layer whose own activation has no form as a layer behind it."""
    own = inspection.wrapped_layer(layer)
    if not _has_own_activation(layer) or type(own) not in KINDS:
        return
    if isinstance(own.activation, _layers.Layer):
        is_known = type(own.activation) in _FORMS or registry.relu_kind(own.activation)
    else:
        is_known = elementwise.is_known(own.activation)
    if not is_known:
        raise elementwise.unknown_activation(own)


def _require_zero(tensor) -> None:
    """Refuses signed activations of one bit."""
    is_activation = tensor.role == quantizers.ACTIVATION
    if is_activation and tensor.quantizer.signed and tensor.bits == 1:
        raise refusal(
            tensor.layer,
            "A signed activation needs 2 bits or more: at one bit its levels -s and +s "
            "have no zero, which padding needs",
            "give it 2 bits or more, or put a ReLU in front",
            "at 1 bit",
        )


def split_activations(model):
    """A network in which each weight layer's own activation is a layer behind it.

    What the layer computes before its activation is then a tensor like any other, with
    a measured range of its own.

    Args:
        model: functional model, quantized or not; it is not changed.

    Returns:
        A copy with weights and the names of the outputs: `conv` is followed by
        `conv_activation`. The given model where there is nothing to split.
    """
    owners = {layer.name for layer in model.layers if _has_own_activation(layer)}
    if not owners:
        return model
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
        outputs = copies[name](*args, **kwargs)
        return behind[name](outputs) if name in behind else outputs

    result = graph.rebuild(model, call)
    for layer in model.layers:
        _copy_values(layer, copies[layer.name])
        graph.take_flags(layer, copies[layer.name])
    return result


def _has_own_activation(layer) -> bool:
    own = inspection.wrapped_layer(layer)
    activation = getattr(own, "activation", None)
    is_linear = activation is None or activation is keras.activations.linear
    return bool(registry.kernels(own)) and not is_linear


def _as_layer(activation, name, policy):
    if isinstance(activation, _layers.Layer):
        return graph.copy_layer(activation, name=name)
    return _layers.Activation(activation, name=name, dtype=policy)


def _copy(layer):
    if inspection.wrapped_layer(layer) is layer or isinstance(layer, LowBitWrapper):
        return graph.copy_layer(layer)
    config = layer.get_config()
    # TF-MOT's own wrapper: built before it, the layer has its weights in another order.
    config["layer"].pop("build_config", None)
    return LowBitWrapper.from_config(config)


def _copy_values(source, target) -> None:
    if not isinstance(source, LowBitWrapper):
        graph.set_weights(source, target)
        return
    values: dict = {}
    source.save_own_variables(values)  # By name: the order is that of the building.
    target.load_own_variables(values)
