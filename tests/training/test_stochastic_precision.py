"""Draws by their statistics, and training by a network written out by hand."""

import dataclasses
import functools
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

import tf_lowbit as tfl
from tests import oracle
from tests.scheme import nets
from tf_lowbit.callbacks import StagedPrecision
from tf_lowbit.compat import keras, tf
from tf_lowbit.training.stochastic_precision import Sampler, StochasticPrecision

layers = keras.layers
CLASSES, BATCH, STEPS = 3, 4, 3
UNITS = ("a", "b", "c")
X = nets.images(BATCH * STEPS, (5,), seed=1)
Y = nets.labels(BATCH * STEPS, CLASSES, seed=2)


# The draws.


def draws(precision, count, probability, steps):
    """Bool array [steps, count]."""

    @tf.function
    def all_draws():
        return tf.map_fn(
            lambda step: precision.draw(step, count, probability),
            tf.range(steps, dtype=tf.int64),
            fn_output_signature=tf.bool,
        )

    return all_draws().numpy()


def independence(one, other):
    """Chi-square of the 2x2 table of two bool arrays; one degree of freedom."""
    table = [[np.sum((one == a) & (other == b)) for b in (0, 1)] for a in (0, 1)]
    return stats.chi2_contingency(table, correction=False).statistic


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_draws_are_independent_and_as_frequent_as_asked_for(probability):
    steps, count = 2000, 10
    drawn = draws(StochasticPrecision(seed=5), count, probability, steps)
    other = draws(StochasticPrecision(seed=6), count, probability, steps)
    # Each unit's count is binomial: the sum of ten squared z-scores.
    variance = steps * probability * (1 - probability)
    of_units = np.sum((drawn.sum(0) - steps * probability) ** 2) / variance
    # And so is each step's, over its units.
    variance = count * probability * (1 - probability)
    of_steps = np.sum((drawn.sum(1) - count * probability) ** 2) / variance
    pairs = [(i, j) for i in range(count) for j in range(i)]
    found = [
        (of_units, count),
        (of_steps, steps),
        (sum(independence(drawn[:, i], drawn[:, j]) for i, j in pairs), len(pairs)),
        # From each step to the next, unit by unit; and from seed to seed.
        (sum(independence(d[1:], d[:-1]) for d in drawn.T), count),
        (sum(map(independence, drawn.T, other.T)), count),
    ]
    for statistic, freedom in found:
        assert 1e-3 < stats.chi2.sf(statistic, freedom) < 1 - 1e-3


def test_the_chi_square_bound_can_tell():
    drawn = draws(StochasticPrecision(), 10, 0.5, 2000)
    shared = np.repeat(drawn[:, :1], 10, axis=1)
    assert stats.chi2.sf(independence(shared[:, 0], shared[:, 1]), 1) < 1e-9
    assert independence(drawn[1:, 0], drawn[1:, 0]) == pytest.approx(1999)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 7, 2**40])
def test_a_draw_is_the_same_in_every_mode_of_execution(seed, step):
    probability = tf.constant(0.5)

    def draw(step):
        return StochasticPrecision(seed=seed).draw(step, 32, probability)

    eager = draw(tf.constant(step, tf.int64))
    np.testing.assert_array_equal(draw(tf.constant(step, tf.int64)), eager)
    for compiled in (False, True):
        function = tf.function(draw, jit_compile=compiled)
        np.testing.assert_array_equal(function(tf.Variable(step, dtype="int64")), eager)
    assert eager.dtype == tf.bool
    assert eager.shape == (32,)


def test_draws_differ_with_step_and_seed():
    drawn = {
        StochasticPrecision(seed=seed).draw(step, 64, 0.5).numpy().tobytes()
        for seed in (0, 1, 2**32, 2**62)
        for step in (0, 1, 2**32, 2**40)
    }
    assert len(drawn) == 16


def test_a_units_draw_does_not_hang_on_how_many_there_are():
    precision = StochasticPrecision(seed=3)
    many = precision.draw(11, 100, 0.5)
    for count in (1, 3, 50):
        few = precision.draw(11, count, 0.5)
        np.testing.assert_array_equal(few, many[:count])


@pytest.mark.parametrize("probability", [0, 1])
def test_certain_draws(probability):
    drawn = draws(StochasticPrecision(), 50, float(probability), 2000)
    assert (drawn == bool(probability)).all()


# The schedule and the other arguments.


def by_hand(steps, total, start=0.5, tail=0.2):
    """p at each of the steps, of a ramp."""
    passed = np.minimum(np.asarray(steps) / total / (1 - tail), 1)
    return start + (1 - start) * passed


@pytest.mark.parametrize("shape", [{}, {"start": 0.0}, {"tail": 0.5}, {"start": 1.0}])
def test_the_probability_at_each_step(shape):
    precision = StochasticPrecision(**shape)
    found = [
        float(precision.probability(tf.constant(step, tf.int64), tf.constant(20)))
        for step in range(25)
    ]
    np.testing.assert_allclose(found, by_hand(range(25), 20, **shape), rtol=3e-7)
    assert found[20:] == [1] * 5


def test_the_share_of_a_long_training_is_rounded_once():
    """Steps above 2^24 are no float32."""
    seen = []
    precision = StochasticPrecision(schedule=lambda t: seen.append(t.numpy()) or t)
    rng = np.random.default_rng(0)
    totals = rng.integers(2**25, 2**40, 50)
    steps = (totals * rng.uniform(size=50)).astype(np.int64)
    for step, total in zip(steps, totals, strict=True):
        precision.probability(tf.constant(step), tf.constant(total))
    np.testing.assert_array_equal(seen, np.float32(steps / totals))


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"start": -0.1}, "start=-0.1"),
        ({"start": 1.5}, "start=1.5"),
        ({"start": True}, "start=True"),
        ({"start": "0.5"}, "start='0.5'"),
        ({"start": float("nan")}, "start=nan"),
        ({"tail": 1.1}, "tail=1.1"),
        ({"tail": -1}, "tail=-1"),
        ({"schedule": 0.5}, "schedule=0.5"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"unit": "channel"}, "unit='channel'"),
        ({"unit": ""}, "unit=''"),
        ({"unit": 3}, "unit=3"),
        ({"unit": [3]}, r"unit=[3]"),
        ({"unit": ["("]}, "unit=['(']"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, f"seed={2**63}"),
        ({"seed": 1.0}, "seed=1.0"),
        ({"seed": True}, "seed=True"),
        ({"seed": None}, "seed=None"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 10.0}, "steps=10.0"),
        ({"steps": True}, "steps=True"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_by_name(arguments, received):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be") as error:
        StochasticPrecision(**arguments)
    assert str(error.value).endswith(f"Received: {received}")


@pytest.mark.parametrize("shape", [{"start": 0.5}, {"tail": 0.2}])
def test_a_schedule_is_in_place_of_start_and_tail(shape):
    with pytest.raises(ValueError, match=r"in place of start and tail") as error:
        StochasticPrecision(schedule=lambda t: t, **shape)
    assert str(error.value).endswith(str(shape))


def test_settings_can_be_replaced_one_by_one():
    precision = StochasticPrecision(start=0.3, tail=0.1)
    assert dataclasses.replace(precision, seed=7) == StochasticPrecision(
        start=0.3, tail=0.1, seed=7
    )


@pytest.mark.slow
def test_making_the_settings_does_not_start_tensorflow():
    """A user makes them before the strategy, or before the devices are set."""
    script = (
        "import tf_lowbit as tfl, tensorflow as tf;"
        "tfl.StochasticPrecision();"
        "tfl.StochasticPrecision(start=0.1, tail=1.0, seed=3, steps=9, unit=['a']);"
        "tfl.StochasticPrecision(schedule=lambda t: tf.square(t), unit='block');"
        "cpu = tf.config.list_physical_devices('CPU')[0];"
        "tf.config.set_logical_device_configuration("
        "cpu, [tf.config.LogicalDeviceConfiguration()] * 2);"
        "assert len(tf.config.list_logical_devices('CPU')) == 2"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# In training: stem - relu - a - relu - b - relu - c - relu - head.


def float_net(batch_norm=False):
    x = inputs = keras.Input((5,), name="x")
    for name in ("stem", *UNITS):
        x = layers.Dense(8, name=name)(x)
        x = layers.BatchNormalization(name=f"bn_{name}")(x) if batch_norm else x
        x = layers.ReLU(name=f"relu_{name}")(x)
    # With biases of zero, sums of levels lie on the ends of the clip.
    return nets.randomize(
        keras.Model(inputs, layers.Dense(CLASSES, name="head")(x)), seed=9
    )


@functools.cache
def cached_student(index):
    model = tfl.quantize(float_net(), tfl.PrecisionRule(".*", 2, 2))
    return model, model.get_weights()


def student(index=0):
    """The network at its first weights; each index is another model."""
    model, weights = cached_student(index)
    model.set_weights(weights)
    return model


def trainer(precision, optimizer=None, loss=None, **options):
    model = tfl.LowBitTrainer(student(), stochastic_precision=precision)
    model.compile(
        optimizer or keras.optimizers.SGD(0.1),
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **options,
    )
    return model


def fit(model, epochs, x=X, y=Y, **options):
    """The history, of batches in order."""
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    return model.fit(x, y, epochs=epochs, **options).history


def forward(weights, x, drawn, raw_weights=False):
    """The network by hand, in TensorFlow ops that differentiate themselves.

    Args:
        weights: name -> (kernel, bias).
        x: inputs.
        drawn: name of each unit -> whether it rounds, to two bits.
        raw_weights: as in `StochasticPrecision`.
    """

    def rounded(values, levels):
        steps = tf.round(values * levels) / levels
        return values + tf.stop_gradient(steps - values)

    for name in ("stem", *UNITS):
        kernel, bias = weights[name]
        if name in UNITS:
            x = tf.clip_by_value(x, 0.0, 1.0)
            tangent = tf.tanh(kernel)
            scaled = tangent / tf.reduce_max(tf.abs(tangent))
            if drawn[name]:
                x = rounded(x, 3)
                kernel = 2 * rounded((scaled + 1) / 2, 3) - 1
            elif not raw_weights:
                kernel = scaled
        x = x @ kernel + bias
    kernel, bias = weights["head"]
    return tf.nn.relu(x) @ kernel + bias


def weights_of(model):
    """Name -> (kernel, bias), of the student of a trainer, or of a network."""
    model = getattr(model, "student", model)
    found = {layer.name: layer for layer in model.layers}
    by_name = {name: {} for name in ("stem", *UNITS, "head")}
    for name, of_layer in by_name.items():
        for variable in found[name].trainable_weights:
            of_layer[variable.name.split("/")[-1].split(":")[0]] = variable.numpy()
    return {n: (each["kernel"], each["bias"]) for n, each in by_name.items()}


def trained_by_hand(weights, drawn_at, rate, momentum, raw_weights=False):
    """The weights after one step for each of the draws, batch after batch."""
    variables = {n: [tf.Variable(v) for v in pair] for n, pair in weights.items()}
    flat = [v for pair in variables.values() for v in pair]
    velocities = [np.zeros(v.shape, np.float32) for v in flat]
    for step, drawn in enumerate(drawn_at):
        begin = step % STEPS * BATCH
        x, y = X[begin : begin + BATCH], Y[begin : begin + BATCH]
        with tf.GradientTape() as tape:
            named = dict(zip(UNITS, drawn, strict=True))
            logits = forward(variables, x, named, raw_weights)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            loss = tf.reduce_mean(loss)
        for i, gradient in enumerate(tape.gradient(loss, flat)):
            velocities[i] = momentum * velocities[i] - rate * gradient.numpy()
            flat[i].assign_add(velocities[i])
    return {n: [v.numpy() for v in pair] for n, pair in variables.items()}


def drawn_by(precision, steps, probabilities):
    """What was drawn at those steps: bool array [steps, units]."""
    pairs = zip(steps, np.float32(probabilities), strict=True)
    return np.array([precision.draw(s, len(UNITS), p).numpy() for s, p in pairs])


def assert_logs(history, precision, steps, probabilities):
    """The logs are the means over each epoch of what was drawn."""
    drawn = drawn_by(precision, steps, probabilities)
    share = drawn.mean(1).reshape(-1, STEPS).mean(1)
    np.testing.assert_allclose(history["quantized_share"], share, rtol=1e-6)
    probability = np.reshape(probabilities, (-1, STEPS)).mean(1)
    found = history["quantization_probability"]
    np.testing.assert_allclose(found, probability, rtol=1e-6)


@pytest.mark.slow
def test_a_certain_draw_trains_as_keras_does_without_a_trainer():
    """Bit for bit: weights, batch statistics and momenta."""
    rule = tfl.PrecisionRule(".*", 2, 2)
    network = tfl.quantize(float_net(batch_norm=True), rule)
    precision = StochasticPrecision(start=1.0)
    start, results = network.get_weights(), []
    for model in (
        network,
        tfl.LowBitTrainer(network, stochastic_precision=precision),
    ):
        network.set_weights(start)
        model.compile(
            keras.optimizers.SGD(0.05, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        loss = fit(model, 4)["loss"]
        results.append([loss, *network.get_weights(), *model.optimizer.variables])
    nets.assert_all_equal(*map(nets.snapshot, results))
    for variable in network.trainable_variables:
        assert not any(np.array_equal(variable, value) for value in start)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("probability", "raw_weights"), [(0.0, False), (0.0, True), (0.5, False)]
)
def test_training_equals_a_network_by_hand(probability, raw_weights):
    precision = StochasticPrecision(
        schedule=lambda t: probability + 0.0 * t, raw_weights=raw_weights, seed=4
    )
    model = trainer(precision, keras.optimizers.SGD(0.1, momentum=0.9))
    start = weights_of(model)
    history = fit(model, 3)
    steps = range(3 * STEPS)
    assert_logs(history, precision, steps, [probability] * len(steps))
    drawn = drawn_by(precision, steps, [probability] * len(steps))
    expected = trained_by_hand(start, drawn, 0.1, 0.9, raw_weights)
    found = weights_of(model)
    for name, pair in expected.items():
        for index in (0, 1):
            np.testing.assert_allclose(
                found[name][index], pair[index], rtol=1e-4, atol=1e-5, err_msg=name
            )
            assert np.abs(found[name][index] - start[name][index]).max() > 1e-3
    # The test can tell: trained in full precision, or rounded, it is another one.
    other = trained_by_hand(start, drawn ^ True, 0.1, 0.9, raw_weights)
    assert np.abs(other["a"][0] - found["a"][0]).max() > 1e-3


@pytest.mark.quick(1)
@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_logs_and_draws_follow_the_ramp(eager):
    precision = StochasticPrecision(start=0.2, tail=0.5, seed=8)
    history = fit(trainer(precision, run_eagerly=eager), 4)
    steps = range(4 * STEPS)
    assert_logs(history, precision, steps, by_hand(steps, 12, 0.2, 0.5))
    assert history["quantized_share"][2:] == [1, 1]
    assert 0 < history["quantized_share"][0] < 1


def test_a_fit_that_goes_on_has_the_ramp_of_its_own_length_and_a_second_starts_over():
    precision = StochasticPrecision(start=0.0, tail=0.0, seed=1)
    model = trainer(precision)
    first = fit(model, 2)
    assert_logs(first, precision, range(6), np.arange(6) / 6)
    goes_on = fit(model, 4, initial_epoch=2)
    assert_logs(goes_on, precision, range(6, 12), np.arange(6, 12) / 12)
    again = fit(model, 2)
    assert again["quantized_share"] == first["quantized_share"]
    assert_logs(again, precision, range(6), np.arange(6) / 6)
    assert int(model.progress.step) == int(model.progress.total_steps) == 6


@pytest.mark.slow
def test_steps_set_the_length_of_the_ramp():
    precision = StochasticPrecision(start=0.0, tail=0.0, steps=12, seed=1)
    model = trainer(precision)
    parts = [fit(model, 2), fit(model, 4, initial_epoch=2)]
    history = {
        name: parts[0][name] + parts[1][name]
        for name in ("quantized_share", "quantization_probability")
    }
    assert_logs(history, precision, range(12), np.arange(12) / 12)


@pytest.mark.slow
def test_a_custom_schedule_sees_the_share_of_the_training():
    precision = StochasticPrecision(schedule=lambda t: tf.where(t < 0.5, t * t, 0.75))
    history = fit(trainer(precision), 4)
    shares = np.arange(12) / 12
    expected = np.where(shares < 0.5, shares**2, 0.75)
    assert_logs(history, precision, range(12), expected)


@pytest.mark.slow
def test_a_batch_out_of_fit_needs_steps():
    with pytest.raises(ValueError, match=r"give it steps=\. Received: steps=None"):
        trainer(StochasticPrecision()).train_on_batch(X, Y)
    precision = StochasticPrecision(start=0.0, tail=0.0, steps=4, seed=2)
    model = trainer(precision)
    logs = [model.train_on_batch(X, Y, return_dict=True) for _ in range(6)]
    found = [log["quantization_probability"] for log in logs]
    # After the last of the steps the training is over: all is quantized.
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.75, 1, 1])
    drawn = drawn_by(precision, range(6), found)
    shares = [log["quantized_share"] for log in logs]
    np.testing.assert_allclose(shares, drawn.mean(1), rtol=1e-6)


def of_unknown_length():
    def batches():
        for begin in range(0, len(X), BATCH):
            yield X[begin : begin + BATCH], Y[begin : begin + BATCH]

    signature = (tf.TensorSpec((None, 5)), tf.TensorSpec((None,), tf.int64))
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


@pytest.mark.slow
def test_data_of_unknown_length_need_steps():
    model = trainer(StochasticPrecision())
    with pytest.raises(ValueError, match=r"steps_per_epoch, or .* steps\. Received"):
        model.fit(of_unknown_length(), verbose=0)
    precision = StochasticPrecision(start=0.0, tail=0.0)
    model = trainer(precision)
    history = model.fit(
        of_unknown_length().repeat(), steps_per_epoch=STEPS, epochs=2, verbose=0
    ).history
    assert_logs(history, precision, range(6), np.arange(6) / 6)


@pytest.mark.slow
def test_data_of_unknown_length_need_steps_after_another_fit_as_well():
    """The length of the fit before says nothing."""
    model = trainer(StochasticPrecision())
    fit(model, 2)
    with pytest.raises(ValueError, match=r"steps_per_epoch, or .* steps\. Received"):
        model.fit(of_unknown_length(), verbose=0)


@pytest.mark.slow
def test_the_end_of_data_of_unknown_length_is_no_step():
    """Keras finds it by asking for one batch more."""
    precision = StochasticPrecision(start=0.0, tail=0.0, steps=6)
    model = trainer(precision)
    history = model.fit(of_unknown_length(), epochs=2, verbose=0).history
    assert int(model.progress.step) == 6
    assert_logs(history, precision, range(6), np.arange(6) / 6)


@pytest.mark.slow
def test_a_callback_list_of_the_users_own_is_taken():
    model = trainer(StochasticPrecision(start=0.0, tail=0.0))
    own = keras.callbacks.CallbackList(
        [], add_history=True, model=model, epochs=2, steps=STEPS
    )
    history = fit(model, 2, callbacks=own)
    np.testing.assert_allclose(history["quantization_probability"], [1 / 6, 4 / 6])


class Inspected(keras.callbacks.Callback):
    """What evaluation and prediction see in the middle of the training."""

    def __init__(self):
        super().__init__()
        self.epochs = 0

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1
        quantized = dict.fromkeys(UNITS, True)
        expected = forward(weights_of(self.model), X, quantized).numpy()
        full = forward(weights_of(self.model), X, dict.fromkeys(UNITS, False)).numpy()
        for predicted in (
            self.model.predict(X, verbose=0),
            self.model(X).numpy(),
            self.model.student(X).numpy(),
        ):
            np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-5)
            assert np.abs(predicted - full).max() > 1e-2
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(Y, expected)
        loss = pytest.approx(np.mean(losses), rel=1e-5)
        assert self.model.evaluate(X, Y, batch_size=BATCH, verbose=0) == loss
        assert logs["val_loss"] == loss
        assert "val_quantized_share" not in logs
        for tensor in nets.by_name(self.model.student).values():
            assert tensor.bits == 2
        for name, weight in nets.used_weights(self.model.student, X).items():
            codes = oracle.dorefa_codes(
                weights_of(self.model)[name.split("/")[0]][0], 2
            )
            np.testing.assert_allclose(weight, codes / 3, rtol=1e-6)


@pytest.mark.slow
def test_evaluation_in_the_middle_of_the_training_is_fully_quantized():
    seen = Inspected()
    model = trainer(StochasticPrecision(schedule=lambda t: 0.0 * t))
    fit(model, 2, callbacks=[seen], validation_data=(X, Y), validation_batch_size=BATCH)
    assert seen.epochs == 2


class Sampled(keras.callbacks.Callback):
    """The activations under either draw, at each epoch's end."""

    def __init__(self, sampler):
        super().__init__()
        self.sampler, self.levels = sampler, []

    def on_epoch_end(self, epoch, logs=None):
        counts = []
        for quantized in (False, True):
            with self.sampler.applied(tf.fill([len(UNITS)], quantized)):
                seen = nets.outputs_of(self.model.student, ["relu_a", "relu_b"], X)
            counts.append([len(np.unique(values)) for values in seen.values()])
        self.levels.append(counts)


@pytest.mark.slow
def test_stages_and_draws_go_together_and_nothing_is_traced_anew():
    """In the first stage activations are not rounded whatever is drawn."""
    traces = []

    def loss(y, logits):
        traces.append(None)
        return keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)

    precision = StochasticPrecision(start=0.3, tail=0.0)
    model = trainer(precision, loss=loss)
    seen = Sampled(Sampler(precision, [model.student]))

    class Traces(keras.callbacks.Callback):
        counts = ()

        def on_train_batch_end(self, batch, logs=None):
            self.counts = (*self.counts, len(traces))

    counted = Traces()
    stages = StagedPrecision(tfl.two_stage(2, (2, 2)))
    history = fit(model, 4, callbacks=[stages, seen, counted])
    assert counted.counts == (counted.counts[0],) * 4 * STEPS
    assert counted.counts[0] > 0
    assert history["weight_bits"] == [2] * 4
    assert history["activation_bits"] == [32, 32, 2, 2]
    assert_logs(history, precision, range(12), by_hand(range(12), 12, 0.3, 0.0))
    for epoch, counts in enumerate(seen.levels):
        for quantized in (False, True):
            for count in counts[quantized]:
                assert (count <= 4) == (epoch >= 2 and quantized)


def residual_net():
    """stem - [a - b] + identity - [c - d] + identity - head."""
    x = inputs = keras.Input((5,), name="x")
    x = layers.Dense(6, name="stem")(x)
    for block, names in (("one", "ab"), ("two", "cd")):
        y = x
        for name in names:
            y = layers.ReLU(name=f"relu_{name}")(y)
            y = layers.Dense(6, name=name)(y)
        x = layers.Add(name=block)([x, y])
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


def is_on_grid(values, levels):
    return np.allclose(values * levels, np.round(values * levels), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_weights_and_activations_of_a_block_share_its_draw():
    model = tfl.quantize(residual_net(), tfl.PrecisionRule(".*", 2, 2))
    sampler = Sampler(StochasticPrecision(unit="block"), [model])
    assert [unit.name for unit in sampler.units] == ["one", "two"]
    for drawn in ([False, False], [True, False], [False, True], [True, True]):
        with sampler.applied(tf.constant(drawn)):
            seen = nets.outputs_of(model, [f"relu_{name}" for name in "abcd"], X)
            used = nets.used_weights(model, X)
        for block, names in zip(drawn, ("ab", "cd"), strict=True):
            for name in names:
                assert is_on_grid(seen[f"relu_{name}"], 3) == block
                # Odd codes: a third apart from one another's double.
                assert is_on_grid(used[f"{name}/kernel"], 3) == block


@pytest.mark.slow
def test_patterns_make_units_of_the_training():
    with pytest.raises(ValueError, match=r"pattern of unit must match"):
        trainer(StochasticPrecision(unit=["nothing"]))
    precision = StochasticPrecision(
        unit=["a|c"], schedule=lambda t: 0.5 + 0.0 * t, seed=11
    )
    model = trainer(precision, keras.optimizers.SGD(0.1))
    start = weights_of(model)
    fit(model, 2)
    pairs = [precision.draw(step, 2, 0.5).numpy() for step in range(6)]
    assert len({tuple(pair) for pair in pairs}) == 4
    # In the graph's order the pattern's unit comes first: a, c, and then b.
    drawn = [(both, alone, both) for both, alone in pairs]
    expected = trained_by_hand(start, drawn, 0.1, 0.0)
    for name, pair in expected.items():
        np.testing.assert_allclose(
            weights_of(model)[name][0], pair[0], rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_each_of_several_students_has_units_of_its_own():
    networks = [student(0), student(1)]
    sampler = Sampler(StochasticPrecision(), networks)
    assert [unit.name for unit in sampler.units] == [*UNITS, *UNITS]
    full, quantized = (
        forward(weights_of(networks[0]), X, dict.fromkeys(UNITS, drawn))
        for drawn in (False, True)
    )
    with sampler.applied(tf.constant([False] * 3 + [True] * 3)):
        found = [network(X).numpy() for network in networks]
    np.testing.assert_allclose(found[0], full, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], quantized, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda t: 1.5 * t, r"p=1\.00\d* after 67% of the training"),
        (lambda t: t - 0.1, r"p=-0\.10\d* after 0% of the training"),
        (lambda t: tf.where(t < 0.3, t, float("nan")), r"p=nan after 30% of"),
        (lambda t: 2.0, r"p=2\.0 after 0% of the training"),
    ],
)
def test_a_schedule_that_leaves_its_range_is_refused_with_the_progress(
    schedule, message
):
    precision = StochasticPrecision(schedule=schedule)
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\]\. Received: {message}"):
        tfl.LowBitTrainer(student(), stochastic_precision=precision)


def test_the_loss_falls():
    """Three classes in three corners, which two bits can tell apart."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, 60)
    x = (3 * np.eye(5)[y] + rng.normal(0, 0.3, (60, 5))).astype(np.float32)
    model = trainer(StochasticPrecision(), keras.optimizers.SGD(0.05, momentum=0.9))
    before = model.evaluate(x, y, verbose=0)
    history = fit(model, 10, x, y, batch_size=10)
    assert model.evaluate(x, y, verbose=0) < 0.3 * before
    assert history["loss"][-1] < 0.3 * history["loss"][0]


@pytest.mark.slow
def test_a_second_training_of_unknown_length_starts_over():
    def batches():
        yield from ((nets.images(4), nets.labels(4)) for _ in range(4))

    shapes = [tf.TensorSpec(x.shape, x.dtype) for x in (nets.images(4), nets.labels(4))]
    data = tf.data.Dataset.from_generator(batches, output_signature=tuple(shapes))
    student = tfl.quantize(nets.randomize(nets.chain()))
    model = tfl.LowBitTrainer(
        student, stochastic_precision=StochasticPrecision(steps=8, start=0.2)
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logs = [
        model.fit(data, epochs=2, verbose=0).history["quantization_probability"]
        for _ in range(2)
    ]
    assert int(model.progress.step) == 8
    assert logs[0] == logs[1]
    assert logs[0][0] < 0.9
