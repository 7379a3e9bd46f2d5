"""Small networks with awkward weights, and what proves an export of them."""

import dataclasses
import warnings

import numpy as np

import tf_lowbit as tfl
from tf_lowbit import export
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import twin
from tf_lowbit.export.lowering import walk
from tf_lowbit.export.lowering.tensor_ranges import key
from tf_lowbit.export.options import Options
from tf_lowbit.export.tflite import runner, writer
from tf_lowbit.network import graph, inspection

layers = keras.layers
Rule = tfl.PrecisionRule

IMAGE = (8, 8, 2)
CLASSES = 3
# Of a trained network's codes, how many may be off: floats beside a tie.
NEAR_TIES = 1e-4
# A rule that fixes the grids of the first layer's input and of its weights.
EDGE = Rule("first|head", 8, 8, "uniform", "uniform")
# Everything that a branch has, the ReLUs at its end too.
EVERYWHERE = [Rule(".*_relu", None, 2), Rule(".*", 2, 2, edges=True)]


def images(count=16, shape=IMAGE, seed=0):
    """Pixels in [0, 1], on the grid of 255 steps, both ends among them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape))
    pixels.reshape(-1)[:2] = 0, 255
    return (pixels / np.float32(255)).astype(np.float32)


def normals(count=16, shape=IMAGE, seed=0):
    """Normal values."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def randomize(model, seed=0):
    """Gives a float model weights that are hard on an export.

    Kernels are normal and biases are not zero. Of each normalisation's channels about
    half have a negative scale; where there are three or more the second has the scale
    0 and the third is moved far off.
    """
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            _randomize_norm(layer, rng)
            continue
        for weight in layer.weights:
            shape = weight.shape
            if shape.rank == 1:
                weight.assign(rng.normal(0.0, 0.3, shape))
                continue
            kept = -2 if "depthwise" in weight.name else -1
            deviation = np.sqrt(2.0 / np.prod(shape[:kept]))
            weight.assign(rng.normal(0.0, deviation, shape))
    return model


def _randomize_norm(layer, rng):
    channels = layer.moving_mean.shape[0]
    gamma = rng.uniform(0.3, 1.5, channels) * rng.choice([-1.0, 1.0], channels)
    gamma[0] = abs(gamma[0])  # So that something stays on.
    beta = rng.normal(0.3, 0.4, channels)
    mean = rng.normal(0.0, 0.3, channels)
    if channels > 2:
        gamma[1] = 0.0
        mean[2] = 40.0
    if layer.scale:
        layer.gamma.assign(gamma)
    if layer.center:
        layer.beta.assign(beta)
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(rng.uniform(0.3, 2.0, channels))


def network(body, shape=IMAGE, classes=CLASSES, seed=0):
    """first conv - BN - ReLU - `body` - pooling - head, randomised."""
    image = keras.Input(shape, name="image")
    x = conv_bn_relu(image, 4, name="first")
    return finished(image, body(x), classes, seed)


def branched(branches, shape, seed=0):
    """A quantized ReLU of the image, and what each branch makes of it, as outputs.

    Args:
        branches: name -> function (tensor, name) -> tensor.
        shape: of the image.
        seed: of the weights.
    """
    image = keras.Input(shape, name="image")
    x = layers.ReLU(name="input_relu")(image)
    outputs = [branch(x, name) for name, branch in branches.items()]
    return randomize(keras.Model(image, outputs), seed)


def conv_bn_relu(x, filters, size=3, name="conv", **arguments):
    """A convolution without bias, its normalisation and a ReLU."""
    arguments = {"padding": "same", "use_bias": False, **arguments}
    x = layers.Conv2D(filters, size, name=name, **arguments)(x)
    return bn_relu(x, name)


def bn_relu(x, name):
    """A normalisation and a ReLU."""
    x = layers.BatchNormalization(name=f"{name}_bn")(x)
    return layers.ReLU(name=f"{name}_relu")(x)


def conv(*arguments, **more):
    """A convolution of 5 channels, batch norm and ReLU."""
    return lambda x, name: bn_relu(
        layers.Conv2D(5, *arguments, name=name, **more)(x), name
    )


def behind(layer, then=None):
    """`layer`, and then a convolution."""
    then = then or conv(3, padding="same")
    return lambda x, name: then(layer()(x), name)


def finished(image, x, classes=CLASSES, seed=0):
    """Pools what is left to pool, and adds the head."""
    if len(x.shape) == 4:
        x = layers.GlobalAveragePooling2D(name="pool")(x)
    elif len(x.shape) == 3:
        x = layers.Flatten(name="flat")(x)
    x = layers.Dense(classes, name="head")(x)
    return randomize(keras.Model(image, x), seed)


def quantize(model, rules, clip=2.5, **arguments):
    """Quantized, and all ranges set: quicker than `calibrate`, and as good here.

    Args:
        model: float model.
        rules: of `tf_lowbit.quantize`.
        clip: of the activation quantizers that are to be calibrated.
        **arguments: of `tf_lowbit.quantize`.
    """
    with warnings.catch_warnings():  # Rules that match nothing are of no interest.
        warnings.simplefilter("ignore", tfl.QuantizationWarning)
        made = tfl.quantize(model, rules, **arguments)
    for tensor in inspection.quantized_tensors(made):
        if tensor.role == "activation" and tensor.quantizer.needs_calibration:
            for name in {"alpha", "clip"} & set(tensor.variables):
                tensor.variables[name].assign(clip)
            if "step" in tensor.variables:
                codes = 2 ** (tensor.bits - tensor.quantizer.signed) - 1
                tensor.variables["step"].assign(clip / codes)
            tensor.variables["calibrated"].assign(1)
    return made


@dataclasses.dataclass(frozen=True)
class Proof:
    """An export in memory that has been verified."""

    model: keras.Model
    snapped: walk.Snapped
    content: bytes
    report: export.Report

    @property
    def notes(self):
        """The notes' texts, by layer."""
        found = {}
        for note in self.snapped.notes:
            texts = [found[note.layer]] if note.layer in found else []
            found[note.layer] = "; ".join([*texts, note.text])
        return found

    def layer(self, name):
        """A layer of the twin."""
        return self.snapped.twin.get_layer(name)


def prove(model, data, input_type="float32", not_delegated=(), **options) -> Proof:
    """Exports in memory and verifies; anything but a full proof fails."""
    options = Options(input_type=input_type, **options)
    snapped = export.snap(model, [data], options=options)
    content = writer.to_bytes(snapped)
    report = export.verify(content, model, [data], verbose=0)
    assert report.ok, report.failures
    assert report.mismatches == 0
    assert report.codes > 0
    assert report.not_delegated == list(not_delegated)
    return Proof(model, snapped, content, report)


def differing_codes(model, snapped, data) -> dict[str, tuple[int, int]]:
    """Codes of the twin that are not the trained network's.

    Args:
        model: the trained network.
        snapped: of it.
        data: one batch.

    Returns:
        Name of an activation quantizer -> (how many codes differ, of how many), for
        all of them.
    """
    quantizers = [
        tensor
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == "activation"
    ]
    pairs = [_representing(snapped.twin, tensor.layer) for tensor in quantizers]
    trained = keras.Model(model.inputs, [t.layer.output for t in quantizers])
    have = keras.Model(snapped.twin.inputs, [layer.output for layer in pairs])
    wanted = tf.nest.flatten(trained(data, training=False))
    found = tf.nest.flatten(have(data, training=False))
    result = {}
    for tensor, values, codes in zip(quantizers, wanted, found, strict=True):
        step = np.float64(tensor.quantizer.step(None, tensor.variables))
        expected = np.rint(values.numpy() / step)
        assert (np.abs(values.numpy() / step - expected) < 1e-3).all(), tensor.name
        result[tensor.name] = int((codes.numpy() != expected).sum()), expected.size
    return result


def _representing(model, layer):
    """The layer of a twin that puts out the codes of a trained quantizer."""
    for made in model.layers:
        if getattr(made, "represents", None) == key(layer.output):
            return made
        if made.name == layer.name and hasattr(made, "grid"):
            return made
    # An Add puts the codes of the quantizer behind it out itself.
    (node,) = layer._inbound_nodes
    source = graph.producer(node.keras_inputs[0])
    made = model.get_layer(source.layer.name)
    assert isinstance(made, twin.IntegerAdd), layer.name
    return made


def relative_error(model, content, x):
    """How far a file's outputs are from the trained network's.

    Args:
        model: the trained network, of one input.
        content: the file.
        x: one batch.

    Returns:
        The mean error divided by the outputs' standard deviation, of the output where
        it is the largest.
    """
    wanted = [v.numpy() for v in tf.nest.flatten(model(x, training=False))]
    run = runner.Runner(content)
    found = run(x)
    have = [found[detail["name"]] for detail in run.outputs]
    return max(
        float(np.abs(h - w).mean() / w.std()) for h, w in zip(have, wanted, strict=True)
    )


def assert_as_trained(proof, data, allowed=NEAR_TIES):
    """All grids were trained: codes and outputs are the trained network's."""
    assert not proof.snapped.notes
    found = differing_codes(proof.model, proof.snapped, data)
    assert found
    different = sum(count for count, _ in found.values())
    total = sum(size for _, size in found.values())
    assert different <= allowed * total, found
    wanted = tf.nest.flatten(proof.model(data, training=False))
    have = tf.nest.flatten(proof.snapped.twin(data, training=False))
    for w, h in zip(wanted, have, strict=True):
        w, h = w.numpy(), h.numpy()
        assert w.shape == h.shape
        if not different:
            np.testing.assert_allclose(h, w, rtol=1e-4, atol=1e-4 * np.abs(w).max())


def _plain(x):
    return conv_bn_relu(x, 16, name="inner")


def _residual(x):
    y = conv_bn_relu(x, 4, name="a")
    y = layers.Conv2D(4, 3, padding="same", use_bias=False, name="b")(y)
    y = layers.BatchNormalization(name="b_bn")(y)
    x = layers.ReLU(name="add_relu")(layers.Add(name="add")([x, y]))
    return conv_bn_relu(x, 24, name="inner")


def _depthwise(x):
    x = conv_bn_relu(x, 24, name="wide")
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="dw")(x)
    return conv_bn_relu(bn_relu(x, "dw"), 24, size=1, name="inner")


def _unet(x):
    y = conv_bn_relu(layers.MaxPooling2D(name="half")(x), 8, name="down")
    y = layers.UpSampling2D(name="up")(y)
    return conv_bn_relu(layers.Concatenate(name="joined")([x, y]), 16, name="inner")


def _moved(x):
    x = layers.ZeroPadding2D(((1, 0), (0, 1)), name="padded")(x)
    x = conv_bn_relu(x, 8, name="after", padding="valid")
    x = layers.Permute((2, 1, 3), name="turned")(x)
    x = layers.Cropping2D(1, name="cropped")(x)
    return conv_bn_relu(layers.AveragePooling2D(2, name="mean")(x), 16, name="inner")


def _transposed(x):
    x = layers.Conv2DTranspose(8, 3, 2, padding="same", use_bias=False, name="up")(x)
    return conv_bn_relu(bn_relu(x, "up"), 16, name="inner")


def _functions():
    """TensorFlow's own, in front of the first layer too."""
    image = keras.Input(IMAGE, name="image")
    x = tf.pad(image, [[0, 0], [1, 0], [0, 1], [0, 0]])
    x = conv_bn_relu(x[:, 1:], 8, name="first")
    x = tf.transpose(x, (0, 2, 1, 3))
    y = conv_bn_relu(layers.MaxPooling2D(name="half")(x), 8, name="down")
    y = tf.image.resize(y, (8, 8), method="nearest")
    x = tf.concat([x[:, :8], y], axis=-1)
    return finished(image, conv_bn_relu(x, 16, name="inner"))


def _conv1d():
    series = keras.Input((24, 3), name="series")
    x = layers.Conv1D(8, 5, padding="same", use_bias=False, name="first")(series)
    x = bn_relu(x, "first")
    x = layers.Conv1D(24, 3, 2, padding="same", use_bias=False, name="inner")(x)
    x = layers.MaxPooling1D(name="half")(bn_relu(x, "inner"))
    return finished(series, x)


def _sigmoid():
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(conv_bn_relu(image, 4, name="first"), 16, name="inner")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(1, activation="sigmoid", name="head")(x)
    return randomize(keras.Model(image, x))


def _map():
    """A class for each pixel."""
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(conv_bn_relu(image, 4, name="first"), 16, name="inner")
    x = layers.Conv2D(CLASSES, 1, name="head")(x)
    return randomize(keras.Model(image, tf.argmax(x, axis=-1)))


NETWORKS = {
    "plain": lambda: network(_plain),
    "one unit": lambda: network(_plain, classes=1),
    "residual": lambda: network(_residual),
    "depthwise": lambda: network(_depthwise),
    "unet": lambda: network(_unet),
    "moved": lambda: network(_moved),
    "transposed": lambda: network(_transposed),
    "functions": _functions,
    "conv1d": _conv1d,
    "sigmoid": _sigmoid,
    "map of classes": _map,
}
