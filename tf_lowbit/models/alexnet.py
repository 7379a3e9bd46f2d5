"""AlexNet with batch normalization."""

from tf_lowbit.compat import keras
from tf_lowbit.core import checks
from tf_lowbit.models import layers

# Filters, kernel size, stride, whether max pooling follows.
_CONVOLUTIONS = (
    (64, 11, 4, True),
    (192, 5, 1, True),
    (384, 3, 1, False),
    (256, 3, 1, False),
    (256, 3, 1, True),
)
_FC_UNITS = 4096


def alexnet(
    *,
    classes: int = 1000,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    dropout: float = 0.0,
    weight_decay: float = 1e-4,
    name: str | None = None,
) -> keras.Model:
    """AlexNet with BN after conv1-5 and fc1-2.

    Krizhevsky, One weird trick for parallelizing convolutional neural networks,
    arXiv:1404.5997: torchvision's one-column AlexNet, without the original's local
    response normalization. "stem" is the first convolution, then "conv2" to "conv5",
    "fc1", "fc2", and "head", the last dense layer. All but the head are followed by
    "<layer>_bn" and "<layer>_relu"; "stem", "conv2" and "conv5" also by "<layer>_pool"
    (3x3, stride 2). For an image of 224x224, the input of fc1 is 6x6x256, flattened in
    the order height, width, channels (torch: channels first).

    Convolutions start from an untruncated normal distribution of variance 2 / fan_out.
    BN has momentum 0.9 and epsilon 1e-5. With the default arguments there are
    61,119,528 trainable parameters: torchvision's 61,100,840, and BN.

    Args:
        classes: Number of logits, at least 2.
        input_shape: (height, width, channels) of one image, height and width at least
            63. The size of fc1 depends on it.
        dropout: Share of the inputs of fc1 and fc2 to drop in training, in [0, 1). 0,
            as in the low-bitwidth papers' code, leaves the layers out; torchvision has
            0.5. Dropout multiplies the other inputs by 1 / (1 - dropout), so that
            quantized activations are off their grid in training.
        weight_decay: As in `preact_resnet`.
        name: Name of the model; "alexnet" if None.

    Returns:
        A float Keras model, as `preact_resnet` returns.

    Raises:
        ValueError: If an argument is out of range.
    """
    # Below 63 pixels nothing is left after the third pooling.
    layers.check_common(
        classes=classes,
        input_shape=input_shape,
        weight_decay=weight_decay,
        min_size=63,
    )
    checks.number("dropout", dropout, at_least=0, below=1)

    x = image = layers.image_input(input_shape)
    for index, (filters, kernel_size, strides, pooled) in enumerate(_CONVOLUTIONS):
        layer = f"conv{index + 1}" if index else "stem"
        x = layers.conv(
            x,
            filters,
            kernel_size,
            strides=strides,
            # 2 zeros instead of 5, so that 224 pixels become 55.
            padding=2 if kernel_size == 11 else None,
            # BN cancels the bias, but the variables match torchvision's.
            use_bias=True,
            name=layer,
            weight_decay=weight_decay,
        )
        x = layers.batch_norm(x, name=f"{layer}_bn", weight_decay=weight_decay)
        x = layers.relu(x, name=f"{layer}_relu")
        if pooled:
            x = keras.layers.MaxPooling2D(3, 2, name=f"{layer}_pool")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    for layer in ("fc1", "fc2"):
        if dropout:
            x = keras.layers.Dropout(dropout, name=f"{layer}_dropout")(x)
        x = layers.dense(x, _FC_UNITS, name=layer, weight_decay=weight_decay)
        x = layers.batch_norm(x, name=f"{layer}_bn", weight_decay=weight_decay)
        x = layers.relu(x, name=f"{layer}_relu")
    logits = layers.logits(x, classes, weight_decay=weight_decay)
    return keras.Model(image, logits, name=name or "alexnet")
