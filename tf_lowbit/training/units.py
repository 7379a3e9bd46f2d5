"""Units of stochastic precision: the parts of a network that are drawn as one."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tf_lowbit import inspection
from tf_lowbit.compat import CustomScaleLayer, keras
from tf_lowbit.scheme import graph, registry

LAYER = "layer"
BLOCK = "block"
# What `x + y` becomes in a functional model.
_SUMS = ("__operators__.add", "math.add", "math.add_n")


class Unit(NamedTuple):
    """A part of a network that is quantized, or not, as one.

    Attributes:
        name: of its layer, of the Add that ends its block, or the pattern that it is.
        tensors: its quantizers, of weights and of activations.
    """

    name: str
    tensors: tuple[inspection.QuantizedTensor, ...]


def find_units(model: keras.Model, unit: str | Sequence[str] = LAYER) -> list[Unit]:
    """Divides a network's quantizers into units.

    A unit holds whole weight layers. An activation quantizer belongs to the unit of
    the first weight layer that reads it, in the graph's order; a residual one to that
    of the last weight layer in front of it.

    Args:
        model: what `quantize` made.
        unit: "layer": each weight layer is a unit. "block": so is each residual block
            (`residual_blocks`); layers outside of blocks stand alone. Or a list of
            regular expressions, each a unit of the layers whose whole name it
            matches (the first match wins); layers without a match stand alone.

    Returns:
        The units that hold a quantizer, in the graph's order.

    Raises:
        ValueError: if `unit` is something else, or a pattern matches no layer that
            is quantized.
    """
    check_unit(unit)
    readers: dict[str, str] = {}
    for reader, sources in inspection.input_activations(model).items():
        for source in sources:
            if source is not None:
                readers.setdefault(source.layer.name, reader)
    tensors = inspection.require_quantized(model)
    in_front = _last_weight_layers(model)
    owners = {
        tensor.name: (in_front if tensor.is_residual else readers).get(
            tensor.layer.name, tensor.layer.name
        )
        for tensor in tensors
    }
    unit_of = _unit_names(model, unit, owners.values())
    units: dict[str, list] = {}
    for tensor in sorted(tensors, key=_graph_order(model, owners)):
        owner = owners[tensor.name]
        units.setdefault(unit_of.get(owner, owner), []).append(tensor)
    return [Unit(name, tuple(members)) for name, members in units.items()]


def check_unit(unit) -> None:
    """Refuses what is no setting for `unit`, whatever the network.

    Raises:
        ValueError: if it is neither "layer" nor "block" nor a list of patterns.
    """

    def is_pattern(pattern):
        try:
            return isinstance(pattern, str) and bool(re.compile(pattern))
        except re.error:
            return False

    is_list = isinstance(unit, list | tuple) and all(map(is_pattern, unit))
    if not is_list and unit not in (LAYER, BLOCK):
        raise ValueError(
            f'unit must be "{LAYER}", "{BLOCK}" or a list of patterns of layer names. '
            f"Received: unit={unit!r}"
        )


def residual_blocks(model: keras.Model) -> dict[str, frozenset[str]]:
    """The residual blocks of a network, found from its graph.

    A block ends where branches that share an origin are added (`Add`, `x + y`,
    `tf.add_n`). It
    holds what lies on some branch and not on all of them. A block within another one
    is a block of its own.

    Args:
        model: a functional model.

    Returns:
        Name of the layer that adds -> names of the block's weight layers. No layer is
        in two blocks.
    """
    behind: dict[int, frozenset] = {}  # Of each tensor: the nodes that it depends on.
    blocks: dict[str, frozenset[str]] = {}
    taken: set[str] = set()
    for node in graph.nodes(model):
        branches = [behind[id(tensor)] for tensor in node.keras_inputs]
        if _is_sum(node.layer) and len(branches) > 1:
            shared = frozenset.intersection(*branches)
            members = frozenset(
                layer.name
                for layer in (frozenset.union(*branches) - shared)
                if registry.kernels(inspection.wrapped_layer(layer))
            )
            members -= taken
            if shared and members:
                blocks[node.layer.name] = members
                taken |= members
        reached = frozenset([node.layer]).union(*branches)
        for tensor in graph.outputs_of(node):
            behind[id(tensor)] = reached
    return blocks


def _is_sum(layer) -> bool:
    return isinstance(layer, keras.layers.Add | CustomScaleLayer) or (
        getattr(layer, "symbol", None) in _SUMS
    )


def _unit_names(model, unit, owners: Iterable[str]) -> dict[str, str]:
    """Layer name -> name of its unit, for those that do not stand alone."""
    if unit == LAYER:
        return {}
    if unit == BLOCK:
        return {
            layer: name
            for name, layers in residual_blocks(model).items()
            for layer in layers
        }
    names = {
        owner: next((p for p in unit if re.fullmatch(p, owner)), owner)
        for owner in owners
    }
    unused = [pattern for pattern in unit if pattern not in names.values()]
    if unused:
        raise ValueError(
            "Each pattern of unit must match a quantized layer. Received: "
            f"{unused}, with the layers {sorted(names)}"
        )
    return names


def _last_weight_layers(model) -> dict[str, str]:
    """Layer name -> name of the weight layer that is called last in front of it."""
    position: dict[str, int] = {}
    behind: dict[int, str] = {}  # Of each tensor: that layer, itself included.
    found: dict[str, str] = {}
    for index, node in enumerate(graph.nodes(model)):
        name = node.layer.name
        names = [behind[id(t)] for t in node.keras_inputs if id(t) in behind]
        latest = max(names, key=position.__getitem__, default=None)
        if latest is not None:
            found.setdefault(name, latest)
        if registry.kernels(inspection.wrapped_layer(node.layer)):
            latest, position[name] = name, index
        if latest is not None:
            behind |= {id(tensor): latest for tensor in graph.outputs_of(node)}
    return found


def _graph_order(model, owners):
    """A sort key: where a quantizer's weight layer is first called."""
    position: dict[str, int] = {}
    for index, node in enumerate(graph.calls(model)):
        position.setdefault(node.layer.name, index)
    return lambda tensor: position[owners[tensor.name]]
