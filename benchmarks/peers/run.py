"""One training of the comparison with other libraries, and the file made of it.

`python -m benchmarks.peers` starts it, and hands it the run, pickled, on its
standard input.
"""

import pickle
import sys
import tempfile
from importlib import metadata
from pathlib import Path

# Before TensorFlow: it sets what TensorFlow reads when it is imported. And before the
# examples: it makes them importable.
import accuracy_run
import numpy as np

import tf_lowbit as tfl
from benchmarks.accuracy import plan as sweep
from benchmarks.peers import files as peers_files
from benchmarks.peers import networks as peers_networks
from benchmarks.peers import plan as peers_plan
from examples import experiment
from tf_lowbit import datasets, models
from tf_lowbit.compat import keras, tf


def perform(
    run: sweep.Run, settings: sweep.Settings, folder: Path, data_dir: str | None = None
) -> None:
    """Trains, measures, converts, and writes the result.

    What a library refuses, and a training that diverges, are results.

    Args:
        run: With its learning rate.
        settings: Of all runs.
        folder: Of the results, with the float networks that the runs start from.
        data_dir: Of the data set, or None for its default.
    """
    if run.method not in peers_plan.PEERS and run.purpose != "deployment":
        accuracy_run.perform(run, settings, folder, data_dir)
        return
    experiment.quiet()
    keras.utils.set_random_seed(run.seed)
    data = accuracy_run.load_data(run, settings, data_dir)
    model = models.get(
        run.network,
        classes=data.classes,
        input_shape=data.input_shape,
        width=settings.width,
    )
    accuracy_run.load_start(model, folder, run)
    if run.method in peers_plan.PEERS:
        found = trained_peer(model, run, data)
    elif run.method == peers_plan.POST_TRAINING:
        found = {
            "file": peers_files.deployed(
                model, peers_files.post_training(model, data), model, data
            )
        }
    else:
        found = {"file": our_file(model, run, settings, data)}
    package = peers_plan.PACKAGES.get(run.method)
    found["peer"] = {package: metadata.version(package)} if package else {}
    sweep.write(folder, run, accuracy_run.record(run, settings, found))


def trained_peer(model, run: sweep.Run, data: datasets.Dataset) -> dict:
    """Makes a peer's network, trains it and measures it.

    Args:
        model: The float network that it starts from.
        run: What is trained.
        data: On what.

    Returns:
        JSON-ready: accuracy and loss (None with "refused" or "diverged", which say
        why), how it was trained, and in "file" what became of its TFLite file.
    """
    found = {"accuracy": None, "loss": None, "diverged": None, "refused": None}
    try:
        network = peers_networks.build(run.method, model, run.bits)
    except ImportError:
        raise  # The environment lacks it: no word of the library's own.
    except Exception as error:  # Whatever its own limits raise: the table says it.
        return {**found, "refused": peers_files.said(error)}
    found["float_difference"] = peers_networks.float_difference(run.method, model)
    before = {w.name: w.numpy() for w in network.trainable_weights}
    experiment.compile_model(network, run.learning_rate)
    clock = accuracy_run.Clock()
    try:
        history = fit(network, run, data)
        found |= clock.seconds()
        found["loss"], found["accuracy"] = network.evaluate(
            data.validation if run.is_held_out else data.test,
            callbacks=[experiment.StayFinite()],
            verbose=0,
        )
    except ValueError as error:
        if "must stay finite" not in str(error):
            raise
        return {**found, "diverged": str(error)}
    # A quantized layer that silently does not learn would be no comparison.
    unmoved = [
        w.name
        for w in network.trainable_weights
        if np.array_equal(w.numpy(), before[w.name])
    ]
    found |= {
        "unmoved": unmoved,
        "training_loss": [round(float(x), 5) for x in history["loss"]],
    }
    if run.is_held_out:
        return found
    try:
        content = peers_files.converted(
            network, is_quantized=run.method.startswith("tfmot")
        )
    except Exception as error:  # The converter's limits, likewise.
        return {**found, "file": {"refused": peers_files.said(error)}}
    return {**found, "file": peers_files.deployed(network, content, model, data)}


def fit(network: keras.Model, run: sweep.Run, data: datasets.Dataset) -> dict:
    """Trains a compiled network as the sweep's plain method is trained."""
    stage = tfl.Stage(
        run.epochs,
        learning_rate=run.learning_rate,
        decay="cosine",
        warmup=sweep.warmup_of(run),
    )
    return network.fit(
        data.train,
        steps_per_epoch=data.steps_per_epoch,
        epochs=run.epochs,
        callbacks=[
            experiment.float_learning_rate(stage, data),
            experiment.StayFinite(),
        ],
        verbose=0,
    ).history


def our_file(model, run: sweep.Run, settings: sweep.Settings, data) -> dict:
    """Trains a network of ours, exports it and verifies the file."""
    if run.method == peers_plan.FOR_FILE:
        network = network_for_file(model, run.bits)
        tfl.calibrate(network, data.train)
        experiment.compile_model(network, run.learning_rate)
        fit(network, run, data)
    else:
        trained, _, callbacks = accuracy_run.prepared(model, run, settings, data)
        trained.fit(
            data.train,
            steps_per_epoch=data.steps_per_epoch,
            epochs=run.epochs,
            callbacks=callbacks,
            verbose=0,
        )
        network = trained.student
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.tflite")
        result = tfl.export.to_tflite(network, path, data.train, verbose=0)
        content = path.read_bytes()
    report = tfl.export.verify(
        content,
        result,
        data.test,
        trained=network,
        tensor_batches=5,
        verbose=0,
    )
    return {
        **peers_files.deployed(network, content, model, data),
        "verified": report.ok,
        "failures": report.failures,
        "twin_agrees": report.predictions.twin_agrees,
        "notes": report.notes,
    }


def network_for_file(model: keras.Model, bits: tuple[int, int]) -> keras.Model:
    """A network of ours in which nothing is float that its file rounds."""
    rules = [
        tfl.PrecisionRule("stem|head", 8, 8, "uniform", "uniform"),
        tfl.PrecisionRule(".*", *bits),
    ]
    return tfl.quantize(model, rules, residual_bits=8)


if __name__ == "__main__":
    # Two processes of one thread each do more than one of two.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    perform(*pickle.load(sys.stdin.buffer))
