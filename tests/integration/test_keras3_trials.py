"""The code of README and guide in fresh processes that also use Keras 3."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = re.compile("from tf_lowbit.compat import keras.*\n")
# NumPy's backend imports jax too.
OTHER = "jax" if importlib.util.find_spec("jax") else "tensorflow"

# Behind README's code.
BETWEEN = """
import keras as keras3
import numpy as np

model3 = keras3.Sequential([
    keras3.layers.Input((8, 8, 1)),
    keras3.layers.Conv2D(4, 3, activation="relu"),
    keras3.layers.BatchNormalization(),
    keras3.layers.Flatten(),
    keras3.layers.Dense(3),
])
images = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype("f")
expected = keras3.ops.convert_to_numpy(model3(images))
for path in ("theirs.keras", "theirs.h5"):
    model3.save(path)
    loaded = tfl.load_model(path)
    np.testing.assert_allclose(loaded(images), expected, rtol=1e-4, atol=1e-4)
"""
# Behind the guide's.
AFTER = """
student = trainer.student
expected = student.predict(images, verbose=0)
found = tfl.to_keras3(student)(images)
found = keras3.ops.convert_to_numpy(found)
np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
print("backend", keras3.backend.backend())
"""


def code_of(name, *changes):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    code = "\n".join(blocks)
    for old, new in changes:
        code, count = re.subn(old, new, code)
        assert count, old
    return code


def run(folder, program, backend) -> str:
    """What the program prints, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# `tests/test_readme.py` and `test_guide.py` train as long as it stands there.
SHORT = [("epochs=10,? ?", "epochs=1, "), (r"epochs=\(10, 10\)", "epochs=(1, 1)")]


def test_keras3_is_imported_first(tmp_path):
    readme = code_of("README.md", SHORT[0])
    guide = code_of("docs/guide.md", *SHORT, ("epochs=20", "epochs=2"))
    program = "\n".join(["import keras", readme, BETWEEN, guide, AFTER])
    assert "backend tensorflow" in run(tmp_path, program, "tensorflow")


def test_all_that_is_named_keras_is_keras3(tmp_path):
    """The pages' optimizers and losses; with another backend, if it is installed."""
    theirs = (OURS, "import keras\n")
    readme = code_of("README.md", SHORT[0], theirs)
    guide = code_of("docs/guide.md", *SHORT, ("epochs=20", "epochs=2"), theirs)
    program = "\n".join([readme, BETWEEN, guide, AFTER])
    assert f"backend {OTHER}" in run(tmp_path, program, OTHER)
