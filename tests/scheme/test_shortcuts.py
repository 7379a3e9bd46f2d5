"""Residual shortcuts that read a quantizer of their own."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras
from tf_lowbit.models import blocks
from tf_lowbit.network import graph, inspection
from tf_lowbit.scheme import residual_blocks

layers = keras.layers
IMAGE = (8, 8, 3)
KINDS = ["dorefa", "lsq", "uniform"]


def network(block="preact", pooled=False):
    """Two blocks of two convolutions; the second one's shortcut is a convolution."""
    image = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(4, 3, padding="same", name="stem")(image)
    x = layers.BatchNormalization(name="stem_bn")(x)
    if block == "postact":
        x = layers.ReLU(name="stem_relu")(x)
        x = layers.MaxPooling2D(2, name="max")(x) if pooled else x
    for name, filters in (("one", 4), ("two", 6)):
        plan = blocks.basic(filters, 1)
        if block == "preact":
            x = blocks.preact_block(x, plan, first=True, weight_decay=0.0, name=name)
        else:
            x = blocks.postact_block(x, plan, weight_decay=0.0, name=name)
    if block == "preact":
        x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(x))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return nets.randomize(keras.Model(image, layers.Dense(3, name="head")(x)))


def rules(kind="lsq", bits=2):
    return tfl.PrecisionRule(".*", bits, bits, kind, kind)


def data(count=64):
    return np.abs(nets.images(count, IMAGE))


def quantized(kind="lsq", bits=8, block="preact", **arguments):
    made = tfl.quantize(network(block), rules(kind), shortcut_bits=bits, **arguments)
    tfl.calibrate(made, [data()])
    return made


def read_bits(model):
    """Weight layer -> bits of what it reads."""
    return {
        name: [source and source.bits for source in sources]
        for name, sources in inspection.input_activations(model).items()
    }


def weight_bits(model):
    return {
        tensor.layer.name: tensor.bits
        for tensor in inspection.quantized_tensors(model)
        if tensor.latent is not None
    }


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("preact", [("one_add", None), ("two_shortcut", "two_shortcut")]),
        ("postact", [("one_add", None), ("two_shortcut", "two_shortcut")]),
    ],
)
def test_the_short_branches_of_blocks_are_found(block, expected):
    found = residual_blocks.find_shortcuts(network(block))
    assert [(s.node.layer.name, s.layer) for s in found] == expected


def test_branches_of_one_length_are_no_shortcuts():
    image = keras.Input(IMAGE)
    x = layers.Conv2D(4, 1)(image)
    x = layers.Add()([layers.Conv2D(4, 3, padding="same")(x), layers.Conv2D(4, 1)(x)])
    assert not residual_blocks.find_shortcuts(keras.Model(image, layers.Add()([x, x])))


def test_operators_are_sums_too():
    image = keras.Input(IMAGE)
    x = layers.ReLU(name="relu")(layers.Conv2D(4, 1)(image))
    (found,) = residual_blocks.find_shortcuts(
        keras.Model(image, x + layers.Conv2D(4, 1, name="conv")(x))
    )
    assert found.layer is None
    assert found.tensor is x


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_only_shortcuts_have_other_bits(kind, bits):
    model = quantized(kind, bits)
    assert weight_bits(model) == {
        **dict.fromkeys(["one_conv1", "one_conv2", "two_conv1", "two_conv2"], 2),
        "two_shortcut": bits,
    }
    read = read_bits(model)
    assert read.pop("two_shortcut") == [bits]
    assert [b for n, b in read.items() if "conv" in n] == [[2]] * 4
    kinds = {t.quantizer.has_fixed_clip for t in shortcut_activations(model)}
    assert kinds == {False}


def shortcut_activations(model):
    return [
        tensor
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == "activation" and tensor.is_shortcut
    ]


def test_as_many_bits_need_no_quantizer_of_their_own():
    with_option = tfl.quantize(network(), rules(), shortcut_bits=2)
    without = tfl.quantize(network(), rules())
    assert [layer.name for layer in with_option.layers] == [
        layer.name for layer in without.layers
    ]


@pytest.mark.parametrize("pooled", [False, True])
def test_identities_of_post_activation_networks_read_their_own_bits(pooled):
    model = tfl.quantize(network("postact", pooled), rules(), shortcut_bits=8)
    read = read_bits(model)
    assert read["one_conv1"] == read["two_conv1"] == [2]
    assert read["two_shortcut"] == [8]
    (add,) = (n for n in graph.calls(model) if n.layer.name == "one_add")
    names = {t._keras_history.layer.name for t in add.keras_inputs}
    assert names == {"one_bn2", "max" if pooled else "stem_relu"}
    assert nets.by_name(model)["stem_relu/output"].bits == 8


def test_the_coarser_is_a_function_of_the_finer():
    model = quantized("uniform")
    fine = nets.by_name(model)["two_relu1/output"].layer.output
    coarse = nets.by_name(model)["two_relu1_quantizer/output"].layer
    assert coarse.input is fine
    values = keras.Model(model.input, [fine, coarse.output])(data())
    assert len(np.unique(values[0])) > 16
    assert len(np.unique(values[1])) <= 4


def test_a_clip_of_one_still_fits_what_it_clips():
    """The normalisation is scaled for the coarser quantizer, once."""
    model = tfl.quantize(network(), rules("dorefa"), shortcut_bits=8)
    tensor = nets.by_name(model)["two_relu1_quantizer/output"]
    assert tensor.quantizer.has_fixed_clip
    fitted = tfl.calibrate(model, [data()])
    assert tensor.name in fitted
    read = keras.Model(model.input, tensor.layer.input)(data(), training=True)
    assert tensor.quantizer.misfit([read.numpy()]) == pytest.approx(1.0, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", ["preact", "postact"])
def test_the_file_is_its_twin(tmp_path, kind, block):
    model = quantized(kind, 8, block, residual_bits=8)
    path = tmp_path / "net.tflite"
    exported = tfl.export.to_tflite(model, path, data=[data()])
    report = tfl.export.verify(path, model, [data()])
    assert report.ok, report
    del exported


@pytest.mark.slow
def test_reloading_and_other_rules_keep_them(tmp_path):
    model = quantized()
    path = tmp_path / "net.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(loaded(data(4)), model(data(4)))
    again = tfl.requantize(loaded, rules(bits=3))
    assert weight_bits(again)["two_shortcut"] == 8
    assert weight_bits(again)["two_conv1"] == 3
    assert read_bits(again)["two_shortcut"] == [8]
    old, new = nets.by_name(model), nets.by_name(again)
    name = "two_relu1/output"
    assert old[name].variables["step"] == new[name].variables["step"]
    without = tfl.requantize(loaded, rules(), shortcut_bits=None)
    assert weight_bits(without)["two_shortcut"] == 2
    names = {layer.name for layer in network().layers}
    assert {layer.name for layer in tfl.strip(model).layers} == names


@pytest.mark.slow
def test_stages_ask_for_the_more_of_both_bits():
    model = quantized()
    stages = [tfl.Stage(1, 4, 4), tfl.Stage(1, 2, 2)]
    model.compile(keras.optimizers.SGD(0.0), "mse")
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(weight_bits(model))
    )
    model.fit(
        data(8),
        np.zeros((8, 3)),
        epochs=2,
        verbose=0,
        callbacks=[tfl.callbacks.StagedPrecision(stages), watch],
    )
    assert [bits["two_shortcut"] for bits in seen] == [8, 8]
    assert [bits["two_conv1"] for bits in seen] == [4, 2]


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_no_shortcut_is_told(strict):
    def made():
        tfl.quantize(nets.chain(), rules(), shortcut_bits=8, strict=strict)

    if strict:
        with pytest.raises(ValueError, match="finds no residual block"):
            made()
    else:
        with pytest.warns(tfl.QuantizationWarning, match="finds no residual block"):
            made()


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", [0, 9, 16, 8.0, True, "8", "same"])
def test_bits_that_there_are_not(bits):
    with pytest.raises(ValueError, match=r"shortcut_bits must be .* Received"):
        tfl.quantize(network(), rules(), shortcut_bits=bits)
