import dataclasses

import pytest

from tf_lowbit import PrecisionRule, quantizers
from tf_lowbit.compat import keras
from tf_lowbit.scheme import rules


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize("bits", [0, 9, 24, -1, "2", 2.0, True])
def test_other_bits_are_refused(name, bits):
    with pytest.raises(ValueError, match=rf"Received: {name}={bits!r}"):
        PrecisionRule(".*", **{name: bits})


@pytest.mark.parametrize("bits", [1, 8, 16, 32, None])
def test_allowed_bits(bits):
    rule = PrecisionRule(".*", weight_bits=bits, activation_bits=bits)
    assert (rule.weight_bits, rule.activation_bits) == (bits, bits)


@pytest.mark.parametrize("pattern", ["conv(", "*", None, 3])
def test_a_bad_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match=r"Received: pattern="):
        PrecisionRule(pattern)


@pytest.mark.parametrize("quantizer", ["xnor", 3, None, "pact"])
def test_an_unknown_weight_quantizer_is_refused(quantizer):
    with pytest.raises(ValueError, match=r"Received: "):
        PrecisionRule(".*", weight_quantizer=quantizer)


@pytest.mark.parametrize("quantizer", ["relu", 3, None])
def test_an_unknown_activation_quantizer_is_refused(quantizer):
    with pytest.raises(ValueError, match=r"Received: "):
        PrecisionRule(".*", activation_quantizer=quantizer)


def test_a_quantizer_of_the_other_role_is_refused():
    with pytest.raises(ValueError, match="Received: DoReFaActivationQuantizer"):
        PrecisionRule(".*", weight_quantizer=quantizers.DoReFaActivationQuantizer())


@pytest.mark.parametrize(
    "quantizer",
    [
        quantizers.LSQActivationQuantizer(signed=True),
        quantizers.UniformActivationQuantizer(signed=True),
    ],
)
def test_a_signed_activation_quantizer_is_refused(quantizer):
    with pytest.raises(ValueError, match=r"must be unsigned.*Received: .*signed=True"):
        PrecisionRule(".*", activation_quantizer=quantizer)


def test_rules_are_frozen_and_compared_by_value():
    rule = PrecisionRule("conv", weight_bits=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.weight_bits = 3
    assert rule == PrecisionRule("conv", weight_bits=2)
    assert len({rule, PrecisionRule("conv", weight_bits=2)}) == 1


def test_a_serialized_quantizer_is_the_quantizer():
    quantizer = quantizers.LSQWeightQuantizer(2, per_axis=True)
    data = quantizers.serialize(quantizer)
    rule = PrecisionRule("conv", weight_bits=2, weight_quantizer=data)
    assert rule.weight_quantizer == quantizer
    assert rule == PrecisionRule("conv", weight_bits=2, weight_quantizer=quantizer)
    assert hash(rule) == hash(dataclasses.replace(rule))


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [("conv", False), ("conv1", True), ("conv.", True), ("onv1", False), (".*", True)],
)
def test_the_whole_name_must_match(pattern, matches):
    layer = keras.layers.Conv2D(1, 1, name="conv1")
    assert PrecisionRule(pattern).matches(layer) is matches


@pytest.mark.parametrize(
    ("layer_type", "matches"),
    [(None, True), ("Conv2D", True), ("Dense", False), ("conv2d", False)],
)
def test_the_layer_type_must_match(layer_type, matches):
    layer = keras.layers.Conv2D(1, 1, name="conv1")
    assert PrecisionRule(".*", layer_type=layer_type).matches(layer) is matches


@pytest.mark.parametrize(
    ("pattern", "edges", "reaches"),
    [
        (".*", None, False),
        (".*", True, True),
        ("head", None, True),
        ("head", False, False),
        (".+", None, True),
    ],
)
def test_edges(pattern, edges, reaches):
    layer = keras.layers.Dense(1, name="head")
    rule = PrecisionRule(pattern, weight_bits=2, edges=edges)
    assert rule.reaches_edges is reaches
    assert rule.matches(layer, is_edge=True) is reaches
    assert rule.matches(layer, is_edge=False)


def test_no_rules_are_the_default():
    (rule,) = rules.as_rules(None)
    assert (rule.pattern, rule.weight_bits, rule.activation_bits) == (".*", 2, 2)
    assert not rule.reaches_edges


def test_one_rule_is_a_list():
    rule = PrecisionRule(".*", weight_bits=1)
    assert rules.as_rules(rule) == rules.as_rules([rule]) == (rule,)


@pytest.mark.parametrize("given", [[], (), ".*", 2, {"conv": 2}, [".*"], [2], [None]])
def test_what_is_no_list_of_rules_is_refused(given):
    with pytest.raises(ValueError, match=r"Received: "):
        rules.as_rules(given)
