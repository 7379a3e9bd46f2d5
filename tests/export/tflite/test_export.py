"""`to_tflite`: what it writes, what it says, what it refuses, and what it leaves."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.export import networks
from tf_lowbit import export
from tf_lowbit.compat import keras
from tf_lowbit.core import progress
from tf_lowbit.export.options import Options
from tf_lowbit.export.tflite import flatbuffer

layers = keras.layers
ROOT = Path(__file__).resolve().parents[3]
IMAGES = networks.images(6)
W2A2 = tfl.PrecisionRule(".*", 2, 2)


def float_net(seed=0):
    return networks.network(
        lambda x: networks.conv_bn_relu(x, 4, name="second"), seed=seed
    )


def quantized():
    return tfl.quantize(float_net(), W2A2)


@pytest.fixture(scope="module")
def model():
    return quantized()


@pytest.fixture(scope="module")
def snapped(model):
    return export.snap(model, [IMAGES])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.tflite"


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def convert(model, path, data=None, **options):
    return export.to_tflite(model, path, data, **{"verbose": 0, **options})


# --- what comes back ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_sizes_are_true(snapped, path, kind):
    made = convert(snapped, kind(path))
    content = path.read_bytes()
    assert made.path == path
    assert made.size == len(content) == path.stat().st_size
    assert made.gzip_size == export.gzip_bytes(content)
    assert 0 < made.gzip_size < made.size
    assert made.snapped is snapped
    assert made.twin is snapped.twin
    assert names(path.parent) == ["net.tflite"]


def test_a_path_relative_to_the_folder_one_is_in(snapped, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    assert convert(snapped, "net.tflite").path == Path("net.tflite")
    assert path.exists()


def test_what_is_said(model, path):
    made = convert(model, path, [IMAGES])
    first, *rest = str(made).splitlines()
    # Two convolutions: the head is computed in float.
    assert first == (f"{path}: {made.size:,} bytes; 2 integer layers")
    assert [line.strip() for line in rest] == [str(note) for note in made.notes]
    noted = {note.layer: note.text for note in made.notes}
    assert noted["image"].startswith("is quantized to 8 bits over [0, 1]. To train")
    assert noted["first"].startswith("was trained in float")


def test_layers_that_are_exact_have_no_notes(path):
    rules = [networks.EDGE, W2A2]
    net = tfl.quantize(float_net(), rules)
    tfl.calibrate(net, [IMAGES])
    made = convert(net, path)
    assert [note.layer for note in made.notes] == ["head"]  # It reads floats.
    assert str(made).count("\n") == 1


def test_the_same_model_gives_the_same_bytes(model, path):
    convert(model, path, [IMAGES])
    content = path.read_bytes()
    convert(model, path, [IMAGES])
    assert path.read_bytes() == content


def test_the_model_is_not_changed(model, path):
    before = [w.numpy() for w in model.weights]
    outputs = model(IMAGES, training=False).numpy()
    convert(model, path, [IMAGES])
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(model(IMAGES, training=False), outputs)


def test_the_file_says_how_it_was_made(model, path):
    choices = {
        "target": "portable",
        "storage": "int4",
        "first_layer": "int8",
        "head": "int8",
        "input_type": "uint8",
        "output_type": "int8",
    }
    made = convert(model, path, [IMAGES], **choices)
    about = flatbuffer.read_metadata(path.read_bytes())
    assert about["options"] == choices
    assert about["ranges"] == {k: list(v) for k, v in made.snapped.ranges.items()}
    assert about["tf_lowbit"] == tfl.__version__


def test_facts_that_are_kept(snapped, path):
    info = {"mean": [0.5, 0.25], "classes": ["a", "b"], "grüße": None}
    convert(snapped, path, info=info)
    assert export.read_info(path) == info
    assert export.read_info(str(path)) == info
    assert export.read_info(path.read_bytes()) == info
    convert(snapped, path)
    assert export.read_info(path) == {}


def test_facts_that_are_not_json(snapped, path):
    with pytest.raises(ValueError, match="info must be a dict that JSON can hold"):
        convert(snapped, path, info={"mean": np.zeros(2)})
    assert names(path.parent) == []


@pytest.mark.slow
def test_the_batches_that_ranges_are_measured_on(model, path):
    dim = [0.5 * IMAGES, IMAGES]
    assert convert(model, path, dim, batches=1).snapped.ranges["image"] == (0.0, 0.5)
    assert convert(model, path, iter(dim)).snapped.ranges["image"] == (0.0, 1.0)
    labelled = [(IMAGES, np.zeros(6))]
    assert convert(model, path, labelled).snapped.ranges["image"] == (0.0, 1.0)


@pytest.mark.slow
def test_a_trainer_of_one_student(model, path):
    trainer = tfl.LowBitTrainer(model)
    made = convert(trainer, path, [IMAGES])
    assert export.verify(path, trainer, [IMAGES], verbose=0).ok
    assert made.size == path.stat().st_size


# --- the bar --------------------------------------------------------------------------


def test_a_bar_on_stderr(model, path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    convert(model, path, [IMAGES], verbose=1)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Placing thresholds" in shown.err
    assert "100%" in shown.err


def test_silence(model, path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    convert(model, path, [IMAGES], verbose=0)
    assert capsys.readouterr() == ("", "")


# --- what is refused ------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "gpu"}, "target must be one of"),
        ({"target": None}, "target must be one of"),
        ({"storage": "int2"}, "storage must be one of"),
        ({"storage": 8}, "storage must be one of"),
        ({"first_layer": "int4"}, "first_layer must be one of"),
        ({"head": "float32"}, "head must be one of"),
        ({"input_type": "float16"}, "input_type must be one of"),
        ({"input_type": ""}, "input_type must be one of"),
        ({"output_type": "int4"}, "output_type must be one of"),
        ({"output_type": 8}, "output_type must be one of"),
    ],
    ids=str,
)
def test_choices_that_there_are_not(snapped, path, options, message):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{message}.*Received: {name}={value!r}"):
        convert(snapped, path, **options)
    assert names(path.parent) == []


def test_the_input_type_is_looked_at_before_the_work(model, path):
    def data():
        raise AssertionError("the data were read")
        yield

    with pytest.raises(ValueError, match="input_type"):
        convert(model, path, data(), input_type="float16")


@pytest.mark.parametrize("batches", [0, -1])
def test_no_batches_to_measure_on(model, path, batches):
    with pytest.raises(ValueError):
        convert(model, path, [IMAGES], batches=batches)


def test_a_snapped_has_its_options(snapped, path):
    with pytest.raises(ValueError, match=r"made with.*Received"):
        convert(snapped, path, storage="int4")
    assert names(path.parent) == []


@pytest.mark.slow
def test_a_snapped_of_other_options(model, path):
    other = export.snap(model, [IMAGES], options=Options(head="int8"))
    with pytest.raises(ValueError, match="made with"):
        convert(other, path)
    assert convert(other, path, head="int8").snapped is other


def test_data_beside_a_snapped(snapped, path):
    with pytest.raises(ValueError, match="data"):
        convert(snapped, path, [IMAGES])


def test_a_twin_with_nan_in_it(model, path):
    made = export.snap(model, [IMAGES])
    latent = made.twin.get_layer("first").latent
    latent.assign(np.full(latent.shape, np.nan))
    with pytest.raises(export.ExportError, match=r"finite.*first/latent"):
        convert(made, path)
    assert names(path.parent) == []


def test_missing_data(model, path):
    with pytest.raises(ValueError, match=r"data must be given.*Received: data=None"):
        convert(model, path)
    assert names(path.parent) == []


def test_data_without_a_batch(model, path):
    with pytest.raises(ValueError, match="at least one batch"):
        convert(model, path, [])


def test_data_that_are_not_finite(model, path):
    images = IMAGES.copy()
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        convert(model, path, [images])


def test_a_model_that_is_not_quantized(path):
    with pytest.raises(ValueError, match="quantize"):
        convert(float_net(), path, [IMAGES])


@pytest.mark.slow
def test_a_model_whose_ranges_are_not_calibrated(path):
    net = tfl.quantize(float_net(), [networks.EDGE, W2A2])
    with pytest.raises(export.ExportError, match=r"calibrated.*tf_lowbit\.calibrate"):
        convert(net, path)
    assert names(path.parent) == []


def test_weights_that_are_not_finite(path):
    net = quantized()
    weight = next(w for w in net.trainable_weights if "second" in w.name)
    weight.assign(np.full(weight.shape, np.nan))
    with pytest.raises(export.ExportError, match="finite"):
        convert(net, path, [IMAGES])


# --- paths ----------------------------------------------------------------------------


def test_a_missing_folder_is_named_before_the_work(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="folder must exist"):
        convert(model, tmp_path / "none" / "net.tflite")  # Without data: not reached.


def test_a_path_below_a_file(model, path):
    path.write_bytes(b"a file")
    with pytest.raises(OSError):
        convert(model, path / "net.tflite")
    assert path.read_bytes() == b"a file"


def test_a_folder_in_the_files_place(snapped, path):
    path.mkdir()
    with pytest.raises(OSError, match="writable"):
        convert(snapped, path)
    assert names(path.parent) == ["net.tflite"]


def test_a_folder_that_takes_no_files(snapped):
    folder = Path("/proc/self")
    if not folder.is_dir():
        pytest.skip("there is no such folder here")
    with pytest.raises(OSError, match="writable"):
        convert(snapped, folder / "net.tflite")


# In other processes: what the disk or the system does to one. -------------------------

_START = """
import os, resource, signal, sys
from pathlib import Path
from tests.export.tflite import test_export as tests
from tf_lowbit import export
path = Path(sys.argv[1])
snapped = export.snap(tests.quantized(), [tests.IMAGES])
"""
_FULL_DISK = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    export.to_tflite(snapped, path, verbose=0)
except OSError as error:
    print("OSError", error)
"""
_KILLED = """
def killed(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
export.to_tflite(snapped, path, verbose=0)
"""


def process(program, path):
    return subprocess.run(
        [sys.executable, "-c", _START + program, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_full_disk(path):
    path.write_bytes(b"the file before")
    done = process(_FULL_DISK, path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "OSError" in done.stdout
    assert "must be writable" in done.stdout
    assert path.read_bytes() == b"the file before"
    assert names(path.parent) == ["net.tflite"]


@pytest.mark.slow
def test_a_killed_process_leaves_the_file_before(snapped, path):
    path.write_bytes(b"the file before")
    done = process(_KILLED, path)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert path.read_bytes() == b"the file before"
    # What it leaves is out of the way of the next one.
    left = [name for name in names(path.parent) if name != "net.tflite"]
    assert all(name.startswith(".partial-") for name in left)
    convert(snapped, path)
    assert names(path.parent) == [*left, "net.tflite"]
    assert export.verify(path, snapped, verbose=0).ok


# --- the public names -----------------------------------------------------------------


def test_public_names():
    assert len(set(export.__all__)) == len(export.__all__)
    for name in export.__all__:
        thing = getattr(export, name)
        assert thing.__doc__, name
        if not name.isupper():
            assert thing.__module__.startswith("tf_lowbit.export"), name
    assert tfl.export is export
