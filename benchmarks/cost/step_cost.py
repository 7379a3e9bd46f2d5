r"""CPU time of a training step, as ratios between steps of the same run.

  TF_ENABLE_ONEDNN_OPTS=1 python -m benchmarks.cost.step_cost --rounds=7 \
      --output=benchmarks/results/step_cost-onednn-1.json

The variants take turns, round by round, in one process, so that the machine's drift
hits all of them; each figure is the median over the rounds of the ratio to another
step of the same round, with the smallest and the largest ratio beside it. A step is
what `fit` runs: the model's own `train_function`, metrics included.
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

flags.DEFINE_integer("depth", 20, "Depth of the CIFAR pre-activation ResNet, 6n+2.")
flags.DEFINE_integer("width", 16, "Channels of its first stage.")
flags.DEFINE_integer("batch_size", 128, "Images in a batch.")
flags.DEFINE_integer("steps", 3, "Steps in a round.")
flags.DEFINE_integer("rounds", 7, "Rounds that count; one more warms up.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")


# Sum of steps -> the steps that it is compared with, each once.
TOGETHER = "float + DoReFa W2A2, each for itself"
SUMS = {TOGETHER: ("float", "DoReFa W2A2")}
# What each figure is a ratio of; to float where nothing is said.
PLAIN = ("stochastic precision, layers", "stochastic precision, blocks")
JOINT = ("joint distillation", "joint distillation, hints", "frozen teacher")
COMPARISONS = [
    *((name, "DoReFa W2A2") for name in ("trainer without options", *PLAIN)),
    *((name, TOGETHER) for name in JOINT),
]


def quantized(model, activation="dorefa", weight="dorefa"):
    """A W2A2 network with these quantizers."""
    return tfl.quantize(model, [tfl.PrecisionRule(".*", 2, 2, weight, activation)])


def recipe(model):
    """The trainer of `recipes.low_bit` at W2A2."""
    batch = tf.random.normal((8, *model.input_shape[1:])), tf.zeros(8, tf.int32)
    data = tf.data.Dataset.from_tensors(batch)
    return tfl.recipes.low_bit(model, data, bits=2, epochs=1).trainer


def trainer(model, teacher=None, unit=None, train="joint", hints=None):
    """A trainer of a W2A2 network, by the options that are given."""
    precision = unit and tfl.StochasticPrecision(start=0.5, unit=unit, steps=10**6)
    losses = tfl.JointDistillation(teacher=train, hints=hints) if teacher else None
    return tfl.LowBitTrainer(
        quantized(model), teacher, distillation=losses, stochastic_precision=precision
    )


def variants() -> dict[str, keras.Model]:
    """The float network and what is compared with it."""

    def network():
        return models.preact_resnet(FLAGS.depth, width=FLAGS.width)

    model = network()
    composed = tfl.quantizers.DoReFaActivationQuantizer(implementation="composed")
    return {
        "float": model,
        "DoReFa W2A2": quantized(model),
        "DoReFa W2A2, composed": quantized(model, composed),
        "PACT activations": quantized(model, "pact"),
        "LSQ activations": quantized(model, "lsq"),
        "LSQ W2A2": quantized(model, "lsq", "lsq"),
        "recipes.low_bit W2A2": recipe(model),
        "trainer without options": trainer(model),
        "stochastic precision, layers": trainer(model, unit="layer"),
        "stochastic precision, blocks": trainer(model, unit="block"),
        "joint distillation": trainer(model, network()),
        "joint distillation, hints": trainer(model, network(), hints="stages"),
        "frozen teacher": trainer(model, network(), train="frozen"),
    }


def measure() -> list[dict]:
    """For each comparison: names, median, least and largest ratio."""
    steps = {
        name: stepping.step_function(model, FLAGS.batch_size)
        for name, model in variants().items()
    }
    rounds = stepping.take_turns(steps, FLAGS.rounds, FLAGS.steps)
    for taken in rounds:
        for name, parts in SUMS.items():
            taken[name] = sum(taken[part] for part in parts)
    pairs = [(name, "float") for name in rounds[0] if name != "float"] + COMPARISONS
    return [stepping.compare(rounds, name, other) for name, other in pairs]


def main(argv):
    """Measures, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    keras.utils.set_random_seed(0)
    # One step function for each variant is meant, not the retracing it looks like.
    tf.get_logger().setLevel("ERROR")
    figures = measure()
    table = rich.table.Table(title="CPU time of a training step")
    for column in figures[0]:
        is_number = column not in ("step", "relative to")
        table.add_column(column, no_wrap=is_number)
    for figure in figures:
        table.add_row(*(str(value) for value in figure.values()))
    rich.console.Console().print(table)
    if FLAGS.output:
        stepping.write(FLAGS.output, {"ratios": figures}, __name__)


if __name__ == "__main__":
    app.run(main)
