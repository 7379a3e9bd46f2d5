"""`calibrate(fit_batch_norm=True)`: gamma and beta in front of a fixed clip."""

import numpy as np
import pytest

from tests.scheme import nets
from tf_lowbit import (
    PrecisionRule,
    calibrate,
    quantize,
    recalibrate_batch_norm,
    statistics,
    strip,
)
from tf_lowbit.compat import keras

layers = keras.layers
BATCHES = [nets.images(16, (5,), seed) for seed in range(3)]


def error_of(values, clip, bits):
    values, n = np.maximum(values, 0.0), 2**bits - 1
    rounded = np.round(np.minimum(values / clip, 1) * n) * clip / n
    return np.mean((rounded - values) ** 2)


def least_error_clip(values, bits):
    """The clip, and its error, by a finer search than the library's."""
    clips = np.geomspace(1 / 64, 1, 2000) * values.max()
    errors = [error_of(values, clip, bits) for clip in clips]
    return clips[np.argmin(errors)], min(errors)


def normalized_network(*, between=None, beside=False, shown=False, **options):
    """dense - bn - (between) - relu - mid - head."""
    x = inputs = keras.Input((5,), name="in")
    x = layers.Dense(8, name="dense")(x)
    x = bn = layers.BatchNormalization(name="bn", **options)(x)
    if between is not None:
        x = between(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dense(4, name="mid")(x)
    outputs = layers.Dense(nets.CLASSES, name="head")(x)
    if beside:
        outputs = layers.Add()([outputs, layers.Dense(nets.CLASSES, name="side")(bn)])
    return keras.Model(inputs, [outputs, bn] if shown else outputs)


def fitted(model, bits=2, quantizer="dorefa", **options):
    """Activations alone are quantized; gives names, and gamma and beta before, after.

    All start at 3 and 0.5: clip 1 is far too small.
    """
    norm = model.get_layer("bn")
    if norm.scale:
        norm.gamma.assign([3.0] * 8)
    if norm.center:
        norm.beta.assign([0.5] * 8)
    before = nets.snapshot(model.weights)
    rule = PrecisionRule(".*", None, bits, activation_quantizer=quantizer)
    quantized = quantize(model, rule)
    names = calibrate(quantized, BATCHES, **options)
    nets.assert_all_equal(nets.snapshot(model.weights), before)  # The float model.
    return names, quantized


def scale_of(quantized):
    """Gamma and beta relative to what `fitted` starts from."""
    norm = quantized.get_layer("bn")
    return np.concatenate([norm.gamma.numpy() / 3.0, norm.beta.numpy() / 0.5])


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gamma_and_beta_are_divided_by_the_clip_of_least_error(bits):
    model = nets.randomize(normalized_network())
    names, quantized = fitted(model, bits)
    assert names == ["relu/output"]
    scales = scale_of(quantized)
    assert np.ptp(scales) < 1e-6
    seen = []
    for x in BATCHES:
        y = model.get_layer("dense")(x).numpy()
        seen.append(3.0 * (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-3) + 0.5)
    seen = np.concatenate(seen)
    clip, least = least_error_clip(seen, bits)
    assert clip > 1.5
    assert error_of(seen, 1 / scales[0], bits) <= 1.05 * least


@pytest.mark.slow
def test_what_training_sees_fits_then():
    """Layer behind layer, each behind the new scales of those before it."""
    model = quantize(nets.randomize(nets.preactivation()), PrecisionRule(".*", 2, 2))
    data = [nets.images(32, model.input_shape[1:], seed) for seed in range(2)]
    names = set(calibrate(model, data))
    assert len(names) >= 3
    recalibrate_batch_norm(model, data)
    tensors = {t.name: t for t in statistics(model, data, batches=2)}
    assert all(tensors[name].clip_rate < 0.12 for name in names)
    assert all(tensors[name].occupancy[3] > 0.005 for name in names)


@pytest.mark.slow
def test_fitting_again_changes_little():
    _, quantized = fitted(nets.randomize(normalized_network()))
    before = scale_of(quantized)
    calibrate(quantized, BATCHES)
    np.testing.assert_allclose(scale_of(quantized), before, rtol=0.02)


@pytest.mark.slow
def test_nothing_but_gamma_and_beta_changes():
    model = quantize(nets.randomize(nets.chain(dropout=0.3)), PrecisionRule(".*", 2, 2))
    nets.by_name(model)["relu1/output"].assign_bits(8)
    norms = [model.get_layer(f"bn{i}") for i in (1, 2)]  # The last one's ReLU is float.
    changed = {v.ref() for norm in norms for v in (norm.gamma, norm.beta)}
    others = [v for v in model.weights if v.ref() not in changed]
    before = nets.snapshot(others)
    scales = nets.snapshot([norm.gamma for norm in norms])
    assert calibrate(model, [nets.images()]) == ["relu1/output", "relu2/output"]
    nets.assert_all_equal(nets.snapshot(others), before)
    for norm, scale in zip(norms, scales, strict=True):
        assert not np.allclose(norm.gamma, scale)
    assert model.get_layer("dropout1").rate == 0.3


@pytest.mark.slow
def test_behind_pooling_and_without_beta():
    between = keras.Sequential(
        [layers.Reshape((4, 2)), layers.MaxPooling1D(2), layers.Flatten()]
    )
    names, quantized = fitted(
        nets.randomize(normalized_network(between=between, center=False))
    )
    assert names == ["relu/output"]
    assert np.ptp(quantized.get_layer("bn").gamma.numpy()) < 1e-6
    assert quantized.get_layer("bn").gamma.numpy()[0] < 2.5


ALONE = {
    "told so": ({}, {"fit_batch_norm": False}),
    "read by another layer": ({"beside": True}, {}),
    "an output of the model": ({"shown": True}, {}),
    "frozen": ({"trainable": False}, {}),
    "a learned clip": ({}, {"quantizer": "lsq"}),
    "another function between": ({"between": layers.Activation("tanh")}, {}),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", ALONE)
def test_normalisation_is_left_alone(case):
    network, options = ALONE[case]
    names, quantized = fitted(nets.randomize(normalized_network(**network)), **options)
    assert names == (["relu/output"] if case == "a learned clip" else [])
    np.testing.assert_array_equal(scale_of(quantized), np.ones(16))


@pytest.mark.slow
def test_without_gamma_there_is_nothing_to_scale():
    names, quantized = fitted(nets.randomize(normalized_network(scale=False)))
    assert names == []
    np.testing.assert_array_equal(quantized.get_layer("bn").beta, [0.5] * 8)


@pytest.mark.slow
def test_a_normalisation_that_is_called_twice_is_left_alone():
    inputs = keras.Input((5,), name="in")
    norm, dense = layers.BatchNormalization(name="bn"), layers.Dense(5, name="dense")
    x = layers.ReLU(name="relu1")(norm(inputs))
    x = layers.Dense(3, name="mid")(layers.ReLU(name="relu2")(norm(dense(x))))
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    quantized = quantize(model, PrecisionRule(".*", None, 2))
    before = nets.snapshot(quantized.weights)
    assert calibrate(quantized, BATCHES) == []
    nets.assert_all_equal(nets.snapshot(quantized.weights), before)


@pytest.mark.slow
def test_data_that_are_not_finite_leave_gamma_as_it_was():
    quantized = quantize(nets.randomize(nets.chain()), PrecisionRule(".*", 2, 2))
    before = nets.snapshot(quantized.weights)
    data = nets.images()
    data[1, 2, 2, 0] = np.nan
    with pytest.raises(ValueError, match=r"^relu1/output: .*NaN or inf"):
        calibrate(quantized, [nets.images(), data])
    nets.assert_all_equal(nets.snapshot(quantized.weights), before)


@pytest.mark.slow
def test_the_stripped_network_has_the_new_scales():
    _, quantized = fitted(nets.randomize(normalized_network()))
    np.testing.assert_array_equal(
        strip(quantized).get_layer("bn").gamma, quantized.get_layer("bn").gamma
    )
