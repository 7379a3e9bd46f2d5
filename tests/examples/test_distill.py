import re

import pytest

import tf_lowbit as tfl
from tests.examples import programs
from tf_lowbit import datasets
from tf_lowbit.compat import keras

BITS = 3


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """One tiny run: its process and its folder."""
    folder = tmp_path_factory.mktemp("distilled")
    tiny = ("--float_epochs=1", "--epochs=1", "--batch_size=256")
    done = programs.run("distill.py", *tiny, f"--bits={BITS}", folder=folder)
    assert done.returncode == 0, done.stderr
    return done, folder


def test_the_student_has_the_accuracy_that_is_printed(distilled):
    done, folder = distilled
    found = re.search(
        rf"^{BITS}-bit student: test accuracy (0\.\d{{4}}), in student.h5$",
        done.stdout,
        re.M,
    )
    assert found, done.stdout
    assert [path.name for path in folder.iterdir()] == ["student.h5"]
    student = tfl.load_model(folder / "student.h5", compile=False)
    assert {t.bits for t in tfl.inspection.quantized_tensors(student)} == {BITS}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    student.compile(loss=loss, metrics=["accuracy"])
    test = datasets.load("digits", batch_size=256).test
    _, accuracy = student.evaluate(test, verbose=0)
    assert f"{accuracy:.4f}" == found[1]


def test_teacher_and_student_learn_in_one_step(distilled):
    done, _ = distilled
    *_, shown = [line for line in done.stdout.splitlines() if "val_loss" in line]
    for name in ("loss", "task_loss", "distillation_loss"):
        for role in ("", "teacher_"):
            assert re.search(rf" {role}{name}: \d+\.\d", shown), role + name
    assert "compiled metrics have yet" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("file", ["README.md", "examples/README.md"])
def test_is_where_readers_look(file):
    text = (programs.ROOT / file).read_text()
    assert ".venv/bin/python examples/distill.py\n" in text
