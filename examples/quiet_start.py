"""Imports the library without TensorFlow's notes at start. Import this module first.

TensorFlow's libraries write to the standard error before their log level can be set:
missing CUDA drivers, plug-ins registered twice, the CPU's instructions. These notes are
removed. Warnings and errors stay; with TF_CPP_MIN_LOG_LEVEL=0 everything stays.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Information, and messages of a machine without a GPU.
_NOTES = re.compile(
    rb"^I\d{4} |^WARNING: All log messages before absl|cuInit|Unable to register cu"
)


def without_notes(text: bytes) -> bytes:
    """Removes the notes from a text that TensorFlow's libraries wrote."""
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        return text
    lines = text.splitlines(keepends=True)
    return b"".join(line for line in lines if not _NOTES.search(line))


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds back the standard error, and writes it without notes at the end."""
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

    # This looks for GPUs, and so triggers CUDA's messages.
    tf.config.list_physical_devices()
