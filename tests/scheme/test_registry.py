import pytest

from tf_lowbit.compat import keras, tf
from tf_lowbit.scheme import registry

layers = keras.layers


@pytest.mark.parametrize(
    ("layer", "attributes"),
    [
        (layers.Dense(2), ["kernel"]),
        (layers.Conv1D(2, 1), ["kernel"]),
        (layers.Conv2D(2, 1), ["kernel"]),
        (layers.Conv3D(2, 1), ["kernel"]),
        (layers.Conv2DTranspose(2, 1), ["kernel"]),
        (layers.DepthwiseConv2D(1), ["depthwise_kernel"]),
        (layers.SeparableConv1D(2, 1), ["depthwise_kernel", "pointwise_kernel"]),
        (layers.SeparableConv2D(2, 1), ["depthwise_kernel", "pointwise_kernel"]),
        (layers.BatchNormalization(), []),
        (layers.PReLU(), []),
        (layers.LSTM(2), []),
    ],
)
def test_the_weights_that_can_be_quantized(layer, attributes):
    assert [kernel.attribute for kernel in registry.kernels(layer)] == attributes
    assert registry.LowBitRegistry().supports(layer) is bool(attributes)


def test_the_attributes_exist_and_their_channel_axes_are_the_outputs():
    for layer, shape, channels in [
        (layers.Conv2D(5, 3), (8, 8, 3), [5]),
        (layers.Conv2DTranspose(5, 3), (8, 8, 3), [5]),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 3), [3, 2]),
        (layers.SeparableConv1D(5, 3), (8, 3), [3, 1]),
        (layers.Conv3D(5, 2), (4, 4, 4, 3), [5]),
        (layers.Dense(5), (3,), [5]),
    ]:
        layer.build((None, *shape))
        kernel = registry.kernels(layer)[0]
        weight = getattr(layer, kernel.attribute)
        assert [weight.shape[axis] for axis in kernel.channel_axes] == channels


def test_a_subclass_may_use_its_kernel_in_another_way():
    class Standardized(layers.Conv2D):
        pass

    assert registry.kernels(Standardized(2, 1)) == ()


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (layers.ReLU(), "relu"),
        (layers.ReLU(6.0), "relu6"),
        (layers.ReLU(max_value=6), "relu6"),
        (layers.Activation("relu"), "relu"),
        (layers.Activation(tf.nn.relu), "relu"),
        (layers.Activation(tf.nn.relu6), "relu6"),
        (layers.ReLU(1.0), None),
        (layers.ReLU(negative_slope=0.1), None),
        (layers.ReLU(threshold=0.5), None),
        (layers.LeakyReLU(), None),
        (layers.Activation("tanh"), None),
        (layers.Conv2D(1, 1, activation="relu"), None),
    ],
)
def test_relu_layers(layer, kind):
    assert registry.relu_kind(layer) == kind


@pytest.mark.parametrize(
    ("activation", "kind"),
    [("relu", "relu"), (tf.nn.relu6, "relu6"), (None, None), ("tanh", None)],
)
def test_own_activations(activation, kind):
    assert registry.own_relu(layers.Dense(1, activation=activation)) == kind


@pytest.mark.parametrize(
    ("layer", "keeps"),
    [
        (layers.Dropout(0.5), True),
        (layers.MaxPooling2D(2), True),
        (layers.GlobalMaxPooling1D(), True),
        (layers.Flatten(), True),
        (layers.Cropping2D(1), True),
        (layers.UpSampling2D(2), True),
        (layers.UpSampling2D(2, interpolation="bilinear"), False),
        (layers.AveragePooling2D(2), False),
        (layers.Concatenate(), False),
        (layers.ReLU(), False),
        (layers.BatchNormalization(), False),
    ],
)
def test_what_keeps_a_grid(layer, keeps):
    assert registry.keeps_grid(layer) is keeps
    assert registry.is_transparent(layer) or not keeps


def test_what_is_an_add():
    assert registry.is_add(layers.Add())
    assert not registry.is_add(layers.Concatenate())
    assert not registry.is_add(layers.Subtract())


def test_layers_that_train_unknown_weights_are_unsupported():
    def built(layer, shape):
        layer.build((None, *shape))
        return registry.is_unsupported(layer)

    assert built(layers.PReLU(), (3,))
    assert built(layers.LayerNormalization(), (3,))
    assert built(layers.LSTM(2), (4, 3))
    assert not built(layers.BatchNormalization(), (3,))
    assert not built(layers.Dense(2), (3,))
    assert not built(layers.Flatten(), (3,))
