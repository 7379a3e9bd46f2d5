"""Plans from rules and a graph where each quantizer is placed."""

import dataclasses
from collections.abc import Callable, Set
from typing import Any, NamedTuple

from tf_lowbit import quantizers
from tf_lowbit.compat import keras
from tf_lowbit.core import grid
from tf_lowbit.network import graph, layer_registry, passthrough
from tf_lowbit.scheme import nonnegative, residual_blocks
from tf_lowbit.scheme.rules import CATCH_ALL, PrecisionRule

_LARGEST_INT8 = 127


class Insertion(NamedTuple):
    """A quantizer for a tensor that is not the output of a ReLU.

    Attributes:
        name: Name of the new layer.
        quantizer: A residual quantizer, or an activation quantizer that is signed if
            the tensor may be negative.
    """

    name: str
    quantizer: quantizers.ActivationQuantizer


@dataclasses.dataclass
class Plan:
    """The place of each quantizer.

    Attributes:
        weights: Layer name -> (attribute name -> weight quantizer).
        activations: Name of a ReLU layer -> the quantizer that replaces it.
        insertions: (id of the reading node, id of the tensor) -> quantizer between
            them.
        residuals: Id of a tensor -> residual quantizer of the tensor. All readers and
            `insertions` come after it.
        shortcuts: Names of the layers whose bits `shortcut_bits` set.
        unused_rules: Rules that apply to no layer.
        unsupported: Names of layers that a rule reaches but whose weights cannot be
            quantized.
        notes: Further messages for the user.
    """

    weights: dict[str, dict] = dataclasses.field(default_factory=dict)
    activations: dict[str, quantizers.ActivationQuantizer] = dataclasses.field(
        default_factory=dict
    )
    insertions: dict[tuple[int, int], Insertion] = dataclasses.field(
        default_factory=dict
    )
    residuals: dict[int, Insertion] = dataclasses.field(default_factory=dict)
    shortcuts: set[str] = dataclasses.field(default_factory=set)
    unused_rules: list[PrecisionRule] = dataclasses.field(default_factory=list)
    unsupported: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def problems(self) -> list[str]:
        """Returns one line for each request that the plan does not fulfil."""
        lines = [
            f"a rule matches no layer: {rule}; its pattern must match a whole name"
            + ("" if rule.reaches_edges else ", and edges=True lets it reach the edges")
            for rule in self.unused_rules
        ]
        lines += [
            f"layer {name} cannot be quantized; register its kernels with "
            "tf_lowbit.register_layer, or give it a first rule without bits"
            for name in self.unsupported
        ]
        return lines + self.notes


def make_plan(
    model: keras.Model,
    rules: tuple[PrecisionRule, ...],
    eligible: set[str],
    residual_bits: int | None = None,
    split_off: Set[str] = frozenset(),
    shortcut_bits: int | None = None,
) -> Plan:
    """Decides what is quantized in a functional model.

    Args:
        model: Functional model whose ReLUs are separate layers.
        rules: The rules, in order.
        eligible: Names of the layers whose weights may be quantized.
        residual_bits: Bits of the quantizers on residual Adds, or None for none.
        split_off: Names of ReLUs that were split off other layers. If a rule matches
            both the ReLU and the layer in front, it means that layer, and the rules of
            the ReLU's readers have priority.
        shortcut_bits: Bits of the inputs and weights of residual shortcuts that a rule
            quantizes; None for the rules' bits.
    """
    planner = _Planner(model, rules, eligible, residual_bits, split_off, shortcut_bits)
    return planner.plan


class _Planner:
    def __init__(self, model, rules, eligible, residual_bits, split_off, shortcut_bits):
        self.model = model
        self.rules = rules
        self.plan = Plan()
        self._used: set[PrecisionRule] = set()
        self._inserted: dict[tuple[int, str], Insertion] = {}
        self._taken = {layer.name for layer in model.layers}
        self._split_off = split_off
        self._edges = set().union(*edge_layers(model))
        self._behind_relus = self._find_behind_relus()
        self._meant_for_owners: dict[str, PrecisionRule] = {}
        self._named_activations = self._plan_named_activations()
        # What the rules want of each ReLU: its name -> ids of reading node and tensor
        # -> (node, tensor, rule).
        self._wishes: dict[str, dict] = {}
        shortcuts = (
            [] if shortcut_bits is None else residual_blocks.find_shortcuts(model)
        )
        projections = {s.layer for s in shortcuts if s.layer is not None}
        for layer in model.layers:
            if layer.name not in projections:
                self._plan_layer(layer, eligible)
        if shortcut_bits is not None:
            self._plan_shortcuts(shortcuts, shortcut_bits, eligible)
        for name, rule in self._meant_for_owners.items():
            if rule.activation_bits is not None:  # Readers' rules have priority.
                self.plan.activations.setdefault(name, _relu_quantizer(rule))
        if residual_bits is not None:
            self._plan_residuals(residual_bits)
        self.plan.unused_rules = [r for r in rules if r not in self._used]

    def _rule(self, layer) -> PrecisionRule | None:
        is_edge = layer.name in self._edges
        rule = next((r for r in self.rules if r.matches(layer, is_edge)), None)
        if rule is not None:
            self._used.add(rule)
        return rule

    def _plan_named_activations(self) -> set[str]:
        """Applies rules that name a ReLU, with priority over its readers' rules."""
        named = set()
        specific = [r for r in self.rules if r.pattern != CATCH_ALL or r.layer_type]
        for layer in self.model.layers:
            if layer_registry.relu_kind(layer) is None:
                continue
            matching = [r for r in specific if r.matches(layer)]
            rule = next((r for r in matching if not self._means_owner(r, layer)), None)
            if rule is None:
                if matching:
                    self._meant_for_owners[layer.name] = matching[0]
                continue
            self._used.add(rule)
            named.add(layer.name)
            if rule.activation_bits is not None:
                self.plan.activations[layer.name] = _relu_quantizer(rule)
        return named

    def _means_owner(self, rule, relu) -> bool:
        """Tells whether a rule also fits the layer that a ReLU was split off."""
        if relu.name not in self._split_off:
            return False
        read = graph.inputs_of(self.model, relu)[0]
        return rule.matches(graph.producer(read).layer)

    def _plan_layer(self, layer, eligible) -> None:
        if layer_registry.is_unsupported(layer):
            rule = self._rule(layer)
            if rule is not None and rule.weight_bits is not None:
                self.plan.unsupported.append(layer.name)
        if not layer_registry.kernels(layer) or layer.name not in eligible:
            return
        rule = self._rule(layer)
        if rule is None:
            return
        self._plan_weights(layer, rule)
        if rule.activation_bits is not None:
            for node in graph.calls(self.model):
                if node.layer is layer:
                    self._quantize_input(node, node.keras_inputs[0], rule)

    def _plan_weights(self, layer, rule) -> None:
        if rule.weight_bits is not None:
            self.plan.weights[layer.name] = {
                kernel.attribute: _weight_quantizer(rule, kernel)
                for kernel in layer_registry.kernels(layer)
            }

    def _quantize_input(self, node, tensor, rule) -> None:
        for reader, read, relu in self._sources(node, tensor, rule):
            if relu is None:
                self._insert(reader, read, rule)
            else:
                self._quantize_relu(relu, rule)

    def _sources(self, node, tensor, rule):
        """Finds the places of the quantizers for a node's input.

        Args:
            node: The node that reads.
            tensor: The tensor that it reads.
            rule: Rule whose quantizer is wanted there; None to record no wish.

        Yields:
            (reading node, tensor, ReLU layer that makes it). Without a ReLU: (reading
            node, tensor, None).
        """
        place = node, tensor
        # Paths fork and join, but each place is needed once.
        waiting, seen = [place], set()
        while waiting:
            node, tensor = waiting.pop()
            if (id(node), id(tensor)) in seen:
                continue
            seen.add((id(node), id(tensor)))
            source = graph.producer(tensor)
            if layer_registry.relu_kind(source.layer):
                if rule is not None:
                    wishes = self._wishes.setdefault(source.layer.name, {})
                    wishes.setdefault((id(place[0]), id(place[1])), (*place, rule))
                yield node, tensor, source.layer
            elif id(source) in self._behind_relus:
                read = passthrough.sources(source)
                waiting += [(source, behind) for behind in reversed(read)]
            else:
                yield node, tensor, None

    def _plan_shortcuts(self, shortcuts, bits, eligible) -> None:
        """Gives shortcuts their own bits.

        If several quantizers are wanted for one ReLU, the finest replaces the ReLU. The
        coarser ones are placed behind it, each in front of its readers. So they round
        the fine values again, as in an integer network, where a layer has one output
        tensor.
        """
        for shortcut in shortcuts:
            if shortcut.layer is None:
                self._plan_identity(shortcut, bits)
                continue
            layer = shortcut.node.layer
            rule = self._rule(layer) if layer.name in eligible else None
            if rule is None:
                continue
            rule = _at_bits(rule, bits)
            self._plan_weights(layer, rule)
            if rule.weight_bits is not None:
                self.plan.shortcuts.add(layer.name)
            if rule.activation_bits is None:
                continue
            for node, tensor, relu in self._sources(
                shortcut.node, shortcut.tensor, None
            ):
                if relu is None:
                    self._insert(node, tensor, rule)
                    inserted = self.plan.insertions[id(node), id(tensor)]
                    self.plan.shortcuts.add(inserted.name)
                else:
                    self._split_relu(shortcut, relu, rule)
        if not self.plan.shortcuts:
            self.plan.notes.append(
                f"shortcut_bits={bits} finds no residual block whose shortcut is "
                "quantized; leave it out, or give the shortcut a rule"
            )

    def _plan_identity(self, shortcut, bits) -> None:
        for _, _, relu in self._sources(shortcut.node, shortcut.tensor, None):
            if relu is not None and relu.name in self._wishes:
                _, _, rule = next(iter(self._wishes[relu.name].values()))
                self._split_relu(shortcut, relu, _at_bits(rule, bits))

    def _split_relu(self, shortcut, relu, rule) -> None:
        """Makes a shortcut read a ReLU at the shortcut's own bits."""
        if relu.name in self._named_activations:
            self.plan.notes.append(
                f"a rule that names activation {relu.name} sets the bits that the "
                "shortcut reads: leave the activation out of the rule"
            )
            return
        wanted = _relu_quantizer(rule)
        present = self.plan.activations.get(relu.name)
        if present is None or present.bits < wanted.bits:
            self.plan.activations[relu.name] = wanted
            self.plan.shortcuts.add(relu.name)
            for node, tensor, other in self._wishes.get(relu.name, {}).values():
                self._stand_behind(node, tensor, _relu_quantizer(other), wanted)
        elif present.bits > wanted.bits:
            name = self._stand_behind(shortcut.node, shortcut.tensor, wanted, present)
            if name is not None:
                self.plan.shortcuts.add(name)
        else:
            self.plan.shortcuts.add(relu.name)

    def _stand_behind(self, node, tensor, quantizer, in_front) -> str | None:
        """Puts an unsigned quantizer behind a finer one.

        Returns:
            Name of the new layer; None if the tensor is not quantized again.
        """
        if quantizer.bits >= in_front.bits:
            return None
        if not nonnegative.is_nonnegative(tensor):
            source = tensor._keras_history.layer.name
            self.plan.notes.append(
                f"{node.layer.name} reads {source} at {in_front.bits} bits and not at "
                f"{quantizer.bits}: {source} joins a shortcut's ReLU with a tensor "
                "that may be negative"
            )
            return None
        insertion = self._shared_insertion(tensor, quantizer)
        self.plan.insertions[id(node), id(tensor)] = insertion
        return insertion.name

    def _find_behind_relus(self) -> set[int]:
        """Returns the ids of the nodes that pass on the grid of a ReLU."""
        found: set[int] = set()
        for node in graph.calls(self.model):
            sources = [graph.producer(tensor) for tensor in passthrough.sources(node)]
            if passthrough.is_transparent(node) and any(
                layer_registry.relu_kind(s.layer) or id(s) in found for s in sources
            ):
                found.add(id(node))
        return found

    def _quantize_relu(self, layer, rule) -> None:
        if layer.name in self._named_activations:
            if layer.name not in self.plan.activations:
                note = f"a rule that names activation {layer.name} keeps it float"
                if note not in self.plan.notes:
                    self.plan.notes.append(note)
            return
        wanted = _relu_quantizer(rule)
        present = self.plan.activations.setdefault(layer.name, wanted)
        if present == wanted:
            return
        kept = max(present, wanted, key=lambda q: q.bits)
        self.plan.activations[layer.name] = kept
        self.plan.notes.append(
            f"activation {layer.name} feeds layers of different precision: "
            f"of {present!r} and {wanted!r}, {kept!r} is used"
        )

    def _insert(self, node, tensor, rule) -> None:
        """Inserts a quantizer between a tensor and the node that reads it."""
        quantizer = _inserted_quantizer(rule, not nonnegative.is_nonnegative(tensor))
        wanted = self._shared_insertion(tensor, quantizer)
        place = id(node), id(tensor)
        present = self.plan.insertions.setdefault(place, wanted)
        if present.quantizer == wanted.quantizer:
            return
        # For example a concatenation that layers of different rules read.
        kept = max(present, wanted, key=lambda insertion: insertion.quantizer.bits)
        self.plan.insertions[place] = kept
        self.plan.notes.append(
            f"what {node.layer.name} reads of {tensor._keras_history.layer.name} feeds "
            f"layers of different precision: of {present.quantizer!r} and "
            f"{wanted.quantizer!r}, {kept.quantizer!r} is used"
        )

    def _shared_insertion(self, tensor, quantizer) -> Insertion:
        """Returns one insertion for all equal quantizers of a tensor."""
        key = (id(tensor), repr(quantizer))
        if key not in self._inserted:
            name = self._name_behind(tensor, "quantizer")
            self._inserted[key] = Insertion(name, quantizer)
        return self._inserted[key]

    def _plan_residuals(self, bits) -> None:
        quantizer = quantizers.ResidualQuantizer(bits)
        found = residual_blocks.find_residual_tensors(
            self.model, self.plan.weights, self.plan.activations
        )
        for tensor in found:
            name = self._name_behind(tensor, "residual")
            self.plan.residuals[id(tensor)] = Insertion(name, quantizer)
        if not found:
            self.plan.notes.append(
                f"residual_bits={bits} finds no Add that reads a quantized layer"
            )

    def _name_behind(self, tensor, suffix: str) -> str:
        """Returns a free name for a new layer behind a tensor."""
        source = tensor._keras_history.layer.name
        return graph.free_name(f"{source}_{suffix}", self._taken)


def edge_layers(
    model: keras.Model,
    kernels: Callable[[keras.layers.Layer], Any] = layer_registry.kernels,
) -> tuple[set[str], set[str]]:
    """Returns the names of the first and of the last weight layers.

    A first layer has no weight layer before it on any path; a last layer has none after
    it. A chain has one of each, a branched model may have several. For a quantized
    model, `kernels` must look into the wrappers.
    """
    # Tensor -> the nearest weight layers before it.
    before: dict[int, set[str]] = {}
    weighted, first, inner = set(), set(), set()
    for node in graph.calls(model):
        earlier = set().union(*(before.get(id(t), set()) for t in node.keras_inputs))
        if kernels(node.layer):
            weighted.add(node.layer.name)
            if not earlier:
                first.add(node.layer.name)
            inner |= earlier
            earlier = {node.layer.name}
        for tensor in graph.outputs_of(node):
            before[id(tensor)] = earlier
    return first, weighted - inner


def _weight_quantizer(rule, kernel):
    quantizer = quantizers.get(rule.weight_quantizer, quantizers.WEIGHT)
    arguments = {"bits": rule.weight_bits}
    if "channel_axes" in quantizer.get_config():
        arguments["channel_axes"] = kernel.channel_axes
    if rule.weight_quantizer == "lsq" and rule.weight_bits == grid.MAX_BITS:
        arguments["narrow_range"] = True  # TFLite's int8 weights exclude -128.
    return quantizers.get(quantizer, quantizers.WEIGHT, **arguments)


def _relu_quantizer(rule):
    kind, bits = rule.activation_quantizer, rule.activation_bits
    return quantizers.get(kind, quantizers.ACTIVATION, bits=bits)


def _at_bits(rule, bits: int):
    """Changes a shortcut's rule to other bits, and to quantizers that support them.

    Uniform quantizers replace DoReFa's. For activations, because calibration scales the
    normalization in front to DoReFa's clip of 1 for the coarser quantizer only. For
    weights, because the codes of 8-bit DoReFa weights do not fit int8.
    """
    wanted: dict[str, Any] = {
        name: bits
        for name in ("weight_bits", "activation_bits")
        if getattr(rule, name) is not None
    }
    kind = quantizers.get(rule.activation_quantizer, quantizers.ACTIVATION)
    if kind.has_fixed_clip:
        wanted["activation_quantizer"] = "uniform"
    kind = quantizers.get(rule.weight_quantizer, quantizers.WEIGHT)
    if max(kind.level_codes(bits)) > _LARGEST_INT8:
        wanted["weight_quantizer"] = "uniform"
    return dataclasses.replace(rule, **wanted)


def _inserted_quantizer(rule, signed: bool):
    """Returns the quantizer for a tensor that is not the output of a ReLU."""
    given = quantizers.get(rule.activation_quantizer, quantizers.ACTIVATION)
    learned = isinstance(given, quantizers.LSQActivationQuantizer)
    return quantizers.get(
        given if learned else "uniform",
        quantizers.ACTIVATION,
        bits=rule.activation_bits,
        signed=signed,
    )
