"""`quantize`: what carries over, what stays, what is refused."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit import (
    PrecisionRule,
    QuantizationWarning,
    calibrate,
    load_model,
    quantize,
    quantizers,
    requantize,
)
from tf_lowbit.compat import keras, tf, tfmot
from tf_lowbit.network import graph, inspection

layers = keras.layers
W2A2 = PrecisionRule(".*", weight_bits=2, activation_bits=2)
LEARNED = PrecisionRule(
    ".*", 2, 2, weight_quantizer="lsq", activation_quantizer="lsq", edges=True
)


@pytest.fixture
def bfloat16():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    yield
    keras.mixed_precision.set_global_policy("float32")


def state_of(model):
    return model.to_json(), nets.snapshot(model.weights), model(nets.images()).numpy()


def test_the_float_model_is_not_changed():
    model = nets.randomize(nets.chain())
    config, weights, outputs = state_of(model)
    quantized = quantize(model, LEARNED)
    nets.train_step(quantized, nets.images(), nets.labels(), eager=True)
    after = state_of(model)
    assert after[0] == config
    nets.assert_all_equal(after[1], weights)
    np.testing.assert_array_equal(after[2], outputs)
    assert not {id(v) for v in model.weights} & {id(v) for v in quantized.weights}
    nets.train_step(model, nets.images(), nets.labels(), eager=True)


def test_weights_carry_over():
    model = nets.randomize(nets.every_layer())
    quantized = quantize(model, W2A2)
    for layer in model.layers:
        expected = _by_name(layer.weights)
        if isinstance(layer, keras.layers.SeparableConv2D):  # It is split in two.
            expected["kernel:0"] = expected.pop("pointwise_kernel:0")
            (first,) = inspection.parameters(
                quantized.get_layer(f"{layer.name}_depthwise")
            )
            np.testing.assert_array_equal(first, expected.pop("depthwise_kernel:0"))
        actual = _by_name(inspection.parameters(quantized.get_layer(layer.name)))
        assert actual.keys() == expected.keys(), layer.name
        for name, value in expected.items():
            np.testing.assert_array_equal(actual[name], value)


def _by_name(weights):
    return {weight.name.split("/")[-1]: weight.numpy() for weight in weights}


def test_statistics_of_batch_normalization_carry_over():
    model = nets.randomize(nets.chain())
    quantized = quantize(model, W2A2)
    for name in ("bn1", "bn2", "bn3"):
        nets.assert_all_equal(
            quantized.get_layer(name).get_weights(), model.get_layer(name).get_weights()
        )


@pytest.mark.quick(1)
@pytest.mark.parametrize("build", [nets.chain, nets.every_layer, nets.perceptron])
def test_unrounded_equals_float(build):
    model = nets.randomize(build())
    rule = PrecisionRule(
        ".*",
        weight_bits=32,
        activation_bits=32,
        weight_quantizer="uniform",
        activation_quantizer=quantizers.UniformActivationQuantizer(clip=64.0),
        edges=True,
    )
    inputs = nets.images(16, shape=model.input_shape[1:])
    quantized = quantize(model, rule)
    np.testing.assert_allclose(quantized(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_unrounded_equals_float_with_calibrated_ranges():
    model = nets.randomize(nets.chain(batch_norm=False))
    rule = PrecisionRule(
        ".*", 32, 32, weight_quantizer="uniform", activation_quantizer="pact"
    )
    quantized = quantize(model, rule)
    calibrate(quantized, [nets.images()])
    np.testing.assert_allclose(
        quantized(nets.images()), model(nets.images()), rtol=1e-4, atol=1e-4
    )


def test_layer_names_and_outputs_stay():
    model = nets.mobilenet_like()
    quantized = quantize(model, LEARNED)
    names = [layer.name for layer in quantized.layers]
    assert len(set(names)) == len(names)
    assert {layer.name for layer in model.layers} <= set(names)
    assert quantized.name == model.name
    outputs = {name: quantized.get_layer(name).output for name in names}
    features = keras.Model(quantized.inputs, outputs)
    shapes = {n: y.shape for n, y in features(nets.images(2, (16, 16, 3))).items()}
    for layer in model.layers[1:]:
        assert shapes[layer.name] == (2, *layer.output_shape[1:])
        assert quantized.get_layer(layer.name).output_shape == layer.output_shape


def test_the_result_is_functional_and_not_compiled():
    model = nets.perceptron()
    model.compile("sgd", "mse")
    quantized = quantize(model, W2A2)
    assert quantized._is_graph_network
    assert not isinstance(quantized, keras.Sequential)
    assert quantized.optimizer is None


def test_however_often_the_network_is_rebuilt_nothing_is_traced(monkeypatch):
    traced = []
    for kind in (layers.Conv2D, layers.Dense):

        def counted(self, inputs, *, call=kind.call):
            traced.append(self.name)
            return call(self, inputs)

        monkeypatch.setattr(kind, "call", counted)
    model = nets.chain()
    traced.clear()
    quantized = quantize(model, PrecisionRule(".*", 2, 2, edges=True))
    assert traced == []

    def lists():
        inside = [inspection.wrapped_layer(layer) for layer in quantized.layers]
        return [[w.name for w in each.weights] for each in (quantized, *inside)]

    before = lists()
    quantized(nets.images())
    assert sorted(traced) == ["head", "last", "mid", "stem"]
    assert lists() == before  # Files and optimizers rely on it.


@keras.utils.register_keras_serializable("tests")
class Switched(layers.Dense):
    """A layer of one's own, whose `call` AutoGraph must convert."""

    def call(self, inputs):
        outputs = super().call(inputs)
        if tf.reduce_mean(inputs) > 0:
            outputs = -outputs
        return outputs


tfl.register_layer(Switched, {"kernel": (-1,)})


@keras.utils.register_keras_serializable("tests")
class Nested(layers.Layer):
    """A layer of one's own that holds a model, which has a name of the outer one."""

    def __init__(self, name=None, **arguments):
        super().__init__(name=name, **arguments)
        image = keras.Input((4,))
        within = layers.Dense(7, name="mid")(image)
        self.within = keras.Model(image, layers.Dense(2, name="end")(within))

    def call(self, inputs):
        return self.within(inputs)


def test_own_layers_are_called_as_they_are_without_rounding():
    x = image = keras.Input((6,))
    x = layers.Dense(8, activation="relu", name="stem")(x)
    x = layers.ReLU()(Switched(4, name="mid")(x))
    model = keras.Model(image, layers.Dense(3, name="head")(Nested()(x)))
    rules = PrecisionRule("mid", 8, 8, "uniform", "uniform")
    quantized = quantize(model, rules)
    assert quantized.get_layer("mid").layer.__class__ is Switched
    images = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    calibrate(quantized, [images])
    np.testing.assert_allclose(
        quantized.predict(images, verbose=0), model(images), atol=0.05
    )
    assert np.ptp(model(images)) > 0.3


def test_the_default_is_two_bits_inside():
    tensors = nets.by_name(quantize(nets.chain()))
    assert {name: tensor.bits for name, tensor in tensors.items()} == {
        "relu1/output": 2,
        "mid/kernel": 2,
        "relu2/output": 2,
        "last/kernel": 2,
    }


def test_frozen_layers_stay_frozen():
    model = nets.chain()
    for name in ("mid", "bn2"):
        model.get_layer(name).trainable = False
    quantized = quantize(model, W2A2)
    assert {x.name for x in quantized.layers if not x.trainable} == {"mid", "bn2"}
    frozen = {w.name for w in model.non_trainable_weights if "mid" in w.name}
    assert len(frozen) == 2
    trained = {w.name for w in quantized.trainable_weights}
    assert not {name for name in trained if name.startswith("mid/")}
    before = quantized.get_layer("mid").get_weights()
    nets.train_step(quantized, nets.images(), nets.labels(), eager=True)
    nets.assert_all_equal(quantized.get_layer("mid").get_weights(), before)


def test_a_layer_can_be_frozen_and_thawed_afterwards():
    quantized = quantize(nets.chain(batch_norm=False), LEARNED)
    count = len(quantized.trainable_weights)
    quantized.get_layer("mid").trainable = False
    # Kernel, bias and the learned step.
    assert len(quantized.trainable_weights) == count - 3
    quantized.get_layer("mid").trainable = True
    assert len(quantized.trainable_weights) == count


def test_regularization_is_counted_once():
    model = nets.randomize(nets.chain(l2=0.01))
    quantized = quantize(model, W2A2)
    expected = sum(
        0.01 * np.sum(np.square(model.get_layer(name).kernel.numpy()))
        for name in ("stem", "mid", "last", "head")
    )
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    assert len(quantized.losses) == 4
    assert float(sum(quantized.losses)) == pytest.approx(expected, rel=1e-5)
    # Neither a call nor a change of bits adds to it.
    quantized(nets.images())
    nets.by_name(quantized)["mid/kernel"].assign_bits(1)
    assert float(sum(quantized.losses)) == pytest.approx(expected, rel=1e-5)


def test_the_decay_of_alpha_is_a_loss():
    pact = quantizers.PACTActivationQuantizer(alpha=3.0, alpha_decay=0.5)
    rule = PrecisionRule(".*", 2, 2, activation_quantizer=pact)
    quantized = quantize(nets.chain(), rule)
    assert float(sum(quantized.losses)) == pytest.approx(2 * 0.5 * 9.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "activations"),
    [("dorefa", "dorefa"), ("lsq", "lsq"), ("uniform", "pact"), ("lsq", "uniform")],
)
def test_every_trainable_variable_moves(weights, activations):
    # Few bits, so that PACT's clip has values above it.
    rule = PrecisionRule(
        ".*", 2, 2, weight_quantizer=weights, activation_quantizer=activations
    )
    model = nets.randomize(nets.chain(batch_norm=False, width=6))
    quantized = quantize(model, rule)
    inputs = nets.images(8)
    calibrate(quantized, [inputs])
    quantized.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    names = [v.name for v in quantized.trainable_variables]
    assert len(set(names)) == len(names)
    before = nets.snapshot(quantized.trainable_variables)
    quantized.fit(inputs, nets.labels(8), batch_size=8, verbose=0)
    after = nets.snapshot(quantized.trainable_variables)
    still = [
        name
        for name, b, a in zip(names, before, after, strict=True)
        if np.array_equal(b, a)
    ]
    assert not still
    learned = [n for n in names if "step" in n or "alpha" in n]
    assert len(learned) == {"lsq": 2}.get(weights, 0) + {"lsq": 2, "pact": 2}.get(
        activations, 0
    )


@pytest.mark.slow
def test_bfloat16_keeps_the_latent_weights_in_float32(bfloat16):
    quantized = quantize(nets.chain(), LEARNED)
    assert quantized.get_layer("mid").compute_dtype == "bfloat16"
    calibrate(quantized, [nets.images()])
    before = nets.snapshot(quantized.trainable_variables)
    loss = nets.train_step(quantized, nets.images(), nets.labels(), eager=True)
    assert np.isfinite(loss)
    assert {w.dtype for w in quantized.trainable_variables} == {tf.float32}
    after = nets.snapshot(quantized.trainable_variables)
    moved = [not np.array_equal(b, a) for b, a in zip(before, after, strict=True)]
    assert np.mean(moved) > 0.8
    assert quantized(nets.images()).dtype == tf.bfloat16
    for tensor in nets.by_name(quantized).values():
        if tensor.latent is not None:
            assert tensor.latent.dtype == tf.float32
            assert tensor.quantized().dtype == tf.float32
            assert np.unique(tensor.quantized()).size <= 4


def test_a_subclassed_model_is_refused():
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match=r"Received: Subclassed"):
        quantize(Subclassed(), W2A2)


def test_an_unbuilt_model_is_refused():
    model = keras.Sequential([layers.Dense(2)], name="later")
    with pytest.raises(ValueError, match=r"Received: unbuilt Sequential 'later'"):
        quantize(model, W2A2)


def test_a_sequential_model_that_was_built_by_shape_is_taken():
    model = keras.Sequential([layers.Dense(3, name=f"dense{i}") for i in range(3)])
    model.build((None, 5))
    assert set(nets.by_name(quantize(model, W2A2))) == {
        "dense0_quantizer/output",
        "dense1/kernel",
    }


def test_a_nested_model_is_flattened():
    """A frozen backbone that stays in inference mode, as for transfer learning."""
    backbone = nets.mobilenet_like()
    backbone.trainable = False
    image = keras.Input((16, 16, 3), name="photo")
    x = layers.ReLU(name="relu")(backbone(image, training=False))
    model = nets.randomize(keras.Model(image, layers.Dense(3, name="new_head")(x)))
    quantized = quantize(model, W2A2)
    found = nets.by_name(quantized)
    assert {"block1_expand/kernel", "head/kernel"} <= set(found)
    expected = {w.name: w.numpy() for w in graph.flatten(model).weights}
    for tensor in found.values():
        if tensor.latent is not None:
            np.testing.assert_array_equal(tensor.latent, expected[tensor.latent.name])
    before = {w.name: w.numpy() for w in quantized.weights}
    images = nets.images(shape=(16, 16, 3))
    nets.train_step(quantized, images, nets.labels(classes=3), eager=True)
    moved = {w.name for w in quantized.weights if (w.numpy() != before[w.name]).any()}
    assert moved == {"new_head/kernel:0", "new_head/bias:0"}


def test_a_subclassed_model_within_is_refused():
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    image = keras.Input((4,))
    model = keras.Model(image, layers.Dense(2)(Own(name="own")(image)))
    with pytest.raises(ValueError, match=r"Received: 'own', Own"):
        quantize(model, W2A2)


@pytest.mark.slow
def test_a_quantized_model_within_is_refused():
    within = quantize(nets.chain(), W2A2)
    image = keras.Input(nets.IMAGE)
    model = keras.Model(image, layers.Dense(2)(within(image)))
    with pytest.raises(ValueError, match=r"requantize .*Received: .*'relu1'"):
        quantize(model, W2A2)
    again = requantize(model, W2A2)
    assert "mid/kernel" in nets.by_name(again)


@pytest.mark.quick(1)
@pytest.mark.parametrize("model", [None, "model.h5", 3, keras.layers.Dense(2)])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match=r"must be a Sequential .*Received: "):
        quantize(model, W2A2)


@pytest.mark.slow
def test_a_quantized_model_is_refused():
    quantized = quantize(nets.perceptron(), W2A2)
    with pytest.raises(ValueError, match=r"Received: .*quantized already: \['relu1'"):
        quantize(quantized, W2A2)


def test_a_model_without_weights_to_quantize_is_refused():
    model = keras.Sequential([layers.ReLU(input_shape=(4,)), layers.Flatten()])
    with pytest.raises(ValueError, match=r"Received: \['ReLU', 'Flatten'\]|InputLayer"):
        quantize(model, W2A2)


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", [4, 7, 16, 32, True, "8"], ids=repr)
def test_other_residual_bits_are_refused(bits):
    message = rf"^residual_bits must be 8 or None.*Received: residual_bits={bits!r}$"
    with pytest.raises(ValueError, match=message):
        quantize(nets.mobilenet_like(), W2A2, residual_bits=bits)


@pytest.mark.slow
def test_residual_bits_leave_all_else_as_it_is():
    model = nets.randomize(nets.preactivation())
    plain, residual = quantize(model, W2A2), quantize(model, W2A2, residual_bits=8)
    found = nets.by_name(residual)
    added = {name for name, tensor in found.items() if tensor.is_residual}
    assert len(added) == 6
    assert {n: t.quantizer for n, t in found.items() if n not in added} == {
        name: tensor.quantizer for name, tensor in nets.by_name(plain).items()
    }
    for layer in model.layers:
        expected = [p.numpy() for p in inspection.parameters(layer)]
        same = inspection.parameters(residual.get_layer(layer.name))
        nets.assert_all_equal([p.numpy() for p in same], expected)


@pytest.mark.slow
def test_bfloat16_with_residual_quantizers(bfloat16):
    model = nets.randomize(nets.preactivation())
    quantized = quantize(model, LEARNED, residual_bits=8)
    data = nets.images()
    calibrate(quantized, [data])
    layer = quantized.get_layer("one_add_residual")
    assert layer.compute_dtype == "bfloat16"
    step = nets.by_name(quantized)["one_add_residual/output"].variables["step"]
    assert step.dtype == tf.float32
    assert np.isfinite(nets.train_step(quantized, data, nets.labels(), eager=True))
    assert quantized(data).dtype == tf.bfloat16


def test_rules_that_leave_everything_float_are_refused():
    with pytest.raises(ValueError, match=r"last weight layer float.*Received: rules="):
        quantize(nets.perceptron(), PrecisionRule(".*"))


def test_two_layers_have_no_inside():
    model = keras.Sequential([layers.Dense(3, input_shape=(4,)), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"last weight layer float.*Received: rules="):
        quantize(model, W2A2)


@pytest.mark.quick(1)
@pytest.mark.parametrize("rules", [[], "conv", [2]])
def test_bad_rules_are_refused(rules):
    with pytest.raises(ValueError, match=r"Received: "):
        quantize(nets.perceptron(), rules)


def regularized():
    """A penalty on what a linear layer puts out, and one on a ReLU's."""
    penalty = keras.regularizers.L2(0.1)
    image = keras.Input((6,))
    x = layers.Dense(8, activation="relu", name="first")(image)
    x = layers.Dense(8, activity_regularizer=penalty, name="second")(x)
    plain = keras.Model(image, layers.Dense(3, name="head")(x))
    x = layers.ReLU(activity_regularizer=penalty, name="relu")(x)
    return plain, keras.Model(image, layers.Dense(3, name="head")(x))


@pytest.mark.slow
def test_what_a_layers_own_relu_put_out_is_not_regularized_before_it():
    penalty = keras.regularizers.L2(0.1)
    image = keras.Input((6,))
    x = layers.Dense(8, activation="relu", activity_regularizer=penalty, name="first")(
        image
    )
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    rule = PrecisionRule(".*", 8, 8, edges=True)
    with pytest.warns(QuantizationWarning, match="activity_regularizer of first is"):
        low_bit = quantize(model, rule)
    low_bit(nets.images(16, (6,)))
    assert low_bit.losses == []


@pytest.mark.slow
def test_an_activity_regularizer_goes_on():
    model, _ = regularized()
    x = nets.images(16, (6,))
    rule = PrecisionRule(".*", 8, 8, "uniform", "uniform", edges=True)
    low_bit = quantize(model, rule, strict=True)
    calibrate(low_bit, [x])
    model(x)
    (expected,) = model.losses
    low_bit(x)
    (found,) = low_bit.losses
    assert expected > 0.1
    # Eight bits are near enough to the float network.
    assert float(found) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.slow
def test_a_relus_activity_regularizer_is_named_for_it_is_left_out():
    _, model = regularized()
    rule = PrecisionRule(".*", 8, 8, edges=True)
    with pytest.warns(QuantizationWarning, match="activity_regularizer of relu is"):
        quantize(model, rule)
    with pytest.raises(ValueError, match="activity_regularizer of relu is"):
        quantize(model, rule, strict=True)


@pytest.mark.slow
def test_what_was_added_to_the_model_is_named_for_it_is_left_out():
    model, _ = regularized()
    model.add_loss(tf.reduce_mean(model.output))
    model.add_metric(tf.reduce_mean(model.output), name="mean")
    with pytest.warns(QuantizationWarning, match="add_loss or add_metric is left out"):
        quantize(model, PrecisionRule(".*", 8, 8))
    with pytest.raises(ValueError, match="add_loss or add_metric is left out"):
        quantize(model, PrecisionRule(".*", 8, 8), strict=True)


class OwnStep(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.slow
def test_a_models_own_training_step_is_named_for_it_is_left_out():
    chain = nets.chain()
    model = OwnStep(chain.inputs, chain.outputs)
    with pytest.warns(QuantizationWarning, match="train_step of class OwnStep is left"):
        quantize(model, W2A2)
    with pytest.raises(ValueError, match="train_step of class OwnStep is left out"):
        quantize(model, W2A2, strict=True)


@pytest.mark.quick(1)
@pytest.mark.parametrize("activation", [lambda x: 2.0 * x, nets.images])
def test_a_function_that_cannot_be_copied_is_refused_by_its_layers_name(activation):
    inputs = keras.Input((5,))
    x = layers.Dense(4, activation="relu", name="in")(inputs)
    mid = layers.Dense(4, name="mid")
    model = keras.Model(inputs, layers.Dense(2, name="head")(mid(x)))
    mid.activation = activation
    with pytest.raises(ValueError, match=r"able to make it.*Received: layer .mid."):
        quantize(model, W2A2)


@pytest.mark.slow
def test_the_shape_of_the_output_is_told():
    quantized = quantize(nets.mobilenet_like(), W2A2)
    assert quantized.compute_output_shape((7, 16, 16, 3)) == (
        7,
        *quantized.output_shape[1:],
    )


def test_masks_are_refused_by_name():
    image = keras.Input((6, 4))
    x = layers.Dense(5, activation="relu", name="dense")(layers.Masking()(image))
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    message = r"no Keras masks.*Received: .*\['dense', 'pool'\]"
    with pytest.raises(ValueError, match=message):
        quantize(model, PrecisionRule(".*", 2, 2))


@pytest.fixture
def global_policy():
    yield keras.mixed_precision.set_global_policy
    keras.mixed_precision.set_global_policy("float32")


@pytest.mark.slow
@pytest.mark.parametrize("now", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("own", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_layers_keep_their_policy_whatever_the_global_one_is(
    own, now, global_policy, tmp_path
):
    global_policy(own)
    image = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, name="first")(image)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(4, 3, activation="relu", name="second")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(3, dtype="float32", name="head")(x))
    global_policy(now)
    rule = PrecisionRule(".*", 4, 4, edges=True)
    low_bit = quantize(model, rule)
    assert keras.mixed_precision.global_policy().name == now
    own_dtypes = {layer.name: layer.compute_dtype for layer in model.layers}
    dtypes = {layer.name: layer.compute_dtype for layer in low_bit.layers}
    assert {name: dtypes[name] for name in own_dtypes} == own_dtypes
    assert dtypes["second_relu"] == own_dtypes["second"]
    assert {w.dtype for w in low_bit.trainable_weights} == {tf.float32}
    low_bit.compile("sgd", "mse")
    low_bit.fit(nets.images(4, (8, 8, 2)), np.zeros((4, 3)), verbose=0)
    low_bit.save(tmp_path / "net.keras")
    again = requantize(load_model(tmp_path / "net.keras"), rule)
    assert {layer.name: layer.compute_dtype for layer in again.layers} == dtypes


@pytest.mark.slow
@pytest.mark.parametrize("own", ["float64", "float16"])
@pytest.mark.parametrize("others", ["float32", "float64", "mixed_float16"])
def test_layers_of_a_pure_precision_keep_it(own, others, global_policy):
    global_policy(others)
    image = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, activation="relu", name="first")(image)
    x = layers.Conv2D(4, 3, activation="relu", name="second", dtype=own)(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(3, dtype="float32", name="head")(x))
    low_bit = quantize(model, PrecisionRule(".*", 4, 4, edges=True))
    for layer in model.layers:
        assert low_bit.get_layer(layer.name).compute_dtype == layer.compute_dtype
    kernel = inspection.quantized_tensors(low_bit)
    kernel = next(t for t in kernel if t.name == "second/kernel")
    given = model.get_layer("second").kernel.numpy()
    np.testing.assert_array_equal(kernel.latent, given.astype(np.float32).astype(own))
    low_bit.compile("sgd", "mse")
    before = kernel.latent.numpy()
    low_bit.fit(nets.images(4, (8, 8, 2)), np.ones((4, 3)), verbose=0)
    assert np.any(kernel.latent.numpy() != before)


@pytest.mark.slow
def test_learned_steps_are_frozen_with_the_layers_they_belong_to():
    base = keras.Sequential(
        [
            layers.Conv2D(4, 3, activation="relu", input_shape=(8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
        ]
    )
    rules = PrecisionRule(".*", 2, 2, "lsq", "lsq", edges=True)
    for is_frozen in (True, False):
        base.trainable = not is_frozen
        inputs = keras.Input((8, 8, 3))
        head = layers.Dense(2, name="head")(base(inputs, training=False))
        model = quantize(keras.Model(inputs, head), rules)
        trained = {v.name.split("/")[0] for v in model.trainable_weights}
        assert (trained == {"head"}) == is_frozen
        assert any(name.endswith("_quantizer") for name in trained) != is_frozen


@pytest.mark.slow
def test_a_rule_for_layers_leaves_their_own_relus_to_those_that_read_them():
    model = keras.Sequential(
        [
            layers.Conv2D(4, 3, activation="relu", name="conv1", input_shape=(8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu", name="conv2"),
            layers.Flatten(),
            layers.Dense(8, activation="relu", name="fc1"),
            layers.Dense(3, name="fc2"),
        ]
    )
    rules = [PrecisionRule("conv.*", 8, 8, "uniform", "uniform"),
             PrecisionRule("fc.*", 2, 2)]  # fmt: skip
    bits = {
        t.name: t.bits for t in inspection.quantized_tensors(quantize(model, rules))
    }
    assert bits["conv2_relu/output"] == 2
    named = [PrecisionRule("conv2_relu", None, 4), *rules]
    bits = {
        t.name: t.bits for t in inspection.quantized_tensors(quantize(model, named))
    }
    assert bits["conv2_relu/output"] == 4


@keras.utils.register_keras_serializable(package="tests")
class HalfFrozen(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(4, trainable=False)
        self.second = layers.Dense(4)
        self.seen = 0

    def call(self, inputs):
        self.seen += 1
        return self.second(self.first(inputs))


def test_parts_that_their_layer_froze_keep_their_weights():
    own = HalfFrozen(name="own")
    model = nets.randomize(
        keras.Sequential(
            [keras.Input((6,)), layers.Dense(4), own, layers.Dense(4), layers.Dense(2)]
        )
    )
    copy = quantize(model, W2A2).get_layer("own")
    np.testing.assert_array_equal(copy.first.kernel, own.first.kernel)
    np.testing.assert_array_equal(copy.second.kernel, own.second.kernel)
    # TF-MOT's calls are not this layer's.
    assert copy.seen == 1


def test_weights_have_their_layers_names_after_quantize_apply():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Dense(4, name="second"),
            layers.Dense(2, name="head"),
        ]
    )
    annotated = tfmot.quantization.keras.quantize_annotate_model(model)
    applied = tfmot.quantization.keras.quantize_apply(
        annotated, tfl.LowBitScheme(W2A2), quantized_layer_name_prefix=""
    )
    names = {weight.name.split("/")[0] for weight in applied.weights}
    assert names == {"first", "norm", "relu", "second", "head"}
