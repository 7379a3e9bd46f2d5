"""Layers of Keras 3 that stay float: RMSNormalization, MultiHeadAttention."""

import keras as keras3
import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras
from tf_lowbit.network.keras3_layers import RMSNormalization

layers = keras3.layers
SHAPE = (5, 6)


def randomized(inputs, outputs):
    model = keras3.Model(inputs, outputs)
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=w.shape) for w in model.weights])
    return model


def assert_same(converted, model, *images):
    images = list(images) if len(images) > 1 else images[0]
    expected = keras3.tree.flatten(model(images))
    for ours, theirs in zip(
        keras3.tree.flatten(converted(images)), expected, strict=True
    ):
        theirs = keras3.ops.convert_to_numpy(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("axis", "dtype"), [(-1, None), ((-2, -1), None), ([2, 1], None), (2, "float16")]
)
def test_rms_normalization(axis, dtype):
    image = keras3.Input(SHAPE)
    layer = layers.RMSNormalization(axis, epsilon=0.1, name="rms", dtype=dtype)
    model = randomized(image, layer(image))
    converted = tfl.from_keras3(model)
    x = nets.images(shape=SHAPE)
    # By the formula of the paper.
    scale = np.asarray(model.weights[0])
    mean = np.mean(x**2, axis=axis if isinstance(axis, int) else (1, 2), keepdims=True)
    tolerance = 1e-2 if dtype else 1e-5
    np.testing.assert_allclose(
        converted(x), x / np.sqrt(mean + 0.1) * scale, rtol=tolerance, atol=tolerance
    )
    assert converted.outputs[0].dtype == (dtype or "float32")
    assert isinstance(converted.get_layer("rms"), RMSNormalization)


OPTIONS = {
    "self": lambda x, y: layers.MultiHeadAttention(2, 3, name="a")(x, x),
    "values": lambda x, y: layers.MultiHeadAttention(
        2, 3, value_dim=4, use_bias=False, name="a"
    )(x, y),
    "keys": lambda x, y: layers.MultiHeadAttention(2, 3, output_shape=8, name="a")(
        x, y, 2 * y
    ),
    "causal": lambda x, y: layers.MultiHeadAttention(1, 3, dropout=0.5, name="a")(
        x, x, use_causal_mask=True
    ),
    "scores": lambda x, y: list(
        layers.MultiHeadAttention(2, 3, name="a")(x, y, return_attention_scores=True)
    ),
    "mask": lambda x, y: layers.MultiHeadAttention(2, 3, name="a")(
        x, x, attention_mask=keras3.ops.cast(x[:, :, :5] > 0, "int32")
    ),
    "shared": lambda x, y: (attention := layers.MultiHeadAttention(2, 3, name="a"))(
        attention(x, x), x
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_attention(name):
    x, y = keras3.Input(SHAPE), keras3.Input((7, 6))
    model = randomized([x, y], OPTIONS[name](x, y))
    converted = tfl.from_keras3(model)
    assert isinstance(converted.get_layer("a"), keras.layers.MultiHeadAttention)
    first, second = nets.images(shape=SHAPE), nets.images(shape=(7, 6), seed=1)
    assert_same(converted, model, first, second)


def test_both_stay_float_in_a_quantized_network(tmp_path):
    x = image = keras3.Input(SHAPE, name="image")
    x = layers.Dense(8, name="in")(x)
    x = x + layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.RMSNormalization(name="rms")(x)
    x = layers.Dense(8, activation="relu", name="mid")(x)
    x = layers.Dense(nets.CLASSES, name="head")(keras3.ops.mean(x, axis=1))
    model = randomized(image, x)
    with pytest.warns(tfl.QuantizationWarning, match="attention"):
        quantized = tfl.quantize(model, tfl.PrecisionRule(".*", 2, 2))
    assert "mid/kernel" in nets.by_name(quantized)
    kept = quantized.get_layer("attention").get_weights()
    for ours, theirs in zip(
        kept, model.get_layer("attention").get_weights(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    data = nets.images(shape=SHAPE)
    nets.train_step(quantized, data, nets.labels(), eager=True)
    moved = quantized.get_layer("attention").get_weights()
    assert all((a != b).any() for a, b in zip(kept, moved, strict=True) if a.ndim > 2)
    quantized.save(tmp_path / "net.keras")
    again = tfl.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(again(data), quantized(data))
    assert_same(quantized, tfl.to_keras3(quantized), data)
