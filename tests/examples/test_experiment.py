import csv
import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pytest

import tf_lowbit as tfl
from examples import experiment
from tf_lowbit import datasets
from tf_lowbit.analysis import environment
from tf_lowbit.callbacks import Recovery
from tf_lowbit.compat import keras, tf

BATCH = 32
LIMIT = 96
STEPS = LIMIT // BATCH
RATE = 0.05


def load_data(first_epoch=0, first_step=0):
    return datasets.load(
        "digits",
        batch_size=BATCH,
        limit=LIMIT,
        seed=3,
        start_epoch=first_epoch,
        start_step=first_step,
    )


def float_model(seed=0, classes=10):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential(
        [layers.Flatten(input_shape=(8, 8, 1)), layers.Dense(classes)]
    )
    experiment.compile_model(model, RATE)
    return model


def float_net(seed=0, is_deep=True):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    extra = [layers.Conv2D(5, 3, activation="relu", name="mid2")] if is_deep else []
    return keras.Sequential(
        [
            layers.Conv2D(3, 3, activation="relu", input_shape=(8, 8, 1), name="stem"),
            layers.Conv2D(4, 3, use_bias=False, name="mid"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(name="relu"),
            *extra,
            layers.Flatten(),
            layers.Dense(10, name="head"),
        ],
        name="net",
    )


def low_bit(model):
    """With learned ranges, normalisation and a momentum to restore."""
    rule = tfl.PrecisionRule(
        ".*", 2, 2, weight_quantizer="lsq", activation_quantizer="pact"
    )
    model = tfl.quantize(model, [rule])
    tfl.calibrate(model, load_data().train, batches=1)
    return model


def quantized_model(seed=0):
    model = low_bit(float_net(seed, is_deep=False))
    experiment.compile_model(model, RATE)
    return model


def trainer_model(seed=0):
    """All at once: sampled units, a teacher that learns, and hints."""
    teacher = float_net(seed)
    trainer = experiment.trainer_for(
        low_bit(teacher), teacher, "sp", "joint", hints=True, seed=3
    )
    steps = STEPS * sum(stage.epochs for stage in stages())
    experiment.compile_model(
        trainer,
        RATE,
        teacher_optimizer=experiment.teacher_optimizer("joint", RATE, "cosine", steps),
    )
    return trainer


def stages():
    return tfl.two_stage((2, 2), (1, 3), learning_rate=RATE, decay="cosine")


def rows(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def everything(model):
    """Values of all weights, of the optimizers' state and of the counters."""
    variables = [*model.weights, *model.optimizer.variables]
    if hasattr(model, "staging"):
        variables += [model.staging.stage, model.staging.epochs_done]
    if isinstance(model, tfl.LowBitTrainer):
        variables += model.teacher_optimizer.variables
        variables += [model.progress.step, model.progress.total_steps]
    return [np.array(tf.convert_to_tensor(variable)) for variable in variables]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def saved_at(folder):
    """Positions of a run's checkpoints."""
    names = files(folder / "checkpoints") if (folder / "checkpoints").exists() else []
    return [tuple(int(part) for part in name.split("-")[1::2]) for name in names]


def saved_weights(folder, epoch, step):
    """All numbers in a run's checkpoint."""
    name = f"epoch-{epoch:05}-step-{step:07}"
    reader = tf.train.load_checkpoint(str(folder / "checkpoints" / name / "variables"))
    tensors = [reader.get_tensor(key) for key in reader.get_variable_to_shape_map()]
    return [t for t in map(np.asarray, tensors) if np.issubdtype(t.dtype, np.floating)]


# stages_for


FINAL_STAGES = {
    "plain": [(2, 3)],
    "ts": [(2, 32), (2, 3)],
    "pq": [(8, 8), (4, 4), (2, 3)],
    "ts+pq": [(8, 32), (8, 8), (4, 8), (4, 4), (2, 4), (2, 3)],
    # Which units are rounded is the trainer's affair.
    "sp": [(2, 3)],
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
def test_every_stage_has_the_milestones(method):
    made = experiment.stages_for(
        method, (2, 3), 6, 0.1, "step", (8, 4), milestones=(0.4, 0.6)
    )
    assert {stage.milestones for stage in made} == {(0.4, 0.6)}
    assert {s.milestones for s in stages_of(method, 6, "step")} == {(0.3, 0.6)}


@pytest.mark.parametrize("method", experiment.METHODS)
def test_every_stage_has_the_warmup(method):
    made = experiment.stages_for(method, (2, 3), 6, 0.1, "cosine", (8, 4), warmup=0.25)
    assert {stage.warmup for stage in made} == {0.25}
    assert {s.warmup for s in stages_of(method, 6)} == {0.0}


@pytest.mark.parametrize("method", experiment.METHODS)
def test_no_epochs_are_refused(method):
    with pytest.raises(ValueError, match=r"Received: "):
        stages_of(method, 0)


def test_bad_methods_bits_and_ladders_are_refused():
    with pytest.raises(ValueError, match=r"method must be.*Received: 'qat'"):
        stages_of("qat", 5)
    with pytest.raises(ValueError, match=r"Received: .*9"):
        stages_of("ts", 5, bits=(9, 2))
    with pytest.raises(ValueError, match=r"falling.*Received: ladder=\(4, 8\)"):
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


LOG = 'epoch,accuracy,note\r\n0,0.5,a\r\n1,0.625,"b,c"\r\n2,0.75,d\r\n'


@pytest.mark.parametrize("epoch", [1, 2, 3, 7])
def test_rows_of_epochs_to_come_are_dropped(tmp_path, epoch):
    path = tmp_path / "log.csv"
    path.write_bytes(LOG.encode())
    experiment._drop_rows_from(path, epoch)
    kept = LOG.splitlines(keepends=True)[: 1 + epoch]
    assert path.read_bytes() == "".join(kept).encode()
    assert files(tmp_path) == ["log.csv"]


def test_a_torn_row_is_dropped(tmp_path):
    path = tmp_path / "log.csv"
    *whole, last = LOG.splitlines(keepends=True)
    for size in range(len(last)):
        path.write_bytes("".join([*whole, last[:size]]).encode())
        experiment._drop_rows_from(path, 3)
        assert path.read_bytes() == "".join(whole).encode()


def test_a_log_without_rows_is_removed(tmp_path):
    path = tmp_path / "log.csv"
    experiment._drop_rows_from(path, 0)
    for text in (LOG, LOG.splitlines()[0], ""):
        path.write_text(text)
        experiment._drop_rows_from(path, 0)
        assert not path.exists()


# trainer_for and teacher_optimizer


@pytest.fixture(scope="module")
def pair():
    """A student and its teacher, for trainers that are not kept."""
    teacher = float_net()
    return low_bit(teacher), teacher


# How the teacher is trained -> weights of the parts of the student's loss, and of the
# teacher's: the authors' constants.
WEIGHTS = {
    "joint": ({"task": 0.7, "distillation": 0.7}, {"task": 1.0, "distillation": 0.5}),
    "task": ({"task": 0.7, "distillation": 0.7}, {"task": 1.0}),
    "frozen": ({"task": 0.7, "distillation": 0.7}, {}),
}


def log_of_a_step(trainer, distill):
    """The log of one step, and which of student and teacher it has moved."""
    networks = [trainer.student, *([trainer.teacher] if trainer.teacher else [])]
    before = [[w.numpy() for w in n.trainable_weights] for n in networks]
    experiment.compile_model(
        trainer,
        RATE,
        teacher_optimizer=experiment.teacher_optimizer(distill, RATE, "constant", 1),
        run_eagerly=True,
    )
    data = load_data()
    history = trainer.fit(data.train, steps_per_epoch=1, verbose=0).history
    moved = [
        not all(
            np.array_equal(a, w) for a, w in zip(b, n.trainable_weights, strict=True)
        )
        for b, n in zip(before, networks, strict=True)
    ]
    return {name: values[0] for name, values in history.items()}, moved


def weighted(log, prefix, weights):
    return sum(w * log[f"{prefix}{part}_loss"] for part, w in weights.items())


@pytest.mark.parametrize("distill", experiment.DISTILLATIONS)
@pytest.mark.parametrize("method", experiment.METHODS)
def test_a_trainer_holds_what_method_and_distillation_say(pair, method, distill):
    student, teacher = pair
    trainer = experiment.trainer_for(student, teacher, method, distill)
    assert trainer.student is student
    assert trainer.teacher is (None if distill == "none" else teacher)
    assert trainer.trains_teacher == (distill in ("joint", "task"))
    sampler, distiller = trainer._sampler, trainer._distiller
    assert (sampler is not None) == (method == "sp")
    if method == "sp":
        assert sampler.settings == tfl.StochasticPrecision(0.5, seed=0)
    if distill == "none":
        assert distiller is None
    else:
        assert distiller.settings == tfl.JointDistillation(teacher=distill)


@pytest.mark.parametrize("distill", experiment.DISTILLATIONS)
@pytest.mark.parametrize("method", ["plain", "sp"])
def test_a_trainer_trains_and_logs_what_it_holds(method, distill):
    teacher = float_net()
    trainer = experiment.trainer_for(
        low_bit(teacher), teacher, method, distill, start=0.25, unit="layer"
    )
    decay = float(sum(trainer.student.losses))  # PACT's, of its clips.
    log, moved = log_of_a_step(trainer, distill)
    expected = {"loss", "accuracy"}
    if method == "sp":
        expected |= {"quantized_share", "quantization_probability"}
        assert log["quantization_probability"] == pytest.approx(0.25)
        # The first and the last of four layers are float.
        assert log["quantized_share"] in (0.0, 0.5, 1.0)
    if distill != "none":
        of_student, of_teacher = WEIGHTS[distill]
        expected |= {f"{part}_loss" for part in of_student}
        expected |= {"teacher_loss", "teacher_accuracy"}
        assert log["loss"] == pytest.approx(weighted(log, "", of_student) + decay)
    if distill == "joint":
        expected |= {f"teacher_{part}_loss" for part in of_teacher}
        assert log["teacher_loss"] == pytest.approx(
            weighted(log, "teacher_", of_teacher)
        )
    assert set(log) == expected
    assert moved == {"none": [True], "frozen": [True, False]}.get(distill, [True, True])


def test_a_trainer_has_the_options_that_are_given(pair):
    student, teacher = pair
    trainer = experiment.trainer_for(
        *(student, teacher, "sp", "task"),
        target="logits",
        hints=True,
        weights={"task_weight": 0.9, "distillation_weight": None},
        unit="block",
        start=0.25,
        seed=7,
    )
    assert trainer._distiller.settings == tfl.JointDistillation(
        target="logits", teacher="task", hints="stages", task_weight=0.9
    )
    assert trainer._distiller.settings.student_weights() == {
        "task_loss": 0.9,
        "distillation_loss": 0.1,
        "hint_loss": 1.0,
    }
    # Quantized activations of two resolutions.
    assert [hint.student for hint in trainer._distiller.hints[0]] == [
        "stem_relu",
        "relu",
    ]
    assert trainer._sampler.settings == tfl.StochasticPrecision(
        0.25, unit="block", seed=7
    )


@pytest.mark.parametrize("distill", ["none", "frozen"])
@pytest.mark.parametrize("decay", ["constant", "cosine", "step"])
def test_a_teacher_that_is_not_trained_has_no_optimizer(distill, decay):
    assert experiment.teacher_optimizer(distill, RATE, decay, 10) is None


def test_a_constant_teachers_rate(pair):
    optimizer = experiment.teacher_optimizer("task", 0.3, "constant", 10)
    config = optimizer.get_config()
    assert config["learning_rate"] == pytest.approx(0.3)
    assert (config["momentum"], config["nesterov"]) == (0.9, True)


@pytest.mark.parametrize("decay", ["cosine", "step"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 20, 90, 100])
def test_a_teachers_schedule_is_that_of_one_stage(decay, steps):
    optimizer = experiment.teacher_optimizer("joint", 0.3, decay, steps)
    stage = tfl.Stage(1, learning_rate=0.3, decay=decay)
    rates = [float(optimizer._learning_rate(step)) for step in range(steps)]
    expected = [stage.learning_rate_at(step / steps) for step in range(steps)]
    # Float32 leaves something at the cosine's end.
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", ["constant", "cosine", "step"])
@pytest.mark.parametrize("warmup", [0.3, 0.75])
def test_a_teachers_warmup_is_that_of_one_stage(decay, warmup):
    steps = 10
    optimizer = experiment.teacher_optimizer("joint", 0.3, decay, steps, warmup=warmup)
    stage = tfl.Stage(1, learning_rate=0.3, decay=decay, warmup=warmup)
    expected = [stage.learning_rate_at(step / steps) for step in range(steps)]
    # A trainer's file holds its optimizers.
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    for one in (optimizer, again):
        rates = [float(one._learning_rate(step)) for step in range(steps)]
        np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("epochs", "steps", "milestones"),
    [
        # ImageNet's and CIFAR's recipes; products that are rounded up and down.
        (30, 5005, (15, 25)),
        (200, 391, (80, 120)),
        (10, 7, (1, 7)),
        (100, 29, (29, 57, 58)),
        (3, 1, (1, 2)),
    ],
)
def test_a_teachers_milestones_fall_on_the_first_step_of_their_epoch(
    epochs, steps, milestones
):
    shares = [milestone / epochs for milestone in milestones]
    optimizer = experiment.teacher_optimizer(
        "joint", 0.001, "step", epochs * steps, shares
    )
    for passed, milestone in enumerate(milestones):
        step = milestone * steps
        rates = [float(optimizer._learning_rate(s)) for s in (step - 1, step)]
        expected = [0.001 * 0.1**passed, 0.0001 * 0.1**passed]
        np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.parametrize("decay", ["cosine", "step"])
def test_a_teacher_follows_its_rate_over_the_stages(decay):
    """At every step: the student's stages have rates of their own."""
    epochs, steps = 2, 5
    teacher = float_net()
    trainer = experiment.trainer_for(low_bit(teacher), teacher, "ts", "task")
    optimizer = experiment.teacher_optimizer("task", 0.25, decay, epochs * steps)
    experiment.compile_model(trainer, RATE, teacher_optimizer=optimizer)
    used = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            used.append(float(trainer.teacher_optimizer.learning_rate))

    stages = tfl.two_stage((2, 2), (1, 1), learning_rate=RATE, decay="cosine")
    callbacks = [tfl.callbacks.StagedPrecision(stages), Record()]
    trainer.fit(
        load_data().train,
        steps_per_epoch=steps,
        epochs=epochs,
        callbacks=callbacks,
        verbose=0,
    )
    whole = tfl.Stage(epochs, learning_rate=0.25, decay=decay)
    total = epochs * steps
    expected = [whole.learning_rate_at(step / total) for step in range(total)]
    np.testing.assert_allclose(used, expected, rtol=1e-5)
    assert int(trainer.teacher_optimizer.iterations) == total


# quiet


@pytest.mark.usefixtures("_loud_again")
def test_quiet_keeps_warnings(caplog):
    logger = tf.get_logger()
    experiment.quiet()
    logger.addHandler(caplog.handler)
    try:
        logger.info("a note")
        logger.warning("a warning")
    finally:
        logger.removeHandler(caplog.handler)
    # Twice, where the logger passes on to the root, too.
    assert set(caplog.messages) == {"a warning"}


@pytest.mark.usefixtures("_loud_again")
def test_quiet_hides_what_keras_says_of_callbacks_on_a_busy_machine(caplog):
    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.2)

    model = keras.Sequential([keras.layers.Dense(1, input_shape=(1,))])
    model.compile(loss="mse")
    experiment.quiet()
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        model.fit(np.ones((6, 1)), np.ones(6), 1, callbacks=[Slow()], verbose=0)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.messages


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
    assert files(folder) == ["checkpoints", "log.csv", "model.keras", "tensorboard"]
    assert saved_at(folder) == [(3, 0), (4, 0)]
    assert outcome.epochs == outcome.new_epochs == 4
    assert outcome.seconds > 0
    assert outcome.cost == tfl.cost(model)
    loss, accuracy = model.evaluate(load_data().test, verbose=0)
    assert (outcome.loss, outcome.accuracy) == (loss, accuracy)

    log = rows(folder)
    assert [int(row["epoch"]) for row in log] == [0, 1, 2, 3]
    assert [row["weight_bits"] for row in log] == ["2"] * 4
    assert [row["activation_bits"] for row in log] == ["32", "2", "2", "2"]
    assert float(log[-1]["val_accuracy"]) == pytest.approx(accuracy)
    assert {"loss", "accuracy", "val_loss"} <= set(log[0])
    assert list((folder / "tensorboard" / "train").iterdir())

    reloaded = tfl.load_model(folder / "model.keras", compile=False)
    assert_same(reloaded.get_weights(), model.get_weights())


def test_the_log_is_read_as_a_history(whole):
    _, folder, _ = whole
    history = experiment.read_history(folder)
    log = rows(folder)
    assert set(history) == set(log[0]) - {"epoch"}
    assert history["activation_bits"] == [32.0, 2.0, 2.0, 2.0]
    assert history["loss"] == [float(row["loss"]) for row in log]


def test_a_comparison_has_a_row_for_each_network(whole):
    cost = whole[2].cost
    rows = [("float", "32 / 32", None, tfl.cost(float_net())), ("w2", "2", 0.5, cost)]
    table = experiment.comparison(rows)
    cells = [list(column.cells) for column in table.columns]
    assert cells[:3] == [["float", "w2"], ["32 / 32", "2"], ["-", "50.00 %"]]
    assert cells[3][1] == f"{cost.weight_bytes:,}"
    assert cells[4][1] == f"{cost.bops:,}"


def test_write_result(whole, tmp_path):
    outcome = whole[2]
    path = experiment.write_result(tmp_path, outcome, {"epochs": 4, "ladder": ["2"]})
    assert path == tmp_path / "result.json"
    assert files(tmp_path) == ["result.json"]
    result = json.loads(path.read_text())
    assert result["test_accuracy"] == outcome.accuracy
    assert result["settings"] == {"epochs": 4, "ladder": ["2"]}
    for part in ("versions", "machine"):
        assert result[part] == environment()[part]
    assert result["cost"]["bops"] == outcome.cost.bops
    assert len(result["cost"]["layers"]) == len(outcome.cost.layers)


def failing_after(batches):
    """A loader whose training part breaks after so many batches, as a disk may."""

    def load(first_epoch, first_step):
        data = load_data(first_epoch, first_step)

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
    save = Recovery.on_epoch_end

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt
        save(self, epoch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "on_epoch_end", on_epoch_end)
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
    assert (saved_at(tmp_path) or [(0, 0)])[-1] == (saved, 0)
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
    assert again.new_epochs == 0
    assert rows(folder) == before


def test_a_folder_with_an_earlier_run_is_refused(whole):
    _, folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def load(*position):
        raise AssertionError("It was to be refused first.")

    with pytest.raises(FileExistsError, match=rf"--resume.*Received: '{folder}'"):
        experiment.train(quantized_model(), load, stages(), folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


BEGUN = {"bits": 2, "ladder": ["4", "2"], "limit": None, "rate": 0.1}


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has a checkpoint."""
    (tmp_path / "checkpoints" / "epoch-00001-step-0000000").mkdir(parents=True)
    (tmp_path / "settings.json").write_text(json.dumps(BEGUN))
    return tmp_path


def test_a_run_goes_on_with_the_settings_that_it_began_with(begun):
    experiment.check_folder(begun, BEGUN, resume=True)
    # What a later version asks for, or no longer.
    experiment.check_folder(begun, {"bits": 2, "depth": 8}, resume=True)


def test_a_run_does_not_go_on_with_other_settings(begun):
    changed = {**BEGUN, "bits": 4, "ladder": ["4", "3"], "limit": 5}
    with pytest.raises(ValueError, match=r"--resume must .*Received: ") as caught:
        experiment.check_folder(begun, changed, resume=True)
    told = str(caught.value)
    assert "--bits=4, begun with 2;" in told
    assert "--ladder=['4', '3'], begun with ['4', '2'];" in told
    assert f"--limit=5, begun with None in '{begun / 'settings.json'}'" in told
    assert "rate" not in told


def test_a_run_that_began_without_settings_goes_on(begun):
    (begun / "settings.json").unlink()
    experiment.check_folder(begun, BEGUN, resume=True)


def test_torn_settings_are_named(begun):
    (begun / "settings.json").write_text("")
    with pytest.raises(ValueError, match=r"must be whole.*Received: .*settings\.json"):
        experiment.check_folder(begun, BEGUN, resume=True)


def test_settings_bind_from_the_first_checkpoint_on(begun):
    shutil.rmtree(begun / "checkpoints")
    for resume in (False, True):
        experiment.check_folder(begun, {"bits": 4}, resume=resume)


def test_settings_are_written_before_the_first_step(tmp_path):
    for bits in (2, 3):
        with pytest.raises(tf.errors.InvalidArgumentError):
            experiment.train(
                *(quantized_model(), failing_after(0), stages(), tmp_path),
                settings={"bits": bits},
            )
        assert json.loads((tmp_path / "settings.json").read_text()) == {"bits": bits}
        assert not saved_at(tmp_path)


def test_a_training_does_not_go_on_with_other_settings(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole[1], folder)
    # It began without; nobody knows with which.
    experiment.train(
        *(quantized_model(), load_data, stages(), folder),
        resume=True,
        settings={"bits": 2},
    )
    assert not (folder / "settings.json").exists()
    (folder / "settings.json").write_text('{"bits": 2}')
    with pytest.raises(ValueError, match="--bits=4, begun with 2"):
        experiment.train(
            *(quantized_model(), load_data, stages(), folder),
            resume=True,
            settings={"bits": 4},
        )


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


# Resuming in mid-epoch


@pytest.fixture(scope="module")
def whole_trainer(tmp_path_factory):
    """Stages, sampled units, teacher and hints together: trainer, folder, outcome.

    Beside the folder is a copy of it after two steps of epoch 2, in the second stage.
    """
    folder = tmp_path_factory.mktemp("whole_trainer") / "run"
    on_train_batch_end = Recovery.on_train_batch_end

    def copy(self, batch, logs=None):
        on_train_batch_end(self, batch, logs)
        if batch == 1 and saved_at(folder) == [(2, 1), (2, 2)]:
            shutil.copytree(folder, folder.with_name("stopped"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recovery, "on_train_batch_end", copy)
        trainer = trainer_model()
        outcome = experiment.train(trainer, load_data, stages(), folder, save_every=1)
    return trainer, folder, outcome


@pytest.fixture
def stopped(whole_trainer, tmp_path):
    """A run that a power cut has stopped in mid-epoch."""
    _, folder, _ = whole_trainer
    return shutil.copytree(folder.with_name("stopped"), tmp_path / "run")


def resumed_trainer(folder):
    """The trainer, the outcome, and where its data started."""
    positions = []

    def load(*position):
        positions.append(position)
        return load_data(*position)

    # Other initial weights: whatever is not restored shows.
    trainer = trainer_model(seed=1)
    outcome = experiment.train(
        trainer, load, stages(), folder, resume=True, save_every=1
    )
    return trainer, outcome, positions


def assert_same_run(folder, trainer, outcome, whole_trainer):
    expected, whole_folder, expected_outcome = whole_trainer
    assert_same(everything(trainer), everything(expected))
    assert (outcome.accuracy, outcome.loss) == (
        expected_outcome.accuracy,
        expected_outcome.loss,
    )
    log, whole_log = rows(folder), rows(whole_folder)
    # The resumed epoch's training figures are over its remaining steps.
    of_evaluation = ("epoch", "val_loss", "val_accuracy", "weight_bits")
    for row, whole_row in zip(log, whole_log, strict=True):
        assert set(row) == set(whole_row)
        for name in row if row["epoch"] != "2" else of_evaluation:
            assert row[name] == whole_row[name], (row["epoch"], name)


def test_a_trainer_resumes_in_mid_epoch_to_the_whole_run(stopped, whole_trainer):
    trainer, outcome, positions = resumed_trainer(stopped)
    assert positions == [(2, 2)]
    assert_same_run(stopped, trainer, outcome, whole_trainer)
    assert int(trainer.progress.step) == 4 * STEPS
    assert saved_at(stopped) == [(3, STEPS - 1), (4, 0)]


def test_a_torn_checkpoint_is_warned_of_and_the_older_one_used(stopped, whole_trainer):
    newest = stopped / "checkpoints" / f"epoch-{2:05}-step-{2:07}"
    data = newest / "variables.data-00000-of-00001"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.warns(UserWarning, match=rf"damaged checkpoint is skipped: {newest}: "):
        trainer, outcome, positions = resumed_trainer(stopped)
    assert positions == [(2, 1)]
    assert_same_run(stopped, trainer, outcome, whole_trainer)


def test_the_model_of_a_trainers_run_is_its_student(whole_trainer, tmp_path):
    trainer, folder, outcome = whole_trainer
    result = json.loads(experiment.write_result(tmp_path, outcome, {}).read_text())
    model = tfl.load_model(folder / "model.keras", compile=False)
    assert_same(model.get_weights(), trainer.student.get_weights())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"])
    assert model.evaluate(load_data().test, verbose=0)[1] == result["test_accuracy"]
    assert outcome.cost == tfl.cost(model)


def test_a_trainers_log_has_every_part(whole_trainer):
    _, folder, _ = whole_trainer
    log = rows(folder)
    parts = ("loss", "accuracy", "task_loss", "distillation_loss", "hint_loss")
    assert set(log[0]) == {
        "epoch",
        *parts,
        *(f"teacher_{part}" for part in parts),
        *("quantized_share", "quantization_probability"),
        *("val_loss", "val_accuracy", "weight_bits", "activation_bits"),
    }
    probabilities = [float(row["quantization_probability"]) for row in log]
    assert probabilities == sorted(probabilities)
    assert 0.5 <= probabilities[0] < probabilities[-1] <= 1.0


# What goes wrong


def nan_from_epoch_1(first_epoch, first_step):
    data = load_data(first_epoch, first_step)

    def spoil(index, batch):
        images, labels = batch
        bad = index >= STEPS - (first_epoch * STEPS + first_step)
        return tf.where(bad, float("nan"), images), labels

    train = data.train.enumerate().map(spoil)
    unlimited = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    return dataclasses.replace(data, train=train.apply(unlimited))


@pytest.mark.parametrize("build", [float_model, quantized_model])
def test_nan_stops_the_training_and_the_last_good_checkpoint_stays(tmp_path, build):
    stage = [tfl.Stage(3, learning_rate=RATE)]
    with pytest.raises(ValueError, match=r"loss must stay finite.*Received: .*nan"):
        experiment.train(build(), nan_from_epoch_1, stage, tmp_path)
    assert not (tmp_path / "model.keras").exists()

    assert saved_at(tmp_path) == [(1, 0)]
    weights = saved_weights(tmp_path, 1, 0)
    assert weights
    assert all(np.all(np.isfinite(weight)) for weight in weights)

    # With the data mended the run goes on from there.
    outcome = experiment.train(build(seed=1), load_data, stage, tmp_path, resume=True)
    assert np.isfinite(outcome.loss)
    assert [int(row["epoch"]) for row in rows(tmp_path)] == [0, 1, 2]


def test_a_huge_learning_rate_is_an_error(tmp_path):
    stage = tfl.Stage(3, learning_rate=1e38)
    with pytest.raises(ValueError, match=r"lower the learning rate.*Received: "):
        experiment.train(float_model(), load_data, [stage], tmp_path)
    assert saved_at(tmp_path) == []


def all_at_once(first_epoch, first_step):
    return datasets.load(
        "digits",
        batch_size=LIMIT,
        limit=LIMIT,
        start_epoch=first_epoch,
        start_step=first_step,
    )


@pytest.mark.parametrize("epochs", [1, 2])
def test_divergence_in_an_epochs_last_step_is_an_error_and_is_not_saved(
    tmp_path, epochs
):
    # The loss is taken before the step that spoils the weights: it is finite.
    stage = tfl.Stage(epochs, learning_rate=1e38)
    with pytest.raises(ValueError, match=r"lower the learning rate.*Received: "):
        experiment.train(float_model(), all_at_once, [stage], tmp_path)
    assert not (tmp_path / "model.keras").exists()
    assert saved_at(tmp_path) == []


def test_spoiled_weights_are_not_saved_within_an_epoch():
    model = float_model()
    model.layers[-1].kernel.assign(np.full((64, 10), np.inf))
    finite = {"loss": 1.0}
    for every, batch, is_saved in ((2, 1, True), (2, 0, False), (None, 1, False)):
        callback = experiment.StayFinite(every)
        callback.set_model(model)
        if not is_saved:
            callback.on_train_batch_end(batch, finite)
            continue
        with pytest.raises(ValueError, match=r"Received: weights .*not finite"):
            callback.on_train_batch_end(batch, finite)


def test_labels_out_of_the_models_range_are_an_error(tmp_path):
    model = float_model(classes=5)
    with pytest.raises(ValueError, match=r"label.*Received: "):
        experiment.train(model, load_data, [tfl.Stage(1, learning_rate=RATE)], tmp_path)


# Deployment


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_deployment_info_is_how_pixels_become_inputs(name):
    data = datasets.load(name, batch_size=4, limit=4, augment=False)
    info = experiment.deployment_info(data)
    assert json.loads(json.dumps(info)) == info
    assert info["dataset"] == name
    shares = np.linspace(0, 1, 64).reshape(1, 8, 8, 1)
    ours = shares - info["normalization"]["mean"]
    ours /= info["normalization"]["deviation"]
    # The data set's own way, from what it stores.
    theirs = data.normalization(shares * data.normalization.scale)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_float_tflite_computes_what_the_network_does_and_is_silent(capfd):
    model = float_net()
    capfd.readouterr()
    content = experiment.float_tflite(model)
    assert capfd.readouterr().out == ""
    assert content[4:8] == b"TFL3"
    (images, _), *_ = load_data().test
    (found,) = tfl.export.Runner(content)(images.numpy()).values()
    np.testing.assert_allclose(found, model(images, training=False), atol=1e-4)
