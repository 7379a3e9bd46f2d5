"""What all tests share: four logical CPUs, and a quiet TensorFlow."""

import functools
import os
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# It is on by default where a CPU has VNNI: TensorFlow 2.21 then computes other last
# bits, and corrupts its memory when it trains as few channels as the tests' networks.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import absl.logging
import pytest

from tf_lowbit.compat import keras, tf

# Before anything runs: several replicas are tested as logical CPUs.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 4,
)
tf.get_logger().setLevel("ERROR")


# Folders of tests that are slow by their kind: programs, and random networks.
SLOW = {"benchmarks", "examples", "fuzz"}


def pytest_collection_modifyitems(items):
    """Marks as slow: all tests in some folders, and cases that `quick` leaves out."""
    cases = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        if SLOW & set(item.path.relative_to(Path(__file__).parent).parts):
            item.add_marker(pytest.mark.slow)
    for every in cases.values():
        if (mark := every[0].get_closest_marker("quick")) is not None:
            (count,) = mark.args
            # Spread evenly, the first and the last among them.
            last, gaps = len(every) - 1, max(count - 1, 1)
            quick = {i * last // gaps for i in range(count)}
            for index, item in enumerate(every):
                if index not in quick:
                    item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup():
    """What a fixture draws does not depend on the tests before it.

    One of a module or of the session is made in front of `_fresh_keras`.
    """
    keras.utils.set_random_seed(1234)


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Frees the graphs and names of the test before, and seeds this one."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(1234)


@pytest.fixture(scope="session")
def mirrored():
    """A function: number of replicas -> strategy; for 1, that of one device.

    Collectives of two strategies in one process get into each other's way: these
    reduce without them.
    """

    @functools.cache
    def strategy(replicas):
        if replicas == 1:
            return tf.distribute.get_strategy()
        return tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(replicas)],
            cross_device_ops=tf.distribute.ReductionToOneDevice(),
        )

    return strategy


@pytest.fixture
def _loud_again():
    """Undoes what `examples.experiment.quiet` does to the process."""
    logger = tf.get_logger()
    level, filters = logger.level, list(logger.filters)
    logger.filters.clear()
    verbosity = absl.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    logger.setLevel(level)
    logger.filters[:] = filters
    absl.logging.set_verbosity(verbosity)
