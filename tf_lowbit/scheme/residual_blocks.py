"""Residual blocks: finds the tensors that are rounded to 8 bits, and the shortcuts.

An int8 network holds the inputs and outputs of an Add in int8. In training, quantizers
on these tensors round the same way, so that training sees the rounding.
"""

from collections.abc import Container
from typing import Any, NamedTuple

from tf_lowbit.compat import keras
from tf_lowbit.core import checks, grid
from tf_lowbit.network import graph, layer_registry, passthrough
from tf_lowbit.quantizers import residual


def validate_residual_bits(residual_bits: int | None) -> int | None:
    """Returns `residual_bits`.

    Raises:
        ValueError: If it is neither the integer 8 nor None.
    """
    if residual_bits is not None and not residual.is_residual_bits(residual_bits):
        raise ValueError(
            f"residual_bits must be {residual.RESIDUAL_BITS} or None: an int8 Add "
            "clamps only at the range of int8. "
            f"Received: residual_bits={residual_bits!r}"
        )
    return residual_bits


def validate_shortcut_bits(shortcut_bits: Any) -> int | None:
    """Returns `shortcut_bits`.

    Raises:
        ValueError: If it is neither an integer from 1 to 8 nor None.
    """
    if shortcut_bits is not None and not (
        checks.is_integer(shortcut_bits) and 1 <= shortcut_bits <= grid.MAX_BITS
    ):
        raise ValueError(
            f"shortcut_bits must be an integer from 1 to {grid.MAX_BITS}, or None for "
            f"the bits of the rules. Received: shortcut_bits={shortcut_bits!r}"
        )
    return shortcut_bits


class Shortcut(NamedTuple):
    """The short branch of a residual block.

    Attributes:
        node: Call of the shortcut's weight layer, or of the sum for an identity
            shortcut. It reads the block's input.
        tensor: Tensor that it reads.
        layer: Name of the weight layer; None for the identity.
    """

    node: object
    tensor: object
    layer: str | None


def find_shortcuts(model: keras.Model) -> list[Shortcut]:
    """Finds the shortcuts of a float network's residual blocks, in the graph's order.

    A block ends in a sum of tensors with a common origin. A branch from origin to sum
    is a shortcut if it has at most one weight layer and another branch has more.

    Args:
        model: Functional model.
    """
    behind: dict[int, frozenset] = {}  # Tensor -> the nodes that it depends on.
    of_node = {id(node): node for node in graph.nodes(model)}
    found: dict[int, Shortcut] = {}
    for node in graph.nodes(model):
        branches = [behind[id(tensor)] for tensor in node.keras_inputs]
        if layer_registry.is_sum(node.layer) and len(branches) > 1:
            origin = frozenset.intersection(*branches)
            weighted = [
                [of_node[n] for n in branch - origin if _has_kernels(of_node[n])]
                for branch in branches
            ]
            longest = max(map(len, weighted))
            for tensor, own in zip(node.keras_inputs, weighted, strict=True):
                if not origin or len(own) == longest:
                    continue
                if not own:
                    found.setdefault(id(node), Shortcut(node, tensor, None))
                elif len(own) == 1:
                    (conv,) = own
                    shortcut = Shortcut(conv, conv.keras_inputs[0], conv.layer.name)
                    found.setdefault(id(conv), shortcut)
        reached = frozenset([id(node)]).union(*branches)
        for tensor in graph.outputs_of(node):
            behind[id(tensor)] = reached
    return list(found.values())


def _has_kernels(node) -> bool:
    return bool(layer_registry.kernels(node.layer))


def find_residual_tensors(
    model: keras.Model, weights: Container[str], activations: Container[str]
) -> list:
    """Finds the tensors that get a residual quantizer, in the graph's order.

    They are around each Add that reads a quantized weight layer, directly or through
    normalization, other Adds or layers that keep a grid (dropout, max pooling):

    - each input that is not yet on the grid of a quantized ReLU or of another residual
      quantizer;
    - the output, unless its only reader is a quantized ReLU. The int8 Add then outputs
      that grid directly.

    Args:
        model: Functional model whose ReLUs are separate layers.
        weights: Names of the layers whose weights are quantized.
        activations: Names of the ReLU layers that are quantized.

    Returns:
        Keras tensors of the model, each once.
    """
    readers = graph.readers(model)
    outputs = {id(tensor) for tensor in model.outputs}
    found: list = []
    on_grid: set[int] = set()
    reached: set[int] = set()  # Outputs of quantized weight layers, passed on.

    def quantize(tensor):
        found.append(tensor)
        on_grid.add(id(tensor))

    for node in graph.calls(model):
        layer, inputs = node.layer, passthrough.sources(node)
        made = {id(tensor) for tensor in graph.outputs_of(node)}
        is_add, keeps_grid = layer_registry.is_add(layer), passthrough.keeps_grid(node)
        passes_on = (
            is_add or keeps_grid or isinstance(layer, layer_registry.BATCH_NORMS)
        )
        is_reached = any(id(tensor) in reached for tensor in inputs)
        if layer.name in weights or (passes_on and is_reached):
            reached |= made
        is_kept = keeps_grid and all(id(tensor) in on_grid for tensor in inputs)
        if layer.name in activations or is_kept:
            on_grid |= made
        if is_add and is_reached:
            for tensor in inputs:
                if id(tensor) not in on_grid:
                    quantize(tensor)
            (output,) = graph.outputs_of(node)
            read_by = {reader.layer.name for reader in readers.get(id(output), ())}
            (reader,) = read_by if len(read_by) == 1 else (None,)
            if id(output) in outputs or reader not in activations:
                quantize(output)
    return found
