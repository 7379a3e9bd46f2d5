"""Random networks through everything: quantize, train, save, load, export, prove.

`TF_LOWBIT_FUZZ` is how many of them; `make fuzz` takes 200.
"""

import collections
import dataclasses
import os
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import tf_lowbit as tfl
from tests.export.networks import relative_error
from tests.fuzz.graphs import graphs
from tf_lowbit.compat import keras

COUNT = int(os.environ.get("TF_LOWBIT_FUZZ", "20"))
BATCH = 8
# Share of the outputs' deviation that a file at W8A8 may be off the trained network.
# A layer that is left out, or the range of another tensor, takes more.
BOUND = 0.25


@pytest.fixture(scope="module")
def log():
    """What was met; printed in the end."""
    met = collections.Counter()
    yield met
    print(f"\n{met['networks']} networks: {dict(met)}")


@given(graph=graphs())
@settings(
    max_examples=COUNT,
    deadline=None,
    # One failing network is enough: shrinking would take minutes.
    phases=settings.default.phases[:3],
    suppress_health_check=list(HealthCheck),
    derandomize="TF_LOWBIT_FUZZ" not in os.environ,
)
def test_random_networks(graph, tmp_path_factory, log):
    keras.backend.clear_session()
    keras.utils.set_random_seed(len(graph.blocks))
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    shape = (BATCH, graph.size, graph.size, graph.channels)
    images = rng.normal(0.2, 1.0, shape).astype(np.float32)
    labels = rng.integers(0, graph.classes, BATCH)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tfl.QuantizationWarning)
        model = tfl.quantize(
            graph.model(), graph.rules(), residual_bits=graph.residual_bits
        )
    tfl.calibrate(model, [images])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss)
    assert np.isfinite(model.train_on_batch(images, labels))
    tfl.recalibrate_batch_norm(model, [images])
    for tensor in tfl.inspection.quantized_tensors(model):
        if tensor.latent is not None:
            levels = tensor.quantizer.level_codes(tensor.bits)
            assert set(np.unique(tensor.codes())) <= set(levels), tensor.name

    model.save(folder / "net.keras")
    again = tfl.load_model(folder / "net.keras")
    np.testing.assert_array_equal(again(images), model(images))

    result = tfl.export.to_tflite(again, folder / "net.tflite", [images], verbose=0)
    report = tfl.export.verify(folder / "net.tflite", result, [images], verbose=0)
    assert report.ok, str(report)
    log["networks"] += 1
    for kind in {block.kind for block in graph.blocks}:
        log[kind] += 1
    log["nested"] += graph.nested
    log[graph.weight_quantizer] += 1


@given(graph=graphs())
@settings(
    max_examples=max(COUNT // 4, 1),
    deadline=None,
    phases=settings.default.phases[:3],
    suppress_health_check=list(HealthCheck),
    derandomize="TF_LOWBIT_FUZZ" not in os.environ,
)
def test_files_at_8_bits_are_near_the_trained_network(graph, tmp_path_factory):
    """Not near the twin alone, which has what a wrong lowering gives it."""
    graph = dataclasses.replace(
        graph,
        **dict.fromkeys(("weight_bits", "activation_bits"), 8),
        **dict.fromkeys(("weight_quantizer", "activation_quantizer"), "uniform"),
        edges=True,
        hidden=graph.hidden and "tanh",
    )
    keras.backend.clear_session()
    keras.utils.set_random_seed(len(graph.blocks))
    shape = (64, graph.size, graph.size, graph.channels)
    images = np.random.default_rng(0).normal(0.2, 1.0, shape).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tfl.QuantizationWarning)
        model = tfl.quantize(
            graph.model(), graph.rules(), residual_bits=graph.residual_bits
        )
    tfl.calibrate(model, [images])
    tfl.recalibrate_batch_norm(model, [images])
    path = tmp_path_factory.mktemp("near") / "net.tflite"
    tfl.export.to_tflite(model, path, [images], verbose=0)
    assert relative_error(model, path.read_bytes(), images) < BOUND
