"""The twin against the trained network, tensor by tensor, on data.

The twin is made by the lowering, so a fault in it is in the file and in the twin alike:
only the trained network shows it.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_lowbit.compat import KerasTensor, Node, keras, tf
from tf_lowbit.export import layer_table
from tf_lowbit.export.integer import int8_grids, plain_layers, twin
from tf_lowbit.export.lowering import forms
from tf_lowbit.export.lowering.tensor_ranges import key
from tf_lowbit.export.lowering.walk import Snapped
from tf_lowbit.export.proof.verification import Agreement, Report
from tf_lowbit.network import graph, inspection
from tf_lowbit.quantizers import ACTIVATION, WEIGHT

# Floats of two orders of summation fall on both sides of a tie now and then, and an
# off-by-one accumulator is one level off. Of a tensor without a note so many codes may
# be other ones, and so many more than one level away.
_UNEQUAL, _FAR = 0.01, 0.001
_FLOAT_ERROR = 1e-3
# Behind a rounding to 8 bits: by how many of the grid's levels "far" is more (1 / 64 of
# the range; 1 / 16 of a sum's, whose terms have coarser steps), how many may be so far,
# the mean difference in levels, clipped values.
_FAR_LEVELS, _FAR_EXPLAINED, _SHIFT, _CLIPPED = 64, 0.01, 0.5, 0.01
_FAR_LEVELS_OF_SUM = 16
_FLOAT_ERROR_EXPLAINED = 0.08
# A sum's step may be moved to a ratio of its terms', which clips its ends: beyond them
# by this part of the levels a value counts as clipped.
_OVER = 16
# Of a measured range, the share that data must reach.
_USED = 1 / 8
# With a larger multiplier some codes lie between two biases. A channel whose output
# never changes has a multiplier of 1, up to float32's rounding.
_STEEP = 1.001
# How far a value of the trained network may be from its code, or from a tie, in levels.
_ON_GRID = 1e-3
# So few elements may differ of any tensor.
_FEW = 2
# Of the notes' names: what a layer of several inputs reads, and parts of a layer.
_PART = re.compile(r"_(scaled|input\d+|codes|sum)$")


class Agreements:
    """Collects the agreement of every tensor that both networks have.

    Args:
        snapped: The twin, with its `tensors`.
        trained: The trained network.
    """

    def __init__(self, snapped: Snapped, trained: keras.Model):
        # Float16 is as coarse as a rounding to 8 bits.
        self._is_half = any(
            inspection.wrapped_layer(layer).compute_dtype in ("float16", "bfloat16")
            for layer in trained.layers
        )
        # With the tensors that the twin was made of.
        given, (trained, pairs) = trained, forms.split(trained)
        self._split = None
        if pairs:
            self._split = _Split(given, trained, pairs, self._is_half)
        self._twin = snapped.twin
        self._nodes = list(graph.calls(snapped.twin))
        self._noted = {
            name
            for note in snapped.notes
            for name in (note.layer, _PART.sub("", note.layer))
        }
        tensors = {
            key(tensor): tensor
            for node in graph.nodes(trained)
            for tensor in graph.outputs_of(node)
        }
        # A tensor of the twin may stand for several: the last is what it holds.
        made = {
            name: tensors[own]
            for own, name in snapped.tensors.items()
            if own in tensors
        }
        self._nodes_with = [n for n in self._nodes if n.layer.name in made]
        self._unrounded = _unrounded(trained, made)
        # One layer's name need not be unique among the outputs of one model.
        observed = [made[n.layer.name] for n in self._nodes_with]
        self._observer = keras.Model(
            trained.inputs, [observed, list(self._unrounded.values())]
        )
        self._rows = {}
        for node in self._nodes_with:
            grid, tensor = grid_of(node), made[node.layer.name]
            name = tensor._keras_history.layer.name
            levels = 0 if grid is None else grid.levels
            is_measured = key(tensor) in snapped.ranges
            # Of pixels the range is known, whatever the data reach.
            is_measured &= not _are_pixels(node, snapped.options)
            if isinstance(node.layer, plain_layers.ArgMax):
                levels = int(node.keras_inputs[0].shape[-1])
            row = Agreement(name, levels, is_measured, coarseness=_coarseness(node))
            if grid is not None and is_measured:
                low, high = snapped.ranges[key(tensor)]
                sides = 2 if grid.low < 0 else 1
                row.measured_levels = sides * max(high, -low) / grid.step
            self._rows[node.layer.name] = row

    def add(self, argument: Any, inputs: Sequence[np.ndarray], own: dict) -> None:
        """Adds one batch.

        Args:
            argument: What the trained network takes.
            inputs: The same as a list, in the twin's order.
            own: The twin's tensors from its own input on, by layer.
        """
        if self._split is not None:
            self._split.add(argument)
        found, unrounded = self._observer(argument, training=False)
        names = [node.layer.name for node in self._nodes_with]
        trained = _as_arrays(names, found)
        unrounded = _as_arrays(self._unrounded, unrounded)
        known = {
            id(t): tf.constant(v)
            for t, v in zip(self._twin.inputs, inputs, strict=True)
        }
        rounded = dict.fromkeys(known, self._is_half)
        for node in self._nodes:
            name, output = node.layer.name, graph.outputs_of(node)[0]
            read = [known[id(t)] for t in node.keras_inputs]
            made = node.layer(read[0] if len(read) == 1 else read)
            is_noted = name in self._noted or any(
                rounded[id(t)] for t in node.keras_inputs
            )
            row = self._rows.get(name)
            if row is not None:
                is_noted |= row.tensor in self._noted
                wanted = trained[name].reshape(made.shape)
                row.explained |= is_noted
                if isinstance(node.layer, plain_layers.ArgMax):
                    _add_classes(row, wanted, made.numpy(), read[0].numpy(), own[name])
                    made, is_exact = wanted, True
                elif row.levels:
                    made, is_exact = _add_codes(
                        row, node, wanted, made.numpy(), own[name], unrounded.get(name)
                    )
                else:
                    made, is_exact = _add_floats(row, wanted, made.numpy(), own[name])
                is_noted &= not is_exact
            known[id(output)] = tf.constant(made)
            rounded[id(output)] = is_noted or self._is_half

    def judge(self, report: Report) -> None:
        """Puts the rows into the report, and what diverges among its failures."""
        report.agreements = list(self._rows.values())
        if self._split is not None:
            report.failures += self._split.problems()
        if report.is_tuned:
            return  # Its weights are no longer those of the trained network.
        for row in report.agreements:
            problem = _problem(row)
            if problem:
                report.failures.append(
                    f"{row.tensor} diverges from the trained network: {problem}"
                )


class _Split:
    """The layers that `forms.as_layers` makes, against those that it splits.

    The rows of `Agreements` compare the twin with the network after the split, where a
    fault of the split is on both sides.

    Each layer gets the trained network's tensors. Rounding errors of an earlier split
    would move codes, and these would move others all the way to the outputs. `pairs`
    are the tensors of the two networks that must be equal.
    """

    def __init__(self, trained, split, pairs, is_half):
        self._split = split
        given, self._ends = zip(*pairs, strict=True)
        self._observer = keras.Model(trained.inputs, list(given))
        self._names = [tensor._keras_history.layer.name for tensor in given]
        self._errors = dict.fromkeys(self._names, 0.0)
        self._allowed = _FLOAT_ERROR_EXPLAINED if is_half else _FLOAT_ERROR

    def add(self, argument):
        values = tf.nest.flatten(self._observer(argument, training=False))
        ends = zip(self._ends, self._names, values, strict=True)
        known = {id(t): (name, tf.cast(value, t.dtype)) for t, name, value in ends}
        made = {id(tensor): known[id(tensor)][1] for tensor in self._split.inputs}

        def put_out(tensor, found):
            if id(tensor) in known:
                name, wanted = known[id(tensor)]
                arrays = (tf.cast(t, tf.float32).numpy() for t in (found, wanted))
                error = np.maximum(self._errors[name], _error(*arrays))  # Keeps NaN.
                self._errors[name] = float(error)
                found = wanted
            made[id(tensor)] = found

        def call(node, args, kwargs):
            return node.layer(*args, **kwargs)

        graph.run(self._split, made, call, put_out)

    def problems(self) -> list[str]:
        return [
            f"{name} diverges from the trained network: split into layers for the "
            f"file, it is off by {error:.1e} of the largest, allowed "
            f"{self._allowed:.0e}"
            for name, error in self._errors.items()
            if not error <= self._allowed
        ]


def grid_of(node: Node) -> int8_grids.Grid | None:
    """The grid of what a node of the twin puts out; None for floats and classes."""
    if isinstance(node.layer, twin.ToCodes | twin.IntegerLinear | twin.IntegerAdd):
        return node.layer.grid
    is_other = isinstance(node.layer, twin.ToValues | plain_layers.ArgMax)
    if is_other or computes_floats(node.layer):
        return None
    source = graph.producer(node.keras_inputs[0])
    return None if source.is_input else grid_of(source)


def _coarseness(node) -> float:
    """The steps of a sum's terms together, in levels of its grid; 0 of other nodes."""
    if not isinstance(node.layer, twin.IntegerAdd):
        return 0.0
    terms = [grid_of(graph.producer(tensor)) for tensor in node.keras_inputs]
    steps: list[float] = [term.step for term in terms if term is not None]
    return sum(steps) / node.layer.grid.step


def _are_pixels(node, options) -> bool:
    """Whether a node of the twin puts out the pixels that its file takes."""
    takes_codes = options.input_type != "float32"
    is_first = isinstance(node.layer, twin.ToCodes)
    is_first = is_first and graph.producer(node.keras_inputs[0]).is_input
    return takes_codes and is_first and node.layer.grid in int8_grids.PIXELS


def computes_floats(layer: keras.layers.Layer) -> bool:
    """Whether a layer of a twin computes with floats."""
    row = layer_table.row_of(layer)
    return row is not None and row.is_float


def _unrounded(trained, made) -> dict[str, KerasTensor]:
    """Name of a node of the twin -> what the quantizer of its tensor rounds."""
    tensors = inspection.quantized_tensors(trained)
    quantizers = {t.layer.name for t in tensors if t.role == ACTIVATION}
    quantizers -= {t.layer.name for t in tensors if t.role == WEIGHT}
    sources = {name: graph.producer(tensor) for name, tensor in made.items()}
    return {
        name: source.keras_inputs[0]
        for name, source in sources.items()
        if source.layer.name in quantizers and len(source.keras_inputs) == 1
    }


def _as_arrays(names, tensors) -> dict[str, np.ndarray]:
    """Float32 arrays by name."""
    return {
        name: tf.cast(tensor, tf.float32).numpy()
        for name, tensor in zip(names, tf.nest.flatten(tensors), strict=True)
    }


def _add_codes(row, node, values, within, own, unrounded):
    """Adds codes to a row; the trained network's, and whether its values are codes."""
    grid, is_sum = grid_of(node), isinstance(node.layer, twin.IntegerAdd)
    levels = values.astype(np.float64) / grid.step
    codes = np.clip(np.rint(levels), grid.low, grid.high)
    is_exact = bool((np.abs(levels - codes) <= _ON_GRID).all())
    own = own.reshape(codes.shape)
    parts = _FAR_LEVELS_OF_SUM if is_sum else _FAR_LEVELS
    far = max(1, grid.levels // parts) if row.explained else 1
    row.elements += codes.size
    row.equal += int((own == codes).sum())
    row.near += int((np.abs(own - codes) <= 1).sum())
    off = np.abs(within - codes)
    is_near = off <= _resolution(node.layer)
    if unrounded is not None:
        # Half to even decides a tie only without the rounding errors of float sums.
        exact = unrounded.reshape(codes.shape).astype(np.float64) / grid.step
        is_tie = np.abs(exact - np.floor(exact) - 0.5) <= _ON_GRID
        is_near |= is_tie & (np.abs(within - exact) <= 0.5 + _ON_GRID)
    row.equal_within += int(is_near.sum())
    row.far_within += int((~is_near & ~(off <= far)).sum())
    error = within - np.clip(levels, grid.low, grid.high)
    row.shift += float(np.where(is_near & (off > 0), 0.0, error).sum())
    over = 1 + grid.levels / _OVER
    row.clipped += int(((levels < grid.low - over) | (levels > grid.high + over)).sum())
    low, high = row.span
    row.span = (
        float(np.minimum(low, levels.min(initial=0.0))),
        float(np.maximum(high, levels.max(initial=0.0))),
    )
    return codes.astype(np.float32), is_exact


def _resolution(layer) -> np.ndarray:
    """How many levels a right integer layer may be off, by channel; 0 of most.

    An integer bias moves the output by the multiplier. Where that is more than a level,
    as it is in a channel whose batch variance is next to nothing, no bias puts out
    every code.
    """
    if not isinstance(layer, twin.IntegerLinear):
        return np.zeros(1)
    scales = layer.weight_scales.numpy().astype(np.float64)
    multipliers = scales * layer.input_grid.scale / layer.grid.scale
    return np.where(multipliers > _STEEP, np.ceil(multipliers / 2), 0.0)


def _add_classes(row, values, within, scores, own):
    """Adds class numbers to a row: exact, but where rounded scores tie."""
    row.elements += values.size
    row.equal += int((own.reshape(values.shape) == values).sum())
    row.near = row.equal
    at = [
        np.take_along_axis(scores, classes.astype(np.int64)[..., np.newaxis], -1)
        for classes in (values, within)
    ]
    # A rounding keeps the order, so the trained network's class is among the largest.
    is_largest = at[0] == at[1]
    row.equal_within += int(is_largest.sum())
    row.far_within += int((~is_largest).sum())


def _add_floats(row, values, within, own):
    row.elements += values.size
    for field, found in (
        ("error", own.reshape(values.shape)),
        ("error_within", within),
    ):
        error = np.maximum(getattr(row, field), _error(found, values))  # Keeps NaN.
        setattr(row, field, float(error))
    return values, True


def _error(found, values) -> float:
    """The largest difference of arrays, relative to the largest of `values`."""
    most = float(np.abs(values).max(initial=0.0)) or 1.0
    return float(np.abs(found - values).max(initial=0.0)) / most


def _problem(row) -> str | None:
    """What no note explains, and no rounding."""
    count = row.elements
    if not row.levels:
        allowed = _FLOAT_ERROR_EXPLAINED if row.explained else _FLOAT_ERROR
        if row.error_within <= allowed:
            return None
        return (
            f"given its inputs, its floats are off by {row.error_within:.1e} of the "
            f"largest, allowed {allowed:.0e}. If data exceed the measured ranges, "
            "export again with more `batches`"
        )
    # Rounded inputs move more codes of a finer grid.
    share = _UNEQUAL + row.levels / 2560  # Ties and off-by-one accumulators.
    if row.explained:
        # Terms that are rounded to a step move a sum by a level as often as they are
        # coarse beside its levels.
        share = min(1.0, 0.05 + max(row.levels / 32, row.coarseness))
    unequal = count - row.equal_within
    if unequal > _FEW + share * count:
        return (
            f"given its inputs, {unequal:,} of {count:,} codes are not its, allowed "
            f"{share:.0%}"
        )
    share = _FAR_EXPLAINED if row.explained else _FAR
    if row.far_within > _FEW + share * count:
        return (
            f"given its inputs, {row.far_within:,} of {count:,} codes are farther off "
            "than rounding explains"
        )
    if not abs(row.shift) <= _FEW + _SHIFT * count:
        return (
            f"given its inputs, its codes are shifted by {row.shift / count:+.2f} "
            "levels in the mean"
        )
    if row.is_measured and row.clipped > _FEW + _CLIPPED * count:
        return (
            f"{row.clipped:,} of {count:,} values are beyond the range that the file "
            "has for them: export again with representative data, or more `batches`"
        )
    low, high = row.span
    # From zero on: an honest range may hold little but one number. Not of the grid's
    # levels: the step of a sum's term may have to be larger than its range wants.
    used = max(high, -low, 0.0) / (row.measured_levels or row.levels - 1)
    if row.is_measured and 0.0 < used < _USED:
        return (
            f"the data reach {used:.1%} of its range in the file, which is too wide: "
            "export again with representative data"
        )
    return None
