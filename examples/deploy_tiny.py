r"""Makes TFLite Micro files from a trained float network, at several bits.

  python examples/deploy_tiny.py --model=model.h5 --data=images.npz \
      --bits=8/8,4/4,2/2 --output_dir=runs/tiny

The network is an .h5 or .keras file of Keras 2 or 3, or the folder of a SavedModel. For
each pair of bits (weights/activations) it is quantized, calibrated on the data, trained
for --epochs if there are labels, and exported with packed and with plain weights. Both
files run in TFLite Micro's interpreter (pip install '.[micro]'). The packed one is
proved equal to its integer model. One table shows the results.

The output folder gets deployment.json with the results, and a folder for each pair,
such as w2a2. The folder has packed.tflite, int8.tflite, model_data.cc and model_data.h
(the packed file as a C array) and model_setup.h (the operators' resolver and the
arena's size).
"""

import json
from pathlib import Path

import quiet_start  # noqa: F401 (before TensorFlow)

# isort: split
import command_line
import experiment
import micro_deployment
import rich.console
import rich.table
from absl import app, flags

import tf_lowbit as tfl
from tf_lowbit.analysis import environment
from tf_lowbit.core.files import replace_file

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "model", None, "The float network: .h5, .keras or a SavedModel's folder."
)
flags.DEFINE_list(
    "bits",
    ["8/8", "4/4", "2/2"],
    "Pairs of weight/activation bits, except for the first and the last layer.",
)
flags.DEFINE_string(
    "data", None, "NPZ file with x and optionally y; without it, random images."
)
flags.DEFINE_integer("epochs", 0, "Training epochs at each pair of bits; needs y.")
flags.DEFINE_float("learning_rate", 0.001, "Adam's learning rate in the training.")
flags.DEFINE_integer("batch_size", 32, "Batch size of training and calibration.")
flags.DEFINE_integer("examples", 100, "Most test examples to run in the interpreter.")
flags.DEFINE_string("output_dir", None, "Folder for the files; without it, no files.")
flags.mark_flag_as_required("model")

NOTHING = "-"


def bits_of(text: str) -> tuple[int, int]:
    """Parses weight and activation bits, such as 4/8."""
    weights, _, activations = text.partition("/")
    if not (weights.isdigit() and activations.isdigit()):
        raise ValueError(
            "--bits must be pairs of weight and activation bits such as 8/8,4/4. "
            f"Received: --bits={text!r}"
        )
    return int(weights), int(activations)


def table(found, float_bytes: int, accuracy: float | None) -> rich.table.Table:
    """Makes the table of results, with a column for each pair of bits.

    Args:
        found: The deployments.
        float_bytes: Bytes of the float network's file.
        accuracy: Accuracy of the float network; None without labels.
    """

    def percent(share):
        return NOTHING if share is None else f"{100 * share:.2f}"

    def number(value):
        return NOTHING if value is None else f"{value:,}"

    rows = {
        "accuracy, quantized network, %": (
            percent(accuracy),
            [percent(d.accuracy("trained")) for d in found],
        ),
        "accuracy, file in TFLite Micro, %": (
            NOTHING,
            [percent(d.accuracy("file")) for d in found],
        ),
        "file = quantized network, %": (NOTHING, [percent(d.agreement) for d in found]),
        "flash, int8, bytes": (
            number(float_bytes),
            [number(len(d.files["int8"])) for d in found],
        ),
        "flash, packed, bytes": (
            NOTHING,
            [number(len(d.files["packed"])) for d in found],
        ),
        "arena, int8, bytes": (NOTHING, [number(d.arena["int8"]) for d in found]),
        "arena, packed, bytes": (NOTHING, [number(d.arena["packed"]) for d in found]),
        "bit operations": (NOTHING, [number(d.bops) for d in found]),
        "packed = int8, every code": (
            NOTHING,
            ["yes" if d.equal else "NO" for d in found],
        ),
        "packed = integer model, every code": (
            NOTHING,
            ["NO" if d.report.mismatches else "yes" for d in found],
        ),
        "passes verify": (NOTHING, ["yes" if d.report.ok else "NO" for d in found]),
        "operators": (NOTHING, ["\n".join(d.operators["packed"]) for d in found]),
    }
    result = rich.table.Table("", "float")
    for deployment in found:
        result.add_column(deployment.name, justify="right")
    for name, (first, others) in rows.items():
        result.add_row(name, first, *others)
    return result


def write(deployment, folder: Path) -> None:
    """Writes the files of one pair of bits."""
    folder.mkdir(parents=True, exist_ok=True)
    for storage, content in deployment.files.items():
        replace_file(folder / f"{storage}.tflite", content)
    for name, text in micro_deployment.source_files(deployment).items():
        replace_file(folder / name, text)
    print(f"Written: {folder}")


def main(argv):
    """Deploys at each pair of bits, prints the results and writes the files."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    experiment.quiet()
    pairs = [bits_of(text) for text in FLAGS.bits]
    folder = FLAGS.output_dir and experiment.require_writable(Path(FLAGS.output_dir))
    model = tfl.load_model(FLAGS.model, compile=False)
    shape = model.input_shape[1:]
    for problem in tfl.export.check(model, target="tflm").problems:
        raise tfl.export.ExportError(problem)
    if FLAGS.data is None:
        data = micro_deployment.random_data(shape)
        print(
            "Without --data the calibration uses random images: bytes and operators "
            "are right, accuracies and outputs are not."
        )
    else:
        data = micro_deployment.load_data(FLAGS.data, shape)
        print(
            f"Calibration and training: {len(data.train)} examples; test: the last "
            f"{len(data.test)}."
        )
    if FLAGS.epochs and data.train_labels is None:
        raise ValueError(
            "--epochs needs labels: y in the file of --data. "
            f"Received: --epochs={FLAGS.epochs}, --data={FLAGS.data}"
        )
    if FLAGS.epochs and not model.outputs[0].dtype.is_floating:
        raise ValueError(
            "--epochs needs a network that ends in logits or probabilities, because an "
            f"argmax has no gradient. Received: --epochs={FLAGS.epochs}"
        )
    found = []
    for bits in pairs:
        deployment = micro_deployment.deploy(
            model,
            bits,
            data,
            epochs=FLAGS.epochs,
            learning_rate=FLAGS.learning_rate,
            batch_size=FLAGS.batch_size,
            examples=FLAGS.examples,
        )
        found.append(deployment)
        for failure in deployment.report.failures:
            print(f"{deployment.name}: {failure}")
        if folder:
            write(deployment, folder / deployment.name.lower())
    float_bytes = len(experiment.float_tflite(model))
    accuracy = micro_deployment.float_accuracy(model, data, FLAGS.examples)
    rich.console.Console().print(table(found, float_bytes, accuracy))
    if folder:
        figures = {
            "float": {"bytes": float_bytes, "accuracy": accuracy},
            "deployments": {d.name: d.as_dict() for d in found},
            "settings": experiment.flag_settings(__name__),
            **environment(),
        }
        path = folder / "deployment.json"
        replace_file(path, json.dumps(figures, indent=2, sort_keys=True) + "\n")
        print(f"Written: {path}")


if __name__ == "__main__":
    command_line.run(main)
