r"""Whether the input pipeline keeps ahead of the training step, for each data set.

  python -m benchmarks.cost.input_pipeline \
      --output=benchmarks/results/input_pipeline.json

Batches alone, the float step alone on one fixed batch, and both as `fit` has them, in
wall time per batch, taking turns. A pipeline keeps ahead where the batches alone take
less than the step, and does not slow training down where both together take little more
than the step alone. CIFAR and ImageNet are read through TFDS from records of noise that
are written first: noise is the hardest to decode.
"""

import os
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# What writes TFDS's records is the tests'.
import numpy as np
import rich.console
import rich.table
from absl import app, flags

from benchmarks.cost import stepping
from tests.datasets import tfds_files
from tf_lowbit import datasets, models
from tf_lowbit.compat import keras, tf

FLAGS = flags.FLAGS

DATASETS = ["digits", "fashion_mnist", "cifar10", "cifar100", "imagenet2012"]

flags.DEFINE_list("dataset", DATASETS, "What to measure.")
flags.DEFINE_integer("width", 8, "Channels of the ResNet-8: narrow, so a fast step.")
flags.DEFINE_integer("batch_size", 128, "Images in a batch; an eighth for ImageNet.")
flags.DEFINE_integer("steps", 16, "Batches in a round.")
flags.DEFINE_integer("rounds", 5, "Rounds that count; one more warms up.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")

# Height and width of an image in ImageNet, on average.
IMAGENET_SHAPE = (375, 500, 3)
# At least as many batches as a pipeline keeps ready.
_AHEAD = 6
PARTS = ("batches alone", "step alone", "together")


def write_records(name: str, folder: str, count: int) -> None:
    """Writes a data set of TFDS with images of noise."""
    if name == "imagenet2012":
        images = tfds_files.images_with_labels(count, 1000, IMAGENET_SHAPE, seed=0)
        for index, example in enumerate(images):
            example["file_name"] = f"{index}.JPEG"
        splits = {"train": images, "validation": images[:2]}
    else:
        classes = 10 if name == "cifar10" else 100
        images = tfds_files.images_with_labels(count, classes, (32, 32, 3), seed=0)
        for index, example in enumerate(images):
            example["id"] = f"train_{index:05d}"
            if name == "cifar100":
                example["coarse_label"] = 0
        splits = {"train": images, "test": images[:2]}
    tfds_files.write(name, folder, splits)


def load(name: str, folder: str) -> datasets.Dataset:
    """The data set, written first where it is TFDS's."""
    if name in ("digits", "fashion_mnist"):
        return datasets.load(name, batch_size=FLAGS.batch_size)
    batch_size = FLAGS.batch_size
    if name == "imagenet2012":
        batch_size = max(1, batch_size // 8)
    write_records(name, folder, 4 * batch_size)
    return datasets.load(name, batch_size=batch_size, data_dir=folder)


def network(data: datasets.Dataset) -> keras.Model:
    """What is trained: as fast a network as anyone would train on these data."""
    if data.name == "imagenet2012":
        return models.get("resnet18", input_shape=data.input_shape)
    return models.preact_resnet(
        8, width=FLAGS.width, classes=data.classes, input_shape=data.input_shape
    )


def wall_seconds(act) -> float:
    """Wall time of one call, the mean over a round."""
    # What was prefetched while others had their turn is used up first.
    for _ in range(_AHEAD):
        act()
    start = time.perf_counter()
    for _ in range(FLAGS.steps):
        act()
    return (time.perf_counter() - start) / FLAGS.steps


def measure(name: str, folder: str) -> dict:
    """Milliseconds of each part, and whether the pipeline keeps ahead."""
    data = load(name, folder)
    model = network(data)
    fixed = stepping.step_function(model, data.batch_size, data.input_shape)
    batches, fed = iter(data.train), iter(data.train)
    function = model.train_function
    parts = {
        "batches alone": lambda: next(batches),
        "step alone": lambda: fixed()["loss"].numpy(),
        "together": lambda: function(fed)["loss"].numpy(),
    }
    rounds = [
        {part: wall_seconds(act) for part, act in parts.items()}
        for _ in range(FLAGS.rounds + 1)
    ][1:]
    compared = stepping.compare(rounds, "together", "step alone")
    ahead = stepping.compare(rounds, "batches alone", "step alone")
    return {
        "dataset": name,
        "batch_size": data.batch_size,
        "milliseconds": {
            part: round(1000 * float(np.median([r[part] for r in rounds])), 2)
            for part in PARTS
        },
        "batches to step": ahead["median"],
        "together to step": compared["median"],
    }


def main(argv):
    """Measures, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    # One step function for each network is meant, not the retracing it looks like.
    tf.get_logger().setLevel("ERROR")
    table = rich.table.Table(title="Wall milliseconds per batch, and ratios")
    headers = ("dataset", "batch", *PARTS, "batches to step", "together to step")
    for column in headers:
        table.add_column(column, justify="right")
    figures = []
    for name in FLAGS.dataset:
        with tempfile.TemporaryDirectory() as folder:
            figures.append(measure(name, folder))
        found = figures[-1]
        cells = [found["batch_size"], *found["milliseconds"].values()]
        cells += [found["batches to step"], found["together to step"]]
        table.add_row(name, *map(str, cells))
    rich.console.Console(width=110).print(table)
    if FLAGS.output:
        stepping.write(FLAGS.output, {"datasets": figures}, __name__)


if __name__ == "__main__":
    app.run(main)
