import pytest

from tests.models.counting import trainable
from tf_lowbit.compat import keras
from tf_lowbit.models import alexnet


@pytest.fixture(scope="module")
def model():
    return alexnet()


def test_parameter_count(model):
    convolutions = (
        (11 * 11 * 3 * 64 + 64)
        + (5 * 5 * 64 * 192 + 192)
        + (3 * 3 * 192 * 384 + 384)
        + (3 * 3 * 384 * 256 + 256)
        + (3 * 3 * 256 * 256 + 256)
    )
    dense = (6 * 6 * 256 * 4096 + 4096) + (4096 * 4096 + 4096) + (4096 * 1000 + 1000)
    assert convolutions + dense == 61_100_840  # torchvision, which has no BN
    norms = 2 * (64 + 192 + 384 + 256 + 256 + 4096 + 4096)
    assert trainable(model) == convolutions + dense + norms


def test_feature_maps_are_torchvisions(model):
    shapes = {
        "stem": (55, 55, 64),
        "stem_pool": (27, 27, 64),
        "conv2_pool": (13, 13, 192),
        "conv4": (13, 13, 256),
        "conv5_pool": (6, 6, 256),
        "head": (1000,),
    }
    for name, shape in shapes.items():
        assert model.get_layer(name).output_shape == (None, *shape)


def test_every_layer_but_the_head_has_batch_norm_and_relu(model):
    for name in ("stem", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2"):
        norm = model.get_layer(f"{name}_bn")
        assert norm.input is model.get_layer(name).output
        assert model.get_layer(f"{name}_relu").input is norm.output


def test_weight_decay_covers_every_variable(model):
    assert len(model.losses) == len(model.trainable_variables)


def test_dropout_is_off_unless_asked_for(model):
    assert not any(isinstance(x, keras.layers.Dropout) for x in model.layers)
    small = alexnet(dropout=0.5, input_shape=(63, 63, 3), classes=2)
    assert small.get_layer("fc1_dropout").rate == 0.5
    assert small.get_layer("conv5_pool").output_shape == (None, 1, 1, 256)


def test_refuses_arguments():
    with pytest.raises(ValueError, match=r"below 1\. Received: dropout=1.0"):
        alexnet(dropout=1.0)
    with pytest.raises(ValueError, match=r"at least 63 .*=\(62, 224, 3\)"):
        alexnet(input_shape=(62, 224, 3))
