import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export.networks import (
    EDGE,
    images,
    network,
    quantize,
)
from tf_lowbit import export
from tf_lowbit.network import inspection


def test_a_float_network_is_refused():
    with pytest.raises(ValueError, match=r"tf_lowbit.quantize"):
        export.snap(network(lambda x: x), [images()])


def test_an_uncalibrated_range_is_named():
    model = tfl.quantize(network(lambda x: x), [EDGE])
    with pytest.raises(export.ExportError, match=r"calibrate.*first|image_quantizer"):
        export.snap(model, [images()])


def test_bits_of_an_unfinished_stage_are_named():
    model = quantize(network(lambda x: x), [EDGE])
    (kernel, *_) = [
        t for t in inspection.quantized_tensors(model) if t.latent is not None
    ]
    kernel.assign_bits(32)
    with pytest.raises(export.ExportError, match=r"stages.*at 32 bits"):
        export.snap(model, [images()])


@pytest.mark.quick(1)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["first/kernel", "first_bn/moving_variance", "head/bias"]
)
def test_weights_that_are_no_numbers_are_named(name, value):
    model = quantize(network(lambda x: x), [EDGE])
    (weight,) = [w for w in model.weights if w.name.split(":")[0].endswith(name)]
    spoilt = weight.numpy()
    spoilt.flat[1] = value
    weight.assign(spoilt)
    with pytest.raises(export.ExportError, match=name):
        export.snap(model, [images()])


@pytest.mark.slow
def test_a_trainer_of_one_student_is_its_student():
    model = quantize(network(lambda x: x), [EDGE])
    trainer = tfl.LowBitTrainer(model)
    assert export.snap(trainer).twin.get_layer("first")
    both = tfl.LowBitTrainer(
        {"a": model, "b": quantize(network(lambda x: x), [EDGE])},
        network(lambda x: x),
        distillation=tfl.JointDistillation(),
    )
    with pytest.raises(ValueError, match=r"one of trainer.students"):
        export.snap(both)
