"""What a result was obtained with: versions and machine."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

from tf_lowbit.compat import tf
from tf_lowbit.version import __version__

_PACKAGES = (
    "tensorflow",
    "tf-keras",
    "tensorflow-model-optimization",
    "keras",
    "numpy",
)
# What decides how fast float32 and int8 are: on x86, then on ARM.
_INSTRUCTIONS = {
    *("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),
}


def environment() -> dict:
    """Versions and machine, to be written beside a result.

    Returns:
        JSON-ready: "versions" (of this library, Python and packages) and "machine"
        (platform, processor, number of CPUs, their instruction sets that matter
        to float32 and int8, empty where the system does not tell, what was asked of
        TensorFlow's oneDNN kernels, and kinds of TensorFlow's devices).
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
            "instructions": _instructions(),
            # It computes other last bits, and is on by default on some CPUs only.
            "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
            "devices": [d.device_type for d in tf.config.list_logical_devices()],
        },
    }


def _instructions() -> list[str]:
    """Of one CPU; Linux tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return sorted(_INSTRUCTIONS & set(flags[1].split())) if flags else []
