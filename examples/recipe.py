"""Makes data, networks, rules and stages from the flags of train.py, and runs them."""

import fractions
from pathlib import Path

import devices
import experiment
import rich.console
from absl import flags

import tf_lowbit as tfl
from tf_lowbit import datasets, models
from tf_lowbit.compat import keras, tf
from tf_lowbit.training.outputs import SOFTMAX, end_functions

FLAGS = flags.FLAGS

# Flags that may differ in a resumed run: they do not change what is trained.
_FREE = ("data_dir", "save_every", "strategy", "logical_cpus", "jit_compile", "report")
# Flags that change the float training. All others change only the quantized one.
_FLOAT_TRAINING = (
    *("dataset", "limit", "augment", "batch_size", "seed", "policy"),
    *("model", "width", "weight_decay", "float_model", "schedule", "milestones"),
    *("float_epochs", "float_learning_rate"),
)
# Flags with the weights of the losses; `JointDistillation` has the defaults.
_LOSS_WEIGHTS = (
    *("task_weight", "distillation_weight"),
    *("teacher_task_weight", "teacher_distillation_weight"),
)


def load_data(first_epoch: int = 0, first_step: int = 0) -> datasets.Dataset:
    """Loads the flags' data set; the training part starts at an epoch and a step."""
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


def float_network(data: datasets.Dataset) -> keras.Model:
    """Returns the flags' float network: from a file, or one of `models`."""
    if FLAGS.float_model is None:
        return build_model(data)
    network = tfl.load_model(FLAGS.float_model, compile=False)
    experiment.require_fitting(network, data)
    return network


def build_model(data: datasets.Dataset) -> keras.Model:
    """Builds the network of --model, untrained."""
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
    """Returns the flags' precision rules."""
    chosen = {
        "weight_quantizer": FLAGS.weight_quantizer,
        "activation_quantizer": FLAGS.activation_quantizer,
    }
    inner = tfl.PrecisionRule(".*", FLAGS.weight_bits, FLAGS.activation_bits, **chosen)
    if FLAGS.first_last_bits is None:
        return [inner]
    # The first rule does not reach the first and the last layer.
    bits = FLAGS.first_last_bits
    return [inner, tfl.PrecisionRule(".*", bits, bits, **chosen, edges=True)]


def milestones() -> tuple[float, ...]:
    """Returns the flags' milestones; a fraction becomes the nearest float.

    Raises:
        ValueError: If one is not a number. `Stage` checks their order and range.
    """
    try:
        return tuple(float(fractions.Fraction(share)) for share in FLAGS.milestones)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            "--milestones must be shares, such as 0.3,0.6 or 15/30,25/30. "
            f"Received: {','.join(FLAGS.milestones)!r}"
        ) from error


def float_stage(epochs: int) -> tfl.Stage:
    """Returns the single stage of the float training."""
    return tfl.Stage(
        epochs,
        learning_rate=FLAGS.float_learning_rate,
        decay=FLAGS.schedule,
        milestones=milestones(),
    )


def stages() -> list[tfl.Stage]:
    """Returns the stages of the quantized training; none with --epochs=0."""
    if not FLAGS.epochs:
        return []
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


def check() -> None:
    """Checks numbers early that the library would refuse late.

    Raises:
        ValueError: If a number is out of range.
    """
    tfl.StochasticPrecision(start=FLAGS.sp_start, seed=FLAGS.seed)
    tfl.Stage(1, learning_rate=FLAGS.teacher_learning_rate)
    float_stage(1)
    tfl.JointDistillation(
        target=FLAGS.distill_target,
        **{name: FLAGS[name].value for name in _LOSS_WEIGHTS},
    )


def run(settings: dict) -> None:
    """Trains a float network, quantizes it, trains the result, and writes records.

    Args:
        settings: The flags by name, from `experiment.flag_settings`.
    """
    experiment.quiet()
    # Made first, so that errors in flags come before any training.
    check()
    precision, schedule = rules(), stages()
    output = Path(FLAGS.output_dir)
    has_float_training = FLAGS.float_checkpoint is None and FLAGS.float_epochs
    for part, is_trained in (("float", has_float_training), ("quantized", schedule)):
        if is_trained:
            bound = _binding(settings, part)
            experiment.check_folder(output / part, bound, FLAGS.resume)
    experiment.require_writable(output)
    strategy = devices.strategy(FLAGS.strategy, FLAGS.logical_cpus)
    keras.mixed_precision.set_global_policy(FLAGS.policy)
    keras.utils.set_random_seed(FLAGS.seed)
    with strategy.scope():
        model = float_network(load_data())
        accuracy = _train_float(model, output / "float", settings)
        if schedule:
            _train_quantized(model, accuracy, precision, schedule, output, settings)


def _binding(settings, part) -> dict:
    """Returns the flags by name that a resumed training must have unchanged."""
    return {
        name: value
        for name, value in settings.items()
        if name in _FLOAT_TRAINING or (part == "quantized" and name not in _FREE)
    }


def _train(model, schedule, folder, settings) -> experiment.Outcome:
    """Trains a compiled model, and writes the result."""
    outcome = experiment.train(
        model,
        load_data,
        schedule,
        folder,
        resume=FLAGS.resume,
        save_every=FLAGS.save_every,
        settings=_binding(settings, folder.name),
    )
    if not outcome.new_epochs and (folder / "result.json").exists():
        print(f"Finished before: {folder / 'result.json'}")
    elif _is_chief():
        path = experiment.write_result(folder, outcome, settings)
        print(f"Written: {path}")
    return outcome


def _is_chief() -> bool:
    """Tells whether this worker writes the files."""
    return tf.distribute.get_strategy().extended.should_save_summary


def _train_float(model, folder, settings) -> float | None:
    """Loads or trains the weights of the float model.

    Returns:
        Its accuracy on the test set, or None if it is untrained.
    """
    if FLAGS.float_checkpoint:
        model.load_weights(FLAGS.float_checkpoint)
    experiment.compile_model(
        model,
        FLAGS.float_learning_rate,
        from_logits=SOFTMAX not in end_functions(model),
        jit_compile=FLAGS.jit_compile,
    )
    if not FLAGS.float_checkpoint and FLAGS.float_epochs:
        accuracy = _train(
            model, [float_stage(FLAGS.float_epochs)], folder, settings
        ).accuracy
    elif FLAGS.float_checkpoint or FLAGS.float_model:
        accuracy = model.evaluate(load_data().test, verbose=0)[1]
    else:
        return None
    print(f"Float network: test accuracy {accuracy:.4f}")
    return accuracy


def _train_quantized(model, accuracy, precision, schedule, output, settings) -> None:
    """Quantizes the float model, trains the result and writes the records."""
    floats = tfl.cost(model)
    trainer = make_trainer(model, precision)
    outcome = _train(trainer, schedule, output / "quantized", settings)
    print(tfl.summary(trainer.student))
    print(f"Quantized network: test accuracy {outcome.accuracy:.4f}")
    bits = f"{FLAGS.weight_bits} / {FLAGS.activation_bits}"
    table = experiment.comparison(
        [
            ("float", "32 / 32", accuracy, floats),
            ("low-bit", bits, outcome.accuracy, outcome.cost),
        ]
    )
    rich.console.Console().print(table)
    if FLAGS.report and _is_chief():
        page = tfl.report(
            trainer.student,
            load_data().test,
            output / "report.html",
            history=experiment.read_history(output / "quantized"),
            stages=schedule,
            float_model=model,
        )
        print(f"Written: {page}")


def make_trainer(
    model: keras.Model, precision: list[tfl.PrecisionRule]
) -> tfl.LowBitTrainer:
    """Quantizes the float model, and makes and compiles its trainer."""
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
        from_logits=SOFTMAX not in end_functions(model),
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
