"""Back to a float model, and on to other bits and rules."""

from tf_lowbit import inspection
from tf_lowbit.api import quantize, take_flags
from tf_lowbit.compat import keras
from tf_lowbit.quantizers import WEIGHT
from tf_lowbit.scheme import graph, output_names
from tf_lowbit.scheme.configs import ActivationQuantizeConfig, WeightQuantizeConfig

LATENT, QUANTIZED = "latent", "quantized"
SAME = "same"
_RELUS = {"relu": None, "relu6": 6.0}


def strip(model: keras.Model, weights: str = LATENT) -> keras.Model:
    """Makes a float network of a low-bitwidth one.

    Weight layers are plain again. A quantized ReLU becomes the ReLU that it replaced,
    under its name; quantizers that `quantize` inserted, residual ones among them, are
    left out. Clips go with the quantizers, so that the network puts out other values
    than before, also with quantized weights.

    Args:
        model: what `tf_lowbit.quantize` made. It is not changed.
        weights: "latent" for the float weights that were trained, from which
            `quantize` makes the same low-bitwidth weights again; "quantized" for their
            values on the grid.

    Returns:
        A Functional model of Keras's own layers, not compiled. It has the layers'
        names and their `trainable` flags.

    Raises:
        ValueError: if nothing in the model is quantized, it is a trainer, a layer is
            quantized by another library's config, or `weights` is neither of the two.
    """
    if weights not in (LATENT, QUANTIZED):
        raise ValueError(
            f"weights must be {LATENT!r} or {QUANTIZED!r}. Received: {weights!r}"
        )
    model = _network(model)
    copies = {layer.name: _stripped(layer) for layer in model.layers}

    def call(node, args, kwargs):
        layer = copies[node.layer.name]
        return args[0] if layer is None else layer(*args, **kwargs)

    stripped = graph.rebuild(model, call)
    for layer in model.layers:
        if layer.weights and copies[layer.name] is not None:
            _copy_weights(layer, copies[layer.name])
    if weights == QUANTIZED:
        for tensor in inspection.quantized_tensors(model):
            if tensor.role == WEIGHT:
                own = getattr(copies[tensor.layer.name], tensor.attribute)
                own.assign(tensor.quantized())
    take_flags(model, stripped)
    return output_names.kept(model, stripped)


def requantize(
    model: keras.Model,
    rules=None,
    *,
    strict: bool = False,
    residual_bits: int | str | None = SAME,
    shortcut_bits: int | str | None = SAME,
) -> keras.Model:
    """Quantizes a low-bitwidth network anew, after other rules.

    The latent weights carry over; so does what has been learned or calibrated of a
    range, wherever the same kind of quantizer with the same options stands in the same
    place: its step or clip is then that of the new bits, as in a staged training. Other
    quantizers start as `quantize` starts them, and some want `tf_lowbit.calibrate`.

    Args:
        model: what `quantize` made. It is not changed.
        rules: as in `quantize`.
        strict: likewise.
        residual_bits: likewise; or "same", the bits that the model's residual sums are
            made for, if they are quantized.
        shortcut_bits: likewise; or "same", the bits that `shortcut_bits` gave the
            model's shortcuts, if it did.

    Returns:
        A new Functional model, not compiled.

    Raises:
        ValueError: as `strip` and `quantize` say.
    """
    model = _network(model)
    before = {t.name: t for t in inspection.quantized_tensors(model)}
    if residual_bits == SAME:
        made_for = [t.declared.bits for t in before.values() if t.is_residual]
        residual_bits = max(made_for, default=None)
    if shortcut_bits == SAME:
        made_for = [t.declared.bits for t in before.values() if t.is_shortcut]
        shortcut_bits = max(made_for, default=None)
    fresh = quantize(
        strip(model),
        rules,
        strict=strict,
        residual_bits=residual_bits,
        shortcut_bits=shortcut_bits,
    )
    for tensor in inspection.quantized_tensors(fresh):
        old = before.get(tensor.name)
        if old is not None and _are_alike(old.declared, tensor.declared):
            for name, variable in tensor.variables.items():
                variable.assign(old.variables[name])
            tensor.assign_bits(tensor.quantizer.bits)
    return fresh


def _network(model) -> keras.Model:
    """The model, flat; or an error if it is none with quantizers."""
    is_network = getattr(model, "_is_graph_network", False)
    if is_network:
        model = graph.flatten(model)
    inspection.require_quantized(model)
    if not is_network:
        raise ValueError(
            "model must be a Functional network, such as a trainer's student. "
            f"Received: {type(model).__name__}"
        )
    return model


def _stripped(layer) -> keras.layers.Layer | None:
    """A layer without its quantizer; None if it is nothing but one."""
    own = inspection.wrapped_layer(layer)
    if own is layer:
        return graph.copy_layer(layer)
    config = layer.quantize_config
    if isinstance(config, WeightQuantizeConfig):
        return graph.copy_layer(own)
    if not isinstance(config, ActivationQuantizeConfig):
        raise ValueError(
            "Every quantizer must be one of tf_lowbit. "
            f"Received: layer {layer.name!r} with {type(config).__name__}"
        )
    if config.replaces not in _RELUS:
        return None
    return keras.layers.ReLU(
        max_value=_RELUS[config.replaces], name=layer.name, dtype=own.dtype_policy
    )


def _copy_weights(source, target) -> None:
    """By name where a wrapper has more weights than its layer, else in order."""
    if inspection.wrapped_layer(source) is source:
        graph.set_weights(source, target)
        return
    # A layer within the layer may have a weight of the same name.
    latent = {inspection.short_name(v): v for v, _, _ in source._weight_vars}
    own = {name: getattr(target, name) for name in latent}
    for name, weight in own.items():
        weight.assign(latent[name])
    values = _by_name(source.weights, latent.values())
    for name, weight in _by_name(target.weights, own.values()).items():
        weight.assign(values[name])


def _by_name(weights, without) -> dict:
    """Weights but some, by the last part of their names, numbered where it is taken."""
    taken: set[str] = set()
    skipped = {weight.ref() for weight in without}
    return {
        graph.free_name(inspection.short_name(weight), taken): weight
        for weight in weights
        if weight.ref() not in skipped
    }


def _are_alike(first, second) -> bool:
    """Whether two quantizers differ in their bits at most."""
    kinds = type(first), type(second)
    configs = [{**q.get_config(), "bits": None} for q in (first, second)]
    return kinds[0] is kinds[1] and configs[0] == configs[1]
