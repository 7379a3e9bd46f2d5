"""The teacher's role by stage (QKD's phases), against steps by hand; other teachers."""

import functools

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tests.training import test_trainer as base
from tf_lowbit.callbacks import Recovery, StagedPrecision
from tf_lowbit.compat import keras, tf

layers = keras.layers
X, Y, RATE = base.X, base.Y, base.RATE
ONES = np.ones(len(X))
# Of the losses, where the trainer's teacher is "joint".
ROLES = {None: {}, "frozen": {"teacher": "frozen"}}


def assert_moved(network, before, gradients):
    assert max(np.abs(g).max() for g in gradients) > 1e-3
    pairs = zip(network.trainable_variables, before, gradients, strict=True)
    for variable, old, gradient in pairs:
        moved = (old - variable.numpy()) / RATE
        np.testing.assert_allclose(moved, gradient, rtol=1e-4, atol=2e-5)


def compiled():
    return {
        "optimizer": base.SGD(RATE),
        "teacher_optimizer": base.SGD(RATE),
    }


@pytest.mark.parametrize("role", [None, "frozen"])
def test_a_step_with_a_teacher_equals_the_one_by_hand(role):
    case = {"hints": base.HINTS, **ROLES[role]}
    everyone = base.student(), base.teacher()
    gradients, logs = base.by_hand({"a": base.student()}, base.teacher(), ONES, case)
    model = base.trainer(*everyone, compiled=compiled(), hints=base.HINTS)
    model.assign_teacher("absent")  # A role that comes after another.
    model.assign_teacher(role)
    before = [nets.snapshot(network.trainable_variables) for network in everyone]
    kept = base.teacher().get_weights() if role else None
    found = model.train_on_batch(X, Y, return_dict=True)
    assert_moved(everyone[0], before[0], gradients[0])
    if role == "frozen":
        nets.assert_all_equal(everyone[1].get_weights(), kept)
    else:
        assert_moved(everyone[1], before[1], gradients[1])
    for name in ("loss", "task_loss", "distillation_loss", "hint_loss", "teacher_loss"):
        np.testing.assert_allclose(found[name], logs[name], rtol=1e-5, err_msg=name)


def test_a_step_of_the_student_alone_equals_the_one_by_hand():
    network = base.student()
    (logits,), pull = base.passed(network, [], True)
    gradients = pull([(base.softmax(logits) - np.eye(4)[Y]) / len(X)])
    loss = -np.log(base.softmax(logits)[np.arange(len(Y)), Y]).mean()
    network = base.student()
    penalty = sum(base.decay(v)[0] for v in network.trainable_variables)
    before = nets.snapshot(network.trainable_variables)
    model = base.trainer(network, base.teacher(), compiled=compiled())
    model.assign_teacher("absent")
    kept = base.teacher().get_weights()
    found = model.train_on_batch(X, Y, return_dict=True)
    assert_moved(network, before, gradients)
    nets.assert_all_equal(model.teacher.get_weights(), kept)
    assert set(found) == {"loss", "task_loss"}
    np.testing.assert_allclose(found["task_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], loss + penalty, rtol=1e-5)


class Moves(keras.callbacks.Callback):
    """In each epoch: whether weights of student and teacher move, and the logs."""

    def __init__(self):
        super().__init__()
        self.moved, self.logs = [], []

    def _values(self):
        return base.values(self.model.student, self.model.teacher)

    def on_epoch_begin(self, epoch, logs=None):
        self._before = self._values()

    def on_epoch_end(self, epoch, logs=None):
        pairs = zip(self._before, self._values(), strict=True)
        self.moved.append(
            tuple(
                {not np.array_equal(a, b) for a, b in zip(*pair, strict=True)}
                for pair in pairs
            )
        )
        self.logs.append({n for n in logs if "bits" not in n})


@pytest.mark.quick(1)
@pytest.mark.parametrize("eager", [True, False])
def test_the_teacher_moves_only_while_both_study(eager):
    model, moves = base.trainer(eager=eager), Moves()
    stages = tfl.three_phase(2, (1, 2, 1))
    fit = functools.partial(model.fit, X, Y, batch_size=4, verbose=0)
    fit(epochs=4, callbacks=[StagedPrecision(stages), moves])
    teachers = [teacher for _, teacher in moves.moved]
    # With the moving statistics of its batch normalization.
    assert teachers == [{False}, {True}, {True}, {False}]
    assert all(True in student for student, _ in moves.moved)
    alone = {"loss", "task_loss"}
    both = {*alone, "distillation_loss", "teacher_loss", "teacher_task_loss"}
    assert moves.logs[0] == alone
    assert moves.logs[1] == moves.logs[2] == {*both, "teacher_distillation_loss"}
    assert moves.logs[3] == both
    assert int(model.teacher_optimizer.iterations) == 4
    # Afterwards the trainer is as it was made.
    before = nets.snapshot(model.teacher.trainable_variables)
    model.train_on_batch(X, Y)
    for old, new in zip(before, model.teacher.trainable_variables, strict=True):
        assert not np.array_equal(old, new)


class Stop(keras.callbacks.Callback):
    """Stops a training in its first epoch, as a user does."""

    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_after_an_interrupted_phase_the_teacher_is_back():
    model, moves = base.trainer(), Moves()
    fit = functools.partial(model.fit, X, Y, batch_size=4, verbose=0)
    staging = StagedPrecision(tfl.three_phase(2, (1, 2, 1)))
    with pytest.raises(KeyboardInterrupt):
        fit(epochs=4, callbacks=[staging, Stop()])
    fit(epochs=1, callbacks=[moves])
    assert "distillation_loss" in moves.logs[0]
    assert True in moves.moved[0][1]


def fresh(*networks, optimizer=base.Adam):
    """A trainer that runs as a graph, of new networks with known weights."""
    networks = networks or (base.fresh_student("learned"), base.net(3))
    for network in networks:
        nets.randomize(network, 1)
    options = {"optimizer": optimizer(0.01), "teacher_optimizer": optimizer(0.01)}
    return base.trainer(*networks, eager=False, compiled=options)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_goes_on_in_its_phase(stop, tmp_path):
    """Two steps an epoch; killed in the second and in the third phase."""

    class Killed(keras.callbacks.Callback):
        done = 0

        def on_train_batch_end(self, batch, logs=None):
            self.done += 1
            if self.done > stop:
                raise KeyboardInterrupt

    def fit(*others):
        step = others[-1].position.step if others else 0
        model, data = fresh(), tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
        model.fit(
            data.skip(step).concatenate(data.repeat()),
            steps_per_epoch=2,
            epochs=3,
            verbose=0,
            callbacks=[StagedPrecision(tfl.three_phase(2, 1)), *others],
        )
        return model

    whole = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(Killed(), Recovery(tmp_path, every=1))
    resumed = fit(Recovery(tmp_path, every=1))
    base.assert_same(base.complete(resumed), base.complete(whole))


@pytest.mark.slow
def test_phases_on_two_replicas(mirrored):
    after = []
    for replicas in (1, 2):
        with mirrored(replicas).scope():
            # Without batch normalization, whose statistics are of a replica's batch.
            networks = base.fresh_student("plain"), base.net(5, norm=False)
            model = fresh(*networks, optimizer=base.SGD)
        staged = StagedPrecision(tfl.three_phase(2, 1))
        model.fit(X, Y, shuffle=False, epochs=3, verbose=0, callbacks=[staged])
        after.append([*base.values(model.student, model.teacher)])
    for one, two in zip(*after, strict=True):
        for value, other in zip(one, two, strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-5)


def larger():
    """A deeper and wider network than the student, with a sum in it."""
    penalty = keras.regularizers.L2(base.L2)
    dense = functools.partial(layers.Dense, kernel_regularizer=penalty)
    x = image = keras.Input((5,), name="image")
    x = layers.ReLU()(dense(24, name="wide")(x))
    y = layers.BatchNormalization(name="norm")(dense(24, name="branch")(x))
    x = layers.Add()([x, layers.ReLU()(y)])
    x = dense(nets.CLASSES, name="head")(layers.Dropout(0.5)(x))
    return nets.randomize(keras.Model(image, x, name="larger"), 7)


def test_a_larger_frozen_teacher_and_its_outputs_alone():
    tutor = larger()
    case = {"teacher": "frozen", "task_weight": 0, "distillation_weight": 1.0}
    gradients, logs = base.by_hand({"a": base.student()}, tutor, ONES, case)
    network = base.student()
    before = nets.snapshot(network.trainable_variables)
    kept = tutor.get_weights()
    model = base.trainer(network, tutor, compiled={"optimizer": base.SGD(RATE)}, **case)
    found = model.train_on_batch(X, Y, return_dict=True)
    assert_moved(network, before, gradients[0])
    nets.assert_all_equal(tutor.get_weights(), kept)
    for name in ("loss", "distillation_loss"):
        np.testing.assert_allclose(found[name], logs[name], rtol=1e-5, err_msg=name)
    # Nothing of the labels: others give the same step.
    after = nets.snapshot(network.trainable_variables)
    network = base.student()
    model.train_on_batch(X, (Y + 1) % nets.CLASSES)
    nets.assert_all_equal(nets.snapshot(network.trainable_variables), after)


def test_a_role_needs_a_teacher():
    model = base.trainer(base.student())
    with pytest.raises(ValueError, match=r"with a teacher\. Received: role='frozen'"):
        model.assign_teacher("frozen")
    staged = StagedPrecision(tfl.three_phase(2, 1))
    for each in (model, base.student()):
        if not each.optimizer:
            each.compile(base.SGD(0.1), base.SPARSE())
        with pytest.raises(ValueError, match=r"Received: a stage of teacher='absent'"):
            each.fit(X, Y, epochs=3, verbose=0, callbacks=[staged])
    with pytest.raises(ValueError, match="Received: role='joint'"):
        base.trainer().assign_teacher("joint")
