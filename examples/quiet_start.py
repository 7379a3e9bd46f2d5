"""Imports the library without the notes of TensorFlow's start. Import it first.

TensorFlow's libraries write to the standard error before anybody can set their level:
that there are no CUDA drivers, that a plug-in is there twice, which instructions the
CPU has. Such notes are left out. Warnings and errors stay, and with
TF_CPP_MIN_LOG_LEVEL=0 everything.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Information, and what is said where there is no GPU.
_NOTES = re.compile(
    rb"^I\d{4} |^WARNING: All log messages before absl|cuInit|Unable to register cu"
)


def without_notes(text: bytes) -> bytes:
    """What TensorFlow's libraries wrote, without the notes."""
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        return text
    lines = text.splitlines(keepends=True)
    return b"".join(line for line in lines if not _NOTES.search(line))


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds back the process's standard error, to write it without notes at the end."""
    screen = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)
            file.seek(0)
            os.write(2, without_notes(file.read()))


with held_back():
    from tf_lowbit.compat import tf

    # Looks for GPUs, which is when CUDA complains.
    tf.config.list_physical_devices()
