"""What `fit` and `evaluate` of a quantized network warn of, and nothing else."""

import re

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.calibration.batch_norm import estimated_lag, lag
from tf_lowbit.callbacks import BatchNormReestimation, StagedPrecision
from tf_lowbit.compat import keras, tf
from tf_lowbit.training.quantized_network import QuantizedNetwork

layers = keras.layers
kinds = keras.callbacks
X, Y = nets.images(16, (5,)), nets.labels(16)
# A clip that training does not move stays open until `calibrate`.
RULE = tfl.PrecisionRule(".*", 2, 2, activation_quantizer="uniform")


def float_net(momentum=0.9, norm=layers.BatchNormalization):
    x = inputs = keras.Input((5,), name="features")
    x = layers.Dense(6, name="one")(x)
    x = norm(momentum=momentum, name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dense(6, activation="relu", name="two")(x)
    model = keras.Model(inputs, layers.Dense(nets.CLASSES, name="head")(x))
    return nets.randomize(model)


def compiled(model, rate=0.0):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss)
    return model


def ready(momentum=0.9, rule=RULE, **options):
    """A network whose ranges and statistics are what they should be."""
    model = tfl.quantize(float_net(momentum), rule)
    tfl.calibrate(model, [X])
    tfl.recalibrate_batch_norm(model, [X])
    return compiled(model, **options)


def fit(model, *callbacks, steps=1, **options):
    data = tf.data.Dataset.from_tensors((X, Y)).repeat()
    return model.fit(
        data, steps_per_epoch=steps, callbacks=list(callbacks), verbose=0, **options
    )


def staged(is_staged, epochs=2):
    return [StagedPrecision([tfl.Stage(epochs)])] if is_staged else []


@pytest.mark.quick(2)
@pytest.mark.parametrize("is_staged", [False, True], ids=["", "staged"])
@pytest.mark.parametrize("is_trainer", [False, True], ids=["network", "trainer"])
def test_ranges_that_wait_are_told_once(is_trainer, is_staged):
    network = tfl.quantize(float_net(), RULE)
    model = compiled(tfl.LowBitTrainer(network) if is_trainer else network)

    def train():
        options = {"epochs": 2, "validation_data": (X, Y)}
        fit(model, *staged(is_staged), **options)

    (message,) = nets.told(train)
    assert re.search(r"Call tf_lowbit.calibrate.*\['relu/output'\]", message)
    assert nets.told(train) == []
    assert nets.told(lambda: model.evaluate(X, Y, verbose=0)) == []
    tfl.calibrate(model, [X])
    assert nets.told(train) == []


@pytest.mark.parametrize("is_trainer", [False, True], ids=["network", "trainer"])
def test_evaluate_tells_of_ranges_that_wait(is_trainer):
    network = tfl.quantize(float_net(), RULE)
    model = compiled(tfl.LowBitTrainer(network) if is_trainer else network)
    (message,) = nets.told(lambda: model.evaluate(X, Y, verbose=0))
    assert "Call tf_lowbit.calibrate" in message
    tfl.calibrate(model, [X])
    assert nets.told(lambda: model.evaluate(X, Y, verbose=0)) == []


class Restore(keras.callbacks.Callback):
    """Brings calibrated weights, as callbacks that resume a training do."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def on_train_begin(self, logs=None):
        self.model.set_weights(self.values)


@pytest.mark.slow
def test_ranges_that_a_callback_brings_are_set():
    values = ready().get_weights()
    model = compiled(tfl.quantize(float_net(), RULE))
    assert nets.told(lambda: fit(model, Restore(values))) == []


class Score(keras.callbacks.Callback):
    """Puts a score in the logs: the epoch's number, times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = self.factor * epoch


STAGES = [tfl.Stage(1, 8, 8), tfl.Stage(1, 2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("kind", ["EarlyStopping", "ModelCheckpoint"])
def test_the_best_epoch_of_an_earlier_stage_is_told(tmp_path, kind, is_first):
    model = ready()

    def train(factor):
        if kind == "EarlyStopping":
            options = {"restore_best_weights": True, "patience": 5}
            other = kinds.EarlyStopping("score", mode="max", **options)
        else:
            options = {"save_best_only": True, "save_weights_only": True}
            path = str(tmp_path / "best.h5")
            other = kinds.ModelCheckpoint(path, "score", mode="max", **options)
        both = [StagedPrecision(STAGES), other]
        score = Score(factor)
        return nets.told(
            lambda: fit(model, score, *both[:: -1 if is_first else 1], epochs=2)
        )

    message = "reach its last stage" if kind == "EarlyStopping" else r"best\.h5"
    (found,) = train(-1)
    assert re.search(message, found)
    assert train(1) == []


@pytest.mark.quick(1)
@pytest.mark.parametrize("is_trainer", [False, True], ids=["network", "trainer"])
@pytest.mark.parametrize(
    ("stage", "is_overruled"),
    [
        (tfl.Stage(1, learning_rate=0.1, decay="cosine"), True),
        (tfl.Stage(1, learning_rate=0.1, warmup=0.5), True),
        (tfl.Stage(1, learning_rate=0.1), False),
    ],
    ids=["decay", "warmup", "constant"],
)
def test_a_learning_rate_that_a_stage_overrules_is_told(
    stage, is_overruled, is_trainer
):
    model = compiled(tfl.LowBitTrainer(ready())) if is_trainer else ready()
    rates = [
        kinds.LearningRateScheduler(lambda epoch: 0.1),
        kinds.ReduceLROnPlateau("loss"),
    ]
    found = nets.told(lambda: fit(model, *rates, StagedPrecision([stage])))
    assert len(found) == is_overruled
    if is_overruled:
        assert "Received: LearningRateScheduler, ReduceLROnPlateau beside" in found[0]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1.0])
def test_estimated_lag_of_a_constant_statistic(momentum):
    norm = layers.BatchNormalization(momentum=momentum, epsilon=0.0)
    start, batch = (np.zeros(2), np.ones(2)), (np.ones(2), np.full(2, 4.0))
    left = momentum**20
    end = [b + left * (s - b) for s, b in zip(start, batch, strict=True)]
    deviation = np.sqrt(4.0 - 3.0 * left)
    expected = np.hypot(left / deviation, 2.0 / deviation - 1.0)
    if momentum == 1.0:  # Nothing is known of the batches.
        expected = 0.0
    assert estimated_lag(norm, start, end, 20) == pytest.approx(expected, rel=1e-6)


def late(model):
    """Far from the batch's statistics, which stay as they are at learning rate 0."""
    for norm in (m for m in model.submodules if type(m) is layers.BatchNormalization):
        norm.moving_mean.assign_add(5.0 * tf.ones_like(norm.moving_mean))
    return model


@pytest.mark.quick(1)
@pytest.mark.parametrize("steps", [30, 5], ids=["", "short epochs"])
@pytest.mark.parametrize("is_trainer", [False, True], ids=["network", "trainer"])
def test_statistics_that_lag_are_told(is_trainer, steps):
    network = late(ready(momentum=0.99))
    model = compiled(tfl.LowBitTrainer(network)) if is_trainer else network
    options = {"steps": steps, "epochs": 60 // steps, "validation_data": (X, Y)}
    (message,) = nets.told(lambda: fit(model, **options))
    assert "recalibrate_batch_norm" in message
    assert "momentum, such as 0.9." in message
    found = re.search(r"by their last (\d+) steps.*: norm by (\S+)$", message)
    assert int(found[1]) == max(steps, 10)
    expected = lag(network, [X])["norm"]
    assert expected > 0.3
    assert float(found[2]) == pytest.approx(expected, abs=0.006)  # Of two digits.


@pytest.mark.slow
def test_the_warning_of_lag_names_the_line_of_fit():
    with pytest.warns(tfl.QuantizationWarning) as found:
        fit(late(ready(momentum=0.99)), steps=30, epochs=2)
    assert {warning.filename for warning in found} == {__file__}


@pytest.mark.slow
def test_statistics_that_lag_are_told_on_two_replicas(mirrored):
    with mirrored(2).scope():
        model = late(ready(momentum=0.99))
    (message,) = nets.told(lambda: fit(model, steps=20))
    assert "norm by" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("momentum", "steps", "callbacks"),
    [
        (0.9, 60, []),  # 0.9^60: nothing is left.
        (0.99, 9, []),  # Too few to tell.
        (0.99, 20, [BatchNormReestimation([X])]),
    ],
    ids=["momentum", "few", "measured"],
)
def test_statistics_that_follow_are_not_told(momentum, steps, callbacks):
    model = late(ready(momentum))
    assert nets.told(lambda: fit(model, *callbacks, steps=steps)) == []


@pytest.mark.slow
def test_a_callback_list_is_left_as_it_was():
    model = compiled(tfl.quantize(float_net(0.99), RULE))
    mine = kinds.CallbackList([], add_history=True, model=late(model), epochs=1)
    data = tf.data.Dataset.from_tensors((X, Y)).repeat(20)
    before = list(mine.callbacks)
    found = nets.told(lambda: model.fit(data, callbacks=mine, verbose=0))
    assert len(found) == 2
    assert mine.callbacks == before


@pytest.mark.slow
def test_training_itself_does_not_change():
    model = ready(rate=0.1)
    plain = keras.Model(*(lambda m: (m.inputs, m.outputs))(ready(rate=0.1)))
    assert not isinstance(plain, QuantizedNetwork)
    histories = [
        fit(m, steps=5, epochs=2).history for m in (model, compiled(plain, 0.1))
    ]
    assert histories[0] == histories[1]
    for one, other in zip(model.variables, plain.variables, strict=False):
        np.testing.assert_array_equal(one, other)


@pytest.mark.quick(1)
def test_metrics_are_named_as_keras_names_them():
    """A callback that monitors "val_recall" must find it, with `run_eagerly` too."""
    inputs = keras.Input((5,))
    model = QuantizedNetwork(inputs, layers.Dense(1, "sigmoid")(inputs))
    *_, count = keras.metrics.Recall().name.rpartition("_")
    count = int(count) if count.isdigit() else 0
    model.compile("sgd", "mse", ["ACC", "Recall"], run_eagerly=True)
    found = model.evaluate(X, Y > 0, return_dict=True, verbose=0)
    assert list(found) == ["loss", "ACC", f"recall_{count + 1}"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("how", ["net.keras", "net.h5", "net", "clone", "json"])
def test_copies_warn_too(tmp_path, how):
    model = compiled(tfl.quantize(float_net(), RULE))
    if how == "clone":
        again = keras.models.clone_model(model)
    elif how == "json":
        again = keras.models.model_from_json(model.to_json())
    else:
        model.save(tmp_path / how)
        again = tfl.load_model(tmp_path / how)
    assert isinstance(again, QuantizedNetwork)
    (message,) = nets.told(lambda: compiled(again).evaluate(X, Y, verbose=0))
    assert "Call tf_lowbit.calibrate" in message


def test_data_of_nan_end_in_what_to_do():
    rule = tfl.PrecisionRule(".*", 2, 2, "lsq", "lsq")
    model = ready(rule=rule, rate=0.1)
    spoilt = X.copy()
    spoilt[0] = np.nan
    data = tf.data.Dataset.from_tensors((spoilt, Y)).repeat(2)
    with pytest.raises(ValueError, match=r"finite: look for NaN in the data.*Received"):
        model.fit(data, epochs=2, verbose=0)
    with pytest.raises(ValueError, match=r"finite: look for NaN in the data.*Received"):
        model.evaluate(X, Y, verbose=0)
    with pytest.raises(tfl.export.ExportError, match="Weights must be finite"):
        tfl.export.to_tflite(model, "never.tflite", [X])
