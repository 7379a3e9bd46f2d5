"""The virtual environment in which this library and its peers are together."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ".venv-peers"
# Written last: an interrupted environment is none.
_STAMP = ".complete"


def set_up(folder: Path) -> None:
    """Makes the environment, anew if there is one.

    Args:
        folder: Where to.

    Raises:
        subprocess.CalledProcessError: If a step of it fails.
    """
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    peers = ROOT / "benchmarks" / "requirements-peers.txt"
    for command in (
        [sys.executable, "-m", "venv", "--clear", folder],
        [*install, "-r", ROOT / "requirements.lock"],
        [*install, "--no-deps", "-r", peers],
        [*install, "--no-deps", "--no-build-isolation", "-e", ROOT],
    ):
        subprocess.run([str(part) for part in command], check=True)
    (folder / _STAMP).touch()


def python_of(folder: Path) -> Path:
    """The Python of an environment.

    Raises:
        ValueError: If it was not made, or not to its end.
    """
    if not (folder / _STAMP).exists():
        raise ValueError(
            "The environment must have been made: run `python -m benchmarks.peers "
            f"--setup`. Received: {str(folder)!r}"
        )
    return folder / "bin" / "python"
