"""Which layer gets which precision: frozen rules, the first match wins."""

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

    The activation bits of a layer are, as in the literature, those of the tensor
    that it **reads**: W2A2 means that a convolution multiplies 2-bit weights with
    2-bit inputs. So the ReLU in front of a matched layer is quantized, and a ReLU
    that only feeds full-precision layers stays float. A rule that names an
    activation layer itself sets what that layer puts out.

    The first and the last weight layer stay in full precision, as the method's
    authors have it, unless a rule names them: the catch-all pattern `.*` does not
    reach them (`edges`).

    Attributes:
        pattern: regular expression that must match the whole layer name.
        weight_bits: 1 to 8; 16 or 32 for "quantizer in place, not rounded"; None
            for full precision.
        activation_bits: likewise. None leaves the layer's input as it is.
        weight_quantizer: a name (`quantizers.names("weight")`) or a quantizer, also
            as `quantizers.serialize` writes it, whose bits are replaced by the rule's.
        activation_quantizer: likewise ("dorefa", "lsq", "pact", "uniform").
        layer_type: class name, such as "Conv2D", that the layer must have; None for
            any.
        edges: whether the rule reaches the first and the last weight layer; None
            means yes, unless the pattern is `.*`.

    Raises:
        ValueError: for bits, patterns or quantizers that there are not.
    """

    pattern: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_quantizer: object = "dorefa"
    activation_quantizer: object = "dorefa"
    layer_type: str | None = None
    edges: bool | None = None

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise ValueError(
                "pattern must be a string, a regular expression. "
                f"Received: pattern={self.pattern!r}"
            )
        if not isinstance(self.layer_type, str | None):
            raise ValueError(
                'layer_type must be the name of a class, such as "Conv2D", or None. '
                f"Received: layer_type={self.layer_type!r}"
            )
        if not isinstance(self.edges, bool | None):
            raise ValueError(
                f"edges must be True, False or None. Received: edges={self.edges!r}"
            )
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"pattern must be a regular expression ({error}). "
                f"Received: pattern={self.pattern!r}"
            ) from error
        checks.instance("pattern", self.pattern, str)
        if self.layer_type is not None:
            checks.instance("layer_type", self.layer_type, str, remedy="a class's name")
        if self.edges is not None:
            checks.flag("edges", self.edges)
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
                "activation_quantizer must be unsigned: it takes a ReLU's place, and "
                "where there is no ReLU another one is inserted. "
                f"Received: activation_quantizer={activation!r}"
            )

    @property
    def reaches_edges(self) -> bool:
        """Whether the rule applies to the first and the last weight layer."""
        return self.pattern != CATCH_ALL if self.edges is None else self.edges

    def matches(self, layer: keras.layers.Layer, is_edge: bool = False) -> bool:
        """Whether the rule is meant for a layer.

        Args:
            layer: the layer.
            is_edge: whether it is the first or the last weight layer.
        """
        if is_edge and not self.reaches_edges:
            return False
        if self.layer_type not in (None, type(layer).__name__):
            return False
        return re.fullmatch(self.pattern, layer.name) is not None


# What a user who says nothing gets: the paper's main setting, W2A2.
DEFAULT_RULES = (PrecisionRule(CATCH_ALL, weight_bits=2, activation_bits=2),)


def as_rules(rules) -> tuple[PrecisionRule, ...]:
    """Checks a list of rules.

    Args:
        rules: one rule, a list of them, or None for W2A2 everywhere but at the first
            and the last layer.

    Raises:
        ValueError: if there is none, or one is not a `PrecisionRule`.
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
