"""Data sets that TensorFlow Datasets has prepared on this machine.

Nothing is downloaded here. TensorFlow Datasets is imported on first use: importing it
takes seconds, and only some data sets need it.
"""

import numpy as np

from tf_lowbit.datasets.pipeline import Examples


def import_tfds():
    """Imports TensorFlow Datasets.

    Returns:
      The module.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "This data set needs TensorFlow Datasets: "
            f"pip install tensorflow-datasets. Received: {error}"
        ) from error
    return tfds


def prepared_builder(name: str, data_dir: str | None):
    """Finds a prepared data set.

    Args:
      name: its name in TensorFlow Datasets.
      data_dir: the folder of TensorFlow Datasets; None for the environment variable
        TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
      Its tfds.core.DatasetBuilder.

    Raises:
      ImportError: TensorFlow Datasets is not installed.
      FileNotFoundError: the data set was not prepared there.
    """
    builder = import_tfds().builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"{name} must be prepared on this machine: run `tfds build {name}`, or "
            "name the folder that holds it with the environment variable "
            "TFDS_DATA_DIR or with --data_dir. "
            f"Received: data_dir={data_dir!r}, nothing in {builder.data_dir}"
        )
    return builder


def require_splits(builder, *names: str) -> None:
    """Checks that a data set was prepared with the splits that are needed.

    Args:
      builder: tfds.core.DatasetBuilder, prepared.
      *names: the splits.

    Raises:
      ValueError: a split is missing or empty.
    """
    found = {name: info.num_examples for name, info in builder.info.splits.items()}
    if not all(found.get(name) for name in names):
        raise ValueError(
            f"{builder.name} must be prepared with examples in the splits "
            f"{list(names)}. Received: {found} in {builder.data_dir}"
        )


def read_train_and_test(name: str, data_dir: str | None) -> tuple[Examples, Examples]:
    """Reads the splits `train` and `test` of an image data set into memory.

    Args:
      name: its name in TensorFlow Datasets; images of one size.
      data_dir: see `prepared_builder`.

    Returns:
      The training and the test examples, in their stored order.

    Raises:
      ImportError: TensorFlow Datasets is not installed.
      FileNotFoundError: the data set was not prepared.
      ValueError: a split is missing or empty.
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
