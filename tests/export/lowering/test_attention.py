"""Attention as its products: against Keras, and in files."""

import numpy as np
import pytest

from tests.export.lowering.test_recurrent import (
    prove_everywhere,
    random_weights,
    tailed,
)
from tests.export.networks import layers
from tf_lowbit import export
from tf_lowbit.compat import keras
from tf_lowbit.export.lowering import forms

SHAPE = (7, 3)
SETTINGS = {
    "two heads": {"num_heads": 2, "key_dim": 4},
    "one head": {"num_heads": 1, "key_dim": 4, "output_shape": 5},
    "six heads, values of their own size": {
        "num_heads": 6,
        "key_dim": 2,
        "value_dim": 3,
        "use_bias": False,
    },
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_what_keras_computes(name):
    query, value, key = (keras.Input((n, 3)) for n in (7, 5, 5))
    layer = layers.MultiHeadAttention(name="attention", **SETTINGS[name])
    outputs = [layer(query, value), layer(query, key=key, value=value)]
    model = keras.Model([query, value, key], outputs)
    random_weights(model)
    made = forms.as_layers(model)
    assert layers.MultiHeadAttention not in {type(layer) for layer in made.layers}
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(2, n, 3)).astype(np.float32) for n in (7, 5, 5)]
    for have, want in zip(made(x), model(x), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)


@pytest.mark.slow
def test_a_tail_stays_in_float_behind_the_integer_body(tmp_path):
    def tail(x):
        y = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        x = layers.LayerNormalization(name="norm")(layers.Add(name="sum")([x, y]))
        return layers.GlobalAveragePooling1D(name="pool")(x)

    model, data = tailed(tail)
    made = prove_everywhere(model, data, tmp_path)
    notes = {note.layer: note.text for note in made.notes}
    assert notes["attention"] == "computes in float, as it was trained"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"use_causal_mask": True}, "without a mask"),
        ({"attention_mask": np.ones((1, 7, 7), bool)}, "without a mask"),
    ],
)
def test_masks_are_refused_by_name(call, words):
    series = keras.Input(SHAPE)
    x = layers.MultiHeadAttention(2, 4, name="odd")(series, series, **call)
    (problem,) = export.check(keras.Model(series, x)).problems
    assert problem.layer == "odd"
    assert words in problem.reason


def test_of_attention_without_heads_the_remedy_is_exported():
    series = keras.Input(SHAPE)
    x = layers.Attention(name="odd")([series, series])
    (problem,) = export.check(keras.Model(series, x)).problems
    assert problem.remedy == "write it as Dot(axes=2), Softmax and Dot(axes=(2, 1))"
    y = layers.Softmax()(layers.Dot(2)([series, series]))
    model = keras.Model(series, [x, layers.Dot((2, 1))([y, series])])
    values = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(*model(values), atol=1e-5)
    assert export.check(keras.Model(series, model.outputs[1])).ok


@pytest.mark.parametrize(
    "settings", [{"axes": 1}, {"axes": (1, 2)}, {"axes": 2, "normalize": True}]
)
def test_other_products_are_refused_by_name(settings):
    series = keras.Input((3, 3))
    x = layers.Dot(name="odd", **settings)([series, series])
    (problem,) = export.check(keras.Model(series, x)).problems
    assert problem.layer == "odd"
    assert "axes=2 or axes=(2, 1)" in problem.reason
