"""Draws: which quantizers round in one call of a model.

A draw does not change the variables `bits`. It sets, for one call, which quantizers
pass their values without rounding. A call without a draw (evaluation, export) is fully
quantized.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from tf_lowbit.compat import tf
from tf_lowbit.core import grid


class _Sample(NamedTuple):
    is_quantized: Mapping[int, tf.Tensor]
    raw_weights: bool


# Context variables, because each replica of a strategy traces in its own thread.
_SAMPLE: contextvars.ContextVar[_Sample | None] = contextvars.ContextVar(
    "sample", default=None
)
_OPEN: contextvars.ContextVar[dict[int, float | None]] = contextvars.ContextVar(
    "open",
    default={},  # noqa: B039 (never mutated)
)


@contextlib.contextmanager
def sampled(
    draws: Iterable[tuple[dict[str, tf.Variable], tf.Tensor]], raw_weights: bool = False
) -> Iterator[None]:
    """A context in which only quantizers round that are drawn as quantized.

    An inner context replaces the outer one until it ends.

    Args:
        draws: Iterable of (variables, is_quantized): a quantizer's variables and a
            scalar bool tensor. Quantizers that are not listed round.
        raw_weights: Whether weights that are not rounded are not scaled or clipped
            either (an ablation).
    """
    table = {_key(variables): is_quantized for variables, is_quantized in draws}
    token = _SAMPLE.set(_Sample(table, raw_weights))
    try:
        yield
    finally:
        _SAMPLE.reset(token)


@contextlib.contextmanager
def opened(
    quantizers: Iterable[tuple[dict[str, tf.Variable], float | None]],
) -> Iterator[None]:
    """A context in which the given quantizers neither round nor clip at their ranges.

    Args:
        quantizers: Iterable of (variables, ceiling); the ceiling is the value at which
            the replaced activation clips, or None.
    """
    token = _OPEN.set({_key(variables): top for variables, top in quantizers})
    try:
        yield
    finally:
        _OPEN.reset(token)


def is_open(variables: dict) -> bool:
    """Tells whether a quantizer is in the context of `opened`."""
    return _key(variables) in _OPEN.get()


def ceiling(variables: dict) -> float | None:
    """Returns the value at which an open quantizer clips; None for no clip."""
    return _OPEN.get()[_key(variables)]


def drawn(variables: dict[str, tf.Variable]) -> tf.Tensor | None:
    """Returns the draw that applies to a quantizer now: a bool tensor, or None."""
    sample = _SAMPLE.get()
    return None if sample is None else sample.is_quantized.get(_key(variables))


def passes_raw_weights() -> bool:
    """Tells whether weights that are not rounded stay unchanged."""
    sample = _SAMPLE.get()
    return sample is not None and sample.raw_weights


def with_rounding_bits(
    variables: dict[str, tf.Variable], is_quantized: tf.Tensor
) -> dict:
    """Adds `rounding_bits` to the variables: the bits, or "not rounded" by the draw."""
    bits = tf.convert_to_tensor(variables["bits"])
    unrounded = tf.constant(grid.UNROUNDED_BITS[-1], bits.dtype)
    return {**variables, "rounding_bits": tf.where(is_quantized, bits, unrounded)}


def _key(variables: dict) -> int:
    return id(variables["bits"])
