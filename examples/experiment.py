"""What the example programs share: one training run, resumable, with its records.

A run lives in a folder: `settings.json` (what must stay the same when it goes on),
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
# What NumPy takes.
LARGEST_SEED = 2**32 - 1
DISTILLATIONS = ("none", "joint", "task", "frozen")
# From the epoch and the step that the training part starts with.
DataLoader = Callable[[int, int], datasets.Dataset]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        accuracy: top-1 on the test set after the last epoch, in [0, 1].
        loss: test loss, weight decay included.
        epochs: epochs trained, over all sittings.
        new_epochs: how many of them this sitting trained, or went on with.
        seconds: wall time of this sitting's training.
        cost: what the network costs at its final bits.
    """

    accuracy: float
    loss: float
    epochs: int
    new_epochs: int
    seconds: float
    cost: tfl.Cost


def flag_settings(module: str) -> dict:
    """A program's flags that say what was run, by name; where it was written is none.

    Args:
        module: the program's `__name__`.
    """
    own = flags.FLAGS.get_key_flags_for_module(module)
    return {f.name: f.value for f in own if f.name not in ("output_dir", "resume")}


def quiet() -> None:
    """Keeps the notes of TensorFlow and Keras off the screen; warnings stay."""
    tf.get_logger().setLevel("WARNING")
    logging.set_verbosity(logging.WARNING)


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
    """The stages of a method, with a given total of epochs.

    Args:
        method: one of `METHODS`.
        bits: final (weight, activation) bits.
        epochs: total epochs, shared out evenly over the stages.
        learning_rate: at the start of every stage.
        decay: within a stage, as in `Stage`.
        ladder: bit-widths of the progressive methods.
        last_only: whether "ts+pq" takes weights and activations apart only at the
            last rung.
        milestones: of the decay "step", as in `Stage`; shares of every stage.
        warmup: of every stage, as in `Stage`.

    Raises:
        ValueError: if the method is unknown or has more stages than epochs.
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

    # How many stages a ladder comes to is known once they are made.
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
    """What trains a student by a method, with the teacher if it is to.

    Args:
        student: what `quantize` made.
        teacher: the float network.
        method: one of `METHODS`; "sp" is stochastic precision.
        distill: one of `DISTILLATIONS`: "none", or how the teacher is trained.
        target: of the distillation, "posteriors" or "logits".
        hints: whether the last two stages give hints.
        weights: of the parts of the losses, by their names in
            `tfl.JointDistillation`; None in place of one, or of all, for its
            defaults.
        unit: of stochastic precision, "layer" or "block".
        start: its probability at the start.
        seed: of its draws.
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
    """The method's authors' optimizer: SGD, momentum 0.9, Nesterov."""
    return keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True)


def compile_model(
    model: keras.Model, learning_rate: float, *, from_logits: bool = True, **arguments
) -> None:
    """Compiles for classification, with `sgd`.

    Args:
        model: a network or a `LowBitTrainer`.
        learning_rate: of the network, or of the student.
        from_logits: False for a network that ends in a softmax.
        **arguments: others of `compile`, such as `teacher_optimizer`.
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
    """The teacher's `sgd`, whose learning rate decays once over the whole training.

    Args:
        distill: one of `DISTILLATIONS`.
        learning_rate: at the start.
        decay: as in `Stage`.
        steps: of the whole training.
        milestones: of the decay "step", as in `Stage`; shares of the whole training.
        warmup: as in `Stage`; a share of the whole training.

    Returns:
        None where no teacher is trained.
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
        # As in Stage, step by step.
        stage = tfl.Stage(
            1, learning_rate=learning_rate, decay="step", milestones=milestones
        )
        # A boundary is the last step at the rate before it.
        edges = [_first_step_at(share, steps) - 1 for share in stage.milestones]
        rates = [stage.learning_rate_at(share) for share in (0.0, *stage.milestones)]
        return schedules.PiecewiseConstantDecay(edges, rates)
    return learning_rate


@keras.utils.register_keras_serializable("tf_lowbit_examples")
class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """Multiplies a learning rate with `step / steps` in the first steps.

    Args:
        rate: a learning rate, or a schedule of it.
        steps: how long it rises; may be a fraction.
    """

    def __init__(self, rate, steps: float):
        super().__init__()
        self.rate, self.steps = rate, steps

    def __call__(self, step):
        """The learning rate at a step, counted from 0."""
        rate = self.rate(step) if callable(self.rate) else self.rate
        return rate * tf.minimum(tf.cast(step, tf.float32) / self.steps, 1.0)

    def get_config(self):
        """The arguments; a schedule among them is written as Keras writes it."""
        rate = self.rate
        if callable(rate):
            rate = keras.optimizers.schedules.serialize(rate)
        return {"rate": rate, "steps": self.steps}

    @classmethod
    def from_config(cls, config):
        """From what `get_config` gave."""
        rate = config["rate"]
        if isinstance(rate, dict):
            rate = keras.optimizers.schedules.deserialize(rate)
        return cls(rate, config["steps"])


def _first_step_at(share: float, steps: int) -> int:
    """The first step whose `step / steps`, as a float, has reached a share."""
    # The product may be rounded to the wrong side of a whole number.
    near = math.floor(share * steps)
    return next(step for step in range(near - 1, near + 3) if step / steps >= share)


def require_writable(folder: Path) -> Path:
    """Makes a folder, or says before any training that it cannot be written.

    Raises:
        OSError: if the folder cannot be made or written.
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
    """Says before any training whether a run may go to a folder.

    A run that began before there was `settings.json` goes on without the check.

    Args:
        folder: of the run.
        settings: what must be as it was when a run began, as for `train`.
        resume: whether to go on with what is there.

    Raises:
        FileExistsError: if the folder holds a run already and `resume` is False.
        ValueError: if the run there began with other settings, or they are torn.
    """
    if not _has_run(folder):
        return
    if not resume:
        raise FileExistsError(
            "The folder must not hold another run; go on with it (--resume) or choose "
            f"another --output_dir. Received: {str(folder)!r}"
        )
    path = folder / SETTINGS
    if not path.exists():
        return
    try:
        begun = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            "The settings that a run began with must be whole; without the file it "
            f"goes on unchecked. Received: {str(path)!r} ({error})"
        ) from error
    # As the file has them: its lists were tuples, maybe.
    settings = json.loads(json.dumps(settings))
    changed = [
        f"--{name}={value!r}, begun with {begun[name]!r}"
        for name, value in settings.items()
        if name in begun and begun[name] != value
    ]
    if changed:
        raise ValueError(
            "--resume must have the settings that the run began with; choose another "
            f"--output_dir for others. Received: {'; '.join(changed)} in {str(path)!r}"
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
    """Trains a compiled model through its stages and leaves a full record.

    Args:
        model: compiled; a `LowBitTrainer`, a quantized network, or a float one with a
            single stage for its learning rate.
        load_data: gives the data set, its training part starting at an epoch and step.
        stages: what to train when. Of a float model's stage only the epochs and the
            learning rate count.
        folder: where the record goes; must be writable.
        resume: go on from the newest intact checkpoint in the folder, if there is one.
        save_every: steps between checkpoints within an epoch; None for one an epoch.
        label: shows one progress bar under this name instead of Keras's own.
        settings: JSON-ready; written down at the start, and to be the same when the
            training goes on. None for none.

    Returns:
        The outcome, measured on the test set after the last epoch.

    Raises:
        FileExistsError: if the folder holds a run already and `resume` is False.
        ValueError: if the run there began with other settings, the model does not fit
            the data (`require_fitting`), or the training diverges. The checkpoints then
            end with the last good epoch; with `save_every` one within an epoch may hold
            weights that are finite still.
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
        # What an earlier version began has none: nobody knows now how it began.
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
    """Yields where this worker's records go: the run's folder is the chief's.

    The others take part in all that reads variables, and their copies are dropped.
    """
    if model.distribute_strategy.extended.should_save_summary:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def write_result(folder: Path, outcome: Outcome, settings: dict) -> Path:
    """Writes `result.json`: outcome, settings, versions and machine.

    Args:
        folder: the run's folder.
        outcome: what `train` returned.
        settings: JSON-ready, such as `flag_settings` gives.

    Returns:
        The file.
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
    """A table of a float network beside low-bit ones.

    Args:
        rows: (label, bits of weights and activations as text, accuracy in [0, 1] or
            None where it was not measured, `tfl.Cost`) of each network.
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
    """The log of a run as `fit(...).history` has it: name -> value at each epoch."""
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {n: [float(row[n]) for row in rows] for n in rows[0] if n != "epoch"}


def deployment_info(data: datasets.Dataset) -> dict:
    """What a deployed file should say of itself: how pixels become its input.

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
    """A float network as TensorFlow's own converter writes it."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    with contextlib.redirect_stdout(io.StringIO()):
        return converter.convert()


class StayFinite(keras.callbacks.Callback):
    """Ends a training that diverges, before its weights are measured or saved.

    Args:
        save_every: steps between checkpoints within an epoch, or None.
    """

    def __init__(self, save_every: int | None = None):
        super().__init__()
        self._save_every = save_every

    def on_train_batch_end(self, batch, logs=None):
        """Checks the loss, and the weights if they are to be saved."""
        if not math.isfinite(logs["loss"]):
            self._fail(f"a loss of {logs['loss']} after batch {batch} of its epoch")
        if self._save_every and (batch + 1) % self._save_every == 0:
            self._check_weights()

    def on_test_begin(self, logs=None):
        """Checks the weights, which the last step may have spoiled."""
        self._check_weights()

    def _check_weights(self):
        for weight in self.model.trainable_variables:
            if not tf.reduce_all(tf.math.is_finite(weight)):
                self._fail(f"weights {weight.name} that are not finite")

    def on_test_end(self, logs=None):
        """Checks the test loss: finite weights can be too large to compute with."""
        if not math.isfinite(logs["loss"]):
            self._fail(f"a test loss of {logs['loss']}")

    @staticmethod
    def _fail(what):
        raise ValueError(
            "The training loss must stay finite: look for NaN in the data or lower the "
            f"learning rate. Received: {what}"
        )


def require_fitting(model: keras.Model, data: datasets.Dataset) -> None:
    """Refuses a network that cannot take a data set's images or tell its classes apart.

    Raises:
        ValueError: naming the shapes, or the number of outputs.
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
    """Follows the single stage of a float training, step by step.

    Args:
        stage: whose learning rate it is.
        data: what is trained on.
        first_epoch: the one that the training starts with.
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
    """Drops the log's rows of epochs that will be trained (again), and torn ones."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        # A machine that fails may leave a part of the last line.
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
    """Yields the callback that moves a progress bar, in a list; none without label."""
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
