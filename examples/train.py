r"""Trains a low-bitwidth network, from a float one or from scratch.

The program trains a float network or reads it from a file. Then it quantizes the
network and trains the result by one of these methods:

  plain  quantizes weights and activations from the first step
  ts     two stages: quantizes the weights first, then the activations too
  pq     progressive quantization: falling bits, by --ladder
  ts+pq  at each rung of the ladder the weights first, then the activations
  sp     stochastic precision: quantizes random parts, with rising probability

With --distill the float network is the teacher:

  joint   teacher and student learn from the labels and from each other
  task    the teacher learns from the labels only
  frozen  the teacher is not trained

--epochs is the total for every method. It is divided among the method's stages.

Example, 2-bit weights and activations on scikit-learn's digits:

  python examples/train.py --dataset=digits --model=preact_resnet8 \
      --weight_bits=2 --activation_bits=2 --method=ts --output_dir=runs/ts

Stochastic precision and joint distillation together, on all GPUs of the machine:

  python examples/train.py --method=sp --distill=joint --output_dir=runs/sp-jkd

A network of your own, from a file of Keras 2 or 3, and a report on the result:

  python examples/train.py --float_model=mine.keras --dataset=cifar10 --report

The settings of a published recipe, from a file (examples/configs/ has more):

  python examples/train.py --flagfile=examples/configs/cifar100_resnet20_jkd.flags

The output folder gets float/ and quantized/, each with settings.json, checkpoints,
log.csv, tensorboard/, model.keras and result.json. To continue a stopped run, add
--resume to the same command.
"""

import importlib.util
import re
from pathlib import Path

import command_line
from absl import app, flags

FLAGS = flags.FLAGS

# Names of the library, copied so that flags are checked before it is imported.
DATASETS = (
    *("cifar10", "cifar100", "digits", "fashion_mnist", "imagenet2012", "synthetic"),
)
MODELS = (
    *("preact_resnet8", "preact_resnet14", "preact_resnet20", "preact_resnet32"),
    *("preact_resnet44", "preact_resnet56", "preact_resnet110", "postact_resnet20"),
    *("preact_resnet18", "resnet18", "resnet50", "alexnet", "plain_cnn"),
    "mobilenet_v2",
)
WEIGHT_QUANTIZERS = ("dorefa", "lsq", "statsq", "uniform")
ACTIVATION_QUANTIZERS = ("dorefa", "lsq", "pact", "uniform")
METHODS = ("plain", "ts", "pq", "ts+pq", "sp")
DISTILLATIONS = ("none", "joint", "task", "frozen")
DECAYS = ("constant", "cosine", "step")
STRATEGIES = ("auto", "one", "mirrored", "multi_worker")

# Title -> the first flag of the group, for --help.
GROUPS = {
    "Data": "dataset",
    "Network": "model",
    "Bits": "weight_bits",
    "Method": "method",
    "Distillation": "distill",
    "Quantized training": "epochs",
    "Float training": "float_epochs",
    "Output": "output_dir",
    "Devices": "strategy",
}

flags.DEFINE_enum("dataset", "digits", DATASETS, "Data set to train on.")
flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of the data: IDX files for fashion_mnist, a TFDS folder for cifar10, "
    "cifar100 and imagenet2012. Each data set has a default.",
)
flags.DEFINE_integer(
    "limit", None, "Largest number of examples, for a quick try.", lower_bound=1
)
flags.DEFINE_integer(
    "batch_size",
    128,
    "Images in a batch, over all devices together.",
    lower_bound=1,
)
flags.DEFINE_bool("augment", True, "Whether to augment the training images.")

flags.DEFINE_string(
    "model",
    "preact_resnet8",
    f"The network: {', '.join(MODELS)}, or another depth of preact_resnet<depth> and "
    "postact_resnet<depth>.",
)
flags.DEFINE_integer(
    "width",
    None,
    "Channels of the network's first stage; by default 16, or 64 for ImageNet's.",
    lower_bound=1,
)
flags.DEFINE_float("weight_decay", 1e-4, "Coupled weight decay, as in torch.")
flags.DEFINE_string(
    "float_model",
    None,
    "A float network of your own instead of --model: a .keras or .h5 file of Keras 2 "
    "or 3, or a SavedModel of Keras 2. It must take the data set's images and output "
    "logits; without --distill it may end in a softmax. It is not trained before "
    "quantization, unless you give --float_epochs.",
)
flags.DEFINE_string(
    "float_checkpoint",
    None,
    "Weights of --model to start from, instead of training it: a float run's "
    "model.keras, or an .h5 or .weights.h5 file.",
)
flags.DEFINE_enum(
    "policy",
    "float32",
    ("float32", "mixed_float16", "mixed_bfloat16"),
    "Keras's precision policy of convolutions; quantizers compute in float32.",
)

flags.DEFINE_integer(
    "weight_bits", 2, "Bits of the weights.", lower_bound=1, upper_bound=8
)
flags.DEFINE_integer(
    "activation_bits", 2, "Bits of the activations.", lower_bound=1, upper_bound=8
)
flags.DEFINE_integer(
    "first_last_bits",
    None,
    "Bits of the first and the last layer; they stay float without this flag.",
    lower_bound=1,
    upper_bound=8,
)
flags.DEFINE_integer(
    "residual_bits",
    None,
    "8 trains residual sums as the integer file computes them; by default float.",
)
flags.DEFINE_enum("weight_quantizer", "dorefa", WEIGHT_QUANTIZERS, "Weight quantizer.")
flags.DEFINE_enum(
    "activation_quantizer", "dorefa", ACTIVATION_QUANTIZERS, "Activation quantizer."
)

flags.DEFINE_enum("method", "plain", METHODS, "Method of the quantized training.")
flags.DEFINE_list(
    "ladder",
    ["8", "4", "2"],
    "Falling bit-widths of the methods pq and ts+pq; 16 and 32 do not round. The "
    "paper's, for training from scratch, are 32,16,8,4,2.",
)
flags.DEFINE_bool(
    "last_only",
    False,
    "Whether only the last rung of ts+pq has two stages.",
)
flags.DEFINE_enum(
    "sp_unit", "layer", ("layer", "block"), "Unit that the method sp draws."
)
flags.DEFINE_float(
    "sp_start", 0.5, "Probability of quantization at the start of the method sp."
)

flags.DEFINE_enum(
    "distill",
    "none",
    DISTILLATIONS,
    "Role of the float network as the teacher; none for no teacher.",
)
flags.DEFINE_enum(
    "distill_target", "posteriors", ("posteriors", "logits"), "Outputs to match."
)
flags.DEFINE_float(
    "task_weight",
    None,
    "Weight of the labels in the student's loss; by default 0.7, or 0.3 for logits.",
)
flags.DEFINE_float(
    "distillation_weight",
    None,
    "Weight of the teacher's outputs in the student's loss; by default 0.7, or 0.1 for "
    "logits.",
)
flags.DEFINE_float(
    "teacher_task_weight",
    None,
    "Weight of the labels in the teacher's loss; by default 1.",
)
flags.DEFINE_float(
    "teacher_distillation_weight",
    None,
    "Weight of the student's outputs in the teacher's loss; by default 0.5, or 0.1 for "
    "logits.",
)
flags.DEFINE_bool(
    "hints", False, "Whether features of the last two resolutions are matched too."
)
flags.DEFINE_float(
    "teacher_learning_rate",
    None,
    "Learning rate of the teacher at the start, by default --learning_rate. It decays "
    "by --schedule over all epochs.",
)

flags.DEFINE_integer(
    "epochs",
    20,
    "Total epochs of the quantized training; 0 trains only the float network.",
    lower_bound=0,
)
flags.DEFINE_float(
    "learning_rate", 0.1, "Learning rate at the start of each quantized stage."
)
flags.DEFINE_enum("schedule", "cosine", DECAYS, "Decay of the rate within a stage.")
flags.DEFINE_list(
    "milestones",
    ["0.3", "0.6"],
    "Rising shares of each stage at which --schedule=step multiplies the learning rate "
    "by 0.1, such as 0.3,0.6 or 15/30,25/30.",
)
flags.DEFINE_float(
    "warmup",
    0.1,
    "Share of each quantized stage during which the learning rate rises from 0. For "
    "the teacher, a share of the whole training.",
)
flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the initial weights, the order of the data and its augmentation.",
    lower_bound=0,
    upper_bound=2**32 - 1,  # NumPy's limit.
)

flags.DEFINE_integer(
    "float_epochs",
    20,
    "Epochs of the float training before the quantized one; 0 skips it. With "
    "--float_model the default is 0.",
    lower_bound=0,
)
flags.DEFINE_float(
    "float_learning_rate", 0.1, "Learning rate at the start of the float training."
)

flags.DEFINE_string("output_dir", "runs/train", "Folder for all files.")
flags.DEFINE_bool("resume", False, "Continue a stopped run.")
flags.DEFINE_integer(
    "save_every",
    None,
    "Steps between checkpoints; by default one per epoch.",
    lower_bound=1,
)
flags.DEFINE_bool(
    "report", False, "Write report.html, a report on the low-bit network."
)

flags.DEFINE_enum(
    "strategy",
    "auto",
    STRATEGIES,
    "Devices: one, mirrored over all GPUs of the machine, or multi_worker by "
    "TF_CONFIG; auto uses all that exist.",
)
flags.DEFINE_integer(
    "logical_cpus",
    1,
    "Devices to split the CPU into, to try mirrored without GPUs.",
    lower_bound=1,
)
flags.DEFINE_bool("jit_compile", False, "Compile the training steps with XLA.")

flags.register_validator(
    "model",
    lambda name: name in MODELS or re.fullmatch(r"(pre|post)act_resnet\d+", name),
    f"--model must be one of {', '.join(MODELS)}, or another preact_resnet<depth> or "
    "postact_resnet<depth>",
)
flags.register_validator(
    "residual_bits", lambda bits: bits in (None, 8), "--residual_bits must be 8"
)
flags.register_validator(
    "ladder",
    lambda rungs: all(rung.strip().isdigit() for rung in rungs),
    "--ladder must be falling bit-widths, such as 8,4,2",
)

# Without effect if --epochs=0, like all flags that depend on them.
_QUANTIZED_TRAINING = (
    *("method", "distill", "learning_rate", "warmup", "report"),
    *("first_last_bits", "residual_bits"),
    *("weight_bits", "activation_bits", "weight_quantizer", "activation_quantizer"),
)
# Without effect with --float_model, whose network has its own.
_OF_A_MODEL = ("model", "width", "weight_decay", "policy", "float_checkpoint")


def has_float_training() -> bool:
    """Tells whether the flags ask for a float training."""
    return FLAGS.float_checkpoint is None and FLAGS.float_epochs != 0


def check_flags() -> None:
    """Refuses missing files, and flags without effect.

    Raises:
        ValueError: If a flag has no effect or its value is invalid.
        FileNotFoundError: If a file does not exist.
    """
    if FLAGS.float_checkpoint == "":
        raise ValueError(
            "--float_checkpoint must name the file of a float network; a recipe that "
            "leaves it empty starts from a pretrained one. Received: ''"
        )
    for name in ("data_dir", "float_model", "float_checkpoint"):
        path = FLAGS[name].value
        is_local = path is not None and "://" not in path
        if is_local and path and not Path(path).expanduser().exists():
            raise FileNotFoundError(f"--{name} must exist. Received: {path!r}")
    needed = ("jinja2", "matplotlib")
    if FLAGS.report and not all(map(importlib.util.find_spec, needed)):
        raise ValueError(
            "--report needs matplotlib and Jinja: pip install '.[report]'. "
            "Received: an environment without them"
        )
    if FLAGS.float_model is not None and not FLAGS["float_epochs"].present:
        FLAGS.float_epochs = 0
    if not (has_float_training() or FLAGS.epochs):
        raise ValueError(
            "There must be something to train. Received: --epochs=0 with "
            f"--float_epochs={FLAGS.float_epochs}, "
            f"--float_checkpoint={FLAGS.float_checkpoint}"
        )
    without_teacher = FLAGS.distill == "none"
    idle = {
        **dict.fromkeys(_QUANTIZED_TRAINING, not FLAGS.epochs),
        "sp_unit": FLAGS.method != "sp",
        "sp_start": FLAGS.method != "sp",
        "distill_target": without_teacher,
        "hints": without_teacher,
        "task_weight": without_teacher,
        "distillation_weight": without_teacher,
        "teacher_task_weight": FLAGS.distill in ("none", "frozen"),
        "teacher_distillation_weight": FLAGS.distill != "joint",
        "teacher_learning_rate": FLAGS.distill in ("none", "frozen"),
        "ladder": FLAGS.method not in ("pq", "ts+pq"),
        "last_only": FLAGS.method != "ts+pq",
        "milestones": FLAGS.schedule != "step",
        "logical_cpus": FLAGS.strategy != "mirrored",
        "float_epochs": FLAGS.float_checkpoint is not None,
        "float_learning_rate": not has_float_training(),
        **dict.fromkeys(_OF_A_MODEL, FLAGS.float_model is not None),
    }
    given = [n for n, is_idle in idle.items() if is_idle and FLAGS[n].present]
    if given:
        raise ValueError(
            "A flag must have an effect. Received: "
            f"{', '.join(f'--{name}' for name in given)} with "
            f"--method={FLAGS.method}, --distill={FLAGS.distill}, "
            f"--strategy={FLAGS.strategy}, --schedule={FLAGS.schedule}, "
            f"--epochs={FLAGS.epochs}, --float_epochs={FLAGS.float_epochs}, "
            f"--float_checkpoint={FLAGS.float_checkpoint}, "
            f"--float_model={FLAGS.float_model}"
        )


def main(argv):
    """Checks the flags and runs the training."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    check_flags()
    # Imported late: TensorFlow takes ten seconds.
    import quiet_start  # noqa: F401 (before TensorFlow)

    # isort: split
    import experiment
    import recipe

    recipe.run(experiment.flag_settings(__name__))


if __name__ == "__main__":
    command_line.run(main, GROUPS)
