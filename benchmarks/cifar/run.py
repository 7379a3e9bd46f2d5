"""One training of the CIFAR experiments, in a process of one thread.

`python -m benchmarks.cifar` starts it with the run, pickled, on its standard input. A
run that was interrupted goes on from its last epoch.
"""

import dataclasses
import os
import pickle
import shutil
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow leaves oneDNN off on CPUs without VNNI; these networks train much faster
# with it there, too.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
import numpy as np

import tf_lowbit as tfl
from benchmarks.cifar import plan as cifar_plan
from benchmarks.cifar.networks import NETWORKS
from benchmarks.common import store
from benchmarks.peers import networks as peers_networks
from examples import experiment
from tf_lowbit.analysis import environment
from tf_lowbit.compat import keras, tf
from tf_lowbit.core.files import replaced
from tf_lowbit.datasets import cifar, pipeline
from tf_lowbit.datasets.dataset import PipelineOptions


def perform(
    run: cifar_plan.Run, data_dir: str, models_dir: Path, folder: Path, results: Path
) -> None:
    """Trains, measures after the last epoch, and adds the result.

    A training that diverges is a result: its accuracy is None.

    Args:
        run: What to train.
        data_dir: Of the data sets as TensorFlow Datasets prepares them.
        models_dir: Of the trained float networks.
        folder: Of the run's checkpoints. It is removed at the end.
        results: File of all results. Weights that were trained to start from are in
            the folder `starts` beside it.
    """
    experiment.quiet()
    keras.utils.set_random_seed(run.seed)
    plan = cifar_plan.EXPERIMENTS[run.experiment]
    recovery = tfl.callbacks.Recovery(folder)
    epoch, step = recovery.position
    network = NETWORKS[plan.network]
    data = load_data(plan.dataset, network, run, data_dir, epoch, step)
    given = network.load(models_dir)
    name = plan.network + ("-held-out" if run.is_held_out else "")
    start = results.parent / "starts" / f"{name}.npz"
    if run.method == cifar_plan.START:
        given = keras.models.clone_model(given)  # With random weights.
    elif run.is_held_out or not plan.is_given:
        with np.load(start) as file:
            given.set_weights(list(file.values()))
    measured = data.validation if run.is_held_out else data.test
    float_accuracy = accuracy_of(given, measured)
    trained, callbacks = prepared(given, network.edges, run, data)
    clock = EpochClock()
    callbacks += [clock, experiment.StayFinite(), recovery]
    accuracy = loss = recalibrated = diverged = None
    try:
        trained.fit(
            data.train,
            steps_per_epoch=data.steps_per_epoch,
            epochs=run.epochs,
            callbacks=callbacks,
            verbose=0,
        )
        loss, accuracy = trained.evaluate(measured, verbose=0)
        tfl.recalibrate_batch_norm(trained, data.train)
        recalibrated = trained.evaluate(measured, verbose=0)[1]
    except ValueError as error:
        if "must stay finite" not in str(error):
            raise
        diverged = str(error)
    found = {
        **dataclasses.asdict(run),
        "measured_on": "held-out" if run.is_held_out else "test",
        "float_accuracy": float_accuracy,
        "accuracy": accuracy,
        "loss": loss,
        "recalibrated_accuracy": recalibrated,
        "diverged": diverged,
        "cpu_seconds_per_epoch": clock.median(),
        # The file of a peer's network computes in floats.
        **costs(trained if cifar_plan.METHODS[run.method].peer is None else given),
        **environment(),
    }
    if run.method == cifar_plan.START:
        start.parent.mkdir(exist_ok=True)
        with replaced(start) as path, path.open("wb") as file:
            np.savez_compressed(file, *trained.get_weights())
    store.write(results, run.name, found)
    shutil.rmtree(folder, ignore_errors=True)


def accuracy_of(model: keras.Model, measured: tf.data.Dataset) -> float:
    """The share of right predictions of a network that is not compiled."""
    found = keras.metrics.SparseCategoricalAccuracy()
    for images, labels in measured:
        found.update_state(labels, model.predict_on_batch(images))
    return float(found.result())


def load_data(name, network, run, data_dir, epoch, step):
    """The data set as the network reads it, from an epoch and a step on."""
    source = getattr(cifar, f"read_{name}")(data_dir=data_dir)
    options = PipelineOptions(
        batch_size=cifar_plan.BATCH_SIZE,
        seed=run.seed,
        validation_fraction=cifar_plan.HELD_OUT if run.is_held_out else 0.0,
        start_epoch=epoch,
        start_step=step,
    )
    if network.normalization is not None:
        source = dataclasses.replace(source, normalization=network.normalization)
    return pipeline.build(source, options)


def prepared(model, edges, run, data):
    """What is to be trained, compiled, and the callbacks that it needs."""
    rate, method = run.learning_rate, cifar_plan.METHODS[run.method]
    if method.is_recipe:
        recipe = tfl.recipes.low_bit(
            model,
            data.train,
            run.bits,
            run.epochs,
            learning_rate=rate,
            steps_per_epoch=data.steps_per_epoch,
        )
        return recipe.trainer, recipe.callbacks
    warmup = cifar_plan.WARMUP
    if method.peer is not None:
        model = peers_networks.build(method.peer, model, run.bits)
    if run.bits is None or method.peer is not None:
        stage = tfl.Stage(run.epochs, learning_rate=rate, decay="cosine", warmup=warmup)
        experiment.compile_model(model, rate)
        return model, [experiment.float_learning_rate(stage, data)]
    quantized = tfl.quantize(
        model,
        [
            tfl.PrecisionRule(edges, 8, 8, "uniform", "uniform"),
            tfl.PrecisionRule(".*", *run.bits, *method.quantizers),
        ],
        residual_bits=8,
    )
    tfl.calibrate(quantized, data.train)
    trainer = experiment.trainer_for(
        quantized, model, method.staging, method.distill, seed=run.seed
    )
    steps = run.epochs * data.steps_per_epoch
    teacher_optimizer = experiment.teacher_optimizer(
        method.distill, rate, "cosine", steps, warmup=warmup
    )
    experiment.compile_model(trainer, rate, teacher_optimizer=teacher_optimizer)
    stages = experiment.stages_for(
        method.staging,
        run.bits,
        run.epochs,
        rate,
        "cosine",
        cifar_plan.LADDER,
        warmup=warmup,
    )
    return trainer, [tfl.callbacks.StagedPrecision(stages)]


def costs(trained) -> dict:
    """Bytes of packed weights and bit operations of the network to be deployed."""
    network = trained.student if isinstance(trained, tfl.LowBitTrainer) else trained
    cost = tfl.summary(network).cost
    return {"weight_bytes": cost.weight_bytes, "bops": cost.bops}


class EpochClock(keras.callbacks.Callback):
    """CPU time of this process in each epoch that it trained."""

    def __init__(self):
        super().__init__()
        self._seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        del epoch, logs
        self._start = time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        """Stops it."""
        del epoch, logs
        self._seconds.append(time.process_time() - self._start)

    def median(self) -> float | None:
        """The median in seconds, or None where no epoch was trained."""
        return round(statistics.median(self._seconds), 1) if self._seconds else None


if __name__ == "__main__":
    # Two processes of one thread each do more than one of two.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    perform(*pickle.load(sys.stdin.buffer))
