"""Converts a low-bitwidth model back to float, or to other bits and rules."""

from collections.abc import Sequence
from typing import Literal

from tf_lowbit.compat import keras
from tf_lowbit.conversion.quantization import copy_flags_by_name, quantize
from tf_lowbit.core import checks
from tf_lowbit.network import graph, inspection, output_names
from tf_lowbit.quantizers import WEIGHT
from tf_lowbit.scheme.configs import ActivationQuantizeConfig, WeightQuantizeConfig
from tf_lowbit.scheme.rules import PrecisionRule

LATENT, QUANTIZED = "latent", "quantized"
SAME: Literal["same"] = "same"
_RELUS = {"relu": None, "relu6": 6.0}


def strip(model: keras.Model, weights: str = LATENT) -> keras.Model:
    """Makes a float network from a low-bitwidth one.

    Weight layers lose their quantizers. A quantized ReLU becomes the ReLU that it
    replaced, with its name. Inserted and residual quantizers are removed. Without the
    quantizers' clips the outputs change, even with quantized weights.

    Args:
        model: A model from `tf_lowbit.quantize`. It is not changed.
        weights: "latent" for the trained float weights, from which `quantize` makes the
            same low-bitwidth weights again; "quantized" for the values on the grid.

    Returns:
        A Functional model of Keras's own layers, not compiled, with the layers' names
        and `trainable` flags.

    Raises:
        ValueError: If nothing in the model is quantized, it is a trainer, a layer is
            quantized by another library's config, or `weights` is neither of the two.
    """
    checks.choice("weights", weights, (LATENT, QUANTIZED))
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
    copy_flags_by_name(model, stripped)
    return output_names.kept(model, stripped)


def requantize(
    model: keras.Model,
    rules: PrecisionRule | Sequence[PrecisionRule] | None = None,
    *,
    strict: bool = False,
    residual_bits: int | Literal["same"] | None = SAME,
    shortcut_bits: int | Literal["same"] | None = SAME,
) -> keras.Model:
    """Quantizes a low-bitwidth network again, by other rules.

    The latent weights are kept. Learned and calibrated ranges are kept where the new
    quantizer has the same place, class and options; the step or clip is rescaled to the
    new bits, as in staged training. Other quantizers start as in `quantize`, and some
    need `tf_lowbit.calibrate`.

    Args:
        model: A model from `quantize`. It is not changed.
        rules: As in `quantize`.
        strict: As in `quantize`.
        residual_bits: As in `quantize`; or "same" for the model's present value.
        shortcut_bits: As in `quantize`; or "same" for the model's present value.

    Returns:
        A new Functional model, not compiled.

    Raises:
        ValueError: As `strip` and `quantize`.
    """
    model = _network(model)
    before = {t.name: t for t in inspection.quantized_tensors(model)}
    residual = [t.declared.bits for t in before.values() if t.is_residual]
    shortcut = [t.declared.bits for t in before.values() if t.is_shortcut]
    fresh = quantize(
        strip(model),
        rules,
        strict=strict,
        residual_bits=_chosen(residual_bits, residual),
        shortcut_bits=_chosen(shortcut_bits, shortcut),
    )
    for tensor in inspection.quantized_tensors(fresh):
        old = before.get(tensor.name)
        if old is not None and _are_alike(old.declared, tensor.declared):
            for name, variable in tensor.variables.items():
                variable.assign(old.variables[name])
            tensor.assign_bits(tensor.quantizer.bits)
    return fresh


def _chosen(bits, present: list[int]) -> int | None:
    """Returns the bits of an argument; for `SAME`, the present ones."""
    return max(present, default=None) if bits == SAME else bits


def _network(model) -> keras.Model:
    """Returns the model, flat; refuses one without quantizers."""
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
    """Returns a layer without its quantizer; None if it is only a quantizer."""
    own = inspection.wrapped_layer(layer)
    if own is layer:
        return graph.copy_layer(layer)
    config = layer.quantize_config
    if isinstance(config, WeightQuantizeConfig):
        return graph.copy_layer(own)
    if not isinstance(config, ActivationQuantizeConfig):
        raise ValueError(
            "Every layer must be quantized by tf_lowbit. "
            f"Received: layer {layer.name!r} with {type(config).__name__}"
        )
    if config.replaces not in _RELUS:
        return None
    return keras.layers.ReLU(
        max_value=_RELUS[config.replaces], name=layer.name, dtype=own.dtype_policy
    )


def _copy_weights(source, target) -> None:
    """Copies weights: by name out of a wrapper, else in order."""
    if inspection.wrapped_layer(source) is source:
        graph.set_weights(source, target)
        return
    # Apart from the others, because an inner layer may have a weight of the same name.
    latent = {inspection.short_name(v): v for v, _, _ in source._weight_vars}
    own = {name: getattr(target, name) for name in latent}
    for name, weight in own.items():
        weight.assign(latent[name])
    values = _by_name(source.weights, latent.values())
    for name, weight in _by_name(target.weights, own.values()).items():
        weight.assign(values[name])


def _by_name(weights, without) -> dict:
    """Maps names to weights, some excluded; a repeated last part is numbered."""
    taken: set[str] = set()
    skipped = {weight.ref() for weight in without}
    return {
        graph.free_name(inspection.short_name(weight), taken): weight
        for weight in weights
        if weight.ref() not in skipped
    }


def _are_alike(first, second) -> bool:
    kinds = type(first), type(second)
    configs = [{**q.get_config(), "bits": None} for q in (first, second)]
    return kinds[0] is kinds[1] and configs[0] == configs[1]
