"""One-operator TFLite files, run through real interpreters.

All channels of a layer here read the same codes, so that the rows of `all_codes`
drive each channel through all of its accumulators.
"""

import dataclasses
import functools
import warnings

import numpy as np

from tf_lowbit.compat import tf
from tf_lowbit.export.integer import kernels
from tf_lowbit.export.tflite.flatbuffer import FileBuilder, schema

try:
    from ai_edge_litert import interpreter as litert
except ImportError:
    litert = None

CONV, DEPTHWISE, DENSE = "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"
OPERATORS = (CONV, DEPTHWISE, DENSE)
INT8_VERSIONS = {CONV: 3, DEPTHWISE: 3, DENSE: 4}
INT4_VERSIONS = {CONV: 7, DEPTHWISE: 7, DENSE: 10}
# Every interpreter there is: (its name, the kernels that it runs).
RUNTIMES = [("tensorflow", kernels.XNNPACK), ("tensorflow", kernels.BUILTIN)]
if litert is not None:
    RUNTIMES += [("litert", kernels.XNNPACK), ("litert", kernels.BUILTIN)]
DELEGATE = "DELEGATE"


def interpreter(data: bytes, kernel: str, runtime: str = "tensorflow"):
    """An interpreter of `runtime` that runs `kernel`."""
    if runtime == "litert":
        maker, resolvers = litert.Interpreter, litert.OpResolverType
    else:
        maker = tf.lite.Interpreter
        resolvers = tf.lite.experimental.OpResolverType
    resolver = {
        kernels.XNNPACK: resolvers.AUTO,
        kernels.BUILTIN: resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    }[kernel]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's says that LiteRT replaces it.
        return maker(
            model_content=data, num_threads=1, experimental_op_resolver_type=resolver
        )


def run(data: bytes, inputs, kernel: str, runtime: str = "tensorflow"):
    """The output of a file with one input: batch first. Checks who computes it."""
    lite = interpreter(data, kernel, runtime)
    (detail,) = lite.get_input_details()
    lite.resize_tensor_input(detail["index"], inputs.shape)
    lite.allocate_tensors()
    names = [detail["op_name"] for detail in lite._get_ops_details()]
    assert (DELEGATE in names) == (kernel == kernels.XNNPACK), names
    lite.set_tensor(detail["index"], inputs)
    lite.invoke()
    (detail,) = lite.get_output_details()
    return lite.get_tensor(detail["index"])


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear operator on int8.

    Attributes:
        operator: one of `OPERATORS`.
        weights: int8, taps x channels: the taps are the input's channels, or pixels
            in a row for the depthwise convolution.
        scales: float32, one for each channel.
        biases: int32, likewise.
        input_scale: of the file.
        input_zero_point: of the file.
        output_scale: of the file.
        output_zero_point: of the file.
        activation: fused, a name of the schema.
        int4: how the weights are stored.
    """

    operator: str
    weights: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    input_scale: float = 0.5
    input_zero_point: int = 0
    output_scale: float = 0.25
    output_zero_point: int = 0
    activation: str = "NONE"
    int4: bool = False

    @functools.cached_property
    def data(self) -> bytes:
        """The file."""
        taps, channels = self.weights.shape
        file = FileBuilder("one operator")
        shapes = {
            CONV: ((None, 1, 1, taps), (channels, 1, 1, taps), (None, 1, 1, channels)),
            DEPTHWISE: (
                (None, 1, taps, channels),
                (1, 1, taps, channels),
                (None, 1, 1, channels),
            ),
            DENSE: ((None, taps), (channels, taps), (None, channels)),
        }
        shape, kernel_shape, output_shape = shapes[self.operator]
        weights, axis = self.weights.T, 0
        if self.operator == DEPTHWISE:
            weights, axis = self.weights, 3
        inputs = file.activation(
            "inputs", shape, np.int8, (self.input_scale, self.input_zero_point)
        )
        kernel = file.constant(
            "kernel", weights.reshape(kernel_shape), self.scales, axis, self.int4
        )
        biases = file.constant(
            "biases",
            np.asarray(self.biases, np.int32),
            np.float32(self.input_scale) * self.scales,
        )
        output = file.activation(
            "output", output_shape, np.int8, (self.output_scale, self.output_zero_point)
        )
        versions = INT4_VERSIONS if self.int4 else INT8_VERSIONS
        valid = schema.Padding.VALID
        activation = getattr(schema.ActivationFunctionType, self.activation)
        options = {
            CONV: schema.Conv2DOptionsT(valid, 1, 1, activation),
            DEPTHWISE: schema.DepthwiseConv2DOptionsT(valid, 1, 1, 1, activation),
            DENSE: schema.FullyConnectedOptionsT(activation),
        }
        file.operator(
            self.operator,
            versions[self.operator],
            [inputs, kernel, biases],
            [output],
            options[self.operator],
        )
        return file.finish({"inputs": inputs}, {"output": output}, b"{}", "serving")

    def accumulators(self, codes) -> np.ndarray:
        """Int64, rows x channels, biases included.

        Args:
            codes: rows x taps, without the zero point.
        """
        return codes.astype(np.int64) @ self.weights.astype(np.int64) + self.biases

    def run(self, codes, kernel: str, runtime: str = "tensorflow") -> np.ndarray:
        """The real kernel's codes, int64, rows x channels, without zero points."""
        rows, taps = codes.shape
        channels = self.weights.shape[1]
        inputs = (codes + self.input_zero_point).astype(np.int8)
        if self.operator == DEPTHWISE:
            inputs = np.repeat(inputs[:, None, :, None], channels, axis=3)
        elif self.operator == CONV:
            inputs = inputs.reshape(rows, 1, 1, taps)
        result = run(self.data, inputs, kernel, runtime)
        return result.reshape(rows, channels).astype(np.int64) - self.output_zero_point

    def multipliers(self, kernel: str) -> np.ndarray:
        """`M` of the kernel, one for each channel."""
        return kernels.multiplier(
            kernel, self.input_scale, self.scales, self.output_scale
        )


def all_codes(low: int = -128, high: int = 127) -> np.ndarray:
    """Every pair of codes: int64, rows x 2."""
    codes = np.arange(low, high + 1)
    return np.stack(np.meshgrid(codes, codes), axis=-1).reshape(-1, 2)


def random_layer(operator, int4=False, channels=64, taps=None, least=1e-5, most=0.9):
    """Random scales over decades, biases, weights; two taps reach every sum."""
    rng = np.random.default_rng(7)
    largest = 7 if int4 else 127
    if taps is None:
        weights = np.tile(np.array([[largest], [1]], np.int8), (1, channels))
        weights[:, ::3] *= -1
    else:
        weights = rng.integers(-largest - int4, largest + 1, (taps, channels))
    multipliers = np.exp(rng.uniform(np.log(least), np.log(most), channels))
    # Powers of two make ties.
    multipliers[::4] = 2.0 ** np.rint(np.log2(multipliers[::4]))
    return Layer(
        operator,
        weights.astype(np.int8),
        (multipliers * 0.25 / 0.5).astype(np.float32),
        rng.integers(-50 * largest, 50 * largest, channels).astype(np.int32),
        int4=int4,
    )
