"""Writing files whole or not at all."""

import contextlib
import gzip
import hashlib
import os
from pathlib import Path

# File systems take names of 255 bytes; a temporary one is a little longer.
_LONGEST = 240


def replace_file(path, data: bytes) -> Path:
    """Writes under a temporary name in the same folder, then renames.

    Args:
        path: where the file goes; one that is there stays until the new one is whole.
        data: its bytes.

    Returns:
        The path.

    Raises:
        OSError: if the folder is missing or cannot be written, or the disk is full.
            Nothing is left behind.
    """
    path = Path(path)
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    temporary = path.with_name(f".{name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The file must be writable ({error.strerror}). Received: {str(path)!r}",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def gzip_bytes(data: bytes) -> int:
    """The size of data after `gzip -9`.

    Args:
        data: such as the content of a file.

    Returns:
        In bytes.
    """
    return len(gzip.compress(data, 9, mtime=0))
