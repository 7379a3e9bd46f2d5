"""Which tensors of a float network are never negative, as far as its layers tell."""

from tf_lowbit.compat import keras, tf
from tf_lowbit.scheme import graph, passing, registry


def is_nonnegative(tensor) -> bool:
    """Whether a Keras tensor of a float network never holds a negative number.

    Args:
        tensor: of a functional model.

    Returns:
        False also where its layers do not tell.
    """
    known: dict[int, bool] = {}
    # Those that a tensor is made of come before it: no recursion, however deep.
    waiting = [tensor]
    while waiting:
        node = graph.producer(waiting[-1])
        is_sure = _is_sure(node, waiting[-1])
        keeps = not is_sure and passing.kept(node) >= passing.Kept.SIGN
        sources = passing.sources(node) if keeps else []
        missing = [t for t in sources if id(t) not in known]
        if missing:
            waiting += missing
            continue
        is_kept = bool(sources) and all(known[id(t)] for t in sources)
        known[id(waiting.pop())] = is_sure or is_kept
    return known[id(tensor)]


def _is_sure(node, tensor) -> bool:
    if tf.as_dtype(tensor.dtype).is_unsigned:
        return True
    layer = node.layer
    if type(layer) is keras.layers.Activation or registry.kernels(layer):
        return passing.is_nonnegative_function(getattr(layer, "activation", None))
    return not node.is_input and passing.makes_nonnegative(node)
