"""Statistics of tensors, against what NumPy and the definitions say."""

import functools
import math

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras

layers = keras.layers


def one_layer(kernel, rule):
    """A network whose only quantized layer has these weights, [inputs, 1]."""
    kernel = np.asarray(kernel, np.float32).reshape(-1, 1)
    image = keras.Input((len(kernel),))
    x = layers.ReLU(name="relu")(image)
    model = keras.Model(image, layers.Dense(1, use_bias=False, name="dense")(x))
    model.get_layer("dense").set_weights([kernel])
    return tfl.quantize(model, rule)


def by_name(found):
    return {tensor.name: tensor for tensor in found}


def test_learned_steps_by_hand():
    rule = tfl.PrecisionRule("dense", 2, 2, "lsq", "lsq")
    model = one_layer([-0.9, -0.2, 0.1, 0.3, 0.31, 0.8], rule)
    tensors = nets.by_name(model)
    tensors["dense/kernel"].variables["step"].assign(0.25)
    tensors["relu/output"].variables["step"].assign(1.0)
    # Codes -2 (clipped), -1, 0, 1, 1, 1 (clipped).
    found = by_name(tfl.statistics(model))
    assert list(found) == ["dense/kernel"]
    weights = found["dense/kernel"]
    assert (weights.role, weights.bits, weights.step) == ("weight", 2, 0.25)
    assert weights.codes == (-2, -1, 0, 1)
    np.testing.assert_allclose(weights.occupancy, [1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert weights.clip_rate == pytest.approx(2 / 6)
    values = np.array([-0.9, -0.2, 0.1, 0.3, 0.31, 0.8])
    error = np.array([-0.5, -0.25, 0, 0.25, 0.25, 0.25]) - values
    expected = 10 * np.log10((values**2).sum() / (error**2).sum())
    assert weights.sqnr == pytest.approx(expected, rel=1e-5)
    assert weights.entropy == pytest.approx(3 / 6 * math.log2(6) + 0.5)
    # Activations: 0, 1, 2 and beyond 3; below 0 is the ReLU's affair, and no clip.
    data = [np.array([[-5.0, 0.2, 1.4, 2.2, 3.3, 9.0]], np.float32)]
    outputs = by_name(tfl.statistics(model, data))["relu/output"]
    assert outputs.codes == (0, 1, 2, 3)
    np.testing.assert_allclose(outputs.occupancy, [2 / 6, 1 / 6, 1 / 6, 2 / 6])
    assert outputs.clip_rate == pytest.approx(1 / 6)
    error = np.array([0.0, 0.2, 0.4, 0.2, 0.3, 6.0])
    signal = (np.array([0, 0.2, 1.4, 2.2, 3.3, 9.0]) ** 2).sum()
    assert outputs.sqnr == pytest.approx(
        10 * np.log10(signal / (error**2).sum()), rel=1e-5
    )


def test_weights_without_a_zero_are_measured_on_their_own_scale():
    weights = np.random.default_rng(1).normal(size=50)
    model = one_layer(weights, tfl.PrecisionRule("dense", 2, 2))
    (found,) = tfl.statistics(model)
    assert found.codes == (-3, -1, 1, 3)
    exact = np.tanh(weights) / np.abs(np.tanh(weights)).max()
    codes = 2 * np.round(3 * (exact / 2 + 0.5)) - 3
    expected = 10 * np.log10((exact**2).sum() / ((codes / 3 - exact) ** 2).sum())
    assert found.sqnr == pytest.approx(expected, abs=1e-3)
    assert found.clip_rate == 0
    np.testing.assert_allclose(
        found.occupancy, [(codes == code).mean() for code in (-3, -1, 1, 3)]
    )


@functools.cache
def calibrated_at_4_bits(name):
    rule = tfl.PrecisionRule(".*", 4, 4, name, name, edges=True)
    model = tfl.quantize(nets.randomize(nets.chain()), rule)
    tfl.calibrate(model, [nets.images(seed=1), nets.images(seed=2)])
    return model


def assign_all(model, bits):
    for tensor in tfl.inspection.quantized_tensors(model):
        tensor.assign_bits(bits)


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["dorefa", "lsq", "uniform"])
def test_shares_add_up_and_more_bits_are_nearer(name, bits):
    model = calibrated_at_4_bits(name)
    data = [nets.images(seed=seed) for seed in (1, 2)]
    assign_all(model, bits)
    found = tfl.statistics(model, data, batches=2)
    assert len(found) == len(list(tfl.inspection.quantized_tensors(model)))
    assign_all(model, 8)
    finer = by_name(tfl.statistics(model))
    for tensor in found:
        assert sum(tensor.occupancy) == pytest.approx(1)
        assert sum(tensor.counts) == pytest.approx(1)
        assert 16 <= len(tensor.counts) <= 128
        assert len(tensor.edges) == len(tensor.counts) + 1
        assert tensor.edges[0] <= tensor.codes[0]
        assert tensor.edges[-1] > tensor.codes[-1]
        assert 0 <= tensor.clip_rate <= 1
        assert 0 <= tensor.entropy <= bits + 1e-9
        assert tensor.step > 0
        if tensor.role == "weight" and bits < 8:
            assert tensor.sqnr < finer[tensor.name].sqnr


def test_several_batches_are_measured_together():
    model = tfl.quantize(nets.randomize(nets.chain()), tfl.PrecisionRule(".*", 3, 3))
    images = nets.images(8)
    whole = by_name(tfl.statistics(model, [images]))
    parts = by_name(tfl.statistics(model, [images[:4], images[4:], images], batches=2))
    for name, tensor in whole.items():
        assert parts[name].sqnr == pytest.approx(tensor.sqnr, abs=1e-3)
        np.testing.assert_allclose(parts[name].occupancy, tensor.occupancy, atol=1e-6)


def test_what_is_not_rounded_has_no_levels():
    model = tfl.quantize(nets.chain(), tfl.PrecisionRule(".*", 32, 32))
    for tensor in tfl.statistics(model, [nets.images()]):
        assert tensor.bits == 32
        assert tensor.codes == tensor.occupancy == tensor.edges == tensor.counts == ()
        assert tensor.entropy == 0
        assert tensor.clip_rate == 0


def test_nothing_wrong_is_infinitely_good():
    model = one_layer([-1, -1 / 3, 1 / 3, 1], tfl.PrecisionRule("dense", 2, 2, "lsq"))
    nets.by_name(model)["dense/kernel"].variables["step"].assign(0.5)
    latent = nets.by_name(model)["dense/kernel"].latent
    latent.assign([[-1.0], [-0.5], [0.0], [0.5]])
    (found,) = tfl.statistics(model)
    assert found.sqnr == math.inf
    assert found.as_dict()["entropy"] == 2


def test_what_cannot_be_measured():
    model = tfl.quantize(nets.chain(), tfl.PrecisionRule(".*", 2, 2))
    with pytest.raises(ValueError, match="Received: batches=0"):
        tfl.statistics(model, batches=0)
    with pytest.raises(ValueError, match="nothing is quantized"):
        tfl.statistics(nets.chain())
    with pytest.raises(ValueError, match=r"at least one batch\. Received: none"):
        tfl.statistics(model, [])
    with pytest.raises(ValueError, match="Received: LowBitTrainer"):
        tfl.statistics(tfl.LowBitTrainer(model))
    images = nets.images()
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"must be finite.*Received: \w+/output with"):
        tfl.statistics(model, [images])
