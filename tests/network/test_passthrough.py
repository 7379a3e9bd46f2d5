"""What the table says of a layer or an operation is true of what it computes."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras, tf
from tf_lowbit.network import graph, inspection, layer_registry, passthrough
from tf_lowbit.network.passthrough import Kept
from tf_lowbit.scheme.placement import make_plan

layers = keras.layers
IMAGE = (6, 6, 4)
# One of each is called on an image.
GRID = {
    "Activation": lambda: layers.Activation("linear"),
    "ActivityRegularization": lambda: layers.ActivityRegularization(l2=0.1),
    "AlphaDropout": lambda: layers.AlphaDropout(0.5),
    "Cropping2D": lambda: layers.Cropping2D(1),
    "Dropout": lambda: layers.Dropout(0.5),
    "Flatten": layers.Flatten,
    "GaussianDropout": lambda: layers.GaussianDropout(0.5),
    "GaussianNoise": lambda: layers.GaussianNoise(0.5),
    "GlobalMaxPooling2D": layers.GlobalMaxPooling2D,
    "Identity": layers.Identity,
    "MaxPooling2D": lambda: layers.MaxPooling2D(2, padding="same"),
    "Permute": lambda: layers.Permute((2, 1, 3)),
    "RandomBrightness": lambda: layers.RandomBrightness(0.5),
    "RandomContrast": lambda: layers.RandomContrast(0.5),
    "RandomFlip": layers.RandomFlip,
    "RandomHeight": lambda: layers.RandomHeight(0.5),
    "RandomRotation": lambda: layers.RandomRotation(0.5),
    "RandomTranslation": lambda: layers.RandomTranslation(0.5, 0.5),
    "RandomWidth": lambda: layers.RandomWidth(0.5),
    "RandomZoom": lambda: layers.RandomZoom(0.5),
    "Reshape": lambda: layers.Reshape((36, 4)),
    "Resizing": lambda: layers.Resizing(9, 9, interpolation="nearest"),
    "SpatialDropout2D": lambda: layers.SpatialDropout2D(0.5),
    "UpSampling2D": lambda: layers.UpSampling2D(2),
    "ZeroPadding2D": lambda: layers.ZeroPadding2D(1),
    "broadcast_to": lambda: lambda x: tf.broadcast_to(x[:1, :1], [4, 6, 6, 4]),
    "cast": lambda: lambda x: tf.cast(x, tf.float32),
    "central_crop": lambda: lambda x: tf.image.central_crop(x, 0.5),
    "crop": lambda: lambda x: tf.image.crop_to_bounding_box(x, 1, 1, 3, 3),
    "crop or pad": lambda: lambda x: tf.image.resize_with_crop_or_pad(x, 8, 4),
    "depth_to_space": lambda: lambda x: tf.nn.depth_to_space(x, 2),
    "expand_dims": lambda: lambda x: tf.expand_dims(x, 1),
    "flip": lambda: tf.image.flip_left_right,
    "flip up": lambda: tf.image.flip_up_down,
    "gather": lambda: lambda x: tf.gather(x, [1, 0], axis=-1),
    "getitem": lambda: lambda x: x[:, ::2, 1:, tf.newaxis],
    "identity": lambda: tf.identity,
    "max_pool": lambda: lambda x: tf.nn.max_pool2d(x, 2, 2, "SAME"),
    "pad": lambda: lambda x: tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]),
    "pad by name": lambda: (
        lambda x: tf.pad(
            x, paddings=[[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=0
        )
    ),
    "pad, reflected": lambda: (
        lambda x: tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], "REFLECT")
    ),
    "pad to box": lambda: lambda x: tf.image.pad_to_bounding_box(x, 1, 1, 9, 9),
    "reduce_max": lambda: lambda x: tf.reduce_max(x, -1),
    "reduce_min": lambda: lambda x: tf.reduce_min(x, -1),
    "repeat": lambda: lambda x: tf.repeat(x, 2, 1),
    "reshape": lambda: lambda x: tf.reshape(x, [-1, 36, 4]),
    "reshape by a shape": lambda: lambda x: tf.reshape(x, [tf.shape(x)[0], -1]),
    "resize": lambda: lambda x: tf.image.resize(x, (4, 9), method="nearest"),
    "reverse": lambda: lambda x: tf.reverse(x, [1]),
    "roll": lambda: lambda x: tf.roll(x, 1, 1),
    "rot90": lambda: tf.image.rot90,
    "slice": lambda: lambda x: tf.slice(x, [0, 1, 1, 0], [-1, 2, 2, 4]),
    "space_to_depth": lambda: lambda x: tf.nn.space_to_depth(x, 2),
    "split": lambda: lambda x: tf.split(x, 2, -1)[1],
    "squeeze": lambda: lambda x: tf.squeeze(x[:, :1], 1),
    "stop_gradient": lambda: tf.stop_gradient,
    "strided_slice": lambda: (
        lambda x: tf.strided_slice(x, [0, 0, 0, 0], [4, 6, 6, 4], [1, 2, 2, 1])
    ),
    "tile": lambda: lambda x: tf.tile(x, [1, 2, 1, 1]),
    "transpose": lambda: lambda x: tf.transpose(x, [0, 2, 1, 3]),
    "transposed image": lambda: tf.image.transpose,
    "unstack": lambda: lambda x: tf.unstack(x, axis=1)[2],
}
PLACE = {
    "AveragePooling2D": lambda: layers.AveragePooling2D(2),
    "Concatenate": lambda: lambda x: layers.Concatenate()([x, x]),
    "GlobalAveragePooling2D": layers.GlobalAveragePooling2D,
    "avg_pool": lambda: lambda x: tf.nn.avg_pool2d(x, 2, 2, "VALID"),
    "concat": lambda: lambda x: tf.concat([x, x], 1),
    "reduce_mean": lambda: lambda x: tf.reduce_mean(x, [1, 2]),
    "stack": lambda: lambda x: tf.stack([x, x], 1),
}
RANGE = {
    "Average": lambda: lambda x: layers.Average()([x, x]),
    "CenterCrop": lambda: layers.CenterCrop(8, 8),
    "Maximum": lambda: lambda x: layers.Maximum()([x, x]),
    "Minimum": lambda: lambda x: layers.Minimum()([x, x]),
    "RandomCrop": lambda: layers.RandomCrop(4, 4),
    "Resizing": lambda: layers.Resizing(9, 9),
    "Resizing, area": lambda: layers.Resizing(4, 4, interpolation="area"),
    "UpSampling2D": lambda: layers.UpSampling2D(2, interpolation="bilinear"),
    "cast": lambda: lambda x: tf.cast(x, tf.float16),
    "resize": lambda: lambda x: tf.image.resize(x, (4, 9)),
}
SIGN = {
    "Add": lambda: lambda x: layers.Add()([x, x]),
    "Dot": lambda: lambda x: layers.Dot(-1)([x, x]),
    "Dropout, drawn": lambda: lambda x: layers.Dropout(0.5)(x, training=True),
    "ELU": layers.ELU,
    "LeakyReLU": layers.LeakyReLU,
    "PReLU": lambda: layers.PReLU("random_normal"),
    "Rescaling": lambda: layers.Rescaling(1 / 255, offset=0.1),
    "UnitNormalization": layers.UnitNormalization,
    "swish": lambda: layers.Activation("swish"),
    "tanh": lambda: layers.Activation("tanh"),
    "add": lambda: lambda x: x + 1.0,
    "add_n": lambda: lambda x: tf.add_n([x, x]),
    "ceil": lambda: tf.math.ceil,
    "clip": lambda: lambda x: tf.clip_by_value(x, -1.0, 0.5),
    "cumsum": lambda: lambda x: tf.cumsum(x, 1),
    "divide": lambda: lambda x: x / 2.0,
    "divide_no_nan": lambda: lambda x: tf.math.divide_no_nan(x, 2.0),
    "dropout": lambda: lambda x: tf.nn.dropout(x, 0.5),
    "elu": lambda: tf.nn.elu,
    "floor": lambda: tf.floor,
    "gelu": lambda: tf.nn.gelu,
    "l2_normalize": lambda: lambda x: tf.nn.l2_normalize(x, -1),
    "leaky_relu": lambda: tf.nn.leaky_relu,
    "log1p": lambda: tf.math.log1p,
    "matmul": lambda: lambda x: tf.matmul(x, np.ones((4, 2), np.float32)),
    "minimum": lambda: lambda x: tf.minimum(x, 0.5),
    "multiply": lambda: lambda x: x * 2.0,
    "odd power": lambda: lambda x: x**3,
    "reduce_prod": lambda: lambda x: tf.reduce_prod(x, -1),
    "reduce_sum": lambda: lambda x: tf.reduce_sum(x, -1),
    "round": lambda: tf.round,
    "selu": lambda: tf.nn.selu,
    "sign": lambda: tf.sign,
    "silu": lambda: tf.nn.silu,
    "tanh by name": lambda: tf.tanh,
}
NOTHING = {
    "BatchNormalization": layers.BatchNormalization,
    "GaussianNoise, drawn": lambda: (
        lambda x: layers.GaussianNoise(1.0)(x, training=True)
    ),
    "Lambda": lambda: layers.Lambda(lambda x: x),
    "Rescaling": lambda: layers.Rescaling(1.0, offset=-0.5),
    "Resizing": lambda: layers.Resizing(9, 9, interpolation="bicubic"),
    "UpSampling2D": lambda: layers.UpSampling2D(2, interpolation="lanczos3"),
    "cosine": lambda: tf.cos,
    "divide": lambda: lambda x: x / -2.0,
    "log": lambda: tf.math.log,
    "matmul": lambda: lambda x: tf.matmul(x, -np.ones((4, 2), np.float32)),
    "multiply": lambda: lambda x: x * -2.0,
    "negative": lambda: tf.negative,
    "pad": lambda: (
        lambda x: tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=-1.0)
    ),
    "resize": lambda: lambda x: tf.image.resize(x, (4, 9), "lanczos5"),
    "subtract": lambda: lambda x: x - 0.5,
}
MADE_NONNEGATIVE = {
    "ReLU": layers.ReLU,
    "Softmax": layers.Softmax,
    "ThresholdedReLU": layers.ThresholdedReLU,
    "abs": lambda: tf.abs,
    "clip": lambda: lambda x: tf.clip_by_value(x, 0.0, 6.0),
    "even power": lambda: lambda x: x**2,
    "exp": lambda: tf.exp,
    "maximum": lambda: lambda x: tf.maximum(x, 0.0),
    "norm": lambda: lambda x: tf.norm(x, axis=-1),
    "product with itself": lambda: lambda x: x * x,
    "reduce_variance": lambda: lambda x: tf.math.reduce_variance(x, -1),
    "relu": lambda: tf.nn.relu,
    "sigmoid": lambda: tf.sigmoid,
    "softplus": lambda: tf.nn.softplus,
    "square": lambda: tf.square,
    "squared_difference": lambda: lambda x: tf.math.squared_difference(x, 1.0),
}
NOT_MADE = {
    "clip": lambda: lambda x: tf.clip_by_value(x, -1.0, 6.0),
    "maximum": lambda: lambda x: tf.maximum(x, -0.5),
    "odd power": lambda: lambda x: x**3,
    "product": lambda: lambda x: x * x[:, ::-1],
    "tanh": lambda: tf.tanh,
}


def called(make):
    """An image's Keras tensor, what the layer makes of it, and the node."""
    image = keras.Input(IMAGE)
    result = make()(image)
    return image, result, graph.producer(result)


def computed(image, result, values):
    return np.asarray(keras.Model(image, result)(values, training=False), np.float32)


def images(low=0.0):
    shape = (4, *IMAGE)
    return np.random.default_rng(0).uniform(low, 2.0, shape).astype(np.float32)


@pytest.mark.parametrize("name", GRID)
def test_what_keeps_a_grid_puts_out_what_it_reads_or_zeros(name):
    image, result, node = called(GRID[name])
    assert passthrough.kept(node) is Kept.GRID
    assert passthrough.keeps_grid(node)
    assert passthrough.is_transparent(node)
    assert passthrough.sources(node)
    found = computed(image, result, images(-2.0))
    assert set(np.unique(found)) <= {0.0, *np.unique(images(-2.0))}
    if passthrough.is_identity(node):
        np.testing.assert_array_equal(found, images(-2.0))


@pytest.mark.parametrize("name", PLACE)
def test_what_joins_or_averages_stays_between_what_it_reads(name):
    image, result, node = called(PLACE[name])
    assert passthrough.kept(node) is Kept.PLACE
    assert passthrough.is_transparent(node)
    assert not passthrough.keeps_grid(node)
    found, read = computed(image, result, images(-2.0)), images(-2.0)
    assert read.min() <= found.min() <= found.max() <= read.max()


@pytest.mark.parametrize("name", RANGE)
def test_what_keeps_the_range_stays_between_what_it_reads(name):
    image, result, node = called(RANGE[name])
    assert passthrough.kept(node) is Kept.RANGE
    assert not passthrough.is_transparent(node)
    found, read = computed(image, result, images(-2.0)), images(-2.0)
    assert read.min() - 1e-3 <= found.min() <= found.max() <= read.max() + 1e-3


@pytest.mark.parametrize("name", SIGN)
def test_what_keeps_the_sign_puts_out_nothing_negative(name):
    image, result, node = called(SIGN[name])
    assert passthrough.kept(node) is Kept.SIGN
    assert not passthrough.is_transparent(node)
    assert computed(image, result, images()).min() >= 0.0


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_said_of_what_may_change_the_sign(name):
    _, _, node = called(NOTHING[name])
    assert passthrough.kept(node) is Kept.NOTHING


@pytest.mark.parametrize("name", MADE_NONNEGATIVE)
def test_what_is_never_negative_whatever_is_read(name):
    image, result, node = called(MADE_NONNEGATIVE[name])
    assert passthrough.makes_nonnegative(node)
    assert computed(image, result, images(-2.0)).min() >= 0.0


@pytest.mark.parametrize("name", NOT_MADE)
def test_what_may_be_negative_where_something_negative_is_read(name):
    image, result, node = called(NOT_MADE[name])
    assert not passthrough.makes_nonnegative(node)
    assert computed(image, result, images(-2.0)).min() < 0.0


@pytest.mark.parametrize("kind", ["Identity", "Activation", "GaussianNoise", "Dropout"])
def test_identities(kind):
    assert passthrough.is_identity(called(GRID[kind])[2])


@pytest.mark.parametrize("kind", ["Flatten", "Permute", "reverse"])
def test_what_moves_values_is_no_identity(kind):
    assert not passthrough.is_identity(called(GRID[kind])[2])


def test_a_variable_promises_no_sign():
    scale = tf.Variable(1.0)
    node = called(lambda: lambda x: x * scale)[2]
    assert passthrough.kept(node) is Kept.NOTHING


KINDS = {
    **{f"{name}, grid": make for name, make in GRID.items()},
    **{f"{name}, place": make for name, make in PLACE.items()},
    **{f"{name}, sign": make for name, make in (SIGN | RANGE).items()},
}


@pytest.mark.quick(18)
@pytest.mark.parametrize("name", KINDS)
def test_behind_a_relu_no_level_is_lost(name):
    """The ReLU itself is quantized, or an unsigned quantizer stands behind."""
    image = keras.Input(IMAGE)
    x = layers.Conv2D(4, 1, name="stem")(image)
    x = KINDS[name]()(layers.ReLU(name="relu")(x))
    shape = [size or 4 for size in x.shape[1:]]
    x = tf.reshape(tf.cast(x, tf.float32), [-1, int(np.prod(shape, dtype=int))])
    x = layers.Dense(3, name="mid")(x)
    model = keras.Model(image, layers.Dense(2, name="head")(x))
    eligible = {layer.name for layer in model.layers if layer_registry.kernels(layer)}
    plan = make_plan(model, (tfl.PrecisionRule("mid", 2, 2),), eligible)
    if "sign" in name:
        (insertion,) = plan.insertions.values()
        assert not insertion.quantizer.signed
        assert not plan.activations
    else:
        assert not plan.insertions
        assert set(plan.activations) == {"relu"}


@pytest.mark.parametrize(
    "behind",
    [
        *(GRID[k] for k in ("Identity", "getitem", "reshape", "reverse")),
        *((SIGN | RANGE)[k] for k in ("Resizing", "resize", "tanh")),
    ],
)
def test_all_levels_are_used_in_the_network(behind):
    keras.utils.set_random_seed(0)
    image = keras.Input(IMAGE)
    x = layers.Conv2D(4, 1, name="stem")(image)
    x = behind()(layers.ReLU(name="relu")(layers.BatchNormalization()(x)))
    x = layers.Dense(3, name="mid")(x)
    model = keras.Model(image, layers.Dense(2, name="head")(x))
    rule = tfl.PrecisionRule("mid", 2, 2, "uniform", "uniform")
    quantized = tfl.quantize(model, rule)
    data = nets.images(64, IMAGE)
    tfl.calibrate(quantized, [data])
    read = quantized.get_layer("mid").input
    values = keras.Model(quantized.input, read)(data).numpy()
    assert values.min() == 0.0
    assert len(np.unique(values)) == 4
    (tensor,) = inspection.input_activations(quantized)["mid"]
    assert not tensor.quantizer.signed
