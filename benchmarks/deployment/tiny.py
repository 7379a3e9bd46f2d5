r"""MLPerf Tiny's networks as files for TFLite Micro: bytes of flash and of arena.

  python -m benchmarks.deployment.tiny --models_dir=FOLDER \
      --output=benchmarks/results/tiny.json

The networks are quantized and calibrated on random inputs by what
`examples/deploy_tiny.py` uses, and not trained: sizes do not depend on that, accuracies
would. The first and the last layer have 8 bits.
"""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags

import tf_lowbit as tfl
from benchmarks.cost import stepping
from examples import experiment, micro_deployment

FLAGS = flags.FLAGS

flags.DEFINE_string("models_dir", None, "Folder of MLPerf Tiny's trained networks.")
flags.DEFINE_multi_integer("bits", [8, 4, 3, 2], "Of the other layers.")
flags.DEFINE_integer("examples", 2, "Inputs that each packed file is verified on.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")

NETWORKS = {
    "ResNet-8": "mlperf_tiny_ic_resnet8.h5",
    "DS-CNN": "mlperf_tiny_kws_dscnn",
    "MobileNetV1 0.25": "mlperf_tiny_vww_mobilenetv1.h5",
}


def main(argv):
    """Makes the files, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    found = {}
    for name, file in NETWORKS.items():
        path = Path(FLAGS.models_dir, file)
        if not path.exists():
            continue
        model = tfl.load_model(path, compile=False)
        found[name] = {"float": len(experiment.float_tflite(model)), "bits": {}}
        data = micro_deployment.random_data(model.input_shape[1:])
        for bits in FLAGS.bits:
            deployment = micro_deployment.deploy(
                model, (bits, bits), data, examples=FLAGS.examples
            )
            row = deployment.as_dict()
            found[name]["bits"][deployment.name] = row
            print(f"{name}, {deployment.name}: {row}", flush=True)
    if FLAGS.output:
        stepping.write(FLAGS.output, {"networks": found}, __name__)


if __name__ == "__main__":
    app.run(main)
