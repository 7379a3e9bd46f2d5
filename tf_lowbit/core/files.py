"""Writing files whole or not at all."""

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

# A ZIP may unpack to this many times its size, or to this many bytes in any case.
_MOST_TIMES = 200
_ALWAYS_FINE = 2**26


@contextlib.contextmanager
def replaced(path) -> Iterator[Path]:
    """Yields where to write what then replaces a file.

    The place has the file's name, in a new folder of its own beside it, which nobody
    else may enter: other writers of the same path and links that were put there are out
    of the way. At the end of the context the content is on the disk, and is renamed; of
    several writers, the last to end wins.

    Args:
        path: where the file goes; one that is there stays until the new one is whole.

    Yields:
        A path in which no file is yet.

    Raises:
        OSError: if the folder is missing or cannot be written, or the disk is full.
            Nothing is left behind, nor after any other error within the context. Only
            a process that is killed may leave its folder, named `.partial-...`.
    """
    path = Path(path)
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
        temporary = folder / path.name
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        number = [] if error.errno is None else [error.errno]
        raise OSError(
            *number,
            f"The file must be writable ({error.strerror or error}). "
            f"Received: {str(path)!r}",
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def replace_file(path, content: bytes | str) -> Path:
    """Writes a file whole or not at all.

    Args:
        path: where it goes; one that is there stays until the new one is whole.
        content: its bytes, or a text for UTF-8.

    Returns:
        The path.

    Raises:
        OSError: as `replaced`.
        UnicodeEncodeError: for a text that UTF-8 cannot hold.
    """
    data = content.encode() if isinstance(content, str) else content
    with replaced(path) as temporary, open(temporary, "xb") as file:
        file.write(data)
    return Path(path)


def require_plausible_zip(file) -> None:
    """Refuses a ZIP that would fill memory or disk, before any of it is unpacked.

    Python unpacks no more of a part than its declared size.

    Args:
        file: path, or a binary file.

    Raises:
        ValueError: if its parts declare more than 64 MiB and more than 200 times the
            file's, or it is no ZIP.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            # Parts may share their bytes, so that the file's own size counts.
            archive.fp.seek(0, os.SEEK_END)
            packed = archive.fp.tell()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"The file must be a whole ZIP file. Received: {error}"
        ) from error
    unpacked = sum(part.file_size for part in parts)
    if unpacked > max(_ALWAYS_FINE, _MOST_TIMES * packed):
        raise ValueError(
            f"A file must not unpack to more than {_MOST_TIMES} times its size: do not "
            f"load it unless you know who made it. Received: {packed} bytes, which "
            f"declare {unpacked}"
        )


def _flush(path: Path) -> None:
    """Waits until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
