"""One device against several, which are logical CPUs: equal within float error."""

import functools
from typing import NamedTuple

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit.callbacks import StagedPrecision
from tf_lowbit.compat import keras, tf

layers = keras.layers
CLASSES, BATCH, STEPS = 4, 16, 20
EVEN = 4 * BATCH
UNEVEN = 3 * BATCH + 5
SHARED = tf.VariableAggregation.ONLY_FIRST_REPLICA
SAMPLED = tfl.StochasticPrecision(seed=5)
HINTED = tfl.JointDistillation(hints=["relu"])
SCHEMES = {
    "dorefa": {},
    "lsq": {"weight_quantizer": "lsq", "activation_quantizer": "lsq"},
    "pact": {"activation_quantizer": tfl.quantizers.PACTActivationQuantizer(2, 3, 0.1)},
}


def network(norm=None, l2=None):
    penalty = keras.regularizers.l2(l2) if l2 else None
    options = {"use_bias": norm is None, "kernel_regularizer": penalty}
    x = image = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(4, 3, strides=3, name="conv", **options)(x)
    if norm is not None:
        x = norm(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(CLASSES, name="head", kernel_regularizer=penalty)(x)
    return keras.Model(image, x)


def trainer_of(
    strategy,
    *,
    precision=None,
    distillation=None,
    scheme="dorefa",
    norm=None,
    l2=None,
    loss=None,
    metrics=None,
    rate=0.05,
):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        rules = [tfl.PrecisionRule(".*", 2, 2, edges=True, **SCHEMES[scheme])]
        trainer = tfl.LowBitTrainer(
            tfl.quantize(network(norm, l2), rules),
            network(norm, l2) if distillation else None,
            distillation=distillation,
            stochastic_precision=precision,
        )
        trainer.compile(
            keras.optimizers.SGD(rate, momentum=0.9),
            loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=metrics,
            teacher_optimizer=keras.optimizers.Adam(0.01) if distillation else None,
        )
    return trainer


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(EVEN, 6, 6, 2)).astype("f")
    return images, rng.integers(0, CLASSES, EVEN), rng.uniform(0, 2, EVEN).astype("f")


def data(examples=UNEVEN, weights=False):
    parts = arrays() if weights else arrays()[:2]
    parts = tuple(part[:examples] for part in parts)
    return tf.data.Dataset.from_tensor_slices(parts).batch(BATCH)


class Recorder(keras.callbacks.Callback):
    """All logs of each step, and the bits of each epoch."""

    def __init__(self):
        super().__init__()
        self.logs, self.bits = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(dict(logs))

    def on_epoch_end(self, epoch, logs=None):
        self.bits.append([t.bits for t in tfl.inspection.quantized_tensors(self.model)])


class Result(NamedTuple):
    logs: list
    evaluation: dict
    state: dict


def train(strategy, examples=UNEVEN, weights=False, evaluate=False, **settings):
    trainer = trainer_of(strategy, **settings)
    batches = data(examples, weights)
    tfl.calibrate(trainer, batches)
    seen = Recorder()
    trainer.fit(batches.repeat(STEPS // 4), callbacks=[seen], verbose=0)
    assert len(seen.logs) == STEPS
    measured = evaluation(trainer, batches) if evaluate else {}
    return Result(seen.logs, measured, state(trainer))


def evaluation(trainer, batches):
    return trainer.evaluate(batches, verbose=0, return_dict=True)


def state(trainer):
    """Of all networks and optimizers, by a name that is unique."""
    optimizers = [trainer.optimizer, trainer.teacher_optimizer]
    held = [*trainer.weights, *(v for o in optimizers if o for v in o.variables)]
    return {f"{i} {v.name}": v.numpy() for i, v in enumerate(held)}


def assert_close(one, several, exactly=()):
    assert one.keys() == several.keys()
    for name, value in one.items():
        error = 0.0 if name in exactly else 1e-5
        np.testing.assert_allclose(several[name], value, error, error, err_msg=name)


def assert_same(one, other):
    assert_close(one, other, exactly=one.keys())


def assert_equals_one_device(one, several):
    for step, other in zip(one.logs, several.logs, strict=True):
        assert_close(step, other, exactly=["quantized_share"])
    assert_close(one.evaluation, several.evaluation)
    assert_close(one.state, several.state)


BOTH = {"precision": SAMPLED, "distillation": HINTED}
CASES = {
    "plain": {},
    "joint": {"distillation": HINTED},
    "sampled": {
        "precision": SAMPLED,
        "scheme": "lsq",
        "weights": True,
        "l2": 0.01,
        "metrics": ["accuracy"],
        "evaluate": True,
    },
}


@functools.cache
def on_one_device(case):
    return train(tf.distribute.get_strategy(), **CASES[case])


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("case", "replicas"),
    [
        ("plain", 2),
        ("plain", 4),
        ("joint", 2),
        ("joint", 4),
        ("sampled", 2),
        ("sampled", 4),
    ],
)
def test_losses_and_weights_are_those_of_one_device(mirrored, case, replicas):
    several = train(mirrored(replicas), **CASES[case])
    assert_equals_one_device(on_one_device(case), several)


@pytest.mark.slow
def test_a_loss_that_is_a_sum_is_summed_over_all_replicas(mirrored):
    kind = keras.losses.SparseCategoricalCrossentropy
    loss = kind(from_logits=True, reduction="sum")
    one, several = (
        train(mirrored(replicas), loss=loss, rate=0.005, scheme="pact")
        for replicas in (1, 4)
    )
    assert_close(one.state, several.state)
    # Of an uneven batch, as the fourth is, the sum that is logged is off, as Keras's.
    for step, other in zip(one.logs[:3], several.logs[:3], strict=True):
        assert_close(step, other)


def test_a_last_batch_leaves_one_of_four_replicas_without_examples(mirrored):
    strategy = mirrored(4)
    parts = [
        [len(part) for part in strategy.experimental_local_results(x)]
        for x, _ in strategy.experimental_distribute_dataset(data())
    ]
    assert parts == [[4] * 4] * 3 + [[2, 2, 1, 0]]


def test_every_replica_draws_the_same_units(mirrored):
    strategy = mirrored(4)
    with strategy.scope():
        step = tf.Variable(7, dtype=tf.int64, aggregation=SHARED)
    draw = tf.function(lambda: SAMPLED.draw(step, 64, 0.5))
    drawn = strategy.experimental_local_results(strategy.run(draw))
    assert len(drawn) == 4
    alone = SAMPLED.draw(tf.constant(7, tf.int64), 64, 0.5)
    assert 0 < np.sum(alone) < 64
    for one in drawn:
        np.testing.assert_array_equal(one, alone)


@pytest.mark.slow
def test_synchronized_batch_norm_is_that_of_one_device(mirrored):
    """Its moving averages too; but a replica without examples leaves its own alone."""
    norm = functools.partial(layers.BatchNormalization, synchronized=True, momentum=0.8)
    one, several = (
        train(mirrored(replicas), EVEN, norm=norm, **BOTH) for replicas in (1, 2)
    )
    assert_equals_one_device(one, several)


@pytest.mark.slow
def test_ordinary_batch_norm_of_equal_parts_is_that_of_one_part(mirrored):
    part = data(BATCH)
    both = part.map(lambda x, y: (tf.concat([x, x], 0), tf.concat([y, y], 0)))
    results = []
    for strategy, batches in ((mirrored(1), part), (mirrored(2), both)):
        trainer = trainer_of(strategy, norm=layers.BatchNormalization)
        trainer.fit(batches.repeat(STEPS), verbose=0)
        results.append(state(trainer))
    assert_close(*results)


@pytest.mark.slow
def test_batch_norm_averages_measured_anew_are_the_same_on_every_replica(mirrored):
    """Those of training are not: each replica keeps its own, and their mean is read."""
    strategy = mirrored(2)
    trainer = trainer_of(strategy, norm=layers.BatchNormalization)
    trainer.fit(data(), epochs=2, verbose=0)
    average = trainer.student.get_layer("norm").moving_mean
    own = [v.numpy() for v in strategy.experimental_local_results(average)]
    assert np.abs(own[0] - own[1]).min() > 1e-4
    np.testing.assert_allclose(average.numpy(), np.mean(own, axis=0), 1e-5)
    tfl.recalibrate_batch_norm(trainer, data())
    own = [v.numpy() for v in strategy.experimental_local_results(average)]
    np.testing.assert_array_equal(*own)
    alone = trainer_of(mirrored(1), norm=layers.BatchNormalization)
    alone.set_weights(trainer.get_weights())
    assert_close(evaluation(alone, data()), evaluation(trainer, data()))


STAGES = tfl.two_stage(2, (1, 1), learning_rate=(0.05, 0.02))


class Write(keras.callbacks.Callback):
    """Writes a checkpoint at the end of the first epoch."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            tf.train.Checkpoint(model=self.model).write(self._path)
            self.at_first_end = state(self.model)


class Staged(NamedTuple):
    trainer: tfl.LowBitTrainer
    bits: list
    traces: list
    path: str
    written: dict


def fit_stages(trainer, *callbacks, initial_epoch=0):
    callbacks = [StagedPrecision(STAGES), *callbacks]
    trainer.fit(
        data(), epochs=2, initial_epoch=initial_epoch, callbacks=callbacks, verbose=0
    )


@pytest.fixture(scope="module")
def staged(mirrored, tmp_path_factory):
    """Stages, stochastic precision and joint distillation, on two replicas."""
    traces = []

    def loss(targets, outputs):
        traces.append(1)
        return keras.losses.sparse_categorical_crossentropy(targets, outputs, True)

    trainer = trainer_of(mirrored(2), scheme="lsq", loss=loss, **BOTH)
    tfl.calibrate(trainer, data())
    write = Write(str(tmp_path_factory.mktemp("staged") / "checkpoint"))
    seen, count = Recorder(), []
    count_traces = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: count.append(len(traces))
    )
    fit_stages(trainer, seen, write, count_traces)
    return Staged(trainer, seen.bits, count, write._path, write.at_first_end)


@pytest.mark.slow
def test_stages_of_a_joint_sampled_training_are_traced_once(staged):
    # On each of two replicas, the loss of student and teacher.
    assert staged.traces == [4, 4]


@pytest.mark.slow
def test_stages_set_the_bits_on_every_replica(mirrored, staged):
    first, second = staged.bits
    assert sorted(set(first)) == [2, 32]
    assert set(second) == {2}
    for tensor in tfl.inspection.quantized_tensors(staged.trainer):
        for own in mirrored(2).experimental_local_results(tensor.variables["bits"]):
            assert own.numpy() == 2


@pytest.mark.slow
def test_a_training_resumed_on_as_many_replicas_is_the_same(mirrored, staged):
    resumed = trainer_of(mirrored(2), scheme="lsq", **BOTH)
    tf.train.Checkpoint(model=resumed).read(staged.path).expect_partial()
    fit_stages(resumed, initial_epoch=1)
    assert_same(state(staged.trainer), state(resumed))


@pytest.mark.slow
def test_a_checkpoint_of_two_replicas_goes_on_on_one_device(mirrored, staged):
    alone = trainer_of(mirrored(1), scheme="lsq", **BOTH)
    tf.train.Checkpoint(model=alone).read(staged.path).expect_partial()
    assert_same(staged.written, state(alone))
    fit_stages(alone, initial_epoch=1)
    assert_close(state(staged.trainer), state(alone))


def test_state_that_is_not_trained_is_aggregated(mirrored):
    trainer = trainer_of(mirrored(2), norm=layers.BatchNormalization, **BOTH)
    state = trainer.non_trainable_variables
    state += [trainer.progress.step, trainer.progress.total_steps]
    names = " ".join(variable.name for variable in state)
    for part in ("optimizer_step", "bits", "clip", "calibrated", "moving_mean"):
        assert part in names
    without = tf.VariableAggregation.NONE
    assert [v.name for v in state if v.aggregation == without] == []


@pytest.mark.slow
def test_the_position_in_the_stages_is_aggregated(staged):
    position = staged.trainer.staging
    for variable in (position.stage, position.epochs_done):
        assert variable.aggregation == SHARED
