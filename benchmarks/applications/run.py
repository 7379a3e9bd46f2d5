"""One network of `tf_keras.applications` through everything, in a process of its own.

`python -m benchmarks.applications` starts it, and hands it the name and the file of
results, pickled, on its standard input.
"""

import gc
import os
import pickle
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np

import tf_lowbit as tfl
from benchmarks.applications import plan
from benchmarks.common import store
from tf_lowbit.analysis import environment
from tf_lowbit.compat import keras, tf


class StepError(Exception):
    """What the library refused, and at which step."""


def build(name: str) -> keras.Model:
    """The float network, with random weights."""
    options = plan.options(name)
    return getattr(keras.applications, name)(weights=None, classes=10, **options)


def most_levels(model, images) -> float:
    """How many of its levels the tensor uses that uses the most; above 1 is wrong."""
    tensors = list(tfl.inspection.quantized_tensors(model))
    shares = [
        len(np.unique(t.codes())) / len(t.quantizer.level_codes(t.bits))
        for t in tensors
        if t.latent is not None
    ]
    activations = [t for t in tensors if t.latent is None]
    observer = keras.Model(model.inputs, [t.layer.output for t in activations])
    for tensor, values in zip(
        activations, tf.nest.flatten(observer(images)), strict=True
    ):
        levels = len(tensor.quantizer.level_codes(tensor.bits))
        shares.append(len(np.unique(values)) / levels)
    return max(shares)


def perform(name: str, results: Path) -> None:
    """Quantizes, trains a step, saves, loads and exports; adds the result.

    What is refused is a result.
    """
    keras.utils.set_random_seed(0)
    start = time.perf_counter()
    model = build(name)
    rng = np.random.default_rng(0)
    shape = (plan.BATCH, *model.input_shape[1:])
    images = rng.uniform(*plan.pixels(name), shape).astype(np.float32)
    found = {
        "input_shape": list(model.input_shape[1:]),
        "layers": len(model.layers),
        "parameters": model.count_params(),
        "steps": {},
        "step_seconds": {},
    }
    try:
        _go_through(model, images, found)
    except StepError as failed:
        found["refused"] = str(failed)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found["seconds"] = round(time.perf_counter() - start, 1)
    found["peak_gib"] = round(usage.ru_maxrss / 2**20, 2)
    store.write(results, name, {**found, **environment()})


def _step(found, name, function):
    """Notes what a step says, and how long it takes; its error ends the way."""
    start = time.perf_counter()
    try:
        result = function()
    except (ValueError, NotImplementedError) as error:
        found["steps"][name] = False
        raise StepError(f"{name}: {str(error).splitlines()[0]}") from error
    finally:
        found["step_seconds"][name] = round(time.perf_counter() - start, 1)
    found["steps"][name] = True
    return result


def _is_separable(layer) -> bool:
    return isinstance(layer, keras.layers.SeparableConv2D)


def trained(model, images, found) -> keras.Model:
    """The network quantized, and trained for a step.

    By the quantizers of `plan.QUANTIZERS` in turn, until the step leaves all weights
    finite; notes those of which it does not. A step that fails otherwise, as by moving
    nothing, is not tried again.
    """
    for kind in plan.QUANTIZERS:
        found["quantizer"] = kind
        quantized = _trained(model, images, found)
        if all(np.isfinite(weight).all() for weight in quantized.get_weights()):
            return quantized
        found.setdefault("overflows", []).append(kind)
        found["steps"]["train"] = False
        if kind != plan.QUANTIZERS[-1]:
            del quantized  # So that two are not held at a time.
            gc.collect()
    return quantized


def _trained(model, images, found):
    kind = found["quantizer"]
    rules = [tfl.PrecisionRule(".*", 4, 4, kind, kind)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = _step(found, "quantize", lambda: tfl.quantize(model, rules))
    told = [w for w in caught if issubclass(w.category, tfl.QuantizationWarning)]
    found["warnings"] = len(told)
    tensors = list(tfl.inspection.quantized_tensors(quantized))
    found["quantized_weights"] = sum(t.latent is not None for t in tensors)
    found["quantized_activations"] = sum(t.latent is None for t in tensors)
    _step(found, "calibrate", lambda: tfl.calibrate(quantized, [images]))
    quantized.compile(
        keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy()
    )
    labels = np.arange(len(images)) % 10
    latent = next(t.latent for t in tensors if t.latent is not None)
    before = latent.numpy()
    loss = _step(found, "train", lambda: quantized.train_on_batch(images, labels))
    moved = not np.array_equal(latent.numpy(), before)
    found["steps"]["train"] = bool(np.isfinite(loss) and moved)
    return quantized


def _go_through(model, images, found):
    if any(map(_is_separable, model.layers)):
        model = _step(found, "split", lambda: tfl.split_separable(model))
    quantized = trained(model, images, found)
    found["steps"]["levels"] = most_levels(quantized, images) <= 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.keras"
        quantized.save(path)
        again = _step(found, "reload", lambda: tfl.load_model(path))
        pairs = zip(again.get_weights(), quantized.get_weights(), strict=True)
        found["steps"]["reload"] = all(np.array_equal(a, b) for a, b in pairs)
        file = Path(folder) / "net.tflite"
        result = _step(
            found,
            "export",
            lambda: tfl.export.to_tflite(quantized, file, [images], verbose=0),
        )
        report = _step(
            found,
            "verify",
            lambda: tfl.export.verify(file, result, [images], verbose=0),
        )
        found["steps"]["verify"] = report.ok
        if not report.ok:
            raise StepError(f"verify: {'; '.join(report.failures)}")


if __name__ == "__main__":
    perform(*pickle.load(sys.stdin.buffer))
