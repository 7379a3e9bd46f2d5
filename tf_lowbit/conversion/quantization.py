"""`quantize`: makes a low-bitwidth model from a float Keras model."""

import contextlib
from collections.abc import Sequence

from tf_lowbit.compat import deep_graphs, keras, tf, tfmot
from tf_lowbit.core import progress
from tf_lowbit.export.lowering import problems
from tf_lowbit.network import graph, inspection, keras3, layer_registry, separable
from tf_lowbit.scheme.layout import report_problems
from tf_lowbit.scheme.rules import PrecisionRule, with_parts
from tf_lowbit.scheme.scheme import LowBitScheme
from tf_lowbit.scheme.wrapper import LowBitWrapper
from tf_lowbit.training.quantized_network import QuantizedNetwork

# Layers that `model.add_loss` and `model.add_metric` make.
_ADDED_TO_MODEL = ("AddLoss", "AddMetric")
# Methods that a subclass of a Functional model may override.
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
_KERAS = ("keras", "tf_keras")


@deep_graphs()
def quantize(
    model: keras.Model,
    rules: PrecisionRule | Sequence[PrecisionRule] | None = None,
    *,
    strict: bool = False,
    residual_bits: int | None = None,
    shortcut_bits: int | None = None,
    verbose: int = 1,
) -> keras.Model:
    """Makes a low-bitwidth network from a float one.

    The layers that the rules match get weight quantizers, and the ReLUs that they read
    become quantized ReLUs. Where a layer reads a tensor that is not the output of a
    ReLU, a quantizer is inserted. It is signed, unless the layers in front show that no
    value is negative, as behind squeeze-and-excite.

    Layers and outputs keep their names. These layers change:

    - `activation="relu"` of a weight layer `conv` becomes a layer `conv_relu`.
    - A separable convolution does not round between its kernels, so it is split: `conv`
      becomes a depthwise convolution `conv_depthwise` and a 1x1 convolution `conv`. A
      rule that matches the layer, by name or type, matches both.
    - Nested models are flattened. If a name occurs twice, the layer in the nested model
      gets the model's name as prefix: `backbone_conv1`.
    - A quantized ReLU clips at its own range. If it replaces a ReLU6, `calibrate` sets
      a range that ends at 6 or below.

    Float weights become latent weights (float64 is rounded to float32), and learned
    weight steps start from them. Activation ranges that are learned or calibrated need
    `tf_lowbit.calibrate`. The float model is not changed.

    Args:
        model: Built Sequential or Functional model of `tf_keras`, or of Keras 3
            (`from_keras3`).
        rules: `PrecisionRule`s, of which the first match applies; None for 2-bit
            weights and activations everywhere except at the first and the last layer.
        strict: Whether these raise an error instead of a `QuantizationWarning`: a rule
            that matches nothing; a layer that cannot be quantized; a loss, metric or
            `train_step` of the model, or an activity regularizer, that is left out; a
            layer that TFLite export does not support (`tf_lowbit.export.check`).
        residual_bits: 8 puts signed 8-bit quantizers on the inputs and outputs of
            residual Adds (`<layer>_residual`), so that training sees the rounding of an
            int8 residual stream. `tf_lowbit.calibrate` sets their steps. None leaves
            the stream in float. A warning tells if no Add reads a quantized layer.
        shortcut_bits: 1 to 8 sets the bits of residual shortcuts that a rule quantizes:
            of the activations that they read, and of the weights of their convolutions.
            An identity shortcut that starts at a quantized ReLU also reads it at these
            bits. If other layers read the same ReLU, the finer quantizer replaces the
            ReLU, and the coarser one is placed behind it, in front of its readers
            (`<layer>_quantizer`). On shortcuts, a calibrated clip (uniform) replaces
            DoReFa's fixed clip. A warning tells if there is no shortcut. None gives
            shortcuts the bits of the rules.
        verbose: 1 shows a progress bar on a terminal or in a notebook if it takes long,
            0 is silent.

    Returns:
        A new Functional model, not compiled. In addition to Keras's, its `fit` and
        `evaluate` warn of ranges that need `calibrate` and, when `fit` ends, of moving
        statistics of batch normalization that lag behind.

    Raises:
        ValueError: If the model, or a nested one, is subclassed; if it is not built, is
            already quantized, has Keras masks, a layer that cannot be copied, or none
            that the rules quantize; if `residual_bits` is neither 8 nor None, or
            `shortcut_bits` neither 1 to 8 nor None; if a weight is NaN or infinite; or
            if `strict` and one of the problems above occurs.
    """
    scheme = LowBitScheme(rules, strict, residual_bits, shortcut_bits)
    _report_own_parts(model, strict)
    model, parts = separable.split_in_graph(_functional(model))
    scheme.rules = tuple(with_parts(rule, parts) for rule in scheme.rules)
    _report_problems_of_export(model, strict)
    with progress.bar("Quantizing", verbose) as update:
        return _quantize(model, scheme, strict, update)


def _quantize(model, scheme, strict, update) -> keras.Model:
    """Makes the low-bitwidth model of a Functional float model."""
    with _unmixed():
        annotated = _annotate(model)
        update(1, 4)
        # TF-MOT rebuilds the network four times.
        with graph.copied_by_name(annotated):
            applied = tfmot.quantization.keras.quantize_apply(
                # No prefix: rules and hints use the layers' own names.
                annotated,
                scheme=scheme,
                quantized_layer_name_prefix="",
            )
    update(2, 4)
    _report_regularizers(model, applied, strict)
    policies = {layer.name: layer.get_config().get("dtype") for layer in model.layers}
    quantized = graph.clone(applied, lambda layer: _own_wrapper(layer, policies))
    update(3, 4)
    inspection.initialize_weight_ranges(quantized)
    copy_flags_by_name(model, quantized)
    return QuantizedNetwork.of(quantized, model.output_names)


def copy_flags_by_name(source: keras.Model, target: keras.Model) -> None:
    """Copies `trainable` and `synchronized` flags to layers of the same name.

    An inserted quantizer is trainable if a layer in front of it is; behind an input, if
    a layer that reads it is. Either model may have layers that the other lacks.
    """
    given = {layer.name: layer for layer in source.layers}
    for layer in target.layers:
        if layer.name in given:
            graph.copy_flags(given[layer.name], layer)
        elif isinstance(layer, LowBitWrapper):
            owners = {given[name] for name in _owners(target, layer, given)}
            layer.trainable = not owners or any(o.trainable for o in owners)


def _owners(model, layer, given) -> set[str]:
    """Returns the given layers in front of a new one; behind an input, its readers."""
    found, sources = set(), list(graph.inputs_of(model, layer))
    while sources:
        node = graph.producer(sources.pop())
        if node.layer.name in given and not node.is_input:
            found.add(node.layer.name)
        elif not node.is_input:
            sources += node.keras_inputs
    if found:
        return found
    readers = graph.readers(model)
    return {
        node.layer.name
        for own in layer.inbound_nodes
        for tensor in graph.outputs_of(own)
        for node in readers.get(id(tensor), [])
        if node.layer.name in given
    }


def _regularizes_alike(layer, other) -> bool:
    has_regularizer = getattr(other, "activity_regularizer", None) is not None
    own = getattr(layer, "activation", None)
    return has_regularizer and getattr(other, "activation", None) is own


@contextlib.contextmanager
def _unmixed():
    """A context without mixed precision.

    TF-MOT's wrappers take the global policy, not that of their layers.
    """
    policy = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy("float32")
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(policy)


def _own_wrapper(layer, policies):
    """Returns the layer, in this library's wrapper if it is in TF-MOT's.

    Args:
        layer: Layer of the float32 network.
        policies: Layer name -> precision policy, as in configurations, for the given
            network. A new layer takes the policy of the layer that it reads.

    Returns:
        The layer itself if nothing changes, or else a copy.
    """
    source = layer
    while source.name not in policies:
        source = graph.producer(source.inbound_nodes[0].keras_inputs[0]).layer
    policy = policies[source.name]
    if type(layer) is tfmot.quantization.keras.QuantizeWrapperV2:
        config = {**layer.get_config(), "dtype": policy}
        own = {**config["layer"]["config"], "dtype": policy}
        config["layer"] = {**config["layer"], "config": own}
        return LowBitWrapper.from_config(config)
    if graph.is_movable(layer) and layer.get_config().get("dtype") == policy:
        return layer
    return graph.copy_layer(layer, dtype=policy)


def _report_own_parts(model, strict) -> None:
    """Reports losses, metrics and methods of the model that are left out."""
    steps = [
        name
        for name in _STEPS
        for kind in type(model).__mro__
        if name in vars(kind) and kind.__module__.split(".")[0] not in _KERAS
    ]
    if steps:
        report_problems(
            [f"{', '.join(steps)} of class {type(model).__name__} is left out"], strict
        )
    added = [
        module.name
        for module in (model.submodules if isinstance(model, tf.Module) else ())
        if type(module).__name__ in _ADDED_TO_MODEL
    ]
    if added:
        report_problems(
            [f"the model's add_loss or add_metric is left out: {', '.join(added)}"],
            strict,
        )


def _report_regularizers(model, applied, strict) -> None:
    kept = {layer.name: inspection.wrapped_layer(layer) for layer in applied.layers}
    lost = [
        layer.name
        for layer in model.layers
        if getattr(layer, "activity_regularizer", None) is not None
        and not _regularizes_alike(layer, kept.get(layer.name))
    ]
    if lost:
        report_problems(
            [f"the activity_regularizer of {', '.join(lost)} is left out"], strict
        )


def _functional(model) -> keras.Model:
    """Returns the model as a Functional one, or raises an error with the reason."""
    if keras3.is_keras3(model):
        model = keras3.from_keras3(model)
    if not isinstance(model, keras.Model):
        raise ValueError(
            "model must be a Sequential or Functional model. "
            f"Received: {type(model).__module__}.{type(model).__name__}"
        )
    if isinstance(model, keras.Sequential) and not model.built:
        raise ValueError(
            "model must be built, so that its shapes are known: give the first layer "
            "an input_shape or call model.build(shape). "
            f"Received: unbuilt Sequential {model.name!r}"
        )
    if not model._is_graph_network:
        raise ValueError(
            "model must be Sequential or Functional: the graph of a subclassed model "
            f"cannot be read. Received: {type(model).__name__}"
        )
    wrapped = [
        module.name
        for module in model.submodules
        if isinstance(module, tfmot.quantization.keras.QuantizeWrapper)
    ]
    if wrapped:
        raise ValueError(
            "model must be a float model; tf_lowbit.requantize takes a quantized one. "
            f"Received: layers that are quantized already: {wrapped[:5]}"
        )
    if isinstance(model, keras.Sequential):
        model = keras.Model(model.inputs, model.outputs, name=model.name)
    model = graph.flatten(model)
    spoilt = inspection.nonfinite_weight(model)
    if spoilt is not None:
        raise ValueError(
            "Weights must be finite: load weights from before the training diverged. "
            f"Received: NaN or infinity in {spoilt}"
        )
    masked = [
        node.layer.name
        for node in graph.calls(model)
        if any(getattr(t, "_keras_mask", None) is not None for t in node.keras_inputs)
    ]
    if masked:
        raise ValueError(
            "model must have no Keras masks: mask with ordinary layers, such as a "
            f"product. Received: masked tensors that {masked[:5]} read"
        )
    return model


def _report_problems_of_export(model, strict) -> None:
    """Reports, in one message, the layers that cannot be exported, with remedies."""
    layers: dict[str, dict[str, str]] = {}
    for problem in problems.problems(model):
        what = layers.setdefault(f"{problem.reason}: {problem.remedy}", {})
        what[problem.layer] = f"{problem.layer} ({problem.type})"
    if layers:
        lines = [f"{what}: {', '.join(who.values())}" for what, who in layers.items()]
        report_problems(
            [
                "the network can be trained, but not exported "
                f"(tf_lowbit.export.check): {'; '.join(lines)}"
            ],
            strict,
        )


def _annotate(model: keras.Model) -> keras.Model:
    """Annotates the layers that may be quantized; the scheme's layout decides."""
    annotate = tfmot.quantization.keras.quantize_annotate_layer
    found = [
        layer.name
        for layer in model.layers
        if layer_registry.kernels(layer) or layer_registry.relu_kind(layer)
    ]
    if not any(layer_registry.kernels(layer) for layer in model.layers):
        raise ValueError(
            "model must have a layer that can be quantized, such as Dense or Conv2D. "
            f"Received: {[type(layer).__name__ for layer in model.layers]}"
        )

    def copy(layer):
        is_float = layer.dtype is not None and tf.as_dtype(layer.dtype).is_floating
        # TF-MOT reorders the weights of frozen layers. Set in the configuration: the
        # setter would also thaw parts that `__init__` froze.
        changes = {"trainable": True, **({"dtype": "float32"} if is_float else {})}
        fresh = graph.copy_layer(layer, **changes)
        return annotate(fresh) if layer.name in found else fresh

    return graph.clone(model, copy)
