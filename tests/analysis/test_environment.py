import json
import os
import platform
from importlib import metadata

import numpy as np

import tf_lowbit as tfl
from tf_lowbit.analysis import environment
from tf_lowbit.compat import tf


def test_versions_are_those_that_are_installed():
    versions = environment()["versions"]
    assert versions.pop("tf_lowbit") == tfl.__version__
    assert versions.pop("python") == platform.python_version()
    assert versions == {name: metadata.version(name) for name in versions}
    assert set(versions) >= {"tensorflow", "tf-keras", "tensorflow-model-optimization"}
    assert versions["tensorflow"] == tf.__version__


def test_machine_and_its_devices():
    machine = environment()["machine"]
    kinds = ["CPU"] * len(tf.config.list_logical_devices("CPU"))
    assert len(kinds) == 4  # tests/conftest.py
    kinds += ["GPU"] * len(tf.config.list_logical_devices("GPU"))
    assert machine["devices"] == kinds
    assert machine["cpus"] == os.cpu_count()
    assert machine["processor"] == platform.machine()
    assert machine["platform"] == platform.platform()
    assert machine["instructions"] == sorted(set(machine["instructions"]))
    # NumPy asks the CPU itself.
    features = np._core._multiarray_umath.__cpu_features__
    assert ("avx2" in machine["instructions"]) == features.get("AVX2", False)
    assert ("fma" in machine["instructions"]) == features.get("FMA3", False)


def test_is_ready_for_json():
    found = environment()
    assert set(found) == {"versions", "machine"}
    assert json.loads(json.dumps(found)) == found
    assert all(isinstance(version, str) for version in found["versions"].values())
