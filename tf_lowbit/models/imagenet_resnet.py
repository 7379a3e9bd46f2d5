"""Residual networks for images of ImageNet's size.

ResNet-18, ResNet-50, and the pre-activation ResNet-18, from whose pretrained weights
the ImageNet recipes start.
"""

from collections.abc import Sequence

from tf_lowbit.compat import keras
from tf_lowbit.models import blocks, layers


def _stem(input_shape: Sequence[int], width: int, weight_decay: float):
    """Returns the input and its quarter-size activation."""
    image = layers.image_input(input_shape)
    x = layers.conv(image, width, 7, strides=2, name="stem", weight_decay=weight_decay)
    x = layers.batch_norm(x, name="stem_bn", weight_decay=weight_decay)
    x = layers.relu(x, name="stem_relu")
    # torch pads max pooling with -inf. After a ReLU zeros do the same.
    x = keras.layers.ZeroPadding2D(1, name="stem_pool_pad")(x)
    return image, keras.layers.MaxPooling2D(3, 2, name="stem_pool")(x)


def _postact_resnet(
    plan, counts, *, width, classes, input_shape, weight_decay, name
) -> keras.Model:
    layers.check_common(
        width=width,
        classes=classes,
        input_shape=input_shape,
        weight_decay=weight_decay,
    )
    image, x = _stem(input_shape, width, weight_decay)
    for block in blocks.layout(counts, width):
        x = blocks.postact_block(
            x,
            plan(block.filters, block.strides),
            weight_decay=weight_decay,
            name=block.name,
            # The recipes leave this one float in every residual network; one name
            # lets one rule match it.
            output_name="final_relu" if block.last else None,
        )
    logits = layers.classifier(x, classes, weight_decay=weight_decay)
    return keras.Model(image, logits, name=name)


def resnet18(
    *,
    width: int = 64,
    classes: int = 1000,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    weight_decay: float = 1e-4,
    name: str | None = None,
) -> keras.Model:
    """ResNet-18, with BN and ReLU after the convolutions.

    He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, with
    torchvision's geometry: explicit zero padding, shortcut convolutions with BN. The
    layers are "stem" (7x7, stride 2), "stem_bn", "stem_relu", "stem_pool"; four stages
    of two blocks with `width` times 1, 2, 4, 8 channels and strides 1, 2, 2, 2;
    "avg_pool" and "head". A block's layers are "stage<s>_block<b>_conv1", "..._bn1",
    "..._relu1" and so on, "..._shortcut", "..._shortcut_bn" and "..._add"; the last
    block's output ReLU is "final_relu".

    Initial values and BN settings are those of `preact_resnet`. With the default
    arguments there are 11,689,512 trainable parameters.

    Args:
        width: Channels of the stem and the first stage, at least 1.
        classes: Number of logits, at least 2.
        input_shape: (height, width, channels) of one image.
        weight_decay: As in `preact_resnet`.
        name: Name of the model; "resnet18" if None.

    Returns:
        A float Keras model, as `preact_resnet` returns.

    Raises:
        ValueError: If an argument is out of range.
    """
    return _postact_resnet(
        blocks.basic,
        (2, 2, 2, 2),
        width=width,
        classes=classes,
        input_shape=input_shape,
        weight_decay=weight_decay,
        name=name or "resnet18",
    )


def resnet50(
    *,
    width: int = 64,
    classes: int = 1000,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    weight_decay: float = 1e-4,
    name: str | None = None,
) -> keras.Model:
    """ResNet-50, with BN and ReLU after the convolutions.

    Like `resnet18`, with 3, 4, 6 and 3 bottleneck blocks: 1x1, 3x3 and 1x1
    convolutions, the last with four times the channels. A block's stride is in its 3x3
    convolution, as in torchvision ("v1.5"); arXiv:1512.03385 has it in the first 1x1.
    With the default arguments there are 25,557,032 trainable parameters.

    Args:
        width: Channels of the stem and of the first stage's 3x3 convolutions, at least
            1.
        classes: Number of logits, at least 2.
        input_shape: (height, width, channels) of one image.
        weight_decay: As in `preact_resnet`.
        name: Name of the model; "resnet50" if None.

    Returns:
        A float Keras model, as `preact_resnet` returns.

    Raises:
        ValueError: If an argument is out of range.
    """
    return _postact_resnet(
        blocks.bottleneck,
        (3, 4, 6, 3),
        width=width,
        classes=classes,
        input_shape=input_shape,
        weight_decay=weight_decay,
        name=name or "resnet50",
    )


def preact_resnet18(
    *,
    width: int = 64,
    classes: int = 1000,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    weight_decay: float = 1e-4,
    name: str | None = None,
) -> keras.Model:
    """ResNet-18 for ImageNet, with BN and ReLU before the convolutions.

    He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027, in the
    form that the low-bitwidth papers' code trains. The stem is that of `resnet18`. It
    ends in an activation, so "stage1_block1" has no "_bn1" and no "_relu1" before its
    first convolution. In each stage's first block the shortcut starts from the block's
    first activation; where the shape changes it is a 1x1 convolution without BN. The
    last block is followed by "final_bn", "final_relu", "avg_pool" and "head".

    This is not `preact_resnet(18)`, which does not exist: 18 is not 6n+2. With the
    default arguments there are 11,687,720 trainable parameters.

    Args:
        width: Channels of the stem and the first stage, at least 1.
        classes: Number of logits, at least 2.
        input_shape: (height, width, channels) of one image.
        weight_decay: As in `preact_resnet`.
        name: Name of the model; "preact_resnet18" if None.

    Returns:
        A float Keras model, as `preact_resnet` returns.

    Raises:
        ValueError: If an argument is out of range.
    """
    layers.check_common(
        width=width,
        classes=classes,
        input_shape=input_shape,
        weight_decay=weight_decay,
    )
    image, x = _stem(input_shape, width, weight_decay)
    for index, block in enumerate(blocks.layout((2, 2, 2, 2), width)):
        x = blocks.preact_block(
            x,
            blocks.basic(block.filters, block.strides),
            first=block.first,
            activated=index == 0,
            weight_decay=weight_decay,
            name=block.name,
        )
    x = layers.batch_norm(x, name="final_bn", weight_decay=weight_decay)
    x = layers.relu(x, name="final_relu")
    logits = layers.classifier(x, classes, weight_decay=weight_decay)
    return keras.Model(image, logits, name=name or "preact_resnet18")
