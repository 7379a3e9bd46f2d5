"""Rules that set the precision of layers. The first rule that matches applies."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from tf_lowbit import quantizers
from tf_lowbit.compat import keras
from tf_lowbit.core import checks, grid

CATCH_ALL = ".*"


@dataclasses.dataclass(frozen=True)
class PrecisionRule:
    """The precision of the layers whose name matches.

    As in the literature, a layer's activation bits are those of the tensor that it
    **reads**: W2A2 means that a convolution multiplies 2-bit weights with 2-bit inputs.
    So the ReLU in front of a matched layer is quantized. A ReLU that only
    full-precision layers read stays float. A rule that names an activation layer sets
    the output of that layer.

    As in the authors' code, the first and the last weight layer stay in full precision
    unless a rule names them: the catch-all pattern `.*` does not reach them (`edges`).

    Attributes:
        pattern: Regular expression that must match the whole layer name.
        weight_bits: 1 to 8; 16 or 32 for a quantizer that does not round; None for full
            precision.
        activation_bits: Bits of the tensor that the layer reads, as `weight_bits`. None
            leaves it unchanged.
        weight_quantizer: A name (`quantizers.names("weight")`), a quantizer, or its
            dict from `quantizers.serialize`. The rule's bits replace its own.
        activation_quantizer: As `weight_quantizer` ("dorefa", "lsq", "pact",
            "uniform").
        layer_type: Class name that the layer must have, such as "Conv2D"; None for any.
        edges: Whether the rule reaches the first and the last weight layer; None means
            yes, unless the pattern is `.*`.

    Raises:
        ValueError: If bits, pattern, a quantizer or another field is invalid.
    """

    pattern: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_quantizer: object = "dorefa"
    activation_quantizer: object = "dorefa"
    layer_type: str | None = None
    edges: bool | None = None

    def __post_init__(self):
        checks.instance("pattern", self.pattern, str, remedy="a regular expression")
        checks.instance(
            "layer_type",
            self.layer_type,
            str | None,
            remedy='the name of a class, such as "Conv2D"',
        )
        checks.choice("edges", self.edges, (True, False, None))
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern must be a regular expression ({error}). "
                f"Received: pattern={self.pattern!r}"
            ) from error
        for name in ("weight_bits", "activation_bits"):
            if getattr(self, name) is not None:
                grid.validate_bits(getattr(self, name), name)
        for name in ("weight_quantizer", "activation_quantizer"):
            if isinstance(getattr(self, name), Mapping):  # Serialized; not hashable.
                quantizer = quantizers.deserialize(dict(getattr(self, name)))
                object.__setattr__(self, name, quantizer)
        quantizers.get(self.weight_quantizer, quantizers.WEIGHT)
        activation = quantizers.get(self.activation_quantizer, quantizers.ACTIVATION)
        if not activation.replaces_relu:
            raise ValueError(
                "activation_quantizer must be unsigned, because it replaces a ReLU. A "
                "tensor without a ReLU gets another quantizer by itself. "
                f"Received: activation_quantizer={activation!r}"
            )

    @property
    def reaches_edges(self) -> bool:
        """Whether the rule applies to the first and the last weight layer."""
        return self.pattern != CATCH_ALL if self.edges is None else self.edges

    def matches(self, layer: keras.layers.Layer, is_edge: bool = False) -> bool:
        """Tells whether the rule applies to a layer.

        `is_edge` says that it is the first or the last weight layer.
        """
        if is_edge and not self.reaches_edges:
            return False
        if self.layer_type not in (None, type(layer).__name__):
            return False
        return re.fullmatch(self.pattern, layer.name) is not None


def with_parts(
    rule: PrecisionRule, split: Mapping[keras.layers.Layer, Sequence[str]]
) -> PrecisionRule:
    """Returns a rule that also matches the parts of layers that were split.

    Args:
        rule: Rule that may match the layers before the split.
        split: Each layer that was split -> names of its parts.
    """
    names = [
        name for layer, parts in split.items() if rule.matches(layer) for name in parts
    ]
    if rule.layer_type is None:
        names = [name for name in names if not re.fullmatch(rule.pattern, name)]
    if not names:
        return rule
    # A rule with a type matched only layers of that type, and these were all split.
    own = [rule.pattern] if rule.layer_type is None else []
    return dataclasses.replace(
        rule,
        pattern="|".join([*own, *map(re.escape, names)]),
        layer_type=None,
        edges=rule.reaches_edges,
    )


# The default is the paper's main setting, W2A2.
DEFAULT_RULES = (PrecisionRule(CATCH_ALL, weight_bits=2, activation_bits=2),)


def as_rules(
    rules: PrecisionRule | Sequence[PrecisionRule] | None,
) -> tuple[PrecisionRule, ...]:
    """Returns one rule or a list of rules as a tuple; the default rules for None.

    Raises:
        ValueError: If there is no rule, or one is not a `PrecisionRule`.
    """
    if rules is None:
        return DEFAULT_RULES
    if isinstance(rules, PrecisionRule):
        return (rules,)
    is_list = isinstance(rules, Sequence) and not isinstance(rules, str | Mapping)
    if not is_list or not rules:
        raise ValueError(
            f"rules must be a list of at least one PrecisionRule. Received: {rules!r}"
        )
    for rule in rules:
        if not isinstance(rule, PrecisionRule):
            raise ValueError(f"rules must hold PrecisionRules. Received: {rule!r}")
    return tuple(rules)
