"""Content of files, and its compressed size."""

import gzip
import os
from pathlib import Path

from tf_lowbit.core import checks


def content_of(name: str, file: str | os.PathLike[str] | bytes) -> bytes:
    """The content of a file.

    Args:
        name: Name of the argument, for error messages.
        file: The file's path, or its bytes, which are returned.

    Raises:
        ValueError: If it is neither.
        OSError: If the file does not exist or cannot be read.
    """
    if isinstance(file, bytes | bytearray):
        return bytes(file)
    path = Path(checks.path(name, file))
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} must be the path of a file that exists. Received: {str(path)!r}"
        )
    return path.read_bytes()


def gzip_bytes(data: bytes) -> int:
    """The size of data after `gzip -9`.

    Args:
        data: Bytes, such as the content of a file.

    Returns:
        The size in bytes.

    Raises:
        ValueError: If `data` is not bytes.
    """
    checks.instance("data", data, bytes | bytearray)
    return len(gzip.compress(data, 9, mtime=0))
