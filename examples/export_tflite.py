r"""Exports a trained low-bitwidth network to an integer TFLite file and verifies it.

  python examples/train.py --first_last_bits=8 --residual_bits=8 \
      --weight_quantizer=lsq --activation_quantizer=lsq --output_dir=runs/w2a2
  python examples/export_tflite.py --model=runs/w2a2/quantized/model.keras \
      --dataset=digits --output_dir=runs/w2a2/tflite

The output folder gets network.tflite, report.txt and report.json (the results of
`verify`) and archive.npz (the weights' true k-bit codes, for other hardware). With
--strict the program ends with code 1 if the verification fails.
"""

import dataclasses
import json
import sys
from pathlib import Path

import quiet_start  # noqa: F401 (before TensorFlow)

# isort: split
import command_line
import experiment
from absl import app, flags

import tf_lowbit as tfl
from tf_lowbit import datasets
from tf_lowbit.analysis import environment
from tf_lowbit.core.files import replace_file
from tf_lowbit.export.options import Options
from tf_lowbit.export.targets import END_TYPES, PRECISIONS, QONNX, STORAGES, TARGETS

FLAGS = flags.FLAGS

REPORTS = ("report.txt", "report.json")

flags.DEFINE_string(
    "model", None, "The trained network: a .keras or .h5 file or a SavedModel."
)
flags.DEFINE_enum("dataset", "digits", datasets.names(), "Data set of the training.")
flags.DEFINE_string("data_dir", None, "Folder of the data, as in train.py.")
flags.DEFINE_integer("limit", None, "Largest number of examples, for a quick try.")
flags.DEFINE_integer("batch_size", 100, "Images in a batch.")
flags.DEFINE_enum(
    "target",
    "xnnpack",
    tuple(name for name, target in TARGETS.items() if target.interpreter != QONNX),
    "Target of the file; docs/how_to/deployment.md has a table.",
)
flags.DEFINE_enum("storage", "int8", STORAGES, "Storage of low-bit weights.")
flags.DEFINE_enum(
    "first_layer", "int8", PRECISIONS, "Type of a first layer that was trained float."
)
flags.DEFINE_enum(
    "head", None, PRECISIONS, "Type of the last layer; by default the target's."
)
flags.DEFINE_enum(
    "input_type", None, END_TYPES, "Type of the input; by default the target's."
)
flags.DEFINE_enum(
    "output_type", None, END_TYPES, "Type of the output; by default the target's."
)
flags.DEFINE_integer(
    "finetune_epochs", 0, "Epochs of fine-tuning the twin with fixed scales and biases."
)
flags.DEFINE_float("learning_rate", 0.001, "Learning rate of the fine-tuning.")
flags.DEFINE_bool("strict", False, "End with code 1 if the verification fails.")
flags.DEFINE_string("output_dir", "runs/tflite", "Folder for the files.")
flags.mark_flag_as_required("model")


def load_data() -> datasets.Dataset:
    """Loads the data set of the flags, without augmentation."""
    return datasets.load(
        FLAGS.dataset,
        batch_size=FLAGS.batch_size,
        augment=False,
        data_dir=FLAGS.data_dir or None,
        limit=FLAGS.limit,
    )


def finetune(twin, data: datasets.Dataset) -> None:
    """Trains the twin's latent weights."""
    experiment.compile_model(twin, FLAGS.learning_rate)
    twin.fit(
        data.train,
        steps_per_epoch=data.steps_per_epoch,
        epochs=FLAGS.finetune_epochs,
        validation_data=data.test,
        callbacks=[experiment.StayFinite()],
    )


def export(model, data: datasets.Dataset, folder: Path) -> tfl.export.Report:
    """Writes the file and the archive, and checks the file."""
    options = {
        name: FLAGS[name].value
        for name in (field.name for field in dataclasses.fields(Options))
    }
    options["info"] = experiment.deployment_info(data)
    path = folder / "network.tflite"
    for name in REPORTS:  # Reports of an earlier file.
        (folder / name).unlink(missing_ok=True)
    # The data are not augmented: ranges must be those of the file's inputs.
    result = tfl.export.to_tflite(model, path, data.train, **options)
    source, trained = model, None
    if FLAGS.finetune_epochs:
        finetune(result.twin, data)
        result = tfl.export.to_tflite(result.snapped, path, **options)
        source, trained = result, model
    tfl.export.save_archive(result.snapped, folder / "archive.npz")
    return tfl.export.verify(path, source, data.test, trained=trained)


def main(argv):
    """Exports, checks, and writes the report."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    experiment.quiet()
    if FLAGS.finetune_epochs < 0:
        raise ValueError(
            "--finetune_epochs must be >= 0. "
            f"Received: --finetune_epochs={FLAGS.finetune_epochs}"
        )
    if FLAGS["learning_rate"].present and not FLAGS.finetune_epochs:
        raise ValueError(
            "A flag must have an effect. Received: --learning_rate without "
            "--finetune_epochs"
        )
    tfl.Stage(1, learning_rate=FLAGS.learning_rate)
    folder = experiment.require_writable(Path(FLAGS.output_dir))
    model = tfl.load_model(FLAGS.model, compile=False)
    data = load_data()
    experiment.require_fitting(model, data)
    report = export(model, data, folder)
    table = {
        **report.as_dict(),
        "settings": experiment.flag_settings(__name__),
        **environment(),
    }
    texts = (str(report), json.dumps(table, indent=2, sort_keys=True))
    for name, text in zip(REPORTS, texts, strict=True):
        replace_file(folder / name, f"{text}\n")
    for name in ("network.tflite", "archive.npz", *REPORTS):
        print(f"Written: {folder / name}")
    if FLAGS.strict and not report.ok:
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
