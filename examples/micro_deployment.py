"""From a float network to files for TFLite Micro: what `deploy_tiny.py` is made of.

`deploy` quantizes a network, exports it twice (weights in bytes, weights packed), runs
both files in TFLite Micro's interpreter and counts bytes. `source_files` writes what a
firmware project includes.
"""

import dataclasses
import tempfile
import warnings
from pathlib import Path

import numpy as np

import tf_lowbit as tfl
from tf_lowbit.compat import keras
from tf_lowbit.export.tflite import flatbuffer

STORAGES = ("int8", "packed")
# Of the first and of the last layer, and of residual sums.
EDGE_BITS = 8
# A share of a user's examples is kept for the test.
TEST_SHARE = 0.2
# How many random images stand in for missing data.
RANDOM_IMAGES = 32
# How many inputs of random codes both files are compared on.
COMPARED = 2
_BYTES_IN_A_LINE = 12


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples to calibrate and train on, and others to test on.

    Attributes:
        train: float32 inputs.
        test: likewise.
        train_labels: integers; None where there are none.
        test_labels: likewise.
        is_random: whether the inputs are noise: sizes are right then, and nothing else.
    """

    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None
    is_random: bool = False


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A network at some bits, as files for TFLite Micro.

    Attributes:
        bits: of weights and of activations.
        network: the quantized network.
        files: the file by storage.
        arena: bytes of the arena by storage, on this machine.
        operators: TFLite's names of the operators of each file, by storage.
        equal: whether both files put out the same codes.
        report: what `verify` found of the packed file.
        bops: bit operations of one inference; None where a size is open.
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
        """Such as "W2A2"."""
        return "W{}A{}".format(*self.bits)

    def accuracy(self, what: str) -> float | None:
        """Of "trained" or "file", on the test examples; None without labels.

        Args:
            what: the quantized network, or the packed file.
        """
        found = self.report.predictions
        if found is None or not found.labels:
            return None
        return found.right[what] / found.labels

    @property
    def agreement(self) -> float | None:
        """The share of the file's classes that are the network's; None without such."""
        found = self.report.predictions
        return None if found is None else found.trained_agrees / found.examples

    def as_dict(self) -> dict:
        """The figures, JSON-ready."""
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
    """Images of random numbers in [0, 1], where a user has none.

    Args:
        shape: of one input.
        seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(0, 1, (RANDOM_IMAGES, *shape)).astype(np.float32)
    return Data(inputs, inputs, is_random=True)


def load_data(path, shape) -> Data:
    """A user's examples: the last fifth is for the test.

    Args:
        path: `.npz` file with `x`, what the network takes, and optionally `y`, integer
            labels.
        shape: of one input.

    Raises:
        ValueError: if it has no such arrays.
        OSError: if it cannot be read.
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


def quantized(model: keras.Model, bits: tuple[int, int]) -> keras.Model:
    """A float network at some bits; first and last layer and residual sums at 8.

    Args:
        model: float network.
        bits: of weights and of activations of all other layers.
    """
    rules = [
        tfl.PrecisionRule(".*", *bits, *map(_quantizer, bits)),
        tfl.PrecisionRule(".*", EDGE_BITS, EDGE_BITS, "uniform", "uniform", edges=True),
    ]
    return tfl.quantize(model, rules, residual_bits=EDGE_BITS)


def _quantizer(bits: int) -> str:
    """Learned steps, where the bits have steps to be learned and a file holds them."""
    if bits == 1:
        return "dorefa"
    return "uniform" if bits == EDGE_BITS else "lsq"


def fit(network, data: Data, epochs: int, learning_rate: float, batch_size: int):
    """Trains a classifier by its labels, with Adam.

    Args:
        network: that ends in logits or in probabilities.
        data: with labels.
        epochs: how many.
        learning_rate: constant.
        batch_size: of a step.
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
    """Quantizes a network, trains it if wanted, and makes and runs its files.

    Args:
        model: float network of one input of fixed size. It is not changed.
        bits: of weights and of activations.
        data: to calibrate, train and test on.
        epochs: of the training, which wants labels; 0 for none.
        learning_rate: of it.
        batch_size: of it, and of the calibration.
        examples: how many test examples are run in TFLite Micro's interpreter at most.
    """
    batches = [
        data.train[start : start + batch_size]
        for start in range(0, len(data.train), batch_size)
    ]
    test = data.test[:examples]
    if data.test_labels is not None:
        test = (test, data.test_labels[:examples])
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # What they say of the network, the report says of the file.
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
    """The names of a file's operators, each once; DECODE unpacks weights."""
    names = set()
    for code in flatbuffer.unpack(content).operatorCodes:
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        name = flatbuffer.OPERATORS[number]
        names.add(code.customCode.decode() if name == "CUSTOM" else name)
    return tuple(sorted(name.removeprefix("TFLM_") for name in names))


def source_files(deployment: Deployment) -> dict[str, str]:
    """C++ sources of the packed file: an array, the operators and the arena's size.

    Args:
        deployment: what `deploy` made.

    Returns:
        From the name of a source file to its text.
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
                f"// What the network at {deployment.name} needs of TFLite Micro.",
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
    """The resolver's method that adds an operator: CONV_2D has AddConv2D."""
    if name == "BATCH_MATMUL":
        return "AddBatchMatMul"  # TFLite's name has one word there.
    parts = (
        part if part[0].isdigit() else part.capitalize() for part in name.split("_")
    )
    return f"Add{''.join(parts)}"
