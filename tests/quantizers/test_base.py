"""What every quantizer does: bits as a variable, float32 inside, codes and values."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tf_lowbit as tfl
from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import (
    ACTIVATIONS,
    CASES,
    DoReFaActivation,
    DoReFaWeight,
    LSQActivation,
    LSQWeight,
    UniformActivation,
    UniformWeight,
    build,
    make,
    quantize,
)
from tf_lowbit.compat import keras, tf, tfmot
from tf_lowbit.quantizers import base

CLASSES = sorted({cls for cls, _ in CASES.values()}, key=lambda cls: cls.__name__)
BAD_BITS = (0, 9, "2", 2.0, True, None, -1, 12)
every_case = pytest.mark.parametrize("name", CASES)
every_class = pytest.mark.parametrize("cls", CLASSES)


@every_class
@pytest.mark.parametrize("bits", BAD_BITS, ids=repr)
def test_bad_bits_are_refused(cls, bits):
    with pytest.raises(ValueError, match=r"bits must be .* Received: bits="):
        cls(bits=bits)


@every_case
@pytest.mark.parametrize("bits", BAD_BITS, ids=repr)
def test_assign_bits_refuses_the_same(name, bits):
    quantizer = make(name, 2)
    variables = build(quantizer)
    with pytest.raises(ValueError, match=r"bits must be .* Received: bits="):
        quantizer.assign_bits(variables, bits)
    assert int(variables["bits"]) == 2


@every_case
def test_the_config_is_the_constructors_arguments(name):
    quantizer = make(name, 3)
    parameters = inspect.signature(type(quantizer).__init__).parameters
    assert list(quantizer.get_config()) == list(parameters)[1:]
    again = type(quantizer).from_config(quantizer.get_config())
    assert again == quantizer
    assert hash(again) == hash(quantizer)
    assert repr(again) == repr(quantizer)


@every_case
def test_equality_is_of_class_and_config(name):
    quantizer = make(name, 3)
    assert quantizer == make(name, 3)
    assert quantizer != make(name, 4)
    assert quantizer != "dorefa"
    assert [other for other in CASES if make(other, 3) == quantizer] == [name]


def test_repr_is_the_call_that_makes_it():
    made = "DoReFaWeightQuantizer(bits=2, max_gradient=True, standardize=False)"
    assert repr(DoReFaWeight(2)) == made
    assert eval(made, {"DoReFaWeightQuantizer": DoReFaWeight}) == DoReFaWeight(2)


@every_class
def test_a_quantizer_is_one_of_tf_mot(cls):
    assert issubclass(cls, tfmot.quantization.keras.quantizers.Quantizer)
    assert cls().role == ("activation" if "Activation" in cls.__name__ else "weight")


@every_case
def test_bits_are_an_int32_variable_of_the_layer(name):
    layer = keras.layers.Layer()
    quantizer = make(name, 3)
    variables = quantizer.build((3, 3, 4, 8), "kernel", layer)
    bits = variables["bits"]
    assert bits.dtype == tf.int32
    assert bits.shape == ()
    assert bits.name.startswith("kernel_bits")
    assert int(bits) == 3
    assert not bits.trainable
    assert any(bits is weight for weight in layer.non_trainable_weights)
    for key, variable in variables.items():
        learned = key in ("step", "alpha")
        assert variable.trainable == learned
        assert any(variable is weight for weight in layer.trainable_weights) == learned


def test_only_the_unsigned_activations_replace_a_relu():
    replacing = {name for name in ACTIVATIONS if make(f"activation {name}", 2).signed}
    assert replacing == {"lsq signed", "uniform signed"}
    for name in ACTIVATIONS:
        quantizer = make(f"activation {name}", 2)
        assert quantizer.replaces_relu == (not quantizer.signed)


@every_case
def test_values_are_codes_times_step(name):
    x = cases.random_inputs()
    quantizer = make(name, 2)
    variables = build(quantizer)
    for bits in cases.LOW_BITS:
        variables["bits"].assign(bits)
        codes = quantizer.codes(tf.constant(x), variables)
        assert codes.dtype == tf.int32
        values = quantize(quantizer, variables, x)
        step = quantizer.step(tf.constant(x), variables)
        np.testing.assert_array_equal(values, cases.reconstruct(codes, step))
        assert len(np.unique(codes)) <= quantizer.level_count(bits)


@every_case
def test_a_dense_input_reaches_every_level(name):
    quantizer = make(name, 2)
    variables = build(quantizer, (40001, 1))
    for bits in cases.LOW_BITS:
        variables["bits"].assign(bits)
        reach = 300.0 if "lsq" in name else 4.0
        if name == "weight lsq standardized":
            variables["step"].assign(1.5 / 2 ** (bits - 1))  # Within 1.7 deviations.
        x = np.linspace(-reach, reach, 40001).astype(np.float32)[:, None]
        if "depthwise" in name:
            x = x[..., None, None]  # Its channel axes are those of a kernel of rank 4.
        codes = quantizer.codes(tf.constant(x), variables)
        assert len(np.unique(codes)) == quantizer.level_count(bits)


@pytest.mark.quick(6)
@every_case
def test_assigning_bits_takes_effect_and_does_not_retrace(name):
    quantizer = make(name, 2)
    variables = build(quantizer)
    x = tf.constant(cases.random_inputs())
    traces = []

    @tf.function
    def step():
        traces.append(None)
        return quantizer(x, training=True, weights=variables)

    for bits in cases.ALL_BITS:
        variables["bits"].assign(bits)
        expected = quantize(quantizer, variables, x)
        np.testing.assert_array_equal(step(), expected)
        if bits <= 8:
            codes = quantizer.codes(x, variables)
            assert len(np.unique(codes)) <= quantizer.level_count(bits)
    quantizer.assign_bits(variables, 2)
    np.testing.assert_array_equal(step(), quantize(quantizer, variables, x))
    assert len(traces) == 1


@pytest.mark.quick(4)
@every_case
def test_xla_gives_the_same_values_and_does_not_retrace(name):
    quantizer = make(name, 2)
    variables = build(quantizer)
    x = cases.random_inputs()
    special = [np.nan, np.inf, -np.inf] if name.startswith("activation") else []
    x[0, 0, 0, : len(special)] = special
    if name.startswith("weight dorefa"):
        # XLA's tanh may differ in the last place: keep away from the thresholds.
        unit = oracle.dorefa_unit(x)
        for bits in cases.LOW_BITS:
            n = 2**bits - 1
            unit = np.where(np.abs(n * unit % 1 - 0.5) < 1e-4, unit + 3e-4 / n, unit)
        x = np.arctanh((2 * unit - 1) * 0.9).astype(np.float32)
    x = tf.constant(x)
    traces = []

    @tf.function(jit_compile=True)
    def step(inputs):
        traces.append(None)
        return quantizer(inputs, training=True, weights=variables)

    for bits in cases.ALL_BITS:
        variables["bits"].assign(bits)
        expected, found = quantize(quantizer, variables, x), step(x)
        # XLA sums a mean of weights in another order: one-bit uniform weights have one.
        sums = "statsq" in name or "standardized" in name
        exact = bits <= 8 and not (sums or (bits == 1 and "uniform" in name))
        # What is "not rounded" is rounded to steps of 2^-16 with learned ones.
        tolerance = 0 if exact else 2e-5 if sums and bits > 8 else 1e-6
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weight dorefa", "activation pact", "activation lsq"])
def test_xla_gives_the_same_gradients(name):
    quantizer = make(name, 2)
    variables = build(quantizer)
    x = tf.constant(cases.random_inputs(spread=3.0))
    upstream = tf.constant(cases.random_upstream(x.shape))
    sources = [x, *(variables[key] for key in ("alpha", "step") if key in variables)]

    def gradients():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = quantizer(x, training=True, weights=variables)
        return tape.gradient(y, sources, upstream)

    compiled = tf.function(gradients, jit_compile=True)()
    for found, expected in zip(compiled, gradients(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16, tf.float64])
@every_case
def test_arithmetic_is_float32_and_the_result_has_the_inputs_dtype(name, dtype):
    quantizer = make(name, 5)
    variables = build(quantizer)
    x = tf.cast(cases.random_inputs(), dtype)
    outputs = quantizer(x, training=False, weights=variables)
    assert outputs.dtype == dtype
    in_float32 = quantizer(tf.cast(x, tf.float32), training=False, weights=variables)
    np.testing.assert_array_equal(outputs, tf.cast(in_float32, dtype))
    codes = quantizer.codes(x, variables)
    expected = quantizer.codes(tf.cast(x, tf.float32), variables)
    np.testing.assert_array_equal(codes, expected)


@every_case
def test_training_and_inference_are_the_same(name):
    quantizer = make(name, 2)
    variables = build(quantizer)
    x = tf.constant(cases.random_inputs())
    np.testing.assert_array_equal(
        quantizer(x, training=True, weights=variables),
        quantizer(x, False, variables),
    )


class Quantized(keras.layers.Layer):
    """Returns its quantized kernel."""

    def __init__(self, quantizer, kernel):
        super().__init__(dtype=keras.mixed_precision.Policy("mixed_bfloat16"))
        self.quantizer, self.start = quantizer, kernel

    def build(self, input_shape):
        initializer = keras.initializers.Constant(self.start)
        shape = self.start.shape
        self.kernel = self.add_weight(name="k", shape=shape, initializer=initializer)
        self.variables_of = self.quantizer.build(shape, "kernel", self)

    def call(self, inputs):
        values = self.quantizer(self.kernel, training=True, weights=self.variables_of)
        return values, self.quantizer.codes(self.kernel, self.variables_of)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("weight")])
def test_a_mixed_precision_layers_kernel_is_read_in_float32(name):
    kernel = cases.random_inputs((3, 3, 16, 16))
    quantizer = make(name, 8)
    layer = Quantized(quantizer, kernel)
    with tf.GradientTape() as tape:
        values, codes = layer(tf.zeros(1))
    gradient = tape.gradient(values, layer.kernel)
    variables = build(quantizer, kernel.shape)
    expected = quantizer.codes(tf.constant(kernel), variables)
    np.testing.assert_array_equal(codes, expected)
    assert values.dtype == tf.bfloat16
    in_float32 = quantize(quantizer, variables, kernel)
    np.testing.assert_array_equal(values, tf.cast(in_float32, tf.bfloat16))
    assert gradient.dtype == tf.float32
    assert np.isfinite(gradient).all()
    # The test can tell: read in bfloat16 first, codes differ.
    cast = tf.cast(tf.constant(kernel), tf.bfloat16)
    assert (quantizer.codes(cast, variables) != expected).numpy().any()


class WeightConfig(tfmot.quantization.keras.QuantizeConfig):
    """Quantizes the kernel of a layer, and nothing else."""

    def __init__(self, quantizer):
        self.quantizer = quantizer

    def get_weights_and_quantizers(self, layer):
        return [(layer.kernel, self.quantizer)]

    def get_activations_and_quantizers(self, layer):
        return []

    def set_quantize_weights(self, layer, quantize_weights):
        layer.kernel = quantize_weights[0]

    def set_quantize_activations(self, layer, quantize_activations):
        pass

    def get_output_quantizers(self, layer):
        return []

    def get_config(self):
        return {}


def wrap(layer, quantizer):
    wrapper = tfmot.quantization.keras.QuantizeWrapperV2
    return wrapper(layer, WeightConfig(quantizer))


@pytest.fixture
def mixed_bfloat16():
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    yield
    keras.mixed_precision.set_global_policy(before)


@pytest.mark.usefixtures("mixed_bfloat16")
def test_tf_mots_wrapper_reads_a_mixed_precision_kernel_in_float32():
    kernel = cases.random_inputs((64, 32))
    dense = keras.layers.Dense(32, use_bias=False)
    dense.build((None, 64))
    dense.set_weights([kernel])
    quantizer = DoReFaWeight(8)
    wrapper = wrap(dense, quantizer)
    outputs = wrapper(tf.eye(64, dtype=tf.bfloat16))
    assert outputs.dtype == tf.bfloat16
    values = quantize(quantizer, build(quantizer), kernel)
    # The identity picks the kernel out: each output is one rounded value.
    np.testing.assert_array_equal(outputs, tf.cast(values, tf.bfloat16))


@pytest.mark.parametrize("built", [False, True])
def test_the_wrapped_layers_weights_come_before_the_quantizers(built):
    """A fresh wrapper and one around a built layer list weights in one order."""
    dense = keras.layers.Dense(3)
    if built:
        dense.build((None, 2))
    wrapper = wrap(dense, LSQWeight(2))
    wrapper(tf.zeros((1, 2)))
    names = [weight.name.split("/")[-1] for weight in wrapper.trainable_weights]
    assert sorted(names[:2]) == ["bias:0", "kernel:0"]
    assert names[2:] == ["kernel_step:0"]


def test_a_wrapped_layer_trains_its_latent_kernel_and_its_step():
    wrapper = wrap(keras.layers.Dense(3, use_bias=False), LSQWeight(2))
    x = tf.constant(cases.random_inputs((8, 4)))
    wrapper(x)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(wrapper(x)))
    gradients = tape.gradient(loss, wrapper.trainable_weights)
    assert len(gradients) == 2
    for gradient in gradients:
        assert np.abs(gradient).max() > 0


@pytest.mark.quick(15)
@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_nan_and_saturate_at_infinity(name, implementation):
    cls, arguments = ACTIVATIONS[name]
    for bits in cases.ALL_BITS:
        quantizer = cls(bits=bits, implementation=implementation, **arguments)
        variables = build(quantizer)
        values = quantize(quantizer, variables, [np.nan, np.inf, -np.inf, 1e30, -1e30])
        np.testing.assert_array_equal(np.isnan(values), [True, *[False] * 4])
        assert values[1] == values[3] > 0
        assert values[2] == values[4]
        assert (values[2] < 0) == quantizer.signed


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith("weight") and "d" in name]
)
@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_a_nan_weight_stays_visible(name, bits):
    w = cases.random_inputs()
    w[1, 1, 1, 1] = np.nan
    quantizer = make(name, bits)
    assert np.isnan(quantize(quantizer, build(quantizer), w)[1, 1, 1, 1])


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    "quantizer",
    [
        DoReFaActivation(),
        LSQActivation(),
        LSQActivation(signed=True),
        UniformActivation(clip=3.0),
        UniformActivation(clip=3.0, signed=True),
        LSQWeight(),
        LSQWeight(narrow_range=True),
    ],
    ids=repr,
)
@settings(max_examples=15, deadline=None)
@given(
    x=hnp.arrays(np.float32, (1, 16), elements=st.floats(-8, 8, width=32)),
    bits=st.sampled_from(cases.LOW_BITS),
)
def test_fixed_ranges_are_idempotent_and_monotone(quantizer, x, bits):
    variables = build(quantizer)
    variables["bits"].assign(bits)
    if "step" in variables:
        variables["step"].assign(0.37)
    values = quantize(quantizer, variables, np.sort(x))
    np.testing.assert_array_equal(quantize(quantizer, variables, values), values)
    codes = quantizer.codes(tf.constant(np.sort(x)), variables)
    np.testing.assert_array_equal(quantizer.codes(values, variables), codes)
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_uniform_weights_are_idempotent(bits):
    """The largest weight is a level, so that the scale stays."""
    w = cases.random_inputs()
    quantizer = UniformWeight(bits)
    variables = build(quantizer)
    codes = quantizer.codes(tf.constant(w), variables)
    values = quantize(quantizer, variables, w)
    np.testing.assert_array_equal(quantizer.codes(values, variables), codes)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [((-1,), (1, 1, 1, 8)), ((3,), (1, 1, 1, 8)), ((2, 3), (1, 1, 4, 8)), ((0,), (3,))],
)
def test_channel_shape(axes, expected):
    shape = (3, 3, 4, 8) if len(expected) == 4 else (3,)
    assert base.channel_shape(shape, axes) == expected


def test_kept_positive_is_a_keras_constraint():
    kept = base.KeptPositive()(tf.constant([-1.0, 0.0, 1e-9, 0.5]))
    np.testing.assert_allclose(kept, [1e-6, 1e-6, 1e-6, 0.5])
    data = keras.constraints.serialize(base.KeptPositive())
    assert isinstance(keras.constraints.deserialize(data), base.KeptPositive)


@pytest.mark.parametrize("name", cases.WEIGHTS)
def test_latent_weights_are_on_the_levels_of_their_codes(name):
    rng, shape = np.random.default_rng(5), (16, 16, 4, 8)
    for bits in (1, 2, 4):
        quantizer = cases.make(f"weight {name}", bits)
        variables = cases.build(quantizer, shape)
        weights = tf.Variable(cases.random_inputs(shape, spread=0.3))
        quantizer.initialize(weights, variables)
        # Of a few weights, for the grid depends on all: any levels.
        wanted = rng.choice(quantizer.level_codes(bits), shape)
        is_set = rng.random(shape) < 0.002
        placed = quantizer.latent(wanted, weights, variables)
        assert placed.dtype == tf.float32
        after = tf.where(is_set, placed, weights)
        codes = quantizer.codes(after, variables).numpy()
        np.testing.assert_array_equal(codes[is_set], wanted[is_set])
        exact = quantizer.exact(after, variables) / quantizer.step(after, variables)
        np.testing.assert_allclose(exact.numpy()[is_set], wanted[is_set], atol=0.15)


def test_a_subclass_saves_its_own_arguments_and_those_that_it_passes_on():
    class Passing(tfl.quantizers.DoReFaWeightQuantizer):
        def __init__(self, gain=1.0, **kwargs):
            super().__init__(**kwargs)
            self.gain = gain

    class Naming(tfl.quantizers.PACTActivationQuantizer):
        def __init__(self, bits=2, gain=1.0):
            super().__init__(bits)
            self.gain = gain

    passing = Passing(gain=2.0, bits=3, max_gradient=True)
    assert passing.get_config() == {
        "gain": 2.0, "bits": 3, "max_gradient": True, "standardize": False
    }  # fmt: skip
    assert Naming(4, 3.0).get_config() == {"bits": 4, "gain": 3.0}
    for quantizer in (passing, Naming(4, 3.0)):
        assert type(quantizer).from_config(quantizer.get_config()) == quantizer
