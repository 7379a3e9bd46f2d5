"""Functions of `deploy_tiny.py`: from a float network to files for TFLite Micro.

`deploy` quantizes a network, exports it twice (weights in bytes, weights packed), runs
both files in TFLite Micro's interpreter and counts bytes. `source_files` makes the C++
files of a firmware project.
"""

import dataclasses
import tempfile
import warnings
from pathlib import Path

import numpy as np

import tf_lowbit as tfl
from tf_lowbit.compat import keras
from tf_lowbit.export.tflite import flatbuffer
from tf_lowbit.network import predictions

STORAGES = ("int8", "packed")
# Bits of the first and the last layer, and of residual sums.
EDGE_BITS = 8
# Share of a user's examples for the test.
TEST_SHARE = 0.2
# Number of random images that replace missing data.
RANDOM_IMAGES = 32
# Number of random inputs on which both files are compared.
COMPARED = 2
_BYTES_IN_A_LINE = 12


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples for calibration and training, and others for the test.

    Attributes:
        train: Float32 inputs.
        test: Float32 inputs.
        train_labels: Integers, or None.
        test_labels: Integers, or None.
        is_random: Whether the inputs are noise, so that only sizes are right.
    """

    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None
    is_random: bool = False


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A network at given bits, as files for TFLite Micro.

    Attributes:
        bits: Bits of weights and of activations.
        network: The quantized network.
        files: Storage -> content of the file.
        arena: Storage -> bytes of the arena, on this machine.
        operators: Storage -> TFLite's names of the file's operators.
        equal: Whether both files output the same codes.
        report: Result of `verify` for the packed file.
        bops: Bit operations of one inference; None if a size is open.
    """

    bits: tuple[int, int]
    network: keras.Model
    files: dict[str, bytes]
    arena: dict[str, int]
    operators: dict[str, tuple[str, ...]]
    equal: bool
    report: tfl.export.Report
    bops: int | None

    @property
    def name(self) -> str:
        """The bits as a name, such as "W2A2"."""
        return "W{}A{}".format(*self.bits)

    def accuracy(self, what: str) -> float | None:
        """Returns the accuracy on the test examples; None without labels.

        Args:
            what: "trained" for the quantized network, "file" for the packed file.
        """
        found = self.report.predictions
        if found is None or not found.labels:
            return None
        return found.right[what] / found.labels

    @property
    def agreement(self) -> float | None:
        """Share of examples to which file and network give one class; or None."""
        found = self.report.predictions
        return None if found is None else found.trained_agrees / found.examples

    def as_dict(self) -> dict:
        """Returns the results, JSON-ready."""
        return {
            "bytes": {storage: len(self.files[storage]) for storage in STORAGES},
            "arena": self.arena,
            "operators": {s: list(names) for s, names in self.operators.items()},
            "bops": self.bops,
            "equal": self.equal,
            "verified": self.report.ok,
            "failures": self.report.failures,
            "codes": self.report.codes,
            "mismatches": self.report.mismatches,
            "agreement": self.agreement,
            "accuracy": {what: self.accuracy(what) for what in ("trained", "file")},
        }


def random_data(shape, seed: int = 0) -> Data:
    """Makes images of random numbers in [0, 1], which replace missing data.

    Args:
        shape: Shape of one input.
        seed: Seed of the numbers.
    """
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(0, 1, (RANDOM_IMAGES, *shape)).astype(np.float32)
    return Data(inputs, inputs, is_random=True)


def load_data(path, shape) -> Data:
    """Reads a user's examples; the last fifth is for the test.

    Args:
        path: `.npz` file with `x`, the network's inputs, and optionally `y`, integer
            labels.
        shape: Shape of one input.

    Raises:
        ValueError: If the file does not have such arrays.
        OSError: If the file cannot be read.
    """
    with np.load(path, allow_pickle=False) as found:
        arrays = {name: found[name] for name in ("x", "y") if name in found}
    inputs, labels = arrays.get("x"), arrays.get("y")
    if inputs is None or inputs.shape[1:] != tuple(shape) or len(inputs) < 2:
        raise ValueError(
            f"The data must have two or more examples 'x' of shape {tuple(shape)}. "
            f"Received: {path!r} with { ({n: a.shape for n, a in arrays.items()}) }"
        )
    inputs = inputs.astype(np.float32)
    if labels is not None:
        labels = labels.reshape(len(labels), -1)
        is_integer = np.issubdtype(labels.dtype, np.integer)
        if len(labels) != len(inputs) or labels.shape[1] != 1 or not is_integer:
            raise ValueError(
                f"The labels 'y' must be one integer for each of {len(inputs)} "
                f"examples. Received: {path!r} with y of {labels.dtype.name}, "
                f"{arrays['y'].shape}"
            )
        labels = labels[:, 0]
    count = len(inputs) - max(round(TEST_SHARE * len(inputs)), 1)
    both = (None, None) if labels is None else (labels[:count], labels[count:])
    return Data(inputs[:count], inputs[count:], *both)


def float_accuracy(model: keras.Model, data: Data, examples: int) -> float | None:
    """Measures a float network on the test examples of the files; None without labels.

    Args:
        model: Float network.
        data: Examples, perhaps with labels.
        examples: Largest number of test examples.
    """
    if data.test_labels is None:
        return None
    outputs = model.predict(data.test[:examples], verbose=0)
    outputs = predictions.scores(model.outputs[0], outputs)
    classes = predictions.classes(outputs, predictions.threshold(model))
    return float((classes == data.test_labels[:examples]).mean())


def quantized(model: keras.Model, bits: tuple[int, int]) -> keras.Model:
    """Quantizes a float network; first and last layer and residual sums get 8 bits.

    Args:
        model: Float network.
        bits: Bits of weights and of activations of all other layers.
    """
    rules = [
        tfl.PrecisionRule(".*", *bits, *map(_quantizer, bits)),
        tfl.PrecisionRule(".*", EDGE_BITS, EDGE_BITS, "uniform", "uniform", edges=True),
    ]
    return tfl.quantize(model, rules, residual_bits=EDGE_BITS)


def _quantizer(bits: int) -> str:
    """Returns the quantizer for a bit-width: LSQ from 2 to 7 bits."""
    if bits == 1:
        return "dorefa"
    return "uniform" if bits == EDGE_BITS else "lsq"


def fit(network, data: Data, epochs: int, learning_rate: float, batch_size: int):
    """Trains a classifier on its labels with Adam.

    Args:
        network: Network that outputs logits or probabilities.
        data: Examples with labels.
        epochs: Number of epochs.
        learning_rate: Constant learning rate.
        batch_size: Examples in a step.
    """
    outputs = np.asarray(network(data.train[:batch_size], training=False))
    are_shares = outputs.min() >= 0 and np.allclose(outputs.sum(-1), 1, atol=1e-3)
    network.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=not are_shares),
    )
    network.fit(
        data.train, data.train_labels, batch_size=batch_size, epochs=epochs, verbose=0
    )


def deploy(
    model: keras.Model,
    bits: tuple[int, int],
    data: Data,
    *,
    epochs: int = 0,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    examples: int = 100,
) -> Deployment:
    """Quantizes and trains a network, and makes and runs its files.

    Args:
        model: Float network with one input of fixed size. It is not changed.
        bits: Bits of weights and of activations.
        data: Examples for calibration, training and test.
        epochs: Epochs of the training, which needs labels; 0 for no training.
        learning_rate: Learning rate of the training.
        batch_size: Batch size of training and calibration.
        examples: Largest number of test examples to run in TFLite Micro's interpreter.
    """
    batches = [
        data.train[start : start + batch_size]
        for start in range(0, len(data.train), batch_size)
    ]
    test = data.test[:examples]
    if data.test_labels is not None:
        test = (test, data.test_labels[:examples])
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # The report has the same facts about the file.
        warnings.simplefilter("ignore", tfl.QuantizationWarning)
        network = quantized(model, bits)
        tfl.calibrate(network, batches)
        if epochs:
            fit(network, data, epochs, learning_rate, batch_size)
        if not data.is_random and any(map(_is_norm, network.layers)):
            tfl.recalibrate_batch_norm(network, batches)
        files = {
            storage: _exported(network, batches, storage, Path(folder, storage))
            for storage in STORAGES
        }
        report = tfl.export.verify(
            files["packed"], network, [test], tensor_batches=1, verbose=0
        )
    runners = {s: tfl.export.MicroRunner(content) for s, content in files.items()}
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (COMPARED, *data.train.shape[1:]), np.int8)
    plain, packed = (list(runners[s](codes).values()) for s in STORAGES)
    return Deployment(
        bits,
        network,
        files,
        {storage: runners[storage].arena() for storage in STORAGES},
        {storage: operators(content) for storage, content in files.items()},
        all(map(np.array_equal, plain, packed)),
        report,
        tfl.cost(network).bops,
    )


def _is_norm(layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def _exported(network, batches, storage, path) -> bytes:
    tfl.export.to_tflite(
        network, path, batches, target="tflm", storage=storage, verbose=0
    )
    return path.read_bytes()


def operators(content: bytes) -> tuple[str, ...]:
    """Returns the names of a file's operators, each once; DECODE unpacks weights."""
    names = set()
    for code in flatbuffer.unpack(content).operatorCodes:
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        name = flatbuffer.OPERATORS[number]
        names.add(code.customCode.decode() if name == "CUSTOM" else name)
    return tuple(sorted(name.removeprefix("TFLM_") for name in names))


def source_files(deployment: Deployment) -> dict[str, str]:
    """Makes C++ sources of the packed file: array, operators and arena size.

    Args:
        deployment: Result of `deploy`.

    Returns:
        Name of a source file -> its text.
    """
    content = deployment.files["packed"]
    lines = [
        "    "
        + " ".join(f"0x{byte:02x}," for byte in content[at : at + _BYTES_IN_A_LINE])
        for at in range(0, len(content), _BYTES_IN_A_LINE)
    ]
    names = deployment.operators["packed"]
    calls = [
        f"  TF_LITE_ENSURE_STATUS(resolver.{add_method(name)}());" for name in names
    ]
    resolver = f"tflite::MicroMutableOpResolver<{len(names)}>"
    return {
        "model_data.h": "\n".join(
            [
                f"// A network at {deployment.name}, for TFLite Micro.",
                "#ifndef MODEL_DATA_H_",
                "#define MODEL_DATA_H_",
                "",
                "extern const unsigned char g_model_data[];",
                "extern const unsigned int g_model_data_size;",
                "",
                "#endif  // MODEL_DATA_H_",
                "",
            ]
        ),
        "model_data.cc": "\n".join(
            [
                '#include "model_data.h"',
                "",
                "alignas(16) const unsigned char g_model_data[] = {",
                *lines,
                "};",
                f"const unsigned int g_model_data_size = {len(content)};",
                "",
            ]
        ),
        "model_setup.h": "\n".join(
            [
                f"// TFLite Micro's setup for the network at {deployment.name}.",
                "#ifndef MODEL_SETUP_H_",
                "#define MODEL_SETUP_H_",
                "",
                '#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"',
                "",
                "// Measured on a 64-bit machine: a 32-bit controller needs less.",
                f"constexpr int kArenaSize = {deployment.arena['packed']};",
                "",
                f"inline TfLiteStatus AddOperators({resolver}& resolver) {{",
                *calls,
                "  return kTfLiteOk;",
                "}",
                "",
                "#endif  // MODEL_SETUP_H_",
                "",
            ]
        ),
    }


def add_method(name: str) -> str:
    """Returns the resolver's method for an operator: CONV_2D is AddConv2D."""
    if name == "BATCH_MATMUL":
        return "AddBatchMatMul"  # TFLite's name has one word there.
    parts = (
        part if part[0].isdigit() else part.capitalize() for part in name.split("_")
    )
    return f"Add{''.join(parts)}"
