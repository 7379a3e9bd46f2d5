import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

import tf_lowbit as tfl

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "guide.md"


@pytest.fixture(scope="module")
def blocks():
    found = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(found) == 4
    return found


def run(code, names):
    exec(compile(code, str(GUIDE), "exec"), names)


@pytest.fixture(scope="module")
def first(blocks, tmp_path_factory):
    """The first two blocks, on a little of the data: names, folder and output."""
    names: dict = {}
    folder, shown = tmp_path_factory.mktemp("guide"), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(shown):
        run(blocks[0], names)
        assert sum(len(y) for _, y in names["train_data"]) == 1797 - 12 * 32
        names["train_data"] = names["train_data"].take(1)
        names["test_data"] = names["test_data"].take(1)
        run(blocks[1], names)
    ((images, _),) = names["test_data"]
    names["images"] = images.numpy()
    return names, folder, shown.getvalue()


def test_each_block_can_be_taken_in_at_a_glance(blocks):
    assert [len(code.splitlines()) <= 25 for code in blocks] == [True] * 4


def test_the_code_of_the_guide_runs(first):
    names, folder, printed = first
    np.testing.assert_array_equal(
        tfl.load_model(folder / "low_bit.keras").predict(names["images"], verbose=0),
        names["again"].predict(names["images"], verbose=0),
    )
    assert "Stage 2/2: weights at 2 bits, activations at 2 bits" in printed
    assert "conv2" in printed
    assert "BOPs" in printed


def test_the_trainer_goes_on_from_there(first, blocks, monkeypatch):
    """With the names that the first block has left."""
    names, folder, _ = first
    names = dict(names)
    np.testing.assert_array_equal(
        names["again"].predict(names["images"], verbose=0),
        names["model"].predict(names["images"], verbose=0),
    )
    before = names["model"].get_weights()
    monkeypatch.chdir(folder)
    run(blocks[2], names)
    student = names["trainer"].student
    assert student is names["model"]
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(before, student.get_weights(), strict=True)
    )
    assert names["trainer"].teacher is names["float_model"]
    # The defaults keep two checkpoints.
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [f"epoch-{epoch:05}-step-0000000" for epoch in (9, 10)]
    again = tfl.load_model(folder / "student.keras")
    np.testing.assert_array_equal(
        again.predict(names["images"], verbose=0),
        student.predict(names["images"], verbose=0),
    )


def test_the_network_is_deployed(first, blocks, monkeypatch):
    """With the names that the first block has left."""
    names, folder, _ = first
    names, shown = dict(names), io.StringIO()
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(shown):
        run(blocks[3], names)
    assert names["report"].ok
    assert names["report"].codes > 1000
    assert "proved equal to its integer model" in shown.getvalue()
    assert (folder / "net.tflite").stat().st_size == names["result"].size
    assert tfl.export.load_archive(folder / "net.npz").layers
    images = names["images"]
    np.testing.assert_array_equal(
        names["twin"].predict(images, verbose=0).argmax(axis=-1),
        tfl.export.Runner((folder / "net.tflite").read_bytes())(images)["head"].argmax(
            axis=-1
        ),
    )
