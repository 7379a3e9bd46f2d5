"""A plain chain of 3x3 convolutions for small images."""

from tf_lowbit.compat import keras
from tf_lowbit.models import layers

# Name, filters in units of the width, whether max pooling follows.
_CONVOLUTIONS = (
    ("stem", 1, False),
    ("conv1", 1, True),
    ("conv2", 2, False),
    ("conv3", 2, True),
    ("conv4", 4, False),
)


def plain_cnn(
    *,
    width: int = 16,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (28, 28, 1),
    weight_decay: float = 1e-4,
    name: str | None = None,
) -> keras.Model:
    """Five 3x3 convolutions in a chain with BN, similar to VGG.

    After Simonyan and Zisserman, Very Deep Convolutional Networks, arXiv:1409.1556, but
    much smaller: "stem" and "conv1" with `width` channels, "conv2" and "conv3" with `2
    width`, "conv4" with `4 width`, each followed by "<layer>_bn" and "<layer>_relu";
    2x2 max poolings "conv1_pool" and "conv3_pool", which drop the last row or column of
    an odd size, as torch's do; average pooling and the dense layer "head".

    Convolutions have no bias. Initial values and BN settings are those of
    `preact_resnet`. With the default arguments there are 35,674 trainable parameters.

    Args:
        width: Channels of the stem, at least 1.
        classes: Number of logits, at least 2.
        input_shape: (height, width, channels) of one image, height and width at least
            4.
        weight_decay: As in `preact_resnet`.
        name: Name of the model; "plain_cnn" if None.

    Returns:
        A float Keras model, as `preact_resnet` returns.

    Raises:
        ValueError: If an argument is out of range.
    """
    # Below 4 pixels nothing is left after the second pooling.
    layers.check_common(
        width=width,
        classes=classes,
        input_shape=input_shape,
        weight_decay=weight_decay,
        min_size=4,
    )

    x = image = layers.image_input(input_shape)
    for layer, multiple, pooled in _CONVOLUTIONS:
        x = layers.conv(x, multiple * width, 3, name=layer, weight_decay=weight_decay)
        x = layers.batch_norm(x, name=f"{layer}_bn", weight_decay=weight_decay)
        x = layers.relu(x, name=f"{layer}_relu")
        if pooled:
            x = keras.layers.MaxPooling2D(2, name=f"{layer}_pool")(x)
    logits = layers.classifier(x, classes, weight_decay=weight_decay)
    return keras.Model(image, logits, name=name or "plain_cnn")
