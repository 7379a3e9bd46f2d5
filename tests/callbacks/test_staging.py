import fractions
import functools
import re
import warnings

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit.callbacks import Recovery, StagedPrecision
from tf_lowbit.callbacks.optimizer_state import reset_optimizer
from tf_lowbit.compat import keras, tf

STEPS = 3


def float_net():
    keras.utils.set_random_seed(7)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Conv2D(4, 3, activation="relu", input_shape=(6, 6, 1), name="first"),
            layers.Conv2D(6, 3, use_bias=False, name="middle"),
            layers.BatchNormalization(momentum=0.5),  # Follows in a few steps.
            layers.ReLU(name="relu"),
            layers.Conv2D(6, 1, name="late"),
            layers.Flatten(),
            layers.Dense(3, name="head"),
        ]
    )


@functools.cache
def parts(rules):
    """Class, configuration and weights: copying is quicker than quantizing."""
    model = tfl.quantize(float_net(), list(rules))
    return type(model), model.get_config(), model.get_weights()


def quantized_net(bits=(2, 2), rules=None, optimizer=None, loss="mse", **options):
    rules = rules or [tfl.PrecisionRule(".*", *bits, **options)]
    kind, config, weights = parts(tuple(rules))
    model = kind.from_config(config)
    model.set_weights(weights)
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.9), loss)
    return model


def data(start_epoch=0, epochs=20):
    """Batches that depend on the epoch, so that a resume at a wrong place shows."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(epochs, STEPS, 8, 6, 6, 1)).astype("f")
    y = rng.normal(size=(epochs, STEPS, 8, 3)).astype("f")
    flat = tf.data.Dataset.from_tensor_slices(
        (
            x[start_epoch:].reshape(-1, 8, 6, 6, 1),
            y[start_epoch:].reshape(-1, 8, 3),
        )
    )
    return flat.repeat()


def fit(model, stages, callbacks=(), epochs=None, initial_epoch=0, **options):
    staged = StagedPrecision(stages, **options)
    return model.fit(
        data(initial_epoch),
        steps_per_epoch=STEPS,
        epochs=epochs or sum(stage.epochs for stage in stages),
        initial_epoch=initial_epoch,
        callbacks=[staged, *callbacks],
        verbose=0,
    )


class Recorder(keras.callbacks.Callback):
    """What holds at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.bits, self.rates, self.iterations = [], [], []

    def on_epoch_end(self, epoch, logs=None):
        tensors = list(tfl.inspection.quantized_tensors(self.model))
        self.bits.append({t.name: t.bits for t in tensors})
        self.rates.append(float(self.model.optimizer.learning_rate.numpy()))
        self.iterations.append(int(self.model.optimizer.iterations.numpy()))


def assert_same_weights(one, other):
    for a, b in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.name)


def assert_same_optimizers(one, other):
    for a, b in zip(one.optimizer.variables, other.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.name)


def test_two_stages_quantize_weights_then_activations():
    model, seen = quantized_net(), Recorder()
    history = fit(model, tfl.two_stage(2, (2, 1), learning_rate=(0.1, 0.01)), [seen])
    weights = ["middle/kernel", "late/kernel"]
    activations = ["first_relu/output", "relu/output"]
    assert [[bits[n] for n in weights] for bits in seen.bits] == [[2, 2]] * 3
    assert [[bits[n] for n in activations] for bits in seen.bits] == [
        [32, 32],
        [32, 32],
        [2, 2],
    ]
    assert history.history["weight_bits"] == [2, 2, 2]
    assert history.history["activation_bits"] == [32, 32, 2]
    np.testing.assert_allclose(seen.rates, [0.1, 0.1, 0.01])


def test_a_quantizer_never_goes_below_its_own_bits():
    rules = [tfl.PrecisionRule("first|head", 8, 8), tfl.PrecisionRule(".*", 2, 2)]
    model, seen = quantized_net(rules=rules), Recorder()
    fit(model, tfl.progressive(2, 1, (32, 4)), [seen])
    assert [bits["first/kernel"] for bits in seen.bits] == [32, 8, 8]
    assert [bits["middle/kernel"] for bits in seen.bits] == [32, 4, 2]


def test_none_means_each_quantizers_own_bits():
    model = quantized_net((3, 5))
    fit(model, [tfl.Stage(1, 8, 8), tfl.Stage(1)])
    bits = {t.name: t.bits for t in tfl.inspection.quantized_tensors(model)}
    assert bits["middle/kernel"] == 3
    assert bits["relu/output"] == 5


def residual_net():
    """A block around which the Add is quantized."""
    layers = keras.layers
    image = keras.Input((6, 6, 1), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="first")(image)
    y = layers.Conv2D(4, 1, name="middle")(x)
    x = layers.ReLU(name="relu")(layers.Add(name="sum")([x, y]))
    x = layers.Flatten()(layers.Conv2D(4, 1, activation="relu", name="late")(x))
    return keras.Model(image, layers.Dense(3, name="head")(x))


@pytest.mark.parametrize(
    ("rule", "logged"),
    [
        (tfl.PrecisionRule(".*", 2, 2), [4, 16, 32, 2]),
        (tfl.PrecisionRule(".*", 2), [32, 32, 32, 32]),
    ],
    ids=["W2A2", "weights alone"],
)
def test_residual_quantizers_keep_8_bits_or_do_not_round(rule, logged):
    model, seen = tfl.quantize(residual_net(), rule, residual_bits=8), Recorder()
    tfl.calibrate(model, [np.ones((2, 6, 6, 1), "f")])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    bits = [(4, 4), (16, 16), (2, 32), (2, 2)]
    history = fit(model, [tfl.Stage(1, *pair) for pair in bits], [seen])
    assert [epoch["middle_residual/output"] for epoch in seen.bits] == [8, 16, 32, 8]
    # Logged are the bits that the stages set.
    assert history.history["activation_bits"] == logged


def test_stages_do_not_retrace():
    traces = []

    def loss(y, p):
        traces.append(1)
        return tf.reduce_mean(tf.square(y - p))

    model = quantized_net(loss=loss)
    fit(model, [tfl.Stage(1, 32, 32)], epochs=1)
    after_first = len(traces)
    fit(model, tfl.two_stage_progressive(2, 1, (8, 4, 2)))
    assert after_first > 0
    assert len(traces) == after_first


def test_latent_weights_carry_over_between_stages():
    model = quantized_net()
    kernel = next(
        t for t in tfl.inspection.quantized_tensors(model) if t.name == "middle/kernel"
    )
    held = []

    class Hold(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            held.append(("begin", kernel.latent.numpy()))

        def on_epoch_end(self, epoch, logs=None):
            held.append(("end", kernel.latent.numpy()))

    fit(model, tfl.progressive(2, 1, (8, 4, 2)), [Hold()])
    for (when, before), (_, after) in zip(held[1:-1:2], held[2::2], strict=True):
        assert when == "end"
        np.testing.assert_array_equal(before, after)
        # The latent weights, not their 2-bit values, are what goes on.
        assert len(np.unique(after)) > 16
    assert len(np.unique(kernel.quantized())) <= 4


@pytest.mark.slow
def test_a_new_stage_resets_momentum_and_step_count():
    seen = Recorder()
    fit(quantized_net(), tfl.two_stage(2, (2, 2)), [seen])
    assert seen.iterations == [STEPS, 2 * STEPS, STEPS, 2 * STEPS]
    seen = Recorder()
    fit(quantized_net(), tfl.two_stage(2, (2, 2)), [seen], reset_optimizer=False)
    assert seen.iterations == [STEPS, 2 * STEPS, 3 * STEPS, 4 * STEPS]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.optimizers.Adagrad(0.1, initial_accumulator_value=0.25),
    ],
    ids=lambda o: o.name,
)
def test_reset_gives_the_state_of_a_fresh_optimizer(optimizer):
    model = quantized_net(optimizer=optimizer)
    model.fit(data(), steps_per_epoch=2, verbose=0)
    assert int(model.optimizer.iterations) == 2
    optimizer.learning_rate = 0.03
    reset_optimizer(model)
    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.build(model.trainable_variables)
    for old, new in zip(optimizer.variables, fresh.variables, strict=True):
        np.testing.assert_array_equal(old.numpy(), new.numpy())
    assert float(optimizer.learning_rate) == pytest.approx(0.03)


def test_steps_fall_on_the_milestones_of_each_stage():
    used = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            used.append(float(self.model.optimizer.learning_rate.numpy()))

    stages = tfl.two_stage(
        2,
        (6, 12),
        learning_rate=(0.5, 0.2),
        decay="step",
        milestones=(3 / 6, 5 / 6),
    )
    fit(quantized_net(), stages, [Rates()])
    epochs = [0.5] * 3 + [0.05] * 2 + [0.005] + [0.2] * 6 + [0.02] * 4 + [0.002] * 2
    np.testing.assert_allclose(used, np.repeat(epochs, STEPS), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"decay": "cosine"}, {"decay": "step", "milestones": (0.5,)}], ids=str
)
def test_a_decay_is_refused_in_an_epoch_of_unknown_steps(options):
    """In a stage of one epoch it would have no effect; in others it falls by epochs."""
    unknown, seen = data().take(STEPS).filter(lambda x, y: True), Recorder()

    def train(epochs):
        stages = [tfl.Stage(epochs, learning_rate=0.1, **options)]
        callbacks = [StagedPrecision(stages), seen]
        quantized_net().fit(unknown, epochs=epochs, callbacks=callbacks, verbose=0)

    with pytest.raises(ValueError, match=r"steps_per_epoch.*Received: .*unknown"):
        train(1)
    assert seen.rates == []
    train(2)
    second = 0.05 if options["decay"] == "cosine" else 0.01
    np.testing.assert_allclose(seen.rates, [0.1, second], rtol=1e-6)


class Lower(keras.callbacks.Callback):
    """Halves the learning rate after each epoch, as `ReduceLROnPlateau` can."""

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        optimizer.learning_rate = optimizer.learning_rate.numpy() / 2


@pytest.mark.slow
def test_a_constant_rate_is_set_once_a_stage_and_may_be_lowered():
    model, seen = quantized_net(), Recorder()
    stages = tfl.two_stage(2, (2, 2), learning_rate=(0.2, 0.1))
    for _ in range(2):  # A second training has the rates of its stages again.
        fit(model, stages, [seen, Lower()])
    np.testing.assert_allclose(seen.rates, [0.2, 0.1, 0.1, 0.05] * 2, rtol=1e-6)


@pytest.mark.slow
def test_no_step_reads_the_bits_back(monkeypatch):
    """Only epochs do: on an accelerator each reading waits for the device."""
    read = tfl.inspection.QuantizedTensor.bits.fget
    within = {"step": False, "seen": 0}

    class Steps(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            within["step"] = True

        def on_train_batch_end(self, batch, logs=None):
            assert logs["activation_bits"] in (32, 2)

        def on_epoch_end(self, epoch, logs=None):
            within["step"] = False

    class Ends(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            within["step"] = False

    def counted(tensor):
        within["seen"] += within["step"]
        return read(tensor)

    monkeypatch.setattr(tfl.inspection.QuantizedTensor, "bits", property(counted))
    staged = StagedPrecision(tfl.two_stage(2, 1))
    model, steps = quantized_net(), Steps()
    steps._supports_tf_logs = True
    model.fit(
        data(),
        steps_per_epoch=STEPS,
        epochs=2,
        callbacks=[staged, steps, Ends()],
        verbose=0,
    )
    assert within["seen"] == 0


LOWERED = tfl.two_stage(2, (2, 2), learning_rate=(0.2, 0.1))


@functools.cache
def lowered():
    model = quantized_net()
    fit(model, LOWERED, [Lower()])
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        1,
        2,
        3,
    ],
    ids="epoch{}".format,
)
def test_a_resumed_run_keeps_a_lowered_rate(tmp_path, stop):
    stages, whole = LOWERED, lowered()
    resumed, seen = quantized_net(), Recorder()

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(quantized_net(), stages, [Lower(), Recovery(tmp_path), Stop()])
    resumed.fit(
        data(stop),
        steps_per_epoch=STEPS,
        epochs=4,
        callbacks=[StagedPrecision(stages), seen, Lower(), Recovery(tmp_path)],
        verbose=0,
    )
    np.testing.assert_allclose(seen.rates, [0.2, 0.1, 0.1, 0.05][stop:], rtol=1e-6)
    assert_same_weights(whole, resumed)
    assert_same_optimizers(whole, resumed)


@pytest.mark.slow
def test_a_fresh_optimizer_in_mid_stage_gets_the_stages_rate():
    model, seen = quantized_net(), Recorder()
    stages = [tfl.Stage(3, learning_rate=0.1)]
    fit(model, stages, [StopEarly()])
    model.compile(keras.optimizers.SGD(0.7), "mse")
    fit(model, stages, [seen], initial_epoch=1)
    np.testing.assert_allclose(seen.rates, [0.1, 0.1], rtol=1e-6)


def rates_of(stages):
    """The learning rate of each step."""
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate.numpy()))

    fit(quantized_net(), stages, [Rates()])
    return rates


def test_a_warmup_rises_step_by_step_in_each_stage():
    stages = [
        tfl.Stage(1, 2, 32, learning_rate=0.3, warmup=0.5),
        tfl.Stage(1, 2, 2, learning_rate=0.2),
    ]
    expected = [0.0, 0.2, 0.3, 0.2, 0.2, 0.2]
    np.testing.assert_allclose(rates_of(stages), expected, rtol=1e-6)


def test_a_warmup_is_refused_where_steps_are_unknown():
    """It would stay at its start for an epoch."""
    endless = tf.data.Dataset.from_generator(
        lambda: iter(data()), output_signature=data().element_spec
    )
    stages = [tfl.Stage(1, learning_rate=0.1, warmup=0.1)]
    with pytest.raises(ValueError, match=r"steps_per_epoch.*Received: .*unknown"):
        quantized_net().fit(
            endless.take(3), callbacks=[StagedPrecision(stages)], verbose=0
        )


@pytest.mark.slow
def test_cosine_decays_within_each_stage_and_starts_anew():
    stages = tfl.two_stage(2, (2, 1), learning_rate=(0.2, 0.1), decay="cosine")
    rates = rates_of(stages)
    first = [0.1 * (1 + np.cos(np.pi * i / 6)) for i in range(6)]
    second = [0.05 * (1 + np.cos(np.pi * i / 3)) for i in range(3)]
    np.testing.assert_allclose(rates, first + second, rtol=1e-6)


@pytest.mark.slow
def test_bits_are_in_the_progress_bar(capsys):
    model = quantized_net()
    staged = StagedPrecision([tfl.Stage(1, 2, 4)], verbose=1)
    model.fit(data(), steps_per_epoch=2, epochs=1, callbacks=[staged], verbose=1)
    printed = capsys.readouterr().out
    assert "weight_bits: 2.0" in printed
    assert "activation_bits: 4.0" in printed
    assert "Stage 1/1: weights at 2 bits, activations at 4 bits, 1 epochs" in printed


RESUMED = tfl.two_stage(2, (2, 3), learning_rate=(0.05, 0.02), decay="cosine")


@functools.cache
def uninterrupted(quantizer):
    model = quantized_net(weight_quantizer=quantizer, activation_quantizer=quantizer)
    tfl.calibrate(model, data())
    fit(model, RESUMED)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 3, 4], ids="epoch{}".format)
@pytest.mark.parametrize("quantizer", ["dorefa", "lsq"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, stop, quantizer):
    """Stops inside stages (1, 3, 4) and on the edge between two (2)."""
    options = {"weight_quantizer": quantizer, "activation_quantizer": quantizer}
    stages, whole = RESUMED, uninterrupted(quantizer)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == stop:
                raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    stopped = quantized_net(**options)
    tfl.calibrate(stopped, data())
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, stages, [backup, Stop()])
    resumed, seen = quantized_net(**options), Recorder()
    staged = StagedPrecision(stages)
    resumed.fit(
        data(stop),
        steps_per_epoch=STEPS,
        epochs=5,
        callbacks=[staged, keras.callbacks.BackupAndRestore(tmp_path), seen],
        verbose=0,
    )
    # Calibration is in the checkpoint: the resumed network was never calibrated.
    assert len(seen.bits) == 5 - stop
    assert_same_weights(whole, resumed)
    assert_same_optimizers(whole, resumed)


@pytest.mark.slow
def test_a_stop_within_a_stages_first_epoch_is_not_reset_again(tmp_path):
    stages = tfl.two_stage(2, (1, 2), learning_rate=0.05)
    whole = quantized_net()
    fit(whole, stages)

    class Stop(keras.callbacks.Callback):
        epoch = 0

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_begin(self, batch, logs=None):
            if (self.epoch, batch) == (1, 2):
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(
            tmp_path, save_freq=1, delete_checkpoint=False
        )

    with pytest.raises(KeyboardInterrupt):
        fit(quantized_net(), stages, [backup(), Stop()])
    resumed = quantized_net()
    # Two steps of epoch 1 are done: the data goes on with the third.
    resumed.fit(
        data(1).skip(2),
        steps_per_epoch=STEPS,
        epochs=3,
        callbacks=[StagedPrecision(stages), backup()],
        verbose=0,
    )
    assert_same_weights(whole, resumed)
    assert_same_optimizers(whole, resumed)


@pytest.mark.slow
def test_a_second_training_starts_over():
    model, seen = quantized_net(), Recorder()
    stages = [tfl.Stage(2, 2, 2)]
    fit(model, stages)
    fit(model, stages, [seen])
    assert seen.iterations == [STEPS, 2 * STEPS]


class Interrupt(keras.callbacks.Callback):
    """Stops a training as a user does, behind a step."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_other_stages_bring_their_bits_and_a_fresh_optimizer():
    model = quantized_net()
    with pytest.raises(KeyboardInterrupt):
        fit(model, [tfl.Stage(2, 8, 8), tfl.Stage(2, 2, 2)], [Interrupt()])
    assert int(model.optimizer.iterations) > 0
    seen = Recorder()
    fit(model, [tfl.Stage(2, 4, 32), tfl.Stage(2, 2, 2)], [seen])
    names = ("middle/kernel", "relu/output")
    bits = [tuple(epoch[name] for name in names) for epoch in seen.bits]
    assert bits == [(4, 32), (4, 32), (2, 2), (2, 2)]
    # Steps since the last reset: one when the interrupted training was given up.
    assert seen.iterations == [STEPS, 2 * STEPS, STEPS, 2 * STEPS]


@pytest.mark.slow
def test_after_a_stop_in_the_first_epoch_other_stages_bring_their_rate():
    model, seen = quantized_net(), Recorder()
    with pytest.raises(KeyboardInterrupt):
        fit(model, [tfl.Stage(1, 2, 2, learning_rate=0.1)], [Interrupt()])
    fit(model, [tfl.Stage(1, 2, 2, learning_rate=0.02)], [seen])
    assert seen.rates == pytest.approx([0.02])


@pytest.mark.slow
def test_a_first_stage_after_a_plain_fit_resets_the_optimizer():
    model, seen = quantized_net(), Recorder()
    model.fit(data(), steps_per_epoch=STEPS, verbose=0)
    fit(model, [tfl.Stage(1, 2, 2)], [seen])
    assert seen.iterations == [STEPS]


@pytest.mark.slow
def test_a_list_in_whose_earlier_stage_it_goes_on_resets_the_optimizer():
    model, seen = quantized_net(), Recorder()
    fit(model, [tfl.Stage(2, 8, 8), tfl.Stage(2, 2, 2)])
    model.staging.epochs_done.assign(3)  # As one killed in the last epoch left it.
    fit(model, [tfl.Stage(4, 4, 4)], [seen], initial_epoch=3)
    assert seen.bits[0]["middle/kernel"] == 4
    assert seen.iterations == [STEPS]


@pytest.mark.slow
def test_a_longer_list_goes_by_its_own_bits():
    model = quantized_net()
    fit(model, [tfl.Stage(2, 8, 8), tfl.Stage(2, 8, 4)])
    seen = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error", tfl.QuantizationWarning)
        fit(model, [tfl.Stage(4, 8, 4), tfl.Stage(4, 2, 2)], [seen], initial_epoch=4)
    assert {epoch["middle/kernel"] for epoch in seen.bits} == {2}


class StopEarly(keras.callbacks.Callback):
    """As early stopping does, after the first epoch."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


@pytest.mark.slow
def test_warns_where_the_training_ends_before_its_last_stage():
    model = quantized_net()
    message = r"reach its last stage.*Received: \S+ at 8 bits, and \d+ other quantizers"
    with pytest.warns(tfl.QuantizationWarning, match=message):
        fit(model, [tfl.Stage(2, 8, 8), tfl.Stage(2, 2, 2)], [StopEarly()])


@pytest.mark.slow
def test_warns_where_the_last_stage_raises_some_of_several_bits():
    rules = [tfl.PrecisionRule("middle", 1, 2), tfl.PrecisionRule("late", 2, 3)]
    model = quantized_net(rules=rules)
    message = r"any weight quantizer.*Received: 2 bits, and quantizers of \[1, 2\] bits"
    with pytest.warns(tfl.QuantizationWarning, match=message):
        fit(model, [tfl.Stage(1, 2, 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", tfl.QuantizationWarning)
        fit(model, [tfl.Stage(1, 1, 2)])
    assert {t.bits for t in tfl.inspection.quantized_tensors(model)} == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([tfl.Stage(2, 2, 2)], "weights at 8 bits and activations at 8 bits"),
        ([tfl.Stage(1, 2, 2), tfl.Stage(1, 8, 8)], "in its stage 1, "),
        ([tfl.Stage(1, 8, 8)], "after 2 epochs, "),
    ],
    ids=["bits", "number", "epochs"],
)
def test_warns_where_nothing_is_left_to_train_by_other_stages(
    tmp_path, others, message
):
    stages = [tfl.Stage(2, 8, 8)]
    fit(quantized_net(), stages, [Recovery(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", tfl.QuantizationWarning)
        assert fit(quantized_net(), stages, [Recovery(tmp_path)]).history == {}
    with pytest.warns(tfl.QuantizationWarning) as reported:
        assert fit(quantized_net(), others, [Recovery(tmp_path)]).history == {}
    (told,) = [str(each.message) for each in reported]
    assert re.search(f"Nothing was trained: .* Received: .*{message}", told)


@pytest.mark.slow
def test_runs_on_two_replicas(mirrored):
    strategy = mirrored(2)
    assert strategy.num_replicas_in_sync == 2
    with strategy.scope():
        model = quantized_net()
    seen = Recorder()
    fit(model, tfl.two_stage(2, (1, 1), learning_rate=0.1), [seen])
    assert seen.iterations == [STEPS, STEPS]
    assert seen.bits[-1]["relu/output"] == 2


@pytest.mark.slow
def test_warns_of_ranges_that_were_never_calibrated():
    model = quantized_net(activation_quantizer="pact")
    with pytest.warns(tfl.QuantizationWarning, match=r"first_relu/output.*relu/output"):
        fit(model, [tfl.Stage(1)])
    tfl.calibrate(model, data())
    with warnings.catch_warnings():
        warnings.simplefilter("error", tfl.QuantizationWarning)
        fit(model, [tfl.Stage(1)])


@pytest.mark.parametrize("stages", [[], [(1, 2, 2)], "abc"])
def test_refuses_what_is_no_list_of_stages(stages):
    with pytest.raises(ValueError, match=r"at least one Stage\. Received"):
        StagedPrecision(stages)


def test_refuses_epochs_that_do_not_sum_up():
    with pytest.raises(ValueError, match=r"\[2, 3\] = 5 epochs, epochs=6"):
        fit(quantized_net(), tfl.two_stage(2, (2, 3)), epochs=6)


def test_refuses_a_float_model():
    model = float_net()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"tf_lowbit.quantize made. Received"):
        fit(model, [tfl.Stage(1)])


@pytest.mark.slow
def test_refuses_bits_that_no_quantizer_was_made_for():
    with pytest.raises(ValueError, match=r"2-bit weights.*Received.*\[4\]"):
        fit(quantized_net((4, 4)), tfl.progressive(2, 1, (4,)))


@pytest.mark.slow
def test_refuses_a_rate_where_the_optimizer_has_a_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model = quantized_net(optimizer=keras.optimizers.SGD(schedule))
    with pytest.raises(ValueError, match="LearningRateSchedule"):
        fit(model, [tfl.Stage(1, learning_rate=0.1)])
    fit(model, [tfl.Stage(1)])


class Special(keras.optimizers.SGD):
    """`from_config` does not make it again: `get_config` lacks an argument."""

    def __init__(self, special, **options):
        super().__init__(**options)


@pytest.mark.slow
def test_refuses_before_training_an_optimizer_that_cannot_be_reset():
    stages, seen = [tfl.Stage(1, 8, 8), tfl.Stage(1, 2, 2)], Recorder()
    model = quantized_net(optimizer=Special(3))
    with pytest.raises(ValueError, match=r"from_config .*Received: Special: .*special"):
        fit(model, stages, [seen])
    assert seen.bits == []
    fit(model, stages, [seen], reset_optimizer=False)
    fit(quantized_net(optimizer=Special(3)), [tfl.Stage(1)], [seen])
    assert len(seen.bits) == 3


def test_refuses_a_legacy_optimizer():
    model = quantized_net(optimizer=keras.optimizers.legacy.SGD(0.1))
    with pytest.raises(ValueError, match="legacy one"):
        fit(model, [tfl.Stage(1)])


class Ranges(keras.callbacks.Callback):
    """The learned steps and clips when each epoch begins, and what would be measured.

    Stands behind `StagedPrecision` in the list, so that a stage is entered before.
    """

    def __init__(self, measured_on=None):
        super().__init__()
        self.measured_on, self.found, self.fresh = measured_on, [], []

    def _values(self):
        return {
            tensor.name: variable.numpy()
            for tensor in tfl.inspection.quantized_tensors(self.model)
            for name, variable in tensor.variables.items()
            if name not in ("bits", "calibrated")
        }

    def on_epoch_begin(self, epoch, logs=None):
        before = [(v, v.numpy()) for v in self.model.variables]
        self.found.append(self._values())
        if self.measured_on is not None:
            tfl.calibrate(self.model, self.measured_on, fit_batch_norm=False)
        tfl.inspection.initialize_weight_ranges(self.model)
        self.fresh.append(self._values())
        for variable, value in before:
            variable.assign(value)


WEIGHT, ACTIVATION = "middle/kernel", "relu/output"
FALLING = [tfl.Stage(1, 8, 8), tfl.Stage(1, 2, 2)]
LADDER = [tfl.Stage(1, 8, 8), tfl.Stage(1, 3, 8), tfl.Stage(1, 3, 2)]


def batches(count=3):
    return [batch for batch in data().take(count)]


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["lsq", "pact", "uniform"])
def test_a_stage_measures_the_ranges_whose_bits_it_changes(activations):
    model = quantized_net(weight_quantizer="lsq", activation_quantizer=activations)
    seen = Ranges(batches())
    fit(model, LADDER, [seen], data=batches())
    for epoch in range(3):
        found, fresh = seen.found[epoch], seen.fresh[epoch]
        is_new_weight, is_new_activation = epoch != 2, epoch != 1
        assert (found[WEIGHT] == fresh[WEIGHT]) == is_new_weight
        if is_new_activation:
            assert found[ACTIVATION] == pytest.approx(fresh[ACTIVATION], rel=1e-5)
    if activations == "lsq":  # It moves in training; what is kept is not measured.
        assert seen.found[1][ACTIVATION] != pytest.approx(
            seen.fresh[1][ACTIVATION], rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_without_data_ranges_of_activations_are_rescaled(keep):
    model = quantized_net(weight_quantizer="lsq", activation_quantizer="lsq")
    tfl.calibrate(model, batches())
    before = Ranges()
    before.set_model(model)
    before.on_epoch_begin(0)
    names = {t.name: t for t in tfl.inspection.quantized_tensors(model)}
    expected = {}
    for name, tensor in names.items():
        step = tensor.variables["step"].numpy()
        tensor.assign_bits(8)
        expected[name] = tensor.variables["step"].numpy()
        tensor.assign_bits(2)
        np.testing.assert_allclose(tensor.variables["step"], step, rtol=1e-6)
        tensor.variables["step"].assign(step)
    seen = Ranges()
    fit(model, FALLING, [seen], keep_ranges=keep)
    kept = list(expected) if keep else [ACTIVATION, "first_relu/output"]
    for name in kept:
        np.testing.assert_allclose(seen.found[0][name], expected[name], rtol=1e-6)
    measured = seen.fresh[0][WEIGHT]
    assert (seen.found[0][WEIGHT] == measured) == (not keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": iter([1])}, "read again from its start"),
        ({"data": (np.ones(3), np.ones(3))}, "iterable of batches"),
        ({"data": [np.ones((2, 6, 6, 1))], "keep_ranges": True}, "must be None"),
    ],
    ids=["iterator", "arrays", "kept"],
)
def test_refuses_data_that_it_cannot_measure_on(options, message):
    with pytest.raises(ValueError, match=message + r"[\s\S]*Received"):
        StagedPrecision([tfl.Stage(1)], **options)


LSQ = {"weight_quantizer": "lsq", "activation_quantizer": "lsq"}


@functools.cache
def measuring():
    model = quantized_net(**LSQ)
    fit(model, LADDER, data=batches())
    return model


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_measures_as_the_uninterrupted_one(tmp_path, stop):
    whole, resumed = measuring(), quantized_net(**LSQ)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            quantized_net(**LSQ),
            LADDER,
            [Recovery(tmp_path), Stop()],
            data=batches(),
        )
    resumed.fit(
        data(stop),
        steps_per_epoch=STEPS,
        epochs=3,
        callbacks=[StagedPrecision(LADDER, data=batches()), Recovery(tmp_path)],
        verbose=0,
    )
    assert_same_weights(whole, resumed)
    assert_same_optimizers(whole, resumed)


@pytest.mark.slow
def test_ranges_are_measured_on_two_replicas(mirrored):
    with mirrored(2).scope():
        model = quantized_net(**LSQ)
    one, two = Ranges(), Ranges()
    fit(quantized_net(**LSQ), FALLING, [one], data=batches())
    fit(model, FALLING, [two], data=batches())
    for name, value in one.found[0].items():
        np.testing.assert_allclose(two.found[0][name], value, rtol=1e-4)
    assert all(t.is_calibrated for t in tfl.inspection.quantized_tensors(model))


def add_ratios(model):
    """Step of each input of an Add / step of its output."""
    found = []
    for add in tfl.inspection.residual_adds(model):
        steps = [float(t.quantizer.step(None, t.variables)) for t in add.inputs if t]
        output = float(add.output.quantizer.step(None, add.output.variables))
        found += [step / output for step in steps]
    return found


def are_tied(ratios):
    found = [fractions.Fraction(ratio).limit_denominator(15) for ratio in ratios]
    return all(
        fraction.denominator % 2 and abs(float(fraction) / ratio - 1) < 2**-20
        for fraction, ratio in zip(found, ratios, strict=True)
    )


def residual_lsq():
    """A sum with a residual input, which the learned step behind it sets."""
    layers = keras.layers
    keras.utils.set_random_seed(3)
    image = keras.Input((6, 6, 1), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="first")(image)
    y = layers.Conv2D(4, 1, name="middle")(x)
    z = layers.Conv2D(4, 1, name="other")(x)
    x = layers.ReLU(name="relu")(layers.Add(name="sum")([y, z]))
    x = layers.Flatten()(layers.Conv2D(4, 1, name="late")(x))
    rule = tfl.PrecisionRule(".*", 4, 4, "lsq", "lsq")
    net = keras.Model(image, layers.Dense(3, name="head")(x))
    model = tfl.quantize(net, rule, residual_bits=8)
    tfl.calibrate(model, batches())
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


@pytest.mark.slow
def test_learned_steps_drift_from_residual_ones_and_are_tied_after_each_epoch():
    model = residual_lsq()
    assert are_tied(add_ratios(model))
    model.fit(data(), steps_per_epoch=STEPS, epochs=1, verbose=0)
    drifted = add_ratios(model)
    assert not are_tied(drifted)
    tfl.tie_residuals(model)
    tied = add_ratios(model)
    assert are_tied(tied)
    np.testing.assert_allclose(tied, drifted, rtol=0.1)
    tfl.tie_residuals(model)
    np.testing.assert_array_equal(add_ratios(model), tied)

    staged, at_ends = residual_lsq(), []

    class Tied(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            at_ends.append(are_tied(add_ratios(self.model)))

    fit(staged, [tfl.Stage(2, 4, 4)], [Tied()])
    assert at_ends == [True, True]
    assert are_tied(add_ratios(staged))


def test_tying_refuses_a_float_model():
    with pytest.raises(ValueError, match=r"tf_lowbit.quantize made. Received"):
        tfl.tie_residuals(float_net())
