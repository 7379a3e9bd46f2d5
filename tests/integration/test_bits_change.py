"""A change of bits takes effect at the next step, and never traces anew."""

import numpy as np
import pytest

from tests.scheme import nets
from tf_lowbit import PrecisionRule, calibrate, quantize
from tf_lowbit.compat import keras
from tf_lowbit.network import inspection


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "activations"), [("dorefa", "dorefa"), ("lsq", "lsq")]
)
def test_no_trace_is_added(weights, activations):
    traces = []

    def counted(y_true, y_pred):
        traces.append(1)  # Python runs only while tracing.
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, True)

    rule = PrecisionRule(
        ".*", 8, 8, weight_quantizer=weights, activation_quantizer=activations
    )
    model = quantize(nets.randomize(nets.chain(batch_norm=False)), rule)
    calibrate(model, [nets.images(8)])
    model.compile(keras.optimizers.SGD(0.01), counted)
    inputs, targets = nets.images(8), nets.labels(8)

    def run():
        model.fit(inputs, targets, batch_size=4, verbose=0)
        model.evaluate(inputs, targets, batch_size=4, verbose=0)
        return model.predict(inputs, verbose=0)

    run()
    traced = len(traces)
    graphs = model.train_function.experimental_get_tracing_count()
    assert traced
    outputs = {}
    latent = nets.by_name(model)["mid/kernel"].latent
    for bits in (4, 2, 1, 32):
        before = latent.numpy()
        for tensor in inspection.quantized_tensors(model):
            tensor.assign_bits(bits)
        # Latent weights, not quantized ones, go on.
        np.testing.assert_array_equal(latent, before)
        outputs[bits] = run()
        assert not np.array_equal(latent, before)
    assert len(traces) == traced
    assert model.train_function.experimental_get_tracing_count() == graphs
    assert not np.allclose(outputs[1], outputs[32])


def test_the_compiled_step_uses_the_new_bits():
    model = quantize(nets.randomize(nets.chain()), PrecisionRule(".*", 8, 8))
    data = nets.images(8)
    at_8 = model.predict(data, verbose=0)
    for tensor in inspection.quantized_tensors(model):
        tensor.assign_bits(2)
    np.testing.assert_allclose(model.predict(data, verbose=0), model(data), atol=1e-5)
    assert not np.allclose(model.predict(data, verbose=0), at_8, atol=1e-3)
