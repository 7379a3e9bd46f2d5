import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit import models
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import inspection, predictions

layers = keras.layers


def network(*behind):
    x = image = keras.Input((4,))
    for layer in behind:
        x = layer(x)
    return keras.Model(image, x)


@pytest.mark.parametrize(
    ("behind", "limit"),
    [
        ([layers.Dense(1)], 0.0),
        ([layers.Dense(1, activation="sigmoid")], 0.5),
        ([layers.Dense(1), layers.Activation("sigmoid")], 0.5),
        ([layers.Dense(1), tf.sigmoid], 0.5),
        # Behind it nothing else is computed.
        (
            [
                layers.Dense(1, activation="sigmoid"),
                layers.Reshape((1, 1)),
                layers.Flatten(),
                layers.Activation("linear", dtype="float32"),
            ],
            0.5,
        ),
        ([layers.Dense(3, activation="sigmoid"), layers.Dense(1)], 0.0),
    ],
)
def test_the_threshold_is_that_of_a_logit_or_a_probability(behind, limit):
    assert predictions.threshold(network(*behind)) == limit


@pytest.mark.parametrize(
    "behind",
    [
        layers.Activation("linear"),
        layers.AveragePooling2D(2),
        layers.Cropping2D(1),
        layers.Dropout(0.5),
        layers.Identity(),
        layers.MaxPooling2D(2),
        layers.Permute((2, 1, 3)),
        layers.Resizing(8, 8),
        layers.UpSampling2D(2),
        layers.UpSampling2D(2, interpolation="bilinear"),
        layers.ZeroPadding2D(1),
        lambda x: layers.Average()([x, x[:, ::-1]]),
        lambda x: layers.Concatenate(axis=1)([x, x]),
        lambda x: tf.cast(x[:, 1:], tf.float32),
        lambda x: tf.image.resize(x, (8, 8)),
    ],
)
def test_what_moves_or_averages_probabilities_keeps_them(behind):
    image = keras.Input((4, 4, 3))
    for activation, limit in [
        ("sigmoid", 0.5),
        ("hard_sigmoid", 0.5),
        (tf.sigmoid, 0.5),
        (None, 0.0),
        ("tanh", 0.0),
    ]:
        mask = layers.Conv2D(1, 1, activation=activation)(image)
        assert predictions.threshold(keras.Model(image, behind(mask))) == limit


@pytest.mark.parametrize(
    "behind",
    [
        lambda x: layers.Rescaling(80.0)(x),  # A bounded number of a regression.
        lambda x: tf.concat([x, x - 0.5], 1),
        lambda x: x * 2.0,
    ],
)
def test_other_numbers_made_of_a_sigmoid_are_no_probabilities(behind):
    image = keras.Input((4, 4, 3))
    mask = layers.Conv2D(1, 1, activation="sigmoid")(image)
    assert predictions.threshold(keras.Model(image, behind(mask))) == 0.0


def test_a_quantized_head_is_the_head():
    dense = layers.Dense(1, activation="sigmoid")
    model = network(layers.Dense(8, activation="relu"), dense)
    quantized = tfl.quantize(model, [tfl.PrecisionRule(".*", 8, 8, edges=True)])
    assert inspection.wrapped_layer(quantized.layers[-1]) is not quantized.layers[-1]
    assert predictions.threshold(quantized) == 0.5


def test_class_numbers_of_an_argmax_are_scores():
    logits = network(layers.Dense(3))
    chosen = keras.Model(logits.inputs, tf.argmax(logits.outputs[0], axis=-1))
    (end,) = chosen.outputs
    assert predictions.class_count(end) == predictions.class_count(logits.outputs[0])
    scores = predictions.scores(end, np.array([2, 0]))
    assert scores.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert predictions.classes(scores, 0.0).tolist() == [2, 0]
    assert predictions.are_classes(chosen)
    # Others are taken as they are, with an axis of units.
    assert predictions.scores(logits.outputs[0], np.array([2, 0])).shape == (2, 1)


def test_one_class_is_class_0():
    unit = network(layers.Dense(1))
    chosen = keras.Model(unit.inputs, tf.argmax(unit.outputs[0], axis=-1))
    scores = predictions.scores(chosen.outputs[0], np.array([0, 0]))
    assert predictions.classes(scores, 0.0).tolist() == [0, 0]


def test_classes_by_hand():
    scores = np.array([[0.1, 0.9], [0.8, 0.2]])
    assert predictions.classes(scores, 0.0).tolist() == [1, 0]
    units = np.array([[-0.1], [0.3], [0.7]])
    assert predictions.classes(units, 0.0).tolist() == [0, 1, 1]
    assert predictions.classes(units, 0.5).tolist() == [0, 0, 1]
    # `Reshape(())` leaves the axis of the unit out.
    assert predictions.classes(units[:, 0], 0.5).tolist() == [0, 0, 1]
    # A map of classes: one prediction for each position.
    maps = np.zeros((2, 3, 4))
    maps[1, 2, 3] = 1.0
    assert predictions.classes(maps, 0.0).tolist() == [0, 0, 0, 0, 0, 3]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_labels_are_classes(dtype, shape):
    given = np.array([2, 0], dtype).reshape(shape)
    found = predictions.labels(given, np.zeros((2, 3)), ["head"])
    assert found.dtype == np.int64
    assert found.tolist() == [2, 0]


def test_probabilities_are_classes():
    given = [[0.1, 0.8, 0.1], [1.0, 0.0, 0.0]]
    assert predictions.labels(given, np.zeros((2, 3)), ["head"]).tolist() == [1, 0]


def test_labels_of_a_map():
    given = np.array([[0, 1, 2], [2, 1, 0]])
    outputs = np.zeros((2, 3, 4))
    expected = [0, 1, 2, 2, 1, 0]
    assert predictions.labels(given, outputs, ["head"]).tolist() == expected
    columns = given[..., np.newaxis]
    assert predictions.labels(columns, outputs, ["head"]).tolist() == expected
    one_hot = np.eye(4)[given]
    assert predictions.labels(one_hot, outputs, ["head"]).tolist() == expected


@pytest.mark.parametrize("kind", [tuple, list, lambda p: {"a": p[0], "b": p[1]}])
def test_of_several_outputs_the_first_counts(kind):
    given = kind(([1, 0], [[0.5], [0.7]]))
    assert predictions.labels(given, np.zeros((2, 3)), ["a", "b"]).tolist() == [1, 0]


def test_a_list_is_the_labels_of_one_output():
    assert predictions.labels([1, 0], np.zeros((2, 3)), ["a"]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("given", "units"),
    [
        ([0.5, 1.0], 1),  # A regression's.
        ([2, 1], 1),  # No two classes.
        ([[0.3, -0.2, 0.9], [1.0, 0.0, 0.0]], 3),
        ([[3.0, 4.0, 5.0], [1.0, 0.0, 0.0]], 3),
    ],
)
def test_other_numbers_are_no_classes(given, units):
    assert predictions.labels(given, np.zeros((2, units)), ["a"]) is None


@pytest.mark.parametrize("names", [["a"], ["another"]])
def test_a_dict_of_one_entry_is_the_labels_of_one_output(names):
    found = predictions.labels({"a": [1, 0]}, np.zeros((2, 3)), names)
    assert found.tolist() == [1, 0]


def test_a_dict_must_have_the_name_of_an_output():
    outputs = np.zeros((2, 3))
    assert predictions.labels({"c": [1, 0]}, outputs, ["a", "c"]) is None
    message = r"key of \['a', 'c'\], .*\. Received: \['b'\]$"
    with pytest.raises(ValueError, match=message):
        predictions.labels({"b": [1, 0]}, outputs, ["a", "c"])


MSE = "mse"
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
BINARY = keras.losses.BinaryCrossentropy(from_logits=True)


@pytest.mark.parametrize(
    ("units", "activation", "loss", "expected"),
    [
        (3, None, None, True),
        (3, "softmax", None, True),
        (3, "sigmoid", None, False),  # A label for each unit.
        (4, None, None, False),  # An autoencoder of four numbers.
        (1, None, None, False),
        (1, "sigmoid", None, True),
        # The loss knows it better.
        (3, None, MSE, False),
        (3, None, [MSE], False),
        (3, None, {"end": keras.losses.Huber()}, False),
        (3, None, keras.losses.mean_absolute_error, False),
        (3, "sigmoid", "categorical_crossentropy", True),
        (3, None, BINARY, False),
        (4, None, SPARSE, True),
        (1, None, BINARY, True),
        (1, "sigmoid", MSE, False),
        # This one says nothing.
        (3, None, lambda y, p: keras.losses.mse(y, p), True),
    ],
)
def test_which_outputs_are_classes(units, activation, loss, expected):
    image = keras.Input((4,))
    output = layers.Dense(units, activation=activation, name="end")(image)
    model = keras.Model(image, output)
    if loss is not None:
        model.compile(loss=loss)
    assert predictions.are_classes(model) is expected


@pytest.mark.parametrize("sizes", [(None, None, 3), (8, 8, 3)])
def test_an_output_of_an_inputs_shape_is_no_map_of_classes(sizes):
    image = keras.Input(sizes)
    model = keras.Model(image, layers.Conv2D(3, 1)(image))
    assert not predictions.are_classes(model)


@pytest.mark.parametrize("given", [[0, 1, 2], [[0, 1], [1, 0]], 3])
def test_a_label_for_each_prediction(given):
    message = r"one label for each example.*Received: labels of shape .* \(2, 3\)$"
    with pytest.raises(ValueError, match=message):
        predictions.labels(given, np.zeros((2, 3)), ["a"])


@pytest.fixture(scope="module", params=["sigmoid", None])
def binary(request):
    """A trained binary classifier, its data, and the accuracy that Keras says."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(64, 8, 8, 1)).astype(np.float32)
    y = (x[:, 0, 0, 0] > 0.6).astype(np.int64)
    x += 2.0 * (y[:, None, None, None] - 0.5) * rng.uniform(0, 0.3, x.shape)
    base = models.get("plain_cnn", classes=2, input_shape=(8, 8, 1), width=8)
    features = base.layers[-1].input
    head = layers.Dense(1, activation=request.param, name="binary")(features)
    model = tfl.quantize(keras.Model(base.input, head), [tfl.PrecisionRule(".*", 2, 2)])
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    tfl.calibrate(model, batches)
    limit = 0.5 if request.param else 0.0
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.BinaryCrossentropy(from_logits=request.param is None),
        metrics=[keras.metrics.BinaryAccuracy(threshold=limit)],
    )
    model.fit(batches, epochs=3, verbose=0)
    accuracy = 100 * model.evaluate(batches, verbose=0)[1]
    return model, batches, accuracy


@pytest.mark.slow
def test_one_unit_has_the_accuracy_that_keras_says(binary, tmp_path):
    model, batches, accuracy = binary
    # Of both classes, so that a constant one would be found out.
    assert 10 < 100 * float(np.mean(np.concatenate([y for _, y in batches]))) < 90
    exported = tfl.export.to_tflite(model, tmp_path / "net.tflite", data=batches)
    found = tfl.export.verify(
        exported.path, exported, batches, trained=model, verbose=0
    )
    assert found.ok
    right = found.predictions.right["trained"]
    assert 100 * right / found.predictions.labels == pytest.approx(accuracy)
    page = tfl.report(model, batches, tmp_path / "page.html").read_text()
    assert f"{accuracy:.2f}" in page
    scores = tfl.sensitivity(model, batches, (1,), metric="accuracy", progress=False)
    assert 50.0 < scores.reference <= 100.0


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["tuple", "dict", "keys"])
def test_a_network_of_two_outputs_is_proved_and_reported(kind, tmp_path):
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    x = rng.uniform(size=(32, 8, 8, 1)).astype(np.float32)
    base = models.get("plain_cnn", classes=3, input_shape=(8, 8, 1), width=8)
    features = base.layers[-1].input
    size = layers.Dense(1, name="size")(features)
    ends, names = [base.output, size], ["result", "size_of_it"]
    if kind == "keys":  # Of a dict of outputs, which are no names of layers.
        ends = dict(zip(names, ends, strict=True))
    model = tfl.quantize(keras.Model(base.input, ends))
    tfl.calibrate(model, [x])
    scores = tf.nest.flatten(model(x, training=False))[0].numpy()
    right = scores.argmax(-1)
    right[:8] = (right[:8] + 1) % 3
    given = (right, rng.uniform(size=32).astype(np.float32))
    if kind == "dict":
        given = dict(zip(model.output_names, given, strict=True))
    elif kind == "keys":
        given = dict(zip(names, given, strict=True))
    batches = tf.data.Dataset.from_tensor_slices((x, given)).batch(16)
    exported = tfl.export.to_tflite(model, tmp_path / "net.tflite", data=batches)
    found = tfl.export.verify(
        exported.path, exported, batches, trained=model, verbose=0
    )
    assert found.ok
    assert found.predictions.right["trained"] == 24
    assert found.predictions.labels == found.predictions.examples == 32
    assert list(found.further) == [names[1] if kind == "keys" else "size"]
    page = tfl.report(model, batches, tmp_path / "page.html").read_text()
    assert "75.00" in page
