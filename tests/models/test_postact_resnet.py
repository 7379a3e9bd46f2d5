import re

import numpy as np
import pytest

from tests.models.counting import trainable
from tf_lowbit.compat import keras
from tf_lowbit.models import postact_resnet


def expected_parameters(depth, width, classes):
    """Trainable parameters in closed form, for three-channel images."""
    n = (depth - 2) // 6
    total = 27 * width + 2 * width
    for stage in range(3):
        w = width * 2**stage
        total += 2 * n * (9 * w * w + 2 * w)
        if stage > 0:  # Half a convolution less; a 1x1 one with its BN.
            total += w * (w // 2) + 2 * w - 9 * w * w // 2
    return total + 4 * width * classes + classes


@pytest.mark.parametrize(
    ("depth", "width", "classes", "known"),
    [(8, 16, 10, 78_042), (20, 16, 10, 272_474), (14, 4, 7, None)],
)
def test_parameter_count(depth, width, classes, known):
    count = trainable(postact_resnet(depth, width=width, classes=classes))
    assert count == expected_parameters(depth, width, classes)
    assert known in (None, count)


def test_shapes():
    model = postact_resnet(8, width=4, classes=5, input_shape=(15, 12, 1))
    assert model.input_shape == (None, 15, 12, 1)
    assert model.get_layer("stage1_block1_relu2").output_shape == (None, 15, 12, 4)
    assert model.get_layer("stage2_block1_relu2").output_shape == (None, 8, 6, 8)
    assert model.get_layer("final_relu").output_shape == (None, 4, 3, 16)
    assert model.output_shape == (None, 5)


def test_layers_and_their_names():
    model = postact_resnet(14, width=2)
    assert model.name == "postact_resnet14"
    assert postact_resnet(8, width=1, name="student").name == "student"
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


def test_where_it_normalizes_and_activates():
    model = postact_resnet(14, width=2)

    def output(name):
        return model.get_layer(name).output

    for stage in (2, 3):
        block = f"stage{stage}_block1"
        source = output(f"stage{stage - 1}_block2_relu2")
        shortcut = model.get_layer(f"{block}_shortcut")
        assert shortcut.input is source
        assert shortcut.strides == (2, 2)
        # The shortcut's convolution has its normalization.
        assert model.get_layer(f"{block}_shortcut_bn").input is shortcut.output
        assert model.get_layer(f"{block}_add").input == [
            output(f"{block}_bn2"),
            output(f"{block}_shortcut_bn"),
        ]
    # Elsewhere it is the identity of the block's input.
    assert model.get_layer("stage1_block1_add").input[1] is output("stem_relu")
    assert model.get_layer("final_relu").input is output("stage3_block2_add")
    norms = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert len(norms) == 13 + 2
    assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.9, 1e-5)}


def test_a_strided_convolution_pads_one_zero_on_every_side():
    """Keras's "same" pads an even size on one side only."""
    model = postact_resnet(8, width=1, classes=2, input_shape=(8, 8, 1))
    layer = model.get_layer("stage2_block1_conv1")
    before = keras.Model(model.input, model.get_layer("stage1_block1_relu2").output)
    after = keras.Model(model.input, layer.output)
    layer.set_weights([np.ones(layer.kernel.shape)])
    image = np.random.default_rng(0).random((1, 8, 8, 1)).astype("f")
    padded = np.pad(before(image).numpy()[0, :, :, 0], 1)
    expected = [
        [padded[i : i + 3, j : j + 3].sum() for j in range(0, 8, 2)]
        for i in range(0, 8, 2)
    ]
    np.testing.assert_allclose(after(image)[0, :, :, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [2, 9, 18, 8.0])
def test_refuses_a_depth(depth):
    message = f"depth must be 6n+2 with n >= 1 (8, 14, 20, ...). Received: {depth=}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        postact_resnet(depth)


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
        postact_resnet(8, **arguments)
