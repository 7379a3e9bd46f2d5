"""Post-activation residual networks for images of CIFAR's size."""

from tf_lowbit.compat import deep_graphs, keras
from tf_lowbit.models import blocks, layers


@deep_graphs()
def postact_resnet(
    depth: int,
    *,
    width: int = 16,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    weight_decay: float = 1e-4,
    name: str | None = None,
) -> keras.Model:
    """A CIFAR ResNet of `6 n + 2` layers, with BN and ReLU after the convolutions.

    He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, section
    4.2: a 3x3 convolution "stem" with "stem_bn" and "stem_relu"; three stages of n
    blocks with `width`, `2 width`, `4 width` channels and strides 1, 2, 2; average
    pooling and the dense layer "head". A block is two 3x3 convolutions with BN and a
    ReLU between them, then the sum with the shortcut and a ReLU. Where the shape
    changes, the shortcut is a 1x1 convolution "stage<s>_block1_shortcut" with BN
    "..._shortcut_bn" (option B of the paper). Other layers are
    "stage<s>_block<b>_conv1", "..._bn1", "..._relu1" and so on; the last block's output
    ReLU is "final_relu".

    Initial values, BN settings and padding are those of `preact_resnet`. Trainable
    parameters at width 16 with 10 classes: 78,042 (depth 8), 272,474 (20), 855,770
    (56).

    Args:
        depth: `6 n + 2` with n >= 1: 8, 14, 20, ...
        width: Channels of the first stage, at least 1.
        classes: Number of logits, at least 2.
        input_shape: (height, width, channels) of one image.
        weight_decay: As in `preact_resnet`.
        name: Name of the model; "postact_resnet<depth>" if None.

    Returns:
        A float Keras model, as `preact_resnet` returns.

    Raises:
        ValueError: If an argument is out of range.
    """
    counts = blocks.cifar_counts(depth)
    layers.check_common(
        width=width,
        classes=classes,
        input_shape=input_shape,
        weight_decay=weight_decay,
    )

    image = layers.image_input(input_shape)
    x = layers.conv(image, width, 3, name="stem", weight_decay=weight_decay)
    x = layers.batch_norm(x, name="stem_bn", weight_decay=weight_decay)
    x = layers.relu(x, name="stem_relu")
    for spec in blocks.layout(counts, width):
        x = blocks.postact_block(
            x,
            blocks.basic(spec.filters, spec.strides),
            weight_decay=weight_decay,
            name=spec.name,
            output_name="final_relu" if spec.last else None,
        )
    logits = layers.classifier(x, classes, weight_decay=weight_decay)
    return keras.Model(image, logits, name=name or f"postact_resnet{depth}")
