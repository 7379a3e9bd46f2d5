"""`calibrate` and `recalibrate_batch_norm` against NumPy, and what they leave alone."""

import fractions
import functools
import math
import warnings

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit import PrecisionRule, calibrate, quantize, quantizers
from tf_lowbit.calibration.residual_steps import tie_residuals
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import inspection

layers = keras.layers
# Its first step is computed by hand.
LSQ = quantizers.LSQActivationQuantizer(initialization="paper")
BATCHES = [nets.images(16, (5,), seed) for seed in range(3)]


def quantized_perceptron(quantizer, bits=3):
    """Weights stay float: the activations can be computed by hand."""
    rule = PrecisionRule(".*", activation_bits=bits, activation_quantizer=quantizer)
    model = nets.randomize(nets.perceptron())
    return model, quantize(model, rule)


def first_activations(model, batches):
    kernel, bias = model.get_layer("in").get_weights()
    return np.concatenate([np.maximum(x @ kernel + bias, 0.0) for x in batches])


def squared_error(values, clip, bits):
    n = 2**bits - 1
    rounded = np.round(np.minimum(values, clip) * n / clip) * clip / n
    return np.mean(np.square(rounded - values))


@pytest.mark.quick(2)
@pytest.mark.parametrize(("name", "variable"), [("pact", "alpha"), ("uniform", "clip")])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_clip_of_least_squared_error(name, variable, bits):
    model, quantized = quantized_perceptron(name, bits)
    assert calibrate(quantized, BATCHES) == ["relu1/output"]
    tensor = nets.by_name(quantized)["relu1/output"]
    clip = float(tensor.variables[variable])
    values = first_activations(model, BATCHES)
    assert values.max() / 64 <= clip <= values.max() * 1.0001
    best = min(
        squared_error(values, share * values.max(), bits)
        for share in np.geomspace(1 / 64, 1, 400)
    )
    assert squared_error(values, clip, bits) <= 1.05 * best
    assert tensor.is_calibrated
    assert tensor.bits == bits


def test_the_first_step_of_lsq():
    model, quantized = quantized_perceptron(LSQ, 3)
    calibrate(quantized, BATCHES)
    step = float(nets.by_name(quantized)["relu1/output"].variables["step"])
    mean = first_activations(model, BATCHES).mean()
    assert step == pytest.approx(2 * mean / 7**0.5, rel=1e-5)


@pytest.mark.parametrize("batches", [1, 2])
def test_so_many_batches_are_used(batches):
    model, quantized = quantized_perceptron(LSQ, 2)
    calibrate(quantized, BATCHES, batches=batches)
    step = float(nets.by_name(quantized)["relu1/output"].variables["step"])
    mean = first_activations(model, BATCHES[:batches]).mean()
    assert step == pytest.approx(2 * mean / 3**0.5, rel=1e-5)


def test_a_signed_range_sees_both_sides():
    model = keras.Sequential(
        [layers.Dense(6, name=f"dense{i}", input_shape=(5,)) for i in range(2)]
    )
    lsq = PrecisionRule("dense1", activation_bits=3, activation_quantizer=LSQ)
    quantized = quantize(nets.randomize(model), lsq)
    calibrate(quantized, BATCHES)
    step = float(nets.by_name(quantized)["dense0_quantizer/output"].variables["step"])
    kernel, bias = model.get_layer("dense0").get_weights()
    mean = np.abs(np.concatenate(BATCHES) @ kernel + bias).mean()
    assert step == pytest.approx(2 * mean / 3**0.5, rel=1e-5)


def test_later_layers_see_quantized_weights_and_batch_statistics():
    rule = PrecisionRule(".*", 2, 2, activation_quantizer=LSQ)
    model = nets.randomize(nets.chain())
    quantized = quantize(model, rule)
    data = [nets.images(8, seed=seed) for seed in range(2)]
    assert calibrate(quantized, data) == ["relu1/output", "relu2/output"]

    def normalized(x, bn):
        gamma, beta, _, _ = bn.get_weights()
        scale = gamma / np.sqrt(x.var((0, 1, 2)) + bn.epsilon)
        return np.maximum((x - x.mean((0, 1, 2))) * scale + beta, 0.0)

    kernel, bias = model.get_layer("mid").get_weights()
    tangent = np.tanh(kernel)
    unit = tangent / (2 * np.abs(tangent).max()) + 0.5
    kernel = (2 * np.round(3 * unit) - 3) / 3
    seen = []
    for x in data:
        x = normalized(model.get_layer("stem")(x).numpy(), model.get_layer("bn1"))
        x = tf.nn.conv2d(x, kernel.astype(np.float32), 1, "SAME").numpy() + bias
        seen.append(normalized(x, model.get_layer("bn2")))
    step = float(nets.by_name(quantized)["relu2/output"].variables["step"])
    assert step == pytest.approx(2 * np.mean(seen) / 3**0.5, rel=1e-3)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["pact", "lsq", "uniform"])
def test_nothing_but_ranges_changes(name):
    rule = PrecisionRule(".*", 2, 2, weight_quantizer="lsq", activation_quantizer=name)
    model = quantize(nets.randomize(nets.chain(dropout=0.3)), rule)
    nets.by_name(model)["relu1/output"].assign_bits(4)
    nets.by_name(model)["last/kernel"].assign_bits(32)
    ranges = {
        variable.ref()
        for tensor in nets.by_name(model).values()
        if tensor.role == "activation"
        for key, variable in tensor.variables.items()
        if key != "bits"
    }
    others = [variable for variable in model.weights if variable.ref() not in ranges]
    before = nets.snapshot(others)
    calibrate(model, [nets.images()])
    nets.assert_all_equal(nets.snapshot(others), before)
    assert [model.get_layer(f"dropout{i}").rate for i in (1, 2, 3)] == [0.3] * 3
    assert all(t.is_calibrated for t in nets.by_name(model).values())


@pytest.mark.slow
def test_dropout_is_off():
    rule = PrecisionRule(".*", activation_bits=2, activation_quantizer="lsq")
    plain = nets.randomize(nets.chain())
    dropping = nets.randomize(nets.chain(dropout=0.9))
    steps = []
    for model in (plain, dropping):
        quantized = quantize(model, rule)
        calibrate(quantized, [nets.images()])
        steps.append(float(nets.by_name(quantized)["relu2/output"].variables["step"]))
    assert steps[0] == pytest.approx(steps[1], rel=1e-6)


def test_calibrating_again_gives_the_same():
    _, quantized = quantized_perceptron("pact")
    calibrate(quantized, BATCHES)
    before = nets.snapshot(quantized.weights)
    calibrate(quantized, BATCHES)
    nets.assert_all_equal(nets.snapshot(quantized.weights), before)


@pytest.mark.slow
def test_lsq_keeps_a_step_for_the_bits_that_hold():
    model, quantized = quantized_perceptron(LSQ, bits=2)
    tensor = nets.by_name(quantized)["relu1/output"]
    tensor.assign_bits(8)
    calibrate(quantized, BATCHES)
    mean = first_activations(model, BATCHES).mean()
    expected = 2 * mean / 255**0.5
    assert float(tensor.variables["step"]) == pytest.approx(expected, rel=1e-5)
    tensor.assign_bits(2)
    expected = 2 * mean / 3**0.5
    assert float(tensor.variables["step"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_shared_relu_sees_all_its_calls():
    inputs = keras.Input((5,), name="in")
    relu = layers.ReLU(name="relu")
    x = relu(layers.Dense(5, name="first")(inputs))
    x = relu(10.0 * layers.Dense(5, name="mid")(x))
    model = nets.randomize(keras.Model(inputs, layers.Dense(2, name="head")(x)))
    rule = PrecisionRule(".*", activation_bits=2, activation_quantizer=LSQ)
    quantized = quantize(model, rule)
    assert calibrate(quantized, BATCHES[:1]) == ["relu/output"]
    both = keras.Model(inputs, [relu.get_output_at(0), relu.get_output_at(1)])
    mean = np.mean(both(BATCHES[0]))
    step = float(nets.by_name(quantized)["relu/output"].variables["step"])
    assert step == pytest.approx(2 * mean / 3**0.5, rel=1e-4)


@pytest.mark.slow
def test_batches_of_a_dataset_with_labels():
    model, quantized = quantized_perceptron(LSQ)
    data = np.concatenate(BATCHES)
    dataset = tf.data.Dataset.from_tensor_slices((data, np.zeros(len(data)))).batch(16)
    calibrate(quantized, dataset)
    step = float(nets.by_name(quantized)["relu1/output"].variables["step"])
    mean = first_activations(model, BATCHES).mean()
    assert step == pytest.approx(2 * mean / 7**0.5, rel=1e-5)


@pytest.mark.slow
def test_a_dead_activation_gets_a_harmless_clip():
    model, _ = quantized_perceptron("pact")
    model.get_layer("in").set_weights([np.zeros((5, 6)), np.full(6, -1.0)])
    rule = PrecisionRule(".*", activation_bits=2, activation_quantizer="pact")
    quantized = quantize(model, rule)
    calibrate(quantized, BATCHES)
    assert float(nets.by_name(quantized)["relu1/output"].variables["alpha"]) == 1.0


@pytest.mark.slow
def test_dorefa_has_nothing_to_calibrate():
    _, quantized = quantized_perceptron("dorefa")
    before = nets.snapshot(quantized.weights)
    assert calibrate(quantized, BATCHES) == []
    nets.assert_all_equal(nets.snapshot(quantized.weights), before)


@pytest.mark.quick(1)
@pytest.mark.parametrize("dataset", [[], iter(()), tf.data.Dataset.range(0)])
def test_an_empty_dataset_is_refused(dataset):
    _, quantized = quantized_perceptron("pact")
    before = nets.snapshot(quantized.weights)
    with pytest.raises(ValueError, match=r"dataset must hold.*Received: none"):
        calibrate(quantized, dataset)
    nets.assert_all_equal(nets.snapshot(quantized.weights), before)


@pytest.mark.quick(1)
@pytest.mark.parametrize("batches", [0, -1])
def test_no_batches_are_refused(batches):
    _, quantized = quantized_perceptron("pact")
    with pytest.raises(ValueError, match=f"Received: batches={batches}"):
        calibrate(quantized, BATCHES, batches=batches)


@pytest.mark.parametrize("model", [nets.perceptron(), None])
def test_a_model_that_is_not_quantized_is_refused(model):
    with pytest.raises(ValueError, match=r"model must be .*Received: "):
        calibrate(model, BATCHES)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["pact", "lsq", "uniform"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(name, value):
    _, quantized = quantized_perceptron(name)
    before = nets.snapshot(quantized.weights)
    data = BATCHES[0].copy()
    data[3, 2] = value
    with pytest.raises(ValueError, match=r"^relu1/output: .*NaN or inf"):
        calibrate(quantized, [BATCHES[1], data])
    nets.assert_all_equal(nets.snapshot(quantized.weights), before)


@pytest.mark.slow
def test_a_failure_in_a_later_layer_changes_nothing():
    rule = PrecisionRule(".*", activation_bits=2, activation_quantizer="pact")
    quantized = quantize(nets.chain(batch_norm=False), rule)
    kernel, bias = quantized.get_layer("mid").get_weights()
    kernel[0, 0, 0, 0] = np.nan
    quantized.get_layer("mid").set_weights([kernel, bias])
    before = nets.snapshot(quantized.weights)
    with pytest.raises(ValueError, match=r"^relu2/output: "):
        calibrate(quantized, [nets.images()])
    nets.assert_all_equal(nets.snapshot(quantized.weights), before)


@pytest.mark.slow
def test_state_comes_back_when_the_data_do_not_fit():
    rule = PrecisionRule(".*", 2, 2, activation_quantizer="pact")
    quantized = quantize(nets.chain(dropout=0.3), rule)
    before = nets.snapshot(quantized.weights)
    with pytest.raises(ValueError):
        calibrate(quantized, [nets.images(), nets.images(shape=(8, 8, 5))])
    nets.assert_all_equal(nets.snapshot(quantized.weights), before)
    assert quantized.get_layer("dropout1").rate == 0.3


@pytest.mark.slow
def test_signed_uniform_ranges_are_calibrated_too():
    rule = PrecisionRule(".*", 2, 2)
    model = quantize(nets.mobilenet_like(), rule)
    data = [nets.images(2, (16, 16, 3))]
    names = calibrate(model, data, fit_batch_norm=False)
    # DoReFa's own are fixed; the three inserted ones are not.
    assert len(names) == 3
    assert set(names) < set(calibrate(model, data))
    for name in names:
        quantizer = nets.by_name(model)[name].quantizer
        assert isinstance(quantizer, quantizers.UniformActivationQuantizer)


# --- residual quantizers


def ratios_of(model):
    """Name of an Add -> [step of input / step of output], and the output's name."""
    return {
        add.name: ([step_of(t) / step_of(add.output) for t in add.inputs], add.output)
        for add in inspection.residual_adds(model)
    }


def step_of(tensor):
    return float(tensor.quantizer.step(None, tensor.variables))


def assert_tied(model):
    """All ratios are of odd denominator, products of a few of the table's."""
    found = ratios_of(model)
    assert found
    for name, (steps, _) in found.items():
        for ratio in steps:
            odd = fractions.Fraction(ratio).limit_denominator(15**2)
            assert odd.denominator % 2, name
            assert ratio == pytest.approx(float(odd), rel=2**-22), name


def calibrated(float_model, activations="dorefa", bits=2, batches=None):
    rule = PrecisionRule(".*", bits, bits, activation_quantizer=activations)
    model = quantize(nets.randomize(float_model), rule, residual_bits=8)
    batches = batches or [nets.images(4, float_model.input_shape[1:])]
    # Scales that fit batches of random images would leave evaluation little to add.
    names = calibrate(model, batches, fit_batch_norm=False)
    residual = {n for n, t in nets.by_name(model).items() if t.is_residual}
    assert residual
    assert residual <= set(names)
    assert all(t.is_calibrated for t in nets.by_name(model).values())
    return model


def int8_sums(model, data):
    """Name of an Add -> codes that integers give, and those that the network has."""
    adds = [add for add in inspection.residual_adds(model) if add.output.is_residual]
    tensors = {t.layer.name: t for add in adds for t in (*add.inputs, add.output)}
    seen = nets.outputs_of(model, tensors, data)

    def codes(tensor):
        return np.rint(seen[tensor.layer.name] / np.float64(step_of(tensor)))

    found = {}
    for add in adds:
        ratios = [
            fractions.Fraction(step_of(t) / step_of(add.output)).limit_denominator(15)
            for t in add.inputs
        ]
        common = math.lcm(*(r.denominator for r in ratios))
        total = sum(
            codes(t).astype(np.int64) * int(r * common)
            for t, r in zip(add.inputs, ratios, strict=True)
        )
        # To the nearest integer, without a tie: common is odd.
        rounded = (2 * total + common) // (2 * common)
        found[add.name] = np.clip(rounded, -128, 127), codes(add.output)
    return found


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("build", "activations"),
    [
        *((nets.preactivation, name) for name in ("dorefa", "lsq", "pact", "uniform")),
        *((functools.partial(nets.mobilenet_like, 4), n) for n in ("dorefa", "pact")),
    ],
)
def test_the_steps_of_each_add_are_tied(build, activations):
    model = calibrated(build(), activations)
    assert_tied(model)
    for expected, found in int8_sums(
        model, nets.images(3, model.input_shape[1:], seed=5)
    ).values():
        np.testing.assert_array_equal(found, expected)
        assert np.unique(found).size > 20


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_post_activation_networks_adds_are_tied_to_the_relu_behind(bits):
    model = calibrated(nets.postactivation(), bits=bits)
    assert_tied(model)
    outputs = [output for _, output in ratios_of(model).values()]
    assert [t.is_residual for t in outputs] == [False, True]
    assert step_of(outputs[0]) == np.float32(1 / (2**bits - 1))


def sum_net():
    """relu0 - [a] + identity - sum - [b] + identity - total - relu1 - head."""
    inputs = keras.Input((5,), name="in")
    x = layers.ReLU(name="relu0")(layers.Dense(5, name="first")(inputs))
    x = layers.Add(name="sum")([layers.Dense(5, name="a")(x), x])
    y = layers.Dense(5, name="b")(layers.ReLU(name="relu1")(x))
    total = layers.Add(name="total")([x, y])
    y = layers.Dense(5, name="c")(layers.ReLU(name="relu2")(total))
    model = keras.Model(inputs, layers.Dense(2, name="head")(y))
    return nets.randomize(model)


@pytest.mark.slow
def test_the_rules_of_tying_by_hand():
    model = quantize(sum_net(), PrecisionRule(".*", 8, 2), residual_bits=8)
    tensors = {n.split("/")[0]: t for n, t in nets.by_name(model).items()}
    names = ["a_residual", "sum_residual", "b_residual"]
    assert [n for n in tensors if n.endswith("_residual")] == names
    for name, step in zip(names, [0.03, 0.04, 0.005], strict=True):
        tensors[name].variables["step"].assign(step)
    tie_residuals(model)
    # relu0 and relu2 have 1/3. sum: 1/3 / 0.04 = 8.33 -> 25/3 is none; 8 is nearest.
    out = 1 / 3 / 8
    assert step_of(tensors["sum_residual"]) == pytest.approx(out, rel=1e-6)
    # 0.03 / out = 0.72 -> 5/7 = 0.714; 8/11 = 0.727 is farther.
    found = step_of(tensors["a_residual"])
    assert found == pytest.approx(out * 5 / 7, rel=1e-6)
    # total puts out relu2's grid: 0.005 / (1/3) = 0.015 -> the smallest, 1/15.
    assert step_of(tensors["b_residual"]) == pytest.approx(1 / 45, rel=1e-6)
    # Both are settled then: sum_residual and relu2, whose ratio is 1/8.
    assert ratios_of(model)["total"][0][0] == pytest.approx(1 / 8, rel=1e-6)


@pytest.mark.slow
def test_tying_again_changes_nothing():
    model = calibrated(nets.preactivation(), "pact")
    before = nets.snapshot(model.weights)
    tie_residuals(model)
    nets.assert_all_equal(nets.snapshot(model.weights), before)
    calibrate(model, [nets.images(4)])
    nets.assert_all_equal(nets.snapshot(model.weights), before)


@pytest.mark.slow
def test_steps_that_training_has_moved_are_tied_again():
    model = calibrated(nets.preactivation(), "lsq")
    step = nets.by_name(model)["one_relu1/output"].variables["step"]
    step.assign(1.0137 * step)
    with pytest.raises(AssertionError):
        assert_tied(model)
    tie_residuals(model)
    assert_tied(model)


@pytest.mark.slow
def test_no_measured_range_is_cut_short():
    """Of what only an input's ratio decides; an output's goes to the nearest."""
    data = nets.images(64, (5,))
    model = quantize(sum_net(), PrecisionRule(".*", 8, 2), residual_bits=8)
    tensors = nets.by_name(model)
    measured = {}
    original = quantizers.ResidualQuantizer.calibrate

    def calibrate_and_note(self, samples, variables):
        original(self, samples, variables)
        measured[id(variables)] = float(variables["step"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizers.ResidualQuantizer, "calibrate", calibrate_and_note)
        calibrate(model, [data])
    for name in ("a_residual/output", "b_residual/output"):
        before = measured[id(tensors[name].variables)]
        assert step_of(tensors[name]) >= before * (1 - 2**-19)
    before = measured[id(tensors["sum_residual/output"].variables)]
    after = step_of(tensors["sum_residual/output"])
    assert before / 1.1 < after < before * 1.1


@pytest.mark.quick(1)
@pytest.mark.parametrize("activations", ["uniform", "lsq"])
def test_ties_are_to_the_bits_that_a_quantizer_is_made_for(activations):
    """In a stage that does not round, the grid of the last stage counts."""
    rule = PrecisionRule(".*", 8, 2, activation_quantizer=activations)
    model = quantize(sum_net(), rule, residual_bits=8)
    for tensor in nets.by_name(model).values():
        if tensor.role == "activation":
            tensor.assign_bits(32)
    calibrate(model, [nets.images(32, (5,))])
    for tensor in nets.by_name(model).values():
        if tensor.role == "activation":
            assert tensor.bits == 32
            tensor.assign_bits(tensor.quantizer.bits)
    assert_tied_to_outputs(model)


def assert_tied_to_outputs(model):
    """`total` has a settled input and a settled output: only `b` is tied."""
    found = ratios_of(model)
    assert set(found) == {"sum", "total"}
    for ratio in (*found["sum"][0], found["total"][0][1]):
        odd = fractions.Fraction(ratio).limit_denominator(15)
        assert odd.denominator % 2
        assert ratio == pytest.approx(float(odd), rel=2**-21)


@pytest.mark.slow
def test_activations_that_do_not_round_settle_nothing():
    model = quantize(sum_net(), PrecisionRule(".*", 8, 32), residual_bits=8)
    calibrate(model, [nets.images(32, (5,))])
    steps = ratios_of(model)
    # sum stands as measured and a is tied to it; total has no grid behind it.
    ratio = fractions.Fraction(steps["sum"][0][0]).limit_denominator(15)
    assert steps["sum"][0][0] == pytest.approx(float(ratio), rel=2**-22)
    assert all(t.is_calibrated for t in nets.by_name(model).values())


@pytest.mark.slow
def test_a_tensor_of_two_adds_is_tied_by_the_first():
    inputs = keras.Input((5,), name="in")
    x = layers.ReLU(name="relu0")(layers.Dense(5, name="first")(inputs))
    y = layers.Dense(5, name="a")(x)
    one = layers.Add(name="one")([y, x])
    z = layers.Dense(5, name="b")(layers.ReLU(name="relu1")(one))
    two = layers.Add(name="two")([z, y])
    three = layers.Add(name="three")([two, one])
    x = layers.Dense(5, name="c")(layers.ReLU(name="relu2")(three))
    model = keras.Model(inputs, [layers.Dense(2, name="head")(x), three])
    model = calibrated(model, "pact", batches=[nets.images(32, (5,))])
    found = ratios_of(model)
    assert list(found) == ["one", "two", "three"]
    for name in ("one", "two"):
        for ratio in found[name][0]:
            odd = fractions.Fraction(ratio).limit_denominator(15)
            assert odd.denominator % 2
            assert ratio == pytest.approx(float(odd), rel=2**-22)
    assert_tied(model)


@pytest.mark.slow
def test_an_error_leaves_the_residual_steps():
    model = calibrated(sum_net(), batches=[nets.images(8, (5,))])
    before = nets.snapshot(model.weights)
    with pytest.raises(ValueError, match="NaN or inf"):
        calibrate(model, [np.full((4, 5), np.nan, np.float32)])
    nets.assert_all_equal(nets.snapshot(model.weights), before)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-4, 1.0, 65535.0])
@pytest.mark.parametrize("kind", ["uniform", "pact", "lsq"])
def test_ranges_follow_the_scale_of_the_data(kind, scale):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Dense(8, "relu", use_bias=False, input_shape=(6,), name="first"),
            layers.Dense(8, "relu", use_bias=False, name="second"),
            layers.Dense(3, name="head"),
        ]
    )
    x = np.random.default_rng(0).uniform(size=(64, 6)).astype(np.float32)
    names = {"uniform": "clip", "pact": "alpha", "lsq": "step"}
    found = {}
    for factor in (1.0, scale):
        rule = PrecisionRule("second", None, 4, activation_quantizer=kind)
        low_bit = quantize(model, [rule])
        calibrate(low_bit, [x * np.float32(factor)])
        (tensor,) = inspection.quantized_tensors(low_bit)
        found[factor] = float(tensor.variables[names[kind]])
    # Neither clipped nor rounded while measured, whatever the scale.
    assert found[scale] / found[1.0] == pytest.approx(scale, rel=1e-4)


@pytest.mark.slow
def test_inputs_by_other_names_than_their_layers():
    inputs = {
        "img": keras.Input((8, 8, 3), name="a"),
        "vec": keras.Input((5,), name="b"),
    }
    outputs = layers.Conv2D(4, 3, activation="relu")(inputs["img"])
    outputs = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, name="c")(outputs))
    outputs = layers.Dense(2)(layers.Concatenate()([outputs, inputs["vec"]]))
    model = quantize(
        keras.Model(inputs, outputs), PrecisionRule("c", 2, 2, "lsq", "lsq")
    )
    batch = {"img": np.ones((4, 8, 8, 3), "float32"), "vec": np.ones((4, 5), "float32")}
    assert len(calibrate(model, [batch])) == 1


def dense_with_norm(**call):
    x = inputs = keras.Input((5,), name="in")
    x = layers.BatchNormalization(name="bn")(layers.Dense(6, name="one")(x), **call)
    x = layers.Dense(4, name="two")(layers.ReLU(name="relu")(x))
    model = nets.randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    rule = PrecisionRule(".*", 4, 4, activation_quantizer="uniform")
    return quantize(model, rule)


@pytest.mark.slow
def test_batches_of_one_value_a_channel_are_refused_and_nothing_changes():
    model = dense_with_norm()
    before = nets.snapshot(model.variables)
    with pytest.raises(ValueError, match=r"several values.*Received: 'bn'"):
        calibrate(model, [x[:1] for x in BATCHES])
    nets.assert_all_equal(nets.snapshot(model.variables), before)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("size", "warns"), [(2, True), (7, True), (8, False)])
def test_small_batches_are_warned_of(size, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(dense_with_norm(), [x[:size] for x in BATCHES])
    found = [w for w in caught if f"'bn', with {size} values" in str(w.message)]
    assert bool(found) == warns


@pytest.mark.slow
def test_a_normalisation_by_moving_statistics_needs_no_large_batches():
    assert calibrate(dense_with_norm(training=False), [BATCHES[0][:1]])


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["lsq", "pact"])
def test_a_range_that_was_trained_counts_as_set(name):
    _, model = quantized_perceptron(name, 3)
    tensor = nets.by_name(model)["relu1/output"]
    assert not tensor.is_calibrated
    for bits in (32, 8, 2, 3):  # What stages do is no training.
        tensor.assign_bits(bits)
        assert not tensor.is_calibrated
    nets.train_step(model, 50.0 * BATCHES[0], nets.labels(16))  # PACT: beyond 6.
    assert tensor.is_calibrated


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["lsq", "pact", "uniform"])
@pytest.mark.parametrize("bits", [2, 8])
def test_the_range_of_a_quantized_relu6_ends_at_6(kind, bits):
    """Also where most values lie beyond 6, and behind another such ReLU6."""
    layers = keras.layers
    keras.utils.set_random_seed(0)
    image = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, use_bias=False, name="a")(image)
    x = layers.Conv2D(4, 1, name="b")(layers.ReLU(6.0, name="first")(x))
    x = layers.Dense(3, name="c")(layers.Flatten()(layers.ReLU(6.0, name="last")(x)))
    model = keras.Model(image, x)
    for weight in model.trainable_weights:
        weight.assign(tf.abs(weight) + 1.0)
    images = np.random.default_rng(0).uniform(5, 9, (16, 6, 6, 2)).astype(np.float32)
    rule = tfl.PrecisionRule(".*", 8, bits, "uniform", kind, edges=True)
    quantized = tfl.quantize(model, rule)
    tfl.calibrate(quantized, [images])
    ends = {
        t.layer.name: float(t.quantizer.step(None, t.variables)) * (2**bits - 1)
        for t in tfl.inspection.quantized_tensors(quantized)
        if t.ceiling
    }
    assert set(ends) == {"first", "last"}
    assert max(ends.values()) <= 6.0 * (1 + 1e-6), ends
