"""Training runs for the example programs: resumable, with records.

A run has a folder: `settings.json` (the settings that a resumed run must have),
`checkpoints/` (networks, optimizers, stage, epoch and step), `log.csv`, `tensorboard/`,
and at the end `model.keras` and `result.json`.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import rich.progress
import rich.table
from absl import flags, logging

import tf_lowbit as tfl
from tf_lowbit import datasets
from tf_lowbit.analysis import environment
from tf_lowbit.compat import keras, tf
from tf_lowbit.core.files import replace_file, replaced
from tf_lowbit.training.stages import STEP_MILESTONES

SETTINGS = "settings.json"
METHODS = ("plain", "ts", "pq", "ts+pq", "sp")
LARGEST_SEED = 2**32 - 1  # NumPy's limit.
DISTILLATIONS = ("none", "joint", "task", "frozen")
# (first epoch, first step) of the training part -> data set.
DataLoader = Callable[[int, int], datasets.Dataset]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        accuracy: Top-1 on the test set after the last epoch, in [0, 1].
        loss: Test loss, including weight decay.
        epochs: Epochs of the whole run.
        new_epochs: Epochs that this process trained, whole or in part.
        seconds: Wall time that this process trained.
        cost: Cost of the network at its final bits.
    """

    accuracy: float
    loss: float
    epochs: int
    new_epochs: int
    seconds: float
    cost: tfl.Cost


def flag_settings(module: str) -> dict:
    """Returns a program's flags by name, without `output_dir` and `resume`.

    Args:
        module: The program's `__name__`.
    """
    own = flags.FLAGS.get_key_flags_for_module(module)
    return {f.name: f.value for f in own if f.name not in ("output_dir", "resume")}


def quiet() -> None:
    """Hides what TensorFlow and Keras say of their work; warnings of results stay."""
    tf.get_logger().setLevel("WARNING")
    tf.get_logger().addFilter(_is_of_results)
    logging.set_verbosity(logging.WARNING)


def _is_of_results(record) -> bool:
    # On a busy machine, Keras advises to check callbacks.
    return "is slow compared to the batch time" not in record.getMessage()


def stages_for(
    method: str,
    bits: tuple[int, int],
    epochs: int,
    learning_rate: float,
    decay: str,
    ladder: tuple[int, ...],
    last_only: bool = False,
    milestones: Sequence[float] = STEP_MILESTONES,
    warmup: float = 0.0,
) -> list[tfl.Stage]:
    """Returns the stages of a method with a given total of epochs.

    Args:
        method: One of `METHODS`.
        bits: Final (weight, activation) bits.
        epochs: Total epochs, divided evenly among the stages.
        learning_rate: Learning rate at the start of every stage.
        decay: Decay within a stage, as in `Stage`.
        ladder: Bit-widths of the progressive methods.
        last_only: Whether only the last rung of "ts+pq" has two stages.
        milestones: Milestones of the decay "step", as in `Stage`; shares of every
            stage.
        warmup: Warmup of every stage, as in `Stage`.

    Raises:
        ValueError: If the method is unknown or has more stages than epochs.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}. Received: {method!r}")
    if method in ("plain", "sp"):
        return [tfl.Stage(epochs, *bits, learning_rate, decay, milestones, warmup)]
    rate = {
        "learning_rate": learning_rate,
        "decay": decay,
        "milestones": milestones,
    }

    def made(epochs_per_stage):
        if method == "ts":
            return tfl.two_stage(bits, epochs_per_stage, **rate)
        if method == "pq":
            return tfl.progressive(bits, epochs_per_stage, ladder, **rate)
        return tfl.two_stage_progressive(
            bits, epochs_per_stage, ladder, **rate, last_only=last_only
        )

    # Counts the stages of the ladder by making them.
    count = 2 if method == "ts" else len(made(1))
    stages = made(tfl.split_epochs(epochs, count))
    return [dataclasses.replace(stage, warmup=warmup) for stage in stages]


def trainer_for(
    student: keras.Model,
    teacher: keras.Model,
    method: str,
    distill: str,
    *,
    target: str = "posteriors",
    hints: bool = False,
    weights: Mapping[str, float | None] | None = None,
    unit: str = "layer",
    start: float = 0.5,
    seed: int = 0,
) -> tfl.LowBitTrainer:
    """Makes the trainer of a student, with or without the teacher.

    Args:
        student: Model from `quantize`.
        teacher: The float network.
        method: One of `METHODS`; "sp" is stochastic precision.
        distill: One of `DISTILLATIONS`: "none" for no teacher, or its role.
        target: Target of the distillation, "posteriors" or "logits".
        hints: Whether features of the last two resolutions are matched too.
        weights: Weights of the losses, by their names in `tfl.JointDistillation`. None
            for the defaults of all, or of one.
        unit: Unit of stochastic precision, "layer" or "block".
        start: Probability of stochastic precision at the start.
        seed: Seed of its draws.
    """
    precision = tfl.StochasticPrecision(start=start, unit=unit, seed=seed)
    distillation = tfl.JointDistillation(
        target=target,
        teacher="joint" if distill == "none" else distill,
        hints="stages" if hints else None,
        **(weights or {}),
    )
    return tfl.LowBitTrainer(
        student,
        None if distill == "none" else teacher,
        distillation=None if distill == "none" else distillation,
        stochastic_precision=precision if method == "sp" else None,
    )


def sgd(learning_rate) -> keras.optimizers.Optimizer:
    """Makes the authors' optimizer: SGD with Nesterov momentum 0.9."""
    return keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True)


def compile_model(
    model: keras.Model, learning_rate: float, *, from_logits: bool = True, **arguments
) -> None:
    """Compiles for classification, with `sgd`.

    Args:
        model: A network or a `LowBitTrainer`.
        learning_rate: Learning rate of the network, or of the student.
        from_logits: False for a network that ends in a softmax.
        **arguments: Other arguments of `compile`, such as `teacher_optimizer`.
    """
    model.compile(
        optimizer=sgd(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits),
        metrics=["accuracy"],
        **arguments,
    )


def teacher_optimizer(
    distill: str,
    learning_rate: float,
    decay: str,
    steps: int,
    milestones: Sequence[float] = STEP_MILESTONES,
    warmup: float = 0.0,
) -> keras.optimizers.Optimizer | None:
    """Makes the teacher's `sgd`; its rate decays once over the whole training.

    Args:
        distill: One of `DISTILLATIONS`.
        learning_rate: Learning rate at the start.
        decay: As in `Stage`.
        steps: Steps of the whole training.
        milestones: Milestones of the decay "step", as in `Stage`; shares of the whole
            training.
        warmup: As in `Stage`; a share of the whole training.

    Returns:
        The optimizer, or None if no teacher is trained.
    """
    if distill not in ("joint", "task"):
        return None
    rate = _decayed(learning_rate, decay, steps, milestones)
    return sgd(Warmup(rate, warmup * steps) if warmup else rate)


def _decayed(learning_rate, decay, steps, milestones):
    schedules = keras.optimizers.schedules
    if decay == "cosine":
        return schedules.CosineDecay(learning_rate, steps)
    if decay == "step":
        stage = tfl.Stage(
            1, learning_rate=learning_rate, decay="step", milestones=milestones
        )
        # In Keras a boundary is the last step with the rate before it.
        edges = [_first_step_at(share, steps) - 1 for share in stage.milestones]
        rates = [stage.learning_rate_at(share) for share in (0.0, *stage.milestones)]
        return schedules.PiecewiseConstantDecay(edges, rates)
    return learning_rate


@keras.utils.register_keras_serializable("tf_lowbit_examples")
class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """Multiplies a learning rate by `step / steps` during the first `steps`.

    Args:
        rate: A learning rate or a schedule.
        steps: Number of steps of the rise; may be a fraction.
    """

    def __init__(self, rate, steps: float):
        super().__init__()
        self.rate, self.steps = rate, steps

    def __call__(self, step):
        """Returns the learning rate at a step, counted from 0."""
        rate = self.rate(step) if callable(self.rate) else self.rate
        return rate * tf.minimum(tf.cast(step, tf.float32) / self.steps, 1.0)

    def get_config(self):
        """Returns the arguments; a schedule is serialized."""
        rate = self.rate
        if callable(rate):
            rate = keras.optimizers.schedules.serialize(rate)
        return {"rate": rate, "steps": self.steps}

    @classmethod
    def from_config(cls, config):
        """Makes it from the result of `get_config`."""
        rate = config["rate"]
        if isinstance(rate, dict):
            rate = keras.optimizers.schedules.deserialize(rate)
        return cls(rate, config["steps"])


def _first_step_at(share: float, steps: int) -> int:
    """Returns the first step with `step / steps >= share`, in floats as in `Stage`."""
    # The product may be rounded to the wrong side of a whole number.
    near = math.floor(share * steps)
    return next(step for step in range(near - 1, near + 3) if step / steps >= share)


def require_writable(folder: Path) -> Path:
    """Makes a folder, and checks before any training that it is writable.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"The output folder must be writable ({error.strerror}). "
            f"Received: {str(folder)!r}"
        ) from error
    return folder


def check_folder(folder: Path, settings: dict, resume: bool) -> None:
    """Checks before any training that a run may use a folder.

    The settings of a run without `settings.json` are not checked.

    Args:
        folder: Folder of the run.
        settings: Settings that a resumed run must have, as in `train`.
        resume: Whether to continue the run in the folder.

    Raises:
        FileExistsError: If the folder holds a run already and `resume` is False.
        ValueError: If that run began with other settings, or its file is damaged.
    """
    if not _has_run(folder):
        return
    if not resume:
        raise FileExistsError(
            "The folder must not hold another run: continue it with --resume, or "
            f"choose another --output_dir. Received: {str(folder)!r}"
        )
    path = folder / SETTINGS
    if not path.exists():
        return
    try:
        begun = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            "The settings of a run must be whole: without the file the run continues "
            f"unchecked. Received: {str(path)!r} ({error})"
        ) from error
    # As JSON stores them: tuples become lists.
    settings = json.loads(json.dumps(settings))
    changed = [
        f"--{name}={value!r}, begun with {begun[name]!r}"
        for name, value in settings.items()
        if name in begun and begun[name] != value
    ]
    if changed:
        raise ValueError(
            "--resume must have the settings that the run began with: for others, "
            "choose another --output_dir. "
            f"Received: {'; '.join(changed)} in {str(path)!r}"
        )


def _has_run(folder):
    return any(folder.glob("checkpoints/epoch-*"))


def train(
    model: keras.Model,
    load_data: DataLoader,
    stages: list[tfl.Stage],
    folder: Path,
    *,
    resume: bool = False,
    save_every: int | None = None,
    label: str | None = None,
    settings: dict | None = None,
) -> Outcome:
    """Trains a compiled model through its stages and writes the records.

    Args:
        model: Compiled `LowBitTrainer`, quantized network, or float network.
        load_data: Function (first epoch, first step) -> data set, whose training part
            starts there.
        stages: Stages of the training. A float network has one, of which only the
            epochs and the learning rate are used.
        folder: Folder of the run; must be writable.
        resume: Whether to continue from the newest intact checkpoint in the folder.
        save_every: Steps between checkpoints within an epoch; None to save only at the
            end of each epoch.
        label: Name of one progress bar, which replaces Keras's own bars; or None.
        settings: JSON-ready settings. They are written at the start, and a resumed run
            must have the same. None for no settings.

    Returns:
        The outcome, measured on the test set after the last epoch.

    Raises:
        FileExistsError: If the folder holds a run already and `resume` is False.
        ValueError: If that run began with other settings, the model does not fit the
            data (`require_fitting`), or the training diverges. If it diverges, the last
            checkpoint is of the last good epoch, or with `save_every` of a later step
            with finite weights.
    """
    epochs = sum(stage.epochs for stage in stages)
    recovery = tfl.callbacks.Recovery(folder / "checkpoints", every=save_every)
    check_folder(folder, settings or {}, resume)
    first_epoch, first_step = recovery.position
    data = load_data(first_epoch, first_step)
    network = model.student if isinstance(model, tfl.LowBitTrainer) else model
    require_fitting(network, data)
    is_quantized = any(tfl.inspection.quantized_tensors(model))
    with _records(model, folder) as records:
        # A run of an earlier version has no settings, and they are unknown now.
        if settings is not None and not _has_run(folder):
            require_writable(records)
            replace_file(records / SETTINGS, json.dumps(settings, indent=2) + "\n")
        _drop_rows_from(records / "log.csv", first_epoch)
        callbacks = [
            tfl.callbacks.StagedPrecision(stages, verbose=0 if label else 1)
            if is_quantized
            else float_learning_rate(stages[0], data, first_epoch),
            StayFinite(save_every),
            keras.callbacks.CSVLogger(records / "log.csv", append=first_epoch > 0),
            keras.callbacks.TensorBoard(records / "tensorboard", write_graph=False),
            recovery,
        ]
        start = time.perf_counter()
        with _progress(label, epochs, first_epoch) as bar:
            model.fit(
                data.train,
                steps_per_epoch=data.steps_per_epoch,
                epochs=epochs,
                validation_data=data.test,
                callbacks=callbacks + bar,
                verbose=0 if label else 1,
            )
        seconds = time.perf_counter() - start
        loss, accuracy = model.evaluate(data.test, verbose=0)
        with replaced(records / "model.keras") as path:
            network.save(path)
    cost = tfl.summary(network).cost
    new_epochs = max(epochs - first_epoch, 0)
    return Outcome(accuracy, loss, epochs, new_epochs, seconds, cost)


@contextlib.contextmanager
def _records(model, folder: Path):
    """Yields the folder of this worker's records: the run's folder for the chief.

    Other workers must take part when variables are read. Their files are temporary.
    """
    if model.distribute_strategy.extended.should_save_summary:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def write_result(folder: Path, outcome: Outcome, settings: dict) -> Path:
    """Writes `result.json`: outcome, settings, versions and machine.

    Args:
        folder: The run's folder.
        outcome: Result of `train`.
        settings: JSON-ready settings, such as `flag_settings`.

    Returns:
        The path of the file.
    """
    result = {
        "test_accuracy": outcome.accuracy,
        "test_loss": outcome.loss,
        "epochs": outcome.epochs,
        "seconds": round(outcome.seconds, 1),
        "cost": outcome.cost.as_dict(),
        "settings": settings,
        **environment(),
    }
    path = folder / "result.json"
    replace_file(path, json.dumps(result, indent=2, sort_keys=True) + "\n")
    return path


def comparison(rows) -> rich.table.Table:
    """Makes a table of a float network and low-bit ones.

    Args:
        rows: For each network (label, bits of weights and activations as text,
            accuracy in [0, 1] or None if not measured, `tfl.Cost`).
    """
    table = rich.table.Table()
    for column in ("network", "W / A bits"):
        table.add_column(column, no_wrap=True)
    for column in ("test accuracy", "weight bytes", "BOPs"):
        table.add_column(column, justify="right")
    for label, bits, accuracy, cost in rows:
        table.add_row(
            label,
            bits,
            "-" if accuracy is None else f"{100 * accuracy:.2f} %",
            f"{cost.weight_bytes:,}",
            "-" if cost.bops is None else f"{cost.bops:,}",
        )
    return table


def read_history(folder: Path) -> dict[str, list[float]]:
    """Reads the log of a run like `fit(...).history`: name -> value at each epoch."""
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {n: [float(row[n]) for row in rows] for n in rows[0] if n != "epoch"}


def deployment_info(data: datasets.Dataset) -> dict:
    """Returns the `info` of a deployed file: how pixels become its input.

    Pixels are in [0, 1]; the input is `(pixels - mean) / deviation`.
    """
    normalization = data.normalization
    return {
        "dataset": data.name,
        "normalization": {
            "mean": list(normalization.mean),
            "deviation": list(normalization.deviation),
        },
    }


def float_tflite(model: keras.Model) -> bytes:
    """Converts a float network with TensorFlow's own converter."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    with contextlib.redirect_stdout(io.StringIO()):
        return converter.convert()


class StayFinite(keras.callbacks.Callback):
    """Ends a training that diverges, before its weights are evaluated or saved.

    Args:
        save_every: Steps between checkpoints within an epoch, or None.
    """

    def __init__(self, save_every: int | None = None):
        super().__init__()
        self._save_every = save_every

    def on_train_batch_end(self, batch, logs=None):
        """Checks the loss, and the weights if this step saves them."""
        if not math.isfinite(logs["loss"]):
            self._fail(f"a loss of {logs['loss']} after batch {batch} of its epoch")
        if self._save_every and (batch + 1) % self._save_every == 0:
            self._check_weights()

    def on_test_begin(self, logs=None):
        """Checks the weights after the last step."""
        self._check_weights()

    def _check_weights(self):
        for weight in self.model.trainable_variables:
            if not tf.reduce_all(tf.math.is_finite(weight)):
                self._fail(f"weights {weight.name} that are not finite")

    def on_test_end(self, logs=None):
        """Checks the test loss, which overflows if finite weights are too large."""
        if not math.isfinite(logs["loss"]):
            self._fail(f"a test loss of {logs['loss']}")

    @staticmethod
    def _fail(what):
        raise ValueError(
            "The training loss must stay finite: look for NaN in the data or lower the "
            f"learning rate. Received: {what}"
        )


def require_fitting(model: keras.Model, data: datasets.Dataset) -> None:
    """Checks that a network takes a data set's images and has enough outputs.

    Raises:
        ValueError: If the image shapes differ, or there are fewer outputs than classes.
    """
    if not tf.TensorShape(model.input_shape[1:]).is_compatible_with(data.input_shape):
        raise ValueError(
            f"The images of {data.name} are {data.input_shape}. "
            f"Received: a network that takes {model.input_shape[1:]}"
        )
    outputs = model.output_shape[-1]
    if outputs < data.classes:
        raise ValueError(
            f"The labels of {data.name} are in [0, {data.classes}), and the model must "
            f"have an output for each. Received: {outputs} outputs"
        )


def float_learning_rate(
    stage: tfl.Stage, data: datasets.Dataset, first_epoch: int = 0
) -> keras.callbacks.Callback:
    """Makes a callback that sets the learning rate of a float training at each step.

    Args:
        stage: The single stage, which has the learning rate.
        data: The data set, which has the steps of an epoch.
        first_epoch: First epoch of the training.
    """

    class LearningRate(keras.callbacks.Callback):
        epoch = first_epoch

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_begin(self, batch, logs=None):
            progress = (self.epoch + batch / data.steps_per_epoch) / stage.epochs
            self.model.optimizer.learning_rate = stage.learning_rate_at(progress)

    return LearningRate()


def _drop_rows_from(path: Path, epoch: int) -> None:
    """Drops the log's rows of epochs that will be trained, and incomplete rows."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        # After a crash the last line may be incomplete.
        rows = list(csv.reader(line for line in file if line.endswith("\n")))
    whole = [row for row in rows[1:] if len(row) == len(rows[0])]
    kept = [row for row in whole if int(row[0]) < epoch]
    if not kept:
        path.unlink()
        return
    with replaced(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *kept])


@contextlib.contextmanager
def _progress(label: str | None, epochs: int, first_epoch: int):
    """Yields a list with the callback of a progress bar; empty without a label."""
    if label is None:
        yield []
        return
    columns = (
        rich.progress.TextColumn("{task.description:<18}"),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.fields[status]}"),
    )
    with rich.progress.Progress(*columns) as bar:
        task = bar.add_task(label, total=epochs, completed=first_epoch, status="")

        def advance(epoch, logs):
            status = f"test accuracy {logs['val_accuracy']:.4f}"
            if "weight_bits" in logs:
                bits = f"W{logs['weight_bits']} A{logs['activation_bits']}"
                status = f"{bits}, {status}"
            bar.update(task, completed=epoch + 1, status=status)

        yield [keras.callbacks.LambdaCallback(on_epoch_end=advance)]
