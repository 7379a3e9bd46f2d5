"""Layers of several inputs in a twin: sums, products and concatenations."""

import math

from tf_lowbit.compat import keras
from tf_lowbit.core import ratios
from tf_lowbit.export import grids, twin
from tf_lowbit.export.building import Value, copy_of
from tf_lowbit.export.linear import ExportError

_layers = keras.layers
# Ratio of steps that counts as the same one: float32's resolution, some roundings over.
_SAME = 1e-5


def add(builder, value, sources, factors) -> None:
    """Codes of a sum, or floats where a term has no codes.

    Args:
        builder: of the twin.
        value: what the layer puts out; is set.
        sources: the tensors that are added.
        factors: what each is multiplied by first.

    Raises:
        ExportError: if more than two terms are codes.
    """
    sources = [
        source if factor == 1.0 else _scaled(builder, source, factor, value.name)
        for source, factor in zip(sources, factors, strict=True)
    ]
    if not all(builder.can_be_codes(s) for s in sources):
        made = _layers.Add(name=builder.name(value.name), dtype="float32")
        value.values = made([builder.values(s) for s in sources])
        return
    if len(sources) != 2:
        raise ExportError(
            "An integer Add must have two inputs; write it as several Adds. "
            f"Received: {value.name!r} with {len(sources)}"
        )
    target = builder.only_quantizer(value)
    settled = [s for s in sources if s.codes is not None]
    if target is not None:
        wanted = target
    else:
        step = builder.eight_bit_step(value)
        if settled:
            first = settled[0].grid.step
            # Of a sum far larger than its first term, that term moves instead.
            if first / step > 0.9 * float(ratios.RATIOS[0]):
                step = first / float(ratios.nearest_ratio(first / step))
        wanted = grids.grid(step, *grids.INT8)
        builder.note_eight_bits(value)
    terms, found = [], []
    for index, source in enumerate(sources):
        codes, ratio = _term(builder, source, wanted, f"{value.name}_input{index + 1}")
        terms.append(codes)
        found.append(ratio)
    made = twin.IntegerAdd(wanted, found, name=builder.name(value.name))
    value.codes, value.grid = made(terms), wanted


def multiply(builder, value, sources) -> None:
    """Floats of a product; products of codes are not made.

    Args:
        builder: of the twin.
        value: what the layer puts out; is set.
        sources: the factors.
    """

    layer = _layers.Multiply(name=builder.name(value.name), dtype="float32")
    value.values = layer([builder.values(source) for source in sources])


def concatenate(builder, value, sources, layer) -> None:
    """Codes on one grid, or floats where an input has no codes.

    Args:
        builder: of the twin.
        value: what the layer puts out; is set.
        sources: the inputs.
        layer: the trained network's.
    """

    if not all(builder.can_be_codes(s) for s in sources):
        made = copy_of(layer, builder.name(value.name))
        value.values = made([builder.values(s) for s in sources])
        return
    known = [s.grid for s in sources if s.codes is not None]
    are_alike = known and all(g.looks_like(known[0]) for g in known)
    wanted = known[0] if are_alike else None
    if wanted is None or len(known) < len(sources):
        wanted = builder.eight_bit_grid(value)
        builder.note_eight_bits(value)
    terms = []
    for index, source in enumerate(sources):
        if source.codes is not None and source.grid.looks_like(wanted):
            terms.append(source.codes)
            continue
        moved = Value(source.tensor, f"{value.name}_input{index + 1}")
        pending = source.linear if source.codes is None else None
        if pending is None or not builder.may_consume(source):
            pending = builder.rescale(source)
        builder.emit_integer(moved, pending, wanted, in_place=True)
        terms.append(moved.codes)
    made = copy_of(layer, builder.name(value.name))
    value.codes, value.grid = made(terms), wanted


def _scaled(builder, source, factor, name):
    """A tensor times a number, as a term of a sum of the given name."""
    linear = builder.scaled(source, factor)
    return Value(source.tensor, f"{name}_scaled", source.factor * factor, linear)


def _term(builder, source, wanted, name):
    """A term's codes, and its step divided by the sum's."""
    if source.codes is None:
        least = builder.eight_bit_step(source)
        ratio = ratios.at_least_ratio(least / wanted.step)
        grid = grids.grid(wanted.step * float(ratio), *grids.INT8)
        source.codes = builder.emit_integer(source, source.linear, grid)
        builder.note_eight_bits(source)
        return source.codes, ratio
    exact = source.grid.step / wanted.step
    ratio = ratios.nearest_ratio(exact)
    is_plain = math.isclose(
        source.grid.scale, source.grid.step, rel_tol=_SAME
    ) and math.isclose(wanted.scale, wanted.step, rel_tol=_SAME)
    if is_plain and math.isclose(float(ratio), exact, rel_tol=_SAME):
        return source.codes, ratio
    # Put on a grid that has an odd ratio; 8 bits of what were perhaps fewer.
    largest = max(-source.grid.low, source.grid.high) * source.grid.step
    ratio = ratios.at_least_ratio(largest / 127 / wanted.step)
    grid = grids.grid(wanted.step * float(ratio), *grids.INT8)
    moved = Value(source.tensor, name)
    builder.emit_integer(moved, builder.rescale(source), grid)
    builder.note(
        name,
        f"{source.name} is rounded to a step that is {ratio} of the sum's: an int8 Add "
        "does not take its own exactly. If it is a residual quantizer that drifted in "
        "training, tie the steps around sums (tf_lowbit.tie_residuals) before the last "
        "epochs; the steps of quantized ReLUs are never tied",
    )
    return moved.codes, ratio
