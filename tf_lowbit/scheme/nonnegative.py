"""Finds tensors of a float network that are never negative."""

from tf_lowbit.compat import KerasTensor, keras, tf
from tf_lowbit.network import graph, layer_registry, passthrough


def is_nonnegative(tensor: KerasTensor) -> bool:
    """Tells whether a Keras tensor of a functional float model is never negative.

    Returns False where the layers do not show it.
    """
    known: dict[int, bool] = {}
    # A stack, because recursion fails in deep networks.
    waiting = [tensor]
    while waiting:
        node = graph.producer(waiting[-1])
        is_sure = _is_sure(node, waiting[-1])
        keeps = not is_sure and passthrough.kept(node) >= passthrough.Kept.SIGN
        sources = passthrough.sources(node) if keeps else []
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
    if type(layer) is keras.layers.Activation or layer_registry.kernels(layer):
        return passthrough.is_nonnegative_function(getattr(layer, "activation", None))
    return not node.is_input and passthrough.makes_nonnegative(node)
