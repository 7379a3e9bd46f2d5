"""Which quantizers round in the step that is being built.

A network's bits are variables; a *draw* leaves them alone and says, for one call of
the model, which quantizers pass their values unrounded. So the network keeps its bits,
and whatever calls it without a draw (evaluation, export) finds it fully quantized.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tf_lowbit.compat import tf
from tf_lowbit.core import grid


class _Sample(NamedTuple):
    is_quantized: Mapping[int, tf.Tensor]
    raw_weights: bool


# A context variable, since each replica of a strategy builds its step in a thread of
# its own.
_SAMPLE = contextvars.ContextVar("sample", default=None)
_OPEN = contextvars.ContextVar("open", default={})  # noqa: B039 (never changed)


@contextlib.contextmanager
def sampled(draws, raw_weights: bool = False) -> Iterator[None]:
    """Lets quantizers round only where their draw says so, while the context lasts.

    A context within another one replaces it until it ends.

    Args:
        draws: iterable of (variables, is_quantized): what a quantizer's `build`
            returned, and a scalar bool tensor. Quantizers that are not in it round.
        raw_weights: a weight that is not rounded passes as it is, not as the
            quantizer scales and clips it (an ablation).
    """
    table = {_key(variables): is_quantized for variables, is_quantized in draws}
    token = _SAMPLE.set(_Sample(table, raw_weights))
    try:
        yield
    finally:
        _SAMPLE.reset(token)


@contextlib.contextmanager
def opened(quantizers) -> Iterator[None]:
    """Lets quantizers neither round nor clip at their ranges, while the context lasts.

    Args:
        quantizers: iterable of (variables, ceiling): what a quantizer's `build`
            returned, and the value that the activation in its place clips at, or None.
    """
    token = _OPEN.set({_key(variables): top for variables, top in quantizers})
    try:
        yield
    finally:
        _OPEN.reset(token)


def is_open(variables: dict) -> bool:
    """Whether a quantizer neither rounds nor clips now."""
    return _key(variables) in _OPEN.get()


def ceiling(variables: dict) -> float | None:
    """What an open quantizer clips at; None for nothing."""
    return _OPEN.get()[_key(variables)]


def drawn(variables: dict):
    """The draw that holds for a quantizer now: a bool tensor, or None."""
    sample = _SAMPLE.get()
    return None if sample is None else sample.is_quantized.get(_key(variables))


def passes_raw_weights() -> bool:
    """Whether weights that are not rounded are to pass as they are."""
    sample = _SAMPLE.get()
    return sample is not None and sample.raw_weights


def with_rounding_bits(variables: dict, is_quantized) -> dict:
    """The variables with `rounding_bits`: the bits, or "not rounded" where drawn so."""
    bits = tf.convert_to_tensor(variables["bits"])
    unrounded = tf.constant(grid.UNROUNDED_BITS[-1], bits.dtype)
    return {**variables, "rounding_bits": tf.where(is_quantized, bits, unrounded)}


def _key(variables: dict) -> int:
    return id(variables["bits"])
