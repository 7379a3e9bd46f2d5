import csv
import dataclasses
import json

import numpy as np
import pytest

import tf_lowbit as tfl
from examples import experiment
from tf_lowbit import datasets
from tf_lowbit.compat import keras, tf

BATCH = 32
LIMIT = 64
STEPS = LIMIT // BATCH
RATE = 0.05


def load_data(first_epoch):
    return datasets.load(
        "digits", batch_size=BATCH, limit=LIMIT, seed=3, start_epoch=first_epoch
    )


def float_model(seed=0, classes=10):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential(
        [layers.Flatten(input_shape=(8, 8, 1)), layers.Dense(classes)]
    )
    experiment.compile_model(model, RATE)
    return model


def quantized_model(seed=0):
    """A network with learned ranges, normalisation and a momentum to restore."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Conv2D(3, 3, activation="relu", input_shape=(8, 8, 1), name="stem"),
            layers.Conv2D(4, 3, use_bias=False, name="mid"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(name="relu"),
            layers.Flatten(),
            layers.Dense(10, name="head"),
        ],
        name="net",
    )
    rule = tfl.PrecisionRule(
        ".*", 2, 2, weight_quantizer="lsq", activation_quantizer="pact"
    )
    model = tfl.quantize(model, [rule])
    tfl.calibrate(model, load_data(0).train, batches=1)
    experiment.compile_model(model, RATE)
    return model


def stages():
    return tfl.two_stage((2, 2), (1, 3), learning_rate=RATE, decay="cosine")


def rows(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def everything(model):
    """Values of all weights and of the optimizer's state."""
    return [np.array(tf.convert_to_tensor(v)) for v in model.weights] + [
        np.array(tf.convert_to_tensor(v)) for v in model.optimizer.variables
    ]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# stages_for


FINAL_STAGES = {
    "plain": [(2, 3)],
    "ts": [(2, 32), (2, 3)],
    "pq": [(8, 8), (4, 4), (2, 3)],
    "ts+pq": [(8, 32), (8, 8), (4, 8), (4, 4), (2, 4), (2, 3)],
}


def stages_of(method, epochs, decay="cosine", bits=(2, 3), ladder=(8, 4)):
    return experiment.stages_for(method, bits, epochs, 0.1, decay, ladder)


def test_every_method_has_its_stages():
    assert set(FINAL_STAGES) == set(experiment.METHODS)


@pytest.mark.parametrize("method", experiment.METHODS)
@pytest.mark.parametrize("epochs", [6, 7, 20])
def test_stages_sum_to_the_epochs_and_end_at_the_bits(method, epochs):
    made = stages_of(method, epochs)
    assert sum(stage.epochs for stage in made) == epochs
    bits = [(stage.weight_bits, stage.activation_bits) for stage in made]
    assert bits == FINAL_STAGES[method]
    assert max(s.epochs for s in made) - min(s.epochs for s in made) <= 1
    assert {(stage.learning_rate, stage.decay) for stage in made} == {(0.1, "cosine")}


@pytest.mark.parametrize("method", ["ts", "pq", "ts+pq"])
def test_fewer_epochs_than_stages_are_refused(method):
    count = len(FINAL_STAGES[method])
    assert len(stages_of(method, count)) == count
    with pytest.raises(ValueError, match=rf"{count} stages need.*Received: total="):
        stages_of(method, count - 1)


@pytest.mark.parametrize("method", experiment.METHODS)
def test_no_epochs_are_refused(method):
    with pytest.raises(ValueError, match=r"Received: "):
        stages_of(method, 0)


def test_bad_methods_bits_and_ladders_are_refused():
    with pytest.raises(ValueError, match=r"method must be.*Received: 'qat'"):
        stages_of("qat", 5)
    with pytest.raises(ValueError, match=r"Received: .*9"):
        stages_of("ts", 5, bits=(9, 2))
    with pytest.raises(ValueError, match=r"falling.*Received: \[4, 8\]"):
        stages_of("pq", 5, ladder=(4, 8))


# Files


def test_require_writable_makes_the_folder_and_leaves_it_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    assert experiment.require_writable(folder) == folder
    assert experiment.require_writable(folder) == folder
    assert files(folder) == []


def test_require_writable_refuses_what_can_be_no_folder(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    for folder in (blocked, blocked / "below", blocked / "far" / "below"):
        with pytest.raises(OSError, match=rf"writable.*Received: '{folder}'"):
            experiment.require_writable(folder)
    assert blocked.read_text() == "kept"


@pytest.mark.parametrize("fails_after_writing", [False, True])
def test_replace_file_keeps_the_old_file_if_writing_fails(
    tmp_path, fails_after_writing
):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write(temporary):
        if fails_after_writing:
            temporary.write_text("half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        experiment.replace_file(path, write)
    assert path.read_text() == "old"
    assert files(tmp_path) == ["result.json"]


def test_replace_file_writes_and_replaces(tmp_path):
    path = tmp_path / "model.h5"
    for text in ("first", "second"):
        experiment.replace_file(path, lambda temporary, t=text: temporary.write_text(t))
        assert path.read_text() == text
        assert files(tmp_path) == ["model.h5"]


LOG = 'epoch,accuracy,note\r\n0,0.5,a\r\n1,0.625,"b,c"\r\n2,0.75,d\r\n'


@pytest.mark.parametrize("epoch", [1, 2, 3, 7])
def test_rows_of_epochs_to_come_are_dropped(tmp_path, epoch):
    path = tmp_path / "log.csv"
    path.write_bytes(LOG.encode())
    experiment._drop_rows_from(path, epoch)
    kept = LOG.splitlines(keepends=True)[: 1 + epoch]
    assert path.read_bytes() == "".join(kept).encode()
    assert files(tmp_path) == ["log.csv"]


def test_a_log_without_rows_is_removed(tmp_path):
    path = tmp_path / "log.csv"
    experiment._drop_rows_from(path, 0)
    for text in (LOG, LOG.splitlines()[0], ""):
        path.write_text(text)
        experiment._drop_rows_from(path, 0)
        assert not path.exists()


# Checkpoints


def test_checkpoints_keep_the_newest_two_and_restore_the_last(tmp_path):
    model = float_model()
    checkpoints = experiment.Checkpoints(tmp_path, model)
    assert not checkpoints.exists()
    assert checkpoints.restore() == 0
    for epoch in range(3):
        model.layers[-1].bias.assign(np.full(10, float(epoch)))
        checkpoints.on_epoch_end(epoch, {"loss": 1.0})
    assert len(list(tmp_path.glob("*.index"))) == 2

    fresh = float_model(seed=1)
    checkpoints = experiment.Checkpoints(tmp_path, fresh)
    assert checkpoints.exists()
    assert checkpoints.restore() == 3
    assert_same(fresh.get_weights(), model.get_weights())
    np.testing.assert_array_equal(fresh.layers[-1].bias, np.full(10, 2.0))


# train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A staged training without interruption: its model, folder and outcome."""
    folder = tmp_path_factory.mktemp("whole")
    model = quantized_model()
    outcome = experiment.train(model, load_data, stages(), folder)
    return model, folder, outcome


def test_train_leaves_a_full_record(whole):
    model, folder, outcome = whole
    assert files(folder) == ["checkpoints", "log.csv", "model.h5", "tensorboard"]
    assert outcome.epochs == 4
    assert outcome.seconds > 0
    assert outcome.cost == tfl.cost(model)
    loss, accuracy = model.evaluate(load_data(0).test, verbose=0)
    assert (outcome.loss, outcome.accuracy) == (loss, accuracy)

    log = rows(folder)
    assert [int(row["epoch"]) for row in log] == [0, 1, 2, 3]
    assert [row["weight_bits"] for row in log] == ["2"] * 4
    assert [row["activation_bits"] for row in log] == ["32", "2", "2", "2"]
    assert float(log[-1]["val_accuracy"]) == pytest.approx(accuracy)
    assert {"loss", "accuracy", "val_loss"} <= set(log[0])
    assert list((folder / "tensorboard" / "train").iterdir())

    reloaded = tfl.load_model(folder / "model.h5", compile=False)
    assert_same(reloaded.get_weights(), model.get_weights())


def test_write_result(whole, tmp_path):
    outcome = whole[2]
    path = experiment.write_result(tmp_path, outcome, {"epochs": 4, "ladder": ["2"]})
    assert path == tmp_path / "result.json"
    assert files(tmp_path) == ["result.json"]
    result = json.loads(path.read_text())
    assert result["test_accuracy"] == outcome.accuracy
    assert result["settings"] == {"epochs": 4, "ladder": ["2"]}
    assert result["versions"]["tensorflow"] == tf.__version__
    assert result["versions"]["tf_lowbit"] == tfl.__version__
    assert result["cost"]["bops"] == outcome.cost.bops
    assert len(result["cost"]["layers"]) == len(outcome.cost.layers)


def failing_after(batches):
    """A loader whose training part breaks after so many batches, as a disk may."""

    def load(first_epoch):
        data = load_data(first_epoch)

        def check(index, batch):
            with tf.control_dependencies(
                [tf.debugging.assert_less(index, np.int64(batches))]
            ):
                return tf.nest.map_structure(tf.identity, batch)

        train = data.train.enumerate().map(check)
        unlimited = tf.data.experimental.assert_cardinality(
            tf.data.INFINITE_CARDINALITY
        )
        return dataclasses.replace(data, train=train.apply(unlimited))

    return load


def stopped_by_data(folder, monkeypatch):
    """Stops in the last batch of epoch 2, in the middle of the second stage."""
    del monkeypatch
    batches = 3 * STEPS - 1
    with pytest.raises(tf.errors.InvalidArgumentError):
        experiment.train(quantized_model(), failing_after(batches), stages(), folder)


def stopped_before_saving(folder, monkeypatch):
    """Stops when epoch 2 is in the log and not yet in a checkpoint."""
    save = experiment.Checkpoints.on_epoch_end

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt
        save(self, epoch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.Checkpoints, "on_epoch_end", on_epoch_end)
        with pytest.raises(KeyboardInterrupt):
            experiment.train(quantized_model(), load_data, stages(), folder)
    assert len(rows(folder)) == 3


def stopped_before_the_second_stage(folder, monkeypatch):
    """Stops in the first batch of epoch 1, where the second stage begins."""
    del monkeypatch
    with pytest.raises(tf.errors.InvalidArgumentError):
        experiment.train(quantized_model(), failing_after(STEPS), stages(), folder)


def stopped_before_the_first_checkpoint(folder, monkeypatch):
    del monkeypatch
    with pytest.raises(tf.errors.InvalidArgumentError):
        experiment.train(
            quantized_model(), failing_after(np.int64(1)), stages(), folder
        )


@pytest.mark.parametrize(
    ("stop", "saved"),
    [
        (stopped_by_data, 2),
        (stopped_before_saving, 2),
        (stopped_before_the_second_stage, 1),
        (stopped_before_the_first_checkpoint, 0),
    ],
)
def test_a_resumed_training_equals_the_uninterrupted_one(
    whole, tmp_path, monkeypatch, stop, saved
):
    model, folder, outcome = whole
    stop(tmp_path, monkeypatch)
    # Other initial weights: whatever is not restored shows.
    resumed = quantized_model(seed=1 if saved else 0)
    again = experiment.train(resumed, load_data, stages(), tmp_path, resume=True)
    assert_same(everything(resumed), everything(model))
    assert rows(tmp_path) == rows(folder)
    assert (again.accuracy, again.loss) == (outcome.accuracy, outcome.loss)
    assert again.epochs == outcome.epochs


def test_a_finished_training_resumes_to_the_same_outcome(whole, tmp_path):
    _, folder, outcome = whole
    before = rows(folder)
    model = quantized_model(seed=1)
    again = experiment.train(model, load_data, stages(), folder, resume=True)
    assert (again.accuracy, again.loss) == (outcome.accuracy, outcome.loss)
    assert again.cost == outcome.cost
    assert rows(folder) == before


def test_a_folder_with_an_earlier_run_is_refused(whole):
    _, folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(FileExistsError, match=rf"--resume.*Received: '{folder}'"):
        experiment.train(quantized_model(), load_data, stages(), folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_float_training_resumes_in_mid_schedule(tmp_path):
    stage = [tfl.Stage(3, learning_rate=RATE, decay="cosine")]
    model = float_model()
    experiment.train(model, load_data, stage, tmp_path / "whole")
    stopped = failing_after(STEPS + 1)
    with pytest.raises(tf.errors.InvalidArgumentError):
        experiment.train(float_model(), stopped, stage, tmp_path / "parts")
    resumed = float_model(seed=1)
    experiment.train(resumed, load_data, stage, tmp_path / "parts", resume=True)
    assert_same(everything(resumed), everything(model))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert "weight_bits" not in rows(tmp_path / "whole")[0]


def test_a_float_training_follows_its_learning_rate(tmp_path):
    stage = tfl.Stage(2, learning_rate=0.2, decay="cosine")
    model = float_model()
    experiment.train(model, load_data, [stage], tmp_path)
    # Set last before the last of 2 * STEPS batches.
    expected = stage.learning_rate_at(1 - 1 / (2 * STEPS))
    assert float(model.optimizer.learning_rate) == pytest.approx(expected)


def test_a_progress_bar_may_take_the_place_of_keras(tmp_path, capsys):
    stage = tfl.Stage(1, learning_rate=RATE)
    experiment.train(float_model(), load_data, [stage], tmp_path, label="my label")
    shown = capsys.readouterr().out
    assert "my label" in shown
    assert "1/1" in shown
    assert "ETA" not in shown


# What goes wrong


def nan_from_epoch_1(first_epoch):
    data = load_data(first_epoch)

    def spoil(index, batch):
        images, labels = batch
        bad = index >= STEPS - first_epoch * STEPS
        return tf.where(bad, float("nan"), images), labels

    train = data.train.enumerate().map(spoil)
    unlimited = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    return dataclasses.replace(data, train=train.apply(unlimited))


@pytest.mark.parametrize("build", [float_model, quantized_model])
def test_nan_stops_the_training_and_the_last_good_checkpoint_stays(tmp_path, build):
    stage = [tfl.Stage(3, learning_rate=RATE)]
    with pytest.raises(ValueError, match=r"loss must stay finite.*Received: .*nan"):
        experiment.train(build(), nan_from_epoch_1, stage, tmp_path)
    assert not (tmp_path / "model.h5").exists()

    # With the data mended the run goes on from there.
    model = build(seed=1)
    checkpoints = experiment.Checkpoints(tmp_path / "checkpoints", model)
    assert checkpoints.restore() == 1
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    outcome = experiment.train(build(seed=1), load_data, stage, tmp_path, resume=True)
    assert np.isfinite(outcome.loss)
    assert [int(row["epoch"]) for row in rows(tmp_path)] == [0, 1, 2]


def test_a_huge_learning_rate_is_an_error(tmp_path):
    stage = tfl.Stage(3, learning_rate=1e38)
    with pytest.raises(ValueError, match=r"lower the learning rate.*Received: "):
        experiment.train(float_model(), load_data, [stage], tmp_path)
    assert not experiment.Checkpoints(tmp_path / "checkpoints", float_model()).exists()


def all_at_once(first_epoch):
    return datasets.load(
        "digits", batch_size=LIMIT, limit=LIMIT, start_epoch=first_epoch
    )


@pytest.mark.parametrize("epochs", [1, 2])
def test_divergence_in_an_epochs_last_step_is_an_error_and_is_not_saved(
    tmp_path, epochs
):
    # The loss is taken before the step that spoils the weights: it is finite.
    stage = tfl.Stage(epochs, learning_rate=1e38)
    with pytest.raises(ValueError, match=r"lower the learning rate.*Received: "):
        experiment.train(float_model(), all_at_once, [stage], tmp_path)
    assert not (tmp_path / "model.h5").exists()
    assert not experiment.Checkpoints(tmp_path / "checkpoints", float_model()).exists()


def test_labels_out_of_the_models_range_are_an_error(tmp_path):
    model = float_model(classes=5)
    with pytest.raises(ValueError, match=r"label.*Received: "):
        experiment.train(model, load_data, [tfl.Stage(1, learning_rate=RATE)], tmp_path)
