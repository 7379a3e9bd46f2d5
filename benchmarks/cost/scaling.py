"""How the quantized step's cost relative to float changes as the work grows.

  python -m benchmarks.cost.scaling --output=benchmarks/results/scaling.json

One thing at a time is changed from a CIFAR ResNet-20 of width 16, 32x32 images in
batches of 64: batch, width, depth and input; W2A2, DoReFa. CPU time of a step relative
to the float step, which takes turns with it. TF_ENABLE_ONEDNN_OPTS=0 or 1 in the
environment chooses between TensorFlow's own kernels and oneDNN's; the result says it.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import rich.console
import rich.table
from absl import app, flags

import tf_lowbit as tfl
from benchmarks.cost import stepping
from tf_lowbit import models
from tf_lowbit.compat import keras, tf

FLAGS = flags.FLAGS

flags.DEFINE_list("batch", ["32", "128", "512"], "Images in a batch.")
flags.DEFINE_list("width", ["8", "16", "32", "64"], "Channels of the first stage.")
flags.DEFINE_list("depth", ["8", "20", "56"], "Layers, 6n+2.")
flags.DEFINE_list("input", ["28", "56", "112", "224"], "Height and width of an image.")
flags.DEFINE_integer("rounds", 5, "Rounds that count; one more warms up.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")

BASE = {"batch": 64, "width": 16, "depth": 20, "input": 32}
AXES = ("batch", "width", "depth", "input")
# Pixels of all images of a batch together, above which fewer images are taken.
_MOST_PIXELS = 64 * 56 * 56


def points() -> list[dict]:
    """What is measured: settings that differ from the base in one of them."""
    found = []
    for axis in AXES:
        for value in getattr(FLAGS, axis):
            point = {**BASE, axis: int(value), "axis": axis}
            if axis == "input":
                fitting = _MOST_PIXELS // point["input"] ** 2
                point["batch"] = max(1, min(BASE["batch"], fitting))
            found.append(point)
    return found


def measure(point: dict) -> dict:
    """The ratio at one point."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    shape = (point["input"], point["input"], 3)
    model = models.preact_resnet(
        point["depth"], width=point["width"], input_shape=shape
    )
    quantized = tfl.quantize(model, [tfl.PrecisionRule(".*", 2, 2)])
    steps = {
        "float": stepping.step_function(model, point["batch"], shape),
        "DoReFa W2A2": stepping.step_function(quantized, point["batch"], shape),
    }
    rounds = stepping.take_turns(steps, FLAGS.rounds, 1)
    return stepping.compare(rounds, "DoReFa W2A2", "float")


def main(argv):
    """Measures, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    # One step function for each network is meant, not the retracing it looks like.
    tf.get_logger().setLevel("ERROR")
    table = rich.table.Table(title="CPU time of a W2A2 step relative to float")
    for column in (*AXES, "median", "least", "largest"):
        table.add_column(column, justify="right")
    found = []
    for point in points():
        found.append({**point, **measure(point)})
        table.add_row(*(str(found[-1][column.header]) for column in table.columns))
    rich.console.Console().print(table)
    if FLAGS.output:
        stepping.write(FLAGS.output, {"ratios": found}, __name__)


if __name__ == "__main__":
    app.run(main)
