"""Splits separable convolutions into two layers, so that both can be quantized."""

from tf_lowbit.compat import deep_graphs, keras
from tf_lowbit.network import graph

_layers = keras.layers
# Separable convolutions and their two parts.
_SPLIT = {
    _layers.SeparableConv1D: (_layers.DepthwiseConv1D, _layers.Conv1D),
    _layers.SeparableConv2D: (_layers.DepthwiseConv2D, _layers.Conv2D),
}
_PARTS = ("constraint", "initializer", "regularizer")
# Of the new layers' names, those in front of the pointwise convolution.
_IN_FRONT = ("padding", "depthwise")
# The settings of a separable convolution that each part takes.
_DEPTHWISE = (
    *("kernel_size", "strides", "padding", "depth_multiplier", "dilation_rate"),
    *(f"depthwise_{part}" for part in _PARTS),
)
_POINTWISE = (
    *("filters", "activation", "activity_regularizer", "use_bias"),
    *(f"bias_{part}" for part in _PARTS),
)


@deep_graphs()
def split_separable(model: keras.Model) -> keras.Model:
    """Replaces each separable convolution by a depthwise and a 1x1 convolution.

    A separable convolution does not round between its two kernels, so it has no integer
    form. Between the two new layers, `quantize` can put a quantizer. The float function
    stays the same, up to rounding.

    `quantize` splits by itself, under other names ("conv_depthwise" and "conv"). Call
    this function to see or train the parts in float.

    Args:
        model: Float Sequential or Functional model. It is not changed. Nested models
            are split too.

    Returns:
        A new model, not compiled, with copies of the weights. A layer "conv" that was
        split is a model "conv" of the layers "conv_depthwise" and "conv_pointwise",
        after a "conv_padding" if it is causal. Other layers keep their names.

    Raises:
        ValueError: If the model is not a built Sequential or Functional one.
    """
    is_graph = isinstance(model, keras.Model) and getattr(
        model, "_is_graph_network", False
    )
    if not is_graph or not model.built:
        raise ValueError(
            "model must be a built Sequential or Functional model of tf_keras. "
            f"Received: {type(model).__name__}"
        )
    made = keras.models.clone_model(model, clone_function=_copy)
    made.set_weights(model.get_weights())
    return made


def _copy(layer):
    """Returns a new layer without the weights, or the parts that replace it."""
    if isinstance(layer, keras.Model):
        return split_separable(layer)
    if type(layer) in _SPLIT:
        return _split(layer)
    return type(layer).from_config(layer.get_config())


def split_in_graph(
    model: keras.Model,
) -> tuple[keras.Model, dict[keras.layers.Layer, list[str]]]:
    """Splits the separable convolutions of a network, and keeps its layers' names.

    A layer "conv" becomes "conv_depthwise" and "conv", after a "conv_padding" if it is
    causal. The output of "conv" stays the same.

    Args:
        model: Float functional model without nested ones.

    Returns:
        A new model with copies of the weights, the given one if there is nothing to
        split; and the names of both convolutions of each layer that was split.
    """
    separable = [layer for layer in model.layers if type(layer) in _SPLIT]
    if not separable:
        return model, {}
    taken = {layer.name for layer in model.layers}
    parts = {}
    for layer in separable:
        padding, depthwise = (
            graph.free_name(f"{layer.name}_{part}", taken) for part in _IN_FRONT
        )
        parts[layer.name] = _parts(layer, padding, depthwise, layer.name)
    copies = {
        layer.name: graph.copy_layer(layer)
        for layer in model.layers
        if layer.name not in parts
    }

    def call(node, args, kwargs):
        name = node.layer.name
        if name not in parts:
            return graph.call_copy(copies[name], node, args, kwargs)
        (outputs,) = args
        for part in parts[name]:
            outputs = part(outputs)
        return outputs

    made = graph.rebuild(model, call)
    for layer in model.layers:
        if layer.name in copies:
            graph.set_weights(layer, copies[layer.name])
            graph.copy_flags(layer, copies[layer.name])
            continue
        depthwise, pointwise = parts[layer.name][-2:]
        depthwise.set_weights([layer.depthwise_kernel.numpy()])
        bias = [layer.bias.numpy()] if layer.use_bias else []
        pointwise.set_weights([layer.pointwise_kernel.numpy(), *bias])
    made.output_names[:] = model.output_names
    return made, {
        layer: [part.name for part in parts[layer.name][-2:]] for layer in separable
    }


def _split(layer) -> keras.Sequential:
    padding, depthwise, pointwise = (
        f"{layer.name}_{part}" for part in (*_IN_FRONT, "pointwise")
    )
    parts = _parts(layer, padding, depthwise, pointwise)
    return keras.Sequential(parts, name=layer.name)


def _parts(layer, padding, depthwise, pointwise) -> list[keras.layers.Layer]:
    """Makes the new layers; the padding only for a causal convolution."""
    config = layer.get_config()
    common = {name: config[name] for name in ("data_format", "dtype", "trainable")}
    kinds = _SPLIT[type(layer)]
    window = {name: config[name] for name in _DEPTHWISE}
    parts = []
    if layer.padding == "causal":
        count = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        parts.append(
            _layers.ZeroPadding1D((count, 0), dtype=config["dtype"], name=padding)
        )
        window["padding"] = "valid"
    return [
        *parts,
        kinds[0](**common, **window, use_bias=False, name=depthwise),
        kinds[1](
            kernel_size=1,
            **common,
            **{name: config[name] for name in _POINTWISE},
            **{f"kernel_{part}": config[f"pointwise_{part}"] for part in _PARTS},
            name=pointwise,
        ),
    ]
