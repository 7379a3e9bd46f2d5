import re

import pytest

import tf_lowbit as tfl
from tests.examples import programs
from tf_lowbit import datasets
from tf_lowbit.compat import keras

BITS = 3
TINY = ("--float_epochs=1", "--epochs=1", "--batch_size=256")
# Of each kind of mistake one: its flags, and what the message must hold.
BAD = {
    "bits": (["--bits=9"], r"weight_bits must .*Received: weight_bits=9"),
    "no float epochs": (["--float_epochs=0"], r"--float_epochs=0"),
    "no epochs": (["--epochs=0"], r"--epochs=0"),
    "seed": (["--seed=9999999999"], r"--seed=9999999999"),
    "no folder": (["--output_dir=file"], r"writable .*Received: 'file'"),
}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """One tiny run: its process and its folder."""
    folder = tmp_path_factory.mktemp("distilled")
    arguments = (*TINY, f"--bits={BITS}", "--output_dir=made/out")
    done = programs.run("distill.py", *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done, folder


def test_the_student_has_the_accuracy_that_is_printed(distilled):
    done, folder = distilled
    found = re.search(
        rf"^{BITS}-bit student: test accuracy (0\.\d{{4}}), in made/out/student.keras$",
        done.stdout,
        re.M,
    )
    assert found, done.stdout
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files == [folder / "made" / "out" / "student.keras"]
    student = tfl.load_model(files[0], compile=False)
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


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Runs with bad flags."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "file").write_text("")
    cases = {name: (folder, [*TINY, *flags]) for name, (flags, _) in BAD.items()}
    return programs.run_each("distill", cases)[0]


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_refused_before_any_training(refused, name):
    code, error, shown = refused[name]
    assert code == 1
    assert re.search(BAD[name][1], error), error
    assert shown == ""


@pytest.mark.parametrize("file", ["README.md", "examples/README.md"])
def test_is_where_readers_look(file):
    text = (programs.ROOT / file).read_text()
    assert ".venv/bin/python examples/distill.py\n" in text
