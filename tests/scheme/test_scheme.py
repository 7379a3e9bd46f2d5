"""The long way: TF-MOT's own calls with our scheme."""

import numpy as np
import pytest

from tests.scheme import nets
from tf_lowbit import LowBitScheme, PrecisionRule, quantize, quantizers
from tf_lowbit.compat import keras, tfmot
from tf_lowbit.scheme.configs import ActivationQuantizeConfig, WeightQuantizeConfig

layers = keras.layers
mot = tfmot.quantization.keras
RULES = [PrecisionRule(".*", weight_bits=2, activation_bits=3)]


def test_annotating_the_model_gives_what_quantize_gives():
    model = nets.randomize(nets.chain())
    ours = quantize(model, RULES)
    annotated = mot.quantize_annotate_model(model)
    theirs = mot.quantize_apply(annotated, scheme=LowBitScheme(RULES))
    np.testing.assert_array_equal(theirs(nets.images()), ours(nets.images()))
    assert {name.removeprefix("quant_") for name in nets.by_name(theirs)} == set(
        nets.by_name(ours)
    )


def test_a_given_config_is_kept():
    given = WeightQuantizeConfig({"kernel": quantizers.LSQWeightQuantizer(5)})
    relu = ActivationQuantizeConfig(quantizers.PACTActivationQuantizer(4), "relu")
    annotate = mot.quantize_annotate_layer
    inputs = keras.Input((5,), name="in")
    x = layers.ReLU(name="relu1")(layers.Dense(6, name="first")(inputs))
    x = annotate(layers.Dense(6, name="mid"), given)(x)
    x = annotate(layers.Activation("linear", name="relu2"), relu)(x)
    x = annotate(layers.Dense(6, name="last"))(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    rule = PrecisionRule("mid|last", weight_bits=2)
    applied = mot.quantize_apply(
        model, scheme=LowBitScheme(rule), quantized_layer_name_prefix=""
    )
    found = {name: t.quantizer for name, t in nets.by_name(applied).items()}
    assert found == {
        "mid/kernel": quantizers.LSQWeightQuantizer(5),
        "relu2/output": quantizers.PACTActivationQuantizer(4),
        "last/kernel": quantizers.DoReFaWeightQuantizer(2),
    }


def test_only_annotated_weights_are_quantized():
    annotate = mot.quantize_annotate_layer
    inputs = keras.Input((5,), name="in")
    x = layers.Dense(6, name="first")(inputs)
    x = annotate(layers.ReLU(name="relu1"))(x)
    x = annotate(layers.Dense(6, name="mid"))(x)
    x = layers.Dense(6, name="last")(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    applied = mot.quantize_apply(model, scheme=LowBitScheme(RULES))
    assert set(nets.by_name(applied)) == {"quant_relu1/output", "quant_mid/kernel"}


def test_a_relu_in_front_of_an_annotated_layer_must_be_annotated():
    inputs = keras.Input((5,), name="in")
    x = layers.ReLU(name="relu1")(layers.Dense(6, name="first")(inputs))
    x = mot.quantize_annotate_layer(layers.Dense(6, name="mid"))(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    with pytest.raises(ValueError, match=r"Received: \['relu1'\]"):
        mot.quantize_apply(model, scheme=LowBitScheme(RULES))


@pytest.mark.parametrize(
    "config",
    [
        WeightQuantizeConfig({"kernel": quantizers.LSQWeightQuantizer(3, True)}),
        ActivationQuantizeConfig(quantizers.PACTActivationQuantizer(2), "relu6"),
    ],
)
def test_configs_serialize(config):
    with mot.quantize_scope():
        data = keras.utils.legacy.serialize_keras_object(config)
        copy = keras.utils.legacy.deserialize_keras_object(data)
    assert type(copy) is type(config)
    assert copy.get_config() == config.get_config()


def test_residual_quantizers_the_long_way():
    model = nets.randomize(nets.postactivation())
    ours = quantize(model, RULES, residual_bits=8)
    theirs = mot.quantize_apply(
        mot.quantize_annotate_model(model), scheme=LowBitScheme(RULES, residual_bits=8)
    )
    np.testing.assert_array_equal(theirs(nets.images()), ours(nets.images()))
    residual = {name for name, t in nets.by_name(ours).items() if t.is_residual}
    assert len(residual) == 4
    assert residual == {
        name.removeprefix("quant_")
        for name, tensor in nets.by_name(theirs).items()
        if tensor.is_residual
    }


@pytest.mark.parametrize("bits", [4, 0, 16, True, 8.0, "8"])
def test_other_residual_bits_are_refused(bits):
    with pytest.raises(
        ValueError, match=rf"8 or None.*Received: residual_bits={bits!r}"
    ):
        LowBitScheme(RULES, residual_bits=bits)


def test_a_bad_list_of_rules_is_refused():
    with pytest.raises(ValueError, match="Received: 'conv'"):
        LowBitScheme("conv")


def test_latent_weights_are_the_layers_own_after_apply():
    model = nets.randomize(nets.perceptron())
    quantized = quantize(model, RULES)
    latent = nets.by_name(quantized)["mid/kernel"].latent
    np.testing.assert_array_equal(latent, model.get_layer("mid").kernel)
