"""Random networks through everything: quantize, train, save, load, export, prove.

`TF_LOWBIT_FUZZ` is how many of them; `make fuzz` takes 200, and as many again for a
packed file in TFLite Micro and one for QONNX, which run in their own programs.
"""

import collections
import dataclasses
import os
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import tf_lowbit as tfl
from tests.export.networks import images as pixels
from tests.export.networks import randomize, relative_error
from tests.fuzz.graphs import graphs
from tf_lowbit.compat import keras

COUNT = int(os.environ.get("TF_LOWBIT_FUZZ", "20"))
# Interpreters of other targets are slow; the tests take a sample.
OTHERS = COUNT if "TF_LOWBIT_FUZZ" in os.environ else 5
BATCH = 8
# Codes beside a decision point: so many may differ in the first quantizer where a QONNX
# file and the network differ. Codes behind them differ as a consequence.
TIES = 2
# Share of the outputs' deviation that a file at W8A8 may be off the trained network.
# A layer that is left out, or the range of another tensor, takes more.
BOUND = 0.25


@pytest.fixture(scope="module")
def log():
    """What was met; printed in the end."""
    met = collections.Counter()
    yield met
    print(f"\n{met['networks']} networks: {dict(met)}")
    # A program that takes nothing shows nothing.
    assert met["refused by tflm"] <= met["tflm"]
    assert met["refused by qonnx"] <= met["qonnx"]
    assert met["qonnx, some codes"] <= met["qonnx"] / 4 + 1


def times(count):
    """Takes so many networks: the same each time, but in `make fuzz`."""
    return settings(
        max_examples=count,
        deadline=None,
        # One failing network is enough: shrinking would take minutes.
        phases=settings.default.phases[:3],
        suppress_health_check=list(HealthCheck),
        derandomize="TF_LOWBIT_FUZZ" not in os.environ,
    )


def quantized(graph, model, images):
    """By the graph's rules, its ranges set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tfl.QuantizationWarning)
        made = tfl.quantize(model, graph.rules(), residual_bits=graph.residual_bits)
    tfl.calibrate(made, [images])
    return made


@given(graph=graphs())
@times(COUNT)
def test_random_networks(graph, tmp_path_factory, log):
    keras.backend.clear_session()
    keras.utils.set_random_seed(len(graph.blocks))
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    shape = (BATCH, graph.size, graph.size, graph.channels)
    images = rng.normal(0.2, 1.0, shape).astype(np.float32)
    labels = rng.integers(0, graph.classes, BATCH)

    model = quantized(graph, graph.model(), images)
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

    again = graph.ended(again)
    result = tfl.export.to_tflite(again, folder / "net.tflite", [images], verbose=0)
    report = tfl.export.verify(folder / "net.tflite", result, [images], verbose=0)
    assert report.ok, str(report)
    log["networks"] += 1
    for kind in {block.kind for block in graph.blocks}:
        log[kind] += 1
    log["nested"] += graph.nested
    log["argmax"] += graph.chosen
    log[graph.weight_quantizer] += 1


@given(graph=graphs())
@times(max(COUNT // 4, 1))
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
    model = quantized(graph, graph.model(), images)
    tfl.recalibrate_batch_norm(model, [images])
    path = tmp_path_factory.mktemp("near") / "net.tflite"
    tfl.export.to_tflite(model, path, [images], verbose=0)
    assert relative_error(model, path.read_bytes(), images) < BOUND


@given(graph=graphs())
@times(OTHERS)
def test_other_targets(graph, tmp_path_factory, log):
    """TFLite Micro's and qonnx's own programs, or a refusal that names a layer."""
    graph = dataclasses.replace(graph, nested=False)  # `randomize` takes layers alone.
    keras.backend.clear_session()
    folder = tmp_path_factory.mktemp("others")
    x = pixels(BATCH, (graph.size, graph.size, graph.channels))
    model = graph.ended(quantized(graph, randomize(graph.model()), x))
    names, refused = [layer.name for layer in model.layers], {}
    for name, make in {"tflm": in_tflite_micro, "qonnx": in_qonnx}.items():
        try:
            kind = make(model, x, folder)
        except tfl.export.ExportError as error:
            refused[name] = str(error)
            kind = f"refused by {name}"
        log[kind] += 1
    for name, message in refused.items():
        print(f"  {name}: {message}")
        assert any(layer in message.rsplit("Received: ", 1)[1] for layer in names)


def in_tflite_micro(model, x, folder):
    """The packed file runs in TFLite Micro, and every code is the integer model's."""
    path = folder / "net.tflite"
    options = {"target": "tflm", "storage": "packed", "verbose": 0}
    result = tfl.export.to_tflite(model, path, [x], **options)
    report = tfl.export.verify(path, result, [x], verbose=0)
    assert report.ok, str(report)
    assert report.runtime == "tflite_micro"
    assert report.mismatches == 0 < report.codes
    return "tflm"


def in_qonnx(model, x, folder):
    """The file runs in qonnx's executor, and codes are the trained network's."""
    tfl.export.to_qonnx(model, folder / "net.onnx", batch_size=BATCH)
    found = tfl.export.compare_qonnx(folder / "net.onnx", model, x)
    first = next(filter(None, found.different.values()), 0)
    assert first <= TIES, str(found)
    if first:
        return "qonnx, some codes"
    assert found.error < 1e-3, str(found)
    return "qonnx"
