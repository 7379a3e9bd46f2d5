import csv
import json
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.examples import programs
from tf_lowbit import datasets
from tf_lowbit.compat import keras, tf

EPOCHS = 8
TINY = (
    "--dataset=digits",
    "--model=preact_resnet8",
    "--width=2",
    "--limit=64",
    "--batch_size=32",
    "--float_epochs=2",
    f"--epochs={EPOCHS}",
    "--method=ts+pq",
    "--ladder=4,2",
    "--seed=5",
)
# Bits of weights and activations in each epoch.
BITS = [
    *[("4", "32")] * 2,
    *[("4", "4")] * 2,
    *[("2", "4")] * 2,
    *[("2", "2")] * 2,
]


def own_flags():
    source = (programs.ROOT / "examples" / "train.py").read_text()
    return set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))


def rows(folder):
    path = folder / "log.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return tfl.load_model(folder / "model.h5", compile=False).get_weights()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run from the float training to the result: its process and folder."""
    folder = tmp_path_factory.mktemp("whole")
    done = programs.run("train.py", *TINY, "--output_dir=out", folder=folder)
    assert done.returncode == 0, done.stderr
    return done, folder / "out"


def test_prints_progress_summary_and_where_the_result_is(whole):
    done, _ = whole
    assert re.search(r"^Float network: test accuracy 0\.\d{4}$", done.stdout, re.M)
    assert re.search(r"^Quantized network: test accuracy 0\.\d", done.stdout, re.M)
    assert "Written: out/quantized/result.json" in done.stdout
    assert "weight bits" in done.stdout
    assert f"{EPOCHS}/{EPOCHS}" in done.stdout
    assert "Stage 4/4: weights at 2 bits, activations at 2 bits" in done.stdout
    assert "Traceback" not in done.stderr


def test_writes_what_the_help_says_and_nothing_else(whole):
    _, folder = whole
    assert files(folder) == ["float", "quantized"]
    for part in ("float", "quantized"):
        assert files(folder / part) == [
            *("checkpoints", "log.csv", "model.h5", "result.json", "tensorboard")
        ]


def test_log_has_a_row_for_each_epoch_with_its_bits(whole):
    _, folder = whole
    log = rows(folder / "quantized")
    assert [int(row["epoch"]) for row in log] == list(range(EPOCHS))
    assert [(r["weight_bits"], r["activation_bits"]) for r in log] == BITS
    assert set(log[0]) == {
        *("epoch", "accuracy", "loss", "val_accuracy", "val_loss"),
        *("weight_bits", "activation_bits"),
    }
    assert all(np.isfinite(float(row["loss"])) for row in log)
    assert [int(row["epoch"]) for row in rows(folder / "float")] == [0, 1]


def test_tensorboard_holds_every_epoch(whole):
    _, folder = whole
    for part, tags in (
        ("train", {"epoch_loss", "epoch_accuracy", "epoch_weight_bits"}),
        ("validation", {"epoch_loss", "epoch_accuracy"}),
    ):
        (path,) = (folder / "quantized" / "tensorboard" / part).glob("events.out.*")
        steps = {}
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
        assert tags <= set(steps)
        assert all(steps[tag] == list(range(EPOCHS)) for tag in tags)


def test_result_says_what_came_out_of_what(whole):
    _, folder = whole
    result = json.loads((folder / "quantized" / "result.json").read_text())
    assert set(result) == {
        *("test_accuracy", "test_loss", "epochs", "seconds", "cost"),
        *("settings", "versions", "machine"),
    }
    assert result["epochs"] == EPOCHS
    assert result["seconds"] > 0
    # Where it was written is no part of what was run.
    assert set(result["settings"]) == own_flags() - {"output_dir", "resume"}
    assert result["settings"]["method"] == "ts+pq"
    assert result["settings"]["ladder"] == ["4", "2"]
    assert result["settings"]["limit"] == 64
    assert result["settings"]["weight_bits"] == 2
    assert result["settings"]["data_dir"] is None
    versions = result["versions"]
    assert versions["tf_lowbit"] == tfl.__version__
    for package in ("tensorflow", "tf-keras", "tensorflow-model-optimization", "numpy"):
        assert versions[package] == metadata.version(package)
    assert result["machine"]["devices"] == ["CPU"]

    cost = result["cost"]
    assert cost == json.loads(json.dumps(tfl.cost(reloaded(folder)).as_dict()))
    assert 0 < cost["weight_bytes"] < cost["float_bytes"]
    bits = {layer["name"]: layer["weight_bits"] for layer in cost["layers"]}
    assert bits["stem"] == bits["head"] == [32]
    assert {tuple(b) for b in bits.values()} == {(), (2,), (32,)}


def reloaded(folder):
    return tfl.load_model(folder / "quantized" / "model.h5", compile=False)


def test_the_saved_network_has_the_accuracy_of_the_result(whole):
    _, folder = whole
    model = reloaded(folder)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"])
    data = datasets.load("digits", batch_size=32, limit=64)
    result = json.loads((folder / "quantized" / "result.json").read_text())
    assert model.evaluate(data.test, verbose=0)[1] == result["test_accuracy"]
    last = rows(folder / "quantized")[-1]
    assert float(last["val_accuracy"]) == pytest.approx(result["test_accuracy"])


def test_a_killed_run_resumes_to_the_weights_of_the_whole_one(whole, tmp_path):
    _, folder = whole
    quantized = tmp_path / "out" / "quantized"
    arguments = (*TINY, "--output_dir=out")
    with subprocess.Popen(
        programs.command("train.py", *arguments),
        cwd=tmp_path,
        env=programs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 600
        # In the middle of the second stage.
        while len(rows(quantized)) < 3 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= len(rows(quantized)) < EPOCHS
    assert not (quantized / "model.h5").exists()

    refused = programs.run("train.py", *arguments, folder=tmp_path)
    assert refused.returncode != 0
    assert "--resume" in refused.stderr
    assert "Received: 'out/float'" in refused.stderr

    done = programs.run("train.py", *arguments, "--resume", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("float", "quantized"):
        ours, theirs = weights(tmp_path / "out" / part), weights(folder / part)
        assert len(ours) == len(theirs)
        for a, e in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, e)
        assert rows(tmp_path / "out" / part) == rows(folder / part)
    results = [
        json.loads((path / "quantized" / "result.json").read_text())
        for path in (tmp_path / "out", folder)
    ]
    for key in ("test_accuracy", "test_loss", "epochs", "cost"):
        assert results[0][key] == results[1][key]


# Of each kind of mistake one: its flags, and what the message must hold.
BAD = {
    "weight_bits": (["--weight_bits=9"], r"\[1, 8\].*Received: weight_bits=9"),
    "ladder": (["--method=pq", "--ladder=8,x"], r"ladder.*Received: .*x"),
    "epochs": (["--method=pq", "--epochs=2"], r"stages need.*Received: total=2"),
    "model": (["--model=nope"], r"preact_resnet8.*Received: name='nope'"),
    "data_dir": (
        ["--dataset=fashion_mnist", "--data_dir=/nonexistent"],
        r"(?s)/nonexistent",
    ),
    "output_dir": (["--output_dir=file/out"], r"writable.*Received: 'file/out'"),
    "not_a_flag": (["digits"], r"Received: arguments that are no flags: \['digits'\]"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """The processes of all `BAD` flags and of --help, two at a time."""
    folder = tmp_path_factory.mktemp("refused")
    cases = {"help": ["--help"], **{name: flags for name, (flags, _) in BAD.items()}}

    def run(name):
        mine = folder / name
        mine.mkdir()
        (mine / "file").write_text("")
        arguments = [*TINY[:5], "--float_epochs=1", "--output_dir=out", *cases[name]]
        return programs.run("train.py", *arguments, folder=mine), mine

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_refused_with_a_reason(refused, name):
    done, _ = refused[name]
    assert done.returncode != 0
    assert re.search(BAD[name][1], done.stderr + done.stdout)


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_refused_before_any_training(refused, name):
    done, folder = refused[name]
    assert "Float network" not in done.stdout
    assert not list(folder.rglob("model.h5"))


def test_missing_data_says_what_to_do(refused):
    done, _ = refused["data_dir"]
    assert "Received: " in done.stderr
    assert "data_dir" in done.stderr


def test_help_names_every_flag(refused):
    done, folder = refused["help"]
    assert done.returncode in (0, 1)
    assert not (folder / "out").exists()
    assert len(own_flags()) > 20
    for flag in own_flags():
        assert re.search(rf"^  --(\[no\])?{flag}:", done.stdout, re.M), flag
    assert "python examples/train.py" in done.stdout
