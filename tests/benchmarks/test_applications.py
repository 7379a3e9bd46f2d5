import subprocess
import sys

import numpy as np
import pytest

import tf_lowbit as tfl
from benchmarks.applications import plan
from benchmarks.applications import run as applications_run
from benchmarks.common import store
from tests.examples import programs
from tf_lowbit.compat import keras, tf


def test_all_networks_are_in_the_plan():
    public = {n: getattr(keras.applications, n) for n in dir(keras.applications)}
    functions = {n for n, f in public.items() if n[0].isupper() and callable(f)}
    assert set(plan.NAMES) == functions
    assert len(plan.NAMES) == len(functions)


def test_a_network_goes_through_everything(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.applications"),
            "--network=MobileNet",
            f"--results={tmp_path / 'networks.jsonl'}",
        ],
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = tmp_path / "networks.jsonl"
    found = store.read(results)["MobileNet"]
    assert found["steps"] == dict.fromkeys(["calibrate", *plan.STEPS], True)
    assert "refused" not in found
    # 28 convolutions of either kind; the outermost two stay float.
    assert found["quantized_weights"] == 26
    assert found["quantized_activations"] == 26
    lines = plan.table(results).splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["MobileNet", "91", "26", "26", *["yes"] * 6, ""]


def test_what_was_refused_is_told(tmp_path):
    found = {
        "layers": 229,
        "quantized_weights": 2,
        "quantized_activations": 1,
        "steps": {
            **{"split": True, "quantize": True, "train": True, "levels": True},
            "export": False,
        },
        "refused": "export: no form. Received: 'a|b'",
    }
    results = tmp_path / "networks.jsonl"
    store.write(results, "MobileNetV3Small", found)
    line = plan.table(results).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "MobileNetV3Small, split"
    assert cells[4:] == [
        *("yes", "yes", "yes", "—", "no", "—"),
        "export: no form. Received: 'a/b'",
    ]
    assert plan.table(tmp_path / "absent") == "Not run yet."


@keras.utils.register_keras_serializable("tests")
class Exploding(keras.layers.Layer):
    """The identity, whose gradients are multiplied by `factor`."""

    factor = 1.0

    def call(self, inputs):
        @tf.custom_gradient
        def identity(x):
            return tf.identity(x), lambda dy: dy * Exploding.factor

        return identity(inputs)


@pytest.mark.parametrize(
    ("factors", "used", "overflows", "note"),
    [
        ((1.0,), "dorefa", None, ""),
        (
            (np.inf, 1.0),
            "lsq",
            ["dorefa"],
            "dorefa: weights not finite; by lsq instead",
        ),
        # Nothing moves: not trained, and no matter of the quantizers.
        ((0.0,), "dorefa", None, ""),
        (
            (np.inf, np.inf),
            "lsq",
            ["dorefa", "lsq"],
            "dorefa: weights not finite; lsq: weights not finite",
        ),
    ],
)
def test_where_weights_do_not_stay_finite_other_quantizers_are_tried(
    factors, used, overflows, note, tmp_path, monkeypatch
):
    image = keras.Input((8, 8, 3))
    x = image
    for _ in range(3):
        x = keras.layers.Conv2D(4, 3, activation="relu")(Exploding()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, keras.layers.Dense(10, "softmax")(x))
    rng = np.random.default_rng(0)
    found = {"layers": 9, "steps": {}, "step_seconds": {}}
    quantize, left = tfl.quantize, iter(factors)

    def with_the_next_factor(*arguments):
        Exploding.factor = next(left)
        return quantize(*arguments)

    monkeypatch.setattr(tfl, "quantize", with_the_next_factor)
    images = rng.uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    quantized = applications_run.trained(model, images, found)
    assert found["quantizer"] == used
    assert found.get("overflows") == overflows
    assert found["steps"]["train"] is (factors[-1] == 1.0)
    finite = [np.isfinite(w).all() for w in quantized.get_weights()]
    assert all(finite) is bool(np.isfinite(factors[-1]))
    tensors = tfl.inspection.quantized_tensors(quantized)
    first = next(t for t in tensors if t.latent is not None)
    weights = {"dorefa": "DoReFaWeightQuantizer", "lsq": "LSQWeightQuantizer"}
    assert type(first.quantizer).__name__ == weights[used]
    results = tmp_path / "networks.jsonl"
    store.write(results, "VGG16", found)
    cells = plan.table(results).splitlines()[2].strip("|").split("|")
    assert cells[-1].strip() == note
