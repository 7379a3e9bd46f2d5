"""Devices of a program: one device, all GPUs of a machine, or several machines."""

import json
import os

from tf_lowbit.compat import tf

STRATEGIES = ("auto", "one", "mirrored", "multi_worker")


def strategy(name: str = "auto", logical_cpus: int = 1) -> tf.distribute.Strategy:
    """Makes the distribution strategy of a training.

    Call it before anything else runs TensorFlow: workers must connect first, and
    devices cannot be split later.

    Args:
        name: "one" device; "mirrored" over all GPUs of this machine (or its logical
            CPUs); or "multi_worker", on each machine that TF_CONFIG names. "auto" is
            "multi_worker" if TF_CONFIG names several machines, else "mirrored" if there
            are several GPUs, else "one".
        logical_cpus: Number of devices to split the CPU into, to try "mirrored" without
            GPUs.

    Returns:
        The strategy. Batches are split among its replicas.

    Raises:
        ValueError: If there are no such devices, or TF_CONFIG is invalid.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}. Received: {name!r}")
    if logical_cpus < 1:
        raise ValueError(f"logical_cpus must be >= 1. Received: {logical_cpus}")
    if logical_cpus > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * logical_cpus,
        )
    workers = _workers()
    if name == "multi_worker" or (name == "auto" and len(workers) > 1):
        return _multi_worker(workers)
    gpus = tf.config.list_logical_devices("GPU")
    devices = gpus or tf.config.list_logical_devices("CPU")
    if name == "mirrored" and len(devices) < 2:
        raise ValueError(
            "--strategy=mirrored needs at least two GPUs, or --logical_cpus=2 to try "
            f"it without. Received: devices {[device.name for device in devices]}"
        )
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def _workers() -> list[str]:
    """Returns the addresses of the workers that TF_CONFIG names."""
    text = os.environ.get("TF_CONFIG", "{}")
    try:
        return list(json.loads(text).get("cluster", {}).get("worker", []))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"TF_CONFIG must be a JSON object ({error}). Received: {text!r}"
        ) from error


def _multi_worker(workers):
    if not workers:
        raise ValueError(
            "--strategy=multi_worker needs the environment variable TF_CONFIG on each "
            'machine, such as {"cluster": {"worker": ["host1:12345", "host2:12345"]}, '
            '"task": {"type": "worker", "index": 0}}. '
            f"Received: TF_CONFIG={os.environ.get('TF_CONFIG')!r}"
        )
    has_gpus = bool(tf.config.list_physical_devices("GPU"))
    kinds = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=kinds.AUTO if has_gpus else kinds.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
