import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import layer_registry, passthrough

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
    assert [kernel.attribute for kernel in layer_registry.kernels(layer)] == attributes
    assert layer_registry.LowBitRegistry().supports(layer) is bool(attributes)


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
        kernel = layer_registry.kernels(layer)[0]
        weight = getattr(layer, kernel.attribute)
        assert [weight.shape[axis] for axis in kernel.channel_axes] == channels


def test_a_subclass_may_use_its_kernel_in_another_way():
    class Standardized(layers.Conv2D):
        pass

    assert layer_registry.kernels(Standardized(2, 1)) == ()


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
    assert layer_registry.relu_kind(layer) == kind


@pytest.mark.parametrize(
    ("activation", "kind"),
    [("relu", "relu"), (tf.nn.relu6, "relu6"), (None, None), ("tanh", None)],
)
def test_own_activations(activation, kind):
    assert layer_registry.own_relu(layers.Dense(1, activation=activation)) == kind


def test_what_interpolates_passes_no_grid_on():
    image = keras.Input((4, 4, 3))
    x = layers.Conv2D(4, 1, activation="relu", name="stem")(image)
    x = layers.UpSampling2D(2, interpolation="bilinear", name="larger")(x)
    x = layers.Conv2D(4, 1, name="mid")(x)
    model = keras.Model(image, layers.Conv2D(2, 1, name="head")(x))
    quantized = tfl.quantize(model, tfl.PrecisionRule("mid", 2, 2))
    (read,) = quantized.get_layer("mid").inbound_nodes[0].keras_inputs
    values = keras.Model(quantized.inputs, read)(nets.images(4, (4, 4, 3)))
    assert len(np.unique(values)) <= 4
    assert quantized.get_layer("larger_quantizer")


def test_what_is_an_add():
    assert layer_registry.is_add(layers.Add())
    assert not layer_registry.is_add(layers.Concatenate())
    assert not layer_registry.is_add(layers.Subtract())


def test_layers_that_train_unknown_weights_are_unsupported():
    def built(layer, shape):
        layer.build((None, *shape))
        return layer_registry.is_unsupported(layer)

    assert built(layers.PReLU(), (3,))
    assert built(layers.LayerNormalization(), (3,))
    assert built(layers.LSTM(2), (4, 3))
    assert not built(layers.BatchNormalization(), (3,))
    assert not built(layers.Dense(2), (3,))
    assert not built(layers.Flatten(), (3,))


# --- Layers of the user's


@keras.utils.register_keras_serializable(package="test_registry")
class Standardized(layers.Conv2D):
    """Weight standardization (arXiv:1903.10520), of the weight that stands there."""

    def call(self, inputs):
        mean, variance = tf.nn.moments(self.kernel, [0, 1, 2], keepdims=True)
        kernel = (self.kernel - mean) * tf.math.rsqrt(variance + 1e-5)
        return tf.nn.conv2d(inputs, kernel, 1, "SAME") + self.bias


@keras.utils.register_keras_serializable(package="test_registry")
class Shuffle(layers.Layer):
    """Turns the channels round."""

    def call(self, inputs):
        return inputs[..., ::-1]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(layer_registry, "_KERNELS", dict(layer_registry._KERNELS))
    monkeypatch.setattr(passthrough, "_LAYERS", dict(passthrough._LAYERS))
    for _ in range(2):
        tfl.register_layer(Standardized, {"kernel": (-1,)})
        tfl.register_layer(Shuffle)


def with_own_layers():
    image = keras.Input(nets.IMAGE, name="image")
    x = layers.ReLU(name="relu")(layers.Conv2D(4, 3, name="stem")(image))
    x = Shuffle(name="shuffle")(x)
    x = Standardized(5, 3, activation="linear", name="own")(x)
    x = layers.ReLU(name="relu2")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return nets.randomize(keras.Model(image, layers.Dense(4, name="head")(x)))


def test_layers_of_the_users_own(registered, tmp_path):
    per_axis = tfl.quantizers.LSQWeightQuantizer(per_axis=True)
    model = with_own_layers()
    quantized = tfl.quantize(model, tfl.PrecisionRule("own", 2, 2, per_axis))
    found = nets.by_name(quantized)
    # The ReLU is seen behind the layer that passes its values on.
    assert found.keys() == {"relu/output", "own/kernel"}
    assert found["own/kernel"].variables["step"].shape == (1, 1, 1, 5)
    assert set(np.unique(found["own/kernel"].codes())) <= {-2, -1, 0, 1}
    before = found["own/kernel"].latent.numpy()
    nets.train_step(quantized, nets.images(), nets.labels(), eager=True)
    assert (found["own/kernel"].latent.numpy() != before).any()
    quantized.save(tmp_path / "net.keras")
    again = tfl.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(again(nets.images()), quantized(nets.images()))
    costs = {layer.name: layer for layer in tfl.cost(quantized).layers}
    assert costs["own"].weight_bits == costs["own"].activation_bits == (2,)
    assert costs["own"].macs == 3 * 3 * 4 * 5 * 6 * 6
    assert type(tfl.strip(quantized).get_layer("own")) is Standardized


def test_without_it_they_are_left_alone():
    with pytest.warns(tfl.QuantizationWarning, match="own cannot be quantized"):
        quantized = tfl.quantize(with_own_layers(), tfl.PrecisionRule("own|head", 2, 2))
    assert "own/kernel" not in nets.by_name(quantized)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Conv",), "subclass of tf_keras's Layer. Received: 'Conv'"),
        ((layer_registry.Kernel,), "subclass of tf_keras's Layer"),
        ((Standardized, "kernel"), "Received: 'kernel'"),
        ((Standardized, {}), r"or None\. Received: \{\}"),
        ((layers.Dense, {"bias": (-1,)}), "Dense with .*bias.*, known with .*kernel"),
        ((layers.Dense,), r"Dense with \(\), known with"),
        ((layers.Flatten, {"kernel": (-1,)}), r"Flatten with .*, known with \(\)"),
    ],
)
def test_what_cannot_be_registered(arguments, message):
    before = dict(layer_registry._KERNELS), dict(passthrough._LAYERS)
    with pytest.raises(ValueError, match=message):
        tfl.register_layer(*arguments)
    assert (layer_registry._KERNELS, passthrough._LAYERS) == before
