"""Joint distillation in short: trains a float teacher and a 2-bit student together.

Both start from the same float network. In each step both see the same batch, and learn
from the labels and from each other. For scikit-learn's digits:

  python examples/distill.py --epochs=20

`train.py` has all methods, checkpoints and records.
"""

from pathlib import Path

import quiet_start  # noqa: F401 (before TensorFlow)

# isort: split
import command_line
import experiment
from absl import app, flags

import tf_lowbit as tfl
from tf_lowbit import datasets, models
from tf_lowbit.compat import keras
from tf_lowbit.core.files import replaced

FLAGS = flags.FLAGS

flags.DEFINE_enum("dataset", "digits", datasets.names(), "Data set to train on.")
flags.DEFINE_string("model", "preact_resnet8", "Network of teacher and student.")
flags.DEFINE_integer("bits", 2, "Bits of the student's weights and activations.")
flags.DEFINE_integer(
    "float_epochs", 20, "Epochs of the float training before it.", lower_bound=1
)
flags.DEFINE_integer("epochs", 20, "Epochs of the joint training.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.02, "Learning rate at the start of a training.")
flags.DEFINE_integer("batch_size", 32, "Images in a batch.")
flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the initial weights and the order of the data.",
    lower_bound=0,
    upper_bound=experiment.LARGEST_SEED,
)
flags.DEFINE_string("output_dir", "runs/distill", "Folder for student.keras.")

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def sgd(steps: int) -> keras.optimizers.Optimizer:
    """Makes SGD with momentum, whose learning rate falls to 0 in `steps`."""
    rate = keras.optimizers.schedules.CosineDecay(FLAGS.learning_rate, steps)
    return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)


def main(argv):
    """Trains the float network, then teacher and student, and saves the student."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    experiment.quiet()
    # Made first, so that errors come before any training.
    rule = tfl.PrecisionRule(".*", weight_bits=FLAGS.bits, activation_bits=FLAGS.bits)
    output = experiment.require_writable(Path(FLAGS.output_dir)) / "student.keras"
    keras.utils.set_random_seed(FLAGS.seed)
    data = datasets.load(FLAGS.dataset, batch_size=FLAGS.batch_size, seed=FLAGS.seed)
    epoch = {"steps_per_epoch": data.steps_per_epoch, "validation_data": data.test}

    teacher = models.get(
        FLAGS.model, classes=data.classes, input_shape=data.input_shape
    )
    steps = FLAGS.float_epochs * data.steps_per_epoch
    teacher.compile(sgd(steps), LOSS, metrics=["accuracy"])
    teacher.fit(data.train, epochs=FLAGS.float_epochs, **epoch)

    student = tfl.quantize(teacher, [rule])
    tfl.calibrate(student, data.train)
    trainer = tfl.LowBitTrainer(student, teacher, distillation=tfl.JointDistillation())
    steps = FLAGS.epochs * data.steps_per_epoch
    trainer.compile(
        sgd(steps), LOSS, metrics=["accuracy"], teacher_optimizer=sgd(steps)
    )
    trainer.fit(data.train, epochs=FLAGS.epochs, **epoch)

    # Evaluates the fully quantized student.
    _, accuracy = trainer.evaluate(data.test, verbose=0)
    with replaced(output) as path:
        student.save(path)
    print(f"{FLAGS.bits}-bit student: test accuracy {accuracy:.4f}, in {output}")


if __name__ == "__main__":
    command_line.run(main)
