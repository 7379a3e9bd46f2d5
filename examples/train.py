"""Trains a low-bitwidth network, from a float one or from scratch.

First a float network is trained (or read with --float_checkpoint), then it is
quantized and trained by one of the methods:

  plain  quantized weights and activations from the first step
  ts     two stages: quantized weights first, then activations too
  pq     progressive quantization: falling bits, by --ladder
  ts+pq  at each rung of the ladder weights first, then activations

The total of epochs is --epochs for every method, shared out over its stages.

Example, 2-bit weights and activations on the digits that scikit-learn holds:

  python examples/train.py --dataset=digits --model=preact_resnet8 \
      --weight_bits=2 --activation_bits=2 --method=ts --output_dir=runs/ts

The output folder gets float/ and quantized/, each with checkpoints, log.csv,
tensorboard/, model.h5 and result.json. The same command with --resume goes on
where a stopped run was.
"""

import os
from pathlib import Path

# Before TensorFlow is imported: its start-up notes would bury the progress bars.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import experiment
from absl import app, flags

import tf_lowbit as tfl
from tf_lowbit import datasets, models, quantizers
from tf_lowbit.compat import keras
from tf_lowbit.core.stages import DECAYS, DEFAULT_LADDER

FLAGS = flags.FLAGS

flags.DEFINE_enum("dataset", "digits", datasets.names(), "What to train on.")
flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of the data: IDX files for fashion_mnist, a TFDS folder for cifar10, "
    "cifar100 and imagenet2012. Empty for each data set's default.",
)
flags.DEFINE_integer("limit", None, "Use only so many examples, for a quick try.")
flags.DEFINE_string(
    "model",
    "preact_resnet8",
    f"The network: one of {', '.join(models.names())}.",
)
flags.DEFINE_integer(
    "width",
    None,
    "Channels of a ResNet's first stage; 16 (CIFAR) or 64 (ImageNet) without it.",
)
flags.DEFINE_enum("method", "plain", experiment.METHODS, "How to lower the precision.")
flags.DEFINE_integer("weight_bits", 2, "Bits of the weights, 1 to 8.")
flags.DEFINE_integer("activation_bits", 2, "Bits of the activations, 1 to 8.")
flags.DEFINE_enum(
    "weight_quantizer", "dorefa", quantizers.names("weight"), "Weight quantizer."
)
flags.DEFINE_enum(
    "activation_quantizer",
    "dorefa",
    quantizers.names("activation"),
    "Activation quantizer.",
)
flags.DEFINE_integer(
    "first_last_bits",
    None,
    "Bits of the first and the last layer; they stay float without this flag.",
)
flags.DEFINE_list(
    "ladder",
    [str(bits) for bits in DEFAULT_LADDER],
    "Falling bit-widths of the methods pq and ts+pq; 16 and 32 train unrounded.",
)
flags.DEFINE_integer("epochs", 20, "Epochs of the quantized training, in total.")
flags.DEFINE_float("learning_rate", 0.05, "At the start of each quantized stage.")
flags.DEFINE_enum("schedule", "cosine", DECAYS, "Learning rate within a stage.")
flags.DEFINE_integer(
    "float_epochs",
    20,
    "Epochs of the float training before it; 0 quantizes an untrained network.",
)
flags.DEFINE_float("float_learning_rate", 0.1, "Of the float training.")
flags.DEFINE_string(
    "float_checkpoint",
    None,
    "A float network's model.h5 or .weights.h5 to start from, instead of training one.",
)
flags.DEFINE_integer("batch_size", 128, "Images in a batch.")
flags.DEFINE_float("weight_decay", 1e-4, "Coupled L2 decay, as torch counts it.")
flags.DEFINE_bool("augment", True, "Whether to augment the training images.")
flags.DEFINE_integer(
    "seed", 0, "Of the initial weights, the order of the data and its augmentation."
)
flags.DEFINE_string("output_dir", "runs/train", "Where everything goes.")
flags.DEFINE_bool("resume", False, "Go on with a run that was stopped.")


def load_data(first_epoch: int) -> datasets.Dataset:
    """The flags' data set, its training part starting at an epoch."""
    return datasets.load(
        FLAGS.dataset,
        batch_size=FLAGS.batch_size,
        seed=FLAGS.seed,
        augment=FLAGS.augment,
        data_dir=FLAGS.data_dir,
        limit=FLAGS.limit,
        start_epoch=first_epoch,
    )


def build_float_model(data: datasets.Dataset) -> keras.Model:
    """The flags' network, untrained."""
    arguments = {} if FLAGS.width is None else {"width": FLAGS.width}
    if arguments and FLAGS.model == "alexnet":
        raise ValueError(
            f"--width is for residual networks. Received: --model={FLAGS.model}"
        )
    return models.get(
        FLAGS.model,
        classes=data.classes,
        input_shape=data.input_shape,
        weight_decay=FLAGS.weight_decay,
        **arguments,
    )


def rules() -> list[tfl.PrecisionRule]:
    """The flags' precision rules."""
    chosen = {
        "weight_quantizer": FLAGS.weight_quantizer,
        "activation_quantizer": FLAGS.activation_quantizer,
    }
    inner = tfl.PrecisionRule(".*", FLAGS.weight_bits, FLAGS.activation_bits, **chosen)
    if FLAGS.first_last_bits is None:
        return [inner]
    edge = FLAGS.first_last_bits
    return [tfl.PrecisionRule("stem|head", edge, edge, **chosen), inner]


def train_float(model: keras.Model, folder: Path) -> None:
    """Gives the float model its weights, from a file or by training."""
    if FLAGS.float_checkpoint:
        model.load_weights(FLAGS.float_checkpoint)
        return
    if not FLAGS.float_epochs:
        return
    experiment.compile_model(model, FLAGS.float_learning_rate)
    stage = tfl.Stage(
        FLAGS.float_epochs,
        learning_rate=FLAGS.float_learning_rate,
        decay=FLAGS.schedule,
    )
    outcome = experiment.train(model, load_data, [stage], folder, resume=FLAGS.resume)
    experiment.write_result(folder, outcome, experiment.flag_settings(__name__))
    print(f"Float network: test accuracy {outcome.accuracy:.4f}")


def stages() -> list[tfl.Stage]:
    """The flags' stages of the quantized training."""
    if not all(rung.strip().isdigit() for rung in FLAGS.ladder):
        raise ValueError(
            "--ladder must be falling bit-widths, such as 8,4,2. "
            f"Received: {','.join(FLAGS.ladder)!r}"
        )
    return experiment.stages_for(
        FLAGS.method,
        (FLAGS.weight_bits, FLAGS.activation_bits),
        FLAGS.epochs,
        FLAGS.learning_rate,
        FLAGS.schedule,
        tuple(int(rung) for rung in FLAGS.ladder),
    )


def train_quantized(
    model: keras.Model,
    precision: list[tfl.PrecisionRule],
    schedule: list[tfl.Stage],
    folder: Path,
) -> experiment.Outcome:
    """Quantizes the float model and trains the result."""
    quantized = tfl.quantize(model, precision)
    tfl.calibrate(quantized, load_data(0).train)
    experiment.compile_model(quantized, FLAGS.learning_rate)
    outcome = experiment.train(
        quantized, load_data, schedule, folder, resume=FLAGS.resume
    )
    print(tfl.summary(quantized))
    return outcome


def main(argv):
    """Trains a float network, quantizes it, trains that, and writes the results."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    experiment.quiet()
    # Made first: what is wrong with the flags is said before any training.
    precision, schedule = rules(), stages()
    output = experiment.require_writable(Path(FLAGS.output_dir))
    keras.utils.set_random_seed(FLAGS.seed)
    model = build_float_model(load_data(0))
    train_float(model, output / "float")
    outcome = train_quantized(model, precision, schedule, output / "quantized")
    path = experiment.write_result(
        output / "quantized", outcome, experiment.flag_settings(__name__)
    )
    print(f"Quantized network: test accuracy {outcome.accuracy:.4f}")
    print(f"Written: {path}")


if __name__ == "__main__":
    app.run(main)
