"""The trained network as a Keras 3 model puts out what it did, without the trainer."""

import importlib.util
import os
import subprocess
import sys

import keras as keras3
import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tf
from tf_lowbit.conversion import keras3_inference

layers = keras.layers


def calibrated(model, weights, activations, weight_bits, activation_bits, **options):
    rule = tfl.PrecisionRule(".*", weight_bits, activation_bits, weights, activations)
    model = tfl.quantize(nets.randomize(model), rule, **options)
    images = nets.images(32, model.input_shape[1:])
    tfl.calibrate(model, tf.data.Dataset.from_tensor_slices(images).batch(8))
    return model


def with_operations():
    image = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="first")(image)
    x = tf.nn.relu(x)
    x = layers.Conv2D(4, 3, padding="same", activation="swish", name="second")(x)
    x = x * 2.0 - 1.0 / 3
    x = tf.concat([x[:, 1:, ::2], x[:, :-1, 1::2]], axis=-1)
    x = layers.PReLU(shared_axes=[1, 2])(layers.LeakyReLU(0.2)(x))
    x = tf.pad(tf.clip_by_value(x, -1.0, 1.0), [[0, 0], [1, 1], [0, 0], [0, 0]])
    x = layers.LayerNormalization()(tf.transpose(x, [0, 2, 1, 3]))
    x = -(tf.add_n([x, x]) ** 2.0)
    x = tf.reshape(tf.reduce_mean(x, [1]), [-1, 72])
    return keras.Model(image, layers.Dense(5, activation="gelu", name="head")(x))


MODELS = {
    "dorefa 2": lambda: calibrated(nets.chain(), "dorefa", "dorefa", 2, 2),
    "pact 1": lambda: calibrated(nets.every_layer(), "statsq", "pact", 1, 1),
    "lsq 3": lambda: calibrated(nets.every_layer(), "lsq", "lsq", 3, 3),
    "unrounded": lambda: calibrated(nets.chain(), "uniform", "uniform", 4, 32),
    "residual": lambda: calibrated(
        nets.preactivation(), "lsq", "lsq", 2, 2, residual_bits=8, shortcut_bits=4
    ),
    "operations": lambda: calibrated(with_operations(), "lsq", "lsq", 3, 3),
}
# Reads what `save` wrote where this library is not imported.
READER = """
import sys
import keras
import numpy as np
for path in sys.argv[1:]:
    data = np.load(path + ".npz")
    outputs = np.asarray(keras.saving.load_model(path + ".keras")(data["images"]))
    print(np.abs(outputs - data["outputs"]).max() / np.abs(data["outputs"]).max())
assert not {"tf_lowbit", "tensorflow_model_optimization"} & set(sys.modules)
"""


HAS_JAX = importlib.util.find_spec("jax") is not None


def read_by_keras3(backend, paths):
    done = subprocess.run(
        [sys.executable, "-c", READER, *paths],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "TF_USE_LEGACY_KERAS": "0",  # Importing the library has set it here.
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_networks_are_read_without_the_trainer(tmp_path):
    paths = []
    for name, make in MODELS.items():
        model = make()
        converted = tfl.to_keras3(model)
        assert isinstance(converted, keras3.Model)
        images = nets.images(shape=model.input_shape[1:], seed=7)
        expected = model(images).numpy()
        scale = np.abs(expected).max()
        assert scale > 0.01, name
        found = np.asarray(converted(images))
        np.testing.assert_allclose(found, expected, atol=1e-4 * scale, err_msg=name)
        paths.append(str(tmp_path / name.replace(" ", "_")))
        converted.save(f"{paths[-1]}.keras")
        np.savez(f"{paths[-1]}.npz", images=images, outputs=expected)
    for backend in ("tensorflow", "jax") if HAS_JAX else ("tensorflow",):
        differences = read_by_keras3(backend, paths)
        assert len(differences) == len(MODELS)
        assert max(differences) < 1e-3, dict(zip(MODELS, differences, strict=True))


@pytest.mark.slow
def test_operations_come_and_go():
    """What `to_keras3` makes of operations is what `from_keras3` takes."""
    model = nets.randomize(with_operations())
    again = tfl.from_keras3(tfl.to_keras3(model))
    images = nets.images(shape=model.input_shape[1:])
    np.testing.assert_allclose(again(images), model(images), rtol=1e-4, atol=1e-4)


def test_weights_are_on_the_grid_and_layers_keep_their_names():
    model = MODELS["dorefa 2"]()
    converted = tfl.to_keras3(model)
    kernel = np.asarray(converted.get_layer("mid").kernel)
    np.testing.assert_array_equal(kernel, nets.by_name(model)["mid/kernel"].quantized())
    assert len(np.unique(kernel)) == 4
    names = {layer.name for layer in model.layers}
    assert names == {layer.name for layer in converted.layers}
    values = np.asarray(
        converted.get_layer("relu1")(np.linspace(-1, 2, 256).reshape(1, 8, 8, 4))
    )
    np.testing.assert_allclose(np.unique(values), [0, 1 / 3, 2 / 3, 1], atol=1e-6)


@keras.utils.register_keras_serializable(package="tests")
class OwnLayer(layers.Layer):
    def call(self, inputs):
        return inputs


def on_an_input(*parts):
    return keras.Sequential([layers.Dense(3, input_shape=(4,), name="in"), *parts])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (OwnLayer(name="own"), "'own', OwnLayer: Keras 3 has no such layer"),
        (
            layers.Activation("hard_sigmoid", name="hard"),
            "'hard', Activation: Keras 3 has no activation 'hard_sigmoid'",
        ),
        (
            layers.Dense(2, activation=lambda x: 2 * x, name="odd"),
            "'odd', Dense: Keras 3 has no activation",
        ),
    ],
    ids=["layer", "activation", "function"],
)
def test_what_cannot_be_converted_is_named(part, message):
    with pytest.raises(ValueError, match=message):
        tfl.to_keras3(on_an_input(part))


def test_a_difference_would_be_seen(monkeypatch):
    own = keras3_inference._rounded
    monkeypatch.setattr(
        keras3_inference,
        "_rounded",
        lambda ops, x, step, codes: own(ops, x, 1.1 * step, codes),
    )
    with pytest.raises(ValueError, match=r"layer 'relu1'.*outputs differ"):
        tfl.to_keras3(MODELS["dorefa 2"]())
