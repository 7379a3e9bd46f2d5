"""Back to a float network, and on to other bits."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tfmot

layers = keras.layers
W2A2 = tfl.PrecisionRule(".*", 2, 2)
LEARNED = tfl.PrecisionRule(
    ".*", 2, 2, weight_quantizer="lsq", activation_quantizer="lsq", edges=True
)
NETWORKS = [
    nets.chain,
    nets.every_layer,
    nets.mobilenet_like,
    nets.postactivation,
    nets.preactivation,
]


def inputs_of(model):
    return nets.images(shape=model.input_shape[1:])


def types(model):
    return {layer.name: type(layer) for layer in model.layers}


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("make", "residual_bits"),
    [(make, None) for make in NETWORKS]
    + [(nets.postactivation, 8), (nets.preactivation, 8)],
)
def test_stripping_undoes_quantize(make, residual_bits):
    model = nets.randomize(make())
    quantized = tfl.quantize(model, LEARNED, residual_bits=residual_bits)
    tfl.calibrate(quantized, [inputs_of(model)])
    stripped = tfl.strip(quantized)
    assert not list(tfl.inspection.quantized_tensors(stripped))
    np.testing.assert_allclose(
        stripped(inputs_of(model)), model(inputs_of(model)), rtol=1e-5, atol=1e-5
    )
    # A ReLU that a layer had within stands behind it, the depthwise part of a separable
    # convolution in front; all else is as it was.
    found = types(stripped)
    new = {name for name in found if name not in types(model)}
    assert all(
        (found[name], name.rpartition("_")[2])
        in {(layers.ReLU, "relu"), (layers.DepthwiseConv2D, "depthwise")}
        for name in new
    )
    if not new:
        assert list(found) == [layer.name for layer in model.layers]


def test_stripping_keeps_what_was_trained():
    quantized = tfl.quantize(nets.randomize(nets.chain()), LEARNED)
    nets.train_step(quantized, nets.images(), nets.labels(), eager=True)
    before = nets.snapshot(quantized.weights)
    stripped = tfl.strip(quantized)
    by_name = {weight.name: weight.numpy() for weight in quantized.weights}
    assert len(stripped.weights) == 20
    for weight in stripped.weights:
        np.testing.assert_array_equal(weight, by_name[weight.name])
    nets.assert_all_equal(nets.snapshot(quantized.weights), before)
    # The same low-bitwidth weights come of it.
    again = tfl.quantize(stripped, LEARNED)
    for name, tensor in nets.by_name(again).items():
        if tensor.latent is not None:
            np.testing.assert_array_equal(
                tensor.latent, nets.by_name(quantized)[name].latent
            )
    # It is a network like any other: it trains and is saved.
    nets.train_step(stripped, nets.images(), nets.labels(), eager=True)
    assert any(
        (weight.numpy() != by_name[weight.name]).any() for weight in stripped.weights
    )


@pytest.mark.parametrize("make", [nets.chain, nets.every_layer])
def test_weights_on_their_grid(make):
    quantized = tfl.quantize(nets.randomize(make()), W2A2)
    stripped = tfl.strip(quantized, weights="quantized")
    seen = 0
    for tensor in tfl.inspection.quantized_tensors(quantized):
        if tensor.latent is not None:
            own = getattr(stripped.get_layer(tensor.layer.name), tensor.attribute)
            np.testing.assert_array_equal(own, tensor.quantized())
            assert len(np.unique(own)) <= 4
            seen += 1
    assert seen >= 2


def test_relus_come_back_as_they_were():
    image = keras.Input(nets.IMAGE, name="image")
    x = layers.Conv2D(4, 3, name="first")(image)
    x = layers.ReLU(6.0, name="six")(x)
    x = layers.Conv2D(4, 3, activation="relu", name="own")(x)
    x = layers.Conv2D(4, 3, name="last")(x)
    model = nets.randomize(keras.Model(image, x))
    stripped = tfl.strip(tfl.quantize(model, W2A2))
    assert stripped.get_layer("six").max_value == 6.0
    assert stripped.get_layer("own_relu").max_value is None
    np.testing.assert_allclose(
        stripped(nets.images() * 9), model(nets.images() * 9), rtol=1e-6, atol=1e-6
    )


@pytest.mark.slow
def test_flags_stay():
    model = nets.randomize(nets.chain())
    model.get_layer("mid").trainable = False
    quantized = tfl.quantize(model, W2A2)
    quantized.get_layer("bn1").trainable = False
    for again in (tfl.strip(quantized), tfl.requantize(quantized, LEARNED)):
        frozen = {layer.name for layer in again.layers if not layer.trainable}
        assert frozen == {"mid", "bn1"}


# --- Other bits


def test_other_bits_keep_what_was_learned():
    quantized = tfl.quantize(nets.randomize(nets.chain()), LEARNED)
    tfl.calibrate(quantized, [nets.images()])
    nets.train_step(quantized, nets.images(), nets.labels(), eager=True)
    four = tfl.PrecisionRule(
        ".*", 4, 3, weight_quantizer="lsq", activation_quantizer="lsq", edges=True
    )
    again = tfl.requantize(quantized, four)
    # As if the bits had been changed in training, which `StagedPrecision` does.
    for tensor in nets.by_name(quantized).values():
        tensor.assign_bits(4 if tensor.latent is not None else 3)
    found, expected = nets.by_name(again), nets.by_name(quantized)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.bits == expected[name].bits, name
        assert tensor.is_calibrated
        for key, variable in tensor.variables.items():
            np.testing.assert_array_equal(variable, expected[name].variables[key])
    np.testing.assert_array_equal(again(nets.images()), quantized(nets.images()))
    nets.train_step(again, nets.images(), nets.labels(), eager=True)


@pytest.mark.slow
def test_the_same_rules_give_the_same_network():
    quantized = tfl.quantize(nets.randomize(nets.preactivation()), LEARNED)
    tfl.calibrate(quantized, [nets.images()])
    again = tfl.requantize(quantized, LEARNED)
    assert again is not quantized
    nets.assert_all_equal(again.get_weights(), quantized.get_weights())
    np.testing.assert_array_equal(again(nets.images()), quantized(nets.images()))


@pytest.mark.slow
def test_another_quantizer_starts_anew():
    quantized = tfl.quantize(nets.randomize(nets.chain()), LEARNED)
    tfl.calibrate(quantized, [nets.images()])
    for tensor in nets.by_name(quantized).values():
        if "step" in tensor.variables:
            tensor.variables["step"].assign(tensor.variables["step"] * 7)
    per_axis = tfl.PrecisionRule(
        ".*", 2, 2, tfl.quantizers.LSQWeightQuantizer(per_axis=True), edges=True
    )
    again = nets.by_name(tfl.requantize(quantized, per_axis))
    fresh = nets.by_name(tfl.quantize(tfl.strip(quantized), per_axis))
    assert again.keys() == fresh.keys()
    for name, tensor in again.items():
        assert tensor.quantizer == fresh[name].quantizer
        for key, variable in tensor.variables.items():
            np.testing.assert_array_equal(variable, fresh[name].variables[key])


@pytest.mark.slow
def test_fewer_layers_are_quantized():
    quantized = tfl.quantize(nets.randomize(nets.chain()), LEARNED)
    rule = tfl.PrecisionRule("mid", 2, 2, weight_quantizer="lsq")
    again = tfl.requantize(quantized, rule)
    weights = [t.name for t in nets.by_name(again).values() if t.latent is not None]
    assert weights == ["mid/kernel"]


# --- Another head


@pytest.mark.slow
def test_a_quantized_network_gets_another_head():
    """Transfer learning: the body is frozen, a new head is trained."""
    quantized = tfl.quantize(nets.randomize(nets.chain()), W2A2)
    body = quantized.get_layer("pool").output
    model = keras.Model(quantized.input, layers.Dense(2, name="new_head")(body))
    for layer in model.layers[:-1]:
        layer.trainable = False
    before = nets.snapshot(model.weights)
    nets.train_step(model, nets.images(), nets.labels(classes=2), eager=True)
    after = nets.snapshot(model.weights)
    moved = {
        weight.name
        for weight, a, b in zip(model.weights, before, after, strict=True)
        if (a != b).any()
    }
    assert moved == {"new_head/kernel:0", "new_head/bias:0"}
    # And it can be quantized with the rest.
    rule = tfl.PrecisionRule(".*", 2, 2, edges=True)
    assert "new_head/kernel" in nets.by_name(tfl.requantize(model, rule))


# --- What is refused


@pytest.mark.slow
def test_what_cannot_be_stripped():
    quantized = tfl.quantize(nets.chain(), W2A2)
    with pytest.raises(ValueError, match=r"'quantized'\)\. Received: weights='none'"):
        tfl.strip(quantized, weights="none")
    with pytest.raises(ValueError, match="nothing is quantized"):
        tfl.strip(nets.chain())
    with pytest.raises(ValueError, match="Received: LowBitTrainer"):
        tfl.strip(tfl.LowBitTrainer(quantized))
    for refused in (None, "net.keras"):
        with pytest.raises(ValueError, match="must be a tf_keras Model"):
            tfl.requantize(refused)


class TheirConfig(tfmot.quantization.keras.QuantizeConfig):
    """Quantizes nothing, in a way that we know nothing of."""

    def get_weights_and_quantizers(self, layer):
        return []

    def set_quantize_weights(self, layer, quantize_weights):
        pass

    def get_activations_and_quantizers(self, layer):
        return []

    def set_quantize_activations(self, layer, quantize_activations):
        pass

    def get_output_quantizers(self, layer):
        return []

    def get_config(self):
        return {}


@pytest.mark.slow
def test_another_librarys_quantizer_is_named():
    theirs = tfmot.quantization.keras

    def annotate(layer):
        if layer.name == "head":
            return theirs.quantize_annotate_layer(layer, TheirConfig())
        return theirs.quantize_annotate_layer(layer)

    annotated = keras.models.clone_model(nets.perceptron(), clone_function=annotate)
    with keras.utils.custom_object_scope({"TheirConfig": TheirConfig}):
        mixed = theirs.quantize_apply(
            annotated,
            scheme=tfl.LowBitScheme(
                tfl.PrecisionRule(".*", 2, 32, activation_quantizer="dorefa")
            ),
            quantized_layer_name_prefix="",
        )
        with pytest.raises(ValueError, match="layer 'head' with TheirConfig"):
            tfl.strip(mixed)


@pytest.mark.slow
def test_a_network_within_a_model():
    quantized = tfl.quantize(nets.randomize(nets.chain()), LEARNED)
    image = keras.Input(nets.IMAGE)
    model = keras.Model(image, layers.Dense(2, name="after")(quantized(image)))
    stripped = tfl.strip(model)
    assert "mid" in types(stripped)
    expected = layers.Dense(2)
    expected.build((None, nets.CLASSES))
    expected.set_weights(model.get_layer("after").get_weights())
    np.testing.assert_allclose(
        stripped(nets.images()),
        expected(tfl.strip(quantized)(nets.images())),
        rtol=1e-6,
        atol=1e-6,
    )


@keras.utils.register_keras_serializable(package="tests")
class LowRank(layers.Layer):
    """A kernel, and a layer within that has a kernel, too."""

    def __init__(self, units, **arguments):
        super().__init__(**arguments)
        self.units = units
        self.inner = layers.Dense(units, use_bias=False)

    def build(self, input_shape):
        self.kernel = self.add_weight("kernel", (input_shape[-1], self.units))
        self.inner.build(input_shape)
        super().build(input_shape)

    def call(self, inputs):
        return keras.backend.dot(inputs, self.kernel) + self.inner(inputs)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@pytest.mark.slow
def test_a_layer_within_a_layer_keeps_its_weights():
    tfl.register_layer(LowRank, {"kernel": (-1,)})
    image = keras.Input((6,))
    x = layers.ReLU(name="relu")(layers.Dense(8, name="first")(image))
    x = LowRank(5, name="composite")(x)
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    rule = tfl.PrecisionRule(".*", 2, 2)
    quantized = tfl.quantize(model, rule)
    x = nets.images(8, (6,))
    np.testing.assert_array_equal(tfl.strip(quantized)(x), model(x))
    np.testing.assert_array_equal(tfl.requantize(quantized, rule)(x), quantized(x))
    # 40 weights of 2 bits, and 40 floats in the layer within.
    (cost,) = (c for c in tfl.cost(quantized).layers if c.name == "composite")
    assert cost.weight_bytes == 40 // 4 + 4 * 40


@pytest.mark.slow
def test_residual_sums_keep_their_bits_unless_told_otherwise():
    model = tfl.quantize(nets.randomize(nets.preactivation()), LEARNED, residual_bits=8)
    tfl.calibrate(model, [inputs_of(model)])

    def bits_of(network):
        tensors = tfl.inspection.quantized_tensors(network)
        return {t.name: t.bits for t in tensors if t.is_residual}

    assert set(bits_of(model).values()) == {8}
    assert bits_of(tfl.requantize(model, LEARNED)) == bits_of(model)
    assert not bits_of(tfl.requantize(model, LEARNED, residual_bits=None))
    plain = tfl.quantize(nets.preactivation())
    assert not bits_of(tfl.requantize(plain, LEARNED))
    assert bits_of(tfl.requantize(plain, LEARNED, residual_bits=8)) == bits_of(model)
