"""TFLite files: size, gzip, latency and agreement, beside float32 and 8-bit ones.

  python -m benchmarks.deployment --output=benchmarks/results/deployment.json

Networks are trained on Fashion-MNIST (shortly: this compares files, not methods),
exported, and every file is verified on the whole test set. Latencies are ratios to the
float32 file, one thread, the files taking turns in one run. The networks are kept in
--folder: a second call goes on where one was stopped.
"""

import json
import os
import statistics
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import rich.console
import rich.table
from absl import app, flags

import tf_lowbit as tfl
from tf_lowbit import datasets, models
from tf_lowbit.analysis import environment
from tf_lowbit.compat import keras, tf, tfmot
from tf_lowbit.core.files import replace_file, replaced

FLAGS = flags.FLAGS

NETWORKS = {
    "plain_cnn": lambda data: models.plain_cnn(input_shape=data.input_shape),
    "preact_resnet8": lambda data: models.preact_resnet(
        8, input_shape=data.input_shape
    ),
    "preact_resnet20": lambda data: models.preact_resnet(
        20, input_shape=data.input_shape
    ),
    "mobilenet_v2": lambda data: models.mobilenet_v2(
        width=8, input_shape=data.input_shape
    ),
}
BITS = ("W1A1", "W2A2", "W3A3", "W4A4", "W2A4", "W8A8")
# The deep one has the leading rows only, and so has INT4.
LEADING = ("W2A2", "W4A4")
# Flags that no figure depends on.
_PLACES = ("data_dir", "folder", "output")

flags.DEFINE_enum("dataset", "fashion_mnist", datasets.names(), "What to train on.")
flags.DEFINE_string("data_dir", None, "Folder of the data.")
flags.DEFINE_integer("limit", 10_000, "Use only so many examples of each part.")
flags.DEFINE_multi_enum("network", list(NETWORKS), list(NETWORKS), "Which networks.")
flags.DEFINE_multi_enum("bits", list(BITS), BITS, "Which bits.")
flags.DEFINE_integer("float_epochs", 2, "Of each float network.")
flags.DEFINE_integer("epochs", 1, "Of each low-bit network.")
flags.DEFINE_integer("tensor_batches", 5, "Batches on which every tensor is compared.")
flags.DEFINE_integer("rounds", 15, "Turns of each file in the latency run.")
flags.DEFINE_integer("seed", 0, "Of weights and data.")
flags.DEFINE_string("folder", "runs/deployment", "Where trained networks are kept.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")


def load_data() -> datasets.Dataset:
    """The flags' data set."""
    return datasets.load(
        FLAGS.dataset,
        batch_size=100,
        seed=FLAGS.seed,
        data_dir=FLAGS.data_dir,
        limit=FLAGS.limit,
    )


def fit(model, data, epochs, learning_rate) -> None:
    """Trains a network, its learning rate falling along a cosine."""
    steps = epochs * data.steps_per_epoch
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(
        keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ["accuracy"],
    )
    model.fit(
        data.train, steps_per_epoch=data.steps_per_epoch, epochs=epochs, verbose=2
    )


def float_network(name, data) -> keras.Model:
    """The float network, trained once."""
    keras.utils.set_random_seed(FLAGS.seed)
    model = NETWORKS[name](data)
    path = Path(FLAGS.folder) / f"{name}.weights.h5"
    if path.exists():
        model.load_weights(path)
    else:
        fit(model, data, FLAGS.float_epochs, 0.1)
        with replaced(path) as whole:
            model.save_weights(whole)
    return model


def rules(name: str, bits: str) -> list[tfl.PrecisionRule]:
    """What is trained for deployment: first and last layer at 8 bits, signed codes.

    DoReFa's grid has no 8-bit integers, and at one bit a linear bottleneck has no
    signed grid with a zero: 8 bits are uniform, bottlenecks have 2 bits at least.
    """
    weight_bits, activation_bits = int(bits[1]), int(bits[3])
    kinds = ("uniform", "uniform") if weight_bits == 8 else ("lsq", "lsq")
    if name != "mobilenet_v2" and weight_bits < 8:
        kinds = ("dorefa", "dorefa")
    found = [tfl.PrecisionRule("stem|head", 8, 8, "uniform", "uniform")]
    if activation_bits == 1:
        found.append(tfl.PrecisionRule(".*_expand|final_conv", weight_bits, 2, *kinds))
    found.append(tfl.PrecisionRule(".*", weight_bits, activation_bits, *kinds))
    return found


def low_bit_network(name, bits, model, data) -> keras.Model:
    """The low-bit network, trained once."""
    path = Path(FLAGS.folder) / f"{name}-{bits}.h5"
    if path.exists():
        return tfl.load_model(path, compile=False)
    keras.utils.set_random_seed(FLAGS.seed)
    wanted = rules(name, bits)
    if name != "mobilenet_v2":
        wanted = [r for r in wanted if "expand" not in r.pattern]
    quantized = tfl.quantize(model, wanted, residual_bits=8)
    tfl.calibrate(quantized, data.train)
    fit(quantized, data, FLAGS.epochs, 0.02)
    with replaced(path) as whole:
        quantized.save(whole, include_optimizer=False)
    return quantized


def representative(data):
    """Images one by one, as TensorFlow's converter wants them."""
    for images, _ in data.test.take(2):
        for image in images:
            yield [image[tf.newaxis]]


def peer_files(model, data) -> dict[str, bytes | str]:
    """The float32 file and both kinds of 8-bit ones; why, where there is none."""
    converter = tf.lite.TFLiteConverter.from_keras_model
    files = {"float32": converter(model).convert()}
    post = converter(model)
    post.optimizations = [tf.lite.Optimize.DEFAULT]
    post.representative_dataset = lambda: representative(data)
    post.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    files["post-training int8"] = post.convert()
    try:
        trained = tfmot.quantization.keras.quantize_model(model)
        fit(trained, data, FLAGS.epochs, 0.02)
        aware = converter(trained)
        aware.optimizations = [tf.lite.Optimize.DEFAULT]
        files["TF-MOT 8-bit"] = aware.convert()
    except Exception as error:  # Whatever its own limits raise: the table says it.
        files["TF-MOT 8-bit"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return files


def accuracy(content: bytes, data) -> float:
    """A file's accuracy on the test set."""
    run = tfl.export.Runner(content, threads=2)
    right = 0
    for images, labels in data.test.as_numpy_iterator():
        (logits,) = run(images).values()
        right += int((logits.argmax(axis=-1) == labels).sum())
    return right / data.test_size


def exported(model, name, data, storage="int8"):
    """One of our files, its sizes and what `verify` finds."""
    path = Path(FLAGS.folder) / f"{name}-{storage}.tflite"
    result = tfl.export.to_tflite(model, path, data.test, storage=storage, verbose=0)
    report = tfl.export.verify(
        path,
        result,
        data.test,
        trained=model,
        tensor_batches=FLAGS.tensor_batches,
        verbose=0,
    )
    found = report.predictions
    wrong = sum(sum(entry.wrong) for entry in report.decisions)
    row = {
        "verified": report.ok,
        "failures": report.failures,
        "codes": report.codes,
        "mismatches": report.mismatches,
        "end_to_end_mismatches": report.end_to_end,
        "wrong_decisions": wrong,
        "decision_points": sum(entry.points for entry in report.decisions),
        "wrong_sums": sum(report.additions.values()),
        "test_images": found.examples,
        "twin_agrees": found.twin_agrees,
        "trained_agrees": found.trained_agrees,
        "accuracy": found.right["file"] / found.labels,
        "trained_accuracy": found.right["trained"] / found.labels,
        "notes": report.notes,
    }
    return path.read_bytes(), row


def measured(files: dict[str, bytes]) -> dict[str, dict]:
    """Sizes, and latencies as ratios to the float32 file and to the peers."""
    seconds = tfl.export.latencies(files, rounds=FLAGS.rounds)

    def ratio(name, other):
        pairs = zip(seconds[name], seconds[other], strict=True)
        return statistics.median(own / base for own, base in pairs)

    base = len(files["float32"])
    return {
        name: {
            "bytes": len(content),
            "gzip_bytes": tfl.export.gzip_bytes(content),
            "size": len(content) / base,
            "gzip": tfl.export.gzip_bytes(content) / base,
            **{f"latency to {other}": ratio(name, other)
               for other in ("float32", "post-training int8", "TF-MOT 8-bit")
               if other in files},
        }
        for name, content in files.items()
    }  # fmt: skip


def network_rows(name, data) -> dict:
    """All that is measured of one network."""
    model = float_network(name, data)
    peers = peer_files(model, data)
    files = {key: value for key, value in peers.items() if isinstance(value, bytes)}
    rows = {key: {"accuracy": accuracy(value, data)} for key, value in files.items()}
    refused = {key: value for key, value in peers.items() if isinstance(value, str)}
    for bits in FLAGS.bits:
        if name == "preact_resnet20" and bits not in LEADING:
            continue
        quantized = low_bit_network(name, bits, model, data)
        for storage in ("int8", "int4") if bits in LEADING else ("int8",):
            label = f"{bits} {storage}"
            try:
                files[label], rows[label] = exported(
                    quantized, f"{name}-{bits}", data, storage
                )
            except tfl.export.ExportError as error:
                refused[label] = str(error)
            print(f"{name} {label}: {rows.get(label) or refused[label]}", flush=True)
    for label, sizes in measured(files).items():
        rows[label].update(sizes)
    return {"files": rows, "refused": refused}


def table(results) -> rich.table.Table:
    """The figures, a row each file."""
    made = rich.table.Table(title="TFLite files, relative to float32; one thread")
    made.add_column("network")
    made.add_column("file", no_wrap=True)
    for column in (
        "size", "gzip", "latency", "codes", "differ", "= twin", "= trained", "accuracy",
    ):  # fmt: skip
        made.add_column(column, justify="right")
    for network, result in results.items():
        for label, row in result["files"].items():
            proof = ["", "", "", ""]
            if "codes" in row:
                images = row["test_images"]
                proof = [
                    f"{row['codes'] / 1e6:.1f} M",
                    f"{row['mismatches']}",
                    f"{100 * row['twin_agrees'] / images:.2f} %",
                    f"{100 * row['trained_agrees'] / images:.2f} %",
                ]
            made.add_row(
                network,
                label,
                f"{row['size']:.3f}",
                f"{row['gzip']:.3f}",
                f"{row['latency to float32']:.2f}",
                *proof,
                f"{100 * row['accuracy']:.2f} %",
            )
    return made


def main(argv):
    """Trains, exports, verifies and measures."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    Path(FLAGS.folder).mkdir(parents=True, exist_ok=True)
    data = load_data()
    results = {name: network_rows(name, data) for name in FLAGS.network}
    rich.console.Console(width=110).print(table(results))
    if FLAGS.output:
        own = FLAGS.get_key_flags_for_module(__name__)
        result = {
            "results": results,
            "settings": {f.name: f.value for f in own if f.name not in _PLACES},
            **environment(),
        }
        text = json.dumps(result, indent=2, sort_keys=True)
        replace_file(FLAGS.output, f"{text}\n")


if __name__ == "__main__":
    app.run(main)
