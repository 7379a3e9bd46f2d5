r"""MLPerf Tiny's networks as files for TFLite Micro: bytes of flash and of arena.

  python -m benchmarks.deployment.tiny --models_dir=FOLDER \
      --output=benchmarks/results/tiny.json

The networks are quantized, calibrated on random inputs and not trained: sizes do not
depend on that, accuracies would. The first and the last layer have 8 bits.
"""

import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from absl import app, flags

import tf_lowbit as tfl
from benchmarks.cost import stepping
from tf_lowbit.compat import keras

FLAGS = flags.FLAGS

flags.DEFINE_string("models_dir", None, "Folder of MLPerf Tiny's trained networks.")
flags.DEFINE_multi_integer("bits", [2], "Of weights and activations of other layers.")
flags.DEFINE_integer("examples", 2, "Inputs that each packed file is verified on.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")

# From a name to its file, and the names of its first and last layer.
NETWORKS = {
    "ResNet-8": ("mlperf_tiny_ic_resnet8.h5", "conv2d|dense"),
    "DS-CNN": ("mlperf_tiny_kws_dscnn", "conv2d|dense"),
    "MobileNetV1 0.25": ("mlperf_tiny_vww_mobilenetv1.h5", "conv2d|dense"),
}
STORAGES = ("int8", "packed")


def files(model: keras.Model, edges: str, bits: int, folder: Path) -> dict:
    """Sizes of a network's files, and what `verify` says of the packed one.

    Args:
        model: float network of one input.
        edges: pattern of the layers that get 8 bits.
        bits: of all others.
        folder: where the files go.
    """
    rng = np.random.default_rng(0)
    inputs = rng.uniform(0, 1, (32, *model.input_shape[1:])).astype(np.float32)
    rules = [
        tfl.PrecisionRule(edges, 8, 8, "uniform", "uniform"),
        tfl.PrecisionRule(".*", bits, bits),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tfl.QuantizationWarning)
        network = tfl.quantize(model, rules, residual_bits=8)
        tfl.calibrate(network, [inputs])
        contents = {}
        for storage in STORAGES:
            path = folder / f"{storage}.tflite"
            tfl.export.to_tflite(
                network, path, [inputs], target="tflm", storage=storage, verbose=0
            )
            contents[storage] = path.read_bytes()
        report = tfl.export.verify(
            contents["packed"], network, [inputs[: FLAGS.examples]], verbose=0
        )
    runners = {s: tfl.export.MicroRunner(contents[s]) for s in STORAGES}
    codes = rng.integers(-128, 128, (FLAGS.examples, *inputs.shape[1:]), np.int8)
    plain, packed = (list(runners[s](codes).values()) for s in STORAGES)
    return {
        "float_weight_bytes": 4 * model.count_params(),
        "bytes": {storage: len(contents[storage]) for storage in STORAGES},
        "arena": {storage: runners[storage].arena() for storage in STORAGES},
        "equal": all(map(np.array_equal, plain, packed)),
        "verified": report.ok,
        "failures": report.failures,
        "codes": report.codes,
        "mismatches": report.mismatches,
    }


def main(argv):
    """Makes the files, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    found = {}
    for name, (file, edges) in NETWORKS.items():
        path = Path(FLAGS.models_dir, file)
        if not path.exists():
            continue
        model = keras.models.load_model(path, compile=False)
        for bits in FLAGS.bits:
            with tempfile.TemporaryDirectory() as folder:
                row = files(model, edges, bits, Path(folder))
            found.setdefault(name, {})[f"W{bits}A{bits}"] = row
            print(f"{name}, W{bits}A{bits}: {row}", flush=True)
    if FLAGS.output:
        stepping.write(FLAGS.output, {"networks": found}, __name__)


if __name__ == "__main__":
    app.run(main)
