"""Bad input, over the whole public API: an error that states what is wanted.

Each row is a call that no user means. It must end in a ValueError or an OSError whose
message has the requirement and `Received:`, neither in a raw error of Keras, NumPy or
Python, nor in a result.
"""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit import callbacks, datasets, export, models, quantizers
from tf_lowbit.compat import keras, tf

NAN = float("nan")


def float_network(name="network", inputs=1):
    """A network of 4x4 images, with batch normalisation and three classes."""
    images = [keras.Input((4, 4, 1), name=f"image{i}") for i in range(inputs)]
    x = images[0] if inputs == 1 else keras.layers.Add()(images)
    x = keras.layers.Conv2D(2, 3, use_bias=False, name="stem")(x)
    x = keras.layers.BatchNormalization(name="stem_bn")(x)
    x = keras.layers.ReLU(name="stem_relu")(x)
    x = keras.layers.Conv2D(2, 1, name="conv")(x)
    x = keras.layers.ReLU(name="conv_relu")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(images, keras.layers.Dense(3, name="head")(x), name=name)


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """What the rows share; no call may change it."""
    random = np.random.default_rng(0)
    x = random.uniform(0, 1, (16, 4, 4, 1)).astype(np.float32)
    y = random.integers(0, 3, 16)
    data = [(x[:8], y[:8]), (x[8:], y[8:])]
    plain = float_network()
    network = tfl.quantize(plain, tfl.PrecisionRule("conv|head", 2, 2))
    network.compile("sgd", "sparse_categorical_crossentropy")
    tfl.calibrate(network, data)
    two = tfl.quantize(float_network(inputs=2), tfl.PrecisionRule("conv", 2, 2))
    students = {name: tfl.quantize(float_network(name)) for name in ("a", "b")}
    folder = tmp_path_factory.mktemp("files")
    made = export.to_tflite(network, folder / "network.tflite", data, verbose=0)
    other = tmp_path_factory.mktemp("others")
    for name, content in {
        "text.keras": b"text",
        "torn.h5": b"\x89HDF\r\n\x1a\n" + 50 * b"x",
        "net.tflite": made.path.read_bytes(),
    }.items():
        (other / name).write_bytes(content)
    return SimpleNamespace(
        other=other,
        onnx=export.to_qonnx(network, other / "network.onnx").read_bytes(),
        x=x,
        y=y,
        data=data,
        endless=tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat(),
        plain=plain,
        network=network,
        two=two,
        trainer=tfl.LowBitTrainer(students),
        folder=folder,
        made=made,
        content=made.path.read_bytes(),
        sensitivity=tfl.sensitivity(network, data, (2, 4), progress=False),
    )


def with_nan(array):
    """A copy with a NaN in it."""
    array = np.array(array)
    array.flat[0] = NAN
    return array


def spoiled(network):
    """A copy of a network, with a NaN in a weight."""
    copy = keras.models.clone_model(network)
    copy.set_weights([with_nan(w) for w in network.get_weights()])
    return copy


def exports(env, data=None, **arguments):
    """Calls `to_tflite` on the network."""
    path = arguments.pop("path", env.folder / "bad.tflite")
    model = arguments.pop("model", env.network)
    data = env.data if data is None else data
    return export.to_tflite(model, path, data, **{"verbose": 0, **arguments})


def shown(value):
    """A short id of a value, which every process gives alike."""
    return re.sub(r" at 0x\w+", "", repr(value))[:40]


def table(front, call, argument, values, message):
    """Rows for some values of one argument."""
    return [
        (
            f"{front}-{argument}={shown(value)}",
            lambda env, v=value: call(env, v),
            message,
        )
        for value in values
    ]


def constructor(kind, argument, values, message, **others):
    """Rows for some values of one argument of a constructor or function."""
    return table(
        kind.__name__,
        lambda env, v: kind(**others, **{argument: v}),
        argument,
        values,
        message,
    )


COUNTS = (0, -1, 2.5, True, "2", None, NAN)
NUMBERS = ("0.5", True, NAN, float("inf"), -0.5, [0.5], 1j)
FLAGS = ("yes", 1, None)
RUNNERS = (export.Runner, export.MicroRunner)
NO_MODELS = (None, 3, "model.keras", keras.layers.Dense(2), {"a": 1})


def rows():
    """All calls."""
    rule = tfl.PrecisionRule
    made = []

    def add(kind, argument, values, message, **others):
        made.extend(constructor(kind, argument, values, message, **others))

    # Rules and stages.
    add(rule, "pattern", (b"conv", 3, None, "(", ["conv"]), "pattern must")
    for name in ("weight_bits", "activation_bits"):
        values = (0, 9, -1, 2.0, True, "2", [2], NAN)
        add(rule, name, values, f"{name} must be an integer in", pattern="a")
    for name in ("weight_quantizer", "activation_quantizer"):
        values = (
            "lqs",
            3,
            None,
            ["lsq"],
            {},
            {"class_name": "Lqs", "config": {}},
            object,
        )
        add(rule, name, values, "quantizer must|must be", pattern="a")
    add(
        rule,
        "layer_type",
        (3, keras.layers.Conv2D, ["Conv2D"]),
        "layer_type must",
        pattern="a",
    )
    add(rule, "edges", ("no", 1, 0), "edges must", pattern="a")
    add(tfl.Stage, "epochs", COUNTS, "epochs must be an integer of at least 1")
    for name in ("weight_bits", "activation_bits"):
        add(tfl.Stage, name, (0, "2", True), f"{name} must be an integer in", epochs=1)
    add(tfl.Stage, "learning_rate", (*NUMBERS, 0), "learning_rate must", epochs=1)
    add(tfl.Stage, "decay", ("linear", None, 3, ["step"]), "decay must", epochs=1)
    add(tfl.Stage, "warmup", (*NUMBERS, 1), "warmup must", epochs=1, learning_rate=0.1)
    values = (0.5, (), (0.6, 0.3), ("a",), (NAN,), (0.0,), None)
    add(
        tfl.Stage,
        "milestones",
        values,
        "milestones must",
        epochs=1,
        learning_rate=0.1,
        decay="step",
    )
    for maker in (tfl.two_stage, tfl.progressive, tfl.two_stage_progressive):
        add(maker, "bits", (0, "2", (2,), (2, 2, 2), None, True), "bits must", epochs=1)
        add(maker, "epochs", (*COUNTS, (1,), {1: 2}), "epochs must", bits=2)
        values = ("0.1", (0.1,), True, -0.1)
        add(maker, "learning_rate", values, "learning_rate must", bits=2, epochs=1)
    for maker in (tfl.progressive, tfl.two_stage_progressive):
        values = ((2, 4), (), 4, "42", None, ("8", "4"), (9, 2))
        add(maker, "ladder", values, "ladder must", bits=2, epochs=1)
    add(
        tfl.two_stage_progressive,
        "last_only",
        FLAGS,
        "last_only must",
        bits=2,
        epochs=1,
    )
    add(tfl.split_epochs, "total", COUNTS, "total must", parts=1)
    add(tfl.split_epochs, "parts", COUNTS, "parts must", total=4)
    for name in ("start", "tail"):
        add(tfl.LinearRamp, name, (*NUMBERS, 1.5, None), f"{name} must")

    # Training.
    precision, distillation = tfl.StochasticPrecision, tfl.JointDistillation
    for name in ("start", "tail"):
        add(precision, name, (*NUMBERS, 1.5), f"{name} must")
    add(precision, "schedule", (3, "cosine", True), "schedule must")
    add(precision, "unit", ("layers", 3, None, ["("], [3], b"layer"), "unit must")
    add(precision, "seed", (-1, 0.5, "0", None, True, 2**63), "seed must")
    add(precision, "steps", (0, 2.5, "3", True), "steps must")
    add(precision, "raw_weights", FLAGS, "raw_weights must")
    add(distillation, "target", ("kl", None, 3, ["logits"]), "target must")
    add(distillation, "teacher", ("online", None, True), "teacher must")
    for name in ("task_weight", "distillation_weight", "temperature"):
        add(distillation, name, NUMBERS, f"{name} must")
    add(distillation, "temperature", (0,), "temperature must")
    add(distillation, "hints", (3, [], "all", [("a",)], [3], ""), "hints must")
    add(distillation, "hint_weight", NUMBERS, "hint_weight must", hints="stages")
    add(
        distillation, "hint_teacher_gradient", ("yes", 1), "hint_teacher_gradient must",
        hints="stages",
    )  # fmt: skip
    made.extend(
        table(
            "LowBitTrainer",
            lambda env, v: tfl.LowBitTrainer(v),
            "student",
            (*NO_MODELS, {}, []),
            "must",
        )
    )
    made.extend(
        table(
            "LowBitTrainer",
            lambda env, v: tfl.LowBitTrainer(env.network, v),
            "teacher",
            NO_MODELS[1:],
            "must",
        )
    )
    made.extend(
        table(
            "LowBitTrainer",
            lambda env, v: tfl.LowBitTrainer(env.network, env.plain, distillation=v),
            "distillation",
            ("posteriors", 3, True),
            "distillation must",
        )
    )
    made.extend(
        table(
            "LowBitTrainer",
            lambda env, v: tfl.LowBitTrainer(env.network, stochastic_precision=v),
            "stochastic_precision",
            (0.5, True, "layer"),
            "stochastic_precision must",
        )
    )

    # Quantizers.
    for kind in (
        quantizers.DoReFaActivationQuantizer, quantizers.DoReFaWeightQuantizer,
        quantizers.LSQActivationQuantizer, quantizers.LSQWeightQuantizer,
        quantizers.PACTActivationQuantizer, quantizers.UniformActivationQuantizer,
        quantizers.UniformWeightQuantizer, quantizers.ResidualQuantizer,
    ):  # fmt: skip
        add(kind, "bits", (0, 9, "2", True, None, 2.0), "bits must")
    for kind in (quantizers.LSQWeightQuantizer, quantizers.UniformWeightQuantizer):
        add(kind, "per_axis", ("x", 1, None), "per_axis must")
        add(kind, "channel_axes", (3, "ab", (0.5,), None, (True,)), "channel_axes must")
    add(quantizers.LSQWeightQuantizer, "narrow_range", FLAGS, "narrow_range must")
    add(quantizers.DoReFaWeightQuantizer, "max_gradient", FLAGS, "max_gradient must")
    for kind in (
        quantizers.LSQActivationQuantizer,
        quantizers.UniformActivationQuantizer,
    ):
        add(kind, "signed", FLAGS, "signed must")
    for kind in (
        quantizers.DoReFaActivationQuantizer, quantizers.LSQActivationQuantizer,
        quantizers.PACTActivationQuantizer, quantizers.UniformActivationQuantizer,
    ):  # fmt: skip
        add(kind, "implementation", ("gpu", None, 3, ["auto"]), "implementation must")
    add(quantizers.PACTActivationQuantizer, "alpha", (*NUMBERS, 0, None), "alpha must")
    add(
        quantizers.PACTActivationQuantizer,
        "alpha_decay",
        (*NUMBERS, None),
        "alpha_decay must",
    )
    add(quantizers.UniformActivationQuantizer, "clip", (*NUMBERS, 0, None), "clip must")
    for role in ("weights", None, 3, ["weight"]):
        made.append(
            (f"names-{role}", lambda env, r=role: quantizers.names(r), "role must")
        )
        made.append(
            (f"get-{role}", lambda env, r=role: quantizers.get("lsq", r), "role must")
        )
    add(
        quantizers.find,
        "name",
        ("lqs", None, 3, ["lsq"]),
        "quantizer must",
        role="weight",
    )
    add(quantizers.serialize, "quantizer", (None, 3, "lsq"), "must be")
    add(
        quantizers.deserialize,
        "data",
        (None, 3, "lsq", {}, {"class_name": "Lqs", "config": {}}),
        "must be",
    )

    # Models and data sets.
    for kind in (
        models.plain_cnn, models.mobilenet_v2, models.preact_resnet,
        models.postact_resnet, models.resnet18, models.resnet50, models.preact_resnet18,
        models.alexnet,
    ):  # fmt: skip
        others = (
            {"depth": 8}
            if kind in (models.preact_resnet, models.postact_resnet)
            else {}
        )
        if kind is not models.alexnet:
            add(kind, "width", COUNTS, "width must", **others)
        add(kind, "classes", (1, "10", True, None), "classes must", **others)
        values = (
            (28, 28),
            28,
            "abc",
            (28, 28, 0),
            (28.0, 28, 1),
            None,
            (1, 1, 1),
            (NAN, 28, 1),
        )
        add(kind, "input_shape", values[:-2], "input_shape must", **others)
        add(
            kind,
            "weight_decay",
            (-1, "0.1", NAN, None, True, float("inf")),
            "weight_decay must",
            **others,
        )
    add(models.alexnet, "dropout", (*NUMBERS, 1, None), "dropout must")
    add(models.mobilenet_v2, "expansion", COUNTS, "expansion must")
    for kind in (models.preact_resnet, models.postact_resnet):
        add(kind, "depth", (0, 9, "8", 8.0, True, None), "depth must")
    for name in ("resnet", None, 3, ["alexnet"], "preact_resnet9"):
        made.append(
            (f"models.get-{name}", lambda env, n=name: models.get(n), "must be")
        )
        made.append(
            (
                f"datasets.load-{name}",
                lambda env, n=name: datasets.load(n, batch_size=1),
                "must be",
            )
        )
    for argument, values in {
        "batch_size": COUNTS,
        "seed": (-1, 0.5, "0", None, True, 2**63),
        "augment": FLAGS,
        "validation_fraction": (*NUMBERS, 1, None),
        "start_epoch": (-1, 0.5, "0", None, True),
        "start_step": (-1, 0.5, "0", None, True, 10**6),
        "limit": (0, -1, 2.5, True, "2"),
        "data_dir": ("folder", 3),
    }.items():
        others = {"name": "synthetic", "batch_size": 4}
        others.pop(argument, None)
        add(datasets.load, argument, values, f"{argument} must|must be", **others)
    others = {"name": "cifar10", "batch_size": 4}
    add(datasets.load, "data_dir", ("/no/folder", True, ""), "must|not", **others)
    others = {"name": "synthetic", "batch_size": 4}
    for argument, values in {
        "image_shape": ((8, 8), 8, "abc", (8, 8, 0), (8.0, 8, 1), None),
        "classes": (1, "2", True, None, 2.5),
        "train_size": COUNTS,
        "test_size": COUNTS,
        "noise": (*NUMBERS, None),
    }.items():
        add(datasets.load, argument, values, f"{argument} must", **others)
    others = {"mean": (0.5,), "deviation": (0.5,)}
    add(
        datasets.Normalization,
        "scale",
        (0, -1, NAN, "255", None, True),
        "scale must",
        **others,
    )
    others = {"scale": 255.0, "deviation": (0.5,)}
    add(
        datasets.Normalization,
        "mean",
        ((0.5, 0.5), (NAN,), ("a",), 0.5, None),
        "mean",
        **others,
    )
    others = {"scale": 255.0, "mean": (0.5,)}
    add(
        datasets.Normalization,
        "deviation",
        ((0.5, 0.5), (NAN,), ("a",), (0,), 0.5),
        "deviation",
        **others,
    )

    # Callbacks.
    add(callbacks.Recovery, "folder", (None, 3, b"x", "", "gs://bucket"), "folder must")
    add(
        callbacks.Recovery,
        "every",
        (0, -1, 2.5, True, "2", NAN),
        "every must",
        folder="a",
    )
    add(callbacks.Recovery, "keep", COUNTS, "keep must", folder="a")
    add(callbacks.QuantizationMonitor, "log_dir", (None, 3, b"x", ""), "log_dir must")
    add(callbacks.QuantizationMonitor, "every", COUNTS, "every must", log_dir="a")
    add(callbacks.QuantizationMonitor, "batches", COUNTS, "batches must", log_dir="a")
    add(callbacks.BatchNormReestimation, "batches", COUNTS, "batches must", dataset=[])
    add(
        callbacks.BatchNormReestimation,
        "dataset",
        (None, 3, np.zeros((2, 2)), iter([])),
        "must be",
    )
    values = (None, 3, [], [3], "stages", tfl.Stage(1), {"a": tfl.Stage(1)})
    add(callbacks.StagedPrecision, "stages", values, "stages must")
    add(
        callbacks.StagedPrecision,
        "reset_optimizer",
        FLAGS,
        "reset_optimizer must",
        stages=[tfl.Stage(1)],
    )

    # What takes a model.
    takers = {
        "quantize": tfl.quantize,
        "calibrate": lambda m: tfl.calibrate(m, []),
        "recalibrate_batch_norm": lambda m: tfl.recalibrate_batch_norm(m, []),
        "lag": lambda m: tfl.batch_norm.lag(m, []),
        "cost": tfl.cost,
        "summary": tfl.summary,
        "statistics": tfl.statistics,
        "sensitivity": lambda m: tfl.sensitivity(m, [], progress=False),
        "requantize": tfl.requantize,
        "strip": tfl.strip,
        "split_separable": tfl.split_separable,
        "from_keras3": tfl.from_keras3,
        "report": lambda m: tfl.report(m, path="never.html"),
        "to_tflite": lambda m: export.to_tflite(m, "never.tflite", verbose=0),
        "snap": export.snap,
        "quantized_tensors": lambda m: list(tfl.inspection.quantized_tensors(m)),
        "residual_adds": lambda m: list(tfl.inspection.residual_adds(m)),
        "input_activations": tfl.inspection.input_activations,
    }
    for name, taker in takers.items():
        made.extend(
            table(name, lambda env, v, t=taker: t(v), "model", NO_MODELS, "must|needs")
        )
    for name in (
        "quantize", "cost", "summary", "statistics", "sensitivity", "requantize",
        "strip", "split_separable", "report", "to_tflite", "snap", "residual_adds",
        "input_activations",
    ):  # fmt: skip
        made.append(
            (
                f"{name}-of-a-trainer-of-two",
                lambda env, t=takers[name]: t(env.trainer),
                "must|One|one",
            )
        )
    for name in (
        "calibrate",
        "statistics",
        "requantize",
        "strip",
        "report",
        "to_tflite",
        "snap",
        "sensitivity",
    ):
        made.append(
            (
                f"{name}-of-a-float-network",
                lambda env, t=takers[name]: t(env.plain),
                "must be one that tf_lowbit.quantize",
            )
        )
    made += [
        (
            "verify-of-a-trainer-of-two",
            lambda env: export.verify(env.content, env.trainer, verbose=0),
            "must be one network",
        ),
        (
            "allocate-of-a-trainer-of-two",
            lambda env: tfl.allocate_bits(env.trainer, env.sensitivity, bops=1),
            "must",
        ),
    ]
    made.extend(
        table(
            "allocate",
            lambda env, v: tfl.allocate_bits(v, env.sensitivity, bops=1),
            "model",
            NO_MODELS,
            "must",
        )
    )
    made.extend(
        table(
            "allocate",
            lambda env, v: tfl.allocate_bits(env.network, v, bops=1),
            "found",
            (None, 3, {}),
            "found must",
        )
    )
    for name in ("bops", "weight_bytes"):
        made.extend(
            table(
                "allocate",
                lambda env, v, n=name: tfl.allocate_bits(
                    env.network, env.sensitivity, **{n: v}
                ),
                name,
                ("1", True, NAN, -1, [1]),
                f"{name} must",
            )
        )
    made.extend(
        table(
            "quantize",
            lambda env, v: tfl.quantize(env.plain, v),
            "rules",
            (3, "conv", [], {}, [3]),
            "rules must",
        )
    )
    made.extend(
        table(
            "quantize",
            lambda env, v: tfl.quantize(env.plain, strict=v),
            "strict",
            FLAGS,
            "strict must",
        )
    )
    made.extend(
        table(
            "quantize",
            lambda env, v: tfl.quantize(env.plain, residual_bits=v),
            "residual_bits",
            (4, "8", True, 8.0),
            "residual_bits must",
        )
    )
    made.extend(
        table(
            "requantize",
            lambda env, v: tfl.requantize(env.network, residual_bits=v),
            "residual_bits",
            (4, "8", True, 8.0),
            "residual_bits must",
        )
    )
    made.extend(
        table(
            "requantize",
            lambda env, v: tfl.requantize(env.network, strict=v),
            "strict",
            FLAGS,
            "strict must",
        )
    )
    made.extend(
        table(
            "strip",
            lambda env, v: tfl.strip(env.network, v),
            "weights",
            ("float", None, 3, ["latent"]),
            "weights must",
        )
    )
    made.append(
        (
            "quantize-with-nan",
            lambda env: tfl.quantize(spoiled(env.plain)),
            "eights must be finite",
        )
    )
    made.extend(
        table(
            "register_layer",
            lambda env, v: tfl.register_layer(v),
            "layer_class",
            (None, 3, keras.layers.Dense(2)),
            "layer_class must",
        )
    )
    made.extend(
        table(
            "register_layer",
            lambda env, v: tfl.register_layer(
                type("Own", (keras.layers.Layer,), {}), v
            ),
            "kernels",
            (
                {},
                3,
                ["kernel"],
                {"kernel": 3},
                {"kernel": "ab"},
                {3: (-1,)},
                {"kernel": (0.5,)},
                {"kernel": ()},
            ),
            "kernels must",
        )
    )

    # What takes data.
    readers = {
        "calibrate": lambda env, d, **k: tfl.calibrate(env.network, d, **k),
        "recalibrate": lambda env, d, **k: tfl.recalibrate_batch_norm(
            env.network, d, **k
        ),
        "lag": lambda env, d, **k: tfl.batch_norm.lag(env.network, d, **k),
        "statistics": lambda env, d, **k: tfl.statistics(env.network, d, **k),
        "sensitivity": lambda env, d, **k: tfl.sensitivity(
            env.network, d, progress=False, **k
        ),
        "report": lambda env, d, **k: tfl.report(
            env.network, d, env.folder / "never.html", **k
        ),
        "to_tflite": lambda env, d, **k: exports(env, d, **k),
        "verify": lambda env, d, **k: export.verify(
            env.content, env.network, d, verbose=0, **k
        ),
    }
    bad_data = {
        "an-array": lambda env: env.x,
        "a-pair": lambda env: (env.x, env.y),
        "a-list-of-two": lambda env: [env.x, env.y],
        "a-list-of-one-hot": lambda env: [env.x.reshape(16, 16), np.eye(3)[env.y]],
        "a-dict": lambda env: {"x": env.x},
        "a-number": lambda env: 3,
        "text": lambda env: "data",
        "nothing": lambda env: [],
        "unbatched": lambda env: tf.data.Dataset.from_tensor_slices((env.x, env.y)),
        "lists-as-batches": lambda env: [[env.x, env.y]],
        "two-inputs": lambda env: [((env.x, env.x), env.y)],
        "other-shape": lambda env: [(env.x[:, :3], env.y)],
        "text-batches": lambda env: [(np.full((8, 4, 4, 1), "a"), env.y[:8])],
        "text-within": lambda env: ["ab", "cd"],
        "NaN": lambda env: [(with_nan(env.x), env.y)],
        "batches-of-none": lambda env: [None],
        "no-examples": lambda env: [(env.x[:0], env.y[:0])],
    }
    for (name, reader), (kind, make) in itertools.product(
        readers.items(), bad_data.items()
    ):
        made.append(
            (
                f"{name}-data-{kind}",
                lambda env, r=reader, m=make: r(env, m(env)),
                "must|needs",
            )
        )
    for name, reader in readers.items():
        counts = COUNTS[:-2] if name == "verify" else COUNTS
        made.extend(
            table(
                name,
                lambda env, v, r=reader: r(env, env.data, batches=v),
                "batches",
                counts,
                "batches must",
            )
        )
    made += [
        (
            f"{name}-labels-{kind}",
            lambda env, r=reader, y=labels, k=arguments: r(env, [(env.x, y)], **k),
            "abels? .*must|must be .*label",
        )
        for name, reader, arguments in (
            ("sensitivity", readers["sensitivity"], {"metric": "accuracy"}),
            ("report", readers["report"], {}),
            ("verify", readers["verify"], {}),
        )
        for kind, labels in {
            "out-of-range": np.full(16, 3),
            "negative": np.full(16, -1),
            "too-few": np.zeros(15, int),
        }.items()
    ]
    made += [
        (
            "two-inputs-without-labels",
            lambda env: tfl.calibrate(env.two, [(env.x, env.x)]),
            "batch must",
        ),
        (
            "sensitivity-without-labels",
            lambda env: tfl.sensitivity(
                env.network, [env.x], metric="accuracy", progress=False
            ),
            "must have labels",
        ),
    ]
    made.extend(
        table(
            "sensitivity",
            lambda env, v: tfl.sensitivity(env.network, env.data, v, progress=False),
            "bits",
            (3, None, "24", (), (0,), (16,), ("2",), (True,)),
            "bits must",
        )
    )
    made.extend(
        table(
            "sensitivity",
            lambda env, v: tfl.sensitivity(
                env.network, env.data, metric=v, progress=False
            ),
            "metric",
            ("snr", None, 3, ["sqnr"]),
            "metric must",
        )
    )
    made.extend(
        table(
            "calibrate",
            lambda env, v: tfl.calibrate(env.network, env.data, fit_batch_norm=v),
            "fit_batch_norm",
            FLAGS,
            "fit_batch_norm must",
        )
    )

    # Endless data, where all of them are read.
    made += [
        (
            "verify-endless",
            lambda env: export.verify(env.content, env.network, env.endless, verbose=0),
            "must be finite .*take.*batches=",
        ),
        (
            "report-endless",
            lambda env: tfl.report(env.network, env.endless, env.folder / "never.html"),
            "must be finite .*take",
        ),
    ]

    # Files.
    paths = (None, 3, b"x", "", ["a"])
    made.extend(
        table(
            "to_tflite",
            lambda env, v: exports(env, path=v),
            "path",
            (*paths, "/no/folder/a.tflite"),
            "must",
        )
    )
    made.append(
        ("to_tflite-path-folder", lambda env: exports(env, path=env.folder), "must")
    )
    made.extend(
        table(
            "report",
            lambda env, v: tfl.report(env.network, path=v),
            "path",
            (*paths, "/no/folder/a.html"),
            "must",
        )
    )
    made.append(
        (
            "report-path-folder",
            lambda env: tfl.report(env.network, path=env.folder),
            "must",
        )
    )
    made.extend(
        table(
            "save_archive",
            lambda env, v: export.save_archive(env.made.snapped, v),
            "path",
            (*paths, "/no/folder/a.npz"),
            "must",
        )
    )
    made.extend(
        table(
            "save_archive",
            lambda env, v: export.save_archive(v, env.folder / "a.npz"),
            "snapped",
            (None, 3, "x", keras.Model),
            "snapped must",
        )
    )
    made.append(
        (
            "save_archive-of-an-export",
            lambda env: export.save_archive(env.made, env.folder / "a.npz"),
            "snapped must",
        )
    )
    made.extend(
        table(
            "load_model",
            lambda env, v: tfl.load_model(v),
            "path",
            (*paths, "/no/file.keras", "/no/file.h5", "/no/folder"),
            "must",
        )
    )
    made.extend(
        table(
            "load_archive",
            lambda env, v: export.load_archive(v),
            "path",
            (*paths, "/no/file.npz"),
            "must",
        )
    )
    made.extend(
        table(
            "read_info",
            lambda env, v: export.read_info(v),
            "file",
            (None, 3, "", ["a"], b"junk", "/no/file.tflite"),
            "must",
        )
    )
    made.extend(
        table(
            "verify",
            lambda env, v: export.verify(v, env.network, verbose=0),
            "file",
            (None, 3, "", b"junk", "/no/file.tflite"),
            "must",
        )
    )
    made.extend(
        table(
            "verify",
            lambda env, v: export.verify(env.content, v, verbose=0),
            "model",
            NO_MODELS,
            "must",
        )
    )
    made.extend(
        table(
            "verify",
            lambda env, v: export.verify(env.content, env.made, trained=v, verbose=0),
            "trained",
            NO_MODELS[1:],
            "trained must",
        )
    )
    made.extend(
        table(
            "verify",
            lambda env, v: export.verify(
                env.content, env.network, env.data, tensor_batches=v, verbose=0
            ),
            "tensor_batches",
            (0, -1, 2.5, True, "2"),
            "tensor_batches must",
        )
    )
    optional = ("storage", "first_layer", "head", "input_type", "output_type")
    for name in ("target", *optional):
        made.extend(
            table(
                "to_tflite",
                lambda env, v, n=name: exports(env, **{n: v}),
                name,
                # None is the target's own.
                ("x", 3, ["int8"], *(() if name in optional else (None,))),
                f"{name} must",
            )
        )
    made.extend(
        table(
            "to_tflite",
            lambda env, v: exports(env, info=v),
            "info",
            (3, "text", [1], {"a": object()}, {"a": NAN}),
            "info must",
        )
    )
    made.extend(
        table(
            "snap",
            lambda env, v: export.snap(env.network, env.data, options=v),
            "options",
            (3, "xnnpack", {"target": "xnnpack"}),
            "options must",
        )
    )
    made.extend(
        table(
            "gzip_bytes",
            lambda env, v: export.gzip_bytes(v),
            "data",
            (None, 3, "text", []),
            "data must",
        )
    )

    # Running a file.
    for runner in RUNNERS:
        made.extend(
            table(
                runner.__name__,
                lambda env, v, r=runner: r(v),
                "data",
                (None, 3, "a.tflite", b"", b"junk"),
                "must",
            )
        )
    made.extend(
        table(
            "Runner",
            lambda env, v: export.Runner(env.content, v),
            "kernel",
            ("gpu", None, 3, ["xnnpack"]),
            "kernel must",
        )
    )
    made.extend(
        table(
            "Runner",
            lambda env, v: export.Runner(env.content, threads=v),
            "threads",
            COUNTS,
            "threads must",
        )
    )
    made.extend(
        table(
            "Runner",
            lambda env, v: export.Runner(env.content, intermediates=v),
            "intermediates",
            FLAGS,
            "intermediates must",
        )
    )
    runs = {
        "no-input": lambda env: (),
        "two-inputs": lambda env: (env.x, env.x),
        "float64": lambda env: (env.x.astype(np.float64),),
        "integers": lambda env: (env.x.astype(np.int8),),
        "a-list": lambda env: (env.x.tolist(),),
        "text": lambda env: ("image",),
        "none": lambda env: (None,),
        "rank": lambda env: (env.x[0],),
        "height": lambda env: (env.x[:, :3],),
        "channels": lambda env: (np.repeat(env.x, 3, axis=-1),),
        "no-examples": lambda env: (env.x[:0],),
        "NaN": lambda env: (with_nan(env.x),),
        "infinite": lambda env: (np.full_like(env.x, np.inf),),
    }
    for kind, make in runs.items():
        made += [
            (
                f"{runner.__name__}-{kind}",
                lambda env, r=runner, m=make: r(env.content)(*m(env)),
                "nputs? .*must",
            )
            for runner in RUNNERS
        ]
    made.extend(
        table(
            "latencies",
            lambda env, v: export.latencies(v),
            "files",
            (None, 3, {}, b"x", {"a": 3}, {"a": b"junk"}),
            "must",
        )
    )
    for name in ("batch", "rounds"):
        made.extend(
            table(
                "latencies",
                lambda env, v, n=name: export.latencies({"a": env.content}, **{n: v}),
                name,
                COUNTS,
                f"{name} must",
            )
        )
    made.extend(
        table(
            "latencies",
            lambda env, v: export.latencies({"a": env.content}, seconds=v),
            "seconds",
            (*NUMBERS, 0, None),
            "seconds must",
        )
    )
    made.extend(
        table(
            "latencies",
            lambda env, v: export.latencies({"a": env.content}, kernel=v),
            "kernel",
            ("gpu", None, 3),
            "kernel must",
        )
    )
    made += more_rows(readers)
    return made


def more_rows(readers):
    """Calls that were found after the others."""
    made = []
    made.extend(
        table(
            "MicroRunner",
            lambda env, v: export.MicroRunner(env.content, v),
            "intermediates",
            FLAGS,
            "intermediates must",
        )
    )
    made += [
        (
            "Runner-torn",
            lambda env: export.Runner(env.content[:500]),
            "data must be the content of a whole",
        ),
        (
            "Runner-zeros",
            lambda env: export.Runner(env.content[:8] + bytes(1000)),
            "data must be the content of a whole",
        ),
    ]
    # An executor of its own.
    examples = {
        "text": lambda env: "x",
        "none": lambda env: None,
        "height": lambda env: env.x[:, :3],
        "no-examples": lambda env: env.x[:0],
        "NaN": lambda env: with_nan(env.x),
        "two-inputs": lambda env: (env.x, env.x),
    }
    for kind, make in examples.items():
        made.append(
            (
                f"compare_qonnx-x-{kind}",
                lambda env, m=make: export.compare_qonnx(env.onnx, env.network, m(env)),
                "must",
            )
        )
    made.extend(
        table(
            "compare_qonnx",
            lambda env, v: export.compare_qonnx(v, env.network, env.x),
            "file",
            (None, 3, b"junk", "/no/file.onnx"),
            "must",
        )
    )
    # Arguments of functions that have rows above.
    made.extend(
        table(
            "snap",
            lambda env, v: export.snap(env.network, env.data, ranges=v),
            "ranges",
            (3, [], {"a": "b"}, {"a": (0,)}, {"a": (0, NAN)}, {3: (0, 1)}),
            "ranges must",
        )
    )
    made.extend(
        table(
            "snap",
            lambda env, v: export.snap(env.network, env.data, progress=v),
            "progress",
            (3, True),
            "progress must",
        )
    )
    for name, call in {
        "quantize": lambda env, v: tfl.quantize(env.plain, verbose=v),
        "calibrate": lambda env, v: tfl.calibrate(env.network, env.data, verbose=v),
        "to_tflite": lambda env, v: exports(env, verbose=v),
        "verify": lambda env, v: export.verify(env.content, env.network, verbose=v),
    }.items():
        made.extend(table(name, call, "verbose", ("no", None, 3), "verbose must"))
    made.append(
        (
            "verify-trained-of-another-file",
            lambda env: export.verify(env.content, env.made, trained=env.two),
            "trained must be the network that the file was made of",
        )
    )
    made += [
        (
            f"{name}-labels-text",
            lambda env, r=reader, k=arguments: r(env, [(env.x, ["a"] * 16)], **k),
            "abels must be numbers",
        )
        for name, reader, arguments in (
            ("sensitivity", readers["sensitivity"], {"metric": "accuracy"}),
            ("report", readers["report"], {}),
            ("verify", readers["verify"], {}),
        )
    ]
    for name, reader in readers.items():
        made.append(
            (
                f"{name}-data-dict-of-another-name",
                lambda env, r=reader: r(env, [({"picture": env.x}, env.y)]),
                "entry for each input.*image0",
            )
        )
        ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
        made.append(
            (
                f"{name}-data-ragged",
                lambda env, r=reader, x=ragged: r(env, [(x, env.y[:2])]),
                "batch must",
            )
        )
    for name, values in {
        "history": (3, "loss", [1]),
        "stages": (3, tfl.Stage(1), [3], "ab"),
        "exported": ("network.tflite", True),
        "verified": ("ok", True),
        "float_model": ("net", 3),
        "figures": (3, b"x", ""),
    }.items():
        made.extend(
            table(
                "report",
                lambda env, v, n=name: tfl.report(
                    env.network, path=env.folder / "never.html", **{n: v}
                ),
                name,
                values,
                f"{name} must",
            )
        )
    made += [
        (
            f"Sensitivity.loss-{name}-{bits}",
            lambda env, n=name, b=bits: env.sensitivity.loss(n, b),
            "must be one of",
        )
        for name, bits in (("absent", 2), ("conv/kernel", 7), (3, 2))
    ]
    made.append(
        ("Normalization-empty", lambda env: datasets.Normalization(1.0, (), ()), "mean")
    )
    for name, message in {
        "text.keras": "path must",
        "torn.h5": "path must be a whole",
        "net.tflite": "path must",
        "": "path must",
    }.items():
        made.append(
            (
                f"load_model-{name or 'empty-folder'}",
                lambda env, n=name: tfl.load_model(env.other / n if n else env.folder),
                message,
            )
        )
    for name, values in {
        "compile": ("no", 1),
        "safe_mode": (0, None),
        "custom_objects": (3, [object]),
        "weights": (None,),
    }.items():
        made.extend(
            table(
                "load_model",
                lambda env, v, n=name: tfl.load_model(
                    env.other / "text.keras", **{n: v}
                ),
                name,
                values,
                f"{name} must|argument must",
            )
        )
    for name, values in {
        "optimizer": (3, "sgdd", b"sgd"),
        "loss": (3, "crossentropi", "accuracy"),
        "metrics": (3, ["accuracyy"], {"head": 3}),
        "weighted_metrics": (3, ["accuracyy"]),
    }.items():
        for model in ("network", "trainer"):
            made.extend(
                table(
                    f"{model}.compile",
                    lambda env, v, n=name, m=model: getattr(env, m).compile(
                        **{"optimizer": "sgd", n: v}
                    ),
                    name,
                    values,
                    f"{name} must be of Keras",
                )
            )
    made.append(
        (
            "channel_axes-of-another-rank",
            lambda env: tfl.quantizers.UniformWeightQuantizer(channel_axes=(7,))(
                tf.ones([3, 4]),
                training=False,
                weights={"bits": tf.constant(2)},
            ),
            "channel_axes must be axes of a tensor of rank 2",
        )
    )
    for name, values in {
        "loss": (3, "crossentropi", [], "", {}),
        "metrics": (3, "accuracy", None),
        "model": (None, 3, "net"),
    }.items():
        made.extend(
            table(
                "low_bit",
                lambda env, v, n=name: tfl.recipes.low_bit(
                    **{"model": env.plain, "data": env.data, n: v}
                ),
                name,
                values,
                f"{name} must",
            )
        )
    return made


ROWS = rows()


@pytest.mark.quick(50)
@pytest.mark.parametrize(
    ("call", "message"),
    [pytest.param(call, message, id=name) for name, call, message in ROWS],
)
def test_bad_input_is_refused_with_what_is_wanted(env, call, message):
    before = [v.numpy() for v in env.network.variables]
    with pytest.raises((ValueError, OSError)) as error:
        call(env)
    text = " ".join(str(error.value).split())
    assert re.search(rf"({message}).*Received: ", text), text
    after = [v.numpy() for v in env.network.variables]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    names = {path.name for path in env.folder.iterdir()}
    assert names == {"network.tflite"}


def test_the_rows_have_names_of_their_own():
    assert len({name for name, *_ in ROWS}) == len(ROWS)
