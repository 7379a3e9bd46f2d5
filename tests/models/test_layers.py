import numpy as np
import pytest

from tf_lowbit.compat import keras
from tf_lowbit.models import layers


def torch_conv(image, kernel, strides, padding):
    """The correlation that torch.nn.Conv2d computes, window by window."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    size = kernel.shape[0]
    rows = (padded.shape[0] - size) // strides + 1
    columns = (padded.shape[1] - size) // strides + 1
    out = np.zeros((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            top, left = i * strides, j * strides
            window = padded[top : top + size, left : left + size]
            out[i, j] = np.einsum("hwc,hwcf->f", window, kernel)
    return out


@pytest.mark.parametrize(
    ("height", "width", "size", "strides", "padding"),
    [
        (6, 8, 3, 2, None),
        (5, 7, 3, 2, None),
        (6, 5, 3, 1, None),
        (6, 5, 1, 2, None),
        (9, 8, 7, 2, None),
        (15, 16, 11, 4, 2),
    ],
)
def test_conv_has_the_geometry_of_torch(height, width, size, strides, padding):
    image = keras.Input((height, width, 2))
    out = layers.conv(
        image, 3, size, strides=strides, padding=padding, name="c", weight_decay=0.0
    )
    model = keras.Model(image, out)
    x = np.random.default_rng(0).normal(size=(1, height, width, 2)).astype("float32")
    kernel = model.get_layer("c").kernel.numpy()

    expected = torch_conv(
        x[0], kernel, strides, size // 2 if padding is None else padding
    )

    np.testing.assert_allclose(model(x)[0].numpy(), expected, rtol=0, atol=1e-5)


def test_same_padding_would_differ():
    # The reason for the explicit padding: if this fails, it is not needed.
    x = np.arange(16.0).reshape(4, 4, 1)
    same = keras.layers.Conv2D(1, 3, 2, "same", kernel_initializer="ones")(x[None])
    torch = torch_conv(x, np.ones((3, 3, 1, 1)), strides=2, padding=1)
    assert torch.shape == same.shape[1:]
    assert not np.allclose(same[0], torch)


def test_initial_values():
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 8))
    x = layers.conv(image, 64, 3, name="c", weight_decay=0.0, use_bias=True)
    x = keras.layers.Flatten()(x)
    model = keras.Model(image, layers.dense(x, 16, name="d", weight_decay=0.0))
    conv, dense = model.get_layer("c"), model.get_layer("d")

    # 4608 normal numbers: the sample deviation is within 5 % of the true one,
    # and a truncated distribution would not reach beyond 2.3 of them.
    deviation = np.sqrt(2.0 / (3 * 3 * 64))
    assert np.std(conv.kernel) == pytest.approx(deviation, rel=0.05)
    assert np.max(np.abs(conv.kernel)) > 3 * deviation
    bound = 1 / np.sqrt(8 * 8 * 64)
    assert 0.99 * bound < np.max(np.abs(dense.kernel)) <= bound
    assert not np.any(conv.bias)
    assert not np.any(dense.bias)


@pytest.mark.parametrize("weight_decay", [-1e-4, float("nan")])
def test_refuses_a_negative_weight_decay(weight_decay):
    with pytest.raises(ValueError, match=r"weight_decay must be .* at least 0. Rec"):
        layers.check_common(classes=2, input_shape=(8, 8, 3), weight_decay=weight_decay)


@pytest.mark.parametrize(
    "input_shape", [(32, 32), (32, 0, 3), (32, 32, 0), (None, 32, 3), (8.0, 8, 3), 32]
)
def test_refuses_an_input_shape(input_shape):
    with pytest.raises(ValueError, match="input_shape must be three integers"):
        layers.check_common(classes=2, input_shape=input_shape, weight_decay=0.0)


@pytest.mark.parametrize(
    ("height", "width", "strides"), [(6, 8, 2), (5, 7, 2), (6, 5, 1)]
)
def test_depthwise_conv_has_the_geometry_of_torch(height, width, strides):
    image = keras.Input((height, width, 3))
    out = layers.depthwise_conv(image, 3, strides=strides, name="d", weight_decay=0.0)
    model = keras.Model(image, out)
    x = np.random.default_rng(0).normal(size=(1, height, width, 3)).astype("float32")
    kernel = model.get_layer("d").depthwise_kernel.numpy()

    # Each channel by itself: a convolution from one channel to one.
    expected = np.concatenate(
        [
            torch_conv(x[0, :, :, c : c + 1], kernel[:, :, c : c + 1], strides, 1)
            for c in range(3)
        ],
        axis=-1,
    )

    np.testing.assert_allclose(model(x)[0].numpy(), expected, rtol=0, atol=1e-5)


def test_initial_values_of_a_depthwise_conv():
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 512))
    out = layers.depthwise_conv(image, 3, name="d", weight_decay=0.0)
    conv = keras.Model(image, out).get_layer("d")
    # Each input reaches the nine outputs around it, of one channel.
    assert np.std(conv.depthwise_kernel) == pytest.approx(np.sqrt(2 / 9), rel=0.05)
    assert conv.bias is None


def test_relu6():
    relu6 = layers.relu6(keras.Input((3,)), name="relu6")
    model = keras.Model(relu6._keras_history.layer.input, relu6)
    assert model(np.array([[-1.0, 5.5, 7.0]])).numpy().tolist() == [[0.0, 5.5, 6.0]]
