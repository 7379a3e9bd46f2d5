"""The main job, on real data that needs no download.

Trains a float pre-activation ResNet on the digits that scikit-learn holds, makes
2-bit networks of it by plain fine-tuning, two-stage and progressive training,
stochastic precision and joint distillation with the same total of epochs, and a 4-bit
one, and prints a table.

  python examples/demo.py
"""

import os
from pathlib import Path

# Before TensorFlow is imported: its start-up notes would bury the progress bars.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import shutil

import experiment
import rich.console
import rich.table
from absl import app, flags

import tf_lowbit as tfl
from tf_lowbit import datasets, models
from tf_lowbit.compat import keras

FLAGS = flags.FLAGS

flags.DEFINE_integer("float_epochs", 30, "Epochs of the float training.")
flags.DEFINE_integer("epochs", 30, "Epochs of each quantized training, in total.")
flags.DEFINE_integer("width", 16, "Channels of the network's first stage.")
flags.DEFINE_integer("batch_size", 32, "Images in a batch.")
flags.DEFINE_float("float_learning_rate", 0.1, "Of the float training.")
flags.DEFINE_float("learning_rate", 0.02, "At the start of each quantized stage.")
flags.DEFINE_integer("seed", 0, "Of the initial weights and the data's order.")
flags.DEFINE_string(
    "output_dir", "runs/demo", "Where the networks go; an earlier demo is replaced."
)

LADDER = (8, 4, 2)
# Label, method, distillation, and bits of weights and activations.
NETWORKS = (
    ("W2A2 plain", "plain", "none", (2, 2)),
    ("W2A2 two-stage", "ts", "none", (2, 2)),
    ("W2A2 progressive", "pq", "none", (2, 2)),
    ("W2A2 stochastic", "sp", "none", (2, 2)),
    ("W2A2 distilled", "plain", "joint", (2, 2)),
    ("W4A4 plain", "plain", "none", (4, 4)),
)


def load_data(first_epoch: int = 0, first_step: int = 0) -> datasets.Dataset:
    """The digits, the training part starting at an epoch and a step."""
    return datasets.load(
        "digits",
        batch_size=FLAGS.batch_size,
        seed=FLAGS.seed,
        start_epoch=first_epoch,
        start_step=first_step,
    )


def train_float(folder: Path) -> tuple[keras.Model, experiment.Outcome]:
    """Trains the float network that all others start from."""
    data = load_data()
    model = models.preact_resnet(
        8, width=FLAGS.width, classes=data.classes, input_shape=data.input_shape
    )
    experiment.compile_model(model, FLAGS.float_learning_rate)
    stage = tfl.Stage(
        FLAGS.float_epochs, learning_rate=FLAGS.float_learning_rate, decay="cosine"
    )
    return model, experiment.train(model, load_data, [stage], folder, label="float")


def train_quantized(
    model: keras.Model,
    label: str,
    method: str,
    distill: str,
    bits: tuple[int, int],
    folder: Path,
) -> experiment.Outcome:
    """Quantizes the float network and trains the result by one method."""
    rule = tfl.PrecisionRule(".*", weight_bits=bits[0], activation_bits=bits[1])
    # A copy teaches: the other networks start from the float one as it is.
    teacher = keras.models.clone_model(model)
    teacher.set_weights(model.get_weights())
    trainer = experiment.trainer_for(
        tfl.quantize(model, [rule]), teacher, method, distill, seed=FLAGS.seed
    )
    experiment.compile_model(
        trainer,
        FLAGS.learning_rate,
        teacher_optimizer=experiment.teacher_optimizer(
            distill,
            FLAGS.learning_rate,
            "cosine",
            FLAGS.epochs * load_data().steps_per_epoch,
        ),
    )
    stages = experiment.stages_for(
        method, bits, FLAGS.epochs, FLAGS.learning_rate, "cosine", LADDER
    )
    return experiment.train(trainer, load_data, stages, folder, label=label)


def results_table(rows) -> rich.table.Table:
    """The table of (label, bits, outcome, folder)."""
    table = rich.table.Table(title="scikit-learn digits, pre-activation ResNet-8")
    for column in ("network", "W / A bits"):
        table.add_column(column, no_wrap=True)
    for column in ("test accuracy", "weight bytes", "epochs", "seconds"):
        table.add_column(column, justify="right")
    for label, bits, outcome, _ in rows:
        table.add_row(
            label,
            bits,
            f"{100 * outcome.accuracy:.2f} %",
            f"{outcome.cost.weight_bytes:,}",
            str(outcome.epochs),
            f"{outcome.seconds:.0f}",
        )
    return table


def main(argv):
    """Runs the demo."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    experiment.quiet()
    output = experiment.require_writable(Path(FLAGS.output_dir))
    keras.utils.set_random_seed(FLAGS.seed)
    settings = experiment.flag_settings(__name__)
    rows = []
    folder = fresh(output / "float")
    model, outcome = train_float(folder)
    experiment.write_result(folder, outcome, settings)
    rows.append(("float", "32 / 32", outcome, folder))
    for label, method, distill, bits in NETWORKS:
        folder = fresh(output / label.replace(" ", "-").lower())
        outcome = train_quantized(model, label, method, distill, bits, folder)
        experiment.write_result(folder, outcome, settings)
        rows.append((label, f"{bits[0]} / {bits[1]}", outcome, folder))
    console = rich.console.Console()
    console.print(results_table(rows))
    console.print("Each folder holds model.h5, log.csv, result.json and tensorboard/:")
    for *_, folder in rows:
        console.print(f"  {folder}", highlight=False)


def fresh(folder: Path) -> Path:
    """An empty folder, in place of what an earlier demo left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return experiment.require_writable(folder)


if __name__ == "__main__":
    app.run(main)
