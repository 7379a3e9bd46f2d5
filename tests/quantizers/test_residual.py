"""The residual quantizer: int8's own grid, a calibrated step, 8 bits or none."""

import json

import numpy as np
import pytest

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import build, quantize
from tf_lowbit import PrecisionRule, quantizers
from tf_lowbit.compat import keras, tf
from tf_lowbit.quantizers import ResidualQuantizer, sampling


def with_step(step, bits=8):
    """A quantizer and its variables."""
    quantizer = ResidualQuantizer()
    variables = build(quantizer)
    variables["step"].assign(step)
    variables["bits"].assign(bits)
    return quantizer, variables


def test_what_it_is():
    quantizer = ResidualQuantizer()
    assert quantizer.role == "activation"
    assert quantizer.signed
    assert not quantizer.narrow_range
    assert not quantizer.replaces_relu
    assert quantizer.needs_calibration
    assert quantizer.level_count(8) == 256
    assert repr(quantizer) == "ResidualQuantizer(bits=8)"
    assert quantizer != quantizers.UniformActivationQuantizer(8, signed=True)


@pytest.mark.parametrize(
    "bits", [7, 4, 1, 16, 32, 0, 9, 8.0, "8", True, None], ids=repr
)
def test_it_has_8_bits_and_no_others(bits):
    message = rf"^bits must be 8: an int8 Add clamps .* Received: bits={bits!r}$"
    with pytest.raises(ValueError, match=message):
        ResidualQuantizer(bits)


def test_its_variables_are_state_of_the_layer():
    layer = keras.layers.Layer()
    variables = ResidualQuantizer().build((None, 4), "output", layer)
    assert {key: (v.dtype, v.shape) for key, v in variables.items()} == {
        "bits": (tf.int32, ()),
        "step": (tf.float32, ()),
        "calibrated": (tf.int32, ()),
    }
    assert not layer.trainable_weights
    assert len(layer.non_trainable_weights) == 3
    assert float(variables["step"]) == 1 / 16
    assert (int(variables["bits"]), int(variables["calibrated"])) == (8, 0)


def test_json_and_back():
    quantizer = ResidualQuantizer(bits=8)
    data = json.loads(json.dumps(quantizers.serialize(quantizer)))
    assert data["config"] == {"bits": 8}
    assert quantizers.deserialize(data) == quantizer
    assert quantizers.get(data, "activation") == quantizer


def test_it_has_no_name_and_takes_no_relus_place():
    with pytest.raises(ValueError, match="Received: 'residual'"):
        quantizers.get("residual", "activation")
    with pytest.raises(ValueError, match=r"must be unsigned.*ResidualQuantizer"):
        PrecisionRule(".*", 2, 8, activation_quantizer=ResidualQuantizer())


def test_values_by_hand():
    quantizer, variables = with_step(0.5)
    x = [-100.0, -64.0, -63.7, -0.3, -0.25, 0.0, 0.2, 0.75, 1.25, 63.5, 64.0]
    codes = [-128, -128, -127, -1, 0, 0, 0, 2, 2, 127, 127]
    found = quantizer.codes(tf.constant(x), variables)
    assert found.dtype == tf.int32
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(
        quantize(quantizer, variables, x), np.float32(codes) / 2
    )


@pytest.mark.parametrize("step", [2.0**-5, 0.37, 0.012345678])
def test_codes_beside_every_threshold(step):
    step = np.float32(step)
    ties = oracle.half_codes(-128, 127) * np.float64(step)
    x = np.concatenate([oracle.around(ties, 8), [-129 * step, 129 * step]])
    x = x.astype(np.float32)
    quantizer, variables = with_step(step)
    codes = quantizer.codes(tf.constant(x), variables)
    expected = oracle.signed_codes(x, step, 8, narrow=False)
    np.testing.assert_array_equal(codes, expected)
    assert len(np.unique(codes)) == 256
    values = quantize(quantizer, variables, x)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, step))
    # Values of the grid are fixed points, and the codes monotone.
    np.testing.assert_array_equal(quantize(quantizer, variables, values), values)
    np.testing.assert_array_equal(quantizer.codes(values, variables), codes)
    assert (np.diff(quantizer.codes(np.sort(x), variables)) >= 0).all()


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_gradient_is_one_in_range(bits):
    quantizer, variables = with_step(0.5, bits)
    x = [-64.5, -64.0, -3.3, 0.0, 63.5, 63.75, 500.0]
    upstream = np.arange(1.0, 8.0)
    d_x, d_step = cases.gradients(quantizer, variables, x, upstream, "step")
    np.testing.assert_array_equal(d_x, [0, 2, 3, 4, 5, 0, 0])
    assert d_step is None


@pytest.mark.parametrize("bits", [16, 32])
def test_unrounded_is_the_clip_alone(bits):
    quantizer, variables = with_step(0.5, bits)
    x = np.linspace(-70, 70, 999).astype(np.float32)
    np.testing.assert_allclose(
        quantize(quantizer, variables, x), np.clip(x, -64, 63.5), rtol=0, atol=1e-5
    )


def test_a_draw_leaves_the_clip():
    quantizer, variables = with_step(0.5)
    x = tf.constant([0.3, 80.0])
    for is_quantized, expected in ((True, [0.5, 63.5]), (False, [0.3, 63.5])):
        with sampling.sampled([(variables, tf.constant(is_quantized))]):
            values = quantizer(x, training=True, weights=variables)
        np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 7])
def test_fewer_bits_are_refused(bits):
    quantizer, variables = with_step(0.5)
    with pytest.raises(
        ValueError, match=rf"must be 8, or 16 .* Received: bits={bits}$"
    ):
        quantizer.assign_bits(variables, bits)
    with pytest.raises(ValueError, match="Received: bits=9"):
        quantizer.assign_bits(variables, 9)
    for allowed in (16, 32, 8):
        quantizer.assign_bits(variables, allowed)
        assert int(variables["bits"]) == allowed
    assert float(variables["step"]) == 0.5


def test_a_change_of_bits_does_not_retrace():
    quantizer, variables = with_step(0.5)
    x = tf.constant([0.3, 80.0])
    traces = []

    @tf.function
    def step():
        traces.append(None)
        return quantizer(x, training=True, weights=variables)

    np.testing.assert_array_equal(step(), [0.5, 63.5])
    quantizer.assign_bits(variables, 32)
    np.testing.assert_allclose(step(), [0.3, 63.5], atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16, tf.float64])
def test_the_result_has_the_inputs_dtype(dtype):
    quantizer, variables = with_step(0.037)
    x = tf.cast(cases.random_inputs(spread=3.0), dtype)
    values = quantizer(x, training=False, weights=variables)
    assert values.dtype == dtype
    expected = quantize(quantizer, variables, tf.cast(x, tf.float32))
    np.testing.assert_array_equal(values, tf.cast(expected, dtype))


def test_nan_stays_visible_and_infinity_saturates():
    values = quantize(*with_step(0.5), [np.nan, np.inf, -np.inf])
    np.testing.assert_array_equal(values, [np.nan, 63.5, -64])


def test_calibrate_finds_the_step_without_error():
    quantizer, variables = with_step(1.0)
    x = np.arange(-127, 128, dtype=np.float32).repeat(4) / 8
    quantizer.calibrate([x], variables)
    assert float(variables["step"]) == 1 / 8
    assert int(variables["calibrated"]) == 1
    np.testing.assert_array_equal(quantize(quantizer, variables, x), x)


def test_calibrate_clips_outliers_where_the_error_is_the_least():
    x = np.random.default_rng(0).normal(size=60000).astype(np.float32)
    x = np.concatenate([x, [10.0]])
    quantizer, variables = with_step(1.0)
    quantizer.calibrate([x], variables)

    def error(step):
        codes = oracle.signed_codes(x, step, 8, narrow=False)
        return np.mean(np.square(codes * step - x))

    best = min(error(clip / 127) for clip in np.geomspace(0.6, 10, 300))
    assert error(float(variables["step"])) <= 1.05 * best
    assert float(variables["step"]) < 9 / 127
