"""`recipes.low_bit` sets what it says, trains, and refuses what cannot work."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import inspection

layers = keras.layers


def data(count=64, batch=16):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count)
    images = rng.normal(size=(count, 8, 8, 1)) * 0.3
    # A bright stripe tells the class.
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 1.0
    return tf.data.Dataset.from_tensor_slices(
        (images.astype(np.float32), labels)
    ).batch(batch)


def float_model():
    image = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, padding="same", name="first")(image)
    x = start = layers.ReLU()(layers.BatchNormalization(momentum=0.5)(x))
    x = layers.Conv2D(4, 3, padding="same", name="inner")(x)
    x = layers.BatchNormalization(momentum=0.5)(x)
    x = layers.ReLU()(layers.Add()([x, start]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(3, name="last")(x), name="net")


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(1)
    model = float_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, ["accuracy"])
    model.fit(data(), epochs=8, verbose=0)
    return model


@pytest.mark.parametrize("teacher", ["joint", "frozen", None])
def test_it_trains_and_leaves_the_float_model_alone(trained, teacher):
    before = [weight.numpy() for weight in trained.weights]
    recipe = tfl.recipes.low_bit(
        trained, data(), bits=(2, 3), epochs=4, learning_rate=0.05, teacher=teacher
    )
    recipe.trainer.fit(
        data(), epochs=recipe.epochs, callbacks=recipe.callbacks, verbose=0
    )
    for weight, value in zip(trained.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
    found = recipe.trainer.evaluate(data(), verbose=0, return_dict=True)
    chance = 1 / 3
    assert found["accuracy"] > chance + 0.2
    assert recipe.settings["teacher"] == teacher
    assert (recipe.trainer.teacher is None) == (teacher is None)
    assert "weight_bits: 2" in str(recipe)


def test_bits_of_every_tensor(trained):
    recipe = tfl.recipes.low_bit(trained, data(), bits=2, epochs=1)
    tensors = inspection.quantized_tensors(recipe.trainer.student)
    bits = {
        (tensor.layer.name.removeprefix("quant_"), tensor.role): tensor.bits
        for tensor in tensors
    }
    assert bits["first", "weight"] == bits["last", "weight"] == 8
    assert bits["inner", "weight"] == 2
    assert {bit for (_, role), bit in bits.items() if role == "activation"} == {2, 8}
    (stage,) = recipe.callbacks[0].stages
    assert (stage.weight_bits, stage.activation_bits) == (2, 2)


def test_the_teachers_rate_follows_the_students(trained):
    recipe = tfl.recipes.low_bit(
        trained, data(), epochs=10, learning_rate=0.1, teacher="joint"
    )
    (stage,) = recipe.callbacks[0].stages
    schedule = recipe.trainer.teacher_optimizer._learning_rate
    steps = recipe.settings["steps"]
    assert steps == 40
    # One cosine begins behind the warmup, the other with it.
    for step in (0, 1, 2, 20, 35):
        wanted = stage.learning_rate_at(step / steps)
        assert float(schedule(step)) == pytest.approx(wanted, rel=0.15)
    assert float(schedule(steps)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 9}, r"bits must .* Received: bits=9"),
        ({"bits": (2, 2, 2)}, r"a number or a pair. Received"),
        ({"epochs": 0}, r"epochs must .* Received: epochs=0"),
        ({"learning_rate": 0}, r"learning_rate must .* Received"),
        ({"teacher": "both"}, r"teacher must be one of .* Received"),
        ({"data": iter(())}, r"read again from its start"),
        ({"data": data().repeat()}, r"give steps_per_epoch\. Received"),
    ],
)
def test_what_is_wrong_is_said(trained, changed, message):
    arguments = {"data": data(), "epochs": 1, **changed}
    with pytest.raises(ValueError, match=message):
        tfl.recipes.low_bit(trained, **arguments)


def with_softmax(trained):
    model = keras.models.clone_model(trained)
    model.layers[-1].activation = keras.activations.softmax
    return keras.models.clone_model(model)


def test_a_softmax_is_refused_before_anything_is_measured(trained):
    def never():
        raise AssertionError("data were read")
        yield

    unread = tf.data.Dataset.from_generator(
        never, output_signature=(tf.TensorSpec((1, 8, 8, 1)), tf.TensorSpec((1,)))
    )
    with pytest.raises(ValueError, match=r"must output logits.*activations\.linear"):
        tfl.recipes.low_bit(with_softmax(trained), unread, epochs=1, steps_per_epoch=1)


def test_data_of_keras3_are_refused(trained):
    keras3 = pytest.importorskip("keras")

    class Batches(keras3.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return next(iter(data()))

    with pytest.raises(ValueError, match=r"tf_keras\.utils\.Sequence.*of Keras 3"):
        tfl.recipes.low_bit(trained, Batches(), epochs=1)


def test_a_chain_of_layers_has_no_shortcut_to_warn_of(recwarn):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    recipe = tfl.recipes.low_bit(model, data(), epochs=1)
    assert recipe.settings["shortcut_bits"] is None
    assert not [w for w in recwarn if "_bits=" in str(w.message)]


def test_the_loss_fits_the_labels(trained):
    one_hot = data().map(lambda x, y: (x, tf.one_hot(y, 3)))
    losses = []
    for batches in (data(), one_hot):
        keras.utils.set_random_seed(3)
        recipe = tfl.recipes.low_bit(trained, batches, epochs=1)
        fitted = recipe.trainer.fit(
            batches, epochs=1, callbacks=recipe.callbacks, verbose=0
        )
        losses.append(fitted.history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("teacher", ["frozen", None])
@pytest.mark.parametrize(
    ("units", "activation", "message"),
    [
        (1, None, r"loss must be given.*Received: loss=None, outputs of shape.* 1\)"),
        (3, "sigmoid", r"loss must be given.*behind a sigmoid"),
        (3, "softmax", r"must output logits"),
    ],
)
def test_a_loss_is_asked_for_where_cross_entropy_is_none(
    units, activation, message, teacher
):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(units, activation=activation),
        ]
    )
    with pytest.raises(ValueError, match=message):
        tfl.recipes.low_bit(model, data(), epochs=1, teacher=teacher)


@pytest.mark.parametrize("change", [lambda x, y: x, lambda x, y: (x,)])
def test_labels_are_asked_for(trained, change):
    with pytest.raises(ValueError, match=r"data must be batches \(x, y\).*Received"):
        tfl.recipes.low_bit(trained, data().map(change), epochs=1)
