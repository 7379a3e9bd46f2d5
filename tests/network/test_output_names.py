"""Outputs keep the names that losses and targets are given by."""

import numpy as np
import pytest

from tests.scheme import nets
from tf_lowbit import LowBitTrainer, PrecisionRule, load_model, quantize, requantize
from tf_lowbit import strip as stripped
from tf_lowbit.compat import keras
from tf_lowbit.network.output_names import NamedOutputs

layers = keras.layers
RULE = PrecisionRule(".*", 4, 4, edges=True)
TARGETS = {"count": np.ones((4, 3)), "kind": np.zeros((4, 2))}


def two_heads():
    """One head ends in a ReLU of its own, the other is a model."""
    image = keras.Input(nets.IMAGE, name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="stem")(image)
    features = layers.GlobalAveragePooling2D(name="pool")(x)
    read = keras.Input((4,), name="features")
    kind = keras.Model(read, layers.Dense(2, name="logits")(read), name="kind")
    count = layers.Dense(3, activation="relu", name="count")(features)
    return keras.Model(image, [count, kind(features)], name="heads")


def losses_of(model):
    model.compile("sgd", {"count": "mse", "kind": "mae"}, loss_weights={"kind": 2.0})
    fitted = model.fit(nets.images(), TARGETS, verbose=0)
    return set(fitted.history)


LOGGED = {"loss", "count_loss", "kind_loss"}


@pytest.mark.slow
def test_losses_by_the_float_models_output_names():
    model = two_heads()
    assert losses_of(model) == LOGGED
    quantized = quantize(model, RULE)
    assert quantized.output_names == ["count", "kind"]
    assert {"count_relu", "logits"} <= {layer.name for layer in quantized.layers}
    assert losses_of(quantized) == LOGGED
    trainer = LowBitTrainer(quantize(model, RULE))
    assert trainer.output_names == ["count", "kind"]
    assert LOGGED <= losses_of(trainer)


@pytest.mark.quick(1)
@pytest.mark.parametrize("file", ["net.keras", "net.h5", "net"])
def test_reloaded(tmp_path, file):
    quantized = quantize(two_heads(), RULE)
    losses_of(quantized)
    quantized.save(tmp_path / file)
    again = load_model(tmp_path / file)
    assert again.output_names == ["count", "kind"]
    assert type(again.output_names) is list  # None of Keras's, which are saved.
    for found, expected in zip(
        again(nets.images()), quantized(nets.images()), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert set(again.fit(nets.images(), TARGETS, verbose=0).history) == LOGGED


def test_copied_on():
    quantized = quantize(two_heads(), RULE)
    assert keras.models.clone_model(quantized).output_names == ["count", "kind"]
    assert stripped(quantized).output_names == ["count", "kind"]
    assert requantize(quantized, RULE).output_names == ["count", "kind"]


def test_a_model_whose_names_are_its_layers_is_of_kerass_own_class():
    assert not isinstance(stripped(quantize(nets.chain(), RULE)), NamedOutputs)
