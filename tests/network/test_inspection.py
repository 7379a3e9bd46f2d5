import numpy as np
import pytest

from tests.scheme import nets
from tf_lowbit import LowBitTrainer, PrecisionRule, quantize, quantizers
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import inspection

layers = keras.layers
W2A2 = PrecisionRule(".*", weight_bits=2, activation_bits=2)
ALL_WEIGHTS = [
    quantizers.DoReFaWeightQuantizer(),
    quantizers.LSQWeightQuantizer(),
    quantizers.LSQWeightQuantizer(per_axis=True, narrow_range=True),
    quantizers.UniformWeightQuantizer(),
    quantizers.UniformWeightQuantizer(per_axis=False),
]


def test_names_roles_and_order():
    tensors = list(inspection.quantized_tensors(quantize(nets.every_layer(), W2A2)))
    assert [(tensor.name, tensor.role) for tensor in tensors] == [
        ("stem_relu/output", "activation"),
        ("conv/kernel", "weight"),
        ("conv_relu/output", "activation"),
        ("depthwise/depthwise_kernel", "weight"),
        ("depthwise_relu/output", "activation"),
        ("separable_depthwise/depthwise_kernel", "weight"),
        ("separable_depthwise_quantizer/output", "activation"),
        ("separable/kernel", "weight"),
        ("separable_relu/output", "activation"),
        ("transpose/kernel", "weight"),
        ("transpose_relu/output", "activation"),
        ("conv1d/kernel", "weight"),
        ("conv1d_relu/output", "activation"),
        ("dense/kernel", "weight"),
    ]
    for tensor in tensors:
        assert tensor.bits == tensor.quantizer.bits == 2
        assert (tensor.latent is None) == (tensor.role == "activation")
        assert tensor.quantizer.role == tensor.role


@pytest.mark.slow
def test_names_are_unique_after_a_mobilenet():
    tensors = list(inspection.quantized_tensors(quantize(nets.mobilenet_like(), W2A2)))
    names = [tensor.name for tensor in tensors]
    assert len(set(names)) == len(names) == 20


@pytest.mark.quick(3)
@pytest.mark.parametrize("quantizer", ALL_WEIGHTS, ids=repr)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_times_step_is_the_quantized_weight(quantizer, bits):
    rule = PrecisionRule(".*", weight_bits=bits, weight_quantizer=quantizer)
    (tensor,) = inspection.quantized_tensors(
        quantize(nets.randomize(nets.perceptron()), rule)
    )
    codes, quantized = tensor.codes(), tensor.quantized().numpy()
    step = tensor.quantizer.step(tensor.latent, tensor.variables).numpy()
    assert codes.dtype == "int32"
    np.testing.assert_array_equal(codes.numpy().astype(np.float32) * step, quantized)
    assert quantized.shape == tensor.latent.shape


def test_the_quantized_weight_is_what_the_network_uses():
    model = quantize(nets.randomize(nets.every_layer()), W2A2)
    tensors = nets.by_name(model)
    for name, used in nets.used_weights(model, nets.images()).items():
        np.testing.assert_array_equal(tensors[name].quantized(), used)


def test_assigned_bits_hold_from_the_next_call_on():
    model = quantize(nets.randomize(nets.perceptron()), W2A2)
    tensor = nets.by_name(model)["mid/kernel"]
    tensor.assign_bits(5)
    assert (tensor.bits, tensor.quantizer.bits) == (5, 2)
    used = nets.used_weights(model, nets.images(shape=(5,)))["mid/kernel"]
    assert 4 < np.unique(used).size <= 32
    np.testing.assert_array_equal(tensor.quantized(), used)


@pytest.mark.quick(2)
@pytest.mark.parametrize("bits", [0, 9, "2", None])
def test_bad_bits_are_refused(bits):
    tensor = nets.by_name(quantize(nets.perceptron(), W2A2))["mid/kernel"]
    with pytest.raises(ValueError, match=f"Received: bits={bits!r}"):
        tensor.assign_bits(bits)
    assert tensor.bits == 2


def test_activations_have_no_value_of_their_own():
    tensor = nets.by_name(quantize(nets.perceptron(), W2A2))["relu1/output"]
    for read in (tensor.quantized, tensor.codes):
        with pytest.raises(ValueError, match="Received: relu1/output"):
            read()


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("name", "calibrated"),
    [("dorefa", True), ("pact", False), ("lsq", False), ("uniform", False)],
)
def test_is_calibrated(name, calibrated):
    rule = PrecisionRule(".*", 2, 2, activation_quantizer=name)
    tensors = nets.by_name(quantize(nets.perceptron(), rule))
    assert tensors["relu1/output"].is_calibrated is calibrated
    assert tensors["mid/kernel"].is_calibrated


def test_learned_weight_steps_start_from_the_weights():
    paper = quantizers.LSQWeightQuantizer(initialization="paper")
    rule = PrecisionRule(".*", 3, weight_quantizer=paper)
    model = nets.randomize(nets.perceptron())
    tensor = nets.by_name(quantize(model, rule))["mid/kernel"]
    mean = np.abs(model.get_layer("mid").kernel.numpy()).mean()
    np.testing.assert_allclose(tensor.variables["step"], 2 * mean / 3**0.5, rtol=1e-6)


@pytest.mark.slow
def test_input_activations():
    image = keras.Input(nets.IMAGE, name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="stem")(image)
    a = layers.Conv2D(4, 1, activation="relu", name="a")(x)
    b = layers.Conv2D(4, 1, name="b")(x)
    x = layers.MaxPooling2D(2, name="max")(layers.Concatenate(name="both")([a, b]))
    x = layers.Conv2D(4, 1, activation="relu", name="c")(x)
    x = layers.Dense(2, name="head")(layers.Flatten(name="flat")(x))
    model = keras.Model(image, x)

    def names(model):
        return {
            layer: [source and source.name for source in sources]
            for layer, sources in inspection.input_activations(model).items()
        }

    assert names(quantize(model, W2A2)) == {
        "stem": [None],
        "a": ["stem_relu/output"],
        "b": ["stem_relu/output"],
        "c": ["a_relu/output", "b_quantizer/output"],
        "head": [None],
    }
    assert set(names(model)) == {"stem", "a", "b", "c", "head"}
    assert {s for sources in names(model).values() for s in sources} == {None}


@pytest.mark.slow
def test_paths_that_part_and_join_are_walked_once():
    # Two to the power of 40 of them.
    x = image = keras.Input(nets.IMAGE)
    x = layers.Conv2D(4, 1, activation="relu", name="stem")(x)
    for _ in range(40):
        x = layers.Concatenate()([layers.Cropping2D(0)(x), layers.Dropout(0.1)(x)])
        x = layers.Permute((1, 3, 2))(layers.Permute((1, 3, 2))(x))
        x = layers.Reshape((8, 16, -1))(x)
        x = layers.Cropping2D(((0, 0), (0, 8)))(x)
    x = layers.Conv2D(4, 1, name="mid")(x)
    model = keras.Model(image, layers.Conv2D(4, 1, name="head")(x))
    (read,) = inspection.input_activations(quantize(model, W2A2))["mid"]
    assert read.name == "stem_relu/output"


def test_input_activations_of_a_shared_layer():
    inputs = keras.Input((4,), name="in")
    shared = layers.Dense(4, name="shared")
    x = layers.Dense(4, activation="relu", name="first")(inputs)
    x = layers.ReLU(name="between")(shared(x))
    model = keras.Model(inputs, layers.Dense(2, name="head")(shared(x)))
    found = inspection.input_activations(quantize(model, W2A2))
    assert [s.name for s in found["shared"]] == ["first_relu/output", "between/output"]


@pytest.mark.slow
def test_residual_adds():
    def names(model):
        return {
            add.name: ([t and t.layer.name for t in add.inputs], add.output.layer.name)
            for add in inspection.residual_adds(model)
        }

    model = nets.mobilenet_like()
    assert names(quantize(model, W2A2, residual_bits=8)) == {
        "block1_add": (
            ["stem_relu", "block1_project_bn_residual"],
            "block1_add_residual",
        ),
        "block3_add": (
            ["block2_project_bn_residual", "block3_project_bn_residual"],
            "block3_add_residual",
        ),
    }
    assert names(quantize(model, W2A2)) == names(model) == {}


@pytest.mark.slow
def test_residual_adds_in_front_of_a_relu():
    image = keras.Input(nets.IMAGE, name="image")
    x = layers.Conv2D(4, 1, activation="relu", name="stem")(image)
    y = layers.Dropout(0.1, name="drop")(layers.MaxPooling2D(1, name="max")(x))
    x = layers.Add(name="one")([layers.Conv2D(4, 1, name="a")(x), y])
    x = layers.ReLU(name="relu")(x)
    x = layers.Add(name="plain")([x, x])
    x = layers.ReLU(name="last")(layers.Conv2D(4, 1, name="b")(x))
    model = keras.Model(image, layers.Dense(2, name="head")(x))
    rules = [PrecisionRule("relu", activation_bits=2), W2A2]
    (add,) = inspection.residual_adds(quantize(model, rules, residual_bits=8))
    assert add.name == "one"
    assert [t.name for t in add.inputs] == ["a_residual/output", "stem_relu/output"]
    assert add.output.name == "relu/output"
    assert [t.is_residual for t in (*add.inputs, add.output)] == [True, False, False]


@pytest.mark.slow
def test_parameters_leave_out_the_state_of_training():
    rule = PrecisionRule(
        ".*", 2, 2, weight_quantizer="lsq", activation_quantizer="pact"
    )
    model = quantize(nets.chain(), rule)

    def names(layer):
        found = inspection.parameters(model.get_layer(layer))
        return {w.name.split(":")[0].split("/")[-1] for w in found}

    assert names("mid") == {"kernel", "bias", "kernel_step"}
    assert names("relu1") == {"output_alpha"}
    assert names("stem") == {"kernel", "bias"}
    assert names("bn1") == {"gamma", "beta", "moving_mean", "moving_variance"}


def test_require_quantized():
    assert len(inspection.require_quantized(quantize(nets.perceptron(), W2A2))) == 2
    with pytest.raises(ValueError, match="Received: 'perceptron'"):
        inspection.require_quantized(nets.perceptron())
    with pytest.raises(ValueError, match="Received: str"):
        inspection.require_quantized("perceptron")


@pytest.mark.quick(1)
@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_trainers_networks_are_its_students(with_teacher):
    one, other = quantize(nets.perceptron(), W2A2), quantize(nets.perceptron(), W2A2)
    teacher = nets.perceptron() if with_teacher else None
    trainer = LowBitTrainer({"one": one, "other": other}, teacher)
    found = inspection.networks(trainer)
    assert len(found) == 2
    assert found[0] is one
    assert found[1] is other
    expected = [t for n in found for t in inspection.quantized_tensors(n)]
    tensors = list(inspection.quantized_tensors(trainer))
    assert [t.layer for t in tensors] == [t.layer for t in expected]
    assert [t.role for t in tensors] == ["activation", "weight"] * 2
    assert len(inspection.require_quantized(trainer)) == 4
    tensors[-1].assign_bits(5)
    assert [nets.by_name(n)["mid/kernel"].bits for n in (one, other)] == [2, 5]


def test_a_network_is_its_only_one():
    for model in (nets.perceptron(), quantize(nets.perceptron(), W2A2)):
        (found,) = inspection.networks(model)
        assert found is model


@pytest.mark.slow
def test_quantizers_in_a_model_among_the_layers_are_not_passed_over():
    first, second = (quantize(nets.chain()) for _ in range(2))
    second._name = "second"
    inputs = keras.Input(first.input_shape[1:])
    outputs = layers.Concatenate()([first(inputs), second(inputs)])
    nested = keras.Model(inputs, outputs)
    with pytest.raises(ValueError, match="must be the model's own"):
        inspection.require_quantized(nested)
    half = keras.Model(first.input, [first.output, second(first.input)])
    with pytest.raises(ValueError, match="must be the model's own"):
        inspection.require_quantized(half)


@pytest.mark.quick(1)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_learned_ranges_can_be_kept_out_of_weight_decay(decay):
    rule = PrecisionRule(".*", 2, 2, "lsq", "pact")
    model = quantize(nets.randomize(nets.chain()), rule)
    found = inspection.learned_ranges(model)
    kinds = sorted(inspection.short_name(v).split("_")[-1] for v in found)
    assert set(kinds) == {"alpha", "step"}
    optimizer = keras.optimizers.SGD(1.0, weight_decay=decay)
    optimizer.exclude_from_weight_decay(var_list=found)
    before = [v.numpy() for v in model.trainable_variables]
    zeros = [tf.zeros_like(v) for v in model.trainable_variables]
    optimizer.apply_gradients(zip(zeros, model.trainable_variables, strict=True))
    names = {v.name for v in found}
    for variable, value in zip(model.trainable_variables, before, strict=True):
        share = 1.0 if variable.name in names else 1.0 - decay
        np.testing.assert_allclose(variable, share * value, rtol=1e-6)
