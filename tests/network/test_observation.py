import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit import models
from tf_lowbit.compat import keras, tf
from tf_lowbit.network.observation import batches_of, without_draws

IMAGES = np.zeros((4, 8, 8, 1), np.float32)
LABELS = np.zeros(4, np.int64)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A quantized network, and its file."""
    float_model = models.get("plain_cnn", classes=3, input_shape=(8, 8, 1), width=8)
    model = tfl.quantize(float_model)
    tfl.calibrate(model, [IMAGES + 1.0])
    path = tmp_path_factory.mktemp("net") / "net.tflite"
    return model, tfl.export.to_tflite(model, path, data=[IMAGES + 1.0])


def test_batches_are_gone_over():
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(2)
    for batches in (dataset, [(IMAGES[:2], LABELS[:2])] * 2, iter([IMAGES[:2]] * 2)):
        assert len(list(batches_of(batches))) == 2


@pytest.mark.parametrize(
    "arrays",
    [IMAGES, tf.constant(IMAGES), (IMAGES, LABELS), {"image": IMAGES}],
    ids=["array", "tensor", "pair", "dict"],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda model, file, data: tfl.calibrate(model, data),
        lambda model, file, data: tfl.recalibrate_batch_norm(model, data),
        lambda model, file, data: tfl.statistics(model, data),
        lambda model, file, data: tfl.sensitivity(model, data, progress=False),
        lambda model, file, data: tfl.report(model, data, file.path.parent / "r.html"),
        lambda model, file, data: tfl.export.to_tflite(
            model, file.path.parent / "other.tflite", data=data
        ),
        lambda model, file, data: tfl.export.verify(file.path, file, data, verbose=0),
    ],
    ids="calibrate recalibrate statistics sensitivity report export verify".split(),
)
def test_arrays_are_refused_with_the_way_to_go(network, use, arrays):
    message = r"iterable of batches.*from_tensor_slices.*Received: \w+$"
    with pytest.raises(ValueError, match=message):
        use(*network, arrays)


@pytest.mark.parametrize("data", [[IMAGES, LABELS], [IMAGES, LABELS, LABELS], 3, None])
def test_what_is_no_list_of_batches_is_refused(data):
    with pytest.raises(ValueError, match=r"Data must be.*Received: "):
        batches_of(data)


@pytest.mark.parametrize("batches", [0, -1, 1.5, True, "2", None])
def test_a_number_of_batches_is_an_integer_of_at_least_1(network, batches):
    with pytest.raises(ValueError, match=r"integer of at least 1. Received: batches="):
        tfl.calibrate(network[0], [IMAGES], batches=batches)


@pytest.mark.parametrize(
    "recurrent",
    [
        lambda x, state: keras.layers.LSTM(4, dropout=0.5)(x, initial_state=state),
        lambda x, state: keras.layers.RNN(keras.layers.LSTMCell(4, dropout=0.5))(
            x, initial_state=state
        ),
    ],
    ids=["layer", "cell"],
)
def test_what_draws_reads_all_of_its_inputs(recurrent):
    """States too, without which a layer would start at zero."""
    series, state = keras.Input((5, 3)), [keras.Input((4,)), keras.Input((4,))]
    model = keras.Model([series, *state], recurrent(series, state))
    values = [np.full((2, *t.shape[1:]), 0.5, np.float32) for t in model.inputs]
    wanted = model(values, training=False).numpy()
    with without_draws(model):
        found = model(values, training=True).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
