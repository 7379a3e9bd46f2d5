"""CPU time of a quantized training step, as a ratio to the float step in one run.

  python benchmarks/step_cost.py --rounds=7 --output=benchmarks/results/step_cost.json

The variants take turns, round by round, in one process, so that the machine's drift
hits all of them; each figure is the median over the rounds of the ratio to the float
step of the same round, with the smallest and the largest ratio beside it.
"""

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import rich.console
import rich.table
from absl import app, flags

import tf_lowbit as tfl
from tf_lowbit import models
from tf_lowbit.compat import keras, tf

FLAGS = flags.FLAGS

flags.DEFINE_integer("depth", 20, "Depth of the CIFAR pre-activation ResNet, 6n+2.")
flags.DEFINE_integer("width", 16, "Channels of its first stage.")
flags.DEFINE_integer("batch_size", 128, "Images in a batch.")
flags.DEFINE_integer("steps", 3, "Steps in a round.")
flags.DEFINE_integer("rounds", 7, "Rounds that count; one more warms up.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")


def quantized(model, activation):
    """A W2A2 network with one activation quantizer."""
    rule = tfl.PrecisionRule(".*", 2, 2, activation_quantizer=activation)
    return tfl.quantize(model, [rule])


def variants() -> dict[str, keras.Model]:
    """The float network and what is compared with it."""
    model = models.preact_resnet(FLAGS.depth, width=FLAGS.width)
    q = tfl.quantizers
    return {
        "float": model,
        "DoReFa W2A2, fused": quantized(model, "dorefa"),
        "DoReFa W2A2, composed": quantized(
            model, q.DoReFaActivationQuantizer(implementation="composed")
        ),
        "PACT activations, fused": quantized(model, "pact"),
        "LSQ activations, fused": quantized(model, "lsq"),
    }


def step_function(model):
    """A compiled training step on one fixed batch."""
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(FLAGS.batch_size, 32, 32, 3)), tf.float32)
    y = tf.constant(rng.integers(10, size=FLAGS.batch_size))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = tf.reduce_mean(
                keras.losses.sparse_categorical_crossentropy(y, logits, True)
            )
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(
            zip(gradients, model.trainable_variables, strict=True)
        )
        return loss

    return step


def cpu_seconds(step) -> float:
    """CPU time of a round, over all threads of the process."""
    start = time.process_time()
    for _ in range(FLAGS.steps):
        step().numpy()
    return time.process_time() - start


def measure() -> dict[str, dict[str, float]]:
    """Name -> median, least and largest ratio to float."""
    steps = {name: step_function(model) for name, model in variants().items()}
    rounds = [
        {name: cpu_seconds(step) for name, step in steps.items()}
        for _ in range(FLAGS.rounds + 1)
    ][1:]
    figures = {}
    for name in steps:
        ratios = np.array([r[name] / r["float"] for r in rounds])
        figures[name] = {
            "median": round(float(np.median(ratios)), 3),
            "least": round(float(ratios.min()), 3),
            "largest": round(float(ratios.max()), 3),
        }
    return figures


def main(argv):
    """Measures, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    keras.utils.set_random_seed(0)
    # One step function for each variant is meant, not the retracing it looks like.
    tf.get_logger().setLevel("ERROR")
    figures = measure()
    table = rich.table.Table(title="CPU time of a training step, float = 1")
    for column in ("network", "median", "least", "largest"):
        table.add_column(column, no_wrap=True)
    for name, ratio in figures.items():
        table.add_row(name, *(f"{value:.3f}" for value in ratio.values()))
    rich.console.Console().print(table)
    if FLAGS.output:
        own = FLAGS.get_key_flags_for_module(__name__)
        result = {
            "ratios": figures,
            "settings": {flag.name: flag.value for flag in own},
            "versions": {
                "python": platform.python_version(),
                **{p: metadata.version(p) for p in ("tensorflow", "tf-keras")},
            },
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        }
        Path(FLAGS.output).parent.mkdir(parents=True, exist_ok=True)
        Path(FLAGS.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
