"""Reads IDX files, the format of MNIST and Fashion-MNIST.

A file is a big-endian header and then the values. The header has two zero bytes, a byte
for the value type (0x08: unsigned byte), a byte for the number of dimensions, and 32
bits for each dimension. http://yann.lecun.com/exdb/mnist/
"""

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


def read_array(path: str | pathlib.Path, rank: int) -> np.ndarray:
    """Reads one file of unsigned bytes, raw or gzip-compressed, as uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If compression is damaged, the magic number is wrong, the number of
            dimensions is not `rank`, or there are too few or too many bytes.
    """
    content = pathlib.Path(path).read_bytes()
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path} must be a whole gzip file. Received: {error}"
            ) from error
    header = struct.Struct(f">4B{rank}I")
    magic = bytes((0, 0, _UNSIGNED_BYTE, rank))
    if len(content) >= len(magic) and not content.startswith(magic):
        raise ValueError(
            f"{path} must start with the IDX magic number 0x{magic.hex()}. "
            f"Received: 0x{content[: len(magic)].hex()}"
        )
    if len(content) < header.size:
        raise ValueError(
            f"{path} must have a header of {header.size} bytes. "
            f"Received: {len(content)} bytes"
        )
    shape = header.unpack_from(content)[4:]
    expected = header.size + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path} must have {expected} bytes for shape {list(shape)}. "
            f"Received: {len(content)} bytes"
        )
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)


def read_pair(
    images_path: str | pathlib.Path, labels_path: str | pathlib.Path, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads images, uint8 [N, H, W], and labels, uint8 [N] in [0, classes).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is malformed, the counts differ, or a label is out of
            range.
    """
    images = read_array(images_path, rank=3)
    labels = read_array(labels_path, rank=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} and {labels_path} must hold as many images as labels. "
            f"Received: {len(images)} images, {len(labels)} labels"
        )
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise ValueError(
            f"Labels in {labels_path} must be in [0, {classes}). "
            f"Received: {labels[wrong[0]]} at index {wrong[0]}"
        )
    return images, labels
