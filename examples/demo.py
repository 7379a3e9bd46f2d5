"""Demo of all methods on scikit-learn's digits, without any download.

1. Trains a float pre-activation ResNet-8.
2. Trains 2-bit networks from it by plain fine-tuning, two-stage and progressive
   training, stochastic precision and joint distillation, with the same total of epochs,
   and a 4-bit network. Prints a table.
3. Exports a 2-bit network that was trained for deployment to an integer TFLite file,
   proves the file equal to its integer model, and compares it with the float file.

  python examples/demo.py
"""

import json
import shutil
import statistics
from pathlib import Path

import quiet_start  # noqa: F401 (before TensorFlow)

# isort: split
import command_line
import experiment
import rich.console
import rich.table
from absl import app, flags

import tf_lowbit as tfl
from tf_lowbit import datasets, models
from tf_lowbit.compat import keras
from tf_lowbit.core.files import replace_file

FLAGS = flags.FLAGS

flags.DEFINE_integer("float_epochs", 30, "Epochs of the float training.")
flags.DEFINE_integer("epochs", 30, "Epochs of each quantized training, in total.")
flags.DEFINE_integer("width", 16, "Channels of the network's first stage.")
flags.DEFINE_integer("batch_size", 32, "Images in a batch.")
flags.DEFINE_float("float_learning_rate", 0.1, "Learning rate of the float training.")
flags.DEFINE_float(
    "learning_rate", 0.02, "Learning rate at the start of each quantized stage."
)
flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the initial weights and the order of the data.",
    lower_bound=0,
    upper_bound=experiment.LARGEST_SEED,
)
flags.DEFINE_string(
    "output_dir", "runs/demo", "Folder for the networks; an earlier demo is replaced."
)

# A file in each folder of a demo. The files of other programs are not replaced.
MARK = ".demo"
# All that the demo writes to a folder.
WRITTEN = (
    *("checkpoints", "tensorboard", "log.csv", "model.keras", "result.json"),
    *("network.tflite", "float.tflite", "deployment.json"),
)
LADDER = (8, 4, 2)
# The deployed network: first layer, last layer and residual sums train at 8 bits.
DEPLOYED = "W2A2 deployed"
# Label, method, distillation, and bits of weights and activations.
NETWORKS = (
    ("W2A2 plain", "plain", "none", (2, 2)),
    ("W2A2 two-stage", "ts", "none", (2, 2)),
    ("W2A2 progressive", "pq", "none", (2, 2)),
    ("W2A2 stochastic", "sp", "none", (2, 2)),
    ("W2A2 distilled", "plain", "joint", (2, 2)),
    ("W4A4 plain", "plain", "none", (4, 4)),
    (DEPLOYED, "plain", "none", (2, 2)),
)


def load_data(first_epoch: int = 0, first_step: int = 0) -> datasets.Dataset:
    """Loads the digits; the training part starts at an epoch and a step."""
    return datasets.load(
        "digits",
        batch_size=FLAGS.batch_size,
        seed=FLAGS.seed,
        start_epoch=first_epoch,
        start_step=first_step,
    )


def float_model() -> keras.Model:
    """Makes the float network that all others start from, untrained."""
    data = load_data()
    model = models.preact_resnet(
        8, width=FLAGS.width, classes=data.classes, input_shape=data.input_shape
    )
    experiment.compile_model(model, FLAGS.float_learning_rate)
    return model


def float_stage() -> tfl.Stage:
    """Returns the single stage of the float training."""
    return tfl.Stage(
        FLAGS.float_epochs, learning_rate=FLAGS.float_learning_rate, decay="cosine"
    )


def stages(method: str, bits: tuple[int, int]) -> list[tfl.Stage]:
    """Returns the stages of one of the `NETWORKS`."""
    return experiment.stages_for(
        method, bits, FLAGS.epochs, FLAGS.learning_rate, "cosine", LADDER
    )


def train_quantized(
    model: keras.Model,
    label: str,
    method: str,
    distill: str,
    bits: tuple[int, int],
    folder: Path,
) -> experiment.Outcome:
    """Quantizes the float network and trains the result by one method."""
    rules = [tfl.PrecisionRule(".*", weight_bits=bits[0], activation_bits=bits[1])]
    if label == DEPLOYED:
        rules.insert(0, tfl.PrecisionRule("stem|head", 8, 8, "uniform", "uniform"))
    quantized = tfl.quantize(
        model, rules, residual_bits=8 if label == DEPLOYED else None
    )
    tfl.calibrate(quantized, load_data().train)
    # The teacher is a copy, because the other networks start from the float one.
    teacher = keras.models.clone_model(model)
    teacher.set_weights(model.get_weights())
    trainer = experiment.trainer_for(
        quantized, teacher, method, distill, seed=FLAGS.seed
    )
    experiment.compile_model(
        trainer,
        FLAGS.learning_rate,
        teacher_optimizer=experiment.teacher_optimizer(
            distill,
            FLAGS.learning_rate,
            "cosine",
            FLAGS.epochs * load_data().steps_per_epoch,
        ),
    )
    return experiment.train(
        trainer, load_data, stages(method, bits), folder, label=label
    )


def results_table(rows) -> rich.table.Table:
    """Makes a table of rows (label, bits, outcome, folder)."""
    table = rich.table.Table(title="scikit-learn digits, pre-activation ResNet-8")
    for column in ("network", "W / A bits"):
        table.add_column(column, no_wrap=True)
    for column in ("test accuracy", "weight bytes", "epochs", "seconds"):
        table.add_column(column, justify="right")
    for label, bits, outcome, _ in rows:
        table.add_row(
            label,
            bits,
            f"{100 * outcome.accuracy:.2f} %",
            f"{outcome.cost.weight_bytes:,}",
            str(outcome.epochs),
            f"{outcome.seconds:.0f}",
        )
    return table


def deploy(float_model: keras.Model, folder: Path, console) -> dict:
    """Exports the network in `folder`, verifies the file and compares it.

    Returns:
        The content of `files_table`, JSON-ready.
    """
    data = load_data()
    model = tfl.load_model(folder / "model.keras", compile=False)
    info = experiment.deployment_info(data)
    result = tfl.export.to_tflite(
        model, folder / "network.tflite", data.train, info=info
    )
    report = tfl.export.verify(result.path, model, data.test, verbose=0)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    floats = experiment.float_tflite(float_model)
    (folder / "float.tflite").write_bytes(floats)
    files = {"float32": floats, DEPLOYED: result.path.read_bytes()}
    seconds = tfl.export.latencies(files)
    ratios = [
        own / base
        for own, base in zip(seconds[DEPLOYED], seconds["float32"], strict=True)
    ]
    found = report.predictions
    accuracy = found.right["file"] / found.labels
    deployed = {
        "verified": report.ok,
        "float_bytes": len(floats),
        "float_gzip_bytes": tfl.export.gzip_bytes(floats),
        "bytes": result.size,
        "gzip_bytes": result.gzip_size,
        "latency_ratio": statistics.median(ratios),
        "float_accuracy": classify(floats, data),
        "accuracy": accuracy,
    }
    replace_file(folder / "deployment.json", json.dumps(deployed, indent=2) + "\n")
    console.print(files_table(deployed))
    return deployed


def classify(content: bytes, data: datasets.Dataset) -> float:
    """Measures a file's accuracy on the test set."""
    run = tfl.export.Runner(content)
    right = 0
    for images, labels in data.test.as_numpy_iterator():
        (logits,) = run(images).values()
        right += int((logits.argmax(axis=-1) == labels).sum())
    return right / data.test_size


def files_table(deployed: dict) -> rich.table.Table:
    """Makes a table of the float file and the low-bit one."""
    table = rich.table.Table(title="TFLite files, one thread")
    table.add_column("file", no_wrap=True)
    for column in ("bytes", "gzipped", "latency", "test accuracy"):
        table.add_column(column, justify="right")
    for label, prefix, latency in (
        ("float32", "float_", 1.0),
        (DEPLOYED, "", deployed["latency_ratio"]),
    ):
        table.add_row(
            label,
            f"{deployed[f'{prefix}bytes']:,}",
            f"{deployed[f'{prefix}gzip_bytes']:,}",
            f"{latency:.2f}",
            f"{100 * deployed[f'{prefix}accuracy']:.2f} %",
        )
    return table


def main(argv):
    """Runs the demo."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    experiment.quiet()
    output = Path(FLAGS.output_dir)
    keras.utils.set_random_seed(FLAGS.seed)
    settings = experiment.flag_settings(__name__)
    # Made first, so that errors come before an earlier demo is replaced.
    model, stage = float_model(), float_stage()
    for _, method, _, bits in NETWORKS:
        stages(method, bits)
    labels = ["float", *(label for label, *_ in NETWORKS)]
    claim([folder_of(output, label) for label in labels])
    rows = []
    folder = fresh(folder_of(output, "float"))
    outcome = experiment.train(model, load_data, [stage], folder, label="float")
    experiment.write_result(folder, outcome, settings)
    rows.append(("float", "32 / 32", outcome, folder))
    for label, method, distill, bits in NETWORKS:
        folder = fresh(folder_of(output, label))
        outcome = train_quantized(model, label, method, distill, bits, folder)
        experiment.write_result(folder, outcome, settings)
        rows.append((label, f"{bits[0]} / {bits[1]}", outcome, folder))
    console = rich.console.Console()
    console.print(results_table(rows))
    console.print("Each holds model.keras, log.csv, result.json and tensorboard/:")
    for *_, folder in rows:
        console.print(f"  {folder}", highlight=False)
    deploy(model, rows[-1][-1], console)


def folder_of(output: Path, label: str) -> Path:
    """Returns the folder of a network."""
    return output / label.replace(" ", "-").lower()


def claim(folders: list[Path]) -> None:
    """Makes and marks the demo's folders, if no file of another program is lost.

    Raises:
        FileExistsError: If a folder has files that are not of an earlier demo.
        OSError: If a folder cannot be made or written.
    """
    held = [f for f in folders if any((f / name).exists() for name in WRITTEN)]
    # Runs of train.py have settings.
    likely = [f for f in held if not (f / experiment.SETTINGS).exists()]
    own = [f for f in likely if (f / MARK).exists() or has_unmarked_result(f)]
    # The last network of an interrupted demo without marks has no result.
    torn = [f for f in likely if own and not (f / "result.json").exists()]
    foreign = [str(f) for f in held if f not in own + torn]
    if foreign:
        raise FileExistsError(
            "--output_dir must have no run of another program, because the demo would "
            f"replace it; choose another or delete it. Received: {foreign}"
        )
    for folder in folders:
        experiment.require_writable(folder)
        (folder / MARK).write_text("Of examples/demo.py, which replaces its files.\n")


def has_unmarked_result(folder: Path) -> bool:
    """Tells whether a demo of an earlier version, without marks, wrote the result."""
    path = folder / "result.json"
    if not path.exists():
        return False
    settings = json.loads(path.read_text())["settings"]
    return settings.keys() == experiment.flag_settings(__name__).keys()


def fresh(folder: Path) -> Path:
    """Deletes the files of an earlier demo in a folder; returns the folder."""
    for name in WRITTEN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return folder


if __name__ == "__main__":
    command_line.run(main)
