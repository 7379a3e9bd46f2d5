"""Multi-head attention as dense layers, matrix products and a softmax."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tf_lowbit.compat import KerasTensor, Node, keras
from tf_lowbit.export.lowering.recurrent import joined
from tf_lowbit.export.types import refusal

_layers = keras.layers


def require_plain(node: Node, layer: keras.layers.Layer) -> None:
    """Raises `ExportError` for attention with a mask, or not over series."""
    tensors = [id(t) for t in node.keras_inputs]
    positions = {f"argument {i}": v for i, v in enumerate(node.call_args[3:], 3)}
    masks = [
        name
        for name, value in {**positions, **node.call_kwargs}.items()
        if value is not None and value is not False and id(value) not in tensors
    ]
    if masks or any(len(t.shape) != 3 for t in node.keras_inputs):
        shapes = [tuple(tensor.shape) for tensor in node.keras_inputs]
        raise refusal(
            layer,
            "Attention must be over series, (batch, steps, features), without a mask",
            "put a Reshape in front, and call it without attention_mask, "
            "use_causal_mask and return_attention_scores",
            f"called with {shapes} and {masks}",
        )


def split(
    layer: Any, args: tuple, kwargs: dict, name: str, free_name: Callable[[str], str]
) -> KerasTensor:
    """Computes a built `MultiHeadAttention` (arXiv:1706.03762) by stock layers.

    The last layer has the name; `free_name` gives each other layer its name.
    """
    named = dict(zip(("query", "value", "key"), args, strict=False)) | kwargs
    query, value, key = named["query"], named["value"], named.get("key")
    key = value if key is None else key
    heads = []
    for head in range(layer._num_heads):
        # The weights absorb the scale 1 / sqrt(d).
        scale = 1 / math.sqrt(layer._key_dim)
        q = _projected(layer._query_dense, query, head, free_name, scale)
        k = _projected(layer._key_dense, key, head, free_name)
        v = _projected(layer._value_dense, value, head, free_name)
        scores = _layers.Dot(axes=(2, 2), name=free_name("scores"))([q, k])
        scores = _layers.Softmax(name=free_name("softmax"))(scores)
        heads.append(_layers.Dot(axes=(2, 1), name=free_name("values"))([scores, v]))
    together = joined(heads, -1, free_name("heads"), free_name)
    output = layer._output_dense
    kernel = output.kernel.numpy()
    kernel = kernel.reshape(-1, kernel.shape[-1])
    bias = None if output.bias is None else output.bias.numpy()
    return _dense(name, together, kernel, bias)


def _projected(dense, x, head, free_name, factor=1.0):
    """One head's projection of a query, key or value."""
    kernel = dense.kernel.numpy()[:, head] * np.float32(factor)
    bias = None if dense.bias is None else dense.bias.numpy()[head] * np.float32(factor)
    return _dense(free_name("projected"), x, kernel, bias)


def _dense(name, x, kernel, bias):
    made = _layers.Dense(kernel.shape[-1], use_bias=bias is not None, name=name)
    outputs = made(x)
    made.set_weights([kernel] if bias is None else [kernel, bias])
    return outputs
