import numpy as np
import pytest

import tf_lowbit as tfl
from tests.models.counting import trainable
from tf_lowbit.compat import keras
from tf_lowbit.models import mobilenet_v2
from tf_lowbit.network import inspection

BLOCKS = [f"block{i}" for i in range(1, 8)]
STRIDED = ("block3", "block5")
WITH_ADD = ("block1", "block2", "block4", "block6", "block7")


def test_parameter_count():
    # Stem, then expansion, depthwise and projection of each block, each with BN.
    expected = 9 * 1 * 16 + 2 * 16
    for channels, hidden, filters in [
        (16, 64, 16),
        (16, 64, 16),
        (16, 64, 32),
        (32, 128, 32),
        (32, 128, 64),
        (64, 256, 64),
        (64, 256, 64),
    ]:
        expected += channels * hidden + 2 * hidden
        expected += 9 * hidden + 2 * hidden
        expected += hidden * filters + 2 * filters
    expected += 64 * 256 + 2 * 256
    expected += 256 * 10 + 10
    assert expected == 125_882  # as the docstring says
    assert trainable(mobilenet_v2()) == expected


def test_expansion_sets_the_depthwise_channels():
    model = mobilenet_v2(width=2, expansion=6)
    channels = [
        model.get_layer(f"{block}_depthwise").output_shape[-1] for block in BLOCKS
    ]
    assert channels == [12, 12, 12, 24, 24, 48, 48]


def test_an_expansion_of_1_is_left_out():
    model = mobilenet_v2(width=2, expansion=1)
    assert not any("expand" in layer.name for layer in model.layers)
    stem = model.get_layer("stem_relu").output
    assert model.get_layer("block1_depthwise").input is stem
    assert model.get_layer("block3_depthwise").output_shape[-1] == 2


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("input_shape", "half", "quarter"),
    [
        ((28, 28, 1), (14, 14), (7, 7)),
        ((32, 32, 3), (16, 16), (8, 8)),
        ((8, 8, 1), (4, 4), (2, 2)),
        ((15, 9, 2), (8, 5), (4, 3)),
        ((1, 1, 1), (1, 1), (1, 1)),
    ],
)
def test_shapes(input_shape, half, quarter):
    model = mobilenet_v2(width=1, classes=3, input_shape=input_shape)
    shapes = {
        "stem": (*input_shape[:2], 1),
        "block1_add": (*input_shape[:2], 1),
        "block2_depthwise": (*input_shape[:2], 4),
        "block3_expand": (*input_shape[:2], 4),
        "block3_depthwise": (*half, 4),
        "block3_project": (*half, 2),
        "block4_add": (*half, 2),
        "block5_expand": (*half, 8),
        "block5_project_bn": (*quarter, 4),
        "block7_add": (*quarter, 4),
        "final_relu": (*quarter, 16),
        "head": (3,),
    }
    for name, shape in shapes.items():
        assert model.get_layer(name).output_shape == (None, *shape)

    logits = model(np.random.default_rng(0).normal(size=(2, *input_shape)))

    assert logits.shape == (2, 3)
    assert np.all(np.isfinite(logits))


def test_layers_and_their_names():
    model = mobilenet_v2(width=1)
    assert model.name == "mobilenet_v2"
    assert mobilenet_v2(width=1, name="student").name == "student"
    names = ["image", "stem", "stem_bn", "stem_relu"]
    for block in BLOCKS:
        names += [f"{block}_expand{end}" for end in ("", "_bn", "_relu")]
        names += [f"{block}_depthwise_pad"] if block in STRIDED else []
        names += [f"{block}_depthwise{end}" for end in ("", "_bn", "_relu")]
        names += [f"{block}_project", f"{block}_project_bn"]
        names += [f"{block}_add"] if block in WITH_ADD else []
    names += ["final_conv", "final_bn", "final_relu", "avg_pool", "head"]
    assert [layer.name for layer in model.layers] == names


def test_bottlenecks_are_linear_and_added():
    model = mobilenet_v2(width=1)
    before = model.get_layer("stem_relu").output
    for block in BLOCKS:
        assert model.get_layer(f"{block}_expand").input is before
        before = model.get_layer(f"{block}_project_bn").output
        if block in WITH_ADD:
            add = model.get_layer(f"{block}_add")
            assert add.input[0] is before
            assert add.input[1] is model.get_layer(f"{block}_expand").input
            before = add.output
    assert model.get_layer("final_conv").input is before


def test_every_relu_ends_at_6():
    model = mobilenet_v2(width=1)
    relus = [x for x in model.layers if isinstance(x, keras.layers.ReLU)]
    assert len(relus) == 2 * len(BLOCKS) + 2
    assert {float(relu.max_value) for relu in relus} == {6.0}


@pytest.mark.slow
def test_weight_decay_covers_every_variable():
    model = mobilenet_v2(width=1)
    assert len(model.losses) == len(model.trainable_variables)
    assert mobilenet_v2(width=1, weight_decay=0.0).losses == []


@pytest.mark.slow
def test_the_default_rules_leave_the_edges_float():
    model = tfl.quantize(mobilenet_v2(width=1, input_shape=(8, 8, 1)), strict=True)
    bits = {t.name: t.bits for t in inspection.quantized_tensors(model)}
    kernels = {"final_conv/kernel"}
    for block in BLOCKS:
        kernels |= {f"{block}_expand/kernel", f"{block}_project/kernel"}
        kernels.add(f"{block}_depthwise/depthwise_kernel")
    found = list(inspection.quantized_tensors(model))
    assert {t.name for t in found if t.latent is not None} == kernels
    assert set(bits.values()) == {2}
    # What no ReLU puts out is quantized where an expansion or the last convolution
    # reads it.
    outputs = {t.layer.name for t in found if t.latent is None}
    expected = {"stem_relu", "block3_project_bn_quantizer"}
    expected |= {"block5_project_bn_quantizer"}
    expected |= {f"{block}_add_quantizer" for block in WITH_ADD}
    expected |= {f"{b}_{part}_relu" for b in BLOCKS for part in ("expand", "depthwise")}
    assert outputs == expected
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32")
    tfl.calibrate(model, [x])
    assert np.all(np.isfinite(model(x)))
    for tensor in found:
        if tensor.latent is not None:
            assert len(np.unique(tensor.quantized())) <= 4


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be an integer of at least 1. Received: width=0"),
        ({"expansion": 0}, "expansion must be an integer of at least 1. Received"),
        ({"expansion": 1.5}, "Received: expansion=1.5"),
        ({"classes": 1}, "classes must be an integer of at least 2. Received"),
        ({"input_shape": (28, 28)}, r"Received: input_shape=\(28, 28\)"),
        ({"weight_decay": -1.0}, "Received: weight_decay=-1.0"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mobilenet_v2(**arguments)
