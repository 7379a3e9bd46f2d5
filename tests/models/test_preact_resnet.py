import re

import numpy as np
import pytest

from tests.models.counting import trainable
from tf_lowbit.compat import keras
from tf_lowbit.models import preact_resnet


def expected_parameters(depth, width, classes):
    """Trainable parameters in closed form, for three-channel images.

    A stage of n blocks at w channels has 2n 3x3 convolutions and 2n BNs at w;
    entering from w/2 channels halves one convolution and one BN and adds a 1x1.
    """
    n = (depth - 2) // 6
    total = 27 * width
    for stage in range(3):
        w = width * 2**stage
        total += 2 * n * (9 * w * w + 2 * w)
        if stage > 0:
            total += w * (w // 2) - 9 * w * w // 2 - w
    last = 4 * width
    return total + 2 * last + last * classes + classes


@pytest.mark.parametrize(
    ("depth", "width", "classes"), [(8, 16, 10), (20, 16, 10), (14, 4, 7)]
)
def test_parameter_count(depth, width, classes):
    model = preact_resnet(depth, width=width, classes=classes)
    assert trainable(model) == expected_parameters(depth, width, classes)


def test_resnet20_has_the_published_size():
    # arXiv:1512.03385, table 6: 0.27M.
    assert round(expected_parameters(20, 16, 10) / 1e6, 2) == 0.27


def test_shapes():
    model = preact_resnet(8, width=4, classes=5, input_shape=(15, 12, 1))
    assert model.input_shape == (None, 15, 12, 1)
    assert model.get_layer("stage1_block1_add").output_shape == (None, 15, 12, 4)
    assert model.get_layer("stage2_block1_add").output_shape == (None, 8, 6, 8)
    assert model.get_layer("stage3_block1_add").output_shape == (None, 4, 3, 16)

    logits = model(np.random.default_rng(0).normal(size=(2, 15, 12, 1)))

    assert logits.shape == (2, 5)
    # Logits, not probabilities.
    assert not np.allclose(np.sum(logits, axis=-1), 1.0)


def test_layers_and_their_names():
    model = preact_resnet(14, width=2)
    names = [layer.name for layer in model.layers]
    assert len(set(names)) == len(names)
    assert names == [layer.name for layer in preact_resnet(14, width=2).layers]
    assert model.name == "preact_resnet14"
    assert preact_resnet(8, width=1, name="student").name == "student"

    convs = [
        layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)
    ]
    # depth = the convolutions and the head, not counting shortcuts.
    assert len([name for name in convs if "shortcut" not in name]) + 1 == 14
    assert [name for name in convs if "shortcut" in name] == [
        "stage2_block1_shortcut",
        "stage3_block1_shortcut",
    ]
    assert all(not model.get_layer(name).use_bias for name in convs)


def test_the_shortcut_of_a_first_block_takes_the_activation():
    model = preact_resnet(14, width=2)

    def output(name):
        return model.get_layer(name).output

    def added(name):
        return model.get_layer(name).input

    for block in ("stage2_block1", "stage3_block1"):
        shortcut = model.get_layer(f"{block}_shortcut")
        assert shortcut.input is output(f"{block}_relu1")
        assert shortcut.strides == (2, 2)
        assert added(f"{block}_add")[1] is shortcut.output
    # The first stage does not change the shape: its first block has the identity
    # of the same activation, all later blocks that of their input.
    assert added("stage1_block1_add")[1] is output("stage1_block1_relu1")
    assert added("stage1_block2_add")[1] is output("stage1_block1_add")
    assert added("stage2_block2_add")[1] is output("stage2_block1_add")


def test_batch_norm_settings():
    model = preact_resnet(8, width=2)
    norms = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert len(norms) == 7
    assert {norm.momentum for norm in norms} == {0.9}
    assert {norm.epsilon for norm in norms} == {1e-5}


def test_weight_decay_is_that_of_torch_on_every_variable():
    decay = 0.02
    model = preact_resnet(8, width=2, weight_decay=decay)
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables:  # no bias or offset may be zero
        variable.assign(generator.normal(size=variable.shape))

    expected = sum(
        0.5 * decay * np.sum(np.square(v.numpy())) for v in model.trainable_variables
    )

    assert len(model.losses) == len(model.trainable_variables)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_without_weight_decay_there_are_no_losses():
    assert preact_resnet(8, width=2, weight_decay=0.0).losses == []


@pytest.mark.parametrize("depth", [2, 9, 18, -4, 8.0, True])
def test_refuses_a_depth(depth):
    message = f"depth must be 6n+2 with n >= 1 (8, 14, 20, ...). Received: {depth=}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        preact_resnet(depth)


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be an integer of at least 1. Received: width=0"),
        ({"classes": 1}, "classes must be an integer of at least 2. Received"),
        ({"input_shape": (32, 32)}, r"Received: input_shape=\(32, 32\)"),
        ({"weight_decay": -1.0}, "Received: weight_decay=-1.0"),
    ],
)
def test_refuses_other_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        preact_resnet(8, **arguments)
