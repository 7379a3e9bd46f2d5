"""Lowering of layers with several inputs: sums, products and concatenations."""

import math

from tf_lowbit.compat import Node, keras
from tf_lowbit.core import ratios
from tf_lowbit.export.integer import int8_grids, twin
from tf_lowbit.export.lowering import elementwise, forms, stock_layers
from tf_lowbit.export.lowering.builder import Builder, Value, Values, copy_of

_layers = keras.layers
# Relative difference of equal steps: a few float32 roundings.
_SAME = 1e-5


def add(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Adds codes, or floats if a term has no codes."""
    factors = elementwise.factors(node)
    sources = [
        source if factor == 1.0 else _scaled(builder, source, factor, value.name)
        for source, factor in zip(sources, factors, strict=True)
    ]
    if not all(builder.can_be_codes(s) for s in sources):
        made = _layers.Add(name=builder.name(value.name), dtype="float32")
        value.values = made([builder.values(s) for s in sources])
        return
    wanted = builder.only_quantizer(value)
    if wanted is None:
        step = builder.eight_bit_step(value)
        if settled := [s for s in sources if s.codes is not None]:
            first = settled[0].grid.step
            # If the sum is far larger than its first term, the term is requantized.
            if first / step > 0.9 * float(ratios.RATIOS[0]):
                step = first / float(ratios.nearest_ratio(first / step))
        wanted = int8_grids.grid(step, *int8_grids.INT8)
        builder.note_eight_bits(value)
    terms, found = [], []
    for index, source in enumerate(sources):
        codes, ratio = _term(builder, source, wanted, f"{value.name}_input{index + 1}")
        terms.append(codes)
        found.append(ratio)
    made = twin.IntegerAdd(wanted, found, name=builder.name(value.name))
    value.codes, value.grid = made(terms), wanted


def multiply(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Multiplies in float."""
    del node
    layer = _layers.Multiply(name=builder.name(value.name), dtype="float32")
    value.values = layer([builder.values(source) for source in sources])


def dot(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Multiplies matrices in float."""
    layer = _layers.Dot(
        axes=forms.dot_axes(node.layer), name=builder.name(value.name), dtype="float32"
    )
    value.values = layer([builder.values(source) for source in sources])


def concatenate(builder: Builder, value: Value, sources: Values, node: Node) -> None:
    """Concatenates codes on one grid, or floats if an input has no codes."""
    layer = stock_layers.layer_of(node)
    if not all(builder.can_be_codes(s) for s in sources):
        made = copy_of(layer, builder.name(value.name))
        value.values = made([builder.values(s) for s in sources])
        return
    known = [s.grid for s in sources if s.codes is not None]
    if len(known) == len(sources) and all(g.looks_like(known[0]) for g in known):
        wanted = known[0]
    else:
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
    """A tensor times a factor, as a term of the named sum."""
    linear = builder.scaled(source, factor)
    return Value(source.tensor, f"{name}_scaled", source.factor * factor, linear)


def _term(builder, source, wanted, name):
    """A term's codes, and the ratio of its step to the sum's step."""
    if source.codes is None:
        least = builder.eight_bit_step(source)
        ratio = ratios.at_least_ratio(least / wanted.step)
        grid = int8_grids.grid(wanted.step * float(ratio), *int8_grids.INT8)
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
    # Requantize the term to 8 bits, with a step that has an exact ratio.
    largest = max(-source.grid.low, source.grid.high) * source.grid.step
    ratio = ratios.at_least_ratio(largest / 127 / wanted.step)
    grid = int8_grids.grid(wanted.step * float(ratio), *int8_grids.INT8)
    moved = Value(source.tensor, name)
    builder.emit_integer(moved, builder.rescale(source), grid)
    builder.note(
        name,
        f"{source.name} is rounded to a step that is {ratio} of the sum's: an int8 Add "
        "is not exact at the ratio of its own step. If it is a residual quantizer "
        "that drifted in training, tie the steps around sums "
        "(tf_lowbit.tie_residuals) before the last epochs. The steps of quantized "
        "ReLUs are never tied",
    )
    return moved.codes, ratio
