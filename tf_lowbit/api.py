"""`quantize`: a float Keras model in, a low-bitwidth one out."""

import contextlib

import numpy as np

from tf_lowbit import inspection, keras3
from tf_lowbit.compat import deep_graphs, keras, tf, tfmot
from tf_lowbit.export import forms
from tf_lowbit.quantized_network import QuantizedNetwork
from tf_lowbit.scheme import graph, registry
from tf_lowbit.scheme.layout import report_problems
from tf_lowbit.scheme.scheme import LowBitScheme
from tf_lowbit.scheme.wrapper import LowBitWrapper

# What `model.add_loss` and `model.add_metric` make.
_ADDED_TO_MODEL = ("AddLoss", "AddMetric")
# What a subclass of a Functional model may have its own of.
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
_KERAS = ("keras", "tf_keras")


@deep_graphs()
def quantize(
    model: keras.Model,
    rules=None,
    *,
    strict: bool = False,
    residual_bits: int | None = None,
    shortcut_bits: int | None = None,
) -> keras.Model:
    """Makes a low-bitwidth network of a float one.

    The layers that the rules name get weight quantizers, and the ReLUs that they
    read become quantized ReLUs. Where a layer reads something that no ReLU puts out,
    a quantizer is inserted (ours): signed, unless the layers in front tell that there
    is no negative number, as behind squeeze-and-excite. Layer names stay, and those of
    the outputs; an `activation="relu"` of a weight layer becomes a layer of its own
    behind it, `conv` -> `conv_relu`. A quantized ReLU clips at its own range, also
    where a ReLU6 stood.

    Models among the layers are flattened: their layers keep their names, and have the
    model's in front where a name stands twice, `backbone_conv1`.

    The float weights carry over as the latent weights, float64 ones as float32 has
    them, and learned weight steps start from them. Learned or fixed activation ranges
    want `tf_lowbit.calibrate`. The float model is not changed.

    Args:
        model: built Sequential or Functional model of `tf_keras`, or of Keras 3
            (`from_keras3`).
        rules: `PrecisionRule`s, the first match wins; None for 2-bit weights and
            activations everywhere but at the first and the last layer.
        strict: raise where a rule matches nothing, a layer cannot be quantized, or a
            loss, metric or `train_step` of the model's own or an activity regularizer
            is left out, or a layer has no form in a TFLite file
            (`tf_lowbit.export.check`), instead of a `QuantizationWarning`. The last
            need not trouble who does not export.
        residual_bits: 8 puts signed 8-bit quantizers on what residual Adds read and
            put out (`<layer>_residual`, ours), so that training sees the rounding of
            an int8 residual stream. `tf_lowbit.calibrate` sets their steps. None
            leaves the stream in float. A warning tells where no Add reads a
            quantized layer.
        shortcut_bits: 1 to 8 lets the shortcuts of residual blocks read activations at
            these bits, and gives their convolutions weights at these bits, wherever a
            rule quantizes them (ours). The finer quantizer takes the ReLU's place, and
            the coarser one stands behind it, in front of the layers that it is for
            (`<layer>_quantizer`). Identity shortcuts that start at a quantized ReLU
            read it at these bits, too. DoReFa's fixed clip becomes a calibrated one
            (uniform) on shortcuts. A warning tells where no shortcut is found. None
            gives shortcuts the bits of the rules.

    Returns:
        A new Functional model, not compiled. Its `fit` and `evaluate` are Keras's, and
        warn of ranges that wait for `calibrate` and, when `fit` ends, of moving
        statistics of batch normalisation that lag.

    Raises:
        ValueError: if the model, or one among its layers, is subclassed; if it is not
            built, is quantized already, has Keras masks, a layer that cannot be copied
            or none that the rules quantize; if `residual_bits` is neither 8 nor None,
            or `shortcut_bits` neither 1 to 8 nor None; if a weight is NaN or infinite;
            and as `strict` says.
    """
    scheme = LowBitScheme(rules, strict, residual_bits, shortcut_bits)
    _report_own_parts(model, strict)
    model = _functional(model)
    _report_problems_of_export(model, strict)
    _require_finite(model)
    with _unmixed():
        applied = tfmot.quantization.keras.quantize_apply(
            # No prefix: the user's layer names are what rules and hints go by.
            _annotate(model),
            scheme=scheme,
            quantized_layer_name_prefix="",
        )
    _report_regularizers(model, applied, strict)
    policies = {layer.name: layer.get_config().get("dtype") for layer in model.layers}
    quantized = graph.clone(applied, lambda layer: _own_wrapper(layer, policies))
    inspection.initialize_weight_ranges(quantized)
    take_flags(model, quantized)
    return QuantizedNetwork.of(quantized, model.output_names)


def _require_finite(model) -> None:
    spoilt = inspection.spoilt_weight(model)
    if spoilt is not None:
        raise ValueError(
            "The float model's weights must be finite: its training has diverged. "
            f"Received: NaN or inf in {spoilt}"
        )


def take_flags(source: keras.Model, target: keras.Model) -> None:
    """Gives layers what those of the same name have and a copy has not.

    Args:
        source: whose `trainable` and `synchronized` flags are taken.
        target: which may lack some of its layers, and have others.
    """
    given = {layer.name: layer for layer in source.layers}
    for layer in target.layers:
        if layer.name in given:
            graph.take_flags(given[layer.name], layer)
        elif isinstance(layer, LowBitWrapper):
            # A quantizer of its own trains with the layers that it belongs to.
            owners = {given[name] for name in _owners(target, layer, given)}
            layer.trainable = not owners or any(o.trainable for o in owners)


def _owners(model, layer, given) -> set[str]:
    """Of a new layer, what it stands behind; or what reads it, behind an input."""
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
    """A context without mixed precision, for TF-MOT's wrappers.

    They have the global policy, whatever that of their layers is.
    """
    policy = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy("float32")
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(policy)


def _own_wrapper(layer, policies):
    """A copy of the layer, in our wrapper where it is in TF-MOT's.

    Args:
        layer: of the float32 network.
        policies: name -> precision policy, as configurations have it, of the layers of
            the network given. A new layer takes that of what it reads.
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
    return graph.copy_layer(layer, dtype=policy)


def _report_own_parts(model, strict) -> None:
    """Names what is the model's own, which the rebuilt one has not."""
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
    """Names activity regularizers of layers that others took the place of."""
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
    """The model as a Functional one, or an error that says why there is none."""
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
    _require_finite_weights(model)
    masked = [
        node.layer.name
        for node in graph.calls(model)
        if any(getattr(t, "_keras_mask", None) is not None for t in node.keras_inputs)
    ]
    if masked:
        raise ValueError(
            "model must have no Keras masks: make the masking a part of the "
            f"computation. Received: masked tensors that {masked[:5]} read"
        )
    return model


def _report_problems_of_export(model, strict) -> None:
    """Names, in one text, the layers that have no form in a file, with remedies."""
    layers: dict[str, dict[str, str]] = {}
    for problem in forms.problems(model):
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


def _require_finite_weights(model) -> None:
    broken = [
        weight.name
        for weight in model.weights
        if weight.dtype.is_floating and not np.isfinite(weight.numpy()).all()
    ]
    if broken:
        raise ValueError(
            "Weights must be finite, for steps start from them: load weights from "
            f"before the training diverged. Received: NaN or infinity in {broken[:5]}"
        )


def _annotate(model: keras.Model) -> keras.Model:
    """Annotates what may be quantized; the scheme's layout decides what is."""
    annotate = tfmot.quantization.keras.quantize_annotate_layer
    found = [
        layer.name
        for layer in model.layers
        if registry.kernels(layer) or registry.relu_kind(layer)
    ]
    if not any(registry.kernels(layer) for layer in model.layers):
        raise ValueError(
            "model must have a layer that can be quantized (Dense, Conv or a kind of "
            f"it). Received: {[type(layer).__name__ for layer in model.layers]}"
        )

    def copy(layer):
        is_float = layer.dtype is not None and tf.as_dtype(layer.dtype).is_floating
        fresh = graph.copy_layer(layer, **({"dtype": "float32"} if is_float else {}))
        fresh.trainable = True  # TF-MOT orders the weights of frozen layers anew.
        return annotate(fresh) if layer.name in found else fresh

    return graph.clone(model, copy)
