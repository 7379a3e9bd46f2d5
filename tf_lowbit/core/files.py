"""Writing files whole or not at all."""

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# A ZIP may unpack to so many times its size, and in any case to so many bytes.
_MOST_TIMES = 200
_ALWAYS_FINE = 2**26


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path; its file replaces `path` at the end of the context.

    The temporary file has the same name, but is in a new private folder beside `path`,
    so that other writers of `path`, and links, cannot interfere. At the end the content
    is flushed to disk and renamed. Of several writers, the last wins.

    Args:
        path: Destination. An existing file stays until the new one is complete.

    Raises:
        OSError: If the folder is missing or not writable, or the disk is full. After
            any error nothing is left behind. Only a killed process may leave its
            folder, named `.partial-...`.
    """
    path = Path(path)
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
        temporary = folder / path.name
        yield temporary
        flush(temporary)
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


def replace_file(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Writes bytes, or text as UTF-8, whole or not at all; returns the path.

    Raises:
        OSError: As `replaced`.
        UnicodeEncodeError: If UTF-8 cannot encode the text.
    """
    data = content.encode() if isinstance(content, str) else content
    with replaced(path) as temporary, open(temporary, "xb") as file:
        file.write(data)
    return Path(path)


def require_plausible_zip(file: str | os.PathLike[str] | BinaryIO) -> None:
    """Refuses a ZIP (path or binary file) that would fill memory or disk.

    Nothing is unpacked. Python unpacks no more of a part than its declared size.

    Raises:
        ValueError: If it is not a ZIP, or its parts declare more than 64 MiB and more
            than 200 times the file's size.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            # Parts may share bytes, so the size of the whole file counts.
            assert archive.fp is not None  # It is open.
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


def flush(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
