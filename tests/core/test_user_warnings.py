"""A warning names the line of the user's program."""

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.compat import keras


def of_unmatched_rule(data):
    rules = [tfl.PrecisionRule("nothing", 2, 2), tfl.PrecisionRule(".*", 2, 2)]
    tfl.quantize(nets.chain(), rules)


def of_data_without_negative_values(data):
    image = keras.Input((8, 8, 3))
    head = keras.layers.Dense(2, name="head")(keras.layers.Flatten()(image))
    rule = tfl.PrecisionRule("head", 4, 4, "lsq", "lsq")
    tfl.calibrate(tfl.quantize(keras.Model(image, head), rule), [np.abs(data)])


def of_ranges_in_training(data):
    rule = tfl.PrecisionRule(".*", 2, 2, "lsq", "lsq")
    model = tfl.quantize(nets.chain(), rule)
    model.compile("sgd", "mse")
    stages = [tfl.Stage(1, 2, 2)]
    callback = tfl.callbacks.StagedPrecision(stages)
    model.fit(nets.images(), nets.labels(), callbacks=[callback], verbose=0)


@pytest.mark.parametrize(
    "program",
    [of_unmatched_rule, of_data_without_negative_values, of_ranges_in_training],
)
def test_the_line_is_of_this_file(program):
    data = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
    with pytest.warns(tfl.QuantizationWarning) as found:
        program(data)
    assert {warning.filename for warning in found} == {__file__}
