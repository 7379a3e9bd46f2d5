"""How often codes flip, and the freezing of weights, against NumPy and by hand."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import oscillation

layers = keras.layers
STEP = 0.25


def dense(count, name="lsq", bits=2):
    """A network of one quantized kernel, [count, 1]; LSQ's step is 0.25."""
    image = keras.Input((count,))
    model = keras.Model(image, layers.Dense(1, use_bias=False, name="dense")(image))
    model = tfl.quantize(model, tfl.PrecisionRule("dense", bits, 8, name))
    if name == "lsq":
        nets.by_name(model)["dense/kernel"].variables["step"].assign(STEP)
    return model


def tracked(model):
    (found,) = oscillation.track(model)
    return found


def put(weight, codes):
    """Moves the latent weights to levels, slightly off."""
    weight.weights.assign(np.reshape(codes, (-1, 1)) * STEP + 0.01)


def looked(weight, threshold=1.0, momentum=0.1):
    weight.look(tf.constant(threshold), momentum)


def column(variable):
    return np.ravel(variable.numpy())


def test_a_flip_is_a_change_against_the_last_one():
    weight = tracked(dense(4))
    # Drifts up; goes back and forth; goes back after a pause; never moves.
    for codes in ([-2, 0, 0, 1], [-1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1]):
        put(weight, codes)
        looked(weight)
    # Flips in steps 3 and 4; in step 4.
    np.testing.assert_allclose(
        column(weight.frequency), [0, 0.1 * 0.9 + 0.1, 0.1, 0], rtol=1e-6
    )
    assert weight.oscillating_share() == 0.5
    assert weight.frozen_share() == 0


def oracle(walk, momentum, threshold):
    """Frequencies, flags and codes of frozen weights after the codes in `walk`."""
    before = average = walk[0].astype(float)
    direction, frequency = np.zeros_like(before), np.zeros_like(before)
    frozen, kept = np.zeros(len(before), bool), before
    for codes in walk:
        codes = np.where(frozen, kept, codes)
        change = np.sign(codes - before)
        flipped = (change * direction < 0) & ~frozen
        frequency = momentum * flipped + (1 - momentum) * frequency
        new = (frequency > threshold) & ~frozen
        kept = np.where(new, np.round(average), kept)
        frozen = frozen | new
        average = momentum * codes + (1 - momentum) * average
        direction = np.where(change != 0, change, direction)
        before = np.where(frozen, kept, codes)
    return frequency, frozen, kept


def test_a_random_walk_as_numpy_counts_it():
    rng = np.random.default_rng(3)
    walk = np.clip(np.cumsum(rng.integers(-1, 2, (40, 50)), axis=0), -2, 1)
    weight = tracked(dense(50))
    look = tf.function(weight.look)
    for codes in walk:
        put(weight, codes)
        look(tf.constant(0.25), 0.1)
    frequency, frozen, kept = oracle(walk, 0.1, 0.25)
    np.testing.assert_allclose(column(weight.frequency), frequency, atol=1e-6)
    np.testing.assert_array_equal(column(weight.frozen), frozen)
    assert 10 < frozen.sum() < 40
    # On the level, and not 0.01 off as the others.
    np.testing.assert_allclose(column(weight.weights)[frozen], kept[frozen] * STEP)
    np.testing.assert_allclose(
        column(weight.weights)[~frozen], walk[-1][~frozen] * STEP + 0.01
    )


def freeze_first(weight):
    """Flips the first weight until it is frozen; the others stay."""
    for step in range(4):
        values = weight.weights.numpy()
        values[0] = (-0.6, 0.6)[step % 2]
        weight.weights.assign(values)
        looked(weight, threshold=0.15)
    np.testing.assert_array_equal(column(weight.frozen), [True, *[False] * 7])


def some_weights(name, bits=2):
    weight = tracked(dense(8, name, bits))
    weight.weights.assign(np.linspace(0.2, 0.9, 8, dtype=np.float32)[:, None])
    return weight


@pytest.mark.parametrize("name", ["lsq", "dorefa", "statsq", "uniform"])
def test_a_frozen_weight_keeps_its_code_whatever_moves(name):
    weight = some_weights(name)
    freeze_first(weight)
    code = weight.tensor.codes().numpy()[0, 0]
    place = weight.weights.numpy()[0, 0]
    # The optimizer moves it, and the free ones, which may move the grid.
    for shift in (0.4, -0.3, 0.2):
        weight.weights.assign_add(tf.fill((8, 1), shift))
        free = weight.weights.numpy()[1:]
        looked(weight)
        assert weight.tensor.codes().numpy()[0, 0] == code
        np.testing.assert_array_equal(weight.weights.numpy()[1:], free)
    # Where the grid has not left it, it has not moved at all.
    weight.weights.assign_add(tf.fill((8, 1), -0.3))
    looked(weight)
    if name == "lsq":
        assert weight.weights.numpy()[0, 0] == place == np.float32(code * STEP)


def test_a_frozen_weight_follows_a_step_that_would_change_its_code():
    weight = some_weights("lsq", bits=4)
    put(weight, [5, *[1] * 7])
    looked(weight)
    for code in (6, 5, 6, 5, 6):
        put(weight, [code, *[1] * 7])
        looked(weight, threshold=0.25)
    assert column(weight.frozen)[0]
    kept = weight.tensor.codes().numpy()[0, 0]
    assert kept == 5  # Its average is 5 and a little.
    weight.tensor.variables["step"].assign(0.3)
    looked(weight)
    assert weight.tensor.codes().numpy()[0, 0] == kept
    np.testing.assert_allclose(weight.weights.numpy()[0, 0], 5 * 0.3, rtol=1e-6)


def test_other_bits_start_anew():
    weight = some_weights("lsq")
    freeze_first(weight)
    weight.tensor.assign_bits(4)
    weight.weights.assign_add(tf.fill((8, 1), 0.05))
    moved = weight.weights.numpy()
    looked(weight, threshold=0.15)
    np.testing.assert_array_equal(weight.weights.numpy(), moved)
    assert weight.frozen_share() == weight.oscillating_share() == 0
    assert not column(weight.frequency).any()
    # Beyond 4 bits nothing is counted.
    weight.tensor.assign_bits(32)
    for _ in range(4):
        freeze = np.random.default_rng(0).normal(size=(8, 1))
        weight.weights.assign(freeze)
        looked(weight, threshold=0.001)
    assert weight.frozen_share() == weight.oscillating_share() == 0


def test_only_what_was_made_for_few_bits_is_tracked():
    rules = [tfl.PrecisionRule("mid", 8, 8, "lsq"), tfl.PrecisionRule(".*", 4, 4)]
    model = tfl.quantize(nets.chain(), rules)
    assert oscillation.tracked(model) == []
    names = [weight.tensor.name for weight in oscillation.track(model)]
    assert names == ["last/kernel"]
    assert len(oscillation.tracked(model)) == 1
    assert not any("frequency" in weight.name for weight in model.weights)


def test_statistics_tell_the_shares():
    model = dense(8)
    (found,) = tfl.statistics(model)
    assert found.oscillating is None
    assert found.frozen is None
    weight = tracked(model)
    weight.weights.assign(np.linspace(0.2, 0.9, 8, dtype=np.float32)[:, None])
    freeze_first(weight)
    (found,) = tfl.statistics(model)
    assert (found.oscillating, found.frozen) == (1 / 8, 1 / 8)
    assert found.as_dict()["frozen"] == 1 / 8
