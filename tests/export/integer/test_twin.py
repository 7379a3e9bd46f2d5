import fractions

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import (
    EDGE,
    Rule,
    conv_bn_relu,
    images,
    layers,
    network,
    quantize,
)
from tf_lowbit import export
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import int8_grids, kernels, twin
from tf_lowbit.export.options import Options
from tf_lowbit.export.tflite import writer

FIXED = (
    "signs",
    "weight_scales",
    "multipliers",
    "biases",
    "thresholds",
    "quantizer_bits",
    "quantizer_step",
)


def _body(x):
    return layers.Add(name="add")([x, conv_bn_relu(x, 4, name="inner")])


def _model(rule=None):
    rule = rule or Rule("inner", 2, 2, "lsq", "dorefa")
    return quantize(network(_body), [EDGE, Rule(".*_relu", None, 2), rule])


def _snapped(**options):
    return export.snap(_model(), [images()], options=Options(**options))


@pytest.fixture(scope="module")
def snapped():
    """A twin that no test changes."""
    return _snapped()


# --- a layer by hand ------------------------------------------------------------------


def _linear(
    kind, codes, *, low=0, high=3, scale=0.25, biases=None, upscale=1, grid=None
):
    """A layer with fixed codes, of step 1 and with `M` = `scale`."""
    codes = np.asarray(codes, np.float32)
    channels = codes.shape[-1] * (codes.shape[-2] if kind == twin.DEPTHWISE else 1)
    layer = twin.IntegerLinear(
        int8_grids.grid(1.0, low, high),
        kind,
        codes.shape,
        None,
        {},
        grid or int8_grids.grid(1.0, 0, 3),
        upscale,
    )
    return layer, codes, channels, biases, scale


def _built(shape, *arguments, **more):
    layer, codes, channels, biases, scale = _linear(*arguments, **more)
    layer.build(shape)
    layer.latent.assign(codes)
    layer.signs.assign(np.ones(channels))
    layer.weight_scales.assign(np.full(channels, scale))
    layer.multipliers.assign(np.full(channels, scale))
    layer.biases.assign(np.zeros(channels) if biases is None else biases)
    return layer


def test_a_dense_layer_by_hand():
    layer = _built((None, 2), twin.DENSE, [[1, -1], [2, 3]], biases=[2, -2])
    # A = [5, 5]; acc = [7, 3]; times 1/4: [1.75, 0.75].
    out = layer(tf.constant([[1.0, 2.0]]))
    np.testing.assert_array_equal(out, [[2, 1]])
    # A = [3, 0]: [1.25, -0.5].
    np.testing.assert_array_equal(layer(tf.constant([[3.0, 0.0]])), [[1, 0]])


def test_halves_go_to_even_and_ends_clip():
    layer = _built((None, 1), twin.DENSE, [[1.0]], scale=0.5, low=-2, high=2)
    out = layer(tf.constant([[-9.0], [-3.0], [-1.0], [1.0], [3.0], [9.0]]))
    np.testing.assert_array_equal(out[:, 0], [-2, -2, 0, 0, 2, 2])


def test_the_gradients_of_an_integer_layer():
    layer = _built((None, 2), twin.DENSE, [[1, -1], [2, 3]], biases=[2, 40], upscale=3)
    x = tf.constant([[1.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    # acc = [5, 37], a quarter of it [1.25, 9.25]: the second clips at 3.
    np.testing.assert_array_equal(y, [[1, 3]])
    # du A M / dx = 3 * 0.25 * codes, of the first channel alone.
    np.testing.assert_allclose(tape.gradient(y, x), [[0.75, 1.5]])


# Sums of 540 products of 8 bits need float64.
@pytest.mark.parametrize(
    ("groups", "channels", "highest"), [(2, 4, 3), (4, 4, 3), (2, 120, 255)]
)
def test_gradients_of_groups_are_those_of_their_parts(groups, channels, highest):
    """CPUs have no gradient of a convolution in groups but XLA's."""
    rng = np.random.default_rng(groups)
    codes = rng.integers(-2, 3, (3, 3, channels // groups, 8))
    x = tf.constant(rng.integers(0, 4, (2, 5, 6, channels)), tf.float32)

    def made(codes, source):
        layer = _built(
            source.shape,
            twin.CONV,
            codes,
            scale=1 / 32,
            low=-3,
            high=3,
            grid=int8_grids.grid(1.0, 0, highest),
        )
        with tf.GradientTape() as tape:
            tape.watch([source, layer.latent])
            out = layer(source)
        return out, *tape.gradient(out, [source, layer.latent])

    wanted = [
        made(part, source)
        for part, source in zip(
            np.split(codes, groups, -1), tf.split(x, groups, -1), strict=True
        )
    ]
    for have, parts in zip(made(codes, x), zip(*wanted, strict=True), strict=True):
        np.testing.assert_array_equal(have, tf.concat(parts, -1))
    assert np.ptp(have) > 0


def test_the_gradient_of_the_weights_is_the_quantizers():
    quantizer = tfl.quantizers.UniformWeightQuantizer(bits=3, per_axis=False)
    layer = twin.IntegerLinear(
        int8_grids.grid(1.0, -8, 8),
        twin.DENSE,
        (2, 2),
        quantizer,
        {"bits": []},
        int8_grids.grid(1.0, 0, 3),
        2,
    )
    layer.build((None, 2))
    layer.latent.assign([[0.3, -0.6], [0.1, 0.2]])  # Step 0.2.
    layer.quantizer_variables["bits"].assign(3)
    layer.signs.assign([1.0, -1.0])
    layer.weight_scales.assign([0.0125, 0.025])
    layer.multipliers.assign([0.0125, 0.025])
    np.testing.assert_allclose(layer.codes(), [[2, 3], [0, -1]], atol=1)
    with tf.GradientTape() as tape:
        y = layer(tf.constant([[1.0, 2.0]]))
    (gradient,) = tape.gradient(y, layer.trainable_variables)
    # x * u M / step * sign, and M is the scale of the weights over that of the output.
    slopes = np.array([0.0125, -0.025]) / layer.grid.scale
    wanted = np.outer([1, 2], 2 * slopes / 0.2)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def test_the_gradients_of_a_sum():
    ratios = (fractions.Fraction(1, 3), fractions.Fraction(5))
    layer = twin.IntegerAdd(int8_grids.grid(1.0, 0, 7), ratios)
    a, b = tf.constant([2.0, 6.0, -9.0]), tf.constant([1.0, 2.0, 0.0])
    with tf.GradientTape() as tape:
        tape.watch([a, b])
        y = layer([a, b])
    np.testing.assert_array_equal(y, [6, 7, 0])  # 5 2/3, 12, -3
    grad_a, grad_b = tape.gradient(y, [a, b])
    np.testing.assert_allclose(grad_a, [1 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(grad_b, [5, 0, 0], rtol=1e-6)


def test_the_gradient_of_codes_of_floats():
    layer = twin.ToCodes(int8_grids.float_grid(0.5, 0, 3))
    x = tf.constant([-1.0, 0.2, 0.3, 1.2, 1.6])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    np.testing.assert_array_equal(y, [0, 0, 1, 2, 3])
    np.testing.assert_array_equal(tape.gradient(y, x), [0, 2, 2, 2, 0])


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_a_wide_dense_layer_is_exact(kernel):
    # Sums beyond 2^24, which float32 does not hold.
    rng = np.random.default_rng(0)
    features, channels = 5000, 3
    codes = rng.integers(-127, 128, (features, channels))
    codes[:, 0] = 127
    inputs = rng.integers(0, 256, (6, features))
    inputs[0] = 255
    grid = int8_grids.grid(1.0, 0, 255)
    layer = twin.IntegerLinear(
        int8_grids.grid(1.0, -128, 127),
        twin.DENSE,
        codes.shape,
        None,
        {},
        grid,
        1,
        kernel=kernel,
    )
    assert layer.largest_sum() > 2**24
    layer.build((None, features))
    layer.latent.assign(codes)
    layer.signs.assign(np.ones(channels))
    scales = np.float32([1e-6, 3e-5, 5e-5])
    biases = np.array([-70_000_001, 77_777, -1])
    layer.weight_scales.assign(scales)
    multipliers = kernels.multiplier(kernel, grid.scale, scales, layer.grid.scale)
    layer.multipliers.assign(kernels.stored(kernel, multipliers))
    layer.biases.assign(biases)
    sums = inputs.astype(np.int64) @ codes.astype(np.int64)
    assert np.abs(sums).max() > 2**26
    total = layer.accumulate(tf.constant(inputs, tf.float32))
    assert total.dtype == tf.float64
    np.testing.assert_array_equal(total.numpy().astype(np.int64), sums)
    wanted = kernels.requantize(kernel, sums + biases, multipliers, -128, 127)
    np.testing.assert_array_equal(layer(tf.constant(inputs, tf.float32)), wanted)


def test_one_step_that_needs_a_factor():
    grid = int8_grids.grid(0.2, -3, 3)
    assert grid.scale != grid.step
    layer = twin.ToValues(grid)
    np.testing.assert_allclose(layer(tf.constant([-3.0, 1.0])), [-0.6, 0.2], rtol=1e-6)
    assert twin.ToValues(int8_grids.grid(0.2, 0, 3)).factor is None


# --- eager, traced, saved -------------------------------------------------------------


def test_a_traced_call_is_the_eager_one(snapped):
    traced = tf.function(snapped.twin)
    np.testing.assert_array_equal(traced(images()), snapped.twin(images()))
    np.testing.assert_array_equal(
        snapped.twin.predict(images(), verbose=0), snapped.twin(images())
    )


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["twin.h5", "twin", "twin.keras"])
@pytest.mark.parametrize("target", ["xnnpack", "portable"])
def test_a_saved_twin_comes_back_exactly(snapped, tmp_path, name, target):
    model = snapped.twin
    if target == "portable":
        model = _snapped(target="portable", storage="int4").twin
    path = tmp_path / name
    model.save(path, save_format=None if "." in name else "tf")
    again = keras.models.load_model(path, compile=False)
    assert [type(a) for a in again.layers] == [type(b) for b in model.layers]
    np.testing.assert_array_equal(again(images()), model(images()))
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_alone_come_back(snapped, tmp_path):
    path = tmp_path / "twin.weights.h5"
    snapped.twin.save_weights(path)
    other = keras.models.clone_model(snapped.twin)
    other.load_weights(path)
    np.testing.assert_array_equal(other(images()), snapped.twin(images()))


def test_a_twin_computes_the_same_under_a_mixed_policy(snapped):
    wanted = snapped.twin(images()).numpy()
    try:
        keras.mixed_precision.set_global_policy("mixed_float16")
        other = keras.models.clone_model(snapped.twin)
        other.set_weights(snapped.twin.get_weights())
        np.testing.assert_array_equal(other(images()), wanted)
    finally:
        keras.mixed_precision.set_global_policy("float32")


# --- fine-tuning ----------------------------------------------------------------------


def _toy():
    """Bright images and dark ones."""
    y = np.arange(64) % 2
    return images(64, seed=3) * (0.2 + 0.8 * y[:, None, None, None]).astype("f"), y


def _named(layer):
    return {w.name.split(":")[0].split("/")[-1]: w.numpy() for w in layer.weights}


@pytest.mark.slow
def test_a_twin_trains_and_leaves_again(tmp_path):
    snapped = _snapped(head="int8")
    x, y = _toy()
    before = {layer.name: _named(layer) for layer in snapped.twin.layers}
    snapped.twin.compile(
        keras.optimizers.Adam(0.03),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ["accuracy"],
    )
    assert {
        w.name.split(":")[0].split("/")[-1] for w in snapped.twin.trainable_weights
    } == {"latent"}
    history = snapped.twin.fit(x, y, batch_size=16, epochs=10, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.8 * losses[0], losses
    moved = 0
    for layer in twin.integer_layers(snapped.twin):
        for name, value in _named(layer).items():
            same = np.array_equal(value, before[layer.name][name])
            if name in FIXED:
                assert same, (layer.name, name)
            elif layer.quantizer is not None:
                moved += not same
            else:
                assert same, (layer.name, name)
    assert moved >= 3
    made = export.to_tflite(snapped, tmp_path / "tuned.tflite", head="int8", verbose=0)
    report = export.verify(made.path, made, [(x, y)], verbose=0)
    assert report.ok, report.failures
    assert report.mismatches == report.end_to_end == 0
    assert report.predictions.right["file"] == report.predictions.right["twin"]
    first = writer.to_bytes(_snapped(head="int8"))
    assert first != made.path.read_bytes()


@pytest.mark.slow
def test_a_tuned_file_is_not_the_trained_models(tmp_path):
    model = _model()
    snapped = export.snap(model, [images()])
    for layer in twin.integer_layers(snapped.twin):
        if layer.quantizer is not None:
            layer.latent.assign(-layer.latent)
    content = writer.to_bytes(snapped)
    assert export.verify(content, snapped, [images()], verbose=0).ok
    assert not export.verify(content, model, verbose=0).ok


def test_a_twin_keeps_the_options_that_it_was_made_with(snapped, tmp_path):
    with pytest.raises(ValueError, match="that the Snapped was made with"):
        export.to_tflite(snapped, tmp_path / "x.tflite", head="int8", verbose=0)


def test_constant_channels_stay_constant_in_training():
    snapped = _snapped()
    layer = snapped.twin.get_layer("inner")
    constant = layer.signs.numpy() == 0
    assert constant.any()
    layer.latent.assign(tf.random.normal(layer.latent.shape))
    codes = layer(tf.random.uniform((4, 8, 8, 4), 0, 4, tf.int32)).numpy()
    for channel in np.flatnonzero(constant):
        assert len(np.unique(codes[..., channel])) == 1
