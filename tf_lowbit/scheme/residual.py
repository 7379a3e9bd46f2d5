"""Where residual streams are rounded to 8 bits: around the Adds (ours).

An int8 network holds what an Add reads and puts out in int8. The quantizers that
stand on these tensors in training do the same, and so the rounding is trained with.
"""

from collections.abc import Container

from tf_lowbit.compat import keras
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
