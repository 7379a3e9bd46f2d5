"""Recurrent layers as their cells: against Keras, and in files."""

import re

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import bn_relu, images, layers, randomize
from tf_lowbit import export
from tf_lowbit.compat import keras
from tf_lowbit.export.lowering import forms
from tf_lowbit.export.tflite import flatbuffer

STEPS, FEATURES, UNITS = 7, 3, 4
CELLS = {
    "lstm": (layers.LSTM, {}),
    "lstm, all steps": (layers.LSTM, {"return_sequences": True}),
    "lstm, backwards": (
        layers.LSTM,
        {"return_sequences": True, "go_backwards": True},
    ),
    "lstm, no bias": (layers.LSTM, {"use_bias": False, "activation": "relu"}),
    "gru": (layers.GRU, {}),
    "gru, all steps": (layers.GRU, {"return_sequences": True}),
    "gru, no bias": (layers.GRU, {"use_bias": False}),
    "gru of 2014": (layers.GRU, {"reset_after": False}),
    "gru of 2014, no bias": (layers.GRU, {"reset_after": False, "use_bias": False}),
}
RULES = [
    tfl.PrecisionRule("first|head", 8, 8, "uniform", "uniform"),
    tfl.PrecisionRule(".*", 2, 3, "lsq", "lsq"),
]


def random_weights(model):
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])


@pytest.mark.quick(3)
@pytest.mark.parametrize("steps", [STEPS, 1])
@pytest.mark.parametrize("name", CELLS)
def test_step_by_step_it_is_what_keras_computes(name, steps):
    kind, settings = CELLS[name]
    series = keras.Input((steps, FEATURES))
    model = keras.Model(series, kind(UNITS, name="cell", **settings)(series))
    random_weights(model)
    made = forms.as_layers(model)
    assert made.output_names == ["cell"]
    assert kind not in {type(layer) for layer in made.layers}
    x = np.random.default_rng(1).normal(size=(5, steps, FEATURES)).astype(np.float32)
    np.testing.assert_allclose(made(x), model(x), atol=1e-5)


def tailed(tail, shape=(12, 3)):
    """A quantized network of two convolutions, a tail and a head; and its data."""
    series = keras.Input(shape, name="series")
    x = layers.Conv1D(4, 3, padding="same", use_bias=False, name="first")(series)
    x = layers.Conv1D(6, 3, padding="same", use_bias=False, name="inner")(
        bn_relu(x, "first")
    )
    x = tail(bn_relu(x, "inner"))
    model = randomize(keras.Model(series, layers.Dense(3, name="head")(x)))
    quantized = tfl.quantize(model, RULES)
    data = images(16, shape)
    tfl.calibrate(quantized, [data])
    return quantized, data


def prove_everywhere(model, data, folder):
    """In TFLite and TFLite Micro against the network, and in QONNX."""
    path = folder / "net.tflite"
    for target in ("xnnpack", "tflm"):
        made = export.to_tflite(model, path, [data], target=target, verbose=0)
        report = export.verify(path, model, [data], verbose=0)
        assert report.ok, (target, report.failures)
        assert report.mismatches == 0 < report.codes
        # What the tail reads is rounded to 8 bits, and TFLite Micro's head, too.
        np.testing.assert_allclose(
            made.twin(data), model(data), atol=0.05 * float(np.std(model(data)))
        )
    export.to_qonnx(model, folder / "net.onnx", batch_size=8)
    found = export.compare_qonnx(folder / "net.onnx", model, data)
    assert not any(found.different.values()), str(found)
    assert found.error < 1e-3
    return made


@pytest.mark.slow
# A step: slice, dequantize, join, four dense layers; the rest by the cell's kind.
@pytest.mark.parametrize(
    ("kind", "in_a_step"),
    [(layers.LSTM, 7 + 3 + 2 + 3 + 1), (layers.GRU, 7 + 2 + 1 + 3 + 2 + 2)],
)
def test_a_tail_stays_in_float_behind_the_integer_body(kind, in_a_step, tmp_path):
    model, data = tailed(kind(UNITS, name="cell"))
    assert export.check(model).ok
    made = prove_everywhere(model, data, tmp_path)
    notes = {note.layer: note.text for note in made.notes}
    assert notes["cell"] == "computes in float, as it was trained"
    # The steps share the weights.
    graph = flatbuffer.unpack((tmp_path / "net.tflite").read_bytes()).subgraphs[0]
    kernels = [t for t in graph.tensors if len(t.shape) == 2 and t.buffer]
    stored = {t.name for t in kernels if b"cell" in t.name and b"weights" in t.name}
    assert len(stored) == 5
    outputs = [graph.tensors[operator.outputs[0]].name for operator in graph.operators]
    # In front the first state, of three; behind a reshape and the head's quantizer.
    count = sum(name.startswith(b"cell") for name in outputs)
    assert count == 3 + 12 * in_a_step + 3


@pytest.mark.slow
def test_an_accelerator_for_int8_refuses_it_by_name():
    model, _ = tailed(layers.LSTM(UNITS, name="cell"))
    (problem,) = export.check(model, target="int8").problems
    assert (problem.layer, problem.type) == ("cell", "LSTM")
    assert problem.received == "of type LSTM, which needs LOGISTIC, MUL, TANH"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation": "elu"}, "Activations must be one of"),
        ({"recurrent_activation": "hard_sigmoid"}, "Activations must be one of"),
        ({"time_major": True}, "must read one series.*time_major=True"),
        ({"return_state": True}, "must have one output"),
    ],
)
def test_what_has_no_form_is_named(settings, words):
    series = keras.Input((STEPS, FEATURES), batch_size=2)
    x = layers.LSTM(UNITS, name="odd", **settings)(series)
    x = x[0] if isinstance(x, list) else x
    (problem,) = export.check(keras.Model(series, x)).problems
    assert problem.layer == "odd"
    assert re.search(words, str(problem))


def test_of_two_directions_the_remedy_is_exported():
    series = keras.Input((STEPS, FEATURES))
    both = layers.Bidirectional(layers.GRU(UNITS), name="odd")(series)
    (problem,) = export.check(keras.Model(series, both)).problems
    assert (problem.layer, problem.type) == ("odd", "Bidirectional")
    assert "go_backwards=True" in problem.remedy
    parts = [layers.GRU(UNITS, go_backwards=back)(series) for back in (False, True)]
    assert export.check(keras.Model(series, layers.Concatenate()(parts))).ok


def test_a_first_state_and_open_steps_are_named():
    series, state = keras.Input((STEPS, FEATURES)), keras.Input((UNITS,))
    x = layers.GRU(UNITS, name="odd")(series, initial_state=state)
    (problem,) = export.check(keras.Model([series, state], x)).problems
    assert "start from a state of zeros" in problem.reason
    series = keras.Input((None, FEATURES))
    x = layers.GRU(UNITS, name="odd")(series)
    (problem,) = export.check(keras.Model(series, x)).problems
    assert "fixed size" in problem.reason
