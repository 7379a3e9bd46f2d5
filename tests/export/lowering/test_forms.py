"""What each layer becomes in a file: the file against the trained network."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import (
    EDGE,
    IMAGE,
    Rule,
    images,
    layers,
    network,
    normals,
    quantize,
    relative_error,
)
from tf_lowbit import export
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.lowering import forms
from tf_lowbit.export.tflite.runner import interpreter
from tf_lowbit.network import graph

W8A8 = [Rule(".*", 8, 8, "uniform", "uniform", edges=True)]
# Share of an output's deviation that W8A8's roundings may take. Each fault that these
# tests look for takes more than three times as much.
BOUND = 0.08


def error_of(model, tmp_path, x=None, **options):
    """`relative_error` of a float network's file at W8A8."""
    x = normals(64) if x is None else x
    quantized = tfl.quantize(model, W8A8)
    tfl.calibrate(quantized, [x])
    made = export.to_tflite(
        quantized, tmp_path / "net.tflite", [x], verbose=0, **options
    )
    assert export.verify(made.path, quantized, [x], verbose=0).ok
    return relative_error(quantized, made.path.read_bytes(), x)


def scaled(model, factor=3.0):
    """Weights as large as trained ones, so that activations are not linear there."""
    keras.utils.set_random_seed(0)
    for weight in model.trainable_weights:
        if weight.shape.rank > 1:
            weight.assign(factor * weight)
    return model


ACTIVATIONS = {
    **{name: name for name in ("tanh", "sigmoid", "swish", "gelu")},
    "relu6": tf.nn.relu6,
    "silu_of_tf": tf.nn.silu,
    "layer": layers.LeakyReLU(0.3),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("case", ACTIVATIONS)
def test_own_activations_are_in_the_file(case, readers, tmp_path):
    keras.utils.set_random_seed(1)
    image = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(5, 3, activation=ACTIVATIONS[case], name="first")(image)
    if readers == 1:
        x = layers.Conv2D(4, 3, name="inner")(x)
    else:
        y = layers.Conv2D(5, 3, padding="same", name="inner")(x)
        x = layers.Add(name="sum")([x, y])
    x = layers.Dense(3, name="head")(layers.Flatten()(x))
    model = scaled(keras.Model(image, x), 2.0)
    assert error_of(model, tmp_path) < BOUND


HEADS = {
    "conv_sigmoid": (
        lambda a: layers.Conv2D(1, 1, activation=a, name="head"),
        "sigmoid",
    ),
    "conv_softmax": (
        lambda a: layers.Conv2D(3, 1, activation=a, name="head"),
        "softmax",
    ),
    "dense_softmax": (lambda a: layers.Dense(5, activation=a, name="head"), "softmax"),
    "dense_tanh": (lambda a: layers.Dense(2, activation=a, name="head"), "tanh"),
}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["float", "int8"])
@pytest.mark.parametrize("case", HEADS)
def test_logits_behind_a_heads_own_activation_are_not_clipped(case, head, tmp_path):
    keras.utils.set_random_seed(1)
    made, activation = HEADS[case]
    image = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="first")(image)
    x = layers.Flatten()(x) if case.startswith("dense") else x
    model = scaled(keras.Model(image, made(activation)(x)))
    assert error_of(model, tmp_path, head=head) < BOUND


@pytest.mark.slow
def test_own_activations_of_a_saved_network_are_in_the_file(tmp_path):
    keras.utils.set_random_seed(1)
    image = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(5, 3, activation="tanh", name="first")(image)
    x = layers.Conv2D(5, 3, activation="swish", name="second")(x)
    x = layers.Dense(3, activation="softmax", name="head")(layers.Flatten()(x))
    quantized = tfl.quantize(scaled(keras.Model(image, x)), W8A8)
    x = normals(64)
    tfl.calibrate(quantized, [x])
    quantized.save(tmp_path / "net.keras")
    again = tfl.load_model(tmp_path / "net.keras")
    made = export.to_tflite(again, tmp_path / "net.tflite", [x], verbose=0)
    assert relative_error(quantized, made.path.read_bytes(), x) < BOUND
    assert again.get_layer("first").layer.activation is keras.activations.tanh


@pytest.mark.slow
def test_a_function_of_a_users_own_is_not_taken_for_keras_own():
    @keras.utils.register_keras_serializable(package="tests")
    def swish(x):
        return 2.0 * x

    model = quantize(network(layers.Activation(swish, name="odd")), [EDGE])
    with pytest.raises(export.ExportError, match=r"'odd' with 'swish'"):
        export.snap(model, [normals()])


TRAINING = {
    "batch_norm": layers.BatchNormalization,
    "dropout": lambda name: layers.Dropout(0.5, name=name),
    "spatial_dropout": lambda name: layers.SpatialDropout2D(0.5, name=name),
    "noise": lambda name: layers.GaussianNoise(0.5, name=name),
    "flip": lambda name: layers.RandomFlip(name=name),
}


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", TRAINING)
def test_a_call_with_training_is_refused(case, nested):
    layer = TRAINING[case](name="odd")

    def body(x):
        if not nested:
            return layer(x, training=True)
        inner = keras.Input(x.shape[1:])
        return keras.Model(inner, layer(inner), name="within")(x, training=True)

    model = network(body)
    (problem,) = export.check(model).problems
    assert problem.layer == "odd"
    assert "without `training`" in problem.remedy
    with pytest.raises(export.ExportError, match=r"'odd'.*training=True"):
        export.snap(quantize(model, [EDGE]), [normals()])


@pytest.mark.slow
def test_a_frozen_normalisation_called_with_training_uses_its_averages(tmp_path):
    layer = layers.BatchNormalization(name="norm")
    model = network(lambda x: layer(x, training=True))
    layer.trainable = False
    assert export.check(model).ok
    assert error_of(model, tmp_path) < BOUND


ALIASES = {
    "identity": layers.Identity,
    "linear": lambda: layers.Activation("linear"),
    "noise": lambda: layers.GaussianNoise(0.5),
    "gaussian_dropout": lambda: layers.GaussianDropout(0.5),
    "alpha_dropout": lambda: layers.AlphaDropout(0.5),
    "regularization": lambda: layers.ActivityRegularization(1e-3),
    "brightness": lambda: layers.RandomBrightness(0.2),
    "contrast": lambda: layers.RandomContrast(0.2),
    "flip": layers.RandomFlip,
    "rotation": lambda: layers.RandomRotation(0.2),
    "translation": lambda: layers.RandomTranslation(0.2, 0.2),
    "zoom": lambda: layers.RandomZoom(0.2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ALIASES)
def test_what_does_nothing_at_inference_is_left_out(case):
    model = quantize(network(lambda x: ALIASES[case]()(x)), [EDGE])
    snapped = export.snap(model, [normals()])
    kinds = {type(layer) for layer in snapped.twin.layers}
    assert type(ALIASES[case]()) not in kinds
    wanted = model(normals(), training=False).numpy()
    have = snapped.twin(normals()).numpy()
    assert np.abs(have - wanted).mean() < BOUND * wanted.std()


OPEN = {
    "up": lambda: layers.UpSampling2D(name="odd"),
    "crop": lambda: layers.Cropping2D(1, name="odd"),
    "average": lambda: layers.AveragePooling2D(name="odd"),
    "global_max": lambda: layers.GlobalMaxPooling2D(name="odd"),
}


@pytest.mark.parametrize("case", OPEN)
def test_layers_that_need_a_fixed_size_are_named(case):
    image = keras.Input((None, None, 2), name="image")
    x = OPEN[case]()(layers.Conv2D(4, 3, activation="relu", name="first")(image))
    x = x if case == "global_max" else layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    (problem,) = export.check(model).problems
    assert problem.layer == "odd"
    assert "set_weights" in problem.remedy


@pytest.mark.slow
def test_output_names_are_the_models(tmp_path):
    image = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="first")(image)
    x = layers.GlobalMaxPooling2D()(x)
    a = layers.Dense(3, activation="softmax", name="class_head")(x)
    b = layers.Dense(4, activation="relu", name="box_head")(x)
    for outputs, names in (
        ({"scores": a, "boxes": b}, {"scores": 3, "boxes": 4}),
        ([a, b], {"class_head": 3, "box_head": 4}),
    ):
        model = tfl.quantize(keras.Model(image, outputs), W8A8)
        tfl.calibrate(model, [normals()])
        made = export.to_tflite(model, tmp_path / "n.tflite", [normals()], verbose=0)
        run = interpreter(made.path.read_bytes())
        (signature,) = run.get_signature_list().values()
        assert set(signature["outputs"]) == set(names)
        found = run.get_signature_runner()(image=normals(1))
        assert {name: v.shape[-1] for name, v in found.items()} == names


@pytest.mark.slow
def test_a_file_of_two_uint8_inputs_is_right(tmp_path):
    a, b = (keras.Input((8, 8, 1), name=name) for name in "ab")
    x, y = (
        layers.Conv2D(4, 3, activation="relu", name=f"first_{i}")(t)
        for i, t in enumerate((a, b))
    )
    x = layers.Conv2D(4, 3, activation="relu", name="inner")(
        layers.Concatenate()([x, y])
    )
    model = keras.Model([a, b], layers.Dense(3, name="head")(layers.Flatten()(x)))
    model = tfl.quantize(model, W8A8)
    x = [images(8, (8, 8, 1), seed) for seed in (0, 1)]
    tfl.calibrate(model, [(x,)])
    made = export.to_tflite(
        model, tmp_path / "two.tflite", [(x,)], input_type="uint8", verbose=0
    )
    report = export.verify(made.path, model, [(x,)], verbose=0)
    assert report.ok, report.failures


@pytest.mark.slow
def test_a_dict_of_inputs_by_other_names_than_their_layers(tmp_path):
    inputs = {
        "near": keras.Input((8, 8, 1), name="b"),
        "far": keras.Input((8, 8, 1), name="a"),
    }
    x = layers.Concatenate()(
        [
            layers.Conv2D(3, 3, activation="relu", name=f"first_{name}")(tensor)
            for name, tensor in inputs.items()
        ]
    )
    x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu", name="inner")(x))
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    model = tfl.quantize(model, W8A8)
    batch = {name: images(8, (8, 8, 1), seed) for seed, name in enumerate(inputs)}
    tfl.calibrate(model, [batch])
    made = export.to_tflite(model, tmp_path / "n.tflite", [batch], verbose=0)
    for of in (model, made):
        report = export.verify(made.path, of, [batch], verbose=0)
        assert report.ok, report.failures
    wanted, found = model(batch).numpy(), made.twin(batch).numpy()
    assert np.abs(found - wanted).max() <= BOUND * wanted.std()


def test_the_remedy_for_another_relu_names_the_bounds_that_are_exported():
    x = layers.ReLU(max_value=1.0, name="to_one")(keras.Input(IMAGE))
    with pytest.raises(export.ExportError, match=r"use ReLU.*max_value=6.*to_one"):
        forms.form(graph.producer(x))
