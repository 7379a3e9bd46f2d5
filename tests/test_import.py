import subprocess
import sys


def test_importing_the_library_leaves_the_devices_unset():
    """A user sets memory growth or logical devices after the import."""
    script = (
        "import tf_lowbit, tensorflow as tf;"
        "cpu = tf.config.list_physical_devices('CPU')[0];"
        "tf.config.set_logical_device_configuration("
        "cpu, [tf.config.LogicalDeviceConfiguration()] * 2);"
        "assert len(tf.config.list_logical_devices('CPU')) == 2"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
