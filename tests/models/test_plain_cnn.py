import numpy as np
import pytest

import tf_lowbit as tfl
from tests.models.counting import trainable
from tf_lowbit.compat import keras
from tf_lowbit.models import plain_cnn
from tf_lowbit.network import inspection

CONVOLUTIONS = ["stem", "conv1", "conv2", "conv3", "conv4"]


def test_parameter_count():
    convolutions = 9 * (1 * 16 + 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64)
    norms = 2 * (16 + 16 + 32 + 32 + 64)
    head = 64 * 10 + 10
    assert convolutions + norms + head == 35_674  # as the docstring says
    assert trainable(plain_cnn()) == convolutions + norms + head


def test_width_classes_and_channels_set_the_size():
    convolutions = 9 * (3 * 2 + 2 * 2 + 2 * 4 + 4 * 4 + 4 * 8)
    norms = 2 * (2 + 2 + 4 + 4 + 8)
    model = plain_cnn(width=2, classes=7, input_shape=(32, 32, 3))
    assert trainable(model) == convolutions + norms + (8 * 7 + 7)


@pytest.mark.parametrize(
    ("input_shape", "half", "quarter"),
    [
        ((28, 28, 1), (14, 14), (7, 7)),
        ((32, 32, 3), (16, 16), (8, 8)),
        ((8, 8, 1), (4, 4), (2, 2)),
        ((15, 22, 2), (7, 11), (3, 5)),
        ((4, 7, 1), (2, 3), (1, 1)),
    ],
)
def test_shapes(input_shape, half, quarter):
    model = plain_cnn(width=2, classes=3, input_shape=input_shape)
    shapes = {
        "stem": (*input_shape[:2], 2),
        "conv1": (*input_shape[:2], 2),
        "conv1_pool": (*half, 2),
        "conv2": (*half, 4),
        "conv3": (*half, 4),
        "conv3_pool": (*quarter, 4),
        "conv4": (*quarter, 8),
        "avg_pool": (8,),
        "head": (3,),
    }
    for name, shape in shapes.items():
        assert model.get_layer(name).output_shape == (None, *shape)

    logits = model(np.random.default_rng(0).normal(size=(2, *input_shape)))

    assert logits.shape == (2, 3)
    assert np.all(np.isfinite(logits))


def test_layers_and_their_names():
    model = plain_cnn(width=1)
    assert model.name == "plain_cnn"
    assert plain_cnn(width=1, name="student").name == "student"
    names = ["image"]
    for layer in CONVOLUTIONS:
        names += [layer, f"{layer}_bn", f"{layer}_relu"]
        names += [f"{layer}_pool"] if layer in ("conv1", "conv3") else []
    assert [layer.name for layer in model.layers] == [*names, "avg_pool", "head"]
    # A chain: each layer reads the one before.
    for before, layer in zip(model.layers, model.layers[1:], strict=False):
        assert layer.input is before.output
    assert not any(model.get_layer(name).use_bias for name in CONVOLUTIONS)


def test_weight_decay_covers_every_variable():
    model = plain_cnn(width=1)
    assert len(model.losses) == len(model.trainable_variables)
    assert plain_cnn(width=1, weight_decay=0.0).losses == []


def test_the_default_rules_leave_the_edges_float():
    model = tfl.quantize(plain_cnn(width=2, input_shape=(8, 8, 1)), strict=True)
    bits = {t.name: t.bits for t in inspection.quantized_tensors(model)}
    kernels = {f"conv{i}/kernel": 2 for i in range(1, 5)}
    relus = ("stem_relu", "conv1_relu", "conv2_relu", "conv3_relu")
    assert bits == kernels | {f"{relu}/output": 2 for relu in relus}
    assert type(model.get_layer("head")) is keras.layers.Dense
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1))
    assert np.all(np.isfinite(model(x)))
    for tensor in inspection.quantized_tensors(model):
        if tensor.latent is not None:
            assert len(np.unique(tensor.quantized())) <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be an integer of at least 1. Received: width=0"),
        ({"classes": 1}, "classes must be an integer of at least 2. Received"),
        ({"input_shape": (3, 8, 1)}, r"at least 4 .*input_shape=\(3, 8, 1\)"),
        ({"input_shape": (28, 28)}, r"Received: input_shape=\(28, 28\)"),
        ({"weight_decay": -1.0}, "Received: weight_decay=-1.0"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        plain_cnn(**arguments)
