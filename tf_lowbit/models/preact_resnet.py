"""Pre-activation residual networks for images of CIFAR's size."""

from tf_lowbit.compat import deep_graphs, keras
from tf_lowbit.models import blocks, layers


@deep_graphs()
def preact_resnet(
    depth: int,
    *,
    width: int = 16,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    weight_decay: float = 1e-4,
    name: str | None = None,
) -> keras.Model:
    """A CIFAR pre-activation ResNet of `6 n + 2` layers.

    He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027, in the
    form that the low-bitwidth papers' code trains: a float 3x3 convolution "stem";
    three stages of n blocks with `width`, `2 width`, `4 width` channels and strides 1,
    2, 2; "final_bn", "final_relu", average pooling and the dense layer "head". A block
    is twice BN-ReLU-3x3 convolution plus a shortcut. In a stage's first block the
    shortcut starts from the block's first activation; where the shape changes it is a
    1x1 convolution "stage<s>_block1_shortcut" without BN. Other layers are
    "stage<s>_block<b>_conv1", "..._relu1" and so on.

    Convolutions have no bias and start from an untruncated normal distribution of
    variance 2 / fan_out. BN has momentum 0.9 and epsilon 1e-5. Strided 3x3 convolutions
    pad one zero on every side, as torch does.

    Trainable parameters at width 16 with 10 classes: 77,850 (depth 8), 272,282 (20),
    855,578 (56).

    Args:
        depth: `6 n + 2` with n >= 1: 8, 14, 20, ...
        width: Channels of the first stage, at least 1.
        classes: Number of logits, at least 2.
        input_shape: (height, width, channels) of one image.
        weight_decay: As in torch, on kernels, biases, BN scale and offset, at least 0:
            the loss gains `weight_decay / 2 * sum(w**2)`.
        name: Name of the model; "preact_resnet<depth>" if None.

    Returns:
        An unquantized, uncompiled Keras model from float images (batch, *input_shape)
        to logits (batch, classes) without softmax, in the policy's variable dtype
        (float32).

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
    for spec in blocks.layout(counts, width):
        x = blocks.preact_block(
            x,
            blocks.basic(spec.filters, spec.strides),
            first=spec.first,
            weight_decay=weight_decay,
            name=spec.name,
        )
    x = layers.batch_norm(x, name="final_bn", weight_decay=weight_decay)
    x = layers.relu(x, name="final_relu")
    logits = layers.classifier(x, classes, weight_decay=weight_decay)
    return keras.Model(image, logits, name=name or f"preact_resnet{depth}")
