import numpy as np
import pytest

from tests.models.counting import trainable
from tf_lowbit.compat import keras
from tf_lowbit.models import preact_resnet18, resnet18, resnet50

NETWORKS = [resnet18, resnet50, preact_resnet18]


def test_parameters_of_resnet18_are_torchvisions():
    assert trainable(resnet18()) == 11_689_512


def test_resnet50_has_torchvisions_parameters_and_strides():
    model = resnet50()
    assert trainable(model) == 25_557_032
    # Version 1.5: the stride is in the 3x3 convolution.
    assert model.get_layer("stage2_block1_conv1").strides == (1, 1)
    assert model.get_layer("stage2_block1_conv2").strides == (2, 2)
    # Stage 1 keeps the size, but has four times the channels of the stem.
    assert model.get_layer("stage1_block1_shortcut").strides == (1, 1)
    assert model.get_layer("final_relu").output_shape == (None, 7, 7, 2048)


def test_parameters_of_preact_resnet18():
    # The convolutions and the stem's BN are those of ResNet-18. The shortcuts have
    # no BN. A block's BNs stand in front of its convolutions: the first one of
    # stages 2 to 4 has the channels of the stage before, that of stage 1 is
    # missing, and final_bn is added.
    shortcuts = 2 * (128 + 256 + 512)
    postact = 2 * (4 * 64 + 4 * 128 + 4 * 256 + 4 * 512)
    preact = 2 * (3 * 64 + (64 + 3 * 128) + (128 + 3 * 256) + (256 + 3 * 512) + 512)
    assert trainable(preact_resnet18()) == 11_689_512 - shortcuts - postact + preact


@pytest.mark.parametrize("network", NETWORKS)
def test_small_version(network):
    model = network(width=2, classes=4, input_shape=(64, 96, 3))
    assert model.name == network.__name__
    names = [layer.name for layer in model.layers]
    assert len(set(names)) == len(names)
    assert {"stem", "stem_relu", "final_relu", "head"} <= set(names)
    # Halved five times.
    assert model.get_layer("final_relu").output_shape[1:3] == (2, 3)
    assert len(model.losses) == len(model.trainable_variables)

    logits = model(np.zeros((2, 64, 96, 3), "float32"))

    assert logits.shape == (2, 4)
    assert np.all(np.isfinite(logits))


def test_depth_counts_convolutions_and_head():
    for network, depth in [(resnet18, 18), (resnet50, 50), (preact_resnet18, 18)]:
        convs = [
            layer
            for layer in network(width=1, input_shape=(32, 32, 3)).layers
            if isinstance(layer, keras.layers.Conv2D) and "shortcut" not in layer.name
        ]
        assert len(convs) + 1 == depth


def test_stem_pooling_is_torchs():
    model = resnet18(width=2, input_shape=(12, 16, 3))
    pool = keras.Model(
        model.get_layer("stem_relu").output, model.get_layer("stem_pool").output
    )
    x = np.random.default_rng(0).normal(size=(1, 6, 8, 2)).astype("float32")
    x = np.maximum(x, 0.0)
    padded = np.pad(
        x[0], ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf
    )  # as torch does
    expected = [
        [padded[i : i + 3, j : j + 3].max(axis=(0, 1)) for j in (0, 2, 4, 6)]
        for i in (0, 2, 4)
    ]
    np.testing.assert_array_equal(pool(x)[0], expected)


def test_shortcuts_after_and_before_activation():
    post = resnet18(width=2, input_shape=(32, 32, 3))
    shortcut = post.get_layer("stage2_block1_shortcut")
    assert shortcut.input is post.get_layer("stage1_block2_relu2").output
    norm = post.get_layer("stage2_block1_shortcut_bn")
    assert post.get_layer("stage2_block1_add").input[1] is norm.output

    pre = preact_resnet18(width=2, input_shape=(32, 32, 3))
    # The pooled stem is an activation: no second BN-ReLU, and the identity of it.
    pooled = pre.get_layer("stem_pool").output
    assert pre.get_layer("stage1_block1_conv1").input is pooled
    assert pre.get_layer("stage1_block1_add").input[1] is pooled
    shortcut = pre.get_layer("stage2_block1_shortcut")
    assert shortcut.input is pre.get_layer("stage2_block1_relu1").output
    assert pre.get_layer("stage2_block1_add").input[1] is shortcut.output


@pytest.mark.parametrize("network", NETWORKS)
def test_refuses_arguments(network):
    with pytest.raises(ValueError, match=r"width must be .* Received: width=0"):
        network(width=0)
    with pytest.raises(ValueError, match=r"classes must be .* Received: classes=1"):
        network(classes=1)
