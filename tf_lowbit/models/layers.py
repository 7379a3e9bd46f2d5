"""The layers that every network of this package is made of.

Each function here applies one Keras layer (or a padding and a layer) with the
settings that the networks share: torch's padding geometry, the initializers of
the reference recipes, and weight decay on every trainable variable.
"""

from collections.abc import Sequence

from tf_lowbit.compat import keras
from tf_lowbit.core import checks


def check_common(
    *,
    classes: int,
    input_shape: Sequence[int],
    weight_decay: float,
    min_size: int = 1,
) -> None:
    """Checks the arguments that all networks take.

    Args:
        classes: Number of logits.
        input_shape: (height, width, channels) of one image.
        weight_decay: Coupled weight decay, in torch's convention.
        min_size: The smallest height and width that the network can process.

    Raises:
        ValueError: If `classes` is below 2, `input_shape` is not three positive
            integers with height and width of at least `min_size`, or
            `weight_decay` is negative.
    """
    checks.integer("classes", classes, at_least=2)
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if (
        len(shape) != 3
        or not all(checks.is_integer(size) for size in shape)
        or min(shape[:2]) < min_size
        or shape[2] < 1
    ):
        raise ValueError(
            "input_shape must be three integers (height, width, channels) with "
            f"height and width of at least {min_size} and channels of at least 1. "
            f"Received: input_shape={input_shape!r}"
        )
    checks.number("weight_decay", weight_decay, at_least=0)


def decay(weight_decay: float):
    """Returns the Keras regularizer that equals torch's coupled weight decay.

    torch adds `weight_decay * w` to the gradient of `w`. Keras adds
    `l2 * sum(w**2)` to the loss, whose gradient is `2 * l2 * w`: so l2 is half
    the decay.

    Args:
        weight_decay: Coupled weight decay, in torch's convention.

    Returns:
        An L2 regularizer, or None where `weight_decay` is 0.
    """
    return keras.regularizers.L2(0.5 * weight_decay) if weight_decay else None


def _he_normal():
    """Normal of variance 2 / fan_out, not truncated (He et al., arXiv:1502.01852)."""
    return keras.initializers.VarianceScaling(
        2.0, mode="fan_out", distribution="untruncated_normal"
    )


def _pad(x, kernel_size: int, strides: int, padding: int | None, name: str):
    """Pads as torch does. Returns the tensor and the convolution's own padding."""
    if padding is None:
        padding = kernel_size // 2
    if strides == 1 and kernel_size == 2 * padding + 1:
        return x, "same"  # The same zeros, and no layer in between.
    if padding:
        # With a stride, Keras "same" pads an even-sized image on the right and
        # bottom only, which shifts every window by a pixel from torch's.
        x = keras.layers.ZeroPadding2D(padding, name=f"{name}_pad")(x)
    return x, "valid"


def conv(
    x,
    filters: int,
    kernel_size: int,
    *,
    name: str,
    weight_decay: float,
    strides: int = 1,
    padding: int | None = None,
    use_bias: bool = False,
):
    """A square convolution with the geometry of a torch convolution.

    Kernels are drawn from a normal distribution of variance 2 / fan_out, not
    truncated (He et al., arXiv:1502.01852, its backward form), biases start at 0.

    Args:
        x: Float tensor of shape (batch, height, width, channels).
        filters: Number of output channels.
        kernel_size: Height and width of the kernel.
        name: Name of the convolution; a padding layer is called `<name>_pad`.
        weight_decay: Coupled weight decay, in torch's convention.
        strides: Step of the window in both directions.
        padding: Zeros on each of the four sides; `kernel_size // 2` if None.
        use_bias: Whether to add a bias.

    Returns:
        Float tensor of shape (batch, h, w, filters), where h is
        `(height + 2 * padding - kernel_size) // strides + 1`, and w likewise.
    """
    x, mode = _pad(x, kernel_size, strides, padding, name)
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding=mode,
        use_bias=use_bias,
        kernel_initializer=_he_normal(),
        kernel_regularizer=decay(weight_decay),
        bias_regularizer=decay(weight_decay) if use_bias else None,
        name=name,
    )(x)


def depthwise_conv(
    x, kernel_size: int, *, name: str, weight_decay: float, strides: int = 1
):
    """A convolution of each channel by itself, with the geometry of torch's.

    Kernels are drawn as those of `conv`, where fan_out is `kernel_size**2`: an input
    reaches one channel. (torch's initializer counts the other channels, too.) There
    is no bias.

    Args:
        x: Float tensor of shape (batch, height, width, channels).
        kernel_size: Height and width of the kernel; odd.
        name: Name of the convolution; a padding layer is called `<name>_pad`.
        weight_decay: Coupled weight decay, in torch's convention.
        strides: Step of the window in both directions.

    Returns:
        Float tensor of shape (batch, ceil(height / strides), ceil(width / strides),
        channels).
    """
    x, mode = _pad(x, kernel_size, strides, None, name)
    return keras.layers.DepthwiseConv2D(
        kernel_size,
        strides=strides,
        padding=mode,
        use_bias=False,
        depthwise_initializer=_he_normal(),
        depthwise_regularizer=decay(weight_decay),
        name=name,
    )(x)


def dense(x, units: int, *, name: str, weight_decay: float, dtype=None):
    """A dense layer with bias, and without an activation.

    Kernels are uniform within 1 / sqrt(fan_in), torch's default for a linear
    layer. Biases start at 0, where torch draws them.

    Args:
        x: Float tensor of shape (batch, features).
        units: Number of outputs.
        name: Name of the layer.
        weight_decay: Coupled weight decay, in torch's convention.
        dtype: What it computes in; None for the policy's.

    Returns:
        Float tensor of shape (batch, units).
    """
    return keras.layers.Dense(
        units,
        # Keras draws within sqrt(3 * scale / fan_in), hence the third.
        kernel_initializer=keras.initializers.VarianceScaling(
            1 / 3, mode="fan_in", distribution="uniform"
        ),
        kernel_regularizer=decay(weight_decay),
        bias_regularizer=decay(weight_decay),
        dtype=dtype,
        name=name,
    )(x)


def logits(x, classes: int, *, weight_decay: float):
    """The dense layer "head", in float32 under the mixed policies too.

    Rounded to 16 bits, logits would make steps of the loss.

    Args:
        x: Float tensor of shape (batch, features).
        classes: Number of logits.
        weight_decay: Coupled weight decay, in torch's convention.

    Returns:
        Float tensor of shape (batch, classes).
    """
    dtype = keras.mixed_precision.global_policy().variable_dtype
    return dense(x, classes, name="head", weight_decay=weight_decay, dtype=dtype)


def batch_norm(x, *, name: str, weight_decay: float):
    """Batch normalization with momentum 0.9 and epsilon 1e-5.

    Keras's momentum is the weight of the old average: torch's 0.1.

    Args:
        x: Float tensor, normalized over all but its last axis.
        name: Name of the layer.
        weight_decay: Coupled weight decay of scale and offset, in torch's
            convention.

    Returns:
        Float tensor of the shape of `x`.
    """
    return keras.layers.BatchNormalization(
        momentum=0.9,
        epsilon=1e-5,
        gamma_regularizer=decay(weight_decay),
        beta_regularizer=decay(weight_decay),
        name=name,
    )(x)


def relu(x, *, name: str):
    """A ReLU as a layer of its own, so that a rule can name and quantize it."""
    return keras.layers.ReLU(name=name)(x)


def relu6(x, *, name: str):
    """A ReLU that ends at 6, as a layer of its own."""
    return keras.layers.ReLU(6.0, name=name)(x)


def image_input(input_shape: Sequence[int]):
    """The input of a network, called "image"."""
    return keras.Input(tuple(input_shape), name="image")


def classifier(x, classes: int, *, weight_decay: float):
    """Global average pooling, then the dense layer "head", which gives logits.

    Args:
        x: Float tensor of shape (batch, height, width, channels).
        classes: Number of logits.
        weight_decay: Coupled weight decay, in torch's convention.

    Returns:
        Float tensor of shape (batch, classes).
    """
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return logits(x, classes, weight_decay=weight_decay)
