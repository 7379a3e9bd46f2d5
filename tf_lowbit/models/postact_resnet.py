"""Post-activation residual networks for images of CIFAR's size."""

from tf_lowbit.compat import deep_graphs, keras
from tf_lowbit.core import checks
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

    He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385,
    section 4.2: a 3x3 convolution "stem" with "stem_bn" and "stem_relu"; three
    stages of n blocks with `width`, `2 width`, `4 width` channels and strides
    1, 2, 2; average pooling and the dense layer "head". A block is twice a 3x3
    convolution with BN, a ReLU between them, the shortcut's sum and a ReLU. Where
    the shape changes, the shortcut is a 1x1 convolution
    "stage<s>_block1_shortcut" with BN "..._shortcut_bn" (option B of the paper).
    Other layers are called "stage<s>_block<b>_conv1", "..._bn1", "..._relu1" and so
    on; the last block's output ReLU is called "final_relu".

    Initial values, BN settings and padding are those of `preact_resnet`.
    Trainable parameters at width 16 with 10 classes: 78,042 (depth 8), 272,474 (20),
    855,770 (56).

    Args:
        depth: `6 n + 2` with n >= 1: 8, 14, 20, ...
        width: Channels of the first stage.
        classes: Number of logits.
        input_shape: (height, width, channels) of one image.
        weight_decay: Coupled weight decay as torch has it, on kernels, biases and
            BN scale and offset: the loss gains `weight_decay / 2 * sum(w**2)`.
        name: Name of the model; "postact_resnet<depth>" if None.

    Returns:
        An unquantized, uncompiled Keras model from float images of shape
        (batch, *input_shape) to float logits (no softmax) of shape
        (batch, classes), in the dtype of the policy's variables (float32).

    Raises:
        ValueError: If `depth` is not 6n+2, `width` is below 1, `classes` is below
            2, `input_shape` is not three positive integers, or `weight_decay` is
            negative.
    """
    counts = blocks.cifar_counts(depth)
    checks.integer("width", width, at_least=1)
    layers.check_common(
        classes=classes, input_shape=input_shape, weight_decay=weight_decay
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
