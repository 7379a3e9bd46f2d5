"""Residual blocks: where streams are rounded to 8 bits, and what is a shortcut (ours).

An int8 network holds what an Add reads and puts out in int8. The quantizers that
stand on these tensors in training do the same, and so the rounding is trained with.
"""

import numbers
from collections.abc import Container
from typing import NamedTuple

from tf_lowbit.compat import keras
from tf_lowbit.core import grid
from tf_lowbit.quantizers import residual
from tf_lowbit.scheme import graph, passing, registry


def validate_bits(residual_bits) -> int | None:
    """Returns `residual_bits`, or raises an error that says what is allowed.

    Raises:
        ValueError: for anything but the integer 8 and None.
    """
    if residual_bits is not None and not residual.is_residual_bits(residual_bits):
        raise ValueError(
            f"residual_bits must be {residual.RESIDUAL_BITS} or None: an int8 Add "
            "clamps at int8's own range, and no other width has its clamps there. "
            f"Received: residual_bits={residual_bits!r}"
        )
    return residual_bits


def validate_shortcut_bits(shortcut_bits) -> int | None:
    """Returns `shortcut_bits`, or raises an error that says what is allowed.

    Raises:
        ValueError: for anything but an integer from 1 to 8 and None.
    """
    is_integer = isinstance(shortcut_bits, numbers.Integral)
    is_integer = is_integer and not isinstance(shortcut_bits, bool)
    if shortcut_bits is not None and not (
        is_integer and 1 <= shortcut_bits <= grid.MAX_BITS
    ):
        raise ValueError(
            f"shortcut_bits must be an integer from 1 to {grid.MAX_BITS}, or None for "
            f"the bits of the rules. Received: shortcut_bits={shortcut_bits!r}"
        )
    return shortcut_bits


class Shortcut(NamedTuple):
    """The short branch of a residual block.

    Attributes:
        node: the call that reads the block's input: of the shortcut's weight layer, or
            of the sum where the shortcut is the identity.
        tensor: what it reads.
        layer: name of the weight layer; None for the identity.
    """

    node: object
    tensor: object
    layer: str | None


def find_shortcuts(model: keras.Model) -> list[Shortcut]:
    """The shortcuts of a float network's residual blocks, in the graph's order.

    A block ends in a sum of tensors that share an origin. Its shortcuts are the
    branches between origin and sum with one weight layer or none, where another branch
    has more of them.

    Args:
        model: functional model.
    """
    behind: dict[int, frozenset] = {}  # Of each tensor: the nodes that it depends on.
    of_node = {id(node): node for node in graph.nodes(model)}
    found: dict[int, Shortcut] = {}
    for node in graph.nodes(model):
        branches = [behind[id(tensor)] for tensor in node.keras_inputs]
        if registry.is_sum(node.layer) and len(branches) > 1:
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
    return bool(registry.kernels(node.layer))


def find_tensors(
    model: keras.Model, weights: Container[str], activations: Container[str]
) -> list:
    """The tensors that get a residual quantizer, in the graph's order.

    They surround each Add that reads a quantized weight layer, be it through
    normalisation, other Adds or layers that keep a grid (dropout, maximum pooling):

    - each input, unless it is on the grid of a quantized ReLU or of another residual
      quantizer already;
    - the output, unless one quantized ReLU alone reads it, whose grid the int8 Add
      then puts out itself.

    Args:
        model: functional model whose ReLUs are layers of their own.
        weights: names of the layers whose weights are quantized.
        activations: names of the ReLU layers that are quantized.

    Returns:
        Keras tensors of the model, none twice.
    """
    readers = graph.readers(model)
    outputs = {id(tensor) for tensor in model.outputs}
    found: dict[int, object] = {}
    on_grid: set[int] = set()
    reached: set[int] = set()  # What a quantized weight layer puts out, passed on.

    def quantize(tensor):
        found[id(tensor)] = tensor
        on_grid.add(id(tensor))

    for node in graph.calls(model):
        layer, inputs = node.layer, passing.sources(node)
        made = {id(tensor) for tensor in graph.outputs_of(node)}
        is_add, keeps_grid = registry.is_add(layer), passing.keeps_grid(node)
        passes_on = is_add or keeps_grid or isinstance(layer, registry.BATCH_NORMS)
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
    return list(found.values())
