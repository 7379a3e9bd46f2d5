"""What a result was obtained with: versions and machine."""

import os
import platform
from importlib import metadata

from tf_lowbit.compat import tf
from tf_lowbit.version import __version__

_PACKAGES = (
    "tensorflow",
    "tf-keras",
    "tensorflow-model-optimization",
    "keras",
    "numpy",
)


def environment() -> dict:
    """Versions and machine, to be written beside a result.

    Returns:
        JSON-ready: "versions" (of this library, Python and packages) and "machine"
        (platform, processor, number of CPUs, kinds of TensorFlow's devices).
    """
    return {
        "versions": {
            "tf_lowbit": __version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in _PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "devices": [d.device_type for d in tf.config.list_logical_devices()],
        },
    }
