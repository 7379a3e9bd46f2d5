"""What is measured, against a computation step by step."""

import functools
import re

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tf

layers = keras.layers
RULE = tfl.PrecisionRule(
    ".*", 4, 4, weight_quantizer="lsq", activation_quantizer="lsq", edges=True
)
DATA = [(nets.images(8, seed=s), nets.labels(8, seed=s)) for s in (1, 2)]


@pytest.fixture(scope="module")
def network():
    model = tfl.quantize(nets.randomize(nets.chain(dropout=0.5)), RULE)
    tfl.calibrate(model, DATA)
    # So that no class is always the first.
    bias = model.get_layer("head").layer.bias
    bias.assign_sub(by_hand(model, None, 0).mean(axis=0))
    return model


def measure(model, **options):
    return tfl.sensitivity(model, DATA, (2, 4, 8), progress=False, **options)


@functools.cache
def second_network():
    return tfl.quantize(nets.chain(), RULE)  # Without dropout.


def by_hand(network, name, bits):
    """Outputs with one tensor at some bits, the others at 32, in a second network."""
    model = second_network()
    model.set_weights(network.get_weights())
    for key, tensor in nets.by_name(model).items():
        tensor.assign_bits(bits if key == name else 32)
    return np.concatenate([model(x, training=True) for x, _ in DATA])


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["mid/kernel", "relu1/output", "head/kernel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_ratio_of_signal_to_noise(network, name, bits):
    found = measure(network)
    exact, rounded = by_hand(network, None, 0), by_hand(network, name, bits)
    expected = 10 * np.log10((exact**2).sum() / ((rounded - exact) ** 2).sum())
    assert found.scores[name][bits] == pytest.approx(expected, abs=0.01)
    assert found.loss(name, bits) == pytest.approx(10 ** (-expected / 10), rel=0.01)


@pytest.mark.slow
def test_the_accuracy_that_is_lost(network):
    exact = by_hand(network, None, 0).argmax(axis=1)
    # Right on all but the first; several classes among them.
    labels = np.where(np.arange(16) == 0, (exact + 1) % nets.CLASSES, exact)
    assert len(set(exact)) > 1
    data = [(DATA[0][0], labels[:8]), (DATA[1][0], labels[8:])]
    options = {"metric": "accuracy", "progress": False}
    found = tfl.sensitivity(network, data, [1, 2], **options)
    assert found.reference == 100 * 15 / 16
    lost = []
    for name in nets.by_name(network):
        rounded = by_hand(network, name, 1).argmax(axis=1) == labels
        lost.append(found.scores[name][1])
        assert lost[-1] == pytest.approx(100 * (15 / 16 - rounded.mean()))
        assert found.loss(name, 1) == max(lost[-1], 0)
    assert any(lost)
    one_hot = [(x, np.eye(nets.CLASSES)[y]) for x, y in data]
    again = tfl.sensitivity(network, one_hot, [1, 2], **options)
    assert again.scores == found.scores


@pytest.mark.slow
def test_nothing_is_changed(network):
    before = nets.snapshot(network.variables)
    rates = [x.rate for x in network.layers if isinstance(x, layers.Dropout)]
    measure(network)

    def broken():
        yield DATA[0]
        yield (np.zeros((1, 3, 3, 3), np.float32), np.zeros(1))

    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        tfl.sensitivity(network, broken(), progress=False)
    nets.assert_all_equal(nets.snapshot(network.variables), before)
    assert rates == [0.5] * 3
    assert rates == [x.rate for x in network.layers if isinstance(x, layers.Dropout)]


def test_every_quantizer_but_residual_ones_is_measured():
    model = nets.randomize(nets.preactivation())
    model = tfl.quantize(model, RULE, residual_bits=8)
    tfl.calibrate(model, [nets.images()])
    found = tfl.sensitivity(model, [nets.images()], [8, 2, 2], progress=False)
    tensors = nets.by_name(model)
    assert set(found.scores) == {n for n, t in tensors.items() if not t.is_residual}
    assert len(found.scores) < len(tensors)
    assert found.bits == (2, 8)
    assert found.reference is None
    # More bits, less noise.
    assert all(scores[8] > scores[2] for scores in found.scores.values())


def test_it_prints_as_a_table(network):
    found = measure(network)
    lines = [line for line in str(found).splitlines() if line.strip()]
    assert lines[0].strip() == "SQNR, dB"
    assert lines[1].split() == ["tensor", "2", "bits", "4", "bits", "8", "bits"]
    row = next(line.split() for line in lines if "mid/kernel" in line)
    assert row[1:] == [f"{found.scores['mid/kernel'][b]:.2f}" for b in (2, 4, 8)]
    shown = re.sub(r"<[^>]*>", "", found._repr_html_())
    assert shown.split() == str(found).split()


@pytest.mark.slow
def test_a_tensor_that_rounding_does_not_change():
    image = keras.Input((4,))
    x = layers.Dense(3, name="first")(layers.ReLU(name="in")(image))
    model = tfl.quantize(keras.Model(image, x), tfl.PrecisionRule("first", 1, 1))
    data = [np.float32([[0, 0, 0, 0], [1, 1, 0, 0]])]
    found = tfl.sensitivity(model, data, [1], progress=False)
    assert found.scores["in/output"][1] == np.inf
    assert found.loss("in/output", 1) == 0


REFUSED = {
    "metric": (
        {"metric": "loss"},
        r"one of \('sqnr', 'accuracy'\)\. Received: metric='loss'",
    ),
    "batches": ({"batches": 0}, "Received: batches=0"),
    "not rounded": ({"bits": [2, 16]}, r"from 1 to 8\. Received: bits=\[2, 16\]"),
    "no bits": ({"bits": []}, r"Received: bits=\[\]"),
    "wrong bits": ({"bits": [0]}, "Received: .*0"),
    "empty": ({"dataset": []}, r"at least one batch\. Received: none"),
    "no labels": (
        {"dataset": [nets.images()], "metric": "accuracy"},
        r"must have labels .*Received: batches of x",
    ),
    "float": ({"model": nets.chain()}, "nothing is quantized"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured(name, network):
    changed, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        tfl.sensitivity(**{"model": network, "dataset": DATA} | changed)


@pytest.mark.slow
def test_a_trainer_is_refused(network):
    with pytest.raises(ValueError, match="Received: LowBitTrainer"):
        tfl.sensitivity(tfl.LowBitTrainer(network), DATA)


class Noisy(layers.Layer):
    """One's own, which nothing tells to be random."""

    def call(self, inputs, training=None):
        return inputs + tf.random.normal(tf.shape(inputs)) if training else inputs


def behind(layer):
    """A network whose images pass a layer first."""
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="first")(layer(image))
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten()(layers.Conv2D(4, 3, name="second")(x))
    model = keras.Model(image, layers.Dense(nets.CLASSES, name="head")(x))
    return tfl.quantize(model, tfl.PrecisionRule("second", 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        layers.RandomFlip("horizontal"),
        layers.RandomTranslation(0.3, 0.3),
        layers.GaussianNoise(1.0),
        layers.SpatialDropout2D(0.5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_draw_are_at_rest(layer):
    data = [nets.images(8, (8, 8, 3), seed=1)]
    drawing, plain = behind(layer), behind(layers.Activation("linear"))
    pairs = zip(drawing.trainable_weights, plain.trainable_weights, strict=True)
    for own, other in pairs:
        own.assign(other)
    found = tfl.sensitivity(drawing, data, [2, 8], progress=False)
    assert found.scores == tfl.sensitivity(plain, data, [2, 8], progress=False).scores
    # It draws again afterwards.
    first, second = (drawing(data[0], training=True).numpy() for _ in range(2))
    assert (first != second).any()


@pytest.mark.slow
def test_outputs_that_tell_nothing_are_refused():
    def measured(model, images):
        return tfl.sensitivity(model, [images], [2], progress=False)

    images = nets.images(8, (8, 8, 3), seed=1)
    with pytest.raises(ValueError, match=r"the same for the same batch.*differ, at"):
        measured(behind(Noisy()), images)
    with pytest.raises(ValueError, match=r"differ between examples.*Received: equal"):
        measured(behind(layers.Activation("linear")), np.repeat(images[:1], 3, axis=0))
    images[3, 2, 2, 1] = np.nan
    with pytest.raises(ValueError, match=r"finite.*NaN"):
        measured(behind(layers.Activation("linear")), images)
