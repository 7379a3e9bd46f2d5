import contextlib
import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit.callbacks import (
    Position,
    Recovery,
    StagedPrecision,
    checkpoint_files,
)
from tf_lowbit.compat import keras, tf

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, STEPS = 3, 5
STAGES = tfl.two_stage(2, (1, 2), learning_rate=(0.05, 0.02), decay="cosine")


def dense_net(optimizer=None, units=(6, 2), built=True, **options):
    keras.utils.set_random_seed(7)
    layers = [keras.layers.Dense(n, activation="tanh") for n in units]
    layers.insert(1, keras.layers.BatchNormalization())
    shape = [keras.Input((3,))] if built else []
    model = keras.Sequential([*shape, *layers])
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, "mse", **options)
    return model


def quantized_net(bits=2, weight_quantizer="lsq", activation_quantizer="lsq"):
    keras.utils.set_random_seed(7)
    layers = [keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)]
    net = keras.Sequential([keras.Input((3,)), *layers])
    quantizers = {
        "weight_quantizer": weight_quantizer,
        "activation_quantizer": activation_quantizer,
    }
    rule = tfl.PrecisionRule(".*", bits, bits, edges=True, **quantizers)
    model = tfl.quantize(net, [rule])
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


@functools.cache
def arrays():
    rng = np.random.default_rng(3)
    count = EPOCHS * STEPS
    return [rng.normal(size=(count, 8, size)).astype("f") for size in (3, 2)]


def data(position=(0, 0)):
    """Batches that are all different, so that a start at a wrong place shows."""
    epoch, step = position
    stream = tf.data.Dataset.from_tensor_slices(tuple(arrays())).repeat()
    return stream.skip(epoch * STEPS + step)


def fit(model, *callbacks, epochs=EPOCHS, **options):
    """Trains, with the data starting at the position of the `Recovery`, if any."""
    position = (0, 0)
    for callback in callbacks:
        if isinstance(callback, Recovery):
            position = callback.position
    return model.fit(
        data(position),
        epochs=epochs,
        callbacks=list(callbacks),
        **{"steps_per_epoch": STEPS, "verbose": 0, **options},
    )


def fit_until(where, model, *callbacks, **options):
    """Trains until a key is pressed, after so many steps of an epoch."""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if (self.epoch, batch + 1) == where:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, *callbacks, Interrupt(), **options)


class Recorder(keras.callbacks.Callback):
    """The epochs and batches that were begun."""

    def __init__(self):
        super().__init__()
        self.epochs, self.batches = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append(epoch)

    def on_train_batch_begin(self, batch, logs=None):
        self.batches.append((self.epochs[-1], batch))


class StopTraining(keras.callbacks.Callback):
    """Asks for an end after the third step."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == 2


def state(model):
    if isinstance(model.optimizer, keras.optimizers.legacy.Optimizer):
        return [*model.get_weights(), *model.optimizer.get_weights()]
    return [v.numpy() for v in [*model.weights, *model.optimizer.variables]]


def assert_same_state(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def saved(folder):
    return sorted(path.name for path in folder.glob("*"))


def name(epoch, step):
    return f"epoch-{epoch:05}-step-{step:07}"


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "legacy": lambda: keras.optimizers.legacy.Adam(0.01),
}


@functools.cache
def uninterrupted(optimizer="sgd", **options):
    model = dense_net(OPTIMIZERS[optimizer](), **options)
    fit(model)
    return state(model)


@pytest.mark.quick(1)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, optimizer, seed):
    draw = random.Random(f"{optimizer} {seed}")
    where = (draw.randrange(EPOCHS), draw.randint(1, STEPS))
    every = draw.choice([None, 1, 2, 3])
    expected = uninterrupted(optimizer)
    first = Recovery(tmp_path, every)
    fit_until(where, dense_net(OPTIMIZERS[optimizer]()), first)
    resumed = dense_net(OPTIMIZERS[optimizer]())
    fit(resumed, Recovery(tmp_path, every))
    assert_same_state(state(resumed), expected)
    assert Recovery(tmp_path).position == (EPOCHS, 0)


@functools.cache
def uninterrupted_stages():
    model = quantized_net()
    tfl.calibrate(model, data().take(2))
    fit(model, StagedPrecision(STAGES))
    return [*state(model), *staging(model)]


def staging(model):
    return [model.staging.stage.numpy(), model.staging.epochs_done.numpy()]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("where", "is_last"),
    [((0, 5), True), ((1, 3), True), ((2, 2), False)],
)
def test_a_resumed_run_of_stages(tmp_path, where, is_last):
    """On the edge between two stages, in the second one's first epoch, and within."""

    def callbacks():
        both = [StagedPrecision(STAGES), Recovery(tmp_path, every=2)]
        return both if is_last else both[::-1]

    stopped, resumed = quantized_net(), quantized_net()
    tfl.calibrate(stopped, data().take(2))
    fit_until(where, stopped, *callbacks())
    with warnings.catch_warnings():
        # The calibration is in the checkpoint, which is restored later.
        warnings.simplefilter("ignore", tfl.QuantizationWarning)
        fit(resumed, *callbacks())
    assert_same_state([*state(resumed), *staging(resumed)], uninterrupted_stages())


@pytest.mark.slow
@pytest.mark.parametrize("where", [(0, 4), (1, 5)])
def test_several_steps_per_execution(tmp_path, where):
    expected = uninterrupted(steps_per_execution=2)
    fit_until(where, dense_net(steps_per_execution=2), Recovery(tmp_path, 3))
    resumed, seen = dense_net(steps_per_execution=2), Recorder()
    fit(resumed, seen, Recovery(tmp_path, 3))
    assert_same_state(state(resumed), expected)
    assert {batch for _, batch in seen.batches} == {0, 2, 4}


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("every", "execution", "steps"),
    [
        (None, 1, []),
        (1, 1, [1, 2, 3, 4]),
        (2, 1, [2, 4]),
        (3, 2, [4]),
        (5, 1, []),
        (9, 3, []),
    ],
)
def test_saves_at_the_end_of_epochs_and_every_so_many_steps(
    tmp_path, every, execution, steps
):
    model = dense_net(steps_per_execution=execution)
    fit(model, Recovery(tmp_path, every, keep=99), epochs=2)
    expected = [name(epoch, step) for epoch in (0, 1) for step in [0, *steps]]
    assert saved(tmp_path) == [*expected[1:], name(2, 0)]


def test_fit_goes_on_at_the_epoch_and_the_step(tmp_path):
    assert Recovery(tmp_path).position == Position(0, 0) == (0, 0)
    fit_until((1, 4), dense_net(), Recovery(tmp_path, every=3))
    assert Recovery(tmp_path).position == Position(epoch=1, step=3)
    seen = Recorder()
    history = fit(dense_net(), seen, Recovery(tmp_path), epochs=3, initial_epoch=0)
    assert seen.batches == [(1, 3), (1, 4), *((2, step) for step in range(STEPS))]
    assert history.epoch == [1, 2]


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_the_newest(tmp_path, keep):
    fit(dense_net(), Recovery(tmp_path, keep=keep))
    assert saved(tmp_path) == [name(epoch, 0) for epoch in range(4 - keep, 4)]


@pytest.mark.slow
def test_prints_nothing_unless_asked(tmp_path, capsys):
    fit_until((1, 3), dense_net(), Recovery(tmp_path, every=1, verbose=1))
    fit_until((1, 4), dense_net(), Recovery(tmp_path, every=1))
    assert capsys.readouterr().out == ""
    fit(dense_net(), Recovery(tmp_path, verbose=1))
    assert capsys.readouterr().out == "Continuing at epoch 1, step 4\n"
    fit(dense_net(), Recovery(tmp_path, verbose=1))
    assert capsys.readouterr().out == f"Nothing to train: {EPOCHS} epochs are done\n"


@pytest.mark.slow
def test_what_is_made_later_is_restored_later(tmp_path):
    fit_until((1, 3), dense_net(built=False), Recovery(tmp_path, every=1))
    resumed = dense_net(built=False)
    fit(resumed, Recovery(tmp_path))
    assert_same_state(state(resumed), uninterrupted())


class Alternating(keras.Model):
    """Two optimizers, each for one layer, as in adversarial training."""

    def __init__(self):
        super().__init__()
        keras.utils.set_random_seed(7)
        self.parts = [keras.layers.Dense(n, activation="tanh") for n in (6, 2)]
        self.optimizers = [keras.optimizers.Adam(0.01) for _ in self.parts]
        self.build((None, 3))
        self.compile(self.optimizers[0], "mse")

    def call(self, x):
        return self.parts[1](self.parts[0](x))

    def train_step(self, data):
        x, y = data
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x))
            optimizer.minimize(loss, part.trainable_variables, tape=tape)
        return {"loss": loss}


@pytest.mark.slow
def test_a_model_with_a_train_step_of_its_own(tmp_path):
    whole, stopped, resumed = (Alternating() for _ in range(3))
    fit(whole)
    fit_until((1, 3), stopped, Recovery(tmp_path, every=1))
    fit(resumed, Recovery(tmp_path))
    assert_same_state(state(resumed), state(whole))
    for one, other in zip(whole.optimizers, resumed.optimizers, strict=True):
        assert_same_state(*([v.numpy() for v in o.variables] for o in (one, other)))


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [EPOCHS, EPOCHS - 1])
def test_a_finished_training_is_restored_and_not_trained(tmp_path, epochs):
    fit(dense_net(), Recovery(tmp_path))
    finished = dense_net()
    assert fit(finished, Recovery(tmp_path), epochs=epochs).history == {}
    assert_same_state(state(finished), uninterrupted())


@pytest.mark.slow
def test_a_second_fit_goes_on_from_the_first(tmp_path):
    model = dense_net()
    fit(model, Recovery(tmp_path), epochs=2)
    fit(model, Recovery(tmp_path), initial_epoch=2)
    assert_same_state(state(model), uninterrupted())


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_the_start_of_a_later_fit_is_not_moved(tmp_path, fails):
    model, seen = dense_net(), Recorder()
    fit(model, Recovery(tmp_path), epochs=2)
    if fails:
        fit_until((2, 1), model, Recovery(tmp_path))
    else:
        fit(model, Recovery(tmp_path), epochs=3)
    fit(model, seen, epochs=1)
    assert seen.epochs == [0]


@pytest.mark.slow
def test_a_start_that_fails_does_not_move_a_later_one(tmp_path):
    class Fail(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise RuntimeError("as a callback behind does")

    fit(dense_net(), Recovery(tmp_path), epochs=2)
    model, seen = dense_net(), Recorder()
    history = keras.callbacks.History()
    with pytest.raises(RuntimeError, match="behind"):
        fit(model, history, Recovery(tmp_path), Fail())
    fit(model, history, seen, epochs=2)
    assert seen.epochs == [0, 1]
    # Its own start is moved, though.
    fit(model, history, seen, Recovery(tmp_path), epochs=3)
    assert seen.epochs == [0, 1, 2]


@pytest.mark.quick(1)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path, value):
    recovery = Recovery(tmp_path, every=2)
    fit(dense_net(), recovery, epochs=1)
    kept = saved(tmp_path)

    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.layers[-1].bias.assign([value, 0.0])

    model = dense_net()
    message = f"must be finite.* Received: .* in {model.layers[-1].bias.name}$"
    with pytest.warns(UserWarning, match=message) as reported:
        fit(model, Break(), recovery)
    assert len(reported) == 1
    assert saved(tmp_path) == kept
    with pytest.warns(UserWarning, match="must be finite"):  # In each fit.
        fit(dense_net(), Break(), recovery)
    resumed = dense_net()
    with no_warning():
        fit(resumed, recovery)
    assert_same_state(state(resumed), uninterrupted())


@pytest.mark.quick(1)
@pytest.mark.parametrize("what", ["moving statistics", "optimizer state"])
def test_state_that_is_not_finite_replaces_no_checkpoint(tmp_path, what):
    """As a batch that overflows in mixed_float16 leaves it: the weights are finite."""

    def variable(model):
        if what == "optimizer state":
            return model.optimizer.variables[-1]
        (norm,) = (x for x in model.layers if "batch_norm" in x.name)
        return norm.moving_variance

    class Break(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                broken = variable(self.model)
                broken.assign(np.nan * np.ones(broken.shape))

    def net():
        model = keras.Sequential(
            [
                keras.layers.Dense(6, input_shape=(4,)),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(2),
            ]
        )
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        return model

    x, y = np.ones((4, 4), np.float32), np.ones((4, 2), np.float32)
    model = net()
    with pytest.warns(UserWarning, match=r"must be finite.*Received: NaN"):
        model.fit(x, y, epochs=2, verbose=0, callbacks=[Break(), Recovery(tmp_path)])
    assert saved(tmp_path) == [name(1, 0)]
    assert all(np.isfinite(v).all() for v in model.trainable_variables)


@pytest.mark.slow
def test_an_epoch_that_is_cut_short_is_not_taken_for_whole(tmp_path):
    fit(dense_net(), StopTraining(), Recovery(tmp_path / "epochs"))
    assert saved(tmp_path / "epochs") == []
    fit(dense_net(), StopTraining(), Recovery(tmp_path / "steps", every=99))
    assert saved(tmp_path / "steps") == [name(0, 3)]
    resumed = dense_net()
    fit(resumed, Recovery(tmp_path / "steps"))
    assert_same_state(state(resumed), uninterrupted())


@pytest.mark.slow
def test_an_epoch_without_enough_data_is_not_taken_for_whole(tmp_path):
    dense_net().fit(
        data().take(STEPS + 2),
        steps_per_epoch=STEPS,
        epochs=3,
        callbacks=[Recovery(tmp_path)],
        verbose=0,
    )
    assert saved(tmp_path) == [name(1, 0)]


@pytest.mark.slow
def test_steps_per_epoch_may_be_unknown_without_every(tmp_path):
    unknown = data().take(STEPS).filter(lambda x, y: True)
    callbacks = [Recovery(tmp_path)]
    dense_net().fit(unknown, epochs=2, callbacks=callbacks, verbose=0)
    assert saved(tmp_path) == [name(1, 0), name(2, 0)]
    with pytest.raises(ValueError, match=r"steps_per_epoch. Received: every=2, .*None"):
        dense_net().fit(unknown, epochs=3, callbacks=[Recovery(tmp_path, 2)])


@pytest.mark.slow
def test_runs_on_two_replicas(tmp_path, mirrored):
    strategy = mirrored(2)

    def replicated():
        with strategy.scope():
            return dense_net()

    whole, resumed = replicated(), replicated()
    fit(whole, epochs=2)
    fit_until((1, 3), replicated(), Recovery(tmp_path, every=2))
    fit(resumed, Recovery(tmp_path), epochs=2)
    for one, other in zip(whole.weights, resumed.weights, strict=True):
        if "moving" in one.name:  # one per replica; their mean is saved
            np.testing.assert_allclose(one.numpy(), other.numpy(), 1e-4, 1e-6)
        else:
            np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert_same_state(
        *([v.numpy() for v in m.optimizer.variables] for m in (whole, resumed))
    )


@pytest.mark.slow
def test_workers_that_are_not_the_chief_leave_nothing(tmp_path, monkeypatch):
    written = []
    write = tf.train.Checkpoint.write
    monkeypatch.setattr(Recovery, "_is_chief", lambda self: False)
    monkeypatch.setattr(
        tf.train.Checkpoint,
        "write",
        lambda self, path: written.append(path) or write(self, path),
    )
    fit(dense_net(), Recovery(tmp_path, every=3), epochs=2)
    assert len(written) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module", name="two_checkpoints")
def _two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    fit_until((1, 4), dense_net(), Recovery(folder, every=3))
    assert saved(folder) == [name(1, 0), name(1, 3)]
    return folder


@pytest.fixture(name="folder")
def _folder(two_checkpoints, tmp_path):
    """Checkpoints at (1, 0) and (1, 3)."""
    return Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))


DATA = "variables.data-00000-of-00001"


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write(text):
    return lambda path: path.write_bytes(text)


TORN = {
    "truncated data": (truncate, DATA, rf"{DATA} has \d+ bytes instead of \d+"),
    "flipped data": (flip, DATA, f"{DATA} is not what was written"),
    "flipped index": (flip, "variables.index", "index is not what was written"),
    "flipped signature": (flip, "signature.json", "json is not what was written"),
    "missing data": (Path.unlink, DATA, f"{DATA} cannot be read"),
    "missing manifest": (Path.unlink, "manifest.json", "manifest.json cannot be read"),
    "empty manifest": (write(b""), "manifest.json", "manifest.json is not a manifest"),
    "binary manifest": (
        write(b"\xff\0"),
        "manifest.json",
        "manifest.json is not a manifest",
    ),
    "a list": (write(b"[1]"), "manifest.json", "manifest.json is not a manifest"),
    "lacking keys": (write(b'{"format": 1}'), "manifest.json", "is not a manifest"),
    "no files": (
        write(b'{"format": 1, "epoch": 1, "step": 3, "files": 3}'),
        "manifest.json",
        "manifest.json is not a manifest",
    ),
    "later format": (write(b'{"format": 2}'), "manifest.json", "has format 2, not 1"),
    "other position": (
        write(b'{"format": 1, "epoch": 1, "step": 2, "files": {}}'),
        "manifest.json",
        "manifest.json names another position",
    ),
    "no folder": (lambda path: path.rename(path.parent / "x"), DATA, "cannot be read"),
}


@pytest.mark.parametrize(("damage", "file", "message"), TORN.values(), ids=TORN)
def test_a_torn_checkpoint_is_reported_and_skipped(folder, damage, file, message):
    damage(folder / name(1, 3) / file)
    found = Recovery(folder)
    with pytest.warns(UserWarning, match=rf"skipped: .*{name(1, 3)}: .*{message}"):
        assert found.position == (1, 0)
    with no_warning():
        assert found.position == (1, 0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output"),
        (OSError("why"), "why"),
    ],
    ids=["errno", "bare"],
)
def test_a_checkpoint_that_a_disk_does_not_read_is_skipped(
    folder, error, reason, monkeypatch
):
    def read(file, algorithm):
        if name(1, 3) in file.name:
            raise error  # A read, unlike an opening, knows no file name.
        return digest(file, algorithm)

    digest = checkpoint_files.hashlib.file_digest
    monkeypatch.setattr(checkpoint_files.hashlib, "file_digest", read)
    with pytest.warns(UserWarning, match=rf"{name(1, 3)} cannot be read \({reason}"):
        assert Recovery(folder).position == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 2])
def test_a_torn_checkpoint_gives_way_to_the_one_made_again(folder, keep):
    flip(folder / name(1, 3) / DATA)
    resumed = dense_net()
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        fit_until((1, 5), resumed, Recovery(folder, every=1, keep=keep))
    kept = [(1, 3), (1, 4), (1, 5)][2 - keep : 2]
    assert saved(folder) == [name(*position) for position in kept]
    with no_warning():
        fit(resumed, Recovery(folder))
    assert_same_state(state(resumed), uninterrupted())


@pytest.mark.slow
def test_torn_checkpoints_do_not_count_among_the_kept(folder):
    flip(folder / name(1, 3) / DATA)
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        # The torn one is passed by, at (2, 0), and not made again.
        fit(dense_net(), Recovery(folder), epochs=2)
    assert saved(folder) == [name(1, 0), name(2, 0)]


@pytest.mark.slow
def test_a_torn_checkpoint_ahead_stays_out_of_the_count(folder):
    shutil.copytree(folder / name(1, 3), folder / name(3, 0))
    with pytest.warns(UserWarning, match=f"{name(3, 0)}: .*another position"):
        fit(dense_net(), Recovery(folder, keep=1), epochs=2)
    assert saved(folder) == [name(2, 0), name(3, 0)]


@pytest.mark.slow
def test_without_an_intact_checkpoint_training_starts_over(folder):
    for position in ((1, 0), (1, 3)):
        truncate(folder / name(*position) / DATA)
    resumed = dense_net()
    with pytest.warns(UserWarning, match="damaged checkpoint") as reported:
        fit(resumed, Recovery(folder))
    assert (
        len([each for each in reported if "damaged checkpoint" in str(each.message)])
        == 2
    )
    assert_same_state(state(resumed), uninterrupted())


@pytest.mark.slow
def test_leftovers_are_no_checkpoints_and_are_removed(folder):
    shutil.copytree(folder / name(1, 3), folder / ".partial-0123")
    shutil.copytree(folder / name(1, 3), folder / "epoch-2-step-0")
    (folder / name(2, 0)[:-1]).write_text("not ours")
    with no_warning():
        assert Recovery(folder).position == (1, 3)
        fit(dense_net(), Recovery(folder), epochs=2)
    assert not (folder / ".partial-0123").exists()
    assert "epoch-2-step-0" in saved(folder)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("units", "optimizer", "message"),
    [
        ((7, 2), None, r".* shape \(3, 6\), where the model has .* \(3, 7\)"),
        ((6, 2, 2), None, "the optimizer SGD, where the model has weights of shape"),
        ((6,), None, "weights of shape .*, where the model has the optimizer SGD"),
        ((6, 2), keras.optimizers.RMSprop, ".* SGD, where the model has .* RMSprop"),
        (
            (6, 2),
            keras.optimizers.legacy.SGD,
            ".* state .*, where the model has nothin",
        ),
    ],
    ids=["wider", "deeper", "shallower", "RMSprop", "legacy"],
)
def test_refuses_another_networks_checkpoint(folder, units, optimizer, message):
    model = dense_net(optimizer(0.1) if optimizer else None, units)
    before = model.get_weights()
    with pytest.raises(ValueError, match=rf"have the network.*{name(1, 3)}: {message}"):
        fit(model, Recovery(folder))
    assert_same_state(model.get_weights(), before)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("bits", "quantizers", "message"),
    [
        (
            4,
            {},
            r"LSQ\w+\(bits=2, .*\) at \S+/output, "
            r"where the model has LSQ\w+\(bits=4, .*\) at \S+/output$",
        ),
        (
            2,
            {"weight_quantizer": "uniform"},
            r"DoReFa\w+\(.*\) at \S+/kernel, where the model has UniformWeight",
        ),
        (
            2,
            {"activation_quantizer": "uniform"},
            r"LSQActivationQuantizer\(.*\) at \S+/output, where the model has Uniform",
        ),
    ],
    ids=["bits", "weights", "activations"],
)
def test_refuses_the_checkpoint_of_other_quantizers(
    tmp_path, bits, quantizers, message
):
    fit(quantized_net(2, "dorefa"), Recovery(tmp_path), epochs=1)
    model = quantized_net(bits, **{"weight_quantizer": "dorefa", **quantizers})
    before = model.get_weights()
    with pytest.raises(ValueError, match=rf"have the network.*{name(1, 0)}: {message}"):
        fit(model, Recovery(tmp_path))
    assert_same_state(model.get_weights(), before)


def as_an_earlier_version(checkpoint):
    """Takes out what versions before did not write."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["steps"], manifest["files"]["quantizers.json"]
    path.write_text(json.dumps(manifest))
    (checkpoint / "quantizers.json").unlink()


@pytest.mark.slow
def test_restores_what_an_earlier_version_wrote(tmp_path):
    fit_until((1, 3), quantized_net(), Recovery(tmp_path, every=1, keep=1))
    as_an_earlier_version(tmp_path / name(1, 3))
    seen = Recorder()
    # Its rules and its steps per epoch are not known.
    fit(quantized_net(4), seen, Recovery(tmp_path), steps_per_epoch=4, epochs=2)
    assert seen.batches == [(1, 3)]


@pytest.mark.slow
def test_refuses_an_initial_epoch_past_the_checkpoint(folder):
    with pytest.raises(ValueError, match=r"Received: initial_epoch=2, .* at 1"):
        fit(dense_net(), Recovery(folder), initial_epoch=2)


@pytest.mark.slow
def test_refuses_fewer_steps_than_are_done(folder):
    as_an_earlier_version(folder / name(1, 3))
    with pytest.raises(ValueError, match="Received: 3 steps, a checkpoint at step 3"):
        fit(dense_net(), Recovery(folder), steps_per_epoch=3)


@pytest.mark.quick(1)
@pytest.mark.parametrize("steps", [3, 4, 6])
def test_refuses_other_steps_within_an_epoch(folder, steps):
    message = f"Received: {steps} steps, a checkpoint at step 3 of {STEPS}$"
    with pytest.raises(ValueError, match=message):
        fit(dense_net(), Recovery(folder), steps_per_epoch=steps)


@pytest.mark.slow
def test_other_steps_may_follow_a_whole_epoch(folder):
    shutil.rmtree(folder / name(1, 3))
    seen = Recorder()
    fit(dense_net(), seen, Recovery(folder), steps_per_epoch=np.int64(2), epochs=2)
    assert seen.batches == [(1, 0), (1, 1)]


@pytest.mark.quick(1)
@pytest.mark.parametrize("is_last", [True, False])
def test_refuses_to_share_the_start_with_keras(tmp_path, is_last):
    both = [keras.callbacks.BackupAndRestore(tmp_path / "b"), Recovery(tmp_path / "r")]
    with pytest.raises(ValueError, match="Received: a model with a WorkerTraining"):
        fit(dense_net(), *(both if is_last else both[::-1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must .* Received: every=0"),
        ({"every": 2.5}, "every must be an integer .* Received: every=2.5"),
        ({"keep": 0}, "keep must be an integer of at least 1. Received: keep=0"),
        ({"keep": None}, "keep must .* Received: keep=None"),
        ({"folder": "gs://bucket/run"}, "file system.* Received: folder='gs:"),
    ],
)
def test_refuses_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recovery(**{"folder": "checkpoints", **arguments})


@pytest.mark.slow
def test_an_unwritable_folder_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    folder, seen = tmp_path / "file" / "checkpoints", Recorder()
    assert Recovery(folder).position == (0, 0)
    with pytest.raises(OSError, match=f"must be writable.* Received: '{folder}'"):
        fit(dense_net(), seen, Recovery(folder))
    assert seen.epochs == []


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("owner", "function"),
    [(os, "fsync"), (tf.train.Checkpoint, "write")],
)
def test_a_failing_save_leaves_the_earlier_checkpoints(
    folder, owner, function, monkeypatch
):
    def fail(*arguments):
        if function == "fsync":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(owner, function, fail)
    with pytest.raises(OSError, match=f"No space left.* Received: '{folder}'"):
        fit(dense_net(), Recovery(folder))
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == [name(1, 0), name(1, 3)]
    with no_warning():
        assert Recovery(folder).position == (1, 3)


def train_large(folder):
    """Trains a network that takes far longer to save than to train."""
    model = dense_net(units=(100_000, 2))
    fit(model, Recovery(folder, every=1), epochs=1000)


@pytest.mark.slow
def test_a_kill_in_mid_write_leaves_the_newest_checkpoint_intact(tmp_path):
    program = (
        "import sys\n"
        "from tests.callbacks.test_recovery import train_large\n"
        "train_large(sys.argv[1])\n"
    )
    draw, leftovers, before = random.Random(4), 0, Position(0, 0)
    # The hidden folder may be one that is being deleted: until a kill hits a write.
    for kills in range(8):
        if kills >= 2 and leftovers:
            break
        with subprocess.Popen(
            [sys.executable, "-c", program, tmp_path], cwd=ROOT
        ) as process:
            deadline = time.monotonic() + 120

            def wait_until(condition, process=process, deadline=deadline):
                while not condition():
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.001)

            wait_until(lambda old=before: Recovery(tmp_path)._positions()[-1:] > [old])
            time.sleep(draw.uniform(0, 0.3))
            wait_until(lambda: any(tmp_path.glob(".partial-*")))  # in mid-write
            time.sleep(draw.uniform(0, 0.01))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        leftovers += len(list(tmp_path.glob(".partial-*")))
        with no_warning():
            now = Recovery(tmp_path).position
        assert now > before
        before = now
    assert leftovers > 0
