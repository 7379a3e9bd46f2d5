"""What is written, and its size."""

import gzip
from pathlib import Path

from tf_lowbit.core import checks
from tf_lowbit.core.files import replace_file

__all__ = ["content_of", "gzip_bytes", "replace_file"]


def content_of(name: str, file) -> bytes:
    """The content of a file.

    Args:
        name: of the argument, for the messages.
        file: its path, or its bytes, which are handed back.

    Raises:
        ValueError: if it is neither.
        OSError: if there is no such file, or it cannot be read.
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
        data: bytes, such as the content of a file.

    Returns:
        In bytes.

    Raises:
        ValueError: if `data` are no bytes.
    """
    checks.instance("data", data, bytes | bytearray)
    return len(gzip.compress(data, 9, mtime=0))
