"""All that has a state at once: a resumed run equals the uninterrupted one."""

import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tests.training import test_trainer as base
from tf_lowbit.callbacks import OscillationFreezing, Recovery, StagedPrecision
from tf_lowbit.compat import keras, tf

STEPS, EPOCHS = 3, 4
INPUTS = nets.images(4 * STEPS, (5,))
LABELS = nets.labels(4 * STEPS)


def dataset():
    return tf.data.Dataset.from_tensor_slices((INPUTS, LABELS)).batch(4)


def trainer():
    rule = tfl.PrecisionRule(".*", 2, 2, "lsq", "lsq", edges=True)
    student = tfl.quantize(nets.randomize(base.net(1), 1), rule)
    tfl.calibrate(student, dataset())
    model = tfl.LowBitTrainer(
        student,
        nets.randomize(base.net(3), 1),
        distillation=tfl.JointDistillation(hints=base.HINTS),
        stochastic_precision=tfl.StochasticPrecision(seed=3),
    )
    adam = keras.optimizers.AdamW
    model.compile(
        adam(0.02, weight_decay=0.01),
        loss=base.SPARSE(),
        teacher_optimizer=adam(0.01),
    )
    return model


def trained(*others):
    model, freezing = trainer(), OscillationFreezing(0.05, 0.05, 0.1)
    stages = [
        tfl.Stage(1, 4, 32, 0.02, teacher="absent"),
        tfl.Stage(2, 2, 4, 0.02, "cosine", warmup=0.2),
        tfl.Stage(1, 2, 2, 0.01, teacher="frozen"),
    ]
    staging = StagedPrecision(stages, data=dataset())
    done = others[-1].position.step if others else 0
    model.fit(
        dataset().skip(done).concatenate(dataset().repeat()),
        steps_per_epoch=STEPS,
        epochs=EPOCHS,
        validation_data=dataset(),
        verbose=0,
        callbacks=[staging, freezing, *others],
    )
    state = model.student.oscillation.tensors
    frozen = [v for own in state for v in (own.frozen, own.average, own.codes)]
    counters = model.staging.epochs_done, model.staging.stage
    return [*base.complete(model), nets.snapshot([*frozen, *counters])]


class Killed(keras.callbacks.Callback):
    """Ends a training behind so many steps."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_mixture_of_all_is_resumed_exactly(tmp_path):
    whole = trained()
    for stop in (5, 10):  # In the second and in the last phase.
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            trained(Killed(stop), Recovery(folder, every=2))
        base.assert_same(trained(Recovery(folder, every=2)), whole)
