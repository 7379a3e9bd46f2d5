"""Archives against the quantizers, the twin, and a NumPy reading of their text."""

import dataclasses
import errno
import io
import json
import math
import os
import zipfile

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit import models
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.archive import reader, writer
from tf_lowbit.export.integer import int8_grids, twin
from tf_lowbit.export.lowering import walk
from tf_lowbit.export.options import Options
from tf_lowbit.network import inspection

layers = keras.layers
IMAGE = (10, 10, 3)


# --- networks -------------------------------------------------------------------------


def chain():
    """Conv, depthwise, max pooling and dense layers, with BN of both signs."""
    x = image = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(6, 3, strides=2, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU(name="relu1")(layers.BatchNormalization(name="bn1")(x))
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="spread")(x)
    x = layers.ReLU(name="relu2")(layers.BatchNormalization(name="bn2")(x))
    x = layers.MaxPooling2D(2, strides=1, name="pool")(x)
    x = layers.UpSampling2D((1, 2), name="up")(x)
    x = layers.Cropping2D(((1, 0), (0, 1)), name="crop")(
        layers.ZeroPadding2D(((0, 1), (1, 0)), name="pad")(x)
    )
    x = layers.Conv2D(5, 2, dilation_rate=2, name="mid")(x)
    x = layers.ReLU(name="relu3")(layers.BatchNormalization(name="bn3")(x))
    x = layers.Dense(7, name="dense")(layers.Flatten(name="flat")(x))
    x = layers.ReLU(name="relu4")(x)
    x = layers.Dense(4, activation="softmax", name="head")(x)
    return keras.Model(image, x, name="chain")


def images(count=16, shape=IMAGE):
    return np.random.default_rng(5).uniform(size=(count, *shape)).astype(np.float32)


def randomize(model):
    """Batch normalisations as after a training, some factors negative, one zero."""
    rng = np.random.default_rng(3)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            count = layer.gamma.shape[0]
            gamma = rng.uniform(0.3, 1.5, count) * rng.choice([-1, 1, 1], count)
            gamma[-1] = 0.0
            offsets = rng.normal(0, 0.5, (2, count))
            layer.set_weights([gamma, *offsets, rng.uniform(0.2, 1, count)])
    return model


def quantized(model, rules, data):
    network = tfl.quantize(randomize(model), rules)
    if any(t.quantizer.needs_calibration for t in inspection.quantized_tensors(network)
           if t.role == tfl.quantizers.ACTIVATION):  # fmt: skip
        tfl.calibrate(network, [data])
    return network


def rule(weight_bits, activation_bits, weights="dorefa", activations="dorefa", **more):
    return tfl.PrecisionRule(
        ".*", weight_bits, activation_bits, weights, activations, **more
    )


def saved(network, folder, data, **options):
    """A network's twin, and its archive as it comes back."""
    snapped = walk.snap(network, [data], options=Options(**options))
    path = writer.save_archive(snapped, folder / "net.npz")
    return snapped, reader.load_archive(path)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Trained network, twin, archive, path: `chain` at W2A2."""
    folder = tmp_path_factory.mktemp("archive")
    network = quantized(chain(), [rule(2, 2)], images())
    return network, *saved(network, folder, images()), folder / "net.npz"


def tensors(model, data):
    """What each layer of a twin puts out."""
    outputs = [layer.output for layer in model.layers]
    results = keras.Model(model.inputs, outputs)(data, training=False)
    names = [layer.name for layer in model.layers]
    return {n: np.asarray(r) for n, r in zip(names, results, strict=True)}


# --- an archive computed as its text says, in NumPy -----------------------------------


def padded(x, sizes, strides, dilations, padding, fill=0):
    """Height and width padded as the text says."""
    if padding == "valid":
        return x
    pads = [(0, 0)]
    for size, window, stride, dilation in zip(
        x.shape[1:-1], sizes, strides, dilations, strict=True
    ):
        total = (-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size
        total = max(total, 0)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, [*pads, (0, 0)], constant_values=fill)


def windows(x, sizes, strides, dilations, padding, fill=0):
    """(batch, height, width, channels, *window) of images."""
    x = padded(x, sizes, strides, dilations, padding, fill)
    spans = [(s - 1) * d + 1 for s, d in zip(sizes, dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(1, 2))
    view = view[:, :: strides[0], :: strides[1]]
    return view[..., :: dilations[0], :: dilations[1]]


def linear(layer, x, weights, strides, padding, dilations):
    """The sums of products of a conv, depthwise, dense or scale layer."""
    kind = layer.type.removeprefix("integer_")
    if kind == "scale":
        return x * weights
    if kind == "dense":
        return x @ weights
    if kind == "transposed":
        return transposed(layer.settings, x, weights)
    if x.ndim == 3:
        ones = [(1, *numbers) for numbers in (strides, dilations)]
        total = linear(layer, x[:, None], weights[None], ones[0], padding, ones[1])
        return total[:, 0]
    view = windows(x, weights.shape[:2], strides, dilations, padding)
    if kind == "conv":
        groups = x.shape[-1] // weights.shape[2]
        pairs = zip(
            np.split(view, groups, axis=3), np.split(weights, groups, 3), strict=True
        )
        totals = [np.einsum("bhwcij,ijco->bhwo", v, w) for v, w in pairs]
        return np.concatenate(totals, axis=-1)
    total = np.einsum("bhwcij,ijcm->bhwcm", view, weights)
    return total.reshape(*total.shape[:3], -1)


def transposed(settings, x, weights):
    """Each product at its place, `i * stride + j - before`."""
    (_, height, width, _), (rows, columns, channels, _) = x.shape, weights.shape
    (down, across), (top, left) = settings["strides"], settings["before"]
    size = [
        s * n + more
        for s, n, more in zip(
            settings["strides"], (height, width), settings["excess"], strict=True
        )
    ]
    made = np.zeros((len(x), *size, channels), x.dtype)
    for y in range(height):
        for z in range(width):
            for row in range(rows):
                for column in range(columns):
                    place = y * down + row - top, z * across + column - left
                    inside = 0 <= place[0] < size[0] and 0 <= place[1] < size[1]
                    if inside:
                        made[:, *place] += x[:, y, z] @ weights[row, column].T
    return made


def from_thresholds(layer, x):
    """An integer layer: additions and comparisons of integers, nothing else."""
    s = layer.settings
    x = x.astype(np.int64)
    total = linear(
        layer, x, layer.codes().astype(np.int64), s["strides"], s["padding"],
        s["dilation"],
    )  # fmt: skip
    reached = layer.arrays["thresholds"] <= total[..., None]
    return layer.grid.low + reached.sum(axis=-1)


def from_scales(layer, x):
    """An integer layer as a float32 kernel computes it."""
    s, arrays = layer.settings, layer.arrays
    weights = layer.codes().astype(np.int64) * s["upscale"]
    assert np.abs(weights).max() <= 127
    total = linear(
        layer, x.astype(np.int64), weights, s["strides"], s["padding"], s["dilation"]
    )
    scale = np.float32(layer.input_grid.scale) * arrays["weight_scales"]
    scale = scale / np.float32(layer.grid.scale)
    codes = np.rint((total + arrays["biases"]).astype(np.float32) * scale)
    return np.clip(codes, layer.grid.low, layer.grid.high).astype(np.int64)


def computed(layer, sources):
    """One layer of any type that the networks here have."""
    x, s, grid = sources[0], layer.settings, layer.grid
    match layer.type:
        case kind if kind.startswith("integer_") and kind != "integer_add":
            return from_thresholds(layer, x)
        case "integer_add":
            (p, q), (r, t) = s["ratios"]
            total = sources[0] * p * t + sources[1] * r * q
            # Doubled, so that the nearest integer is a floor of integers.
            codes = (2 * total.astype(np.int64) + q * t) // (2 * q * t)
            return np.clip(codes, grid.low, grid.high)
        case "to_codes":
            scaled = x * (np.float32(1) / np.float32(grid.step))
            return np.rint(np.clip(scaled, grid.low, grid.high)).astype(np.int64)
        case "to_values":
            return (x * grid_step(layer)).astype(np.float32)
        case "argmax":
            return x.argmax(axis=-1)
        case "max_pool" if x.ndim == 3:
            s = {**s, **{k: (1, *s[k]) for k in ("pool_size", "strides")}}
            flat = dataclasses.replace(layer, settings=s)
            return computed(flat, [x[:, None]])[:, 0]
        case "max_pool":
            ones = (1,) * len(s["pool_size"])
            lowest = -(10**6)
            view = windows(x, s["pool_size"], s["strides"], ones, s["padding"], lowest)
            return view.max(axis=(-1, -2))
        case "zero_pad":
            sides = np.reshape(s["padding"], (-1, 2)).tolist()
            missing = [(0, 0)] * (x.ndim - 1 - len(sides))
            return np.pad(x, [(0, 0), *sides, *missing])
        case "edge_pad":
            rows, columns = s["padding"]
            sides = [(0, 0), (rows, rows), (columns, columns), (0, 0)]
            return np.pad(x, sides, "symmetric")
        case "crop" if x.ndim == 3:
            before, behind = s["cropping"]
            return x[:, before : x.shape[1] - behind]
        case "crop":
            (top, bottom), (left, right) = s["cropping"]
            return x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
        case "upsample" if x.ndim == 3:
            return x.repeat(s["size"], axis=1)
        case "upsample":
            height, width = s["size"]
            return x.repeat(height, axis=1).repeat(width, axis=2)
        case "flatten" | "reshape":
            return x.reshape(len(x), *layer.shape)
        case "global_average_pool":
            return x.mean(axis=tuple(range(1, x.ndim - 1)))
        case "global_max_pool":
            return x.max(axis=tuple(range(1, x.ndim - 1)))
        case "add":
            return sum(sources)
        case "relu":
            return np.clip(x, 0, s["max_value"])
        case "affine":
            return x * layer.arrays["gain"] + layer.arrays["offset"]
        case "dense":
            return x @ layer.arrays["kernel"] + layer.arrays["bias"]
        case "concatenate":
            return np.concatenate(sources, axis=s["axis"])
        case "dot":
            first, second = sources
            return first @ (second.swapaxes(1, 2) if s["axes"] == [2, 2] else second)
        case "multiply":
            return np.prod(np.broadcast_arrays(*sources), axis=0)
        case "leaky_relu":
            return np.where(x < 0, s["alpha"] * x, x)
        case "prelu":
            return np.where(x < 0, layer.arrays["alpha"] * x, x)
        case "layer_norm":
            mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            x = (x - mean) / np.sqrt(variance + s["epsilon"])
            return x * layer.arrays["gamma"] + layer.arrays["beta"]
        case "average_pool":
            ones, nan = (1,) * len(s["pool_size"]), np.nan
            x = x.astype(np.float64)
            view = windows(x, s["pool_size"], s["strides"], ones, s["padding"], nan)
            return np.nanmean(view, axis=(-1, -2))
        case "activation":
            return activations(s["activation"], x)
    raise AssertionError(layer.type)


def activations(name, x):
    """Float activations by name."""
    if name == "gelu":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    if name == "tanh":
        return np.tanh(x)
    gate = 1 / (1 + np.exp(-x))
    if name in ("sigmoid", "swish"):
        return gate if name == "sigmoid" else gate * x
    assert name == "softmax"
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def grid_step(layer):
    return np.float32(layer.input_grid.step)


def run(found, data):
    """All tensors of an archive's network, from its input."""
    values = {}
    for layer in found.layers:
        if layer.type == "input":
            values[layer.name] = data
        else:
            values[layer.name] = computed(layer, [values[n] for n in layer.inputs])
    return values


def check_layers(found, twin_values):
    """Each layer of an archive, fed with what the twin's reads; returns near-ties."""
    ties = 0
    for layer in found.layers:
        if layer.type == "input":
            continue
        result = computed(layer, [twin_values[n] for n in layer.inputs])
        expected = twin_values[layer.name]
        assert result.shape == expected.shape, layer.name
        assert result.shape[1:] == layer.shape
        if layer.grid is None:
            np.testing.assert_allclose(
                result, expected, rtol=1e-4, atol=1e-5, err_msg=layer.name
            )
        elif layer.grid.levels <= 16:
            np.testing.assert_array_equal(result, expected, layer.name)
        else:
            assert np.abs(result - expected).max() <= 1, layer.name
            ties += (result != expected).sum()
    return ties


@pytest.mark.slow
def test_decoders_and_sequences_are_computed_as_the_text_says(tmp_path):
    x = image = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="stem")(x)
    for index, (size, more) in enumerate(((3, {"padding": "same"}), (4, {}))):
        x = layers.Conv2DTranspose(3, size, strides=2, name=f"up{index}", **more)(x)
        x = layers.ReLU(name=f"up{index}_relu")(
            layers.BatchNormalization(name=f"up{index}_bn")(x)
        )
    x = layers.UpSampling2D((2, 3), interpolation="bilinear", name="between")(x)
    x = layers.Conv2D(3, 2, strides=3, activation="relu", name="mid")(x)
    x = layers.Reshape((-1, 6), name="rows")(x)
    x = layers.Conv1D(4, 3, padding="causal", dilation_rate=2, name="late")(x)
    x = layers.UpSampling1D(2, name="twice")(layers.ReLU(name="late_relu")(x))
    x = layers.DepthwiseConv1D(3, strides=2, padding="same", name="each")(x)
    x = layers.GlobalMaxPooling1D(name="pool")(layers.ReLU(name="each_relu")(x))
    model = keras.Model(image, layers.Dense(2, name="head")(x))
    data = images(2, (6, 6, 3))
    network = quantized(model, [rule(2, 2, activations="uniform")], data)
    snapped, found = saved(network, tmp_path, data)
    kinds = {layer.type for layer in found.layers}
    assert {"integer_transposed", "edge_pad", "integer_depthwise"} <= kinds
    check_layers(found, tensors(snapped.twin, data))


def test_padded_channels_are_computed_as_the_text_says(tmp_path):
    image = keras.Input((4, 4, 2), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="stem")(image)
    x = tf.pad(x, [[0, 0], [1, 0], [0, 2], [2, 1]])
    x = layers.Conv2D(3, 1, name="head")(x)
    data = images(4, (4, 4, 2))
    rules = [rule(2, 2, activations="uniform", edges=True)]
    network = quantized(keras.Model(image, x), rules, data)
    snapped, found = saved(network, tmp_path, data)
    assert [[1, 0], [0, 2], [2, 1]] in [
        layer.settings.get("padding") for layer in found.layers
    ]
    check_layers(found, tensors(snapped.twin, data))


def test_class_numbers_are_computed_as_the_text_says(tmp_path):
    image = keras.Input((4, 4, 2), name="image")
    x = layers.Conv2D(4, 3, activation="relu", name="stem")(image)
    x = layers.Conv2D(3, 1, name="head")(x)
    data = images(4, (4, 4, 2))
    model = keras.Model(image, tf.argmax(x, axis=-1))
    network = quantized(model, [rule(2, 2, activations="uniform", edges=True)], data)
    snapped, found = saved(network, tmp_path, data)
    assert found.layers[-1].type == "argmax"
    assert found.layers[-1].grid is None
    check_layers(found, tensors(snapped.twin, data))


# --- codes ----------------------------------------------------------------------------

# Layers of one network: bits and quantizer of its weights.
QUANTIZERS = {
    "conv_dorefa1": (1, "dorefa"),
    "depthwise_dorefa2": (2, "dorefa"),
    "conv_dorefa3": (3, "dorefa"),
    "conv_dorefa4": (4, "dorefa"),
    "conv_lsq1": (1, "lsq"),
    "conv_lsq2": (2, "lsq"),
    "depthwise_lsq4": (4, tfl.quantizers.LSQWeightQuantizer(per_axis=True)),
    "conv_lsq3": (3, tfl.quantizers.LSQWeightQuantizer(narrow_range=True)),
    "conv_uniform1": (1, "uniform"),
    "conv_uniform2": (2, "uniform"),
    "conv_uniform5": (5, tfl.quantizers.UniformWeightQuantizer(per_axis=False)),
    "depthwise_uniform8": (8, "uniform"),
}


@pytest.fixture(scope="module")
def quantizers_network():
    x = image = keras.Input((4, 4, 3), name="image")
    x = layers.ReLU(name="relu")(layers.Conv2D(4, 1, name="stem")(x))
    for name in QUANTIZERS:
        if name.startswith("depthwise"):
            x = layers.DepthwiseConv2D(3, padding="same", name=name)(x)
        else:
            x = layers.Conv2D(5, 1, name=name)(x)
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        x = layers.ReLU(name=f"{name}_relu")(x)
    x = layers.Dense(2, name="head")(layers.Flatten(name="flat")(x))
    rules = [tfl.PrecisionRule(n, bits, 2, q) for n, (bits, q) in QUANTIZERS.items()]
    return tfl.quantize(randomize(keras.Model(image, x)), rules)


@pytest.mark.slow
def test_codes_and_steps_are_the_quantizers(quantizers_network, tmp_path):
    network = quantizers_network
    snapped, found = saved(network, tmp_path, images(4, (4, 4, 3)))
    quantized_weights = {
        inspection.wrapped_layer(t.layer).name: t
        for t in inspection.quantized_tensors(network)
        if t.role == tfl.quantizers.WEIGHT
    }
    assert set(quantized_weights) == set(QUANTIZERS)
    for name, tensor in quantized_weights.items():
        bits, layer = QUANTIZERS[name][0], found.layer(name)
        assert layer.settings["bits"] == bits
        assert layer.weight_bytes == math.ceil(layer.weight_count * bits / 8)
        signs, steps = layer.arrays["signs"], layer.arrays["steps"]
        if name.startswith("depthwise"):
            signs, steps = (a.reshape(layer.codes().shape[-2:]) for a in (signs, steps))
        expected = tensor.codes().numpy() * signs
        np.testing.assert_array_equal(layer.codes(), expected, name)
        values = tensor.quantized().numpy() * signs
        np.testing.assert_allclose(layer.codes() * steps, values, rtol=1e-6)
    for layer in twin.integer_layers(snapped.twin):
        archived = found.layer(layer.name)
        np.testing.assert_array_equal(archived.codes(), layer.codes())
        np.testing.assert_array_equal(archived.arrays["signs"], layer.signs)
        assert (archived.input_grid, archived.grid) == (layer.input_grid, layer.grid)


def test_an_archive_can_be_read_with_integers_alone(example):
    """By the text: ZIP, JSON, and one big number for the packed indices."""
    _, snapped, _, path = example
    with zipfile.ZipFile(path) as file:
        parts = {
            name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(file.read(name)), allow_pickle=False
            )
            for name in file.namelist()
        }
    header = json.loads(bytes(parts["header"]).decode())
    names = [record["name"] for record in header["layers"]]
    index = names.index("mid")
    record = header["layers"][index]
    bits, shape = record["bits"], record["weight_shape"]
    assert (record["weight_grid"], bits) == ("odd", 2)
    number = int.from_bytes(bytes(parts[f"{index}.weights"]), "little")
    indices = [number >> (i * bits) & (2**bits - 1) for i in range(math.prod(shape))]
    codes = np.array([2 * i - 3 for i in indices]).reshape(shape)
    codes = codes * parts[f"{index}.signs"]
    np.testing.assert_array_equal(codes, snapped.twin.get_layer("mid").codes())


def test_sizes(example):
    _, _, found, path = example
    counts = {layer.name: layer.weight_count for layer in found.integer_layers}
    assert counts["mid"] == 2 * 2 * 12 * 5
    expected = sum(
        math.ceil(count * (8 if name == "stem" else 2) / 8)
        for name, count in counts.items()
    )
    assert found.weight_bytes == expected
    assert found.weight_bytes < found.array_bytes
    assert found.layer("flat").weight_bytes == 0
    with np.load(path, allow_pickle=False) as parts:
        total = sum(parts[name].nbytes for name in parts.files if name != "header")
    assert total == found.array_bytes


def test_the_header_says_what_was_done(example):
    _, snapped, found, _ = example
    assert found.options["target"] == "xnnpack"
    assert found.library == tfl.__version__
    assert list(found.notes) == [str(note) for note in snapped.notes]
    assert found.inputs == ("image",)
    assert found.outputs == tuple(t._keras_history.layer.name
                                  for t in snapped.twin.outputs)  # fmt: skip
    assert found.layer("pool").settings == {
        "pool_size": [2, 2], "strides": [1, 1], "padding": "valid"
    }  # fmt: skip
    assert found.layer("mid").settings["dilation"] == [2, 2]
    assert found.layer("pool").inputs == ("spread",)
    assert found.layer("pool").grid == found.layer("spread").grid
    with pytest.raises(
        ValueError, match=r"name must be one of image, .* Received: nam"
    ):
        found.layer("nothing")
    with pytest.raises(ValueError, match=r"needs an integer layer. Received: 'pool'"):
        found.layer("pool").codes()


def test_the_same_twin_gives_the_same_bytes(example, tmp_path):
    _, snapped, _, path = example
    again = writer.save_archive(snapped, tmp_path / "again.npz")
    assert again.read_bytes() == path.read_bytes()


# --- what it computes -----------------------------------------------------------------


def check_by_thresholds(snapped, found, data):
    """Runs an archive from its input on: all codes must be the twin's."""
    got, expected = run(found, data), tensors(snapped.twin, data)
    for layer in found.layers:
        if layer.grid is not None and layer.grid.levels <= 16:
            np.testing.assert_array_equal(
                got[layer.name], expected[layer.name], layer.name
            )
    (output,) = found.outputs
    np.testing.assert_allclose(got[output], expected[output], rtol=1e-4, atol=1e-5)


def test_a_chain_by_thresholds_alone(example):
    _, snapped, found, _ = example
    low_bit = {layer.name for layer in found.layers if layer.grid is not None}
    assert {"stem", "spread", "pool", "mid", "flat", "dense"} <= low_bit
    check_by_thresholds(snapped, found, images())


@pytest.mark.slow
def test_a_chain_of_other_bits_by_thresholds_alone(tmp_path):
    network = quantized(chain(), [rule(1, 4)], images())
    check_by_thresholds(*saved(network, tmp_path, images()), images())


def test_groups_by_thresholds_alone(tmp_path):
    x = image = keras.Input(IMAGE, name="image")
    widths = {"stem": (6, 1), "threes": (4, 2), "singles": (8, 4)}
    for name, (filters, groups) in widths.items():
        x = layers.Conv2D(filters, 3, groups=groups, name=name)(x)
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        x = layers.ReLU(name=f"{name}_relu")(x)
    x = layers.Dense(3, name="head")(layers.Flatten(name="flat")(x))
    network = quantized(keras.Model(image, x), [rule(2, 2)], images())
    snapped, found = saved(network, tmp_path, images())
    assert found.layer("threes").settings["weight_shape"] == [3, 3, 3, 4]
    assert found.layer("singles").codes().shape == (3, 3, 1, 8)
    check_by_thresholds(snapped, found, images())


@pytest.mark.slow
def test_plain_cnn_by_thresholds_alone(tmp_path):
    data = images(4, (8, 8, 1))
    network = quantized(
        models.plain_cnn(width=4, input_shape=(8, 8, 1)), [rule(2, 3)],
        data,
    )  # fmt: skip
    snapped, found = saved(network, tmp_path, data)
    check_by_thresholds(snapped, found, data)
    assert len(found.integer_layers) == 5


@pytest.mark.slow
def test_each_layer_of_a_residual_network(tmp_path):
    data = images(4, (8, 8, 1))
    network = quantized(
        models.preact_resnet(8, width=4, input_shape=(8, 8, 1)), [rule(2, 2)], data
    )
    snapped, found = saved(network, tmp_path, data, head="int8")
    expected = tensors(snapped.twin, data)
    assert {"integer_add", "integer_scale"} <= {layer.type for layer in found.layers}
    assert check_layers(found, expected) <= 2
    for layer in found.integer_layers:
        codes = from_scales(layer, expected[layer.inputs[0]])
        np.testing.assert_array_equal(codes, expected[layer.name], layer.name)


@pytest.mark.slow
def test_a_fine_tuned_twin(tmp_path):
    """Its codes reach decision points that those of the snapping did not."""
    rng = np.random.default_rng(0)
    model = randomize(chain())
    kernel, bias = model.get_layer("mid").get_weights()
    kernel = np.where(rng.random(kernel.shape) < 0.5, 0.1, -0.1)
    kernel[0, 0, 0, 0] = 1.0  # So that the others have the codes -1 and 1.
    model.get_layer("mid").set_weights([kernel, bias])
    model.get_layer("bn3").set_weights([np.full(5, c) for c in (0.03, 0, 0, 1)])
    snapped = walk.snap(tfl.quantize(model, [rule(2, 2)]), [images()])
    tuned = snapped.twin.get_layer("mid")
    tuned.latent.assign(np.ones(kernel.shape))
    found = reader.load_archive(writer.save_archive(snapped, tmp_path / "net.npz"))
    layer = found.layer("mid")
    # From all codes 0 to all codes 3: every accumulator's region is visited.
    level = np.linspace(0, 3, 40)[:, None, None, None]
    codes = np.floor(level + rng.random((40, 4, 4, 12))).clip(0, 3)
    expected = tuned(codes.astype(np.float32)).numpy()
    assert len(np.unique(expected)) == 4
    np.testing.assert_array_equal(from_thresholds(layer, codes), expected)


def test_thresholds_are_those_of_the_twin(example):
    _, snapped, found, _ = example
    constant = 0
    for layer in twin.integer_layers(snapped.twin):
        thresholds = found.layer(layer.name).arrays["thresholds"]
        np.testing.assert_array_equal(thresholds, layer.thresholds, layer.name)
        constant += (layer.signs.numpy() == 0).sum()
    assert constant


@pytest.mark.slow
def test_every_kind_of_layer(tmp_path):
    """Those that the other networks here lack; sequences too."""
    x = first = keras.Input((12, 4), name="steps")
    x = layers.Conv1D(4, 3, padding="same", name="stem")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.ZeroPadding1D(1, name="pad")(x)
    x = layers.Conv1D(6, 3, name="mid")(x)
    x = layers.ReLU(name="relu2")(x)
    x = layers.MaxPooling1D(2, name="pool")(x)
    x = layers.Permute((2, 1), name="turn")(x)
    x = layers.Reshape((-1,), name="flat")(x)
    x = layers.Dense(3, name="head")(x)
    x = layers.Activation("sigmoid", name="out")(x)
    network = quantized(keras.Model(first, x), [rule(2, 2)], images(4, (12, 4)))
    _, found = saved(network, tmp_path, images(4, (12, 4)))
    assert [layer.type for layer in found.layers] == [
        "input", "to_codes", "integer_conv", "zero_pad", "integer_conv", "max_pool",
        "permute", "reshape", "to_values", "dense", "activation",
    ]  # fmt: skip
    assert found.layer("pad").settings == {"padding": [1, 1]}
    assert found.layer("turn").settings == {"dims": [2, 1]}
    assert found.layer("flat").shape == (36,)
    assert found.layer("out").settings == {"activation": "sigmoid"}
    assert found.layer("head").arrays["kernel"].shape == (36, 3)
    assert found.layer("mid").codes().shape == (3, 4, 6)


@pytest.mark.slow
def test_float_layers_are_what_the_text_says(tmp_path):
    image = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(4, 3, name="stem")(
        layers.Rescaling(2.0, -1.0, name="scale")(image)
    )
    x = layers.PReLU(alpha_initializer="random_normal", name="slopes")(x)
    x = layers.LayerNormalization(name="norm")(x)
    gate = layers.Activation("sigmoid", name="gate")(x)
    x = layers.Multiply(name="product")([x, gate, layers.LeakyReLU(name="leak")(x)])
    x = layers.ReLU(name="relu")(layers.Conv2D(4, 1, name="mid")(x))
    x = layers.AveragePooling2D(3, strides=2, padding="same", name="pool")(x)
    x = layers.Activation("swish", name="swish")(layers.Flatten(name="flat")(x))
    x = layers.Dense(5, activation="gelu", name="hidden")(x)
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    network = quantized(model, [rule(4, 4)], images())
    snapped, found = saved(network, tmp_path, images())
    kinds = {layer.type for layer in found.layers}
    new = {"affine", "prelu", "layer_norm", "multiply", "leaky_relu", "average_pool"}
    assert kinds >= {*new, "activation"}
    assert check_layers(found, tensors(snapped.twin, images())) <= 2


@pytest.mark.slow
def test_recurrent_layers_and_attention_are_archived_as_their_parts(tmp_path):
    image = keras.Input(IMAGE, name="image")
    x = layers.ReLU(name="first_relu")(layers.Conv2D(4, 3, 2, name="first")(image))
    x = layers.ReLU(name="mid_relu")(layers.Conv2D(4, 1, name="mid")(x))
    x = layers.Reshape((16, 4), name="series")(x)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.LSTM(3, name="cell")(x)
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    network = quantized(model, [rule(4, 4)], images())
    snapped, found = saved(network, tmp_path, images())
    kinds = {layer.type for layer in found.layers}
    assert kinds >= {"dot", "crop", "dense", "activation", "multiply", "concatenate"}
    assert check_layers(found, tensors(snapped.twin, images())) <= 2


@keras.utils.register_keras_serializable(package="tests")
class EvenWeightQuantizer(tfl.quantizers.UniformWeightQuantizer):
    """Codes that are the uniform ones' doubles: a grid that is not all levels."""

    def codes(self, inputs, variables):
        return 2 * super().codes(inputs, variables)


@keras.utils.register_keras_serializable(package="tests")
class KnownEvenWeightQuantizer(EvenWeightQuantizer):
    """The same, which says so."""

    def level_codes(self, bits):
        highest = 2 * (2 ** (bits - 1) - 1)
        return range(-highest, highest + 1)


@pytest.mark.slow
def test_codes_of_another_quantizer_are_packed_by_its_levels(tmp_path):
    known = KnownEvenWeightQuantizer(per_axis=False)
    network = quantized(chain(), [rule(3, 2, known)], images())
    _, found = saved(network, tmp_path, images())
    layer = found.layer("mid")
    grid = {k: layer.settings[k] for k in ("weight_grid", "weight_low", "weight_high")}
    assert grid == {"weight_grid": "signed", "weight_low": -6, "weight_high": 6}
    assert layer.settings["bits"] == 4
    (kernel,) = (
        t for t in inspection.quantized_tensors(network) if t.name == "mid/kernel"
    )
    signs = layer.arrays["signs"].astype(np.int32)
    np.testing.assert_array_equal(layer.codes(), kernel.codes().numpy() * signs)


@pytest.mark.slow
def test_codes_beyond_the_levels_are_refused(tmp_path):
    unknown = EvenWeightQuantizer(per_axis=False)
    network = quantized(chain(), [rule(3, 2, unknown)], images())
    message = (
        r"among the quantizer's level_codes\. Received: '\w+' with codes from -6 to"
    )
    with pytest.raises(tfl.export.ExportError, match=message):
        saved(network, tmp_path, images())
    assert list(tmp_path.iterdir()) == []


def test_a_layer_without_a_form_is_named(example, tmp_path):
    _, snapped, _, _ = example
    image = keras.Input((4,))
    odd = keras.Model(image, layers.Lambda(lambda t: 2 * t, name="twice")(image))
    unknown = walk.Snapped(odd, snapped.options, {}, ())
    with pytest.raises(
        tfl.export.ExportError, match=r"that archives have. Rec.* 'twice'"
    ):
        writer.save_archive(unknown, tmp_path / "net.npz")
    image = keras.Input((4, 4, 2))
    flat = layers.Flatten(data_format="channels_first", name="flat")(image)
    turned = walk.Snapped(keras.Model(image, flat), snapped.options, {}, ())
    with pytest.raises(
        tfl.export.ExportError, match=r"channels_last. Received: 'flat'"
    ):
        writer.save_archive(turned, tmp_path / "net.npz")
    assert list(tmp_path.iterdir()) == []


# --- files ----------------------------------------------------------------------------


def test_missing_folder(example, tmp_path):
    with pytest.raises(OSError, match=r"must be writable .*Received: "):
        writer.save_archive(example[1], tmp_path / "missing" / "net.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into any folder")
def test_read_only_folder(example, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"must be writable .*Received: "):
            writer.save_archive(example[1], tmp_path / "net.npz")
    finally:
        tmp_path.chmod(0o700)


def test_an_error_leaves_the_file_that_is_there(example, tmp_path, monkeypatch):
    path = tmp_path / "net.npz"
    path.write_bytes(b"before")

    def refuse(source, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match=r"must be writable .*Received: .*net.npz"):
            writer.save_archive(example[1], path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    writer.save_archive(example[1], path)
    assert reader.load_archive(path).outputs == example[2].outputs
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_its_place(example, tmp_path):
    (tmp_path / "net.npz").mkdir()
    with pytest.raises(OSError, match="must be writable"):
        writer.save_archive(example[1], tmp_path / "net.npz")
    assert list(tmp_path.iterdir()) == [tmp_path / "net.npz"]


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        reader.load_archive(tmp_path / "none.npz")


def test_files_that_are_no_archives(tmp_path):
    contents = {"empty": b"", "text": b"weights", "cut": b"PK\x03\x04"}
    for name, array in (("array", np.arange(3)), ("objects", np.array([{}]))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        contents[name] = buffer.getvalue()
    for name, arrays in (
        ("other", {"a": np.arange(3)}),
        ("no_json", {"header": np.arange(3)}),
        ("list", {"header": np.frombuffer(b"[]", np.uint8)}),
        ("pickled", {"header": np.array([{}])}),
    ):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        contents[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("header", b"{}")
    contents["zip"] = buffer.getvalue()
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"must be a complete archive .*Rec.*{name}'"
        ):
            reader.load_archive(path)


def test_truncated_files(example, tmp_path):
    content = example[3].read_bytes()
    path = tmp_path / "net.npz"
    for length in (*range(0, len(content), len(content) // 40), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(
            ValueError, match=r"must be a complete archive .*\. Received: "
        ):
            reader.load_archive(path)


def same(first, second):
    """Whether two archives hold the same."""
    for a, b in zip(first.layers, second.layers, strict=True):
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])
    return [repr(layer) for layer in first.layers] == [
        repr(layer) for layer in second.layers
    ]


def test_a_flipped_bit_is_found_or_without_effect(example, tmp_path):
    content = bytearray(example[3].read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "net.npz"
    found = 0
    for position in rng.integers(0, len(content), 150):
        torn = bytearray(content)
        torn[position] ^= 1 << rng.integers(8)
        path.write_bytes(torn)
        try:
            assert same(reader.load_archive(path), example[2])
        except ValueError:
            found += 1
    assert found > 60


def altered(path, folder, change):
    """A copy of an archive; `change` alters header and arrays."""
    with np.load(path, allow_pickle=False) as parts:
        arrays = {name: parts[name] for name in parts.files}
    header = json.loads(bytes(arrays.pop("header")))
    change(header, arrays)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(folder / "altered.npz", **arrays)
    return folder / "altered.npz"


def index_of(header, name):
    return [record["name"] for record in header["layers"]].index(name)


def with_array(name, function):
    """A change of an array of the layer "mid", with its entry in the header."""

    def change(header, arrays):
        index = index_of(header, "mid")
        array = function(arrays[f"{index}.{name}"])
        arrays[f"{index}.{name}"] = array
        form = [array.dtype.name, list(array.shape)]
        header["layers"][index]["arrays"][name] = form

    return change


def with_setting(**settings):
    def change(header, arrays):
        header["layers"][index_of(header, "mid")].update(settings)

    return change


def pop_array(header, arrays):
    arrays.pop(f"{index_of(header, 'mid')}.weights")


def pop_setting(header, arrays):
    header["layers"][index_of(header, "mid")].pop("upscale")


def pop_grid(header, arrays):
    header["layers"][index_of(header, "mid")].pop("grid")


def new_array(header, arrays):
    arrays["99.weights"] = np.zeros(1, np.uint8)


def twice(header, arrays):
    header["layers"][1]["name"] = header["layers"][0]["name"]


def no_layers(header, arrays):
    header["layers"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_array("weights", lambda a: a[:-1]), r"packed must be uint8 of shape"),
        (with_array("weights", lambda a: a.astype(np.int8)), "packed must be uint8"),
        (with_array("thresholds", lambda a: a[:, ::-1]), "descending thresholds"),
        (with_array("thresholds", lambda a: a[:, 1:]), "but must have"),
        (with_array("signs", lambda a: a * 0 + 2), "signs other than"),
        (with_array("steps", lambda a: a.astype(np.float64)), "but must have"),
        (with_setting(weight_shape=[2, 2, 11, 5]), "packed must be uint8 of shape"),
        (with_setting(weight_shape=[2, 2, 12, -5]), "mid has weight_shape="),
        (with_setting(weight_shape=None), "mid has weight_shape=None"),
        (with_setting(bits=3), "packed must be uint8 of shape"),
        (with_setting(bits=9), "mid has bits=9"),
        (with_setting(weight_grid="even"), "weight_grid must be known"),
        (with_setting(weight_grid="constant"), "but must have"),
        (
            with_setting(weight_grid="signed", weight_low=-1, weight_high=1),
            "codes must be at most 1",
        ),
        (with_setting(type="recurrent"), "unknown type 'recurrent'"),
        (with_setting(type="max_pool"), "unlike layers of type 'max_pool'"),
        (with_setting(inputs=["later"]), r"reads \['later'\]"),
        (with_setting(inputs=["image"]), "another grid"),
        (with_setting(grid=None), "must read and output codes"),
        (with_setting(grid={"step": 1.0}), "TypeError"),
        (with_setting(arrays={}), "but must have"),
        (pop_array, "KeyError"),
        (pop_setting, "lacks"),
        (pop_grid, "KeyError: 'grid'"),
        (new_array, "belong to no layer"),
        (twice, "occurs twice"),
        (no_layers, "TypeError"),
        (lambda h, a: h.update(outputs=["nothing"]), "'nothing', is missing"),
    ],
)
def test_parts_that_do_not_fit(change, message, example, tmp_path):
    path = altered(example[3], tmp_path, change)
    with pytest.raises(ValueError, match=rf"must fit together. Received: .*{message}"):
        reader.load_archive(path)


NONSENSE = {
    "strides": [[0, 1], [-1, 1], "11", [1, 1, 1], [True, 1], [1.0, 1], None],
    "padding": ["all", ["same"], None, [[-1, 0], [0, 0]]],
    "dilation": [[0], {}],
    "weight_shape": [[2, 2, 12, -5], [2.0], "2"],
    "bits": [True, 2.0, "2"],
    "upscale": [0, 1.5],
    "kernel": ["arm", None],
    "represents": [3],
    "storage": [None],
    "shape": [[-1], "3", [1.5], 3],
    "name": ["", None, 3, ["mid"]],
    "inputs": [[3], [None], "image"],
    "own": [1],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in NONSENSE for value in NONSENSE[key]]
)
def test_a_field_that_says_nonsense(key, value, example, tmp_path):
    path = altered(example[3], tmp_path, with_setting(**{key: value}))
    with pytest.raises(ValueError, match="must fit together"):
        reader.load_archive(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 0.0),
        ("step", float("nan")),
        ("scale", -1.0),
        ("scale", "1"),
        ("low", 1),
        ("low", -300),
        ("high", 2.0),
        ("zero_point", None),
        ("clamp", "RELU7"),
        ("more", 1),
    ],
)
def test_a_grid_that_no_tensor_has(key, value, example, tmp_path):
    def change(header, arrays):
        for record in header["layers"]:
            for grid in (record["input_grid"], record["grid"]):
                if grid is not None:
                    grid[key] = value

    with pytest.raises(ValueError, match="must fit together"):
        reader.load_archive(altered(example[3], tmp_path, change))


@pytest.mark.parametrize("clamp", int8_grids.CLAMPS)
def test_every_clamp_of_a_file_is_read(clamp, example, tmp_path):
    def change(header, arrays):
        for record in header["layers"]:
            for grid in (record["input_grid"], record["grid"]):
                if grid is not None:
                    grid["clamp"] = clamp

    loaded = reader.load_archive(altered(example[3], tmp_path, change))
    assert {layer.grid.clamp for layer in loaded.layers if layer.grid} == {clamp}


@pytest.mark.parametrize("key", ["library", "notes", "inputs", "outputs"])
@pytest.mark.parametrize("value", [None, 3, [3], [None]])
def test_a_head_that_says_nonsense(key, value, example, tmp_path):
    path = altered(example[3], tmp_path, lambda h, a: h.update({key: value}))
    with pytest.raises(ValueError, match="must fit together"):
        reader.load_archive(path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version(version, example, tmp_path):
    path = altered(example[3], tmp_path, lambda h, a: h.update(version=version))
    with pytest.raises(
        ValueError, match=f"of version 1. Received: version {version!r}"
    ):
        reader.load_archive(path)


def test_an_unaltered_copy_is_read(example, tmp_path):
    path = altered(example[3], tmp_path, lambda h, a: None)
    assert same(reader.load_archive(path), example[2])


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, header=np.zeros(2**27, np.uint8))
    with pytest.raises(
        ValueError, match=r"must be a complete archive.*200 times its size"
    ):
        reader.load_archive(path)
