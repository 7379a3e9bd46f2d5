"""What all tests share: two logical CPUs, and a quiet TensorFlow."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

from tf_lowbit.compat import keras, tf

# Before anything runs: several replicas are tested as logical CPUs.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)
tf.get_logger().setLevel("ERROR")


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Frees the graphs and names of the test before, and seeds this one."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(1234)
