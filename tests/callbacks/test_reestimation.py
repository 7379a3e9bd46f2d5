"""`BatchNormReestimation`: statistics of the network at each evaluation."""

import warnings

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.calibration.batch_norm import lag
from tf_lowbit.callbacks import BatchNormReestimation, Recovery
from tf_lowbit.compat import keras, tf

layers = keras.layers
STEPS = 4
BATCHES = [
    (nets.images(16, (5,), seed), nets.labels(16, seed=seed)) for seed in range(STEPS)
]


def dataset():
    inputs, labels = (np.concatenate(part) for part in zip(*BATCHES, strict=True))
    return tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(16)


def network(momentum=0.99):
    x = inputs = keras.Input((5,), name="in")
    for name in ("one", "two"):
        x = layers.Dense(6, name=name)(x)
        x = layers.BatchNormalization(momentum=momentum, name=f"bn_{name}")(x)
        x = layers.ReLU(name=f"relu_{name}")(x)
    model = keras.Model(inputs, layers.Dense(nets.CLASSES, name="head")(x))
    rule = tfl.PrecisionRule(".*", 2, 2)
    return tfl.quantize(nets.randomize(model), rule)


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss)
    return model


def fit(model, *callbacks, epochs=3, **options):
    return model.fit(
        dataset(), epochs=epochs, verbose=0, callbacks=list(callbacks), **options
    )


class Lags(keras.callbacks.Callback):
    """The largest lag at each evaluation and each epoch's end."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _look(self):
        self.seen.append(max(lag(self.model, dataset()).values()))

    def on_test_begin(self, logs=None):
        self._look()

    def on_epoch_end(self, epoch, logs=None):
        self._look()


@pytest.mark.quick(1)
@pytest.mark.parametrize("is_trainer", [False, True])
@pytest.mark.parametrize("validates", [False, True])
def test_no_evaluation_and_no_checkpoint_lags(validates, is_trainer):
    def lags(*callbacks):
        model = network()
        model = tfl.LowBitTrainer(model) if is_trainer else model
        seen = Lags()
        options = {"validation_data": dataset()} if validates else {}
        fit(compiled(model), *callbacks, seen, **options)
        return seen.seen

    assert min(lags()) > 0.3
    measured = lags(BatchNormReestimation(dataset()))
    assert len(measured) == (6 if validates else 3)
    assert max(measured) < 1e-3


def test_training_itself_does_not_change():
    plain, measured = compiled(network()), compiled(network())
    fit(plain)
    fit(measured, BatchNormReestimation(dataset()))
    for one, other in zip(
        plain.trainable_variables, measured.trainable_variables, strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly(tmp_path):
    whole, first, second = (compiled(network()) for _ in range(3))
    fit(whole, BatchNormReestimation(dataset()), epochs=4)
    for model, epochs in ((first, 2), (second, 4)):
        own = BatchNormReestimation(dataset()), Recovery(tmp_path)
        fit(model, *own, epochs=epochs)
    nets.assert_all_equal(
        nets.snapshot(second.variables), nets.snapshot(whole.variables)
    )


@pytest.mark.slow
def test_on_two_replicas(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        model = compiled(network())
    fit(model, BatchNormReestimation(dataset()))
    assert max(lag(model, dataset()).values()) < 1e-3


@pytest.mark.slow
def test_values_that_are_not_finite_end_no_training():
    model = compiled(network())
    broken = [np.full((16, 5), np.nan, np.float32)]
    with pytest.warns(UserWarning, match=r"not measured.*Received: bn_one"):
        history = fit(model, BatchNormReestimation(broken), epochs=1)
    assert len(history.history["loss"]) == 1
    assert all(np.isfinite(v.numpy()).all() for v in model.variables)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BATCHES, 0), "batches=0"),
        ((iter(BATCHES),), "read again"),
        ((BATCHES[0],), "iterable of batches"),
    ],
)
def test_refuses_before_training_what_it_cannot_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchNormReestimation(*arguments)


@pytest.fixture(name="no_warnings")
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", tfl.QuantizationWarning)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("no_warnings")
def test_export_is_silent_where_nothing_lags(tmp_path):
    model = network()
    tfl.calibrate(model, BATCHES)
    tfl.recalibrate_batch_norm(model, BATCHES)
    made = tfl.export.to_tflite(model, tmp_path / "net.tflite", BATCHES, verbose=0)
    assert made.path.exists()
    assert max(tfl.batch_norm.lag(model, BATCHES).values()) < 1e-3


def test_export_warns_of_statistics_that_lag(tmp_path):
    model = network()
    tfl.calibrate(model, BATCHES)
    tfl.recalibrate_batch_norm(model, BATCHES)
    norm = model.get_layer("bn_two")
    deviation = np.sqrt(norm.moving_variance + norm.epsilon)
    norm.moving_mean.assign_add(0.5 * deviation)
    path = tmp_path / "net.tflite"
    message = r"recalibrate_batch_norm.*Received: 1 layers.* bn_two by 0\.50$"
    with pytest.warns(tfl.QuantizationWarning, match=message):
        tfl.export.to_tflite(model, path, BATCHES, verbose=0)
    assert path.exists()
