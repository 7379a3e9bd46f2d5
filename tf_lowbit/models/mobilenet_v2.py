"""A small MobileNetV2: depthwise convolutions between linear bottlenecks."""

from tf_lowbit.compat import keras
from tf_lowbit.core import checks
from tf_lowbit.models import layers

# Filters in units of the width, stride of the depthwise convolution.
_BLOCKS = ((1, 1), (1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (4, 1))
# The last convolution has 4 times the channels of the last block: the paper's 1280
# of 320.
_FINAL = 4 * _BLOCKS[-1][0]


def mobilenet_v2(
    *,
    width: int = 16,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (28, 28, 1),
    expansion: int = 4,
    weight_decay: float = 1e-4,
    name: str | None = None,
) -> keras.Model:
    """Seven inverted residual blocks for small images.

    Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks,
    arXiv:1801.04381, at a size that small images need: a 3x3 convolution "stem" of
    stride 1; "block1" to "block7" with `width` times 1, 1, 2, 2, 4, 4, 4 channels,
    of which "block3" and "block5" have stride 2; a 1x1 convolution "final_conv" with
    16 times `width`; average pooling and the dense layer "head". "stem" is followed
    by "stem_bn" and "stem_relu", "final_conv" by "final_bn" and "final_relu".

    A block is "<block>_expand", a 1x1 convolution to `expansion` times its input's
    channels; "<block>_depthwise", a 3x3 depthwise convolution; and
    "<block>_project", a 1x1 convolution. Each is followed by "<layer>_bn", the first
    two by "<layer>_relu" as well: the projection is linear. "<block>_add" adds the
    block's input where the shapes agree. All ReLUs end at 6.

    Convolutions have no bias. Initial values and BN settings are those of
    `preact_resnet`, and the strided convolutions pad one zero on every side, as
    torch does. At the default arguments there are 125,882 trainable parameters.

    Args:
        width: Channels of the stem and the first blocks.
        classes: Number of logits.
        input_shape: (height, width, channels) of one image.
        expansion: How many times as many channels the depthwise convolutions have as
            their block's input; 6 in the paper. 1 leaves the expansions out, as in
            the paper's first block.
        weight_decay: Coupled weight decay as torch has it, on kernels, biases and
            BN scale and offset: the loss gains `weight_decay / 2 * sum(w**2)`.
        name: Name of the model; "mobilenet_v2" if None.

    Returns:
        An unquantized, uncompiled Keras model from float images of shape
        (batch, *input_shape) to float logits (no softmax) of shape
        (batch, classes), in the dtype of the policy's variables (float32).

    Raises:
        ValueError: If `width` or `expansion` is below 1, `classes` is below 2,
            `input_shape` is not three positive integers, or `weight_decay` is
            negative.
    """
    checks.integer("width", width, at_least=1)
    checks.integer("expansion", expansion, at_least=1)
    layers.check_common(
        classes=classes, input_shape=input_shape, weight_decay=weight_decay
    )

    image = layers.image_input(input_shape)
    x = layers.conv(image, width, 3, name="stem", weight_decay=weight_decay)
    x = _bn_relu6(x, "stem", weight_decay)
    for index, (multiple, strides) in enumerate(_BLOCKS, start=1):
        x = _block(
            x,
            multiple * width,
            strides=strides,
            expansion=expansion,
            weight_decay=weight_decay,
            name=f"block{index}",
        )
    x = layers.conv(x, _FINAL * width, 1, name="final_conv", weight_decay=weight_decay)
    x = _bn_relu6(x, "final", weight_decay)
    logits = layers.classifier(x, classes, weight_decay=weight_decay)
    return keras.Model(image, logits, name=name or "mobilenet_v2")


def _bn_relu6(x, prefix: str, weight_decay: float):
    x = layers.batch_norm(x, name=f"{prefix}_bn", weight_decay=weight_decay)
    return layers.relu6(x, name=f"{prefix}_relu")


def _block(
    x, filters: int, *, strides: int, expansion: int, weight_decay: float, name: str
):
    """An inverted residual block, of linear input and output."""
    channels = x.shape[-1]
    y = x
    if expansion > 1:
        expand = f"{name}_expand"
        y = layers.conv(
            y, expansion * channels, 1, name=expand, weight_decay=weight_decay
        )
        y = _bn_relu6(y, expand, weight_decay)
    depthwise = f"{name}_depthwise"
    y = layers.depthwise_conv(
        y, 3, strides=strides, name=depthwise, weight_decay=weight_decay
    )
    y = _bn_relu6(y, depthwise, weight_decay)
    project = f"{name}_project"
    y = layers.conv(y, filters, 1, name=project, weight_decay=weight_decay)
    y = layers.batch_norm(y, name=f"{project}_bn", weight_decay=weight_decay)
    if strides == 1 and channels == filters:
        y = keras.layers.Add(name=f"{name}_add")([y, x])
    return y
