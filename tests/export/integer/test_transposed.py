import numpy as np
import pytest

from tests.export.networks import (
    EDGE,
    EVERYWHERE,
    Rule,
    assert_as_trained,
    bn_relu,
    branched,
    conv_bn_relu,
    differing_codes,
    layers,
    network,
    normals,
    prove,
    quantize,
)
from tf_lowbit import export
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import transposed
from tf_lowbit.export.options import Options
from tf_lowbit.export.tflite import packed_weights, writer

# Kernel, stride, padding, output_padding.
WINDOWS = [
    (size, stride, padding, more)
    for size in (1, 2, 3, 4, 5)
    for stride in (1, 2, 3)
    for padding in ("same", "valid")
    for more in (None, *range(stride))
]


def put_together(x, layer):
    """A transposed layer's sums, by the plain convolution and DEPTH_TO_SPACE."""
    height, width = transposed.axes(layer)
    kernel = transposed.plain_kernel(layer.kernel.numpy(), height, width)
    x = np.pad(x, [(0, 0), height.padding, width.padding, (0, 0)])
    x = tf.nn.conv2d(x, kernel, 1, "VALID")
    if height.stride > 1:
        x = tf.nn.depth_to_space(x, height.stride)
    return x[:, : x.shape[1] - height.rest, : x.shape[2] - width.rest].numpy()


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_plain_convolutions_compute_transposed_ones(padding):
    x = np.random.default_rng(0).integers(-9, 9, (2, 5, 4, 3)).astype(np.float32)
    count = 0
    for size, stride, own, more in WINDOWS:
        if own != padding:
            continue
        layer = layers.Conv2DTranspose(
            2, (size, 3), stride, padding, output_padding=more, use_bias=False
        )
        layer.build(x.shape)
        shape = layer.kernel.shape
        layer.kernel.assign(np.random.default_rng(1).integers(-9, 9, shape))
        try:
            wanted = layer(x)
        except tf.errors.InvalidArgumentError:  # Sizes that TensorFlow does not have.
            assert more is not None
            continue
        count += 1
        np.testing.assert_array_equal(
            put_together(x, layer), wanted, str((size, stride, padding, more))
        )
    assert count > 30


def decoder(*arguments, **more):
    """A transposed convolution, batch norm and ReLU, and a convolution behind them."""

    def branch(x, name):
        x = layers.Conv2DTranspose(4, *arguments, name=name, **more)(x)
        x = bn_relu(x, name)
        return conv_bn_relu(x, 3, name=f"{name}_behind")

    return branch


LAYOUTS = {
    "as_unet": decoder(2, strides=2),
    "same": decoder(3, strides=2, padding="same"),
    "even": decoder(4, strides=2, padding="same"),
    "valid": decoder(3, strides=2),
    "gaps": decoder(2, strides=3, use_bias=False),
    "more": decoder((3, 5), strides=2, padding="same", output_padding=0),
    "dense": decoder(3, padding="same"),
}


def test_transposed_convolutions_are_exact_in_the_file():
    shape = (4, 5, 3)
    model = quantize(branched(LAYOUTS, shape), EVERYWHERE)
    x = normals(4, shape)
    assert_as_trained(prove(model, x, target="portable"), x)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8", "packed"])
def test_transposed_convolutions_run_in_tflite_micro(storage):
    pytest.importorskip("tflite_micro")
    layouts = {name: LAYOUTS[name] for name in ("as_unet", "same", "valid")}
    model = quantize(branched(layouts, (4, 5, 3)), EVERYWHERE)
    x = normals(4, (4, 5, 3))
    options = Options(target="tflm", storage=storage, head="int8")
    content = writer.to_bytes(export.snap(model, [x], options=options), "int8")
    if storage == "packed":
        content = packed_weights.pack(content)
    report = export.verify(content, model, [x], verbose=0)
    assert report.ok, report.failures
    assert report.mismatches == 0


@pytest.mark.slow
def test_a_transposed_convolution_of_floats_computes_in_float():
    """Behind an activation that is computed in float."""

    def body(x):
        x = layers.Activation("swish")(x)
        for size in (2, 3):
            name = f"up{size}"
            x = layers.Conv2DTranspose(3, size, strides=2, padding="same", name=name)(x)
        return x

    model = quantize(network(body), [EDGE])
    proof = prove(model, normals(4))
    assert isinstance(proof.layer("up2"), layers.Conv2DTranspose)


@pytest.mark.slow
def test_a_transposed_head_puts_a_map_out_of_images_of_any_size():
    image = keras.Input((None, None, 3), name="image")
    x = conv_bn_relu(image, 4, name="first")
    x = layers.Conv2DTranspose(2, 4, strides=2, padding="same", name="head")(x)
    rules = [Rule(".*", 8, 8, "uniform", "uniform", edges=True)]
    data = normals(4, (6, 6, 3))
    model = quantize(keras.Model(image, x), rules)
    proof = prove(model, data)
    wanted = model(data).numpy()
    have = proof.snapped.twin(data).numpy()
    assert np.abs(have - wanted).mean() <= 0.1 * wanted.std()


def test_strides_that_no_cell_has_are_refused():
    def body(x):
        return layers.Conv2DTranspose(4, 3, strides=(1, 2), name="odd")(x)

    with pytest.raises(export.ExportError, match=r"'odd' with strides=\(1, 2\)"):
        export.snap(quantize(network(body), [EDGE]), [normals()])


def test_interpolation_is_exact_behind_codes():
    """Whole factors, even and odd, and a quantizer behind."""

    def branch(**more):
        def made(x, name):
            x = layers.UpSampling2D(
                interpolation="bilinear", name=f"{name}_up", **more
            )(x)
            return conv_bn_relu(x, 3, name=name)

        return made

    branches = {"twice": branch(size=2), "thrice": branch(size=3)}
    branches |= {"both": branch(size=(4, 1))}
    shape = (5, 4, 3)
    rules = [Rule("input_relu", None, 4), *EVERYWHERE]
    model = quantize(branched(branches, shape), rules)
    x = normals(4, shape)
    snapped = export.snap(model, [x], options=Options(target="portable"))
    report = export.verify(writer.to_bytes(snapped), model, [x], verbose=0)
    assert report.ok, report.failures
    assert report.mismatches == 0
    assert set(report.not_delegated) == {"RESIZE_NEAREST_NEIGHBOR", "MIRROR_PAD"}
    assert not snapped.notes
    found = differing_codes(model, snapped, x)
    read = {name.split("/")[0] for name in found}
    assert {f"{name}_up_quantizer" for name in branches} <= read
    for name, (different, total) in found.items():
        assert different <= 1e-3 * total, (name, found)


@pytest.mark.slow
def test_interpolated_floats_are_computed_as_they_are():
    def body(x):
        x = layers.Activation("swish")(x)
        return layers.UpSampling2D(2, interpolation="bilinear", name="up")(x)

    model = quantize(network(body), [EDGE])
    proof = prove(model, normals(4))
    assert isinstance(proof.layer("up"), layers.UpSampling2D)
