import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tf_lowbit as tfl
from examples import devices, experiment
from tests.examples import programs
from tf_lowbit import datasets, models
from tf_lowbit.analysis import environment
from tf_lowbit.callbacks import Recovery
from tf_lowbit.compat import keras, tf
from tf_lowbit.training.stages import DECAYS

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
# Stochastic precision, a teacher, hints and bfloat16.
JOINT = (
    *TINY[:5],
    *("--method=sp", "--sp_unit=block", "--sp_start=0.25"),
    *("--distill=joint", "--hints", "--teacher_learning_rate=0.01"),
    # Without a folder for the data: their default.
    *("--policy=mixed_bfloat16", "--save_every=1", "--data_dir="),
    *("--float_epochs=1", "--epochs=2"),
)
# A network of one's own, with a softmax, on two devices.
OWN = (
    *(TINY[0], *TINY[3:5], "--float_model=own.keras", "--first_last_bits=4"),
    *("--strategy=mirrored", "--logical_cpus=2", "--epochs=1"),
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
    return tfl.load_model(folder / "model.keras", compile=False).get_weights()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def run_each(arguments, folder):
    """Runs of the program with each of some flags, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(programs.run, "train.py", *each, folder=folder)
            for each in arguments
        ]
        return [run.result() for run in started]


def own_network():
    """Layers named as nobody here would name them."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    net = [
        layers.Conv2D(4, 3, activation="relu", input_shape=(8, 8, 1), name="eins"),
        layers.Conv2D(4, 3, activation="relu", name="zwei"),
        layers.GlobalAveragePooling2D(name="drei"),
        layers.Dense(10, activation="softmax", name="vier"),
    ]
    return keras.Sequential(net, name="eigenes")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs from float training to result: function from name to process and folder."""
    folder = tmp_path_factory.mktemp("runs")
    own_network().save(folder / "own.keras")
    flags = {"whole": (*TINY, "--report"), "joint": JOINT, "own": OWN}
    done = run_each(
        [(*own, f"--output_dir={name}") for name, own in flags.items()], folder
    )
    named = dict(zip(flags, done, strict=True))

    def run(name):
        assert named[name].returncode == 0, named[name].stderr
        return named[name], folder / name

    return run


@pytest.fixture(scope="module")
def whole(runs):
    """A run by two-stage progressive training."""
    return runs("whole")


def test_prints_progress_summary_and_where_the_result_is(whole):
    done, _ = whole
    assert re.search(r"^Float network: test accuracy 0\.\d{4}$", done.stdout, re.M)
    assert re.search(r"^Quantized network: test accuracy 0\.\d", done.stdout, re.M)
    assert "Written: whole/quantized/result.json" in done.stdout
    assert "weight bits" in done.stdout
    assert f"{EPOCHS}/{EPOCHS}" in done.stdout
    assert "Stage 4/4: weights at 2 bits, activations at 2 bits" in done.stdout
    assert "Traceback" not in done.stderr


def test_ends_with_float_beside_low_bit(whole):
    done, folder = whole
    table = done.stdout[done.stdout.rindex("┏") :]
    for part, row in (("float", "float .* 32 / 32"), ("quantized", "low-bit .* 2 / 2")):
        result = json.loads((folder / part / "result.json").read_text())
        accuracy = f"{100 * result['test_accuracy']:.2f} %"
        numbers = f"{result['cost']['weight_bytes']:,} .* {result['cost']['bops']:,}"
        assert re.search(f"{row} .* {accuracy} .* {numbers}", table)


def test_writes_a_page_about_the_low_bit_network(whole):
    done, folder = whole
    assert "Written: whole/report.html" in done.stdout
    page = (folder / "report.html").read_text()
    result = json.loads((folder / "quantized" / "result.json").read_text())
    assert f"{100 * result['test_accuracy']:.2f} %" in page
    assert f"{result['cost']['weight_bytes']:,}" in page
    # The stages and the curves of the training.
    assert "val_accuracy" in page
    assert "The stages in figures" in page


def test_writes_what_the_help_says_and_nothing_else(whole):
    _, folder = whole
    assert files(folder) == ["float", "quantized", "report.html"]
    for part in ("float", "quantized"):
        assert files(folder / part) == [
            *("checkpoints", "log.csv", "model.keras", "result.json"),
            *("settings.json", "tensorboard"),
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
    assert result["versions"] == environment()["versions"]
    assert result["machine"] == {**environment()["machine"], "devices": ["CPU"]}

    cost = result["cost"]
    assert cost == json.loads(json.dumps(tfl.cost(reloaded(folder)).as_dict()))
    assert 0 < cost["weight_bytes"] < cost["float_bytes"]
    bits = {layer["name"]: layer["weight_bits"] for layer in cost["layers"]}
    assert bits["stem"] == bits["head"] == [32]
    assert {tuple(b) for b in bits.values()} == {(), (2,), (32,)}


def reloaded(folder):
    return tfl.load_model(folder / "quantized" / "model.keras", compile=False)


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


# What a resumed epoch has in common with one that was not stopped.
OF_EVALUATION = ("val_loss", "val_accuracy", "weight_bits", "activation_bits")


def saved_within(quantized, epoch):
    """Checkpoints within an epoch, or in later ones."""
    found = quantized.glob("checkpoints/epoch-*-step-0000001")
    return [path for path in found if int(path.name.split("-")[1]) >= epoch]


def test_a_killed_run_resumes_in_mid_epoch_to_the_weights_of_the_whole_one(
    whole, tmp_path
):
    _, folder = whole
    quantized = tmp_path / "out" / "quantized"
    arguments = (*TINY, "--save_every=1", "--output_dir=out")
    with subprocess.Popen(
        programs.command("train.py", *arguments),
        cwd=tmp_path,
        env=programs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 600
        # In the middle of the second stage.
        while not saved_within(quantized, 3) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (quantized / "model.keras").exists()
    epoch, step = Recovery(quantized / "checkpoints").position
    if step == 0:
        # Killed a little late: as if before this save.
        shutil.rmtree(quantized / "checkpoints" / f"epoch-{epoch:05}-step-0000000")
        epoch, step = Recovery(quantized / "checkpoints").position
    assert step == 1
    assert 3 <= epoch < EPOCHS

    done = programs.run("train.py", *arguments, "--resume", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("float", "quantized"):
        ours, theirs = weights(tmp_path / "out" / part), weights(folder / part)
        assert len(ours) == len(theirs)
        for a, e in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, e)
    assert rows(tmp_path / "out" / "float") == rows(folder / "float")
    log, expected = rows(quantized), rows(folder / "quantized")
    for names in (log[epoch], expected[epoch]):
        for name in set(names) - {"epoch", *OF_EVALUATION}:
            del names[name]
    assert log == expected
    results = [
        json.loads((path / "quantized" / "result.json").read_text())
        for path in (tmp_path / "out", folder)
    ]
    for key in ("test_accuracy", "test_loss", "epochs", "cost"):
        assert results[0][key] == results[1][key]


def test_each_part_says_with_what_it_must_go_on(whole):
    _, folder = whole
    found = {
        part: json.loads((folder / part / "settings.json").read_text())
        for part in ("float", "quantized")
    }
    free = {"data_dir", "save_every", "strategy", "logical_cpus", "jit_compile"}
    free.add("report")
    assert set(found["quantized"]) == own_flags() - {"output_dir", "resume"} - free
    assert found["quantized"]["ladder"] == ["4", "2"]
    assert set(found["float"]) == {
        *("dataset", "limit", "augment", "batch_size", "seed", "policy"),
        *("model", "width", "weight_decay", "float_model"),
        *("schedule", "milestones"),
        *("float_epochs", "float_learning_rate"),
    }
    assert found["float"].items() <= found["quantized"].items()


# Flags of a run that goes on, and what the refusal must hold; None for none.
RESUMED = {
    "quantized": (
        ["--weight_bits=4", "--weight_quantizer=uniform", f"--epochs={EPOCHS + 4}"],
        [
            *("--weight_bits=4, begun with 2", "'uniform', begun with 'dorefa'"),
            *(f"--epochs=12, begun with {EPOCHS}", "'out/quantized/settings.json'"),
        ],
    ),
    "float": (
        ["--batch_size=16", "--float_epochs=3"],
        [
            *("--batch_size=16, begun with 32", "--float_epochs=3, begun with 2"),
            "'out/float/settings.json'",
        ],
    ),
    "how, not what": (["--save_every=1", "--data_dir="], None),
    "earlier version": (["--seed=6"], None),
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, whole):
    """A finished run's copies that go on with each of some flags, and their folder."""
    folder = tmp_path_factory.mktemp("resumed")
    cases = {}
    for name, (flags, _) in RESUMED.items():
        shutil.copytree(whole[1], folder / name / "out")
        cases[name] = folder / name, [*TINY, "--output_dir=out", "--resume", *flags]
    for path in (folder / "earlier version").rglob("settings.json"):
        path.unlink()
    return programs.run_each("train", cases)[0], folder


def results(folder):
    paths = sorted(folder.rglob("result.json")) + sorted(folder.rglob("log.csv"))
    return [path.read_text() for path in paths]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_the_flags_that_it_began_with(resumed, name):
    code, error, shown = resumed[0][name]
    told = RESUMED[name][1]
    assert (code, bool(error)) == ((0, False) if told is None else (1, True))
    assert all(part in error for part in told or [])
    assert "Float network" not in shown or told is None


@pytest.mark.parametrize("name", RESUMED)
def test_the_result_of_a_finished_run_stays(resumed, whole, name):
    assert results(resumed[1] / name / "out") == results(whole[1])


# Stochastic precision and joint distillation


@pytest.fixture(scope="module")
def joint(runs):
    """A run by stochastic precision with a teacher."""
    return runs("joint")


def test_joint_run_logs_every_part(joint):
    done, folder = joint
    log = rows(folder / "quantized")
    parts = ("loss", "accuracy", "task_loss", "distillation_loss", "hint_loss")
    assert set(log[0]) == {
        *("epoch", *parts, *(f"teacher_{part}" for part in parts)),
        *("quantized_share", "quantization_probability"),
        *("val_loss", "val_accuracy", "weight_bits", "activation_bits"),
    }
    assert [int(row["epoch"]) for row in log] == [0, 1]
    assert all(np.isfinite(float(value)) for row in log for value in row.values())
    # Linearly from 0.25 to 1 at 80 % of the four steps, two an epoch.
    p = [0.25 + 0.75 * progress / 0.8 for progress in (0.0, 0.25, 0.5, 0.75)]
    for row, expected in zip(log, [(p[0] + p[1]) / 2, (p[2] + p[3]) / 2], strict=True):
        assert float(row["quantization_probability"]) == pytest.approx(expected)
        # Of three blocks in each of two steps.
        assert 6 * float(row["quantized_share"]) == pytest.approx(
            round(6 * float(row["quantized_share"])), abs=1e-4
        )
        assert float(row["hint_loss"]) > 0
    assert [(r["weight_bits"], r["activation_bits"]) for r in log] == [("2", "2")] * 2
    assert "Stage 1/1: weights at 2 bits" in done.stdout


def test_joint_run_says_with_what_it_was_made(joint):
    _, folder = joint
    result = json.loads((folder / "quantized" / "result.json").read_text())
    assert set(result["settings"]) == own_flags() - {"output_dir", "resume"}
    expected = {
        "method": "sp",
        "sp_unit": "block",
        "sp_start": 0.25,
        "distill": "joint",
        "distill_target": "posteriors",
        "hints": True,
        "teacher_learning_rate": 0.01,
        "policy": "mixed_bfloat16",
        "save_every": 1,
        "strategy": "auto",
        "logical_cpus": 1,
        "jit_compile": False,
    }
    found = {name: result["settings"][name] for name in expected}
    assert found == expected
    assert result["epochs"] == 2
    assert 0 < result["cost"]["weight_bytes"] < result["cost"]["float_bytes"]


def test_joint_run_leaves_student_and_checkpoints_within_the_epoch(joint):
    _, folder = joint
    names = files(folder / "quantized" / "checkpoints")
    assert names == ["epoch-00001-step-0000001", "epoch-00002-step-0000000"]
    model = reloaded(folder)
    assert {t.bits for t in tfl.inspection.quantized_tensors(model)} == {2}
    dtypes = {
        tfl.inspection.wrapped_layer(layer).compute_dtype for layer in model.layers
    }
    assert "bfloat16" in dtypes
    assert {weight.dtype for weight in model.trainable_weights} == {tf.float32}
    result = json.loads((folder / "quantized" / "result.json").read_text())
    last = rows(folder / "quantized")[-1]
    assert float(last["val_accuracy"]) == pytest.approx(result["test_accuracy"])


def test_trains_a_network_of_ones_own(runs):
    done, folder = runs("own")
    model = reloaded(folder)
    names = {tfl.inspection.wrapped_layer(layer).name for layer in model.layers}
    assert names > {"eins", "eins_relu", "zwei", "zwei_relu", "drei", "vier"}
    bits = {t.name: t.bits for t in tfl.inspection.quantized_tensors(model)}
    assert bits["eins/kernel"] == bits["vier/kernel"] == 4
    assert bits["zwei/kernel"] == 2
    # Its loss reads probabilities: that of a network that knows nothing is ln 10.
    (row,) = rows(folder / "quantized")
    assert float(row["val_loss"]) == pytest.approx(np.log(10), rel=0.3)
    float_model = own_network()
    float_model.compile(metrics=["accuracy"], loss="sparse_categorical_crossentropy")
    data = datasets.load("digits", batch_size=32, limit=64)
    accuracy = float_model.evaluate(data.test, verbose=0)[1]
    assert f"Float network: test accuracy {accuracy:.4f}" in done.stdout


def test_runs_on_several_devices(runs):
    _, folder = runs("own")
    assert files(folder) == ["quantized"]
    result = json.loads((folder / "quantized" / "result.json").read_text())
    assert result["machine"]["devices"] == ["CPU", "CPU"]
    assert result["settings"]["strategy"] == "mirrored"
    (row,) = rows(folder / "quantized")
    assert np.isfinite(float(row["loss"]))
    assert float(row["val_accuracy"]) == pytest.approx(result["test_accuracy"])


# What is trained for deployment


def test_residual_sums_are_trained_at_8_bits(trained_for_deployment):
    flags, folder = trained_for_deployment
    tensors = list(tfl.inspection.quantized_tensors(reloaded(folder)))
    residual = [t for t in tensors if t.is_residual]
    # Three Adds: each one's sum and what it reads; an identity is quantized already.
    assert {t.layer.name for t in residual} == {
        *("stage1_block1_conv2_residual", "stage1_block1_add_residual"),
        *("stage2_block1_conv2_residual", "stage2_block1_shortcut_residual"),
        *("stage2_block1_add_residual", "stage3_block1_conv2_residual"),
        *("stage3_block1_shortcut_residual", "stage3_block1_add_residual"),
    }
    assert all(t.bits == 8 and t.is_calibrated for t in residual)
    assert {t.bits for t in tensors if not t.is_residual} == {2, 8}
    result = json.loads((folder / "quantized" / "result.json").read_text())
    assert {n: result["settings"][n] for n in flags} == flags
    (row,) = rows(folder / "quantized")
    assert np.isfinite(float(row["loss"]))


def test_residual_sums_stay_float_without_the_flag(whole):
    _, folder = whole
    tensors = tfl.inspection.quantized_tensors(reloaded(folder))
    assert not any(t.is_residual for t in tensors)


# Of each kind of mistake one: its flags, and what the message must hold.
IDLE = r"flag must have an effect\. Received: "
BAD = {
    "sp_start": (
        ["--method=sp", "--sp_start=1.5"],
        r"at most 1\. Received: start=1\.5",
    ),
    "teacher_rate": (
        ["--distill=task", "--teacher_learning_rate=-1"],
        r"above 0\. Received: learning_rate=-1",
    ),
    "data set": (["--dataset=nope"], r"--dataset=nope: .*<cifar10\|.*digits\|"),
    "logical_cpus": (["--logical_cpus=2"], r"effect.*Received: --logical_cpus"),
    "weight_bits": (["--weight_bits=9"], r"--weight_bits=9: .*\[1, 8\]"),
    "residual_bits": (["--residual_bits=4"], r"--residual_bits=4: .*must be 8"),
    "ladder": (["--method=pq", "--ladder=8,x"], r"--ladder=.*'x'.*bit-widths"),
    "epochs": (["--method=pq", "--epochs=2"], r"stages need.*Received: total=2"),
    "model": (["--model=nope"], r"--model=nope: .*preact_resnet8"),
    "data_dir": (
        ["--dataset=fashion_mnist", "--data_dir=/nonexistent"],
        r"--data_dir must exist\. Received: '/nonexistent'",
    ),
    "a low-bit network that is there": (
        ["--output_dir=old"],
        r"FileExistsError.*another run.*Received: 'old/quantized'",
    ),
    "seed": (["--seed=9999999999"], r"--seed=9999999999: .*\[0, 4294967295\]"),
    "output_dir": (["--output_dir=file/out"], r"writable.*Received: 'file/out'"),
    "not_a_flag": (["digits"], r"Received: arguments that are no flags: \['digits'\]"),
    "sp_start without sp": (
        ["--sp_start=0.3", "--method=ts"],
        IDLE + "--sp_start with --method=ts, --distill=none",
    ),
    "sp_unit without sp, at its default": (["--sp_unit=layer"], IDLE + "--sp_unit"),
    "hints without teacher": (["--hints"], IDLE + "--hints with"),
    "target without teacher": (
        ["--distill_target=logits", "--method=sp"],
        IDLE + "--distill_target with --method=sp",
    ),
    "rate of no teacher": (
        ["--teacher_learning_rate=0.1"],
        IDLE + "--teacher_learning_rate",
    ),
    "rate of a frozen teacher": (
        ["--teacher_learning_rate=0.1", "--distill=frozen"],
        IDLE + "--teacher_learning_rate with --method=plain, --distill=frozen",
    ),
    "a weight of no teacher": (["--task_weight=0.5"], IDLE + "--task_weight with"),
    "a weight of a frozen teacher": (
        ["--teacher_task_weight=0.5", "--distill=frozen"],
        IDLE + "--teacher_task_weight with",
    ),
    "a weight of a teacher that hears no student": (
        ["--teacher_distillation_weight=0.5", "--distill=task"],
        IDLE + "--teacher_distillation_weight with",
    ),
    "a negative weight": (
        ["--distillation_weight=-1", "--distill=joint"],
        r"distillation_weight.*Received: .*-1",
    ),
    "ladder without rungs": (["--ladder=4,2"], IDLE + "--ladder with --method=plain"),
    "milestones": (
        ["--schedule=step", "--milestones=0.3,late"],
        r"--milestones must be shares.*Received: '0.3,late'",
    ),
    "milestones that fall": (
        ["--schedule=step", "--milestones=25/30,15/30"],
        r"strictly rising. Received: milestones=\(0.83.*, 0.5\)",
    ),
    "milestones over zero epochs": (
        ["--schedule=step", "--milestones=1/0"],
        r"--milestones must be shares.*Received: '1/0'",
    ),
    "milestones of no step decay": (
        ["--milestones=0.3,0.6"],
        IDLE + "--milestones with .*--schedule=cosine",
    ),
    "warmup": (["--warmup=1"], r"below 1\. Received: warmup=1\.0"),
    "last_only without rungs": (
        ["--method=pq", "--last_only"],
        IDLE + "--last_only with --method=pq",
    ),
    "a method of the float network alone": (
        ["--epochs=0", "--method=ts", "--weight_bits=4"],
        IDLE + "--method, --weight_bits with --method=ts.*--epochs=0",
    ),
    "float rate of no float training": (
        ["--float_epochs=0", "--float_learning_rate=0.1"],
        IDLE + "--float_learning_rate with .*--float_epochs=0",
    ),
    "nothing to train": (
        ["--epochs=0", "--float_epochs=0"],
        r"something to train. Received: --epochs=0 with --float_epochs=0",
    ),
    "a checkpoint and nothing to train": (
        ["--epochs=0", "--float_checkpoint=file"],
        r"something to train. Received: .*--float_checkpoint=file",
    ),
    "a missing checkpoint": (
        ["--float_checkpoint=nope.h5"],
        r"FileNotFoundError: --float_checkpoint must exist\. Received: 'nope\.h5'",
    ),
    "a missing network": (
        ["--float_model=nope.h5"],
        r"FileNotFoundError: --float_model must exist\. Received: 'nope\.h5'",
    ),
    "a network of one's own that takes other images": (
        ["--float_model=six.keras", "--output_dir=own"],
        r"images of digits are \(8, 8, 1\)\. Received: .*\(6, 6, 1\)",
    ),
    "two networks": (
        ["--float_model=six.keras", "--model=plain_cnn", "--float_checkpoint=file"],
        IDLE + "--model, --float_checkpoint with .*--float_model=six.keras",
    ),
    "a report of the float network alone": (
        ["--epochs=0", "--report"],
        IDLE + "--report with .*--epochs=0",
    ),
    "no checkpoint": (
        ["--float_checkpoint="],
        r"--float_checkpoint must name .*Received: ''",
    ),
    "several idle ones": (
        ["--ladder=4,2", "--hints", "--method=sp"],
        IDLE + "--hints, --ladder with --method=sp",
    ),
    "mirrored on one device": (
        ["--strategy=mirrored"],
        r"two GPUs, or --logical_cpus=2.*Received: devices",
    ),
    "no workers": (["--strategy=multi_worker"], r"TF_CONFIG.*Received: TF_CONFIG=None"),
    "no CPUs": (
        ["--strategy=mirrored", "--logical_cpus=0"],
        r"--logical_cpus=0: .*positive",
    ),
}
# Importing TensorFlow takes seconds: one process for all, as if each were the first.
REFUSALS = """
import contextlib, io, json, os, sys
sys.path.insert(0, sys.argv[1])
import train
FLAGS, found = train.FLAGS, {}
for name, (folder, arguments) in json.load(sys.stdin).items():
    FLAGS.unparse_flags()
    os.chdir(folder)
    shown, error = io.StringIO(), "nothing"
    with contextlib.redirect_stdout(shown):
        try:
            train.main(FLAGS(["train.py", *arguments]))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    found[name] = [error, shown.getvalue()]
choices = {flag.name: getattr(flag.parser, "enum_values", None)
           for flag in FLAGS.get_key_flags_for_module("train")}
print(json.dumps([found, {**choices, "model": train.MODELS}]))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory, whole):
    """Error and output of all `BAD` flags, and of a run in the folder of another."""
    folder = tmp_path_factory.mktemp("refused")
    cases = {}
    six = [keras.layers.Flatten(input_shape=(6, 6, 1)), keras.layers.Dense(10)]
    keras.Sequential(six).save(folder / "six.keras")
    for index, (name, (flags, _)) in enumerate(BAD.items()):
        mine = folder / str(index)
        mine.mkdir()
        (mine / "file").write_text("")
        (mine / "old/quantized/checkpoints/epoch-00001-step-0000000").mkdir(
            parents=True
        )
        common = [*TINY[:1], *TINY[3:5], "--output_dir=out"]
        if not any("--float_model" in flag for flag in flags):
            common += [*TINY[1:3], "--float_epochs=1"]
        else:
            shutil.copy(folder / "six.keras", mine)
        cases[name] = (str(mine), [*common, *flags])
    again = (str(whole[1].parent), [*TINY, "--output_dir=whole"])
    without_workers = programs.environment()
    without_workers.pop("TF_CONFIG", None)
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS, str(programs.ROOT / "examples")],
        input=json.dumps({**cases, "again": again}),
        env=without_workers,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, choices = json.loads(done.stdout.splitlines()[-1])
    return found, folder, choices


def test_the_flags_know_what_the_library_has(refused):
    expected = {
        "dataset": datasets.names(),
        "model": models.names(),
        "weight_quantizer": tfl.quantizers.names("weight"),
        "activation_quantizer": tfl.quantizers.names("activation"),
        "method": experiment.METHODS,
        "distill": experiment.DISTILLATIONS,
        "schedule": DECAYS,
        "strategy": devices.STRATEGIES,
    }
    assert {name: tuple(refused[2][name]) for name in expected} == expected


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_refused_with_a_reason(refused, name):
    error, _ = refused[0][name]
    assert re.search(BAD[name][1], error), error


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_refused_before_any_training(refused, name):
    _, shown = refused[0][name]
    assert "Float network" not in shown
    assert "Epoch" not in shown
    assert not list(refused[1].rglob("model.keras"))


def test_a_folder_with_another_run_is_refused_without_resume(refused, whole):
    error, shown = refused[0]["again"]
    assert error.startswith("FileExistsError")
    assert "--resume" in error
    assert "Received: 'whole/float'" in error
    assert "Epoch" not in shown


def told(*arguments, folder):
    """The exit code and the standard error of a process that must not train."""
    _, *command = programs.command("train.py", *arguments)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        cwd=folder,
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if "|" in line}
    assert "absl.flags" in imported
    assert "tensorflow" not in imported
    assert list(folder.iterdir()) == []
    return done.returncode, [line for line in lines if "|" not in line], done.stdout


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--model=nope", "flag --model=nope: --model must be one of preact_resnet8"),
        ("--weight_bits=9", "flag --weight_bits=9: 9 is not an integer in the range"),
        ("--float_model=nope", "--float_model must exist. Received: 'nope'"),
        ("--hints", "A flag must have an effect. Received: --hints with"),
    ],
)
def test_a_wrong_value_is_one_line_before_tensorflow_is_imported(
    tmp_path, flag, reason
):
    code, lines, _ = told(flag, folder=tmp_path)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"train.py: {reason}")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_every_flag_in_its_group(tmp_path, flag):
    code, lines, shown = told(flag, folder=tmp_path)
    assert (code, lines) == (0, [])
    assert "python examples/train.py" in shown
    flags = shown[shown.index("\nData:\n") :]
    titles = re.findall(r"^(\w[\w ]*):$", flags, re.M)
    assert titles == [
        *("Data", "Network", "Bits", "Method", "Distillation", "Quantized training"),
        *("Float training", "Output", "Devices"),
    ]
    found = re.findall(r"^  --(?:\[no\])?(\w+) +\S", shown, re.M)
    assert sorted(found) == sorted(own_flags())
    bits = shown[shown.index("\nBits:") : shown.index("\nMethod:")]
    assert re.search(r"--weight_bits .*\(default: 2\)", bits)
