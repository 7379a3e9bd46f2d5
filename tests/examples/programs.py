"""Running the example programs as a user does, with tiny settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Importing TensorFlow takes seconds: one process for all, as if each were the first.
_EACH = """
import contextlib, importlib, io, json, os, sys
sys.path.insert(0, sys.argv[1])
program = importlib.import_module(sys.argv[2])
FLAGS, found = program.FLAGS, {}
exec(sys.argv[3])
for name, (folder, arguments) in json.load(sys.stdin).items():
    FLAGS.unparse_flags()
    os.chdir(folder)
    shown, code, error = io.StringIO(), 0, ""
    with contextlib.redirect_stdout(shown):
        try:
            program.main(FLAGS([sys.argv[2], *arguments]))
        except SystemExit as ended:
            code = ended.code
        except Exception as raised:
            code, error = 1, f"{type(raised).__name__}: {raised}"
    found[name] = [code, error, shown.getvalue()]
print(json.dumps([found, "tf_lowbit" in sys.modules]))
"""

# For `run_each`: steps take their time, but no graph is traced, which takes more.
WITHOUT_TRACING = """
from tf_lowbit.compat import tf
tf.config.run_functions_eagerly(True)
"""


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


def run_each(program, cases, before="", folder="examples"):
    """Runs of a program with several sets of flags, in one process.

    Args:
        program: its name without ending.
        cases: name -> (folder to run in, arguments).
        before: Python statements to execute between import and first run.
        folder: of the repository, where the program is.

    Returns:
        Name -> (exit code, error as "Type: text", standard output); and whether the
        library was imported by any of them.
    """
    cases = {n: (str(where), list(map(str, a))) for n, (where, a) in cases.items()}
    done = subprocess.run(
        [sys.executable, "-c", _EACH, str(ROOT / folder), program, before],
        input=json.dumps(cases),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
