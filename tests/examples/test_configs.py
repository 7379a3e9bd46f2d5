"""The recipes of examples/configs/: what they say, and that each of them runs."""

import io
import json
import re

import numpy as np
import pytest

import tf_lowbit as tfl
from tests.datasets import tfds_files
from tests.examples import programs
from tf_lowbit.compat import tf

CONFIGS = programs.ROOT / "examples" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.flags"))

# The recipes, written down from their table and not from the files.
CIFAR = {
    "dataset": "cifar100",
    "model": "postact_resnet20",
    "augment": True,
    "batch_size": 128,
    "weight_decay": 1e-4,
    "schedule": "step",
    "milestones": ["60/200", "120/200"],
}
IMAGENET = {
    "dataset": "imagenet2012",
    "model": "preact_resnet18",
    "augment": True,
    "batch_size": 256,
    "weight_decay": 1e-4,
    "schedule": "step",
    "milestones": ["15/30", "25/30"],
}
# The first and the last layer are float, for there is no first_last_bits.
W2A2 = {
    "weight_bits": 2,
    "activation_bits": 2,
    "weight_quantizer": "dorefa",
    "activation_quantizer": "dorefa",
}
FROM_SCRATCH = {
    **CIFAR,
    **W2A2,
    "float_epochs": 0,
    "epochs": 200,
    "learning_rate": 0.1,
    "warmup": 0.0,
}
PRETRAINED = {
    **IMAGENET,
    **W2A2,
    "float_checkpoint": "",
    "epochs": 30,
    "learning_rate": 0.005,
    "warmup": 0.0,
}
ALONE = {"method": "plain", "distill": "none"}
JOINT = {"method": "plain", "distill": "joint", "distill_target": "posteriors"}
MATCHED = {**JOINT, "distill_target": "logits"}
AT_80 = {"model": "preact_resnet20", "milestones": ["80/200", "120/200"]}
CIFAR_JOINT = {**FROM_SCRATCH, **JOINT, **AT_80, "teacher_learning_rate": 0.1}
IMAGENET_TAUGHT = {**PRETRAINED, "model": "resnet18", "teacher_learning_rate": 0.001}
IMAGENET_JOINT = {
    **IMAGENET_TAUGHT,
    **JOINT,
    "weight_bits": 4,
    "activation_bits": 4,
    "task_weight": 0.5,
    "distillation_weight": 0.5,
    "teacher_task_weight": 1.0,
    "teacher_distillation_weight": 0.5,
}
SAMPLED = {"method": "sp", "sp_unit": "layer", "sp_start": 0.5}
RECIPES = {
    "cifar100_resnet20_float": {
        **CIFAR,
        "float_epochs": 200,
        "float_learning_rate": 0.1,
        "epochs": 0,
    },
    "cifar100_resnet20_baseline": {**FROM_SCRATCH, **ALONE},
    "cifar100_resnet20_mse": {
        **FROM_SCRATCH,
        **MATCHED,
        "teacher_learning_rate": 0.1,
    },
    "cifar100_resnet20_jkd": CIFAR_JOINT,
    "cifar100_resnet20_ts": {**FROM_SCRATCH, "method": "ts", "distill": "none"},
    "cifar100_resnet20_pq": {
        **FROM_SCRATCH,
        "method": "pq",
        "distill": "none",
        "ladder": ["32", "16", "8", "4", "2"],
    },
    "cifar100_resnet20_sp": {**FROM_SCRATCH, **SAMPLED, "distill": "none"},
    "cifar100_resnet20_sp_jkd": {**CIFAR_JOINT, **SAMPLED},
    "imagenet_float": {
        **IMAGENET,
        "milestones": ["30/90", "60/90"],
        "float_epochs": 90,
        "float_learning_rate": 0.1,
        "epochs": 0,
    },
    "imagenet_resnet18_baseline": {**PRETRAINED, **ALONE},
    "imagenet_resnet18_mse": {
        **IMAGENET_TAUGHT,
        **MATCHED,
        "learning_rate": 0.001,
        "task_weight": 1.0,
        "distillation_weight": 0.5,
        "teacher_task_weight": 1.0,
        "teacher_distillation_weight": 0.5,
    },
    "imagenet_resnet18_jkd": IMAGENET_JOINT,
    "imagenet_resnet50_jkd": {**IMAGENET_JOINT, "model": "resnet50"},
    "imagenet_alexnet_jkd": {**IMAGENET_JOINT, "model": "alexnet"},
}
# (bits of weights, of activations, epochs) of each stage; None for a float network.
ONE_STAGE = [[2, 2, 200]]
STAGES = {
    "cifar100_resnet20_float": [[None, None, 200]],
    "cifar100_resnet20_ts": [[2, 32, 100], [2, 2, 100]],
    "cifar100_resnet20_pq": [[bits, bits, 40] for bits in (32, 16, 8, 4, 2)],
    "imagenet_float": [[None, None, 90]],
    "imagenet_resnet18_baseline": [[2, 2, 30]],
    "imagenet_resnet18_mse": [[2, 2, 30]],
    **{f"imagenet_{n}_jkd": [[4, 4, 30]] for n in ("resnet18", "resnet50", "alexnet")},
}
# Epochs and the learning rate in all of them, stage after stage.
AT_60_120 = [(60, 0.1), (60, 0.01), (80, 0.001)]
AT_80_120 = [(80, 0.1), (40, 0.01), (80, 0.001)]
AT_15_25 = [(15, 0.005), (10, 0.0005), (5, 0.00005)]
TEACHER_AT_15_25 = [(15, 0.001), (10, 0.0001), (5, 0.00001)]
RATES = {
    "cifar100_resnet20_float": AT_60_120,
    "cifar100_resnet20_baseline": AT_60_120,
    "cifar100_resnet20_mse": AT_60_120,
    "cifar100_resnet20_jkd": AT_80_120,
    "cifar100_resnet20_ts": [(30, 0.1), (30, 0.01), (40, 0.001)] * 2,
    "cifar100_resnet20_pq": [(12, 0.1), (12, 0.01), (16, 0.001)] * 5,
    "cifar100_resnet20_sp": AT_60_120,
    "cifar100_resnet20_sp_jkd": AT_80_120,
    "imagenet_float": [(30, 0.1), (30, 0.01), (30, 0.001)],
    "imagenet_resnet18_baseline": AT_15_25,
    "imagenet_resnet18_mse": TEACHER_AT_15_25,
    "imagenet_resnet18_jkd": AT_15_25,
    "imagenet_resnet50_jkd": AT_15_25,
    "imagenet_alexnet_jkd": AT_15_25,
}
TEACHER_RATES = {
    "cifar100_resnet20_mse": AT_60_120,
    "cifar100_resnet20_jkd": AT_80_120,
    "cifar100_resnet20_sp_jkd": AT_80_120,
    "imagenet_resnet18_mse": TEACHER_AT_15_25,
    "imagenet_resnet18_jkd": TEACHER_AT_15_25,
    "imagenet_resnet50_jkd": TEACHER_AT_15_25,
    "imagenet_alexnet_jkd": TEACHER_AT_15_25,
}


def is_pretrained(name):
    return RECIPES[name].get("float_checkpoint") == ""


def command(name, *more):
    return [f"--flagfile={CONFIGS / name}.flags", *more]


def test_every_file_has_a_recipe():
    assert sorted(RECIPES) == NAMES
    assert sorted(RATES) == NAMES


# What the files say


# In place of training; what is no recipe is left to the program of the costs.
DESCRIBE = """
import doctest, recipe, train

costs, found["doctests"] = program.main, list(doctest.testmod(program))

def describe(argv):
    if not FLAGS["output_dir"].present:
        return costs(argv)
    train.check_flags()
    recipe.check()
    own = FLAGS.get_key_flags_for_module(train.__name__)
    stages = recipe.stages() or [recipe.float_stage(FLAGS.float_epochs)]
    # CIFAR-100's steps and ImageNet's, the first and the last of each epoch.
    steps = {"cifar100": 391, "imagenet2012": 5005}[FLAGS.dataset]
    teacher = recipe.experiment.teacher_optimizer(
        FLAGS.distill,
        FLAGS.teacher_learning_rate,
        FLAGS.schedule,
        FLAGS.epochs * steps,
        recipe.milestones(),
        FLAGS.warmup,
    )
    near = (0, 14, 15, 24, 25, 59, 60, 79, 80, 119, 120)
    found = {
        "given": {f.name: f.value for f in own if f.present},
        "stages": [[s.weight_bits, s.activation_bits, s.epochs] for s in stages],
        "rates": [
            [s.learning_rate_at((e + w) / s.epochs) for w in (0, (steps - 1) / steps)]
            for s in stages for e in range(s.epochs)
        ],
        "teacher_rates": teacher and [
            [e, *(float(teacher._learning_rate(e * steps + s)) for s in (0, steps - 1))]
            for e in near if e < FLAGS.epochs
        ],
    }
    print(json.dumps(found))

program.main = describe
"""


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """What the program makes of each flag file and some changes to them; the costs."""
    folder = tmp_path_factory.mktemp("described")
    (folder / "float.h5").write_text("")
    checkpoint = "--float_checkpoint=float.h5"
    cases = {
        name: command(name, *([checkpoint] if is_pretrained(name) else []))
        for name in NAMES
    }
    cases["without a checkpoint"] = command("imagenet_resnet18_jkd")
    for model in ("resnet50", "alexnet"):
        cases[f"float {model}"] = command("imagenet_float", f"--model={model}")
        cases[f"baseline {model}"] = command(
            "imagenet_resnet18_baseline", f"--model={model}", checkpoint
        )
    cases["last only"] = command(
        "cifar100_resnet20_ts", "--method=ts+pq", "--ladder=4,2", "--last_only"
    )
    cases["costs"] = []
    cases["costs of one"] = [
        "--tflops=2.5",
        f"--recipes={CONFIGS / 'cifar100_resnet20_jkd.flags'}",
    ]
    cases["no speed"] = ["--tflops=0"]
    cases["no file"] = ["--recipes=nix.flags"]
    cases["a recipe's flag"] = ["--model=resnet50", "--dataset=cifar10"]
    cases = {name: (folder, arguments) for name, arguments in cases.items()}
    return programs.run_each("recipe_costs", cases, before=DESCRIBE)[0]


@pytest.fixture
def shown(described):
    def shown(name):
        code, error, output = described[name]
        assert code == 0, error
        return json.loads(output)

    return shown


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_the_recipe_and_nothing_else(shown, name):
    expected = {**RECIPES[name], "output_dir": f"runs/{name}"}
    if is_pretrained(name):
        expected["float_checkpoint"] = "float.h5"
    assert shown(name)["given"] == expected


@pytest.mark.parametrize("name", NAMES)
def test_stages_and_learning_rates_are_those_of_the_recipe(shown, name):
    found = shown(name)
    assert found["stages"] == STAGES.get(name, ONE_STAGE)
    expected = [rate for epochs, rate in RATES[name] for _ in range(epochs)]
    np.testing.assert_allclose(
        found["rates"], [[rate, rate] for rate in expected], rtol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_teachers_learning_rate_is_that_of_the_recipe(shown, name):
    found = shown(name)["teacher_rates"]
    assert (found is not None) == (name in TEACHER_RATES)
    if found:
        rates = [rate for epochs, rate in TEACHER_RATES[name] for _ in range(epochs)]
        assert len(found) >= 5
        for epoch, *actual in found:
            np.testing.assert_allclose(actual, rates[epoch], rtol=1e-6)


def test_a_recipe_from_pretrained_weights_is_refused_without_them(described):
    code, error, _ = described["without a checkpoint"]
    assert code == 1
    assert re.search(r"--float_checkpoint must name .*Received: ''", error)


@pytest.mark.parametrize("model", ["resnet50", "alexnet"])
def test_the_other_networks_take_two_recipes_over(shown, model):
    for recipe, name in (("imagenet_float", "float"), (None, "baseline")):
        recipe = RECIPES[recipe or "imagenet_resnet18_baseline"]
        given = shown(f"{name} {model}")["given"]
        assert {**given, "float_checkpoint": ""} == {
            **{**recipe, "float_checkpoint": "", "model": model},
            "output_dir": given["output_dir"],
        }


def test_last_only_reaches_the_stages(shown):
    stages = shown("last only")["stages"]
    assert stages == [[4, 4, 66], [2, 4, 67], [2, 2, 67]]


# What they cost


def test_the_readme_has_the_costs_that_the_program_prints(described):
    code, error, printed = described["costs"]
    assert code == 0, error
    assert len(printed.splitlines()) == len(NAMES) + 2
    assert f"\n{printed}\n" in (CONFIGS / "README.md").read_text()


def test_a_row_is_macs_times_images_times_epochs(described):
    code, error, printed = described["costs of one"]
    assert code == 0, error
    *_, title, _, row = printed.splitlines()
    assert "hours at 2.5 TFLOP/s" in title
    # 3x3 kernels over 32, 16 and 8 squared pixels, the first stage's stem and six
    # convolutions, then one with half the channels in and five; two shortcuts; head.
    first = 9 * 32**2 * (3 * 16 + 6 * 16 * 16)
    second = 9 * 16**2 * (16 * 32 + 5 * 32 * 32) + 16**2 * 16 * 32
    third = 9 * 8**2 * (32 * 64 + 5 * 64 * 64) + 8**2 * 32 * 64
    macs = first + second + third + 64 * 100
    # Forward and twice as much backward, two operations a MAC, two networks.
    flops = 3 * 2 * macs * 50_000 * 200 * 2
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "`cifar100_resnet20_jkd`",
        cells[1],
        f"{macs:,}",
        "0 + 200",
        "2",
        f"{flops:.2e}",
        f"{flops / 2.5e12 / 3600:,.2f}",
    ]


def test_the_rule_of_the_costs(described):
    """A float training before, and a teacher in the quantized one, count too."""
    failed, attempted, *_ = described["doctests"]
    assert (failed, attempted) == (0, 2)


def test_a_speed_of_nothing_is_refused(described):
    assert re.search(r"positive\. Received: --tflops=0", described["no speed"][1])


def test_a_missing_recipe_is_named(described):
    code, error, printed = described["no file"]
    assert (code, printed) == (1, "")
    assert re.search(r"^FileNotFound.*must name files.*Received: .*nix\.flags", error)


def test_a_recipe_with_an_unknown_flag_says_which(tmp_path):
    (tmp_path / "odd.flags").write_text("--dataset=cifar10\n--nope=1\n")
    done = programs.run("recipe_costs.py", "--recipes=odd.flags", folder=tmp_path)
    assert done.returncode == 1
    assert "Unknown command line flag 'nope'" in done.stderr
    assert "UnparsedFlagAccessError" not in done.stderr


def test_flags_of_the_training_are_refused_where_files_have_them(described):
    code, error, printed = described["a recipe's flag"]
    assert (code, printed) == (1, "")
    assert re.search(r"--recipes names. Received: .*--dataset", error)
    assert "--model" in error


# That they run


# The file's settings, of whose sizes these differ. Three steps an epoch; a network of
# 224x224 pixels makes two.
SMALL = {
    "cifar100": {"batch_size": 2, "limit": 6, "width": 4},
    "imagenet2012": {"batch_size": 2, "limit": 4, "width": 4},
}
EPOCHS = {"cifar100_resnet20_ts": 2, "cifar100_resnet20_pq": 5}
FLOAT_FILES = {
    "preact_resnet18": "imagenet_float/float/model.keras",
    "resnet18": "resnet18.h5",
    "resnet50": "resnet50.h5",
    "alexnet": "alexnet.h5",
}
# Learning rates of the last step: 2 / 3 of a stage, or half of it.
LAST_RATE = {"cifar100": 0.001, "imagenet2012": 0.0005}
LAST_TEACHER_RATE = {"cifar100": 0.001, "imagenet2012": 0.0001}

OBSERVE = """
import numpy as np
from tf_lowbit import models
from tf_lowbit.compat import tf
from tf_lowbit.models import blocks

# More sizes: AlexNet has no width, and most of its weights are here; residual networks
# get one block a stage.
importlib.import_module("tf_lowbit.models.alexnet")._FC_UNITS = 16
layout = blocks.layout
blocks.layout = lambda counts, width: layout([1] * len(counts), width)
small = {"width": 4}
for name, sizes in (("resnet18", small), ("resnet50", small), ("alexnet", {})):
    models.get(name, **sizes).save(f"{FOLDER}/{name}.h5")

import experiment
train = experiment.train
# Thirteen graphs would take minutes to trace; test_train.py has more of them.
tf.config.run_functions_eagerly(True)

def observed(model, *arguments, **options):
    networks = {"student": getattr(model, "student", model)}
    if getattr(model, "teacher", None):
        networks["teacher"] = model.teacher
    before = {n: [w.numpy() for w in m.trainable_weights] for n, m in networks.items()}
    stem = networks["student"].get_layer("stem")
    stem = getattr(stem, "layer", stem).kernel.numpy().ravel()[:20].tolist()
    tf.config.run_functions_eagerly(FLAGS.output_dir != "cifar100_resnet20_baseline")
    outcome = train(model, *arguments, **options)
    tf.config.run_functions_eagerly(True)
    moved = {
        n: [
            bool(np.isfinite(w.numpy()).all() and (w.numpy() != b).any())
            for w, b in zip(m.trainable_weights, before[n])
            if b.ndim > 1
        ]
        for n, m in networks.items()
    }
    rates = [float(model.optimizer.learning_rate)]
    if "teacher" in networks:
        rates.append(float(model.teacher_optimizer.learning_rate))
    print("OBSERVED" + json.dumps({"moved": moved, "stem": stem, "rates": rates}))
    return outcome

experiment.train = observed
"""


def write_cifar100(folder):
    parts = {
        split: [
            {**example, "id": f"{split}_{index}", "coarse_label": 3}
            for index, example in enumerate(
                tfds_files.images_with_labels(6, 100, (32, 32, 3), seed)
            )
        ]
        for seed, split in enumerate(("train", "test"))
    }
    tfds_files.write("cifar100", folder, parts)


def write_imagenet(folder):
    def example(label):
        random = np.random.RandomState(label)
        pixels = random.randint(0, 256, (40, 48, 3)).astype(np.uint8)
        encoded = tf.io.encode_jpeg(pixels).numpy()
        name = f"{label}.JPEG"
        return {"image": io.BytesIO(encoded), "label": label, "file_name": name}

    splits = {"train": range(4), "validation": range(100, 104)}
    parts = {split: [example(n) for n in labels] for split, labels in splits.items()}
    tfds_files.write("imagenet2012", folder, parts)


def sizes(name):
    """The sizes that are overridden, by flag."""
    recipe = RECIPES[name]
    small = dict(SMALL[recipe["dataset"]])
    if recipe["model"] == "alexnet":
        del small["width"]
    if recipe["epochs"]:
        return {**small, "epochs": EPOCHS.get(name, 1)}
    return {**small, "float_epochs": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of all recipes on a few records in TFDS's format, and their folder."""
    folder = tmp_path_factory.mktemp("runs")
    write_cifar100(folder / "data")
    write_imagenet(folder / "data")
    cases = {}
    # The float networks first: others start from them.
    for name in sorted(NAMES, key=lambda name: not name.endswith("float")):
        changed = {**sizes(name), "data_dir": "data", "output_dir": name}
        if is_pretrained(name):
            changed["float_checkpoint"] = FLOAT_FILES[RECIPES[name]["model"]]
        changes = [f"--{flag}={value}" for flag, value in changed.items()]
        cases[name] = (folder, command(name, *changes))
    before = f"FOLDER = {str(folder)!r}\n{OBSERVE}"
    return programs.run_each("train", cases, before=before)[0], folder


@pytest.fixture
def observed(runs):
    def observed(name):
        code, error, output = runs[0][name]
        assert code == 0, error
        (found,) = re.findall("^OBSERVED(.*)$", output, re.M)
        return json.loads(found)

    return observed


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_every_kernel(observed, name):
    found = observed(name)
    is_joint = RECIPES[name].get("distill") == "joint"
    assert set(found["moved"]) == {"student", *(["teacher"] if is_joint else [])}
    for moved in found["moved"].values():
        assert len(moved) >= 8
        assert all(moved)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_step_has_the_learning_rate_of_its_milestone(observed, name):
    data = RECIPES[name]["dataset"]
    student, *teacher = observed(name)["rates"]
    others = {"imagenet_float": 0.01, "imagenet_resnet18_mse": 0.0001}
    expected = others.get(name, LAST_RATE[data])
    assert student == pytest.approx(expected)
    assert teacher == (
        [pytest.approx(LAST_TEACHER_RATE[data])] if name in TEACHER_RATES else []
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_result_says_what_was_run(runs, observed, name):
    observed(name)
    recipe = RECIPES[name]
    folder = runs[1] / name
    part = "quantized" if recipe["epochs"] else "float"
    # From scratch, or pretrained: there is no other training.
    assert [path.name for path in folder.iterdir()] == [part]
    result = json.loads((folder / part / "result.json").read_text())
    expected = {**recipe, **sizes(name)}
    if is_pretrained(name):
        expected["float_checkpoint"] = FLOAT_FILES[recipe["model"]]
    assert {flag: result["settings"][flag] for flag in expected} == expected
    assert result["settings"]["first_last_bits"] is None
    assert result["epochs"] == (sizes(name)["epochs"] if recipe["epochs"] else 1)
    bits = recipe.get("weight_bits")
    layers = {layer["name"]: layer for layer in result["cost"]["layers"]}
    for layer in layers.values():
        is_edge = layer["name"] in ("stem", "head") or part == "float"
        assert set(layer["weight_bits"]) <= {32 if is_edge else bits}
        assert set(layer["activation_bits"]) <= {32 if is_edge else bits}
    assert {"stem", "head"} < set(layers)


@pytest.mark.parametrize("name", [name for name in NAMES if is_pretrained(name)])
def test_a_pretrained_recipe_starts_from_the_file(runs, observed, name):
    found = observed(name)["stem"]
    path = runs[1] / FLOAT_FILES[RECIPES[name]["model"]]
    kernel = tfl.load_model(path, compile=False).get_layer("stem").kernel.numpy()
    assert found == kernel.ravel()[:20].tolist()


def test_two_stages_and_a_falling_ladder_were_trained(runs, observed):
    for name, bits in (
        ("cifar100_resnet20_ts", [("2", "32"), ("2", "2")]),
        ("cifar100_resnet20_pq", [(b, b) for b in ("32", "16", "8", "4", "2")]),
    ):
        observed(name)
        header, *rows = (runs[1] / name / "quantized/log.csv").read_text().split()
        columns = header.split(",")
        found = [dict(zip(columns, row.split(","), strict=True)) for row in rows]
        assert [(r["weight_bits"], r["activation_bits"]) for r in found] == bits
