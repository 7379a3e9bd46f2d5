"""The progress bars of what takes long on a large network."""

import pytest

import tf_lowbit as tfl
from tests.scheme import nets
from tf_lowbit.core import progress

BARS = ["Quantizing", "Calibrating", "Placing thresholds", "Running the file"]


def steps(folder, **options):
    """From a float network to a verified file."""
    rule = tfl.PrecisionRule(".*", 2, 2, "lsq", "lsq", edges=True)
    data = [(nets.images(4), nets.labels(4))]
    model = tfl.quantize(nets.randomize(nets.chain()), rule, **options)
    tfl.calibrate(model, data, **options)
    exported = tfl.export.to_tflite(model, folder / "net.tflite", data, **options)
    tfl.export.verify(exported.path, model, data, **options)


@pytest.mark.parametrize(("options", "bars"), [({}, BARS), ({"verbose": 0}, [])])
def test_each_step_has_a_bar_on_a_terminal(tmp_path, capfd, monkeypatch, options, bars):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    steps(tmp_path, **options)
    shown = capfd.readouterr().err
    assert [bar for bar in BARS if bar in shown] == bars
