"""What the documents say can be run, given and opened."""

import re
from pathlib import Path

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit.compat import keras, tf

ROOT = Path(__file__).resolve().parent.parent
# Those that tell of the programs' flags.
ABOUT_PROGRAMS = ("README.md", "examples/README.md", "benchmarks/README.md")
DOCUMENTS = sorted(
    {
        *ABOUT_PROGRAMS,
        *("CONTRIBUTING.md", "CHANGELOG.md", "examples/configs/README.md"),
        *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")),
    }
)
PROGRAMS = {
    path.name: path
    for folder in ("examples", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
}
# absl's own, and those of other tools.
OTHER_FLAGS = {"helpshort", "flagfile", "check"}


def flags_of(path):
    return set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', path.read_text()))


def commands(text):
    """Program and flags of each command line, continuation lines included."""
    lines = text.replace("\\\n", " ").splitlines()
    found = re.compile(r"\b(\w+\.py)\b((?: +[^|`]*)?)")
    for line in lines:
        for program, rest in found.findall(line):
            if program in PROGRAMS:
                yield program, re.findall(r"--(\w+)", rest)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_that_is_mentioned_exists(name):
    defined = set().union(OTHER_FLAGS, *map(flags_of, PROGRAMS.values()))
    mentioned = set(re.findall(r"--([a-z]\w*)", (ROOT / name).read_text()))
    assert mentioned <= defined
    if name in ("README.md", "examples/README.md", "docs/many_devices.md"):
        assert mentioned


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_has_flags_of_its_program(name):
    for program, flags in commands((ROOT / name).read_text()):
        own = flags_of(PROGRAMS[program]) | OTHER_FLAGS
        assert set(flags) <= own, program


def test_commands_are_found():
    found = {
        (program, flag)
        for name in DOCUMENTS
        for program, flags in commands((ROOT / name).read_text())
        for flag in flags
    }
    assert {
        ("train.py", "method"),
        ("train.py", "distill"),
        ("train.py", "logical_cpus"),
        ("step_cost.py", "output"),
    } <= found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_leads_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"[a-z]+:", target):
            file, _, heading = target.partition("#")
            aim = path.parent / file if file else path
            assert aim.exists(), target
            if heading:
                titles = re.findall(r"^#+ +(.*)$", aim.read_text(), re.M)
                anchors = [re.sub(r"[^\w\- ]", "", t).lower() for t in titles]
                assert heading in [a.replace(" ", "-") for a in anchors], target


def test_every_flag_of_the_main_program_is_told_of():
    """The table of examples/README.md holds what --helpshort's reader looks for."""
    mentioned = set(
        re.findall(r"--([a-z]\w*)", (ROOT / "examples/README.md").read_text())
    )
    later = {"sp_unit", "sp_start", "hints", "distill_target", "save_every", "policy"}
    assert later | {"method", "distill", "strategy", "resume"} <= mentioned


def test_the_code_for_many_devices_runs():
    """On a small network and random data."""
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/many_devices.md").read_text(), re.DOTALL
    )
    layers = keras.layers

    def network():
        return keras.Sequential(
            [
                layers.Conv2D(3, 3, input_shape=(6, 6, 1), name="conv1"),
                layers.ReLU(),
                layers.Conv2D(4, 3, use_bias=False, name="conv2"),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.GlobalAveragePooling2D(),
                layers.Dense(3, name="head"),
            ]
        )

    images = np.random.default_rng(0).normal(size=(16, 6, 6, 1)).astype("f")
    float_model, teacher = network(), network()
    before = float_model.get_weights()
    teacher.set_weights(before)
    names = {
        "tfl": tfl,
        "keras": keras,
        "tf": tf,
        "float_model": float_model,
        "teacher": teacher,
        "rules": [tfl.PrecisionRule(".*", weight_bits=2, activation_bits=2)],
        "train_data": tf.data.Dataset.from_tensor_slices(
            (images, np.arange(16) % 3)
        ).batch(8),
    }
    exec(compile(code, "docs/many_devices.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.distribute_strategy is names["strategy"]
    assert isinstance(names["strategy"], tf.distribute.MirroredStrategy)
    assert trainer.optimizer.iterations.numpy() == 4
    assert trainer.teacher_optimizer.iterations.numpy() == 4
    has_moved = [
        any(
            not np.array_equal(a, b)
            for a, b in zip(before, model.get_weights(), strict=True)
        )
        for model in (float_model, trainer.teacher)
    ]
    assert has_moved == [False, True]
