import functools

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import (
    CLASSES,
    EDGE,
    EVERYWHERE,
    IMAGE,
    NEAR_TIES,
    Rule,
    assert_as_trained,
    behind,
    bn_relu,
    branched,
    conv,
    conv_bn_relu,
    differing_codes,
    finished,
    images,
    layers,
    network,
    normals,
    prove,
    quantize,
    randomize,
)
from tf_lowbit import export
from tf_lowbit.compat import keras, tf
from tf_lowbit.export.integer import twin
from tf_lowbit.export.options import Options
from tf_lowbit.network import inspection

# --- each kind of layer, on a quantized ReLU ------------------------------------------


def depthwise(*arguments, **more):
    return lambda x, name: bn_relu(
        layers.DepthwiseConv2D(*arguments, name=name, **more)(x), name
    )


def conv1d(*arguments, **more):
    return lambda x, name: bn_relu(
        layers.Conv1D(5, *arguments, name=name, **more)(x), name
    )


def dense(x, name):
    return bn_relu(layers.Dense(5, name=name)(x), name)


def with_relu(layer, relu):
    return lambda x, name: relu(f"{name}_relu")(layer(name)(x))


def _shared(x, name):
    layer = layers.Conv2D(5, 3, padding="same", name=name)
    pooled = layers.MaxPooling2D(2, 1, padding="same")(x)
    both = [
        layers.ReLU(name=f"{name}{i}_relu")(layer(y)) for i, y in enumerate((x, pooled))
    ]
    return layers.Concatenate(name=f"{name}_both")(both)


def _concatenated(x, name):
    pooled = layers.MaxPooling2D(2, 1, padding="same")(x)
    other = conv_bn_relu(x, 3, name=f"{name}_other")
    return conv(3)(layers.Concatenate()([x, pooled, other]), name)


def _two_norms(x, name):
    x = layers.Conv2D(5, 3, name=name)(x)
    x = layers.BatchNormalization(scale=False)(x)
    return bn_relu(layers.BatchNormalization(center=False)(x), name)


def _no_layer_in_front(x, name):
    return bn_relu(x, name)


def grouped(kind, filters, *arguments, **more):
    """A convolution in groups, batch norm and ReLU."""
    return lambda x, name: bn_relu(
        kind(filters, *arguments, name=name, **more)(x), name
    )


GROUPS = {
    "convolutions": (
        (9, 7, 3),
        {
            "same": conv(3, padding="same"),
            "valid": conv(3),
            "stride_2_same": conv(3, strides=2, padding="same"),
            "stride_2_valid": conv(3, strides=2),
            "strides_of_two_kinds": conv(3, strides=(1, 2), padding="same"),
            "dilated_same": conv(3, dilation_rate=2, padding="same"),
            "dilated_valid": conv(3, dilation_rate=2),
            "one_by_one": conv(1),
            "one_by_one_stride_2": conv(1, strides=2),
            "two_by_three": conv((2, 3), padding="same"),
            "as_large_as_the_image": conv((9, 7)),
            "without_bias": conv(3, use_bias=False),
        },
    ),
    "grouped": (
        (9, 7, 6),
        {
            "three_of_two": grouped(layers.Conv2D, 6, 3, groups=3, padding="same"),
            "two_of_three": grouped(layers.Conv2D, 4, 3, groups=2, use_bias=False),
            "one_by_one": grouped(layers.Conv2D, 9, 1, groups=3),
            "stride_2": grouped(layers.Conv2D, 4, 3, strides=2, groups=2),
            "dilated": grouped(layers.Conv2D, 4, 3, dilation_rate=2, groups=2),
            "of_one_channel": grouped(layers.Conv2D, 6, 3, groups=6, padding="same"),
            "of_one_channel_to_two": grouped(
                layers.Conv2D, 12, 3, groups=6, strides=2, padding="same"
            ),
            "of_one_channel_strides_of_two_kinds": grouped(
                layers.Conv2D, 6, 3, groups=6, strides=(3, 1), padding="same"
            ),
        },
    ),
    "grouped_sequences": (
        (11, 4),
        {
            "two_of_two": grouped(layers.Conv1D, 6, 3, groups=2, padding="same"),
            "of_one_channel": grouped(
                layers.Conv1D, 8, 3, groups=4, strides=3, padding="same"
            ),
        },
    ),
    "depthwise": (
        (9, 7, 3),
        {
            "same": depthwise(3, padding="same"),
            "valid": depthwise(3),
            "without_bias": depthwise(3, use_bias=False),
            "multiplier_2": depthwise(3, depth_multiplier=2),
            "stride_2_same": depthwise(3, strides=2, padding="same"),
            "multiplier_2_stride_2": depthwise(
                (2, 3), depth_multiplier=2, strides=2, padding="same"
            ),
            "dilated": depthwise(3, dilation_rate=2, padding="same"),
        },
    ),
    "sequences": (
        (11, 3),
        {
            "conv1d": conv1d(3),
            "conv1d_same": conv1d(3, padding="same"),
            "conv1d_stride_2": conv1d(3, strides=2, padding="same"),
            "conv1d_dilated": conv1d(3, dilation_rate=2, padding="same"),
            "padded": behind(lambda: layers.ZeroPadding1D((1, 2)), conv1d(3)),
            "cropped": behind(lambda: layers.Cropping1D((1, 2)), conv1d(3)),
            "max_pooled": behind(lambda: layers.MaxPooling1D(2), conv1d(3)),
            "max_pooled_same": behind(
                lambda: layers.MaxPooling1D(3, 2, padding="same"), conv1d(2)
            ),
            "dropped": behind(lambda: layers.SpatialDropout1D(0.5), conv1d(2)),
            "dense_of_rank_3": dense,
            "norm_of_rank_3": _no_layer_in_front,
            "flat": behind(layers.Flatten, dense),
        },
    ),
    "vectors": (
        (7,),
        {
            "dense": dense,
            "norm_of_rank_2": _no_layer_in_front,
            "norm_behind_norm": lambda x, name: bn_relu(
                layers.BatchNormalization()(dense(x, name)), f"{name}_last"
            ),
            "reshaped": behind(lambda: layers.Reshape((7, 1)), conv1d(3)),
        },
    ),
    "between": (
        (7, 6, 4),
        {
            "max_pool_valid": behind(lambda: layers.MaxPooling2D((2, 3))),
            "max_pool_same": behind(lambda: layers.MaxPooling2D(3, 2, padding="same")),
            "average_pool": behind(lambda: layers.AveragePooling2D(2)),
            "average_pool_strides": behind(
                lambda: layers.AveragePooling2D((3, 2), strides=(2, 1))
            ),
            "global_max_pool": behind(layers.GlobalMaxPooling2D, dense),
            "global_max_pool_keepdims": behind(
                lambda: layers.GlobalMaxPooling2D(keepdims=True)
            ),
            "cropping": behind(lambda: layers.Cropping2D(((1, 0), (2, 1)))),
            "padding": behind(lambda: layers.ZeroPadding2D(((1, 0), (2, 1)))),
            "permuted": behind(lambda: layers.Permute((2, 1, 3))),
            "reshaped": behind(lambda: layers.Reshape((-1, 7, 4))),
            "flattened": behind(layers.Flatten, dense),
            "dropped": behind(lambda: layers.Dropout(0.5)),
            "spatial_dropout": behind(lambda: layers.SpatialDropout2D(0.5)),
            "concatenated": _concatenated,
            "dense_of_rank_4": dense,
        },
    ),
    "around": (
        (6, 6, 3),
        {
            "no_norm": with_relu(
                lambda name: layers.Conv2D(5, 3, name=name),
                lambda name: layers.ReLU(name=name),
            ),
            "relu6": with_relu(
                lambda name: layers.Conv2D(5, 3, name=name),
                lambda name: layers.ReLU(6.0, name=name),
            ),
            "activation_layer": with_relu(
                lambda name: layers.Conv2D(5, 3, name=name),
                lambda name: layers.Activation("relu", name=name),
            ),
            "own_relu": lambda x, name: layers.Conv2D(
                5, 3, activation="relu", name=name
            )(x),
            "two_norms": _two_norms,
            "norm_alone": _no_layer_in_front,
            "norm_behind_relu": lambda x, name: bn_relu(
                conv_bn_relu(x, 5, name=name), f"{name}_last"
            ),
            "shared": _shared,
        },
    ),
}
CASES = [(group, case) for group, (_, cases) in GROUPS.items() for case in cases]


@functools.cache
def proven(group):
    """Codes of each quantizer that differ, and the notes; the file is proved."""
    shape, branches = GROUPS[group]
    model = quantize(branched(branches, shape), EVERYWHERE)
    x = normals(8, shape)
    proof = prove(model, x)
    made = differing_codes(model, proof.snapped, x)
    return made, proof.notes


@pytest.mark.quick(5)
@pytest.mark.parametrize(("group", "case"), CASES)
def test_each_layer_gives_the_trained_codes(group, case):
    found, notes = proven(group)
    own = {name: count for name, count in found.items() if name.startswith(case)}
    assert own, found
    for name, (different, total) in own.items():
        assert different <= NEAR_TIES * total, name
    assert not [note for layer, note in notes.items() if layer.startswith(case)]


@pytest.mark.quick(5)
@pytest.mark.parametrize("group", GROUPS)
def test_nothing_was_rounded_that_training_did_not_round(group):
    _, notes = proven(group)
    assert not notes


def test_awkward_normalisations_are_in_the_networks():
    model = branched({"one": conv(3)}, IMAGE)
    gamma, *_ = model.get_layer("one_bn").get_weights()
    assert gamma.min() < 0 < gamma.max()
    assert (gamma == 0).any()


# --- quantizers and bits --------------------------------------------------------------


def _weights(kind, bits, **arguments):
    table = {
        "dorefa": tfl.quantizers.DoReFaWeightQuantizer,
        "lsq": tfl.quantizers.LSQWeightQuantizer,
        "statsq": tfl.quantizers.StatsQWeightQuantizer,
        "uniform": tfl.quantizers.UniformWeightQuantizer,
    }
    return table[kind](bits=bits, **arguments)


QUANTIZERS = {
    "dorefa": (_weights("dorefa", 2), "dorefa"),
    "lsq": (_weights("lsq", 2), "lsq"),
    "lsq_per_axis": (_weights("lsq", 3, per_axis=True), "lsq"),
    "lsq_narrow": (_weights("lsq", 4, narrow_range=True), "lsq"),
    "uniform": (_weights("uniform", 4, per_axis=False), "uniform"),
    "uniform_per_axis": (_weights("uniform", 4), "uniform"),
    "pact": (_weights("dorefa", 3), "pact"),
    "statsq": (_weights("statsq", 2), "dorefa"),
    "statsq_standardized": (_weights("statsq", 3, standardize=True), "dorefa"),
    "dorefa_standardized": (_weights("dorefa", 2, standardize=True), "dorefa"),
    "lsq_standardized": (_weights("lsq", 2, standardize=True), "lsq"),
    "uniform_standardized": (_weights("uniform", 4, standardize=True), "uniform"),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", QUANTIZERS)
def test_each_quantizer_leaves_exactly(case):
    weights, activations = QUANTIZERS[case]
    body = {
        "whole": conv(3),
        "deep": depthwise(3, depth_multiplier=2),
        "flat": behind(layers.Flatten, dense),
    }
    bits = weights.bits
    rules = [
        Rule(".*_relu", None, bits, activation_quantizer=activations),
        Rule(".*", bits, bits, weights, activations, edges=True),
    ]
    x = normals(8, (6, 6, 3))
    proof = prove(quantize(branched(body, (6, 6, 3)), rules), x)
    assert_as_trained(proof, x)


@functools.cache
def _two_kinds():
    return branched({"whole": conv(3), "deep": depthwise(3)}, (6, 6, 3))


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", range(1, 8))
def test_each_bit_width_leaves_exactly(bits):
    rules = [Rule(".*_relu", None, bits), Rule(".*", bits, bits, edges=True)]
    x = normals(8, (6, 6, 3))
    proof = prove(quantize(_two_kinds(), rules), x)
    assert_as_trained(proof, x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "lsq"])
def test_8_bits_leave_but_for_near_ties(kind):
    weights = _weights(kind, 8, **({"narrow_range": True} if kind == "lsq" else {}))
    rules = [
        Rule(".*_relu", None, 8, activation_quantizer=kind),
        Rule(".*", 8, 8, weights, kind, edges=True),
    ]
    x = normals(8, (6, 6, 3))
    proof = prove(quantize(_two_kinds(), rules), x)
    assert_as_trained(proof, x)


def test_8_bits_of_the_odd_grid_are_refused_with_the_reason():
    rules = [Rule(".*_relu", None, 8), Rule(".*", 8, 8, edges=True)]
    model = quantize(_two_kinds(), rules)
    with pytest.raises(export.ExportError, match=r"odd grid.*codes up to 255"):
        export.snap(model)


@pytest.mark.slow
def test_a_weight_code_of_minus_128_is_refused_with_the_reason():
    whole = tfl.quantizers.LSQWeightQuantizer(8)  # By name it has no -128.
    model = quantize(_two_kinds(), [Rule("whole", 8, 8, whole, "lsq", edges=True)])
    (kernel,) = [t for t in inspection.quantized_tensors(model) if t.latent is not None]
    data = [normals(4, (6, 6, 3))]
    kernel.latent.assign(tf.clip_by_value(kernel.latent, -1.0, 1.0))
    kernel.variables["step"].assign(1.0 / 127)
    assert export.snap(model, data)  # No weight at the lowest code: 8 bits fit.
    kernel.variables["step"].assign(1e-3)
    with pytest.raises(export.ExportError, match=r"narrow_range=True.*'whole'.* 128"):
        export.snap(model, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "lsq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_signed_inputs_of_each_bit_width_leave_exactly(kind, bits):
    image = keras.Input((6, 6, 3), name="image")
    x = conv(3)(image, "whole")
    model = randomize(keras.Model(image, x))
    weights = _weights(kind, bits, **({"narrow_range": True} if kind == "lsq" else {}))
    rules = [
        Rule(".*_relu", None, 3, activation_quantizer="lsq"),
        Rule("whole", bits, bits, weights, kind),
    ]
    x = normals(16, (6, 6, 3))
    proof = prove(quantize(model, rules), x)
    grid = proof.layer("image_quantizer").grid
    assert grid.high == 2 ** (bits - 1) - 1
    assert grid.low == (-grid.high if kind == "uniform" else -grid.high - 1)
    assert_as_trained(proof, x)


def test_signed_one_bit_activations_are_refused_with_the_reason():
    image = keras.Input((6, 6, 3), name="image")
    model = keras.Model(image, conv(3)(image, "whole"))
    model = quantize(model, [Rule("whole", 1, 1)])
    with pytest.raises(export.ExportError, match=r"no zero.*image_quantizer"):
        export.snap(model)


def test_a_note_on_8_bits_names_only_what_can_be_trained():
    def body(x):
        x = conv_bn_relu(x, 4, name="inner")
        x = layers.Add(name="sum")([x, conv_bn_relu(x, 4, name="side")])
        gate = layers.Conv2D(4, 1, activation="sigmoid", name="gate")(x)
        return layers.Multiply()([x, gate])

    rules = [Rule("inner", 4, None), Rule("side|gate|head", 4, 4)]
    model = quantize(network(body), rules)
    snapped = export.snap(model, [images()], options=Options(head="int8"))
    found = {note.layer: note.text for note in snapped.notes}
    start = "is rounded to 8 bits over its measured range"
    assert found["gate"] == found["head"] == start
    advice = ". To train with this, "
    assert found["first_relu"].startswith(f"{start}{advice}give 'inner', which reads")
    assert found["sum"] == f"{start}{advice}use quantize(residual_bits=8)"


@pytest.mark.slow
def test_weights_alone_are_read_by_layers_of_measured_8_bits():
    def body(x):
        return conv_bn_relu(x, 4, name="inner")

    model = quantize(network(body), [Rule("inner", 2, None)])
    proof = prove(model, images())
    assert "8 bits" in proof.notes["first_relu"]
    assert isinstance(proof.layer("inner"), twin.IntegerLinear)


@pytest.mark.slow
def test_activations_alone_leave_float_layers():
    def body(x):
        return conv_bn_relu(x, 4, name="inner")

    model = quantize(network(body), [Rule("inner", None, 2)])
    proof = prove(model, images())
    assert type(proof.layer("inner")) is layers.Conv2D
    assert proof.layer("first").grid.high == 3
    wanted, have = model(images()).numpy(), proof.snapped.twin(images()).numpy()
    codes = differing_codes(model, proof.snapped, images())
    assert codes["first_relu/output"][0] <= 0.02 * codes["first_relu/output"][1]
    assert wanted.shape == have.shape


# --- first layer and head -------------------------------------------------------------


@functools.cache
def _edges_float():
    def body(x):
        return conv_bn_relu(x, 6, strides=2, name="inner")

    return quantize(network(body), [Rule("inner", 2, 2)])


@pytest.mark.quick(1)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("head", ["float", "int8"])
@pytest.mark.parametrize("first", ["float", "int8"])
def test_first_layer_and_head_are_what_was_asked_for(first, head, keepdims):
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(image, 4, name="first")
    x = conv_bn_relu(x, 6, strides=2, name="inner")
    x = layers.ReLU(name="last_relu")(x)
    x = layers.GlobalAveragePooling2D(keepdims=keepdims, name="pool")(x)
    model = randomize(keras.Model(image, layers.Dense(CLASSES, name="head")(x)))
    rules = [Rule("last_relu", None, 2), Rule("inner", 2, 2)]
    proof = prove(quantize(model, rules), images(), first_layer=first, head=head)
    is_integer = {"int8": True, "float": False}
    for name, kind in (("first", first), ("head", head)):
        made = isinstance(proof.layer(name), twin.IntegerLinear)
        assert made is is_integer[kind], name
        assert ("trained in float" in proof.notes.get(name, "")) is made
    wanted = proof.model(images()).numpy()
    have = proof.snapped.twin(images()).numpy()
    assert have.shape == wanted.shape
    assert np.abs(have - wanted).max() <= 0.1 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["float", "int8"])
def test_a_first_layer_in_groups(first):
    image = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(4, 3, groups=2, name="first")(image)
    x = conv_bn_relu(layers.ReLU(name="relu")(x), 4, groups=4, name="inner")
    model = quantize(finished(image, x), [Rule("inner", 2, 2)])
    proof = prove(model, images(), first_layer=first)
    assert isinstance(proof.layer("first"), twin.IntegerLinear) is (first == "int8")
    wanted, have = model(images()).numpy(), proof.snapped.twin(images()).numpy()
    assert np.abs(have - wanted).max() <= 0.1 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("front", [layers.Flatten, lambda: layers.Dropout(0.5)])
def test_a_first_layer_behind_a_layer_that_moves_values_is_int8_too(front):
    image = keras.Input(IMAGE, name="image")
    x = layers.Flatten()(layers.Dense(6, name="first")(front()(image)))
    x = layers.Dense(6, name="inner")(layers.ReLU(name="relu")(x))
    x = layers.ReLU(name="last_relu")(x)
    model = randomize(keras.Model(image, layers.Dense(CLASSES, name="head")(x)))
    proof = prove(quantize(model, [Rule("inner", 2, 2)]), images())
    assert isinstance(proof.layer("first"), twin.IntegerLinear)


@pytest.mark.slow
@pytest.mark.parametrize(
    "front", [lambda: layers.ZeroPadding2D(1), lambda: layers.Reshape((4, 16, 2))]
)
def test_a_first_layer_behind_padding_or_a_reshape_is_int8(front):
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(front()(image), 4, name="first")
    x = conv_bn_relu(x, 4, name="inner")
    proof = prove(quantize(finished(image, x), [Rule("inner", 2, 2)]), images())
    assert isinstance(proof.layer("first"), twin.IntegerLinear)
    assert "[0, 1]" in proof.notes["image"]


# --- errors ---------------------------------------------------------------------------


def _inner(layer, shape=IMAGE):
    """A quantized network with a layer in its middle."""

    def body(x):
        x = layer(x)
        return conv_bn_relu(x, 4, name="inner") if len(x.shape) == 4 else x

    made = network(body, shape)
    return quantize(made, [EDGE, Rule("inner", 2, 2)])


UNKNOWN = {
    "lambda": lambda: layers.Lambda(lambda x: 2.0 * x, name="odd"),
    "layer_norm_of_rows": lambda: layers.LayerNormalization(2, name="odd"),
    "transposed": lambda: layers.Conv2DTranspose(4, 3, strides=(2, 1), name="odd"),
    "upsampling": lambda: layers.UpSampling2D(2, interpolation="bicubic", name="odd"),
    "elu": lambda: layers.Activation("elu", name="odd"),
    "relu_of_one": lambda: layers.ReLU(1.0, name="odd"),
    "group_norm": lambda: layers.GroupNormalization(2, name="odd"),
    "own_sigmoid_of_another_kind": lambda: layers.Conv2D(
        4, 3, activation="elu", name="odd"
    ),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", UNKNOWN)
def test_a_layer_without_a_form_is_named(case):
    model = _inner(UNKNOWN[case]())
    with pytest.raises(export.ExportError, match="odd"):
        export.snap(model, [normals()])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 2), (3, 7)])
def test_nearest_upsampling_moves_codes(size):
    """As in a U-Net: what is above and what was below are joined."""

    def body(x, name):
        y = conv(3, padding="same", strides=2)(x, "below")
        y = layers.UpSampling2D(size, name="up")(y)
        y = layers.Cropping2D(((0, y.shape[1] - 9), (0, y.shape[2] - 7)))(y)
        return conv(3)(layers.Concatenate(name="both")([x, y]), name)

    model = quantize(branched({"after": body}, (9, 7, 3)), EVERYWHERE)
    x = normals(8, (9, 7, 3))
    # XNNPACK has no such operator.
    proof = prove(model, x, not_delegated=["RESIZE_NEAREST_NEIGHBOR"])
    assert_as_trained(proof, x)


@pytest.mark.slow
def test_upsampled_floats_are_computed_as_they_are():
    def body(x):
        return layers.UpSampling2D(2, name="up")(layers.Activation("swish")(x))

    model = quantize(network(body), [EDGE])
    proof = prove(model, images(), not_delegated=["RESIZE_NEAREST_NEIGHBOR"])
    wanted, have = model(images()).numpy(), proof.snapped.twin(images()).numpy()
    assert np.abs(have - wanted).max() <= 0.1 * np.abs(wanted).max()


@pytest.mark.slow
def test_a_recurrent_layer_is_named():
    def body(x):
        return layers.SimpleRNN(4, name="odd")(layers.Reshape((16, -1))(x))

    model = quantize(network(body), [EDGE])
    with pytest.raises(export.ExportError, match="'odd' of type SimpleRNN"):
        export.snap(model, [normals()])


def sequence(layer, *more):
    """A branch of rows of an image: `layer`, batch norm and ReLU, and what follows."""

    def branch(x, name):
        x = layers.Reshape((-1, x.shape[-1]))(x)
        x = layer(x, name)
        for then in more:
            x = then(x, name)
        return x

    return branch


def steps(kind, *arguments, **options):
    """A layer of steps with weights, batch norm and ReLU."""
    return lambda x, name: bn_relu(kind(*arguments, name=name, **options)(x), name)


SEQUENCES = {
    "causal": sequence(steps(layers.Conv1D, 4, 3, padding="causal", dilation_rate=2)),
    "strided": sequence(steps(layers.Conv1D, 4, 4, strides=3, padding="same")),
    "each": sequence(steps(layers.DepthwiseConv1D, 3, strides=2, padding="same")),
    "doubled": sequence(
        lambda x, name: layers.UpSampling1D(2)(x), steps(layers.Conv1D, 4, 3)
    ),
    "averaged": sequence(
        lambda x, name: layers.AveragePooling1D(3, name=f"{name}_pool")(x),
        steps(layers.Conv1D, 4, 3),
    ),
    "largest": sequence(
        steps(layers.Conv1D, 4, 3), lambda x, name: layers.GlobalMaxPooling1D()(x)
    ),
    "mean": sequence(
        steps(layers.Conv1D, 4, 3), lambda x, name: layers.GlobalAveragePooling1D()(x)
    ),
}


@pytest.mark.slow
def test_layers_of_steps_are_exact():
    model = quantize(branched(SEQUENCES, (5, 4, 3)), EVERYWHERE)
    x = normals(8, (5, 4, 3))
    moving = ["RESIZE_NEAREST_NEIGHBOR"]
    proof = prove(model, x, not_delegated=moving, target="portable")
    assert_as_trained(proof, x)
    grid = proof.layer("averaged_pool").grid
    assert (grid.low, grid.high) == (0, 9)


@pytest.mark.slow
def test_a_mean_of_steps_is_computed_in_codes_for_an_int8_head():
    def body(x):
        x = steps(layers.Conv1D, 4, 3)(layers.Reshape((16, -1))(x), "inner")
        return layers.GlobalAveragePooling1D(name="mean")(x)

    model = quantize(network(body), [EDGE, Rule("inner", 2, 2)])
    proof = prove(model, images(), head="int8")
    assert proof.layer("mean_sum").grid.levels == 256


@pytest.mark.parametrize("head", ["float", "int8"])
def test_outputs_that_share_a_head_are_as_precise_as_one(head):
    image = keras.Input(IMAGE, name="image")
    x = conv_bn_relu(conv_bn_relu(image, 4, name="first"), 4, name="inner")
    logits = layers.Dense(CLASSES, name="head")(layers.Flatten(name="flat")(x))
    ends = [logits, layers.Softmax(name="shares")(logits), tf.argmax(logits, -1)]
    model = randomize(keras.Model(image, ends))
    model = quantize(model, [EDGE, Rule("inner", 2, 2)])
    proof = prove(model, images(), not_delegated=["ARG_MAX"], head=head)
    assert [note.layer for note in proof.snapped.notes] == (
        [] if head == "float" else ["head"]
    )
    kind = layers.Dense if head == "float" else twin.IntegerLinear
    assert type(proof.layer("head")) is kind


CHANNELS_FIRST = {
    "conv": lambda: layers.Conv2D(4, 3, data_format="channels_first", name="odd"),
    "depthwise": lambda: layers.DepthwiseConv2D(
        3, data_format="channels_first", name="odd"
    ),
    "average": lambda: layers.AveragePooling2D(
        2, data_format="channels_first", name="odd"
    ),
}
CHANNELS_FIRST |= {
    "max": lambda: layers.MaxPooling2D(2, data_format="channels_first", name="odd"),
    "global_max": lambda: layers.GlobalMaxPooling2D(
        data_format="channels_first", name="odd"
    ),
    "global_average": lambda: layers.GlobalAveragePooling2D(
        data_format="channels_first", name="odd"
    ),
    "flatten": lambda: layers.Flatten(data_format="channels_first", name="odd"),
    "padding": lambda: layers.ZeroPadding2D(
        1, data_format="channels_first", name="odd"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANNELS_FIRST)
def test_channels_first_is_refused(case):
    model = _inner(CHANNELS_FIRST[case]())
    with pytest.raises(export.ExportError, match="odd"):
        export.snap(model, [normals()])


@pytest.mark.slow
def test_a_norm_over_another_axis_is_refused():
    model = _inner(layers.BatchNormalization(axis=1, name="odd"))
    with pytest.raises(export.ExportError, match="'odd' with axis"):
        export.snap(model, [normals()])


def test_a_softmax_over_another_axis_is_refused():
    model = _inner(layers.Softmax(axis=1, name="odd"))
    with pytest.raises(export.ExportError, match="odd"):
        export.snap(model, [normals()])


@pytest.mark.slow
def test_bits_of_an_earlier_rung_are_noted():
    model = quantize(network(lambda x: x), [EDGE])
    assert not any("rule says" in str(n) for n in export.snap(model, [images()]).notes)
    weights = [t for t in inspection.quantized_tensors(model) if t.latent is not None]
    for tensor in weights:
        tensor.assign_bits(5)
    first, *_ = export.snap(model, [images()]).notes
    assert str(first) == (
        "first: its kernel is at 5 bits, but its rule says 8. In all, 2 tensors are "
        "not at the bits of their rules: was the last stage not trained?"
    )


@pytest.mark.slow
def test_data_that_are_no_numbers_are_refused():
    model = _edges_float()
    spoilt = images()
    spoilt[3, 1, 1, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        export.snap(model, [spoilt])


@pytest.mark.quick(1)
@pytest.mark.parametrize(("data", "match"), [(None, "data=None"), ([], "one batch")])
def test_missing_data_are_asked_for(data, match):
    with pytest.raises(ValueError, match=match):
        export.snap(_edges_float(), data)


@pytest.mark.slow
def test_trained_ranges_need_no_data():
    model = quantize(network(lambda x: x), [EDGE])
    assert not export.snap(model).ranges


@pytest.mark.slow
def test_integer_inputs_are_refused():
    image = keras.Input(IMAGE, dtype=tf.int32, name="pixels")
    x = layers.Flatten()(image)
    x = layers.Dense(3, name="inner")(x)  # Keras casts.
    model = quantize(keras.Model(image, x), [Rule("inner", 2, None)])
    with pytest.raises(export.ExportError, match=r"floats.*'pixels' of int32"):
        export.snap(model, [images()])


@pytest.mark.slow
def test_the_same_model_gives_the_same_twin():
    model = _edges_float()
    first = export.snap(model, [images()])
    again = export.snap(model, ranges=first.ranges)
    for a, b in zip(first.twin.get_weights(), again.twin.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.notes == again.notes


@pytest.mark.slow
def test_progress_is_told_node_by_node():
    seen = []
    export.snap(_edges_float(), [images()], progress=lambda *a: seen.append(a))
    done, total = zip(*seen, strict=True)
    assert done == tuple(range(1, total[0] + 1))


@pytest.mark.slow
def test_the_trained_model_is_not_changed():
    model = _edges_float()
    before = [w.copy() for w in model.get_weights()]
    config = model.get_config()
    export.snap(model, [images()])
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.get_config() == config


@pytest.mark.slow
def test_a_global_mixed_policy_does_not_reach_the_twin():
    model = _edges_float()
    wanted = export.snap(model, [images()])
    try:
        keras.mixed_precision.set_global_policy("mixed_float16")
        made = export.snap(model, [images()])
        int8 = export.snap(model, [images()], options=Options(head="int8"))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    for layer in (*made.twin.layers, *int8.twin.layers):
        assert layer.compute_dtype == "float32", layer.name
    np.testing.assert_array_equal(wanted.twin(images()), made.twin(images()))


@pytest.mark.slow
def test_a_network_trained_in_mixed_precision_leaves():
    try:
        keras.mixed_precision.set_global_policy("mixed_float16")
        made = network(lambda x: conv_bn_relu(x, 4, name="inner"))
        model = quantize(made, [EDGE, Rule("inner", 2, 2)])
        proof = prove(model, images())
        assert isinstance(proof.layer("inner"), twin.IntegerLinear)
        assert {layer.compute_dtype for layer in proof.snapped.twin.layers} == {
            "float32"
        }
    finally:
        keras.mixed_precision.set_global_policy("float32")
