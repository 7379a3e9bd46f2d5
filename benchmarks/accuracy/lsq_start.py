r"""Where LSQ's steps should start: signal to noise and accuracy of two first steps.

  python -m benchmarks.accuracy.lsq_start \
      --output=benchmarks/results/accuracy/lsq_start.json

A small network on scikit-learn's digits, with noise added, all layers and the input at
the same bits. Both starts train from the same float networks with the same data. A run
takes about five minutes of one core.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import rich.console
import rich.table
from absl import app, flags
from sklearn.datasets import load_digits

import tf_lowbit as tfl
from benchmarks.cost import stepping
from tf_lowbit.compat import keras
from tf_lowbit.quantizers import lsq

FLAGS = flags.FLAGS

flags.DEFINE_multi_integer("bits", [2, 3, 4, 8], "Bits of weights and activations.")
flags.DEFINE_integer(
    "seeds", 5, "Float networks, each with noise and order of its own."
)
flags.DEFINE_integer("float_epochs", 15, "Epochs of each float network.")
flags.DEFINE_integer("epochs", 8, "Epochs of each quantized network.")
flags.DEFINE_float("learning_rate", 0.05, "Of the quantized networks, at first.")
flags.DEFINE_string("output", None, "JSON file to write the figures to.")

BATCH = 32
NOISE = 0.35


def network():
    """Three convolutions of 12 to 24 channels, for images of 8x8."""
    layers = keras.layers
    stack = [keras.Input((8, 8, 1))]
    for index, (channels, strides) in enumerate([(12, 1), (24, 2), (24, 1)]):
        stack += [
            layers.Conv2D(
                channels,
                3,
                strides,
                padding="same",
                use_bias=False,
                name=f"conv{index}",
            ),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        ]
    return keras.Sequential(
        [*stack, layers.GlobalAveragePooling2D(), layers.Dense(10, name="head")]
    )


def examples(seed):
    """Digits in [0, 1] with noise, 1,297 to train and 500 to test."""
    digits, random = load_digits(), np.random.default_rng(seed)
    images = digits.images[..., None] / 16 + random.normal(0, NOISE, (1797, 8, 8, 1))
    images, order = np.clip(images, 0, 1).astype("float32"), random.permutation(1797)
    train, test = order[500:], order[:500]
    return (images[train], digits.target[train]), (images[test], digits.target[test])


def train(model, data, epochs, rate):
    """Trains with SGD and a rate that falls to 0 as a cosine."""
    steps = epochs * -(-len(data[0]) // BATCH)
    model.optimizer.learning_rate = rate

    class Cosine(keras.callbacks.Callback):
        step = 0

        def on_train_batch_begin(self, batch, logs=None):
            share = self.step / steps
            self.model.optimizer.learning_rate = rate * (1 + np.cos(np.pi * share)) / 2
            self.step += 1

    model.fit(*data, batch_size=BATCH, epochs=epochs, callbacks=[Cosine()], verbose=0)


def compiled(model):
    """Compiles for digits."""
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def accuracy(model, data) -> float:
    """In per cent."""
    return round(100 * model.evaluate(*data, batch_size=500, verbose=0)[1], 2)


def decibels(model, images) -> dict:
    """The mean signal-to-noise ratio of the quantizers, in decibels."""
    found = tfl.statistics(model, [images])
    return {
        role: round(float(np.mean([s.sqnr for s in found if s.role == role])), 2)
        for role in ("weight", "activation")
    }


def reset(model):
    """Momenta and step count to zero."""
    for variable in model.optimizer.variables:
        if variable is not model.optimizer.learning_rate:
            variable.assign(variable * 0)


def quantized(source, start):
    """The network with LSQ on all its layers."""
    rule = tfl.PrecisionRule(
        "conv.*|head",
        8,
        8,
        lsq.LSQWeightQuantizer(initialization=start),
        lsq.LSQActivationQuantizer(initialization=start),
    )
    return compiled(tfl.quantize(source, rule))


def run(models, source, first, bits, seed, start) -> dict:
    """One network at some bits from one start."""
    data, test = examples(seed)
    model = models[start]
    for old, value in zip(model.variables, first[start], strict=True):
        old.assign(value)
    own = {layer.name: layer for layer in source.layers}
    for layer in model.layers:
        part = tfl.inspection.wrapped_layer(layer)
        if part.name in own and own[part.name].weights:
            names = {tfl.inspection.short_name(v): v for v in own[part.name].weights}
            for variable in layer.weights:
                name = tfl.inspection.short_name(variable)
                if name in names:
                    variable.assign(names[name])
    reset(model)
    for tensor in tfl.inspection.quantized_tensors(model):
        tensor.assign_bits(bits)
    tfl.inspection.initialize_weight_ranges(model)
    tfl.calibrate(model, [data[0][:512]])
    before = decibels(model, data[0][:512])
    keras.utils.set_random_seed(seed)
    train(model, data, FLAGS.epochs, FLAGS.learning_rate)
    return {
        "bits": bits,
        "start": start,
        "seed": seed,
        "accuracy": accuracy(model, test),
        "float_accuracy": accuracy(source, test),
        "sqnr_at_start": before,
        "sqnr_at_end": decibels(model, data[0][:512]),
    }


def main(argv):
    """Measures, prints a table and writes the figures."""
    if len(argv) > 1:
        raise app.UsageError(f"Received: arguments that are no flags: {argv[1:]}")
    source = compiled(network())
    untrained = source.get_weights()
    models = {start: quantized(source, start) for start in lsq.INITIALIZATIONS}
    first = {s: [v.numpy() for v in m.variables] for s, m in models.items()}
    rows = []
    for seed in range(FLAGS.seeds):
        keras.utils.set_random_seed(seed)
        source.set_weights(untrained)
        for layer in source.layers:
            if hasattr(layer, "kernel_initializer"):
                layer.kernel.assign(keras.initializers.HeNormal()(layer.kernel.shape))
        reset(source)
        train(source, examples(seed)[0], FLAGS.float_epochs, 0.05)
        for bits in FLAGS.bits:
            for start in models:
                rows.append(run(models, source, first, bits, seed, start))
    show(rows)
    if FLAGS.output:
        stepping.write(FLAGS.output, {"runs": rows}, __name__)


def show(rows) -> None:
    """Prints means over the seeds, and the difference that the start makes."""
    table = rich.table.Table(
        "bits", "start", "accuracy", "minus paper's", "dB, weights", "dB, act."
    )
    for bits in sorted({row["bits"] for row in rows}):
        by_start = {
            start: [r for r in rows if (r["bits"], r["start"]) == (bits, start)]
            for start in lsq.INITIALIZATIONS
        }
        papers = np.array([r["accuracy"] for r in by_start[lsq.PAPER]])
        for start, own in by_start.items():
            found = np.array([r["accuracy"] for r in own])
            difference = found - papers
            error = difference.std(ddof=1) / len(found) ** 0.5 if len(found) > 1 else 0
            levels = [
                "{:.1f} to {:.1f}".format(
                    *(
                        np.mean([r[when][role] for r in own])
                        for when in ("sqnr_at_start", "sqnr_at_end")
                    )
                )
                for role in ("weight", "activation")
            ]
            table.add_row(
                str(bits),
                start,
                f"{found.mean():.2f}",
                f"{difference.mean():+.2f} ± {error:.2f}",
                *levels,
            )
    rich.console.Console(width=120).print(table)


if __name__ == "__main__":
    app.run(main)
