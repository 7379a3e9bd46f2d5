"""A small MobileNetV2: depthwise convolutions between linear bottlenecks."""

from tf_lowbit.compat import keras
from tf_lowbit.core import checks
from tf_lowbit.models import layers

# Filters in units of the width, stride of the depthwise convolution.
_BLOCKS = ((1, 1), (1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (4, 1))
# The last convolution has 4 times the channels of the last block, like the paper's 1280
# and 320.
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
    arXiv:1801.04381, in a size for small images: a 3x3 convolution "stem" of stride 1;
    "block1" to "block7" with `width` times 1, 1, 2, 2, 4, 4, 4 channels, of which
    "block3" and "block5" have stride 2; a 1x1 convolution "final_conv" with 16 times
    `width`; average pooling and the dense layer "head". "stem" is followed by "stem_bn"
    and "stem_relu", "final_conv" by "final_bn" and "final_relu".

    A block is "<block>_expand", a 1x1 convolution to `expansion` times its input's
    channels; "<block>_depthwise", a 3x3 depthwise convolution; and "<block>_project", a
    1x1 convolution. Each is followed by "<layer>_bn", the first two also by
    "<layer>_relu": the projection is linear. "<block>_add" adds the block's input where
    the shapes agree. All ReLUs end at 6.

    Convolutions have no bias. Initial values and BN settings are those of
    `preact_resnet`. Strided convolutions pad one zero on every side, as torch does.
    With the default arguments there are 125,882 trainable parameters.

    Args:
        width: Channels of the stem and the first blocks, at least 1.
        classes: Number of logits, at least 2.
        input_shape: (height, width, channels) of one image.
        expansion: Channels of the depthwise convolutions relative to their block's
            input, at least 1; 6 in the paper. 1 leaves the expansions out, as in the
            paper's first block.
        weight_decay: As in `preact_resnet`.
        name: Name of the model; "mobilenet_v2" if None.

    Returns:
        A float Keras model, as `preact_resnet` returns.

    Raises:
        ValueError: If an argument is out of range.
    """
    checks.integer("expansion", expansion, at_least=1)
    layers.check_common(
        width=width,
        classes=classes,
        input_shape=input_shape,
        weight_decay=weight_decay,
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
    """An inverted residual block with linear input and output."""
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
