"""Costs against numbers worked out by hand, layer type by layer type."""

import json

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit import models
from tf_lowbit.analysis.cost import Cost, LayerCost
from tf_lowbit.compat import keras
from tf_lowbit.network import inspection

layers = keras.layers


def one_layer(layer, input_shape):
    """The cost of a model that is one layer."""
    image = keras.Input(input_shape, name="image")
    counted = tfl.cost(keras.Model(image, layer(image)))
    assert len(counted.layers) == 1
    return counted.layers[0]


def chain():
    """Conv2D 2 -> 3, ReLU, Conv2D 3 -> 5 without bias, ReLU, pool, Dense 5 -> 4."""
    x = image = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(3, 3, padding="same", name="stem")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.Conv2D(5, 3, use_bias=False, name="mid")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.ReLU(name="relu2")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(4, name="head")(x)
    return keras.Model(image, x, name="chain")


STEM_MACS = 36 * 9 * 2 * 3
MID_MACS = 16 * 9 * 3 * 5
HEAD_MACS = 5 * 4


def quantized_chain(weight_bits=2, activation_bits=2, **arguments):
    rule = tfl.PrecisionRule(".*", weight_bits, activation_bits, **arguments)
    return tfl.quantize(chain(), [rule])


def by_name(counted):
    return {layer.name: layer for layer in counted.layers}


# Layer, input shape, (parameters, MACs), both worked out by hand.
DENSE = [
    (layers.Dense(3), (5,), (18, 15)),
    (layers.Dense(3, use_bias=False), (5,), (15, 15)),
    # Once for each of the 7 (or 2 x 7) positions.
    (layers.Dense(3), (7, 5), (18, 7 * 15)),
    (layers.Dense(3), (2, 7, 5), (18, 14 * 15)),
]
CONVOLUTIONS = [
    # (10 - 3) / 2 + 1 = 4 positions.
    (layers.Conv1D(5, 3, strides=2), (10, 4), (65, 4 * 60)),
    (layers.Conv1D(5, 3, strides=2, padding="same"), (10, 4), (65, 5 * 60)),
    (layers.Conv1D(5, 3, padding="causal"), (10, 4), (65, 10 * 60)),
    (layers.Conv1D(6, 3, groups=2), (10, 4), (42, 8 * 36)),
    # A dilated kernel of 3 spans 5.
    (layers.Conv1D(5, 3, dilation_rate=2), (10, 4), (65, 6 * 60)),
    (layers.Conv2D(4, 3), (8, 6, 3), (112, 24 * 108)),
    (layers.Conv2D(4, 3, padding="same"), (8, 6, 3), (112, 48 * 108)),
    (layers.Conv2D(4, 3, strides=2, padding="same"), (7, 6, 3), (112, 12 * 108)),
    (layers.Conv2D(4, (1, 3), strides=(2, 1)), (8, 6, 3), (40, 16 * 36)),
    (layers.Conv2D(4, 3, dilation_rate=2), (8, 6, 3), (112, 8 * 108)),
    (layers.Conv2D(4, 3, groups=2, use_bias=False), (8, 6, 2), (36, 24 * 36)),
    (layers.Conv3D(2, 2), (3, 4, 5, 3), (50, 24 * 48)),
]
DEPTHWISE = [
    (layers.DepthwiseConv2D(3), (8, 6, 3), (30, 24 * 27)),
    (layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 6, 3), (60, 24 * 54)),
    (
        layers.DepthwiseConv2D(3, strides=2, padding="same", use_bias=False),
        (7, 6, 3),
        (27, 12 * 27),
    ),
]
# The depthwise part and the pointwise part, both at the output's positions.
SEPARABLE = [
    (layers.SeparableConv2D(5, 3), (8, 6, 3), (47, 24 * (27 + 15))),
    (
        layers.SeparableConv2D(5, 3, strides=2, depth_multiplier=2, padding="same"),
        (8, 6, 3),
        (54 + 30 + 5, 12 * (54 + 30)),
    ),
    (layers.SeparableConv1D(5, 3), (10, 4), (12 + 20 + 5, 8 * (12 + 20))),
]
# Each input position meets the whole kernel once; what padding cuts off counts too.
TRANSPOSED = [
    (layers.Conv2DTranspose(4, 2, strides=2), (3, 5, 3), (52, 15 * 48)),
    (
        layers.Conv2DTranspose(4, 3, strides=2, padding="same", use_bias=False),
        (3, 5, 3),
        (108, 15 * 108),
    ),
]


@pytest.mark.parametrize(
    ("layer", "input_shape", "expected"),
    [
        pytest.param(*case, id=f"{case[0].name}-{'x'.join(map(str, case[1]))}")
        for case in DENSE + CONVOLUTIONS + DEPTHWISE + SEPARABLE + TRANSPOSED
    ],
)
def test_parameters_macs_bytes_and_bops_of_a_float_layer(layer, input_shape, expected):
    parameters, macs = expected
    counted = one_layer(layer, input_shape)
    assert (counted.parameters, counted.macs) == (parameters, macs)
    assert counted.weight_bytes == 4 * parameters
    assert counted.bops == 32 * 32 * macs
    assert set(counted.weight_bits) == set(counted.activation_bits) == {32}
    assert counted.kind == type(layer).__name__
    assert counted.output_shape == layer.output_shape[1:]


def test_a_separable_layer_has_two_kernels():
    counted = one_layer(layers.SeparableConv2D(5, 3), (8, 6, 3))
    assert counted.weight_bits == counted.activation_bits == (32, 32)


def test_channels_first_counts_positions_not_channels():
    layer = layers.Conv2D(4, 3, data_format="channels_first")
    assert one_layer(layer, (3, 8, 6)).macs == 24 * 108
    transposed = layers.Conv2DTranspose(4, 2, strides=2, data_format="channels_first")
    assert one_layer(transposed, (3, 3, 5)).macs == 15 * 48


def test_batch_normalization_has_parameters_and_no_macs():
    counted = one_layer(layers.BatchNormalization(), (8, 6, 3))
    assert counted.parameters == 12
    assert counted.weight_bytes == 48
    assert counted.macs == counted.bops == 0
    assert counted.weight_bits == counted.activation_bits == ()


def test_a_shared_layer_costs_its_parameters_once_and_its_macs_at_each_call():
    shared = layers.Conv2D(3, 3, padding="same", name="shared")
    small, large = keras.Input((4, 4, 3)), keras.Input((8, 8, 3))
    model = keras.Model([small, large], [shared(shared(small)), shared(large)])
    (counted,) = tfl.cost(model).layers
    assert counted.parameters == 84
    assert counted.macs == (16 + 16 + 64) * 81
    assert counted.output_shape == (4, 4, 3)


def test_open_sizes_are_none_and_make_the_totals_none():
    image = keras.Input((None, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(image)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, layers.Dense(2, name="head")(x))
    counted = tfl.cost(model)
    conv, head = counted.layers
    assert conv.output_shape == (None, 6, 4)
    assert conv.macs is conv.bops is None
    assert conv.weight_bytes == 448
    assert head.macs == 8
    assert counted.macs is counted.bops is None
    assert counted.parameters == 112 + 10


def test_open_sizes_of_a_transposed_convolution_and_of_a_sequence():
    transposed = layers.Conv2DTranspose(4, 2, strides=2)
    assert one_layer(transposed, (None, 5, 3)).macs is None
    assert one_layer(layers.Dense(3), (None, 5)).macs is None


# Total kernel sizes: stem 54, mid 135, head 20. Bytes of 135 weights, rounded up.
MID_BYTES = {1: 17, 2: 34, 3: 51, 4: 68, 5: 85, 8: 135, 16: 540, 32: 540}


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", MID_BYTES)
def test_bits_of_the_inner_layers(bits):
    counted = tfl.cost(quantized_chain(bits, bits))
    layer = by_name(counted)
    # 16 and 32 bits mean "not rounded", which is float32.
    effective = bits if bits <= 8 else 32
    assert layer["mid"].weight_bits == (effective,)
    assert layer["mid"].activation_bits == (effective,)
    assert layer["mid"].weight_bytes == MID_BYTES[bits]
    assert layer["mid"].macs == MID_MACS
    assert layer["mid"].bops == MID_MACS * effective**2
    # First and last layer stay float; so do bias and normalisation.
    assert layer["stem"].weight_bytes == 4 * (54 + 3)
    assert layer["head"].weight_bytes == 4 * (20 + 4)
    assert layer["bn"].weight_bytes == 4 * 20
    for edge in ("stem", "head"):
        assert layer[edge].weight_bits == layer[edge].activation_bits == (32,)
    assert counted.bops == MID_MACS * effective**2 + (STEM_MACS + HEAD_MACS) * 1024
    assert counted.macs == STEM_MACS + MID_MACS + HEAD_MACS
    assert counted.weight_bytes == MID_BYTES[bits] + 4 * (57 + 24 + 20)


def test_weights_and_activations_of_different_bits():
    layer = by_name(tfl.cost(quantized_chain(3, 5)))["mid"]
    assert (layer.weight_bits, layer.activation_bits) == ((3,), (5,))
    assert layer.bops == MID_MACS * 15


def test_a_bias_stays_float_beside_a_quantized_kernel():
    rules = [tfl.PrecisionRule("stem", 3, 8), tfl.PrecisionRule(".*", 2, 2)]
    layer = by_name(tfl.cost(tfl.quantize(chain(), rules)))["stem"]
    # 54 weights of 3 bits are 162 bits: 21 bytes. 3 floats of bias.
    assert layer.weight_bytes == 21 + 12
    # The image is quantized by an inserted quantizer.
    assert (layer.weight_bits, layer.activation_bits) == ((3,), (8,))
    assert layer.bops == STEM_MACS * 24


def test_the_widest_input_counts_where_a_layer_reads_several():
    a, b = keras.Input((4, 4, 2), name="a"), keras.Input((4, 4, 2), name="b")
    left = layers.ReLU(name="left")(layers.Conv2D(2, 1, name="stem_a")(a))
    right = layers.ReLU(name="right")(layers.Conv2D(2, 1, name="stem_b")(b))
    x = layers.Concatenate(name="joined")([left, right])
    x = layers.Conv2D(3, 1, use_bias=False, name="mid")(x)
    x = layers.Flatten()(layers.ReLU(name="relu")(x))
    model = keras.Model([a, b], layers.Dense(2, name="head")(x))
    rules = [
        tfl.PrecisionRule("left", activation_bits=4),
        tfl.PrecisionRule(".*", 2, 2),
    ]
    layer = by_name(tfl.cost(tfl.quantize(model, rules)))["mid"]
    assert layer.activation_bits == (4,)
    assert layer.bops == 16 * 12 * 2 * 4


def test_between_the_kernels_of_a_separable_layer_nothing_is_quantized():
    x = image = keras.Input((6, 6, 2), name="image")
    x = layers.ReLU(name="relu1")(layers.Conv2D(3, 1, name="stem")(x))
    x = nets.Separable(5, 3, use_bias=False, name="separable")(x)
    x = layers.Flatten()(layers.ReLU(name="relu2")(x))
    model = keras.Model(image, layers.Dense(2, name="head")(x))
    model = tfl.quantize(model, [tfl.PrecisionRule(".*", 3, 4)])
    layer = by_name(tfl.cost(model))["separable"]
    assert layer.weight_bits == (3, 3)
    assert layer.activation_bits == (4, 32)
    # 27 weights of 3 bits: 11 bytes; 15 of 3 bits: 6. Each is padded by itself.
    assert layer.weight_bytes == 11 + 6
    assert layer.bops == 16 * 27 * 3 * 4 + 16 * 15 * 3 * 32


@pytest.mark.slow
def test_depthwise_and_transposed_layers_quantized():
    x = image = keras.Input((6, 6, 2), name="image")
    x = layers.ReLU(name="relu1")(layers.Conv2D(3, 1, name="stem")(x))
    x = layers.DepthwiseConv2D(3, use_bias=False, name="depthwise")(x)
    x = layers.ReLU(name="relu2")(x)
    x = layers.Conv2DTranspose(4, 2, strides=2, use_bias=False, name="up")(x)
    x = layers.Flatten()(layers.ReLU(name="relu3")(x))
    model = keras.Model(image, layers.Dense(2, name="head")(x))
    layer = by_name(tfl.cost(tfl.quantize(model, [tfl.PrecisionRule(".*", 2, 2)])))
    assert layer["depthwise"].kind == "DepthwiseConv2D"
    assert layer["depthwise"].weight_bytes == 7
    assert layer["depthwise"].bops == 16 * 27 * 4
    assert layer["up"].weight_bytes == 12
    assert layer["up"].bops == 16 * 48 * 4


@pytest.mark.slow
def test_learned_steps_and_clips_are_parameters_at_float32():
    plain = tfl.cost(quantized_chain(2, 2))
    lsq = tfl.cost(
        quantized_chain(2, 2, weight_quantizer="lsq", activation_quantizer="lsq")
    )
    # A step for the kernel of `mid` and one for its input.
    assert by_name(lsq)["mid"].parameters == 135 + 1
    assert by_name(lsq)["mid"].weight_bytes == 34 + 4
    assert by_name(lsq)["relu1"].parameters == 1
    assert by_name(lsq)["relu1"].weight_bytes == 4
    assert by_name(lsq)["relu1"].bops == 0
    assert lsq.parameters == plain.parameters + 2
    assert lsq.weight_bytes == plain.weight_bytes + 8
    assert lsq.bops == plain.bops

    pact = tfl.cost(quantized_chain(2, 2, activation_quantizer="pact"))
    assert pact.parameters == plain.parameters + 1
    assert pact.weight_bytes == plain.weight_bytes + 4


@pytest.mark.slow
def test_a_step_for_each_channel_counts_each():
    per_channel = tfl.quantizers.LSQWeightQuantizer(bits=2, per_axis=True)
    model = quantized_chain(2, 2, weight_quantizer=per_channel)
    assert by_name(tfl.cost(model))["mid"].parameters == 135 + 5
    assert by_name(tfl.cost(model))["mid"].weight_bytes == 34 + 20


@pytest.mark.slow
def test_bits_and_flags_are_no_parameters():
    float_cost, quantized_cost = tfl.cost(chain()), tfl.cost(quantized_chain())
    assert quantized_cost.parameters == float_cost.parameters
    assert quantized_cost.float_bytes == float_cost.weight_bytes
    # DoReFa learns nothing: the same layers are listed.
    assert [x.name for x in quantized_cost.layers] == [
        x.name for x in float_cost.layers
    ]
    assert [x.kind for x in quantized_cost.layers] == [
        x.kind for x in float_cost.layers
    ]


@pytest.mark.slow
def test_bits_assigned_afterwards_change_the_cost():
    model = quantized_chain(2, 2)
    before = tfl.cost(model)
    for tensor in inspection.quantized_tensors(model):
        tensor.assign_bits(4 if tensor.role == "weight" else 8)
    layer = by_name(tfl.cost(model))["mid"]
    assert (layer.weight_bits, layer.activation_bits) == ((4,), (8,))
    assert layer.weight_bytes == MID_BYTES[4]
    assert layer.bops == MID_MACS * 32
    # A cost is a record: the earlier one still says what held then.
    assert by_name(before)["mid"].weight_bits == (2,)
    assert by_name(before)["mid"].bops == MID_MACS * 4


@pytest.mark.slow
def test_totals_are_the_sums_of_the_layers():
    counted = tfl.cost(quantized_chain(3, 4, weight_quantizer="lsq"))
    for total in ("parameters", "weight_bytes", "macs", "bops"):
        parts = [getattr(layer, total) for layer in counted.layers]
        assert getattr(counted, total) == sum(parts) > 0
    assert counted.float_bytes == 4 * counted.parameters


@pytest.mark.parametrize(
    "build",
    [
        chain,
        lambda: models.preact_resnet(8, width=4),
        lambda: models.alexnet(classes=10),
        lambda: keras.Sequential([layers.Dense(3, input_shape=(4,)), layers.PReLU()]),
    ],
    ids=["chain", "preact_resnet8", "alexnet", "sequential"],
)
def test_parameters_of_a_float_model_are_keras_count(build):
    model = build()
    counted = tfl.cost(model)
    assert counted.parameters == model.count_params()
    assert counted.weight_bytes == counted.float_bytes == 4 * model.count_params()
    assert counted.name == model.name


def test_weights_of_the_same_name_in_one_layer_all_count():
    # Both directions of a Bidirectional layer have a "kernel", and so have query,
    # key, value and output of an attention layer.
    sequence = keras.Input((5, 4))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(sequence)
    x = layers.MultiHeadAttention(2, 3)(x, x)
    model = keras.Model(sequence, x)
    counted = tfl.cost(model)
    assert counted.parameters == model.count_params()
    assert counted.weight_bytes == 4 * model.count_params()


def test_published_macs_of_the_imagenet_networks():
    # torchvision's tables: 1.81 and 4.09 GMACs at 224 x 224.
    assert tfl.cost(models.resnet18()).macs == pytest.approx(1.814e9, rel=1e-3)
    assert tfl.cost(models.resnet50()).macs == pytest.approx(4.089e9, rel=1e-3)


def test_preact_resnet20_costs_what_the_cifar_papers_say():
    # He et al., arXiv:1512.03385: 0.27 M parameters; 40.6 MMACs are in common use.
    counted = tfl.cost(models.preact_resnet(20, classes=10))
    assert counted.macs == pytest.approx(40.6e6, rel=0.02)


@pytest.mark.slow
def test_as_dict_survives_json():
    counted = tfl.cost(quantized_chain(2, 4))
    data = json.loads(json.dumps(counted.as_dict()))
    assert data["name"] == "chain"
    for total in ("parameters", "weight_bytes", "float_bytes", "macs", "bops"):
        assert data[total] == getattr(counted, total)
    assert [layer["name"] for layer in data["layers"]] == ["stem", "mid", "bn", "head"]
    assert data["layers"][1] == {
        "name": "mid",
        "kind": "Conv2D",
        "output_shape": [4, 4, 5],
        "parameters": 135,
        "weight_bits": [2],
        "activation_bits": [4],
        "weight_bytes": 34,
        "macs": MID_MACS,
        "bops": MID_MACS * 8,
    }


def test_as_dict_of_open_sizes_survives_json():
    image = keras.Input((None, None, 3))
    counted = tfl.cost(keras.Model(image, layers.Conv2D(4, 3)(image)))
    data = json.loads(json.dumps(counted.as_dict()))
    assert data["macs"] is None
    assert data["layers"][0]["output_shape"] == [None, None, 4]


@pytest.mark.slow
def test_counting_changes_no_weight():
    model = quantized_chain(weight_quantizer="lsq", activation_quantizer="lsq")
    before = [np.array(weight) for weight in model.get_weights()]
    tfl.cost(model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="mine")
        self.dense = layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


@pytest.mark.parametrize("function", [tfl.cost, tfl.summary])
def test_refuses_what_has_no_graph(function):
    subclassed = Subclassed()
    subclassed.build((None, 3))
    with pytest.raises(ValueError, match=r"Sequential or Functional.*Received: Subc"):
        function(subclassed)
    with pytest.raises(ValueError, match=r"built .*Received: Sequential 'empty'"):
        function(keras.Sequential([layers.Dense(2)], name="empty"))
    with pytest.raises(ValueError, match=r"Received: str"):
        function("a network")


@pytest.mark.slow
def test_costs_are_frozen_values():
    first, second = tfl.cost(quantized_chain()), tfl.cost(quantized_chain())
    assert isinstance(first, Cost)
    assert all(isinstance(layer, LayerCost) for layer in first.layers)
    assert first == second
    with pytest.raises(AttributeError):
        first.layers[0].macs = 0
