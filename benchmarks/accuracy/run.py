"""One training of the accuracy sweep, in a process of one thread.

`python -m benchmarks.accuracy` starts it, and hands it the run, pickled, on its
standard input.
"""

import dataclasses
import os
import pickle
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow leaves oneDNN off on CPUs without VNNI; these networks train much faster
# with it there, too.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
import tf_lowbit as tfl
from benchmarks.accuracy import plan as sweep
from examples import experiment
from tf_lowbit import datasets, models
from tf_lowbit.analysis import environment
from tf_lowbit.compat import keras, tf
from tf_lowbit.quantizers import lsq


def perform(
    run: sweep.Run, settings: sweep.Settings, folder: Path, data_dir: str | None = None
) -> None:
    """Trains, measures after the last epoch, and writes the result.

    A training that diverges is a result: its accuracy is null.

    Args:
        run: With its learning rate.
        settings: Of the sweep.
        folder: Of the results.
        data_dir: Of the data set, or None for its default.
    """
    experiment.quiet()
    keras.utils.set_random_seed(run.seed)
    data = load_data(run, settings, data_dir)
    name, width = sweep.name_and_width(run.network, settings)
    model = models.get(
        name, classes=data.classes, input_shape=data.input_shape, width=width
    )
    if starts_from_float(run):
        load_start(model, folder, run)
    trained, stages, callbacks = prepared(model, run, settings, data)
    callbacks.append(experiment.StayFinite())
    clock = Clock()
    try:
        history = trained.fit(
            data.train,
            steps_per_epoch=data.steps_per_epoch,
            epochs=run.epochs,
            callbacks=callbacks,
            verbose=0,
        ).history
        times = clock.seconds()
        measured = data.validation if run.is_held_out else data.test
        loss, accuracy = trained.evaluate(
            measured, callbacks=[experiment.StayFinite()], verbose=0
        )
        recalibrated = None
        if run.bits is not None:
            tfl.recalibrate_batch_norm(trained, data.train)
            recalibrated = trained.evaluate(measured, verbose=0)[1]
        diverged = None
    except ValueError as error:
        # Nothing could start from a float network that diverged.
        if run.is_start or "must stay finite" not in str(error):
            raise
        times = clock.seconds()
        history, diverged = {}, str(error)
        accuracy = loss = recalibrated = None
    if run.is_start:
        save_start(model, folder, run)
    network = trained.student if isinstance(trained, tfl.LowBitTrainer) else trained
    cost = tfl.summary(network).cost
    found = {
        "stages": [[s.epochs, s.weight_bits, s.activation_bits] for s in stages],
        "accuracy": accuracy,
        "loss": loss,
        "recalibrated_accuracy": recalibrated,
        "diverged": diverged,
        "training_loss": [round(float(x), 5) for x in history.get("loss", [])],
        **times,
        "layer_bits": {
            layer.name: [list(layer.weight_bits), list(layer.activation_bits)]
            for layer in cost.layers
            if layer.weight_bits
        },
        "weight_bytes": cost.weight_bytes,
        "bops": cost.bops,
    }
    sweep.write(folder, run, record(run, settings, found))


def starts_from_float(run: sweep.Run) -> bool:
    """Whether a run starts from the float weights of its seed, not from new ones."""
    if run.is_start:
        return False
    return run.bits is None or sweep.method_of(run).from_float


class Clock:
    """Wall and CPU time of this process since it was made."""

    def __init__(self):
        self._start = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """What has passed, as it is written of a run."""
        wall, cpu = self._start
        return {
            "wall_seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }


def record(run: sweep.Run, settings: sweep.Settings, found: dict) -> dict:
    """What is written of a run.

    Args:
        run: What was trained.
        settings: Of the sweep.
        found: What came of it, JSON-ready.

    Returns:
        JSON-ready: run, what was found, settings, versions and machine.
    """
    return {
        **dataclasses.asdict(run),
        "warmup": sweep.warmup_of(run),
        "measured_on": "held-out" if run.is_held_out else "test",
        **found,
        "settings": settings.as_json(),
        **environment(),
    }


def load_data(run, settings, data_dir) -> datasets.Dataset:
    """The run's data set; in the tuning with held-out images."""
    files = {"data_dir": data_dir} if data_dir else {}
    return datasets.load(
        settings.dataset,
        batch_size=settings.batch_size,
        seed=run.seed,
        limit=settings.limit,
        validation_fraction=settings.held_out if run.is_held_out else 0.0,
        **files,
    )


def prepared(model, run, settings, data):
    """What is to be trained, compiled; its stages; and the callback they need."""
    rate = run.learning_rate
    if run.bits is None:
        warmup = sweep.warmup_of(run)
        stage = tfl.Stage(run.epochs, learning_rate=rate, decay="cosine", warmup=warmup)
        experiment.compile_model(model, rate)
        return model, [stage], [experiment.float_learning_rate(stage, data)]
    method = sweep.method_of(run)
    rules, bits = uniform_rules(run.bits, method), run.bits
    if method.mixed:
        rules = mixed_rules(model, rules, data, method.mixed)
        bits = lowest_bits(rules)  # A stage has no quantizer at fewer than its own.
    stages = stages_of(run, bits, settings)
    quantized = tfl.quantize(model, rules)
    if method.is_gentle:
        tfl.calibrate(quantized, data.train)
    trainer = experiment.trainer_for(
        quantized,
        model,
        method.staging,
        method.distill,
        weights={"task_weight": method.task_weight},
        start=method.start,
        seed=run.seed,
    )
    # Those in which the teacher is trained.
    epochs = sum(stage.epochs for stage in stages if stage.teacher is None)
    steps = epochs * data.steps_per_epoch
    experiment.compile_model(
        trainer,
        rate,
        teacher_optimizer=experiment.teacher_optimizer(
            method.distill,
            rate * method.teacher_rate,
            "cosine",
            steps,
            warmup=sweep.warmup_of(run),
        ),
    )
    measured = data.train if method.measures else None
    callbacks: list = [tfl.callbacks.StagedPrecision(stages, data=measured)]
    if method.freezing:
        callbacks.append(tfl.callbacks.OscillationFreezing())
    return trainer, stages, callbacks


def stages_of(run, bits, settings) -> list[tfl.Stage]:
    """The stages of a low-bit run."""
    method, warmup = sweep.method_of(run), sweep.warmup_of(run)
    if method.phases:
        epochs = tfl.split_epochs(run.epochs, 3)
        stages = tfl.three_phase(bits, epochs, run.learning_rate, "cosine")
        return [dataclasses.replace(stage, warmup=warmup) for stage in stages]
    return experiment.stages_for(
        method.staging,
        bits,
        run.epochs,
        run.learning_rate,
        "cosine",
        settings.ladder,
        last_only=True,
        warmup=warmup,
    )


def uniform_rules(bits, method) -> list[tfl.PrecisionRule]:
    """The same bits for all layers but, perhaps, the first and the last one."""
    pair = quantizers_of(method)
    few = tfl.PrecisionRule(".*", *bits, *pair, edges=method.edges == "few")
    if method.edges != "8 bits":
        return [few]
    return [tfl.PrecisionRule("stem|head", 8, 8, *pair), few]


def quantizers_of(method) -> list:
    """The quantizers of weights and activations."""
    if method.quantizers != ("lsq", "lsq"):
        return list(method.quantizers)
    return [
        kind(initialization=method.lsq_start)
        for kind in (lsq.LSQWeightQuantizer, lsq.LSQActivationQuantizer)
    ]


def mixed_rules(model, uniform, data, costs) -> list[tfl.PrecisionRule]:
    """Bits for each layer, at no more of these costs than uniform ones have."""
    quantized = tfl.quantize(model, uniform)
    tfl.calibrate(quantized, data.train)
    found = tfl.sensitivity(
        quantized, data.train, sweep.MIXED_FROM, batches=8, progress=False
    )
    budget = tfl.cost(quantized)
    return tfl.allocate_bits(
        quantized, found, **{name: getattr(budget, name) for name in costs}
    )


def lowest_bits(rules) -> tuple[int, int]:
    """The fewest bits of weights and of activations that rules have."""
    pairs = [(rule.weight_bits, rule.activation_bits) for rule in rules]
    weights, activations = (
        min(b for b in column if b is not None) for column in zip(*pairs, strict=True)
    )
    return weights, activations


def save_start(model: keras.Model, folder: Path, run: sweep.Run) -> None:
    """Writes a float network's weights, by name, for all runs that start from it."""
    weights = {w.name: w.numpy() for w in model.weights}
    sweep.write_start(folder, run.network, run.seed, weights)


def load_start(model: keras.Model, folder: Path, run: sweep.Run) -> None:
    """Gives a float network the weights that `save_start` wrote.

    Raises:
        ValueError: If there are none.
    """
    weights = sweep.read_start(folder, run.network, run.seed)
    if weights is None:
        raise ValueError(
            "The float network that a run starts from must have been trained: run the "
            f"phase of float networks. Received: {run.name!r}, {str(folder)!r}"
        )
    model.set_weights([weights[weight.name] for weight in model.weights])


if __name__ == "__main__":
    # Two processes of one thread each do more than one of two.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    perform(*pickle.load(sys.stdin.buffer))
