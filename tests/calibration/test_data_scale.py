"""Data of another scale than the float training's are told."""

import pytest

from tests.scheme import nets
from tf_lowbit import PrecisionRule, calibrate, quantize
from tf_lowbit.compat import keras

layers = keras.layers


@pytest.mark.parametrize("scale", [1.0, 3.0, 255.0, 1 / 255.0])
@pytest.mark.parametrize("first", [(None, None), (8, 8), (2, 2)], ids=str)
def test_data_of_another_scale_than_the_trainings_are_told(scale, first, recwarn):
    model = nets.chain()
    images = nets.images(32)
    model.compile("sgd", "mse")
    norm = next(x for x in model.layers if isinstance(x, layers.BatchNormalization))
    norm.momentum = 0.0  # One step sets the moving statistics.
    model.fit(images, model(images), verbose=0)
    conv = next(x.name for x in model.layers if x.weights)
    quantizers = ("uniform", "uniform") if first == (8, 8) else ()
    rules = [PrecisionRule(conv, *first, *quantizers), PrecisionRule(".*", 2, 2)]
    calibrate(quantize(model, rules), [scale * images])
    told = [w for w in recwarn if "must have the scale of" in str(w.message)]
    # DoReFa's weights have a scale of their own.
    assert len(told) == (scale not in (1.0, 3.0) and first != (2, 2))
