"""Units of stochastic precision: parts of a network that are drawn together."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tf_lowbit.compat import CustomScaleLayer, keras
from tf_lowbit.network import graph, inspection, layer_registry

LAYER = "layer"
BLOCK = "block"


class Unit(NamedTuple):
    """A part of a network whose quantizers are on or off together.

    Attributes:
        name: Its pattern, or the name of its layer or of the sum that ends its block.
        tensors: Its weight and activation quantizers.
    """

    name: str
    tensors: tuple[inspection.QuantizedTensor, ...]


def find_units(model: keras.Model, unit: str | Sequence[str] = LAYER) -> list[Unit]:
    """Divides a network's quantizers into units.

    A weight layer is in one unit with all its weights. An activation quantizer belongs
    to the unit of the first weight layer that reads it, in the graph's order. A
    residual quantizer belongs to the unit of the last weight layer in front of it.

    Args:
        model: Quantized model.
        unit: "layer": each weight layer is a unit. "block": each residual block
            (`residual_blocks`) is a unit, and each layer outside of blocks. Or a list
            of regular expressions: all layers whose whole name matches one are a unit,
            by the first match, and each other layer is a unit.

    Returns:
        The units that hold a quantizer, in the graph's order.

    Raises:
        ValueError: If a pattern is no layer's first match.
    """
    tensors = inspection.require_quantized(model)
    owners = _owners(model, tensors)
    names = _unit_names(model, unit, owners.values())
    position: dict[str, int] = {}
    for index, node in enumerate(graph.calls(model)):
        position.setdefault(node.layer.name, index)
    units: dict[str, list] = {}
    for tensor in sorted(tensors, key=lambda tensor: position[owners[tensor.name]]):
        owner = owners[tensor.name]
        units.setdefault(names.get(owner, owner), []).append(tensor)
    return [Unit(name, tuple(members)) for name, members in units.items()]


def check_unit(unit: Any) -> None:
    """Checks `unit` without a network; raises ValueError."""

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
    """Finds the residual blocks of a network from its graph.

    A block ends where branches with a common origin are added (`Add`, `x + y`,
    `tf.add_n`). It holds the layers that are on some, but not on all, of the branches.
    The layers of an inner block do not belong to the outer one.

    Returns:
        Name of the adding layer -> names of the block's weight layers. No layer is in
        two blocks.
    """
    ancestors: dict[int, frozenset] = {}  # Tensor -> layers that it depends on.
    blocks: dict[str, frozenset[str]] = {}
    taken: set[str] = set()
    for node in graph.nodes(model):
        branches = [ancestors[id(tensor)] for tensor in node.keras_inputs]
        is_kind_of_add = isinstance(node.layer, keras.layers.Add | CustomScaleLayer)
        is_sum = is_kind_of_add or layer_registry.is_sum(node.layer)
        if is_sum and len(branches) > 1:
            shared = frozenset.intersection(*branches)
            members = frozenset(
                layer.name
                for layer in (frozenset.union(*branches) - shared)
                if layer_registry.kernels(inspection.wrapped_layer(layer))
            )
            members -= taken
            if shared and members:
                blocks[node.layer.name] = members
                taken |= members
        reached = frozenset([node.layer]).union(*branches)
        for tensor in graph.outputs_of(node):
            ancestors[id(tensor)] = reached
    return blocks


def _unit_names(model, unit, owners: Iterable[str]) -> dict[str, str]:
    """Returns layer name -> unit name, for units of patterns and blocks."""
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


def _owners(model, tensors) -> dict[str, str]:
    """Returns quantizer name -> name of the weight layer whose unit it belongs to."""
    readers: dict[str, str] = {}
    for reader, sources in inspection.input_activations(model).items():
        for source in sources:
            if source is not None:
                readers.setdefault(source.layer.name, reader)
    in_front = _last_weight_layers(model)
    return {
        tensor.name: (in_front if tensor.is_residual else readers).get(
            tensor.layer.name, tensor.layer.name
        )
        for tensor in tensors
    }


def _last_weight_layers(model) -> dict[str, str]:
    """Returns layer name -> name of the last weight layer in front of it."""
    position: dict[str, int] = {}
    last: dict[int, str] = {}  # Tensor -> last weight layer that it depends on.
    found: dict[str, str] = {}
    for index, node in enumerate(graph.nodes(model)):
        name = node.layer.name
        names = [last[id(t)] for t in node.keras_inputs if id(t) in last]
        latest = max(names, key=position.__getitem__, default=None)
        if latest is not None:
            found.setdefault(name, latest)
        if layer_registry.kernels(inspection.wrapped_layer(node.layer)):
            latest, position[name] = name, index
        if latest is not None:
            last |= {id(tensor): latest for tensor in graph.outputs_of(node)}
    return found
