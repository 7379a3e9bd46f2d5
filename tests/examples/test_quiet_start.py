import os

import pytest

from examples import quiet_start

# What TensorFlow 2.21 wrote on machines without a GPU.
NOTES = b"""\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795937965.459345   28274 cudart_stub.cc:31] Could not find cuda drivers \
on your machine, GPU will not be used.
E0000 00:00:1795937965.459345   28274 cuda_platform.cc:51] failed call to cuInit: \
INTERNAL: CUDA error: Failed call to cuInit: UNKNOWN ERROR (303)
E0000 00:00:1795937965.459345   28274 cuda_dnn.cc:8579] Unable to register cuDNN \
factory: Attempting to register factory for plugin cuDNN when one has already been
"""
WARNING = b"W0000 00:00:1795937965.459345   28274 gpu_device.cc:1] Out of memory\n"


@pytest.mark.parametrize(
    ("level", "shown"), [("3", WARNING), ("0", NOTES + WARNING + NOTES)]
)
def test_notes_of_the_start_are_left_out_and_warnings_stay(
    capfd, monkeypatch, level, shown
):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
    with quiet_start.held_back():
        os.write(2, NOTES + WARNING + NOTES)
        assert capfd.readouterr().err == ""
    os.write(2, b"later\n")
    assert capfd.readouterr().err.encode() == shown + b"later\n"


def test_nothing_is_lost_to_an_error(capfd):
    def fail():
        with quiet_start.held_back():
            os.write(2, WARNING)
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert capfd.readouterr().err.encode() == WARNING
