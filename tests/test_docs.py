"""What the documents say can be run, given and opened."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit.compat import tf
from tf_lowbit.network import layer_registry

ROOT = Path(__file__).resolve().parent.parent
# Those that tell of the programs' flags.
ABOUT_PROGRAMS = ("README.md", "examples/README.md", "benchmarks/README.md")
DOCUMENTS = sorted(
    {
        *ABOUT_PROGRAMS,
        *("CONTRIBUTING.md", "CHANGELOG.md", "examples/configs/README.md"),
        *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")),
    }
)
# By what a command line calls them: a file, or `python -m` and a module.
PROGRAMS = {path.name: path for path in (ROOT / "examples").glob("*.py")} | {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__main__"
    ): path
    for path in (ROOT / "benchmarks").rglob("*.py")
}
# absl's own, and those of other tools.
OTHER_FLAGS = {"help", "helpshort", "flagfile", "check"}


def flags_of(path):
    return set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', path.read_text()))


def commands(text):
    """Program and flags of each command line, continuation lines included."""
    lines = text.replace("\\\n", " ").splitlines()
    found = re.compile(r"\b(\w+\.py|benchmarks(?:\.\w+)+)\b((?: +[^|`]*)?)")
    for line in lines:
        for program, rest in found.findall(line):
            if program in PROGRAMS:
                yield program, re.findall(r"--(\w+)", rest)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_that_is_mentioned_exists(name):
    defined = set().union(OTHER_FLAGS, *map(flags_of, PROGRAMS.values()))
    mentioned = set(re.findall(r"--([a-z]\w*)", (ROOT / name).read_text()))
    assert mentioned <= defined
    if name in ("README.md", "examples/README.md", "docs/how_to/many_devices.md"):
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
        ("benchmarks.cost.step_cost", "output"),
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


def code_of(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


PAGES = [name for name in DOCUMENTS if name.startswith("docs/") and code_of(name)]


def of_the_guide():
    """What the guide's first two blocks define, with few data and no training."""
    names: dict = {}
    network, training = code_of("docs/guide.md")[:2]
    exec(compile(network, "docs/guide.md", "exec"), names)
    for data in ("train_data", "test_data"):
        names[data] = names[data].take(2)
    for statement in ast.parse(training).body:
        code = ast.unparse(statement)
        if code.startswith(("rules = ", "loss = ")):
            exec(code, names)
    return names


def spread_of_the_tutorial():
    """Mean, deviation and lowest of both accuracies over seeds, in percent."""
    text = (ROOT / "benchmarks/results/tutorial.json").read_text()
    return {name: json.loads(text)[name] for name in ("float_accuracy", "accuracy")}


def test_the_tutorial_gives_the_numbers_that_were_measured():
    found = re.findall(
        r"Expect (\S+) % with a standard deviation of (\S+) "
        r"\(lowest of 20 seeds: (\S+)\)",
        (ROOT / "docs/tutorial.md").read_text(),
    )
    measured = [
        tuple(f"{row[name]:.1f}" for name in ("mean", "deviation", "lowest"))
        for row in spread_of_the_tutorial().values()
    ]
    assert found == measured


# `tests/test_guide.py` runs the guide, block by block.
@pytest.mark.slow
@pytest.mark.parametrize("name", [page for page in PAGES if page != "docs/guide.md"])
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The tutorial stands alone; the other pages say that they continue the guide.
    names = {} if name == "docs/tutorial.md" else of_the_guide()
    if name.endswith("own_layer.md"):
        monkeypatch.setattr(layer_registry, "_KERNELS", dict(layer_registry._KERNELS))
    before = names.get("float_model") and names["float_model"].get_weights()
    for code in code_of(name):
        exec(compile(code, name, "exec"), names)
    for weight, value in zip(before or [], names["float_model"].weights, strict=False):
        np.testing.assert_array_equal(weight, value)
    if name == "docs/tutorial.md":
        for accuracy, row in spread_of_the_tutorial().items():
            least = row["mean"] - 5 * row["deviation"]
            assert 100 * names[accuracy] > least, (accuracy, least)
    if name.endswith("many_devices.md"):
        trainer = names["trainer"]
        assert trainer.distribute_strategy is names["strategy"]
        assert isinstance(names["strategy"], tf.distribute.MirroredStrategy)
        assert trainer.optimizer.iterations.numpy() == 4
        assert trainer.teacher_optimizer.iterations.numpy() == 4


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_where_its_code_goes_on(name):
    said = "continues from the first two blocks of the [guide](../guide.md)"
    text = (ROOT / name).read_text().split("```python")[0]
    assert (said in text) != (name in ("docs/guide.md", "docs/tutorial.md"))


def test_every_page_is_reached_and_has_code():
    index = (ROOT / "docs/index.md").read_text()
    pages = {name.removeprefix("docs/").removesuffix(".md") for name in DOCUMENTS}
    pages = {page for page in pages if (ROOT / "docs" / f"{page}.md").exists()}
    listed = set(re.findall(r"^[\w/]+$", index, re.M))
    assert listed == pages - {"index"}
    with_code = {page.removeprefix("docs/").removesuffix(".md") for page in PAGES}
    without = {
        *("benchmarks", "comparison", "provenance", "supported_models"),
        *("status", "troubleshooting"),
    }
    assert listed - with_code == without


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path):
    """All public names have docstrings that Sphinx can read."""
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "docs", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Names and the benchmarks, which are no page of the repository's docs, are linked.
    choosing = (tmp_path / "how_to" / "choosing.html").read_text()
    for target in (
        "reference/training.html#tf_lowbit.recipes.low_bit",
        "benchmarks.html",
    ):
        assert f'href="../{target}' in choosing
    assert "<table" in (tmp_path / "benchmarks.html").read_text()
    pages = sorted((tmp_path / "reference").glob("*.html"))
    reference = "".join(page.read_text() for page in pages)
    for name in tfl.__all__:
        if name not in (
            "__version__",
            "callbacks",
            "export",
            "inspection",
            "quantizers",
            "recipes",
        ):
            assert f'id="tf_lowbit.{name}"' in reference, name
    # Nothing is fetched when a page is read.
    for page in tmp_path.rglob("*.html"):
        assert not re.search(
            r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css)', page.read_text()
        )
