"""`recalibrate_batch_norm`, and how far moving statistics lag."""

import functools

import numpy as np
import pytest

from tests.scheme import nets
from tf_lowbit import (
    LowBitTrainer,
    PrecisionRule,
    StochasticPrecision,
    calibrate,
    quantize,
    recalibrate_batch_norm,
)
from tf_lowbit.calibration.batch_norm import lag
from tf_lowbit.compat import keras, tf

layers = keras.layers
BATCHES = [nets.images(16, (5,), seed) for seed in range(3)]

# The moving averages of batch normalisation.

IMAGES = [nets.images(count, seed=count) for count in (8, 2, 4)]
NORMS = ["bn1", "bn2", "bn3"]


@functools.cache
def cached_chain(dropout):
    model = nets.randomize(nets.chain(dropout=dropout))
    model = quantize(model, PrecisionRule(".*", 2, 2))
    return model, model.get_weights()


def quantized_chain(dropout=0.5):
    """With other moving averages than any data have."""
    model, weights = cached_chain(dropout)
    model.set_weights(weights)
    for name in NORMS:
        model.get_layer(name).moving_mean.assign([7.0] * 4)
        model.get_layer(name).momentum = 0.9
    return model


def averages(model, norms=NORMS):
    found = [model.get_layer(name) for name in norms]
    return [v.numpy() for bn in found for v in (bn.moving_mean, bn.moving_variance)]


def images_seen(model, batches):
    """What each normalisation reads in the training mode, batch by batch."""
    names = ["stem", "mid", "last"]
    observer = keras.Model(model.inputs, [model.get_layer(n).output for n in names])
    seen = [[y.numpy() for y in observer(x, training=True)] for x in batches]
    return zip(*seen, strict=True)


def expected_averages(batches):
    """Means over the batches of what the quantized network computes on each.

    The running variance is the unbiased one, as Keras's kernel for images has it.
    """
    expected = []
    for seen in images_seen(quantized_chain(dropout=0.0), batches):
        axes = (0, 1, 2)
        expected.append(np.mean([y.mean(axes) for y in seen], 0))
        sizes = [y.size / y.shape[-1] for y in seen]
        variances = [
            y.var(axes) * n / (n - 1) for y, n in zip(seen, sizes, strict=True)
        ]
        expected.append(np.mean(variances, 0))
    return expected


def assert_averages(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batches", [1, 2, 3, 32])
def test_moving_averages_become_the_plain_means_of_the_batches(batches):
    model = quantized_chain()
    assert recalibrate_batch_norm(model, IMAGES, batches) == NORMS
    assert_averages(averages(model), expected_averages(IMAGES[:batches]))


def test_nothing_but_moving_averages_is_measured_anew():
    model = quantized_chain()
    norms = [model.get_layer(name) for name in NORMS]
    kept = {v.ref() for bn in norms for v in (bn.moving_mean, bn.moving_variance)}
    others = [v for v in model.variables if v.ref() not in kept]
    assert len(others) == len(model.variables) - 6
    before = nets.snapshot(others)
    recalibrate_batch_norm(model, IMAGES)
    nets.assert_all_equal(nets.snapshot(others), before)
    assert [bn.momentum for bn in norms] == [0.9] * 3
    assert [model.get_layer(f"dropout{i}").rate for i in (1, 2, 3)] == [0.5] * 3


def test_measuring_again_gives_the_same_averages():
    model = quantized_chain()
    recalibrate_batch_norm(model, IMAGES)
    before = averages(model)
    recalibrate_batch_norm(model, IMAGES)
    assert_averages(averages(model), before)


def test_batches_with_labels_and_weights_are_read_for_their_inputs():
    model = quantized_chain()
    data = [(x, np.zeros(len(x)), np.ones(len(x))) for x in IMAGES]
    recalibrate_batch_norm(model, data)
    assert_averages(averages(model), expected_averages(IMAGES))


def test_the_variance_of_features_is_the_biased_one():
    """Keras has another kernel for what are no images."""
    model = keras.Sequential([layers.BatchNormalization(input_shape=(5,))])
    (name,) = recalibrate_batch_norm(model, BATCHES)
    assert name == model.layers[0].name
    expected = [np.mean([x.mean(0) for x in BATCHES], 0)]
    expected.append(np.mean([x.var(0) for x in BATCHES], 0))
    assert_averages(averages(model, [name]), expected)


def test_frozen_averages_stay():
    model = quantized_chain()
    model.get_layer("bn2").trainable = False
    before = averages(model)
    assert recalibrate_batch_norm(model, IMAGES) == ["bn1", "bn3"]
    model.get_layer("bn2").trainable = True
    after = averages(model)
    changed = [(old != new).any() for old, new in zip(before, after, strict=True)]
    assert changed == [True, True, False, False, True, True]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused_and_nothing_changes(value):
    model = quantized_chain()
    before = nets.snapshot(model.variables)
    data = [*IMAGES, IMAGES[0] * value]
    with pytest.raises(ValueError, match=r"finite.* Received: bn1/moving_mean"):
        recalibrate_batch_norm(model, data)
    nets.assert_all_equal(nets.snapshot(model.variables), before)
    assert model.get_layer("bn1").momentum == 0.9
    assert model.get_layer("dropout1").rate == 0.5


def test_an_error_in_the_data_changes_nothing():
    def broken():
        yield IMAGES[0]
        raise OSError("the disk")

    model = quantized_chain()
    before = nets.snapshot(model.variables)
    with pytest.raises(OSError, match="the disk"):
        recalibrate_batch_norm(model, broken())
    nets.assert_all_equal(nets.snapshot(model.variables), before)
    assert model.get_layer("bn1").momentum == 0.9
    assert model.get_layer("dropout1").rate == 0.5


@pytest.mark.parametrize("dataset", [[], iter(()), tf.data.Dataset.range(0)])
def test_no_data_are_refused_and_nothing_changes(dataset):
    model = quantized_chain()
    before = nets.snapshot(model.variables)
    with pytest.raises(ValueError, match=r"dataset must hold.*Received: none"):
        recalibrate_batch_norm(model, dataset)
    nets.assert_all_equal(nets.snapshot(model.variables), before)


@pytest.mark.parametrize("batches", [0, -1])
def test_no_batches_to_measure_are_refused(batches):
    with pytest.raises(ValueError, match=f"Received: batches={batches}"):
        recalibrate_batch_norm(quantized_chain(), IMAGES, batches=batches)


def test_averages_that_were_not_finite_before_are_replaced():
    """What is left of a training that diverged."""
    model = keras.Sequential([layers.BatchNormalization(input_shape=(5,), name="bn")])
    expected = [np.mean([x.mean(0) for x in BATCHES], 0)]
    expected.append(np.mean([x.var(0) for x in BATCHES], 0))
    model.layers[0].moving_mean.assign([np.nan] * 5)
    assert recalibrate_batch_norm(model, BATCHES) == ["bn"]
    assert_averages(averages(model, ["bn"]), expected)


def test_a_shared_normalisation_is_refused():
    inputs = keras.Input((5,), name="in")
    bn = layers.BatchNormalization(name="bn")
    doubled = 2.0 * inputs + 1.0
    model = keras.Model(inputs, layers.Concatenate()([bn(inputs), bn(doubled)]))
    before = averages(model, ["bn"])
    with pytest.raises(ValueError, match=r"called only once.*Received: \['bn'\]"):
        recalibrate_batch_norm(model, BATCHES)
    assert_averages(averages(model, ["bn"]), before)


def test_a_nested_models_normalisation_is_measured_too():
    inner = keras.Sequential([layers.BatchNormalization(input_shape=(5,), name="bn")])
    inputs = keras.Input((5,), name="in")
    model = keras.Model(inputs, inner(inputs))
    assert recalibrate_batch_norm(model, BATCHES) == ["bn"]
    expected = [np.mean([x.mean(0) for x in BATCHES], 0)]
    expected.append(np.mean([x.var(0) for x in BATCHES], 0))
    assert_averages(averages(inner, ["bn"]), expected)


def test_a_nested_model_that_is_called_twice_is_refused():
    inner = keras.Sequential([layers.BatchNormalization(input_shape=(5,), name="bn")])
    inputs = keras.Input((5,), name="in")
    model = keras.Model(inputs, layers.Add()([inner(inputs), inner(2.0 * inputs)]))
    with pytest.raises(ValueError, match=r"called only once.*Received: \['bn'\]"):
        recalibrate_batch_norm(model, BATCHES)


STUDENT_NORMS = ["bn_first", "bn_mid", "bn_last"]


@functools.cache
def cached_student(name):
    x = inputs = keras.Input((5,), name="in")
    for layer in ("first", "mid", "last"):
        x = layers.Dense(4, name=layer)(x)
        x = layers.BatchNormalization(name=f"bn_{layer}")(x)
        x = layers.ReLU(name=f"relu_{layer}")(x)
    model = keras.Model(inputs, layers.Dense(nets.CLASSES, name="head")(x), name=name)
    rule = PrecisionRule(".*", 2, 2, activation_quantizer="lsq")
    model = quantize(nets.randomize(model), rule)
    return model, model.get_weights()


def student(name="one"):
    """Those of other names are other networks with the same weights."""
    model, weights = cached_student(name)
    model.set_weights(weights)
    return model


def trainer_of_two():
    teacher = keras.Sequential(
        [
            layers.BatchNormalization(input_shape=(5,), name="bn"),
            layers.Dense(nets.CLASSES),
        ]
    )
    return LowBitTrainer({name: student(name) for name in ("one", "two")}, teacher)


def test_a_trainers_students_are_measured_and_its_teacher_is_not():
    trainer = trainer_of_two()
    before = nets.snapshot(trainer.teacher.variables)
    assert recalibrate_batch_norm(trainer, BATCHES) == STUDENT_NORMS * 2
    nets.assert_all_equal(nets.snapshot(trainer.teacher.variables), before)
    first, second = (averages(model, STUDENT_NORMS) for model in trainer.students)
    nets.assert_all_equal(first, second)
    kernel, bias = trainer.student.get_layer("first").get_weights()
    expected = np.mean([(x @ kernel + bias).mean(0) for x in BATCHES], 0)
    np.testing.assert_allclose(first[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("measure", [calibrate, recalibrate_batch_norm])
def test_where_one_student_fails_the_others_stay_as_they_were(measure):
    trainer = trainer_of_two()
    trainer.students[1].get_layer("first").kernel.assign(np.full((5, 4), np.nan))
    before = nets.snapshot(trainer.student.variables)
    with pytest.raises(ValueError, match=r"finite|NaN"):
        measure(trainer, BATCHES)
    nets.assert_all_equal(nets.snapshot(trainer.student.variables), before)


@pytest.mark.quick(1)
@pytest.mark.parametrize("measure", [calibrate, recalibrate_batch_norm])
def test_an_iterator_serves_all_students(measure):
    """Each reads the same batches, also where they come only once."""
    trainer = trainer_of_two()
    names = measure(trainer, BATCHES)
    expected = nets.snapshot(trainer.student.variables)
    trainer = trainer_of_two()
    assert measure(trainer, iter(BATCHES)) == names
    for network in trainer.students:
        nets.assert_all_equal(nets.snapshot(network.variables), expected)


@pytest.mark.slow
def test_after_stochastic_precision_without_a_tail_evaluation_changes():
    """The moving averages were those of the network without rounding."""
    precision = StochasticPrecision(schedule=lambda t: 0.0 * t)
    trainer = LowBitTrainer(student(), stochastic_precision=precision)
    calibrate(trainer, BATCHES)
    trainer.compile(
        keras.optimizers.SGD(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = np.concatenate(BATCHES), nets.labels(48)
    trainer.fit(x, y, batch_size=16, epochs=60, verbose=0)
    losses = [trainer.evaluate(x, y, verbose=0)]
    recalibrate_batch_norm(trainer, BATCHES)
    losses.append(trainer.evaluate(x, y, verbose=0))
    assert abs(losses[1] - losses[0]) > 5e-3


def test_batches_of_one_example_are_refused_where_nothing_varies():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3, name="dense")])
    model.add(layers.BatchNormalization(name="norm"))
    before = nets.snapshot(model.variables)
    ones = [images[:1] for images in BATCHES]
    with pytest.raises(ValueError, match=r"more than one example. Received: 'norm'"):
        recalibrate_batch_norm(model, ones)
    nets.assert_all_equal(nets.snapshot(model.variables), before)
    # Dead channels do not vary, and are no reason.
    model.get_layer("dense").kernel.assign(tf.zeros((5, 3)))
    assert recalibrate_batch_norm(model, BATCHES) == ["norm"]
    np.testing.assert_array_equal(model.get_layer("norm").moving_variance, 0.0)


def test_one_image_has_several_values():
    image = keras.Input((4, 4, 2))
    model = keras.Model(image, layers.BatchNormalization(name="norm")(image))
    data = nets.images(1, (4, 4, 2))
    assert recalibrate_batch_norm(model, [data]) == ["norm"]
    mean = model.get_layer("norm").moving_mean
    np.testing.assert_allclose(mean, data.mean((0, 1, 2)), atol=1e-6)


def test_noise_and_augmentation_are_off():
    image = keras.Input((6, 6, 2))
    x = layers.RandomTranslation(0.5, 0.5, fill_mode="constant")(image)
    x = layers.GaussianNoise(100.0)(x)
    model = keras.Model(image, layers.BatchNormalization(name="norm")(x))
    data = nets.images(16, (6, 6, 2))
    recalibrate_batch_norm(model, [data])
    norm = model.get_layer("norm")
    np.testing.assert_allclose(norm.moving_mean, data.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(
        norm.moving_variance, data.var((0, 1, 2)), rtol=0.01, atol=1e-5
    )


@pytest.mark.slow
def test_what_is_called_with_training_false_keeps_its_averages():
    base = keras.Sequential(
        [
            layers.Conv2D(4, 3, input_shape=(8, 8, 3)),
            layers.BatchNormalization(name="held"),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
        ]
    )
    base.get_layer("held").set_weights([np.full(4, value) for value in (1, 0, 5, 9)])
    inputs = keras.Input((8, 8, 3))
    outputs = layers.BatchNormalization(name="moved")(base(inputs, training=False))
    outputs = layers.Dense(2)(layers.Flatten()(outputs))
    model = quantize(
        keras.Model(inputs, outputs), PrecisionRule("conv", 8, 8, "uniform", "uniform")
    )
    x = np.random.default_rng(0).normal(2, 3, (16, 8, 8, 3)).astype("float32")
    assert recalibrate_batch_norm(model, [x]) == ["moved"]
    held = model.get_layer("held")
    np.testing.assert_array_equal(held.moving_mean, np.full(4, 5))
    np.testing.assert_array_equal(held.moving_variance, np.full(4, 9))


@pytest.mark.slow
def test_normalisation_within_another_layer_is_measured():
    inputs = keras.Input((3, 4, 2))
    outputs = layers.TimeDistributed(layers.BatchNormalization())(inputs)
    outputs = layers.Dense(4, name="middle")(layers.Flatten()(outputs))
    model = quantize(
        keras.Model(inputs, layers.Dense(2)(outputs)), PrecisionRule("middle", 2, 8)
    )
    x = np.random.default_rng(0).normal(2, 3, (16, 3, 4, 2)).astype("float32")
    assert len(recalibrate_batch_norm(model, [x])) == 1
    (norm,) = (m for m in model.submodules if isinstance(m, layers.BatchNormalization))
    np.testing.assert_allclose(norm.moving_mean, x.mean((0, 1, 2)), rtol=1e-4)


# --- lag


def test_lag_is_in_standard_deviations_and_changes_nothing():
    model = keras.Sequential([layers.BatchNormalization(input_shape=(5,), name="bn")])
    recalibrate_batch_norm(model, BATCHES)
    norm = model.get_layer("bn")
    assert lag(model, BATCHES) == {"bn": pytest.approx(0.0, abs=1e-5)}
    deviation = np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    norm.moving_mean.assign_add(0.3 * deviation)
    norm.moving_variance.assign(deviation**2 / 1.4**2 - norm.epsilon)
    before = nets.snapshot(model.variables)
    # The shift is 0.3 of the old deviation and so 0.42 of the new one.
    assert lag(model, BATCHES)["bn"] == pytest.approx(np.hypot(0.42, 0.4), rel=1e-4)
    nets.assert_all_equal(nets.snapshot(model.variables), before)
    assert norm.momentum == 0.99


def test_lag_of_several_students_has_their_names():
    trainer = trainer_of_two()
    recalibrate_batch_norm(trainer, BATCHES)
    trainer.students[1].get_layer("bn_mid").moving_mean.assign([9.0] * 4)
    lags = lag(trainer, iter(BATCHES))
    assert list(lags) == [f"{s}/{n}" for s in ("one", "two") for n in STUDENT_NORMS]
    assert [name for name, value in lags.items() if value > 0.1] == ["two/bn_mid"]
