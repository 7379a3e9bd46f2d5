"""Data sets that TensorFlow Datasets prepared on this machine.

Nothing is downloaded. TensorFlow Datasets is imported on first use, since importing it
takes seconds and only some data sets need it.
"""

import types
from typing import Any

import numpy as np

from tf_lowbit.datasets.pipeline import Examples


def import_tfds() -> types.ModuleType:
    """Imports TensorFlow Datasets and returns the module.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "This data set needs TensorFlow Datasets: "
            f"pip install tensorflow-datasets. Received: {error}"
        ) from error
    return tfds


def prepared_builder(name: str, data_dir: str | None) -> Any:
    """Finds the tfds.core.DatasetBuilder of a prepared data set.

    Args:
        name: Name in TensorFlow Datasets.
        data_dir: Folder of TensorFlow Datasets; None for the environment variable
            TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
        ImportError: If TensorFlow Datasets is not installed.
        FileNotFoundError: If the data set was not prepared there.
    """
    builder = import_tfds().builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"{name} must be prepared on this machine: run `tfds build {name}`, or "
            "give its folder by the environment variable TFDS_DATA_DIR or by "
            "--data_dir. "
            f"Received: data_dir={data_dir!r}, nothing in {builder.data_dir}"
        )
    return builder


def require_splits(builder: Any, *names: str) -> None:
    """Raises ValueError if a split of a prepared builder is missing or empty."""
    found = {name: info.num_examples for name, info in builder.info.splits.items()}
    if not all(found.get(name) for name in names):
        raise ValueError(
            f"{builder.name} must be prepared with examples in the splits "
            f"{list(names)}. Received: {found} in {builder.data_dir}"
        )


def read_train_and_test(name: str, data_dir: str | None) -> tuple[Examples, Examples]:
    """Reads the splits `train` and `test` of an image data set, in stored order.

    The images must have one size. `data_dir` and errors are as in `prepared_builder`.

    Raises:
        ValueError: If a split is missing or empty.
    """
    builder = prepared_builder(name, data_dir)
    require_splits(builder, "train", "test")
    tfds = import_tfds()
    parts = []
    for split in ("train", "test"):
        # batch_size=-1 is TFDS's way to ask for a split as one tensor.
        images, labels = tfds.as_numpy(
            tfds.load(
                name,
                split=split,
                data_dir=data_dir,
                batch_size=-1,
                as_supervised=True,
                shuffle_files=False,
                download=False,
            )
        )
        parts.append(Examples(images, labels.astype(np.int64)))
    return parts[0], parts[1]
