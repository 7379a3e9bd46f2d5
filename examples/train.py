"""Trains a low-bitwidth network, from a float one or from scratch.

First a float network is trained (or read with --float_checkpoint), then it is
quantized and trained by one of the methods:

  plain  quantized weights and activations from the first step
  ts     two stages: quantized weights first, then activations too
  pq     progressive quantization: falling bits, by --ladder
  ts+pq  at each rung of the ladder weights first, then activations
  sp     stochastic precision: sampled parts are quantized, ever more of them

and, with --distill, jointly with the float network as its teacher:

  joint   teacher and student learn from the labels and from one another
  task    the teacher goes on learning from the labels only
  frozen  the teacher stays as it is

The total of epochs is --epochs for every method, shared out over its stages.

Example, 2-bit weights and activations on the digits that scikit-learn holds:

  python examples/train.py --dataset=digits --model=preact_resnet8 \
      --weight_bits=2 --activation_bits=2 --method=ts --output_dir=runs/ts

Stochastic precision and joint distillation together, on all GPUs of the machine:

  python examples/train.py --method=sp --distill=joint --output_dir=runs/sp-jkd

The settings of a published recipe, from a file (examples/configs/ has more):

  python examples/train.py --flagfile=examples/configs/cifar100_resnet20_jkd.flags

The output folder gets float/ and quantized/, each with settings.json, checkpoints,
log.csv, tensorboard/, model.h5 and result.json. The same command with --resume goes on
where a stopped run was.
"""

import fractions
import os
from pathlib import Path

# Before TensorFlow is imported: its start-up notes would bury the progress bars.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import devices
import experiment
from absl import app, flags

import tf_lowbit as tfl
from tf_lowbit import datasets, models, quantizers
from tf_lowbit.compat import keras, tf
from tf_lowbit.core.stages import DECAYS, STEP_MILESTONES

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
    "Channels of the network's first stage; 16, or 64 for ImageNet's, without it.",
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
flags.DEFINE_integer(
    "residual_bits",
    None,
    "8 trains residual sums as the integer file will compute them; float without it.",
)
flags.DEFINE_list(
    "ladder",
    ["8", "4", "2"],
    "Falling bit-widths of the methods pq and ts+pq; 16 and 32 train unrounded. The "
    "paper's is 32,16,8,4,2, for trainings from scratch.",
)
flags.DEFINE_bool(
    "last_only",
    False,
    "Whether ts+pq takes weights and activations apart only at the last rung.",
)
flags.DEFINE_enum(
    "sp_unit", "layer", ("layer", "block"), "What the method sp draws as one."
)
flags.DEFINE_float(
    "sp_start", 0.5, "Probability of quantization at the start of the method sp."
)
flags.DEFINE_enum(
    "distill",
    "none",
    experiment.DISTILLATIONS,
    "Whether the float network teaches the low-bit one, and learns itself.",
)
flags.DEFINE_enum(
    "distill_target", "posteriors", ("posteriors", "logits"), "What is matched."
)
flags.DEFINE_float(
    "task_weight", None, "Of the labels in the student's loss; 0.7, or 0.3 for logits."
)
flags.DEFINE_float(
    "distillation_weight",
    None,
    "Of the teacher's outputs in the student's loss; 0.7, or 0.1 for logits.",
)
flags.DEFINE_float(
    "teacher_task_weight", None, "Of the labels in the teacher's loss; 1."
)
flags.DEFINE_float(
    "teacher_distillation_weight",
    None,
    "Of the student's outputs in the teacher's loss; 0.5, or 0.1 for logits.",
)
flags.DEFINE_bool(
    "hints", False, "Whether features of the last two stages are matched too."
)
flags.DEFINE_float(
    "teacher_learning_rate",
    None,
    "At the start, decaying by --schedule over all epochs; --learning_rate without it.",
)
flags.DEFINE_integer(
    "epochs",
    20,
    "Epochs of the quantized training, in total; 0 trains the float network alone.",
)
flags.DEFINE_float("learning_rate", 0.1, "At the start of each quantized stage.")
flags.DEFINE_enum("schedule", "cosine", DECAYS, "Learning rate within a stage.")
flags.DEFINE_list(
    "milestones",
    [str(share) for share in STEP_MILESTONES],
    "Where --schedule=step takes the learning rate x 0.1: rising shares of each stage, "
    "such as 0.3,0.6 or 15/30,25/30.",
)
flags.DEFINE_float(
    "warmup",
    0.1,
    "Share of each quantized stage in which the learning rate rises from 0; of the "
    "whole training for the teacher's.",
)
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
flags.DEFINE_integer("batch_size", 128, "Images in a batch, over all devices together.")
flags.DEFINE_float("weight_decay", 1e-4, "Coupled L2 decay, as torch counts it.")
flags.DEFINE_bool("augment", True, "Whether to augment the training images.")
flags.DEFINE_integer(
    "seed",
    0,
    "Of the initial weights, the order of the data and its augmentation.",
    lower_bound=0,
    upper_bound=experiment.LARGEST_SEED,
)
flags.DEFINE_string("output_dir", "runs/train", "Where everything goes.")
flags.DEFINE_bool("resume", False, "Go on with a run that was stopped.")
flags.DEFINE_integer(
    "save_every", None, "Steps between checkpoints; without it one an epoch."
)
flags.DEFINE_enum(
    "strategy",
    "auto",
    devices.STRATEGIES,
    "Devices: one, mirrored over all GPUs of the machine, or multi_worker through "
    "TF_CONFIG; auto takes what there is.",
)
flags.DEFINE_integer(
    "logical_cpus", 1, "Devices to split the CPU into, to try mirrored without GPUs."
)
flags.DEFINE_enum(
    "policy",
    "float32",
    ("float32", "mixed_float16", "mixed_bfloat16"),
    "Keras's precision policy of convolutions; quantizers compute in float32.",
)
flags.DEFINE_bool("jit_compile", False, "Compile the training steps with XLA.")


# Where the data are, and how the work is done, not what: a run may go on with others.
_FREE = ("data_dir", "save_every", "strategy", "logical_cpus", "jit_compile")
# All that the float training depends on; the quantized one depends on all flags.
_FLOAT_TRAINING = (
    *("dataset", "limit", "augment", "batch_size", "seed", "policy"),
    *("model", "width", "weight_decay", "schedule", "milestones"),
    *("float_epochs", "float_learning_rate"),
)
# With --epochs=0 none of them has an effect; flags that depend on these do not either.
_QUANTIZED_TRAINING = (
    *("method", "distill", "learning_rate", "warmup"),
    *("first_last_bits", "residual_bits"),
    *("weight_bits", "activation_bits", "weight_quantizer", "activation_quantizer"),
)
# Of the losses of teacher and student, with their defaults in `JointDistillation`.
_LOSS_WEIGHTS = (
    *("task_weight", "distillation_weight"),
    *("teacher_task_weight", "teacher_distillation_weight"),
)


def load_data(first_epoch: int = 0, first_step: int = 0) -> datasets.Dataset:
    """The flags' data set, its training part starting at an epoch and a step."""
    return datasets.load(
        FLAGS.dataset,
        batch_size=FLAGS.batch_size,
        seed=FLAGS.seed,
        augment=FLAGS.augment,
        data_dir=FLAGS.data_dir or None,
        limit=FLAGS.limit,
        start_epoch=first_epoch,
        start_step=first_step,
    )


def build_float_model(data: datasets.Dataset) -> keras.Model:
    """The flags' network, untrained."""
    arguments = {} if FLAGS.width is None else {"width": FLAGS.width}
    if arguments and FLAGS.model == "alexnet":
        raise ValueError(f"--width is not for alexnet. Received: --model={FLAGS.model}")
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


def binding_settings(part: str) -> dict:
    """The flags that must be the same in all sittings of a training, by name.

    Args:
        part: "float" or "quantized".
    """
    return {
        name: value
        for name, value in experiment.flag_settings(__name__).items()
        if name in _FLOAT_TRAINING or (part == "quantized" and name not in _FREE)
    }


def run(model: keras.Model, schedule: list[tfl.Stage], folder: Path):
    """Trains what was compiled, as the flags have it."""
    return experiment.train(
        model,
        load_data,
        schedule,
        folder,
        resume=FLAGS.resume,
        save_every=FLAGS.save_every,
        settings=binding_settings(folder.name),
    )


def write_result(folder: Path, outcome: experiment.Outcome) -> None:
    """Writes the result, on one of the workers; that of an earlier sitting stays."""
    if not outcome.new_epochs and (folder / "result.json").exists():
        print(f"Finished before: {folder / 'result.json'}")
    elif tf.distribute.get_strategy().extended.should_save_summary:
        settings = experiment.flag_settings(__name__)
        path = experiment.write_result(folder, outcome, settings)
        print(f"Written: {path}")


def train_float(model: keras.Model, folder: Path) -> None:
    """Gives the float model its weights, from a file or by training."""
    if FLAGS.float_checkpoint:
        model.load_weights(FLAGS.float_checkpoint)
        return
    if not FLAGS.float_epochs:
        return
    experiment.compile_model(
        model, FLAGS.float_learning_rate, jit_compile=FLAGS.jit_compile
    )
    outcome = run(model, [float_stage(FLAGS.float_epochs)], folder)
    print(f"Float network: test accuracy {outcome.accuracy:.4f}")
    write_result(folder, outcome)


def train_quantized(
    model: keras.Model,
    precision: list[tfl.PrecisionRule],
    schedule: list[tfl.Stage],
    folder: Path,
) -> None:
    """Quantizes the float model, trains the result and writes what came out."""
    trainer = make_trainer(model, precision)
    outcome = run(trainer, schedule, folder)
    print(tfl.summary(trainer.student))
    print(f"Quantized network: test accuracy {outcome.accuracy:.4f}")
    write_result(folder, outcome)


def milestones() -> tuple[float, ...]:
    """The flags' milestones; a fraction becomes the float that is nearest to it.

    Raises:
        ValueError: if one is no number. Their order and range are `Stage`'s affair.
    """
    try:
        return tuple(float(fractions.Fraction(share)) for share in FLAGS.milestones)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            "--milestones must be shares, such as 0.3,0.6 or 15/30,25/30. "
            f"Received: {','.join(FLAGS.milestones)!r}"
        ) from error


def float_stage(epochs: int) -> tfl.Stage:
    """The flags' single stage of the float training."""
    return tfl.Stage(
        epochs,
        learning_rate=FLAGS.float_learning_rate,
        decay=FLAGS.schedule,
        milestones=milestones(),
    )


def stages() -> list[tfl.Stage]:
    """The flags' stages of the quantized training; none with --epochs=0."""
    if not FLAGS.epochs:
        return []
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
        last_only=FLAGS.last_only,
        milestones=milestones(),
        warmup=FLAGS.warmup,
    )


def make_trainer(
    model: keras.Model, precision: list[tfl.PrecisionRule]
) -> tfl.LowBitTrainer:
    """Quantizes the float model, and compiles what trains the result."""
    quantized = tfl.quantize(model, precision, residual_bits=FLAGS.residual_bits)
    data = load_data()
    tfl.calibrate(quantized, data.train)
    trainer = experiment.trainer_for(
        quantized,
        model,
        FLAGS.method,
        FLAGS.distill,
        target=FLAGS.distill_target,
        hints=FLAGS.hints,
        weights={name: FLAGS[name].value for name in _LOSS_WEIGHTS},
        unit=FLAGS.sp_unit,
        start=FLAGS.sp_start,
        seed=FLAGS.seed,
    )
    rate = FLAGS.teacher_learning_rate
    experiment.compile_model(
        trainer,
        FLAGS.learning_rate,
        teacher_optimizer=experiment.teacher_optimizer(
            FLAGS.distill,
            FLAGS.learning_rate if rate is None else rate,
            FLAGS.schedule,
            FLAGS.epochs * data.steps_per_epoch,
            milestones(),
            FLAGS.warmup,
        ),
        jit_compile=FLAGS.jit_compile,
    )
    return trainer


def has_float_training() -> bool:
    """Whether the flags have a float network trained."""
    return FLAGS.float_checkpoint is None and FLAGS.float_epochs != 0


def check_flags() -> None:
    """Refuses flags that would have no effect, or a wrong one late.

    Raises:
        ValueError: naming the flag or the setting.
    """
    tfl.StochasticPrecision(start=FLAGS.sp_start, seed=FLAGS.seed)
    tfl.Stage(1, learning_rate=FLAGS.teacher_learning_rate)
    tfl.LowBitScheme(residual_bits=FLAGS.residual_bits)
    float_stage(1)
    tfl.JointDistillation(
        target=FLAGS.distill_target,
        **{name: FLAGS[name].value for name in _LOSS_WEIGHTS},
    )
    if FLAGS.float_checkpoint == "":
        raise ValueError(
            "--float_checkpoint must name the file of a float network; a recipe that "
            "leaves it empty starts from a pretrained one. Received: ''"
        )
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
    }
    given = [n for n, is_idle in idle.items() if is_idle and FLAGS[n].present]
    if given:
        raise ValueError(
            "A flag must have an effect. Received: "
            f"{', '.join(f'--{name}' for name in given)} with "
            f"--method={FLAGS.method}, --distill={FLAGS.distill}, "
            f"--strategy={FLAGS.strategy}, --schedule={FLAGS.schedule}, "
            f"--epochs={FLAGS.epochs}, --float_epochs={FLAGS.float_epochs}, "
            f"--float_checkpoint={FLAGS.float_checkpoint}"
        )


def main(argv):
    """Trains a float network, quantizes it, trains that, and writes the results."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    experiment.quiet()
    # Made first: what is wrong with the flags is said before any training.
    check_flags()
    precision, schedule = rules(), stages()
    output = Path(FLAGS.output_dir)
    for part, is_trained in (("float", has_float_training()), ("quantized", schedule)):
        if is_trained:
            settings = binding_settings(part)
            experiment.check_folder(output / part, settings, FLAGS.resume)
    experiment.require_writable(output)
    strategy = devices.strategy(FLAGS.strategy, FLAGS.logical_cpus)
    keras.mixed_precision.set_global_policy(FLAGS.policy)
    keras.utils.set_random_seed(FLAGS.seed)
    with strategy.scope():
        model = build_float_model(load_data())
        train_float(model, output / "float")
        if schedule:
            train_quantized(model, precision, schedule, output / "quantized")


if __name__ == "__main__":
    app.run(main)
