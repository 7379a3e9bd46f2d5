"""Separable convolutions as two layers, so that what is between them is quantized."""

from tf_lowbit.compat import deep_graphs, keras

_layers = keras.layers
# Separable convolutions, and what they are split into.
_SPLIT = {
    _layers.SeparableConv1D: (_layers.DepthwiseConv1D, _layers.Conv1D),
    _layers.SeparableConv2D: (_layers.DepthwiseConv2D, _layers.Conv2D),
}
_PARTS = ("constraint", "initializer", "regularizer")
# Of a separable convolution's settings, those of either layer.
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

    Within a separable convolution nothing is rounded between its two kernels, so that
    it has no integer form. Of two layers `quantize` makes what is between them a
    quantization point like any other, and the network can be exported. The
    function is the same, up to float rounding, until it is quantized.

    Args:
        model: float Sequential or Functional model. It is not changed. Models among
            its layers are split likewise.

    Returns:
        A model of its own, not compiled, with copies of the weights. A layer "conv"
        that was split is a model "conv" of the layers "conv_depthwise" and
        "conv_pointwise", behind a "conv_padding" if it is causal; all others keep their
        names.

    Raises:
        ValueError: if the model is not a built Sequential or Functional one.
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
    """A layer of its own, without the weights; or what stands for it."""
    if isinstance(layer, keras.Model):
        return split_separable(layer)
    if type(layer) in _SPLIT:
        return _split(layer)
    return type(layer).from_config(layer.get_config())


def _split(layer) -> keras.Sequential:
    config = layer.get_config()
    common = {name: config[name] for name in ("data_format", "dtype", "trainable")}
    kinds = _SPLIT[type(layer)]
    window = {name: config[name] for name in _DEPTHWISE}
    parts = []
    if layer.padding == "causal":
        count = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        name = f"{layer.name}_padding"
        parts.append(_layers.ZeroPadding1D((count, 0), dtype=layer.dtype, name=name))
        window["padding"] = "valid"
    depthwise = kinds[0](
        **common, **window, use_bias=False, name=f"{layer.name}_depthwise"
    )
    pointwise = kinds[1](
        kernel_size=1,
        **common,
        **{name: config[name] for name in _POINTWISE},
        **{f"kernel_{part}": config[f"pointwise_{part}"] for part in _PARTS},
        name=f"{layer.name}_pointwise",
    )
    return keras.Sequential([*parts, depthwise, pointwise], name=layer.name)
