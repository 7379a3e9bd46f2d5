"""Signed quantizers that lose their sign where data hold nothing negative."""

import warnings

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import inspection
from tf_lowbit.quantizers.ranges import normal_clip

layers = keras.layers
KINDS = ["lsq", "uniform"]


@keras.utils.register_keras_serializable(package="test_sign")
class Own(layers.Layer):
    """A layer that the library knows nothing of."""

    def call(self, inputs):
        return inputs


def network():
    inputs = keras.Input((5,), name="in_")
    x = layers.ReLU(name="relu")(layers.Dense(6, name="in")(inputs))
    x = layers.Dense(6, name="mid")(Own(name="own")(x))
    return nets.randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))


def data(count=256):
    return nets.images(count, (5,))


def made(kind, bits=2):
    return tfl.quantize(network(), tfl.PrecisionRule("mid", bits, bits, kind, kind))


def tensor_of(model):
    return nets.by_name(model)["own_quantizer/output"]


def calibrated(kind, bits=2):
    model = made(kind, bits)
    with pytest.warns(tfl.QuantizationWarning, match="own_quantizer/output"):
        tfl.calibrate(model, [data()])
    return model


def read_by_mid(model, inputs=None):
    probe = keras.Model(model.input, tensor_of(model).layer.output)
    return probe(data() if inputs is None else inputs).numpy()


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_all_levels_are_from_zero_on(kind, bits):
    before = made(kind, bits)
    assert tensor_of(before).quantizer.signed
    model = calibrated(kind, bits)
    tensor = tensor_of(model)
    assert not tensor.quantizer.signed
    assert tensor.declared.signed
    assert tensor.quantizer.level_count(bits) == 2**bits
    float_values = nets.outputs_of(network(), ["own"], data())["own"]
    codes = tensor.quantizer.codes(float_values, tensor.variables).numpy()
    step = np.ravel(tensor.quantizer.step(None, tensor.variables))[0]
    np.testing.assert_allclose(read_by_mid(model), codes * step, rtol=1e-6)
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1 or bits == 8
    # As the quantizer of a ReLU that stands in the same place would have it.
    alone = type(tensor.declared)(bits=bits)
    variables = alone.build(None, "alone", layers.Layer())
    alone.calibrate([float_values], variables)
    np.testing.assert_allclose(alone.step(None, variables), step, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_network_follows(kind):
    model = made(kind)
    traced = tf.function(model)
    traced(data())
    with pytest.warns(tfl.QuantizationWarning):
        tfl.calibrate(model, [data()])
    np.testing.assert_allclose(traced(data()), model(data()), rtol=1e-5, atol=1e-6)
    assert traced.experimental_get_tracing_count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_the_sign(tmp_path, kind):
    model = calibrated(kind)
    expected = model(data()).numpy()
    model.save(tmp_path / "net.keras")
    model.save(tmp_path / "net.h5")
    model.save_weights(tmp_path / "net.weights.h5")
    fresh = made(kind)
    fresh.load_weights(tmp_path / "net.weights.h5")
    loaded = [keras.models.load_model(tmp_path / f"net.{e}") for e in ("keras", "h5")]
    for again in (fresh, *loaded):
        assert not tensor_of(again).quantizer.signed
        np.testing.assert_array_equal(again(data()), expected)


def test_other_rules_keep_the_sign():
    model = calibrated("lsq")
    again = tfl.requantize(model, tfl.PrecisionRule("mid", 4, 4, "lsq", "lsq"))
    assert not tensor_of(again).quantizer.signed
    assert tensor_of(again).bits == 4
    old, new = (tensor_of(m).variables["step"].numpy() for m in (model, again))
    # The ratio of the steps that a ReLU of normally distributed values has.
    steps = [normal_clip(k, signed=False) / (2**k - 1) for k in (2, 4)]
    assert new / old == pytest.approx(steps[1] / steps[0])


def test_other_data_bring_the_sign_back():
    model = calibrated("uniform")
    tensor = tensor_of(model)
    tensor.declared.assign_sign([np.zeros(4, np.float32)], tensor.variables)
    assert not tensor.quantizer.signed  # Zeros tell nothing.
    tensor.declared.assign_sign([np.ones(4), -np.ones(4)], tensor.variables)
    assert tensor.quantizer.signed


def test_one_negative_number_in_a_million_keeps_the_sign():
    values = np.ones(1 << 20, np.float32)
    values[12345] = -1e-3
    samples = [tfl.quantizers.ranges.thinned([values])]
    model = made("uniform")
    tensor = tensor_of(model)
    tensor.declared.assign_sign(samples, tensor.variables)
    assert tensor.quantizer.signed


def test_what_is_sure_or_negative_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", tfl.QuantizationWarning)
        model = tfl.quantize(
            nets.perceptron(), tfl.PrecisionRule(".*", 8, 8, edges=True)
        )
        tfl.calibrate(model, [data()])  # Signed inputs, ReLUs behind.
    tensor = nets.by_name(model)
    assert [t.quantizer.signed for n, t in tensor.items() if "relu" in n] == [False] * 2
    assert (
        sum(t.declared.signed for t in tensor.values() if t.role == "activation") == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_the_unsigned_grid(tmp_path, kind):
    """Pixels: the graph cannot tell that they are not negative, the data can."""
    model = tfl.quantize(
        nets.perceptron(), tfl.PrecisionRule(".*", 8, 8, kind, kind, edges=True)
    )
    pixels = np.abs(data())
    with pytest.warns(tfl.QuantizationWarning, match="quantizer"):
        tfl.calibrate(model, [pixels])
    (signed,) = (
        t
        for t in inspection.quantized_tensors(model)
        if t.role == "activation" and t.declared.signed
    )
    assert not signed.quantizer.signed
    path = tmp_path / "net.tflite"
    tfl.export.to_tflite(model, path, data=[pixels])
    assert tfl.export.verify(path, model, [pixels]).ok


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains(kind):
    model = calibrated(kind)
    before = nets.snapshot(model.trainable_variables)
    nets.train_step(model, data(16), nets.labels(16, 3))
    after = nets.snapshot(model.trainable_variables)
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(changed)
