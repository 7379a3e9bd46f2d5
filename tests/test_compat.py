import contextlib
import sys

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit import models
from tf_lowbit.compat import deep_graphs, keras
from tf_lowbit.training.participant import Participant

layers = keras.layers
# Python's limit for these tests, and layers one behind the other: more than that.
LIMIT, DEEP = 300, 320
RULES = [tfl.PrecisionRule("first|last", 4, 4, "lsq", "lsq", edges=True)]


@contextlib.contextmanager
def limited():
    """Few calls within calls: a stand-in for a network of a thousand layers."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(LIMIT)
    try:
        yield
        assert sys.getrecursionlimit() == LIMIT
    finally:
        sys.setrecursionlimit(before)


def deep_network():
    image = keras.Input((4, 4, 1), name="image")
    x = layers.Conv2D(2, 1, activation="relu", name="first")(image)
    for index in range(DEEP):
        x = layers.MaxPooling2D(1, name=f"deep{index}")(x)
    x = layers.SeparableConv2D(2, 1, name="separable")(layers.ReLU(name="relu")(x))
    x = layers.GlobalAveragePooling2D(name="pool")(layers.ReLU(name="last_relu")(x))
    return keras.Model(image, layers.Dense(2, name="last")(x))


def test_keras_alone_does_not_make_deep_models():
    model = deep_network()
    with limited(), pytest.raises(RecursionError):
        keras.models.clone_model(model)
    with limited(), deep_graphs():
        assert keras.models.clone_model(model).count_params() == model.count_params()


def test_the_limit_is_what_it_was_behind_an_error_too():
    before = sys.getrecursionlimit()
    with contextlib.suppress(KeyError), deep_graphs(), deep_graphs():
        assert sys.getrecursionlimit() > before
        raise KeyError
    assert sys.getrecursionlimit() == before


@pytest.mark.slow
def test_a_deep_network_goes_all_the_way(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 1)).astype(np.float32)
    model = deep_network()
    with limited():
        model = tfl.split_separable(model)
        quantized = tfl.quantize(model, RULES)
        tfl.calibrate(quantized, [x])
    wanted = quantized(x).numpy()
    quantized.save(tmp_path / "net.keras")
    with limited():
        again = tfl.load_model(tmp_path / "net.keras")
        np.testing.assert_array_equal(again(x), wanted)
        other = tfl.requantize(again, [tfl.PrecisionRule("last", 2, 2, edges=True)])
        assert len(tfl.strip(other).layers) > DEEP
        Participant(again, "", {}, ("relu",), is_trained=False).see(x)
        result = tfl.export.to_tflite(again, tmp_path / "net.tflite", [x], verbose=0)
    assert tfl.export.verify(tmp_path / "net.tflite", result, [x], verbose=0).ok


def test_a_deep_network_of_keras_3_is_converted():
    import keras as keras3

    image = keras3.Input((4, 4, 1))
    x = image
    for _ in range(DEEP):
        x = keras3.layers.Rescaling(1.0)(x)
    model = keras3.Model(image, keras3.layers.Dense(2)(x))
    with limited():
        assert len(tfl.from_keras3(model).layers) == DEEP + 2


def test_residual_networks_may_be_deeper_than_the_limit():
    with limited():
        model = models.preact_resnet(6 * 20 + 2, width=1, input_shape=(4, 4, 1))
    assert len(model.layers) > LIMIT
