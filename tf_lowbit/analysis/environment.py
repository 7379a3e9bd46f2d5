"""Versions and machine of a result."""

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
# Instruction sets that decide the speed of float32 and int8: on x86, then on ARM.
_INSTRUCTIONS = {
    *("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),
}


def environment() -> dict:
    """Versions and machine, to store beside a result.

    Returns:
        JSON-ready: "versions" (of this library, Python and packages) and "machine"
        (platform, processor, number of CPUs, their instruction sets for float32 and
        int8 or an empty list if unknown, the setting of TensorFlow's oneDNN kernels,
        and types of TensorFlow's devices).
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
            # It changes the last bits of results; the default depends on the CPU.
            "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
            "devices": [d.device_type for d in tf.config.list_logical_devices()],
        },
    }


def _instructions() -> list[str]:
    """Instruction sets of one CPU, from Linux; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return sorted(_INSTRUCTIONS & set(flags[1].split())) if flags else []
