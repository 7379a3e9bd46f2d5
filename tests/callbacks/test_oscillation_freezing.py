"""`OscillationFreezing`: weights that flip are found in training and stay put."""

import functools

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.callbacks import OscillationFreezing, Recovery, StagedPrecision
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import oscillation

STEPS = 6
INPUTS, LABELS = nets.images(8 * STEPS, (5,)), nets.labels(8 * STEPS)
# At a rate at which many weights flip. The first flip freezes.
FREEZING = {"threshold": 0.05, "final_threshold": 0.05, "momentum": 0.1}


def dataset():
    return tf.data.Dataset.from_tensor_slices((INPUTS, LABELS)).batch(8)


def network(bits=2):
    model = nets.randomize(nets.perceptron(8))
    rule = tfl.PrecisionRule(".*", bits, 4, "lsq", "lsq", edges=True)
    model = tfl.quantize(model, rule)
    tfl.calibrate(model, dataset())
    return model


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss, **options)
    return model


def fit(model, *callbacks, epochs=4, **options):
    return model.fit(
        dataset(), epochs=epochs, verbose=0, callbacks=list(callbacks), **options
    )


class Seen(keras.callbacks.Callback):
    """Codes, latent weights, and the flags of the freezing, after each step."""

    def __init__(self, freezing):
        super().__init__()
        self.freezing, self.codes, self.latent, self.frozen = freezing, [], [], []

    def on_train_batch_end(self, batch, logs=None):
        weights = self.freezing.weights
        for seen, values in (
            (self.codes, [w.tensor.codes() for w in weights]),
            (self.latent, [w.weights for w in weights]),
            (self.frozen, [w.frozen for w in weights]),
        ):
            seen.append(np.concatenate([np.ravel(v.numpy()) for v in values]))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["network", "trainer"])
def test_a_frozen_weight_stays_until_the_end(kind):
    model = network()
    model = tfl.LowBitTrainer(model) if kind == "trainer" else model
    freezing = OscillationFreezing(**FREEZING)
    seen = Seen(freezing)
    history = fit(compiled(model), freezing, seen).history
    frozen, latent = np.array(seen.frozen), np.array(seen.latent)
    assert 0.05 < frozen[-1].mean() < 0.95
    assert not frozen[0].any()
    both = frozen[:-1] & frozen[1:]
    np.testing.assert_array_equal(frozen[:-1], both)  # None is set free.
    codes = np.array(seen.codes)
    np.testing.assert_array_equal(codes[:-1][both], codes[1:][both])
    # LSQ's step moves, but not so far that a code would change at its old place.
    np.testing.assert_array_equal(latent[:-1][both], latent[1:][both])
    assert (latent[:-1] != latent[1:])[~frozen[1:]].mean() > 0.2
    shares = frozen.reshape(4, STEPS, -1)[:, -1].mean(axis=1)
    np.testing.assert_allclose(history["frozen_weights"], shares, rtol=1e-6)
    flips = np.concatenate([np.ravel(w.frequency.numpy()) for w in freezing.weights])
    np.testing.assert_allclose(
        history["oscillating_weights"][-1], (flips > 0.005).mean(), rtol=1e-6
    )


def test_the_threshold_falls_along_a_cosine(monkeypatch):
    used = []
    monkeypatch.setattr(
        oscillation.WeightOscillation,
        "look",
        lambda self, threshold, momentum: used.append((threshold, momentum)),
    )
    tf.config.run_functions_eagerly(True)
    try:
        fit(compiled(network()), OscillationFreezing(0.1, 0.01), epochs=2)
    finally:
        tf.config.run_functions_eagerly(False)
    found = [(float(threshold), momentum) for threshold, momentum in used[::3]]
    progress = np.arange(1, 2 * STEPS + 1) / (2 * STEPS)
    expected = 0.01 + 0.09 * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose([t for t, _ in found], expected, rtol=1e-6)
    assert {momentum for _, momentum in found} == {0.01}
    assert found[-1][0] == pytest.approx(0.01)


@pytest.mark.slow
def test_measuring_alone_changes_no_training():
    plain, measured = compiled(network()), compiled(network())
    fit(plain, epochs=2)
    logs = fit(measured, OscillationFreezing(1, 1), epochs=2).history
    nets.assert_all_equal(
        nets.snapshot(measured.variables), nets.snapshot(plain.variables)
    )
    assert logs["oscillating_weights"][-1] > 0
    assert logs["frozen_weights"] == [0, 0]


def state_of(model):
    found = oscillation.tracked(model)
    flags = [flag for w in found for flag in (w.frequency, w.frozen)]
    return nets.snapshot([*model.variables, *flags])


@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly(tmp_path):
    whole, first, second = (compiled(network()) for _ in range(3))
    fit(whole, OscillationFreezing(**FREEZING))

    class Killed(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == 2 * STEPS + 4:
                raise KeyboardInterrupt

    def resumable(model, *others):
        recovery = Recovery(tmp_path, every=2)
        skipped = recovery.position.step
        data = dataset().skip(skipped).concatenate(dataset().repeat())
        callbacks = [OscillationFreezing(**FREEZING), *others, recovery]
        model.fit(data, steps_per_epoch=STEPS, epochs=4, verbose=0, callbacks=callbacks)

    with pytest.raises(KeyboardInterrupt):
        resumable(first, Killed())
    resumable(second)
    assert second.optimizer.iterations == 4 * STEPS
    nets.assert_all_equal(state_of(second), state_of(whole))


@pytest.mark.slow
def test_weights_that_were_loaded_in_between_are_kept():
    model = compiled(network())
    start = model.get_weights()
    fit(model, OscillationFreezing(**FREEZING))
    assert any(own.frozen_share() > 0 for own in oscillation.tracked(model))
    model.set_weights(start)
    other = compiled(network())
    for own in (model, other):
        fit(compiled(own), OscillationFreezing(**FREEZING), epochs=1)
    nets.assert_all_equal(state_of(model), state_of(other))


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 3 * STEPS:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_later_fit_keeps_what_is_frozen(is_whole):
    model = compiled(network())
    if is_whole:
        fit(model, OscillationFreezing(**FREEZING))
    else:
        # Between the step and the callback.
        with pytest.raises(KeyboardInterrupt):
            fit(model, Interrupt(), OscillationFreezing(**FREEZING))
    before = [own.frozen.numpy() for own in oscillation.tracked(model)]
    assert np.concatenate([np.ravel(frozen) for frozen in before]).any()
    fit(model, OscillationFreezing(**FREEZING), epochs=1)
    for old, own in zip(before, oscillation.tracked(model), strict=True):
        assert own.frozen.numpy()[old].all()


@pytest.mark.slow
def test_a_stage_of_other_bits_sets_them_free():
    model = compiled(network())
    freezing = OscillationFreezing(**FREEZING)
    seen = Seen(freezing)
    stages = [tfl.Stage(2, 4, 4), tfl.Stage(2, 2, 4)]
    fit(model, StagedPrecision(stages), freezing, seen)
    assert seen.frozen[2 * STEPS - 1].any()
    assert not seen.frozen[2 * STEPS].any()
    assert seen.frozen[-1].any()
    assert {weight.tensor.bits for weight in freezing.weights} == {2}


@functools.cache
def trained(replicas, strategy):
    with strategy.scope():
        model = compiled(network())
    fit(model, OscillationFreezing(**FREEZING), epochs=3)
    return model


@pytest.mark.slow
def test_two_replicas_freeze_as_one_device_does(mirrored):
    one, two = (trained(n, mirrored(n)) for n in (1, 2))
    pairs = zip(oscillation.tracked(one), oscillation.tracked(two), strict=True)
    assert any(own.frozen_share() > 0 for own in oscillation.tracked(one))
    for own, other in pairs:
        np.testing.assert_array_equal(own.frozen.numpy(), other.frozen.numpy())
        np.testing.assert_allclose(
            own.weights.numpy(), other.weights.numpy(), rtol=1e-4, atol=1e-5
        )
    # The replicas' own copies agree, too.
    for weight in oscillation.tracked(two):
        for variable in (weight.weights, weight.frozen, weight.frequency):
            first, second = variable.values
            np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.slow
def test_in_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = compiled(network())
        freezing = OscillationFreezing(**FREEZING)
        seen = Seen(freezing)
        fit(model, freezing, seen)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert seen.frozen[-1].any()
    assert all(w.weights.numpy().dtype == np.float32 for w in freezing.weights)
    both = seen.frozen[-2] & seen.frozen[-1]
    np.testing.assert_array_equal(seen.latent[-2][both], seen.latent[-1][both])


@pytest.mark.slow
def test_with_several_steps_per_execution():
    model = compiled(network(), steps_per_execution=2)
    freezing = OscillationFreezing(**FREEZING)
    seen = Seen(freezing)
    fit(model, freezing, seen, epochs=6)
    assert len(seen.frozen) == 6 * STEPS / 2
    both = seen.frozen[-2] & seen.frozen[-1]
    assert both.any()
    np.testing.assert_array_equal(seen.codes[-2][both], seen.codes[-1][both])


@pytest.mark.slow
def test_a_trained_network_is_saved_and_exported_as_ever(tmp_path):
    model = compiled(network())
    fit(model, OscillationFreezing(**FREEZING), epochs=2)
    expected = model.predict(INPUTS, verbose=0)
    for name in ("net.keras", "saved"):
        model.save(tmp_path / name)
        again = tfl.load_model(tmp_path / name)
        np.testing.assert_allclose(again.predict(INPUTS, verbose=0), expected)
    tfl.export.to_tflite(model, tmp_path / "net.tflite", dataset(), verbose=0)
    assert tfl.export.verify(tmp_path / "net.tflite", model, dataset()).ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "threshold=0"),
        ((1.5,), "threshold=1.5"),
        ((0.1, 0.2), "final_threshold=0.2"),
        ((0.1, 0.01, 1.0), "momentum=1.0"),
    ],
)
def test_refuses_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=f"Received: {message}"):
        OscillationFreezing(*arguments)


def test_refuses_a_network_of_more_bits():
    model = compiled(network(bits=8))
    with pytest.raises(ValueError, match=r"4 bits or fewer.*Received: 'perceptron'"):
        fit(model, OscillationFreezing())
