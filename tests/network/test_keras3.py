"""Keras 3 models come over whole, or are refused with a reason."""

import os
import subprocess
import sys

import keras as keras3
import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras
from tf_lowbit.network import keras3 as keras3_code

layers = keras3.layers
IMAGE = (16, 16, 3)


def randomize(model, seed=0):
    """Weights that are far from what a new layer has."""
    random = np.random.default_rng(seed)
    model.set_weights(
        [random.uniform(0.2, 1.2, size=w.shape) * _sign(w) for w in model.weights]
    )
    return model


def _sign(weight):
    if len(weight.shape) < 2:
        return 1.0
    random = np.random.default_rng(len(weight.path))
    return random.choice([-1.0, 1.0], size=weight.shape) / np.sqrt(weight.shape[0])


def classifier():
    """Squeeze and excite, residual sums, and activations of many kinds."""
    x = image = keras3.Input(IMAGE, name="image")
    x = layers.Conv2D(
        8,
        3,
        padding="same",
        name="stem",
        kernel_regularizer=keras3.regularizers.L2(1e-3),
    )(x)
    x = layers.BatchNormalization(name="stem_bn", momentum=0.9, epsilon=1e-5)(x)
    x = layers.ReLU(6.0, name="stem_relu")(x)
    x = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    x = layers.LeakyReLU(negative_slope=0.2, name="leaky")(x)
    x = layers.PReLU(shared_axes=[1, 2], name="prelu")(x)
    x = layers.Activation("hard_silu", name="silu")(x)
    x = layers.Dropout(0.1, name="dropout")(x)
    y = layers.Conv2D(8, 1, name="side", trainable=False)(x)
    x = layers.Add(name="sum")([x, y])
    x = (x * 2.0 - y) / 3.0 + x
    gate = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    gate = layers.Dense(8, activation="hard_sigmoid", name="excite")(gate)
    x = layers.Multiply(name="gated")([x, -gate])
    x = keras3.ops.relu(x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.SeparableConv2D(6, 3, name="separable")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(nets.CLASSES, name="head")(x)
    return randomize(keras3.Model(image, x, name="net"))


def assert_same(first, second, inputs):
    found, expected = np.asarray(first(inputs)), np.asarray(second(inputs))
    scale = np.abs(expected).max()
    assert scale > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * scale)


def test_a_network_comes_over_whole():
    model = classifier()
    before = [weight.copy() for weight in model.get_weights()]
    converted = tfl.from_keras3(model)
    assert isinstance(converted, keras.Model)
    assert converted.name == "net"
    names = {layer.name for layer in converted.layers}
    assert {layer.name for layer in model.layers if layer.weights} <= names
    for images in (nets.images(shape=IMAGE), 3 * nets.images(shape=IMAGE, seed=1)):
        assert_same(converted, model, images)
    nets.assert_all_equal(model.get_weights(), before)
    assert len(converted.losses) == len(model.losses) == 1
    np.testing.assert_allclose(converted.losses[0], float(model.losses[0]), rtol=1e-5)
    assert converted.get_layer("stem_bn").momentum == 0.9
    frozen = [layer.name for layer in converted.layers if not layer.trainable]
    assert frozen == ["side"]


def test_what_comes_over_is_saved_and_read(tmp_path):
    converted = tfl.from_keras3(classifier())
    converted.save(tmp_path / "net.keras")
    again = tfl.load_model(tmp_path / "net.keras")
    images = nets.images(shape=IMAGE)
    np.testing.assert_array_equal(again(images), converted(images))


def test_quantize_takes_it():
    x = image = keras3.Input(nets.IMAGE, name="image")
    for name in ("stem", "mid", "last"):
        x = layers.Conv2D(4, 3, padding="same", name=name)(x)
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        x = layers.ReLU(name=f"{name}_relu")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras3.Model(image, layers.Dense(nets.CLASSES, name="head")(x))
    rule = tfl.PrecisionRule(".*", 2, 2)
    quantized = tfl.quantize(model, rule)
    assert {"mid/kernel", "last/kernel", "stem_relu/output", "mid_relu/output"} == set(
        nets.by_name(quantized)
    )
    latent = nets.by_name(quantized)["mid/kernel"].latent
    np.testing.assert_array_equal(latent, np.asarray(model.get_layer("mid").kernel))
    before = latent.numpy()
    nets.train_step(quantized, nets.images(), nets.labels(), eager=True)
    assert (latent.numpy() != before).any()
    # A teacher is converted likewise.
    trainer = tfl.LowBitTrainer(quantized, tfl.from_keras3(model))
    assert trainer.predict(nets.images(), verbose=0).shape == (4, nets.CLASSES)


def test_models_within_and_shared_layers():
    shared = layers.Dense(4, activation="tanh", name="shared")
    inner = keras3.Sequential([layers.Input((4,)), shared, layers.ReLU()], name="inner")
    inner.trainable = False
    a, b = keras3.Input((4,), name="a"), keras3.Input((4,), name="b")
    x = layers.Concatenate(name="both")([inner(a, training=False), inner(b)])
    model = keras3.Model([a, b], {"logits": layers.Dense(2, name="head")(x), "x": x})
    randomize(model)
    converted = tfl.from_keras3(model)
    data = [nets.images(shape=(4,), seed=seed) for seed in (1, 2)]
    found, expected = converted(data), model(data)
    assert found.keys() == expected.keys() == {"logits", "x"}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], np.asarray(value), rtol=1e-5, atol=1e-5)
    assert len(converted.weights) == 4
    assert not converted.get_layer("inner").trainable
    flat = tfl.quantize(model, tfl.PrecisionRule(".*", 4, 4, edges=True))
    assert "shared/kernel" in nets.by_name(flat)


def test_a_sequential_model():
    model = keras3.Sequential(
        [layers.Input((5,)), layers.Dense(4, activation="relu"), layers.Dense(2)]
    )
    assert_same(tfl.from_keras3(randomize(model)), model, nets.images(shape=(5,)))


class Own(keras3.layers.Layer):
    def call(self, inputs):
        return inputs


class Dense(keras3.layers.Dense):
    """Of the name of Keras's own."""


class OwnModel(keras3.Model):
    def call(self, inputs):
        return inputs


def on_an_input(function):
    image = keras3.Input((4,), name="in")
    return keras3.Model(image, function(image), name="refused")


REFUSED = {
    "own layer": (
        lambda: on_an_input(Own(name="mine")),
        "layer 'mine', Own: tf_keras has no such layer",
    ),
    "own class of a known name": (
        lambda: on_an_input(Dense(2, name="mine")),
        "layer 'mine', Dense: tf_keras has no such",
    ),
    "new layer": (
        lambda: on_an_input(layers.Solarization(name="sun")),
        "layer 'sun', Solarization: tf_keras has no",
    ),
    "new option": (
        lambda: on_an_input(layers.Dense(8, name="low", lora_rank=2)),
        "layer 'low', Dense: tf_keras has no lora_rank=2",
    ),
    "new activation": (
        lambda: on_an_input(layers.Dense(2, "sparsemax", name="sparse")),
        "layer 'sparse', Dense: .*sparsemax",
    ),
    "operation": (
        lambda: on_an_input(keras3.ops.sin),
        "use a layer, or .*operation 'sin.*', Sin, which reads the output of 'in': ",
    ),
    "subclass": (OwnModel, "unbuilt or subclassed Keras 3 OwnModel"),
    "unbuilt": (
        lambda: keras3.Sequential([layers.Dense(2)], name="later"),
        "unbuilt Keras 3 Sequential 'later'",
    ),
    "no model": (
        lambda: "net",
        r"must be a model of Keras 3, or a .*\. Received: builtins\.str",
    ),
    "tf_keras": (
        nets.chain,
        r"must be a model of Keras 3, or a .*\. Received: tf_keras\.",
    ),
}


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_named(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        tfl.from_keras3(make())


def test_a_difference_would_be_seen(monkeypatch):
    """The check of the outputs, with an activation whose two versions differ."""
    from tf_lowbit.network import keras3_counterparts as own

    monkeypatch.delitem(own._ACTIVATIONS, "hard_sigmoid")
    model = on_an_input(layers.Dense(3, activation="hard_sigmoid"))
    with pytest.raises(ValueError, match=r"differ by 0\.0"):
        tfl.from_keras3(randomize(model))


@pytest.mark.parametrize(
    "model_layers",
    [
        [keras3.Input((5,), dtype="int32"), layers.Embedding(9, 4), layers.Flatten()],
        [keras3.Input((8, 8, 3)), layers.Resizing(6, 6), layers.Flatten()],
        [keras3.Input((8, 8, 3)), layers.RandomFlip(), layers.Flatten()],
        [keras3.Input((None, 2)), layers.Conv1D(4, 64), layers.GlobalMaxPooling1D()],
    ],
    ids=["integers", "resizing", "augmentation", "large kernel"],
)
def test_inputs_and_options_that_are_no_obstacle(model_layers):
    theirs = keras3.Sequential([*model_layers, layers.Dense(2)])
    assert tfl.from_keras3(theirs).output_shape == theirs.output_shape


WITHIN = {
    "TimeDistributed": lambda: layers.TimeDistributed(
        layers.Dense(4, activation="hard_sigmoid")
    ),
    "TimeDistributed, of a model": lambda: layers.TimeDistributed(
        keras3.Sequential([layers.Input((4,)), layers.Dense(3), layers.LeakyReLU(0.1)])
    ),
    "TimeDistributed, of a CNN": lambda: layers.TimeDistributed(
        keras3.Sequential(
            [
                layers.Input((4,)),
                layers.Reshape((4, 1)),
                layers.Conv1D(2, 2),
                layers.BatchNormalization(),
                layers.Conv1D(3, 2),
            ]
        )
    ),
    "Bidirectional": lambda: layers.Bidirectional(
        layers.LSTM(4, return_sequences=True)
    ),
    "Bidirectional, two layers": lambda: layers.Bidirectional(
        layers.LSTM(4),
        backward_layer=layers.GRU(4, go_backwards=True),
        merge_mode="sum",
    ),
    "RNN": lambda: layers.RNN(layers.GRUCell(4)),
    "RNN, stacked": lambda: layers.RNN([layers.LSTMCell(4), layers.SimpleRNNCell(3)]),
    "Dense": lambda: layers.Dense(4, activation=layers.LeakyReLU(0.1)),
    "SpectralNormalization": lambda: layers.SpectralNormalization(layers.Dense(4)),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", WITHIN)
def test_layers_within_a_layer_come_over(name):
    model = keras3.Sequential([layers.Input((5, 4)), WITHIN[name](), layers.Flatten()])
    converted = tfl.from_keras3(randomize(model))
    assert_same(converted, model, nets.images(shape=(5, 4)))


def test_a_layer_within_a_layer_and_beside_it_is_one():
    image, shared = keras3.Input((5, 4)), layers.Dense(4)
    each = layers.TimeDistributed(shared)(image)
    model = keras3.Model(image, layers.Add()([each, shared(each)]))
    converted = tfl.from_keras3(randomize(model))
    assert_same(converted, model, nets.images(shape=(5, 4)))
    assert len(converted.trainable_weights) == len(model.trainable_weights) == 2


@pytest.mark.parametrize("name", ["my layer", "größe", "_first", "a:b"])
@pytest.mark.parametrize(
    "make",
    [
        lambda name: layers.Dense(2, name=name),
        lambda name: layers.TimeDistributed(layers.Dense(2, name=name)),
        lambda name: keras3.Sequential([layers.Dense(2)], name=name),
    ],
)
def test_names_must_be_names_of_scopes(make, name):
    model = keras3.Sequential([layers.Input((5, 4)), make(name)])
    with pytest.raises(ValueError, match=rf"set `layer.name`.*Received: '{name}'$"):
        tfl.from_keras3(model)


@pytest.mark.parametrize("which", ["input", "model"])
def test_names_of_inputs_and_models_are_checked_too(which):
    image = keras3.Input((4,), name="my x" if which == "input" else None)
    model = keras3.Model(image, layers.Dense(2)(image))
    if which == "model":
        model.name = "my x"
    with pytest.raises(ValueError, match=r"set `layer.name`.*Received: 'my x'$"):
        tfl.from_keras3(model)


def test_a_name_can_be_mended():
    model = keras3.Sequential([layers.Input((4,)), layers.Dense(2, name="my layer")])
    model.layers[0].name = "my_layer"
    assert tfl.from_keras3(model).get_layer("my_layer").units == 2


def test_layers_without_a_counterpart_are_refused_by_name():
    inputs = keras3.Input((5, 4))
    gated = layers.MultiHeadAttention(2, 4, use_gate=True, name="a")(inputs, inputs)
    for model, name in (
        (keras3.Model(inputs, gated), "a"),
        (keras3.Sequential([inputs, layers.Lambda(lambda x: 2 * x, name="b")]), "b"),
    ):
        with pytest.raises(ValueError, match=f"must have a counterpart.*'{name}'"):
            tfl.from_keras3(model)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["net.keras", "net.h5"])
def test_files_of_keras3_are_loaded(name, tmp_path):
    model = on_an_input(layers.Dense(3, "relu", name="dense"))
    randomize(model).save(tmp_path / name)
    images = nets.images(shape=(4,))
    for loaded in (
        tfl.load_model(tmp_path / name),
        tfl.from_keras3(tmp_path / name),
        tfl.from_keras3(str(tmp_path / name)),
    ):
        assert isinstance(loaded, keras.Model)
        assert_same(loaded, model, images)


def test_files_of_keras3_that_cannot_be_loaded_are_refused_briefly(tmp_path):
    on_an_input(Own(name="mine")).save(tmp_path / "own.keras")
    with pytest.raises(ValueError, match=r"whole file.*own\.keras") as caught:
        tfl.load_model(tmp_path / "own.keras")
    assert len(str(caught.value)) < 1000
    image = keras3.Input((4,), name="image")
    keras3.Model(image, layers.Dense(2)(image)).export(
        tmp_path / "exported", verbose=False
    )
    with pytest.raises(ValueError, match=r"one of Keras 3.*as a \.keras file"):
        tfl.load_model(tmp_path / "exported")


TRAINING = """
import keras as keras3
import numpy as np
import tf_lowbit as tfl

model = keras3.Sequential(
    [
        keras3.layers.Input((6, 6, 1)),
        keras3.layers.Conv2D(2, 3, name="conv"),
        keras3.layers.Flatten(),
        keras3.layers.Dense(3, name="head"),
    ]
)
model.save("net.keras")
rule = tfl.PrecisionRule(".*", 4, 32, edges=True)
low_bit = tfl.quantize(tfl.load_model("net.keras"), rule)
low_bit.compile(
    keras3.optimizers.SGD(0.1),
    keras3.losses.SparseCategoricalCrossentropy(from_logits=True),
)
low_bit.fit(np.ones((4, 6, 6, 1)), np.zeros(4), verbose=0)
print("trained")
"""


@pytest.mark.slow
@pytest.mark.parametrize("legacy", ["0", "1"])
def test_either_keras_may_be_on(legacy, tmp_path):
    environment = {
        **os.environ,
        "TF_USE_LEGACY_KERAS": legacy,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", TRAINING],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "trained" in done.stdout, done.stderr[-2000:]


def quantized():
    return tfl.quantize(nets.chain(), tfl.PrecisionRule(".*", 2, 2))


CONVERTED = {
    "sgd": (
        lambda: keras3.optimizers.SGD(0.25, momentum=0.75, nesterov=True, clipnorm=2.0),
        keras.optimizers.SGD,
        {"learning_rate": 0.25, "momentum": 0.75, "nesterov": True, "clipnorm": 2.0},
    ),
    "adamw": (
        lambda: keras3.optimizers.AdamW(0.5, weight_decay=0.25, beta_1=0.5),
        keras.optimizers.AdamW,
        {"learning_rate": 0.5, "weight_decay": 0.25, "beta_1": 0.5},
    ),
    "schedule": (
        lambda: keras3.optimizers.schedules.CosineDecay(0.5, 9, alpha=0.25),
        keras.optimizers.schedules.CosineDecay,
        {"initial_learning_rate": 0.5, "decay_steps": 9, "alpha": 0.25},
    ),
    "loss": (
        lambda: keras3.losses.SparseCategoricalCrossentropy(from_logits=True),
        keras.losses.SparseCategoricalCrossentropy,
        {"from_logits": True, "reduction": "sum_over_batch_size"},
    ),
    "metric": (
        lambda: keras3.metrics.SparseTopKCategoricalAccuracy(k=2, name="top2"),
        keras.metrics.SparseTopKCategoricalAccuracy,
        {"k": 2, "name": "top2"},
    ),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_trains_is_made_anew(name):
    make, kind, settings = CONVERTED[name]
    made = keras3_code.as_tf_keras(make())
    assert type(made) is kind
    assert made.get_config().items() >= settings.items()


def test_a_scheduled_optimizer_keeps_its_schedule():
    schedule = keras3.optimizers.schedules.ExponentialDecay(0.5, 3, 0.5)
    made = keras3_code.as_tf_keras(keras3.optimizers.Adam(schedule))
    assert isinstance(made._learning_rate, keras.optimizers.schedules.ExponentialDecay)
    assert made._learning_rate.get_config()["initial_learning_rate"] == 0.5


@pytest.mark.slow
def test_networks_train_with_what_is_of_keras3():
    network = quantized()
    network.compile(
        keras3.optimizers.Adam(1e-3),
        keras3.losses.SparseCategoricalCrossentropy(from_logits=True),
        [keras3.metrics.SparseCategoricalAccuracy(), "accuracy"],
    )
    assert isinstance(network.optimizer, keras.optimizers.Adam)
    logs = network.fit(nets.images(), nets.labels(), verbose=0).history
    assert {"sparse_categorical_accuracy", "accuracy"} <= logs.keys()
    image = keras3.Input(nets.IMAGE)
    teacher = layers.GlobalAveragePooling2D()(image)
    teacher = keras3.Model(image, layers.Dense(nets.CLASSES)(teacher))
    trainer = tfl.LowBitTrainer(quantized(), teacher)
    trainer.compile(
        keras3.optimizers.SGD(0.1),
        keras3.losses.SparseCategoricalCrossentropy(from_logits=True),
        teacher_optimizer=keras3.optimizers.SGD(0.1),
    )
    logs = trainer.fit(nets.images(), nets.labels(), verbose=0).history
    assert np.isfinite(logs["teacher_loss"]).all()


class OwnLoss(keras3.losses.Loss):
    def call(self, y_true, y_pred):
        return y_pred


OF_KERAS3 = {
    "optimizer": (
        lambda n: n.compile(keras3.optimizers.Muon(), "mse"),
        "use one of tf_keras.optimizers. Received: Muon of Keras 3",
    ),
    "loss": (
        lambda n: n.compile("sgd", OwnLoss()),
        "use one of tf_keras.losses. Received: OwnLoss of Keras 3",
    ),
    "option": (
        lambda n: n.compile(
            keras3.optimizers.SGD(gradient_accumulation_steps=2), "mse"
        ),
        "tf_keras has no gradient_accumulation_steps=2",
    ),
    "fit": (
        lambda n: n.fit(callbacks=[keras3.callbacks.EarlyStopping()]),
        "tf_keras.callbacks.EarlyStopping. Received: EarlyStopping of Keras 3",
    ),
    "evaluate": (
        lambda n: n.evaluate(callbacks=keras3.callbacks.Callback()),
        "tf_keras.callbacks.Callback. Received: Callback of Keras 3",
    ),
    "report": (
        lambda n: tfl.report(on_an_input(layers.Dense(2)), "page.html"),
        "tf_lowbit.from_keras3 convert.*Received: Functional of Keras 3",
    ),
    "strip": (
        lambda n: tfl.strip(on_an_input(layers.Dense(2))),
        "tf_lowbit.from_keras3 convert.*Received: Functional of Keras 3",
    ),
}


def test_check_reads_a_model_of_keras3():
    model = on_an_input(layers.Dense(2, activation="hard_silu", name="own"))
    (problem,) = tfl.export.check(model).problems
    assert problem.layer == "own"
    assert "x * tf.nn.relu6(x + 3.0) / 6.0" in problem.remedy


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", OF_KERAS3)
def test_what_stays_of_keras3_is_refused_in_a_line(name):
    call, message = OF_KERAS3[name]
    with pytest.raises(ValueError, match=message) as caught:
        call(quantized())
    assert len(str(caught.value)) < 500


def test_costs_of_a_keras3_model():
    model = on_an_input(layers.Dense(3, name="dense"))
    assert tfl.cost(model).parameters == 15
    assert "dense" in str(tfl.summary(model))
