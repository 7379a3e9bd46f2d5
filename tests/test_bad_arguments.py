"""Arguments that there are not: errors that say what is wanted and what was given."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras

layers = keras.layers
RULE = tfl.PrecisionRule(".*", 2, 2)


def network():
    return nets.perceptron()


def broken(value):
    model = network()
    kernel = model.layers[2].kernel
    kernel.assign(np.full(kernel.shape, value))
    return model


BAD = {
    "pattern of bytes": (lambda: tfl.PrecisionRule(b".*"), "pattern"),
    "pattern, a number": (lambda: tfl.PrecisionRule(3), "pattern"),
    "pattern, none": (lambda: tfl.PrecisionRule(None), "pattern"),
    "pattern, open": (lambda: tfl.PrecisionRule("("), "pattern"),
    "layer_type, a number": (
        lambda: tfl.PrecisionRule(".*", layer_type=3),
        "layer_type",
    ),
    "layer_type, a class": (
        lambda: tfl.PrecisionRule(".*", layer_type=layers.Dense),
        "layer_type",
    ),
    "edges, a word": (lambda: tfl.PrecisionRule(".*", edges="no"), "edges"),
    "edges, a number": (lambda: tfl.PrecisionRule(".*", edges=1), "edges"),
    "bits, negative": (lambda: tfl.PrecisionRule(".*", -2), "weight_bits"),
    "bits, a word": (lambda: tfl.PrecisionRule(".*", "2"), "weight_bits"),
    "bits, true": (lambda: tfl.PrecisionRule(".*", True), "weight_bits"),
    "bits, 9": (lambda: tfl.PrecisionRule(".*", 2, 9), "activation_bits"),
    "quantizer, a number": (
        lambda: tfl.PrecisionRule(".*", 2, weight_quantizer=3),
        "quantizer",
    ),
    "quantizer, unknown": (
        lambda: tfl.PrecisionRule(".*", 2, 2, activation_quantizer="best"),
        "quantizer",
    ),
    "rules, a word": (lambda: tfl.quantize(network(), ".*"), "rules"),
    "rules, a number": (lambda: tfl.quantize(network(), 2), "rules"),
    "rules, empty": (lambda: tfl.quantize(network(), []), "rules"),
    "rules, of words": (lambda: tfl.quantize(network(), ["mid"]), "rules"),
    "strict, a word": (lambda: tfl.quantize(network(), RULE, strict="no"), "strict"),
    "residual_bits, 4": (
        lambda: tfl.quantize(network(), RULE, residual_bits=4),
        "residual_bits",
    ),
    "shortcut_bits, 0": (
        lambda: tfl.quantize(network(), RULE, shortcut_bits=0),
        "shortcut_bits",
    ),
    "quantize, a number": (lambda: tfl.quantize(3, RULE), "model"),
    "quantize, none": (lambda: tfl.quantize(None, RULE), "model"),
    "quantize, a class": (lambda: tfl.quantize(keras.Model, RULE), "model"),
    "quantize, a layer": (lambda: tfl.quantize(layers.Dense(2), RULE), "model"),
    "quantize, NaN": (lambda: tfl.quantize(broken(np.nan), RULE), "Weights"),
    "quantize, infinity": (lambda: tfl.quantize(broken(np.inf), RULE), "Weights"),
    "requantize, none": (lambda: tfl.requantize(None, RULE), "model"),
    "requantize, a float one": (lambda: tfl.requantize(network(), RULE), "model"),
    "strip, a word": (lambda: tfl.strip(model="net.keras"), "model"),
    "strip, weights": (lambda: tfl.strip(network(), weights=3), "weights"),
    "strip, a list": (lambda: tfl.strip(network(), weights=["latent"]), "weights"),
    "split, none": (lambda: tfl.split_separable(None), "model"),
    "split, a class": (lambda: tfl.split_separable(keras.Model), "model"),
    "from_keras3, none": (lambda: tfl.from_keras3(None), "model"),
    "from_keras3, tf_keras": (lambda: tfl.from_keras3(network()), "model"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_requirement_and_what_was_received_are_named(name):
    call, named = BAD[name]
    with pytest.raises(ValueError, match=f"(?s){named}.*Received: "):
        call()


@pytest.mark.parametrize("strict", [False, True])
def test_channels_first_is_told(strict):
    model = keras.Sequential(
        [
            layers.Dense(4, name="in", input_shape=(4,)),
            layers.Reshape((4, 1, 1)),
            layers.Flatten(data_format="channels_first", name="flat"),
            layers.ReLU(),
            layers.Dense(3, name="mid"),
            layers.Dense(2, name="head"),
        ]
    )
    if strict:
        with pytest.raises(ValueError, match=r"channels_last.*flat"):
            tfl.quantize(model, RULE, strict=True)
    else:
        with pytest.warns(tfl.QuantizationWarning, match=r"channels_last.*flat"):
            tfl.quantize(model, RULE)


@pytest.mark.quick(1)
@pytest.mark.parametrize("rules", [None, RULE, tfl.PrecisionRule(".*", 8, 8)])
def test_two_layers_are_both_edges_and_the_message_says_so(rules):
    """The network of TF-MOT's tutorial."""
    model = keras.Sequential(
        [
            layers.Conv2D(3, 3, activation="relu", name="conv", input_shape=(8, 8, 1)),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(4, name="head"),
        ]
    )
    message = (
        r"(?s)edges=True.*\['conv', 'head'\].*PrecisionRule\('conv', 8, 8\).*Received"
    )
    with (
        pytest.raises(ValueError, match=message),
        pytest.warns(tfl.QuantizationWarning, match="edges=True"),
    ):
        tfl.quantize(model, rules)
    every = tfl.PrecisionRule(".*", 4, 4, edges=True)
    assert len(list(tfl.inspection.quantized_tensors(tfl.quantize(model, every)))) == 4


def test_rules_without_bits_are_told_another_remedy():
    with pytest.raises(ValueError, match="weight_bits or activation_bits is not None"):
        tfl.quantize(network(), tfl.PrecisionRule("mid"))


def with_layers(*extra):
    """A small network with these layers in its middle."""
    return keras.Sequential(
        [
            layers.Conv2D(3, 3, name="first", input_shape=(8, 8, 1)),
            layers.ReLU(),
            layers.Conv2D(3, 1, name="mid"),
            *extra,
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )


FORMLESS = {
    "one": lambda: [layers.UnitNormalization(name="odd")],
    "two of a kind": lambda: [
        layers.UnitNormalization(name="odd"),
        layers.UnitNormalization(name="odder"),
    ],
    "two kinds": lambda: [
        layers.UnitNormalization(name="odd"),
        layers.Activation("softplus", name="soft"),
    ],
    "a setting": lambda: [layers.UpSampling2D(interpolation="bicubic", name="up")],
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", FORMLESS)
def test_layers_without_a_form_in_a_file_are_told_once(kind):
    model = with_layers(*FORMLESS[kind]())
    problems = tfl.export.check(model).problems
    assert problems
    (text,) = nets.told(lambda: tfl.quantize(model, RULE))
    for problem in problems:
        assert f"{problem.layer} ({problem.type})" in text
        assert text.count(problem.remedy) == 1
    with pytest.raises(ValueError, match=r"strict=True.*Received:\n.*export\.check"):
        tfl.quantize(model, RULE, strict=True)


def test_networks_that_can_be_exported_are_told_of_nothing():
    model = with_layers(layers.ReLU())
    assert tfl.export.check(model).ok
    assert nets.told(lambda: tfl.quantize(model, RULE, strict=True)) == []
