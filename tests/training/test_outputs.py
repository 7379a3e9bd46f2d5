"""What distillation compares: labels, single units, and hidden probabilities."""

import functools

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tf
from tf_lowbit.training.outputs import Outputs, end_functions, outputs_of

layers, losses = keras.layers, keras.losses

X = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
W2A2 = tfl.PrecisionRule(".*", 2, 2)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def named(value):
    """An id that every process gives alike."""
    return value if isinstance(value, str) else type(value).__name__


def net(units, end=None, seed=0):
    """Two hidden layers and a head; `end` is its activation, or a function behind."""
    is_activation = end is None or isinstance(end, str)
    x = image = keras.Input((5,))
    x = layers.Dense(6, activation="relu", name="first")(x)
    x = layers.Dense(6, activation="relu", name="second")(x)
    x = layers.Dense(units, end if is_activation else None, name="head")(x)
    x = x if is_activation else end(x)
    return nets.randomize(keras.Model(image, x), seed)


# --- what is at the end of a network


def lambda_layer(function):
    return lambda x: layers.Lambda(function, name="end")(x)


def nested(kind):
    def end(x):
        within = keras.Input(x.shape[1:])
        return keras.Model(within, layers.Activation(kind)(within), name="end")(x)

    return end


class Own(layers.Layer):
    def __init__(self, function):
        super().__init__(name="end")
        self.function = function

    def call(self, x):
        return self.function(x)


ENDS = {
    "activation": lambda kind: kind,
    "activation layer": lambda kind: layers.Activation(kind, name="end"),
    "lambda": lambda kind: lambda_layer(getattr(tf.nn, kind)),
    "operator": lambda kind: getattr(tf.nn, kind),
    "keras operator": lambda kind: getattr(keras.activations, kind),
    "own layer": lambda kind: Own(getattr(tf.nn, kind)),
    "nested model": nested,
    "behind a reshape": lambda kind: (
        lambda x: layers.Reshape((3,))(
            layers.Reshape((1, 3))(layers.Activation(kind, name="end")(x))
        )
    ),
    "behind a cast": lambda kind: (
        lambda x: layers.Activation("linear")(
            tf.cast(layers.Activation(kind, name="end")(x), tf.float32)
        )
    ),
    "behind identities": lambda kind: (
        lambda x: layers.Flatten()(
            layers.Dropout(0.5)(layers.Activation(kind, name="end")(x))
        )
    ),
    "in a part": lambda kind: (
        lambda x: layers.Concatenate()(
            [layers.Activation(kind, name="end")(x[:, :2]), x[:, 2:]]
        )
    ),
}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("where", ENDS)
def test_a_function_at_the_end_is_seen_wherever_it_stands(where, kind):
    found = end_functions(net(3, ENDS[where](kind)))
    name = "head" if where == "activation" else "end"
    if "operator" in where:
        name = found[kind.title()]
    others = {"BiasAdd": "head"} if where == "in a part" else {}
    assert found == {kind.title(): name, **others}


def test_logits_end_in_the_layer_that_adds():
    assert end_functions(net(3)) == {"BiasAdd": "head"}
    # What a sigmoid has been through is no probability any more.
    scaled = net(3, lambda x: layers.Rescaling(2.0)(layers.Activation("sigmoid")(x)))
    assert "Sigmoid" not in end_functions(scaled)


@pytest.mark.quick(4)
@pytest.mark.parametrize("where", ENDS)
def test_a_teacher_with_a_softmax_is_refused_wherever_it_stands(where):
    with pytest.raises(ValueError, match=r"teacher must output logits.*Received"):
        tfl.LowBitTrainer(tfl.quantize(net(3), W2A2), net(3, ENDS[where]("softmax")))


@pytest.mark.parametrize(
    ("of_student", "of_teacher", "message"),
    [
        (None, "sigmoid", r"both.*Received: a sigmoid at the end of the teacher only"),
        ("sigmoid", None, r"both.*Received: a sigmoid at the end of the student only"),
        (None, ENDS["in a part"]("sigmoid"), r"All outputs of the teacher.*Received"),
    ],
)
def test_networks_of_other_outputs_are_refused(of_student, of_teacher, message):
    with pytest.raises(ValueError, match=message):
        tfl.LowBitTrainer(tfl.quantize(net(3, of_student), W2A2), net(3, of_teacher))


# --- what the loss says


def own_loss(y, p):
    return tf.reduce_mean((y - p) ** 2, -1)


LOGITS, LABELS, SIGMOIDS = (
    Outputs(False, False),
    Outputs(True, False),
    Outputs(True, True),
)
BINARY_FROM_LOGITS = functools.partial(losses.binary_crossentropy, from_logits=True)


@pytest.mark.parametrize(
    ("loss", "units", "have_sigmoid", "expected"),
    [
        (losses.SparseCategoricalCrossentropy(from_logits=True), 3, False, LOGITS),
        (losses.CategoricalCrossentropy(from_logits=True), 3, False, LOGITS),
        ([losses.CategoricalFocalCrossentropy(from_logits=True)], 3, False, LOGITS),
        ("mse", 3, False, LOGITS),
        (own_loss, 3, False, LOGITS),
        (None, 3, False, LOGITS),
        (losses.BinaryCrossentropy(from_logits=True), 3, False, LABELS),
        (losses.BinaryFocalCrossentropy(from_logits=True), 3, False, LABELS),
        ({"head": losses.BinaryCrossentropy(from_logits=True)}, 1, False, LABELS),
        (BINARY_FROM_LOGITS, 3, False, LABELS),
        (own_loss, 1, False, LABELS),
        ("hinge", 1, False, LABELS),
        ("binary_crossentropy", 3, True, SIGMOIDS),
        ("bce", 1, True, SIGMOIDS),
        (losses.BinaryCrossentropy(), 1, True, SIGMOIDS),
        (own_loss, 3, True, SIGMOIDS),
    ],
    ids=named,
)
def test_the_loss_and_the_shape_say_what_is_put_out(
    loss, units, have_sigmoid, expected
):
    for match_logits in (False, True):
        found = outputs_of(
            loss, units, have_sigmoid=have_sigmoid, match_logits=match_logits
        )
        assert found == expected


@pytest.mark.parametrize(
    "loss", ["mse", "mae", losses.Huber(), losses.LogCosh()], ids=named
)
def test_a_number_has_no_posterior(loss):
    options = {"have_sigmoid": False}
    with pytest.raises(ValueError, match=r'target="logits".*Received: the loss'):
        outputs_of(loss, 1, match_logits=False, **options)
    assert outputs_of(loss, 1, match_logits=True, **options) == LABELS


def test_one_class_has_no_posterior():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.raises(ValueError, match=r"use a binary cross-entropy.*Received"):
        outputs_of(loss, 1, have_sigmoid=False, match_logits=False)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("loss", "end", "message"),
    [
        ("binary_crossentropy", None, r"from_logits=True, or .* sigmoid.*Received"),
        (losses.BinaryCrossentropy(), None, r"from_logits=True, or.*Received"),
        ("sparse_categorical_crossentropy", None, r"from_logits=True\. Received"),
        (losses.BinaryCrossentropy(True), "sigmoid", r"from_logits=False\. Received"),
    ],
    ids=named,
)
def test_a_loss_that_reads_other_outputs_is_refused(loss, end, message):
    trainer = tfl.LowBitTrainer(tfl.quantize(net(3, end), W2A2), net(3, end, 1))
    with pytest.raises(ValueError, match=message):
        trainer.compile("sgd", loss, teacher_optimizer="sgd")
    # Without a teacher nothing is compared.
    tfl.LowBitTrainer(tfl.quantize(net(3, end), W2A2)).compile("sgd", loss)


# --- distances


def numpy_distance(t, teacher, student):
    """The mean over the labels of T^2 KL, and its gradients."""
    u, v = (np.asarray(z, np.float64) / t for z in (teacher, student))
    p, q = sigmoid(u), sigmoid(v)
    terms = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    by_target = t * p * (1 - p) * (u - v) / u.shape[1]
    return t**2 * terms.mean(1), by_target, t * (q - p) / u.shape[1]


@pytest.mark.parametrize("units", [1, 4])
@pytest.mark.parametrize("temperature", [1, 2, 5])
def test_distance_of_labels_and_its_gradients_equal_numpys(temperature, units):
    draws = np.random.default_rng(1).normal(size=(2, 6, units)).astype(np.float32)
    target, logits = 3 * draws
    distillation = tfl.JointDistillation(temperature=temperature)
    expected, *slopes = numpy_distance(temperature, target, logits)
    target, logits = tf.constant(target), tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch([target, logits])
        found = distillation.distance(target, logits, are_labels=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected > 1e-3).all()
    for gradient, slope in zip(
        tape.gradient(found, [target, logits]), slopes, strict=True
    ):
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


def test_one_unit_is_two_classes():
    """The other class's logit is 0."""
    target, logits = np.random.default_rng(2).normal(size=(2, 5, 1))
    distillation = tfl.JointDistillation(temperature=2)
    found = distillation.distance(target, logits, are_labels=True)
    two = [np.concatenate([z, 0 * z], 1) for z in (target, logits)]
    np.testing.assert_allclose(found, distillation.distance(*two), atol=1e-5)


def test_large_logits_of_labels_stay_finite():
    target, logits = tf.constant([[1e4, 0.0]]), tf.constant([[-1e4, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch([target, logits])
        found = tfl.JointDistillation().distance(target, logits, are_labels=True)
    # The mean over both labels.
    np.testing.assert_allclose(found, [5e3], rtol=1e-6)
    gradients = tape.gradient(found, [target, logits])
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("kept", [True, False], ids=["kept by Keras", "log-odds"])
def test_logits_of_probabilities(kept):
    logits = tf.constant([[-6.0, -1.0, 0.0, 2.0, 6.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        outputs = keras.activations.sigmoid(logits)
        if not kept:
            outputs = tf.identity(outputs)
        found = SIGMOIDS.logits(outputs)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tape.gradient(found, logits), [[1.0] * 5], rtol=1e-3)
    ends = SIGMOIDS.logits(tf.constant([[0.0, 1.0]], tf.float16))
    assert np.isfinite(ends).all()


# --- in training


@pytest.mark.quick(4)
@pytest.mark.parametrize("mode", ["frozen", "joint"])
@pytest.mark.parametrize("end", [None, "sigmoid", "layer"])
@pytest.mark.parametrize("units", [1, 3])
def test_labels_are_distilled(units, end, mode):
    """The logged distance, and the gradient that the head's offset gets."""
    behind = layers.Activation("sigmoid") if end == "layer" else end
    student = tfl.quantize(net(units, behind, 1), W2A2)
    teacher = net(units, behind, 2)
    y = np.random.default_rng(3).integers(0, 2, (len(X), units)).astype(np.float32)

    def logits(model):
        outputs = model(X).numpy().astype(np.float64)
        return np.log(outputs / (1 - outputs)) if end else outputs

    expected, _, slope = numpy_distance(1, logits(teacher), logits(student))
    back, _, teacher_slope = numpy_distance(1, logits(student), logits(teacher))
    settings = {"task_weight": 0.0, "distillation_weight": 1.0, "teacher": mode}
    options = {}
    if mode == "joint":
        settings |= {"teacher_task_weight": 0.0, "teacher_distillation_weight": 1.0}
        options = {"teacher_optimizer": keras.optimizers.SGD(1.0)}
    trainer = tfl.LowBitTrainer(
        student, teacher, distillation=tfl.JointDistillation(**settings)
    )
    loss = losses.BinaryCrossentropy(from_logits=end is None)
    trainer.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=True, **options)
    networks = [(student, slope), (teacher, teacher_slope)][: 1 + (mode == "joint")]
    biases = [next(v for v in n.weights if "head/bias" in v.name) for n, _ in networks]
    before = nets.snapshot(biases)
    logs = trainer.train_on_batch(X, y, return_dict=True)
    assert expected.mean() > 0.01
    assert logs["distillation_loss"] == pytest.approx(expected.mean(), rel=1e-3)
    if mode == "joint":
        found = logs["teacher_distillation_loss"]
        assert found == pytest.approx(back.mean(), rel=1e-3)
    for bias, old, (_, wanted) in zip(biases, before, networks, strict=True):
        moved = old - bias.numpy()
        np.testing.assert_allclose(moved, wanted.mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_trainer_of_labels_comes_back_with_its_losses(tmp_path):
    student, teacher = tfl.quantize(net(1, "sigmoid", 1), W2A2), net(1, "sigmoid", 2)
    frozen = tfl.JointDistillation(teacher="frozen")
    trainer = tfl.LowBitTrainer(student, teacher, distillation=frozen)
    trainer.compile(keras.optimizers.SGD(0.0), "binary_crossentropy")
    y = np.zeros((len(X), 1), np.float32)
    log = trainer.train_on_batch(X, y, return_dict=True)
    trainer.save(tmp_path / "trainer.keras")
    again = tfl.load_model(tmp_path / "trainer.keras")
    found = again.train_on_batch(X, y, return_dict=True)
    assert found == pytest.approx(log)
    assert found["distillation_loss"] > 0.001
