"""Running the example programs as a user does, with tiny settings."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(program, *arguments):
    return [sys.executable, str(ROOT / "examples" / program), *map(str, arguments)]


def environment():
    """The user's, with this repository to import from and nothing to download."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": "-1",
        "COLUMNS": "200",
    }


def run(program, *arguments, folder):
    """Runs to the end in `folder`; standard output and error come as text."""
    return subprocess.run(
        command(program, *arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
