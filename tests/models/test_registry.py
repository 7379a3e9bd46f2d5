import pytest

from tf_lowbit import models


def test_cifar_networks_of_any_depth():
    for name in ("preact_resnet26", "postact_resnet26"):
        assert name not in models.names()
        model = models.get(name, width=1, classes=3)
        assert model.name == name
        assert model.output_shape == (None, 3)


@pytest.mark.parametrize(
    "name", [name for name in models.names() if name != "preact_resnet110"]
)
def test_every_name_builds_the_network_so_called(name):
    # The smallest arguments that each takes, so that nothing large is built.
    small = {"alexnet": {"input_shape": (63, 63, 3)}}.get(name, {"width": 1})
    assert models.get(name, classes=2, **small).name == name


def test_preact_resnet18_is_the_imagenet_network():
    model = models.get("preact_resnet18", width=1)
    assert model.input_shape == (None, 224, 224, 3)
    assert model.output_shape == (None, 1000)


def test_errors():
    with pytest.raises(
        ValueError, match=r"one of .*resnet18, resnet50, alexnet.*name='vgg16'"
    ):
        models.get("vgg16")
    with pytest.raises(ValueError, match=r"depth must be 6n\+2 .* depth=9"):
        models.get("preact_resnet9")
    with pytest.raises(TypeError, match="width"):
        models.get("alexnet", width=2)


def test_a_name_of_the_network_is_one_of_its_arguments():
    assert models.get("preact_resnet8", width=1, name="mine").name == "mine"
