"""Fashion-MNIST, from its IDX files or as prepared by TensorFlow Datasets.

Xiao, Rasul, Vollgraf, Fashion-MNIST, arXiv:1708.07747.
"""

import pathlib

import numpy as np

from tf_lowbit.datasets import augmentation, idx, tfds_source
from tf_lowbit.datasets.dataset import Normalization
from tf_lowbit.datasets.pipeline import Examples, InMemorySource

# Where the Debian package dataset-fashion-mnist puts the files.
DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"

_CLASSES = 10
_PREFIXES = ("train", "t10k")
_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
# Mean and deviation of the 60,000 training images.
_NORMALIZATION = Normalization(255.0, (0.2860,), (0.3530,))


def read(*, data_dir: str | None = None) -> InMemorySource:
    """Reads Fashion-MNIST: 60000 and 10000 images, 28x28x1, 10 classes.

    Args:
        data_dir: Folder with the four IDX files, raw or compressed (.gz), or a folder
            of TensorFlow Datasets. None tries the folder of the Debian package
            dataset-fashion-mnist, then the default of TensorFlow Datasets.

    Raises:
        FileNotFoundError: If it is in none of these folders, or an IDX file is missing.
        ValueError: If an IDX file is malformed, or training and test images differ in
            size.
    """
    folder = pathlib.Path(DEBIAN_FOLDER if data_dir is None else data_dir)
    parts = _read_folder(folder) or _read_prepared(data_dir)
    if parts is None:
        raise FileNotFoundError(
            "fashion_mnist must be on this machine: install the Debian package "
            "dataset-fashion-mnist, or give --data_dir the folder of its IDX files or "
            "of TensorFlow Datasets. "
            f"Received: data_dir={data_dir!r}, nothing in {folder}"
        )
    train, test = parts
    return InMemorySource(
        name="fashion_mnist",
        train=train,
        test=test,
        classes=_CLASSES,
        normalization=_NORMALIZATION,
        augmentation=augmentation.crop_and_flip(padding=2),
    )


def _read_folder(folder: pathlib.Path) -> tuple[Examples, Examples] | None:
    """Reads the four files; returns None if none of them is there."""
    names = [f"{prefix}-{kind}" for prefix in _PREFIXES for kind in _KINDS]
    found = {name: _raw_or_compressed(folder / name) for name in names}
    paths = {name: path for name, path in found.items() if path is not None}
    missing = [name for name in names if name not in paths]
    if len(missing) == len(names):
        return None
    if missing:
        raise FileNotFoundError(
            f"{folder} must hold the files {names}, raw or compressed (.gz). "
            f"Received: a folder without {missing}"
        )
    parts = []
    for prefix in _PREFIXES:
        images, labels = idx.read_pair(
            paths[f"{prefix}-{_KINDS[0]}"],
            paths[f"{prefix}-{_KINDS[1]}"],
            classes=_CLASSES,
        )
        parts.append(Examples(images[..., np.newaxis], labels.astype(np.int64)))
    train, test = parts
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"The training and the test images in {folder} must be of one size. "
            f"Received: {train.images.shape[1:3]} and {test.images.shape[1:3]}"
        )
    return train, test


def _raw_or_compressed(path: pathlib.Path) -> pathlib.Path | None:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    return None


def _read_prepared(data_dir: str | None) -> tuple[Examples, Examples] | None:
    try:
        return tfds_source.read_train_and_test("fashion_mnist", data_dir)
    except (ImportError, FileNotFoundError):
        # The caller's message names both places to look in.
        return None
