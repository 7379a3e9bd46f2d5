"""Models among the layers of a model."""

import numpy as np
import pytest

from tests.scheme import nets
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import graph

layers = keras.layers


def names(model):
    return [layer.name for layer in model.layers]


def assert_same_function(first, second, inputs, **options):
    found, expected = first(inputs, **options), second(inputs, **options)
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        found,
        expected,
    )


def on_a_backbone(training=None):
    """A frozen network, called as for transfer learning, and a head."""
    backbone = nets.mobilenet_like()
    backbone = keras.Model(
        backbone.input, backbone.get_layer("features_relu").output, name="backbone"
    )
    backbone.trainable = False
    image = keras.Input((16, 16, 3), name="photo")
    x = layers.Rescaling(0.5, name="rescale")(image)
    x = backbone(x, training=training)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(3, name="head")(x)
    return nets.randomize(keras.Model(image, x, name="transfer")), backbone


@pytest.mark.parametrize("training", [None, False, True])
def test_a_backbone_is_its_layers(training):
    model, backbone = on_a_backbone(training)
    flat = graph.flatten(model)
    assert flat.name == "transfer"
    inner = names(backbone)[1:]
    assert names(flat) == ["photo", "rescale", *inner, "pool", "head"]
    images = nets.images(shape=(16, 16, 3))
    assert_same_function(flat, model, images)
    assert_same_function(flat, model, images, training=True)
    frozen = {layer.name for layer in flat.layers if not layer.trainable}
    assert frozen == set(inner)
    # The given model is as it was, and shares nothing with the copy.
    assert not {id(v) for v in model.weights} & {id(v) for v in flat.weights}
    assert model.get_layer("backbone") is backbone


def test_batch_statistics_stay_where_the_backbone_was_called_for_inference():
    for training, is_fixed in ((False, True), (None, False)):
        model, backbone = on_a_backbone(training)
        backbone.trainable = True
        flat = graph.flatten(model)
        before = [w.numpy() for w in flat.get_layer("stem_bn").weights[2:]]
        flat(nets.images(shape=(16, 16, 3)), training=True)
        after = [w.numpy() for w in flat.get_layer("stem_bn").weights[2:]]
        same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [is_fixed, is_fixed]


def test_a_layers_own_training_stays():
    inner_image = keras.Input((4,))
    x = layers.BatchNormalization(name="fixed")(inner_image, training=False)
    x = layers.BatchNormalization(name="open")(x)
    inner = keras.Model(inner_image, x, name="inner")
    image = keras.Input((4,))
    model = nets.randomize(keras.Model(image, inner(image, training=True)))
    flat = graph.flatten(model)
    data = nets.images(8, (4,))
    assert_same_function(flat, model, data)
    means = {
        name: flat.get_layer(name).moving_mean.numpy() for name in ("fixed", "open")
    }
    flat(data)
    assert (flat.get_layer("fixed").moving_mean.numpy() == means["fixed"]).all()
    assert (flat.get_layer("open").moving_mean.numpy() != means["open"]).any()


def test_names_that_stand_twice_have_the_models_in_front():
    def part(name):
        return keras.Sequential(
            [
                layers.Dense(4, activation="relu", input_shape=(4,), name="dense"),
                layers.Dense(4, name="last"),
            ],
            name=name,
        )

    model = nets.randomize(
        keras.Sequential([part("one"), part("two"), layers.Dense(4, name="last")])
    )
    model = keras.Model(model.inputs, model.outputs)
    flat = graph.flatten(model)
    assert names(flat)[1:] == ["dense", "one_last", "two_dense", "two_last", "last"]
    assert_same_function(flat, model, nets.images(shape=(4,)))


def test_models_within_models_with_several_inputs_and_outputs():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    total = layers.Add(name="sum")([left, layers.Dense(4, name="turn")(right)])
    pair = keras.Model([left, right], {"sum": total, "left": left}, name="pair")
    outer = keras.Input((4,), name="outer")
    found = pair({"left": outer, "right": layers.ReLU(name="relu")(outer)})
    middle = keras.Model(outer, [found["left"], found["sum"]], name="middle")
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    # Called twice: its layers are shared.
    first, second = middle(a), middle(b)
    model = keras.Model([a, b], {"first": first, "second": second[1] * 2.0})
    nets.randomize(model)
    flat = graph.flatten(model)
    assert names(flat).count("turn") == 1
    assert not graph.nested_models(flat)
    data = [nets.images(shape=(4,), seed=seed) for seed in (1, 2)]
    assert_same_function(flat, model, data)


def test_a_flat_model_is_itself():
    model = nets.chain()
    assert graph.flatten(model) is model


def test_a_subclassed_model_within_is_named():
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    image = keras.Input((4,))
    model = keras.Model(image, Own(name="own")(image))
    with pytest.raises(ValueError, match=r"cannot be read\. Received: 'own', Own"):
        graph.flatten(model)


@pytest.mark.parametrize("frozen", ["all", "first", "last", "none"])
def test_a_copy_of_a_partly_frozen_layer_has_its_weights_and_flags(frozen):
    """Keras lists what trains first: the order of the weights hangs on the flags."""
    block = keras.Sequential(
        [
            layers.BatchNormalization(input_shape=(6,)),
            layers.Activation("tanh"),
            layers.BatchNormalization(),
        ]
    )
    for place, layer in enumerate((block.layers[0], block.layers[-1])):
        layer.trainable = frozen not in ("all", ("first", "last")[place])
    inputs = keras.Input((5, 6))
    outputs = layers.Flatten()(layers.TimeDistributed(block)(inputs))
    model = keras.Model(inputs, layers.Dense(2)(outputs))
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.3, 1.5, w.shape) for w in model.get_weights()])
    x = rng.normal(size=(2, 5, 6)).astype("float32")
    outer = keras.Input((5, 6))
    for copy in (graph.clone(model), graph.flatten(keras.Model(outer, model(outer)))):
        np.testing.assert_array_equal(copy(x), model(x))
        graph.copy_flags(model.layers[1], copy.layers[1])
        assert len(copy.trainable_weights) == len(model.trainable_weights)


def test_what_a_frozen_model_holds_stays_frozen():
    inner = keras.Sequential([layers.Dense(3, input_shape=(4,)), layers.Dense(2)])
    inner.trainable = False
    inner.layers[0].trainable = True  # Nothing in a frozen model trains, all the same.
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2, name="head")(inner(inputs)))
    assert [len(v) for v in (model.trainable_weights, model.weights)] == [2, 6]
    assert len(graph.flatten(model).trainable_weights) == 2


# --- building without tracing ---------------------------------------------------------


class Late(keras.layers.Layer):
    """Makes its weights when it is called."""

    def call(self, inputs):
        if not self.weights:
            self.kernel = self.add_weight("kernel", (), initializer="ones")
        return inputs * self.kernel


def _functional(*stack):
    image = keras.Input((6, 6, 2))
    x = image
    for layer in stack:
        x = layer(x)
    return keras.Model(image, x)


def test_a_clone_of_keras_layers_is_not_traced(monkeypatch):
    model = _functional(
        keras.layers.Conv2D(3, 3, padding="same", strides=2),
        keras.layers.BatchNormalization(),
        keras.layers.GlobalMaxPooling2D(),
        keras.layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.1)),
    )
    traced = []
    call = keras.layers.Conv2D.call
    monkeypatch.setattr(
        keras.layers.Conv2D, "call", lambda *a: traced.append(a) or call(*a)
    )
    made = graph.clone(model)
    assert traced == []
    assert made.output_shape == model.output_shape == (None, 3)
    assert [layer.output_shape for layer in made.layers] == [
        layer.output_shape for layer in model.layers
    ]
    x = tf.random.normal((2, 6, 6, 2))
    np.testing.assert_array_equal(made(x, training=True), model(x, training=True))
    assert len(traced) == 2  # What it computes is the class's again.
    np.testing.assert_array_equal(made.losses, model.losses)
    assert len(made.losses) == 1


@pytest.mark.parametrize(
    "layer",
    [
        Late,
        lambda: keras.layers.TimeDistributed(Late()),
        lambda: keras.layers.Bidirectional(keras.layers.LSTM(2, return_sequences=True)),
        lambda: keras.layers.MultiHeadAttention(1, 2),
    ],
)
def test_layers_that_may_make_weights_late_are_traced(layer):
    layer = layer()
    image = keras.Input((6, 2))
    is_attention = isinstance(layer, keras.layers.MultiHeadAttention)
    model = keras.Model(image, layer(image, image) if is_attention else layer(image))
    made = graph.clone(model, _copied)
    x = tf.random.normal((2, 6, 2))
    assert made.weights
    np.testing.assert_array_equal(made(x), model(x))


def _copied(layer):
    with keras.utils.custom_object_scope({"Late": Late}):
        return graph.copy_layer(layer)


def test_a_layer_of_another_dtype_is_traced():
    model = _functional(keras.layers.Conv2D(3, 3), keras.layers.ReLU())
    half = graph.clone(
        model,
        lambda layer: (
            graph.copy_layer(layer, dtype="mixed_bfloat16")
            if layer.weights or isinstance(layer, keras.layers.ReLU)
            else graph.copy_layer(layer)
        ),
    )
    assert model.output.dtype == tf.float32
    assert half.output.dtype == tf.bfloat16


class Nameless(keras.layers.Layer):
    # Keras's own `get_config` drops the name where `**` is not called `kwargs`.
    def __init__(self, **options):
        super().__init__(**options)


def test_a_layer_whose_config_has_no_name_is_refused():
    with pytest.raises(ValueError, match="`get_config` has no `name`"):
        graph.copy_layer(Nameless(name="own"))
