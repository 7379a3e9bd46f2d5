"""Writes IDX files."""

import gzip
import pathlib
import struct

import numpy as np


def content(array: np.ndarray) -> bytes:
    """Returns an array of unsigned bytes in IDX format."""
    array = np.asarray(array, np.uint8)
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_fashion_mnist(folder: pathlib.Path, train, test, *, compressed: bool):
    """Writes the four files of Fashion-MNIST.

    Args:
      folder: an existing folder.
      train: pair of images and labels.
      test: pair of images and labels.
      compressed: whether to write .gz files.
    """
    for prefix, arrays in (("train", train), ("t10k", test)):
        for kind, array in zip(
            ("images-idx3-ubyte", "labels-idx1-ubyte"), arrays, strict=True
        ):
            data = content(array)
            if compressed:
                (folder / f"{prefix}-{kind}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / f"{prefix}-{kind}").write_bytes(data)
