"""Quantizers by name, and as data."""

import json

import pytest

from tests.quantizers import cases
from tf_lowbit import quantizers
from tf_lowbit.quantizers import ACTIVATION, WEIGHT, lookup

WEIGHT_CLASSES = {
    "dorefa": quantizers.DoReFaWeightQuantizer,
    "lsq": quantizers.LSQWeightQuantizer,
    "statsq": quantizers.StatsQWeightQuantizer,
    "uniform": quantizers.UniformWeightQuantizer,
}
ACTIVATION_CLASSES = {
    "dorefa": quantizers.DoReFaActivationQuantizer,
    "lsq": quantizers.LSQActivationQuantizer,
    "pact": quantizers.PACTActivationQuantizer,
    "uniform": quantizers.UniformActivationQuantizer,
}
BY_ROLE = [
    (role, name, cls)
    for role, classes in ((WEIGHT, WEIGHT_CLASSES), (ACTIVATION, ACTIVATION_CLASSES))
    for name, cls in classes.items()
]


def test_names_are_sorted_by_role():
    assert lookup.names("weight") == ("dorefa", "lsq", "statsq", "uniform")
    assert lookup.names("activation") == ("dorefa", "lsq", "pact", "uniform")


@pytest.mark.parametrize(("role", "name", "cls"), BY_ROLE)
def test_a_name_finds_its_class(role, name, cls):
    assert lookup.find(name, role) is cls
    quantizer = quantizers.get(name, role, bits=5)
    assert type(quantizer) is cls
    assert quantizer.bits == 5
    assert quantizer.role == role


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("bits", [1, 8, 32])
def test_json_and_back_is_the_same_quantizer(name, bits):
    quantizer = cases.make(name, bits)
    data = json.loads(json.dumps(quantizers.serialize(quantizer)))
    again = quantizers.deserialize(data)
    assert again == quantizer
    assert type(again) is type(quantizer)
    assert quantizers.get(data, quantizer.role) == quantizer


@pytest.mark.parametrize(
    "quantizer",
    [
        quantizers.DoReFaWeightQuantizer(3, max_gradient=False, standardize=True),
        quantizers.DoReFaActivationQuantizer(3, "composed"),
        quantizers.LSQWeightQuantizer(3, True, True, (2, 3), "paper", 0.5, True),
        quantizers.LSQActivationQuantizer(3, True, "fused", "paper", 0.5),
        quantizers.PACTActivationQuantizer(3, 2.5, 0.01, "fused", 0.5),
        quantizers.StatsQWeightQuantizer(3, (0,), True),
        quantizers.UniformWeightQuantizer(3, False, (0,), True),
        quantizers.UniformActivationQuantizer(3, True, 2.5, "composed"),
    ],
    ids=repr,
)
def test_no_argument_is_lost_on_the_way(quantizer):
    config = quantizer.get_config()
    assert all(
        config[key] != value for key, value in type(quantizer)().get_config().items()
    )
    data = json.loads(json.dumps(quantizers.serialize(quantizer)))
    assert quantizers.deserialize(data).get_config() == config


def test_a_quantizer_comes_back_as_it_is():
    quantizer = quantizers.PACTActivationQuantizer(3)
    assert quantizers.get(quantizer, "activation") is quantizer


def test_a_quantizer_is_remade_with_other_arguments():
    quantizer = quantizers.PACTActivationQuantizer(3, alpha=2.0)
    remade = quantizers.get(quantizer, "activation", bits=4)
    assert remade == quantizers.PACTActivationQuantizer(4, alpha=2.0)
    assert quantizer.bits == 3


@pytest.mark.parametrize("role", ["weights", "", None, "bias"])
def test_an_unknown_role_is_refused(role):
    with pytest.raises(ValueError, match=r"role must be one of .* Received: role="):
        quantizers.get("dorefa", role)
    with pytest.raises(ValueError, match="Received: role="):
        quantizers.get(quantizers.PACTActivationQuantizer(), role)
    with pytest.raises(ValueError, match="Received: role="):
        lookup.names(role)


@pytest.mark.parametrize(
    ("role", "name"), [("weight", "pact"), ("weight", "DoReFa"), ("activation", "")]
)
def test_an_unknown_name_is_refused_with_the_known_ones(role, name):
    with pytest.raises(ValueError, match=r"dorefa.*lsq.*uniform.*Received: ") as error:
        quantizers.get(name, role)
    assert str(error.value).endswith(f"Received: {name!r}")


@pytest.mark.parametrize(
    ("role", "other"), [(WEIGHT, ACTIVATION), (ACTIVATION, WEIGHT)]
)
def test_the_wrong_role_is_refused(role, other):
    quantizer = quantizers.get("lsq", other)
    for identifier in (quantizer, quantizers.serialize(quantizer)):
        with pytest.raises(ValueError, match=f"must be for {role}s. Received: LSQ"):
            quantizers.get(identifier, role)


@pytest.mark.parametrize("identifier", [None, 2, quantizers.DoReFaWeightQuantizer])
def test_what_is_no_quantizer_is_refused(identifier):
    with pytest.raises(ValueError, match=r"A weight quantizer must be .* Received: "):
        quantizers.get(identifier, "weight")


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="alpha"):
        quantizers.get("dorefa", "activation", alpha=1.0)
    with pytest.raises(TypeError, match="alpha"):
        quantizers.get(quantizers.DoReFaActivationQuantizer(), "activation", alpha=1.0)


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="Unknown quantizer"):
        quantizers.deserialize({"class_name": "tf_lowbit>Nothing", "config": {}})
