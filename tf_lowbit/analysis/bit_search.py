"""Search for the bits of each layer, within a budget and with the smallest loss.

It solves an integer program with SciPy: each layer takes one pair of bits; layers that
read the same tensor take the same bits for it; losses, bytes and bit operations are
sums over the layers.
"""

import dataclasses
import itertools
import re

import numpy as np

from tf_lowbit.analysis.cost import cost
from tf_lowbit.analysis.sensitivity import Sensitivity
from tf_lowbit.compat import keras
from tf_lowbit.core import checks
from tf_lowbit.export import targets
from tf_lowbit.export.targets import Target
from tf_lowbit.network import inspection
from tf_lowbit.network.variables import restored
from tf_lowbit.quantizers import ACTIVATION, LSQActivationQuantizer
from tf_lowbit.scheme.rules import PrecisionRule


def allocate_bits(
    model: keras.Model,
    found: Sensitivity,
    *,
    weight_bytes: int | None = None,
    bops: int | None = None,
    target: str | Target | None = None,
) -> list[PrecisionRule]:
    """Chooses the bits of each quantized layer within a budget.

    Among all choices within the budget, it takes the one with the smallest sum of
    losses over the tensors (`Sensitivity.loss`). This assumes that losses add up, and
    ignores interactions between the errors of tensors.

    Activations take no bytes, so with a budget of bytes alone they keep their bits.

    Args:
        model: The network that `found` was measured on. It is not changed.
        found: Result of `tf_lowbit.sensitivity`; the choice is among its bits.
        weight_bytes: Upper limit of `tf_lowbit.cost(model).weight_bytes`.
        bops: Upper limit of `tf_lowbit.cost(model).bops`.
        target: Where the file runs, as in `tf_lowbit.export.check`: bits that the
            target lacks are not chosen. None allows all. For tensors that keep their
            bits, call `tf_lowbit.export.check(model, target=...)`.

    Returns:
        One rule for each quantized layer, for `tf_lowbit.requantize(model, rules)`, or
        for `quantize` with the float network. Float layers stay float, and activations
        that no quantized layer reads keep their bits.

    Raises:
        ValueError: Without a budget, if no choice meets it, if the target has none of
            the bits, if a layer's cost is unknown, or if `found` is from another
            network.
        ImportError: Without SciPy (`pip install '.[search]'`).
    """
    if weight_bytes is None and bops is None:
        raise ValueError(
            "A budget must be given: weight_bytes, bops or both. Received: neither"
        )
    checks.instance("found", found, Sensitivity, remedy="what sensitivity returns")
    for name, budget in (("weight_bytes", weight_bytes), ("bops", bops)):
        if budget is not None:
            checks.number(name, budget, at_least=0)
    parts = _parts(model, found)
    weight_bits, activation_bits = _widths(found.bits, target)
    read_at = (None,) if bops is None else activation_bits  # None keeps the bits.
    table = _costs(model, itertools.product(weight_bits, read_at), parts)
    budgets = {"weight_bytes": weight_bytes, "bops": bops}
    budgets = {name: value for name, value in budgets.items() if value is not None}
    chosen = _solve(parts, found, table, budgets)
    read = {tensor.name for part in parts for tensor in part.sources}
    unread = [
        tensor
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == ACTIVATION and not tensor.is_residual
        if tensor.name not in read
    ]
    return [
        *(_rule_of_activation(tensor) for tensor in unread),
        *(_rule(part, *chosen[part.layer]) for part in parts),
    ]


def _widths(bits, target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The bits to choose from for weights and for activations."""
    if target is None:
        return bits, bits
    target = targets.find(target)
    both = {"weight": target.weight_bits, "activation": target.activation_bits}
    chosen = {
        what: tuple(width for width in bits if width in allowed)
        for what, allowed in both.items()
    }
    for what, allowed in both.items():
        if not chosen[what]:
            raise ValueError(
                f"found.bits must have {what} bits of target={target.name!r}: "
                f"{allowed}. Received: found.bits={bits}"
            )
    return chosen["weight"], chosen["activation"]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A layer and the tensors whose bits its rule sets.

    Attributes:
        layer: The layer's name.
        weights: Its weight tensors.
        sources: The activation quantizers that it reads.
        group: Number shared by layers whose inputs must have the same bits.
    """

    layer: str
    weights: tuple[inspection.QuantizedTensor, ...]
    sources: tuple[inspection.QuantizedTensor, ...]
    group: int


def _parts(model, found) -> list[_Part]:
    model = inspection.single_network(model)
    inspection.require_quantized(model)
    tensors = [t for t in inspection.quantized_tensors(model) if not t.is_residual]
    if {t.name for t in tensors} != set(found.scores):
        raise ValueError(
            "The sensitivity must be measured on the model's tensors. Received: "
            f"{sorted({t.name for t in tensors} ^ set(found.scores))[:5]} in one only"
        )
    weights: dict[str, list] = {}
    for tensor in tensors:
        if tensor.latent is not None:
            weights.setdefault(tensor.layer.name, []).append(tensor)
    reads = {
        layer: tuple(t for t in sources if t is not None and not t.is_residual)
        for layer, sources in inspection.input_activations(model).items()
        if layer in weights or any(t is not None for t in sources)
    }
    groups = _groups({layer: {t.name for t in own} for layer, own in reads.items()})
    return [
        _Part(layer, tuple(weights.get(layer, ())), own, groups[layer])
        for layer, own in reads.items()
    ]


def _groups(reads: dict[str, set[str]]) -> dict[str, int]:
    """Numbers layers so that layers which share an input tensor share a number."""
    numbers = {layer: number for number, layer in enumerate(reads)}
    changed = True
    while changed:
        changed = False
        for first, second in itertools.combinations(reads, 2):
            if reads[first] & reads[second] and numbers[first] != numbers[second]:
                numbers[first] = numbers[second] = min(numbers[first], numbers[second])
                changed = True
    return numbers


def _costs(model, pairs, parts) -> dict:
    """(weight bits, activation bits or None) -> `Cost` at these bits everywhere."""
    tensors = [t for part in parts for t in (*part.weights, *part.sources)]
    table = {}
    with restored([v for t in tensors for v in t.variables.values()]):
        for pair in pairs:
            for part in parts:
                for tensor in part.weights:
                    tensor.assign_bits(pair[0])
                for tensor in part.sources if pair[1] is not None else ():
                    tensor.assign_bits(pair[1])
            table[pair] = cost(model)
    return table


def _solve(parts, found, table, budgets) -> dict[str, tuple[int, int | None]]:
    """Layer -> bits of its weights and of its inputs; None keeps the bits."""
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise ImportError(
            "allocate_bits needs SciPy: pip install '.[search]'"
        ) from error
    pairs = list(table)
    read_at = sorted({pair[1] for pair in pairs})
    layers = {pair: {c.name: c for c in whole.layers} for pair, whole in table.items()}
    groups = sorted({part.group for part in parts})
    # A variable for each layer and pair of bits, then one for each group and bits.
    first_of_groups = len(parts) * len(pairs)
    count = first_of_groups + len(groups) * len(read_at)
    objective = np.zeros(count)
    usage = {name: np.zeros(count) for name in budgets}
    rows, lower, upper = [], [], []

    def require(entries, low, high):
        rows.append(entries)
        lower.append(low)
        upper.append(high)

    for index, part in enumerate(parts):
        at = {pair: index * len(pairs) + i for i, pair in enumerate(pairs)}
        for pair, column in at.items():
            objective[column] = sum(found.loss(t.name, pair[0]) for t in part.weights)
            for name in budgets:
                usage[name][column] = _known(layers[pair][part.layer], name)
        require(dict.fromkeys(at.values(), 1.0), 1.0, 1.0)
        group = groups.index(part.group)
        for i, width in enumerate(read_at):
            same = {column: 1.0 for pair, column in at.items() if pair[1] == width}
            same[first_of_groups + group * len(read_at) + i] = -1.0
            require(same, 0.0, 0.0)
    for index, group in enumerate(groups):
        sources = {
            t.name for part in parts if part.group == group for t in part.sources
        }
        for i, width in enumerate(read_at):
            column = first_of_groups + index * len(read_at) + i
            if width is not None:
                objective[column] = sum(found.loss(name, width) for name in sources)
    searched = {part.layer for part in parts}
    for name, budget in budgets.items():
        rest = sum(
            _known(c, name) for c in table[pairs[0]].layers if c.name not in searched
        )
        columns = dict(enumerate(usage[name]))
        require(columns, -np.inf, budget - rest)
    matrix = sparse.lil_array((len(rows), count))
    for row, entries in enumerate(rows):
        for column, value in entries.items():
            matrix[row, column] = value
    # Scaled to 1, because the solver has absolute tolerances.
    scale = np.abs(objective).max() or 1.0
    result = optimize.milp(
        objective / scale,
        constraints=optimize.LinearConstraint(matrix.tocsr(), lower, upper),
        integrality=np.ones(count),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        widths = sorted({bits for pair in pairs for bits in pair if bits})
        least = {
            name: min(_total(whole, name) for whole in table.values())
            for name in budgets
        }
        raise ValueError(
            f"The budget must be met by some choice of bits from {widths}; the minimum "
            f"is {least}. Received: {budgets}"
        )
    values = result.x[:first_of_groups].reshape(len(parts), len(pairs))
    return {
        part.layer: pairs[int(np.argmax(row))]
        for part, row in zip(parts, values, strict=True)
    }


def _known(layer_cost, name) -> int:
    value = getattr(layer_cost, name)
    if value is None:
        raise ValueError(
            f"The {name} of every layer must be known: give the model a fixed input "
            f"size. Received: layer {layer_cost.name!r}"
        )
    return value


def _total(whole, name) -> int:
    return sum(_known(layer, name) for layer in whole.layers)


def _rule(part: _Part, weight_bits: int, activation_bits: int | None) -> PrecisionRule:
    quantizers = {}
    if activation_bits is None:
        activation_bits = max((tensor.bits for tensor in part.sources), default=None)
    if part.weights:
        quantizers["weight_quantizer"] = part.weights[0].quantizer
    if part.sources:
        quantizers["activation_quantizer"] = _unsigned(part.sources)
    return PrecisionRule(
        re.escape(part.layer),
        weight_bits if part.weights else None,
        activation_bits if part.sources else None,
        **quantizers,
    )


def _rule_of_activation(tensor) -> PrecisionRule:
    return PrecisionRule(
        re.escape(tensor.layer.name),
        None,
        tensor.bits,
        activation_quantizer=tensor.quantizer,
    )


def _unsigned(sources):
    """The `activation_quantizer` of a rule that makes these quantizers again."""
    for tensor in sources:
        if getattr(tensor.layer.quantize_config, "replaces", "linear") != "linear":
            return tensor.quantizer
    # Inserted by `scheme.placement`.
    learned = isinstance(sources[0].quantizer, LSQActivationQuantizer)
    return "lsq" if learned else "dorefa"
