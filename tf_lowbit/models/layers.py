"""The layers of all networks in this package.

Each function applies one Keras layer (or a padding and a layer) with the settings that
the networks share: torch's padding geometry, the initializers of the reference recipes,
and weight decay on every trainable variable. `x` is a float tensor, of shape (batch,
height, width, channels) for convolutions. `weight_decay` is torch's coupled weight
decay (`decay`).
"""

from collections.abc import Sequence

from tf_lowbit.compat import KerasTensor, keras
from tf_lowbit.core import checks


def check_common(
    *,
    classes: int,
    input_shape: Sequence[int],
    weight_decay: float,
    width: int = 1,
    min_size: int = 1,
) -> None:
    """Checks the arguments that networks share.

    Raises:
        ValueError: If `classes` is below 2, `input_shape` is not three positive
            integers with height and width of at least `min_size`, `weight_decay` is
            negative, or `width` is below 1.
    """
    checks.integer("width", width, at_least=1)
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


def decay(weight_decay: float) -> keras.regularizers.Regularizer | None:
    """Returns the Keras regularizer for torch's coupled weight decay; None for 0.

    torch adds `weight_decay * w` to the gradient of `w`. Keras adds `l2 * sum(w**2)` to
    the loss, whose gradient is `2 * l2 * w`. So l2 is half the decay.
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
        return x, "same"  # The same zeros without a layer.
    if padding:
        # With a stride, Keras "same" pads an even-sized image only on the right and
        # bottom, which shifts every window by one pixel against torch's.
        x = keras.layers.ZeroPadding2D(padding, name=f"{name}_pad")(x)
    return x, "valid"


def conv(
    x: KerasTensor,
    filters: int,
    kernel_size: int,
    *,
    name: str,
    weight_decay: float,
    strides: int = 1,
    padding: int | None = None,
    use_bias: bool = False,
) -> KerasTensor:
    """A square convolution with the geometry of a torch convolution.

    Kernels start from a normal distribution of variance 2 / fan_out, not truncated (He
    et al., arXiv:1502.01852, its backward form), biases from 0. A padding layer is
    called `<name>_pad`. `padding` is the zeros on each of the four sides, `kernel_size
    // 2` if None.

    Returns:
        Float tensor of shape (batch, h, w, filters), where h is `(height + 2 * padding
        - kernel_size) // strides + 1`, and w likewise.
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
    x: KerasTensor,
    kernel_size: int,
    *,
    name: str,
    weight_decay: float,
    strides: int = 1,
) -> KerasTensor:
    """A depthwise convolution without bias, with the geometry of torch's.

    Kernels start as those of `conv` with fan_out `kernel_size**2`: an input reaches one
    channel. (torch's initializer also counts the other channels.) `kernel_size` is odd.
    A padding layer is called `<name>_pad`.

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


def dense(
    x: KerasTensor,
    units: int,
    *,
    name: str,
    weight_decay: float,
    dtype: str | None = None,
) -> KerasTensor:
    """A dense layer with bias, without activation: (batch, features) to (batch, units).

    Kernels start uniform within 1 / sqrt(fan_in), torch's default for a linear layer.
    Biases start at 0; torch draws them. `dtype` None means the policy's.
    """
    return keras.layers.Dense(
        units,
        # Keras draws within sqrt(3 * scale / fan_in), so the scale is 1/3.
        kernel_initializer=keras.initializers.VarianceScaling(
            1 / 3, mode="fan_in", distribution="uniform"
        ),
        kernel_regularizer=decay(weight_decay),
        bias_regularizer=decay(weight_decay),
        dtype=dtype,
        name=name,
    )(x)


def logits(x: KerasTensor, classes: int, *, weight_decay: float) -> KerasTensor:
    """The dense layer "head", in float32 also under mixed policies.

    Rounding logits to 16 bits would make the loss a step function.
    """
    dtype = keras.mixed_precision.global_policy().variable_dtype
    return dense(x, classes, name="head", weight_decay=weight_decay, dtype=dtype)


def batch_norm(x: KerasTensor, *, name: str, weight_decay: float) -> KerasTensor:
    """Batch normalization over all but the last axis, momentum 0.9, epsilon 1e-5.

    Keras's momentum weights the old average, torch's (0.1) the new value.
    """
    return keras.layers.BatchNormalization(
        momentum=0.9,
        epsilon=1e-5,
        gamma_regularizer=decay(weight_decay),
        beta_regularizer=decay(weight_decay),
        name=name,
    )(x)


def relu(x: KerasTensor, *, name: str) -> KerasTensor:
    """A ReLU as a separate layer, so that a rule can name and quantize it."""
    return keras.layers.ReLU(name=name)(x)


def relu6(x: KerasTensor, *, name: str) -> KerasTensor:
    """A ReLU that ends at 6, as a separate layer."""
    return keras.layers.ReLU(6.0, name=name)(x)


def image_input(input_shape: Sequence[int]) -> KerasTensor:
    """The input of a network, called "image"."""
    return keras.Input(tuple(input_shape), name="image")


def classifier(x: KerasTensor, classes: int, *, weight_decay: float) -> KerasTensor:
    """Global average pooling, then the dense layer "head": logits (batch, classes)."""
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return logits(x, classes, weight_decay=weight_decay)
