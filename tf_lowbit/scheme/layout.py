"""The layout transform: rewrites the graph so that quantizers have their places.

Activations become separate layers, and quantized ReLUs replace ReLUs. Where a layer
reads a tensor that is not the output of a ReLU (a linear bottleneck, the model's
input), a quantizer is inserted. It is signed, unless the tensor is never negative.
BatchNormalization and Add stay. Around an Add, 8-bit quantizers can round as an int8
Add does (`residual_blocks`).
"""

import dataclasses
from typing import Any

from tf_lowbit.compat import keras, tfmot
from tf_lowbit.core import user_warnings
from tf_lowbit.network import graph, layer_registry
from tf_lowbit.scheme.configs import ActivationQuantizeConfig, WeightQuantizeConfig
from tf_lowbit.scheme.placement import Plan, edge_layers, make_plan
from tf_lowbit.scheme.rules import CATCH_ALL, PrecisionRule


class QuantizationWarning(UserWarning):
    """Warns that something was not done as requested, or will not work later."""


def report_problems(problems: list[str], strict: bool) -> None:
    """Warns of problems, one line each.

    Raises:
        ValueError: If `strict` and there are problems.
    """
    if problems and strict:
        raise ValueError(
            "With strict=True every rule must apply, every layer that it matches must "
            "be quantized, and every layer must be exportable. Received:\n- "
            + "\n- ".join(problems)
        )
    for problem in problems:
        user_warnings.warn(problem, QuantizationWarning)


@dataclasses.dataclass(frozen=True)
class LowBitLayout(tfmot.quantization.keras.QuantizeLayoutTransform):
    """Rewrites the model, and makes a config for each quantized layer.

    Attributes:
        rules: The rules, in order.
        strict: Whether to raise an error if a rule cannot be followed.
        residual_bits: 8 for quantizers on residual Adds, or None for none.
        shortcut_bits: 1 to 8 for residual shortcuts, or None for the rules' bits.
    """

    rules: tuple[PrecisionRule, ...]
    strict: bool = False
    residual_bits: int | None = None
    shortcut_bits: int | None = None

    def apply(
        self, model: keras.Model, layer_quantize_map: dict[str, dict[str, Any]]
    ) -> tuple[keras.Model, dict[str, dict[str, Any]]]:
        """TF-MOT's hook.

        Args:
            model: Functional model without annotations.
            layer_quantize_map: Layer name -> {"quantize_config": config or None} for
                every annotated layer. A given config is kept.

        Returns:
            The rewritten model, and a map with a config for exactly the layers to wrap.

        Raises:
            ValueError: If `strict` and the plan has problems, nothing is left to
                quantize, or a ReLU to be quantized is not annotated.
        """
        given = {
            name: entry["quantize_config"]
            for name, entry in layer_quantize_map.items()
            if entry.get("quantize_config") is not None
        }
        eligible = set(layer_quantize_map) - set(given)
        split = split_activations(model)
        present = {layer.name for layer in model.layers}
        plan = make_plan(
            split,
            self.rules,
            eligible,
            self.residual_bits,
            split_off={layer.name for layer in split.layers} - present,
            shortcut_bits=self.shortcut_bits,
        )
        report_problems(plan.problems(), self.strict)
        missing = (set(plan.activations) & present) - set(layer_quantize_map)
        if missing:
            raise ValueError(
                "A ReLU that a quantized layer reads must be annotated too. "
                f"Received: {sorted(missing)} without quantize_annotate"
            )
        placed = _place_quantizers(split, plan, set(layer_quantize_map))
        configs = {**_configs(plan, split), **given}
        if not configs:
            raise ValueError(
                "The rules must quantize a layer. "
                f"{self._why_nothing_is_quantized(split)} Received: "
                f"rules={self.rules} for layers {[x.name for x in model.layers]}"
            )
        return placed, {n: {"quantize_config": c} for n, c in configs.items()}

    def _why_nothing_is_quantized(self, model) -> str:
        """Explains how to change rules that leave all layers in full precision."""
        edges = set().union(*edge_layers(model))
        spared = [
            layer.name
            for layer in model.layers
            if layer.name in edges
            and any(r.matches(layer) and not r.matches(layer, True) for r in self.rules)
        ]
        if not spared:
            return (
                "Give a rule whose pattern matches the whole name of a weight layer, "
                "and whose weight_bits or activation_bits is not None."
            )
        return (
            f"Without edges=True, the pattern {CATCH_ALL!r} leaves the first and the "
            f"last weight layer float, here {spared}: set edges=True in the rule, or "
            f"name a layer, as in PrecisionRule({spared[0]!r}, 8, 8)."
        )


def _owned_relu(layer) -> str | None:
    """Returns the kind of ReLU that is a weight layer's activation, or None."""
    return layer_registry.own_relu(layer) if layer_registry.kernels(layer) else None


def split_activations(model: keras.Model) -> keras.Model:
    """Replaces `activation="relu"` of each weight layer by a ReLU layer behind it.

    The ReLU of `conv` is named `conv_relu`. Outputs and weights do not change. Without
    such layers the given functional model is returned.
    """
    if not any(map(_owned_relu, model.layers)):
        return model
    copies, relus = {}, {}
    taken = {layer.name for layer in model.layers}
    for layer in model.layers:
        kind = _owned_relu(layer)
        copies[layer.name] = copy = graph.copy_layer(layer)
        if kind is not None:
            copy.activation = keras.activations.linear
            # It is for the ReLU's output. ReLU layers cannot save one.
            copy.activity_regularizer = None
            relus[layer.name] = keras.layers.ReLU(
                max_value=6.0 if kind == "relu6" else None,
                name=graph.free_name(f"{layer.name}_relu", taken),
                dtype=layer.dtype_policy,
            )

    def call(node, args, kwargs):
        name = node.layer.name
        outputs = graph.call_copy(copies[name], node, args, kwargs)
        return relus[name](outputs) if name in relus else outputs

    result = graph.rebuild(model, call)
    for layer in model.layers:
        graph.set_weights(layer, copies[layer.name])
    return result


def _identity(name: str, dtype) -> keras.layers.Layer:
    return keras.layers.Activation("linear", name=name, dtype=dtype)


def _place_quantizers(
    model: keras.Model, plan: Plan, annotated: set[str]
) -> keras.Model:
    """Puts an identity layer at the place of each activation quantizer.

    Other layers are moved, not copied, where possible: the given model is TF-MOT's own
    copy. Annotated layers are copied, because their weights are named after the
    annotation.
    """
    new = {}
    for layer in model.layers:
        if layer.name in plan.activations:
            new[layer.name] = _identity(layer.name, layer.dtype_policy)
        elif layer.name in annotated or not graph.is_movable(layer):
            new[layer.name] = graph.copy_layer(layer)
        else:
            new[layer.name] = layer
    inserted: dict[str, object] = {}

    def edge(node, old, tensor):
        insertion = plan.insertions.get((id(node), id(old)))
        if insertion is None:
            return tensor
        if insertion.name not in inserted:
            layer = _identity(insertion.name, node.layer.dtype_policy)
            inserted[insertion.name] = layer(tensor)
        return inserted[insertion.name]

    def behind(old, tensor):
        residual = plan.residuals.get(id(old))
        if residual is None:
            return tensor
        return _identity(residual.name, old._keras_history.layer.dtype_policy)(tensor)

    result = graph.rebuild(
        model,
        lambda node, a, k: graph.call_copy(new[node.layer.name], node, a, k),
        edge,
        behind,
    )
    for layer in model.layers:
        if new[layer.name] is not layer:
            graph.set_weights(layer, new[layer.name])
    return result


def _configs(plan: Plan, model: keras.Model) -> dict:
    configs = {
        name: WeightQuantizeConfig(q, name in plan.shortcuts)
        for name, q in plan.weights.items()
    }
    for name, quantizer in plan.activations.items():
        kind: Any = layer_registry.relu_kind(model.get_layer(name))  # It is a ReLU.
        configs[name] = ActivationQuantizeConfig(
            quantizer, kind, name in plan.shortcuts
        )
    for name, quantizer in (*plan.insertions.values(), *plan.residuals.values()):
        configs[name] = ActivationQuantizeConfig(
            quantizer, shortcut=name in plan.shortcuts
        )
    return configs
