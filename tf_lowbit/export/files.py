"""What is written, and its size."""

import gzip

from tf_lowbit.core.files import replace_file

__all__ = ["gzip_bytes", "replace_file"]


def gzip_bytes(data: bytes) -> int:
    """The size of data after `gzip -9`.

    Args:
        data: such as the content of a file.

    Returns:
        In bytes.
    """
    return len(gzip.compress(data, 9, mtime=0))
