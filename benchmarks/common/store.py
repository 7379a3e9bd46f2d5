"""Results of many runs in one file, a line of JSON each.

`pandas.read_json(path, lines=True)` reads such a file. Several processes may write to
it at a time.
"""

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def read(path: Path) -> dict[str, dict]:
    """All results, by name, as they were written; none where there is no file.

    Of several lines of one name the last one counts.

    Raises:
        ValueError: If a line is no result.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return {}
    return dict(_read(path, status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=8)
def _read(path, _changed, _size):
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            result = json.loads(line)
            found[result.pop("name")] = result
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"A result must be JSON: remove the line to run it again ({error!r}). "
                f"Received: line {number} of {str(path)!r}"
            ) from error
    return found


def write(path: Path, name: str, content: dict) -> None:
    """Adds a result, on the disk when this returns.

    Args:
        path: Of the file; its folder is made.
        name: Of the run.
        content: JSON-ready.
    """
    line = json.dumps({"name": name, **content}, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


def read_weights(path: Path, name: str) -> dict[str, np.ndarray] | None:
    """The arrays that were written under a name, by their names; None where none."""
    if not path.exists():
        return None
    with np.load(path) as arrays:
        prefix = f"{name}/"
        return {
            key.removeprefix(prefix): arrays[key]
            for key in arrays.files
            if key.startswith(prefix)
        } or None


def write_weights(path: Path, name: str, weights: dict[str, np.ndarray]) -> None:
    """Adds arrays under a name, in place of those that are there.

    Args:
        path: Of an NPZ file; its folder is made.
        name: Of all arrays together.
        weights: By name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        kept = {}
        if path.exists():
            with np.load(path) as arrays:
                kept = {key: arrays[key] for key in arrays.files}
        kept |= {f"{name}/{key}": value for key, value in weights.items()}
        temporary = path.with_name(f".partial-{path.name}")
        np.savez_compressed(temporary, **kept)
        temporary.replace(path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, which one process at a time can have."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
