"""What a training step of other libraries costs, in CPU time and in memory.

`python -m benchmarks.peers` starts it, and hands it the task, pickled, on its
standard input.
"""

import importlib
import os
import pickle
import re
import sys
from importlib import metadata
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tf_lowbit as tfl
from benchmarks.accuracy import plan as sweep
from benchmarks.common import store
from benchmarks.cost import stepping
from benchmarks.peers import networks as peers_networks
from benchmarks.peers import plan as peers_plan
from tf_lowbit import models
from tf_lowbit.analysis import environment
from tf_lowbit.compat import keras, tf

BITS = (2, 2)
# Modules that a variant imports when it is built; for memory they must be there before.
_MODULES = {"qkeras": "qkeras", "larq": "larq"}


def network(variant: str, depth: int, width: int) -> keras.Model:
    """A CIFAR pre-activation ResNet, float or at W2A2.

    Args:
        variant: One of `peers_plan.MEASURED`.
        depth: Of the network, 6n+2.
        width: Channels of its first stage.
    """
    model = models.preact_resnet(depth, width=width)
    if variant == "float":
        return model
    if variant in peers_plan.OURS:
        rule = tfl.PrecisionRule(".*", *BITS, *sweep.METHODS[variant].quantizers)
        return tfl.quantize(model, [rule])
    return peers_networks.build(variant, model, BITS)


def step_cost(path: Path, name: str, settings: dict) -> None:
    """Writes CPU time of steps as ratios of the same round, to float and to ours.

    Args:
        path: Of the results.
        name: Of this one.
        settings: "depth", "width", "batch_size", "rounds" and "steps".
    """
    keras.utils.set_random_seed(0)
    # One step function for each variant is meant, not the retracing it looks like.
    tf.get_logger().setLevel("ERROR")
    steps = {
        variant: stepping.step_function(
            network(variant, settings["depth"], settings["width"]),
            settings["batch_size"],
        )
        for variant in peers_plan.MEASURED
    }
    rounds = stepping.take_turns(steps, settings["rounds"], settings["steps"])
    pairs = [(v, "float") for v in steps if v != "float"]
    pairs += [(peer, ours) for peer in steps if peer in peers_plan.PEERS
              for ours in peers_plan.OURS]  # fmt: skip
    ratios = [stepping.compare(rounds, name, other) for name, other in pairs]
    write(path, name, {"ratios": ratios}, settings)


def memory(path: Path, name: str, settings: dict, variant: str, allocator: str) -> None:
    """Writes by how much a training's peak exceeds what was in use before it.

    Args:
        path: Of the results.
        name: Of this one.
        settings: "depth", "width", "batch_size" and "steps".
        variant: One of `peers_plan.MEASURED`; the only one in this process.
        allocator: One of `peers_plan.ALLOCATORS`, whose variables are set.
    """
    keras.utils.set_random_seed(0)
    if variant in _MODULES:
        importlib.import_module(_MODULES[variant])
    # Forgets the peak of the imports.
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    model = network(variant, settings["depth"], settings["width"])
    step = stepping.step_function(model, settings["batch_size"])
    for _ in range(settings["steps"]):
        step()["loss"].numpy()
    peak = kilobytes("VmHWM")
    figures = {
        "variant": variant,
        "allocator": allocator,
        "before_kilobytes": before,
        "peak_kilobytes": peak,
        "growth_kilobytes": peak - before,
    }
    write(path, name, figures, settings)


def kilobytes(field: str) -> int:
    """A field of Linux's account of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)[1])


def write(path: Path, name: str, figures: dict, settings: dict) -> None:
    """Adds figures, with what they were obtained with beside them."""
    packages = sorted(set(peers_plan.PACKAGES.values()))
    peers = {package: metadata.version(package) for package in packages}
    found = {**figures, "peer": peers, "settings": settings, **environment()}
    store.write(path, name, found)


if __name__ == "__main__":
    task, *arguments = pickle.load(sys.stdin.buffer)
    {"step cost": step_cost, "memory": memory}[task](*arguments)
