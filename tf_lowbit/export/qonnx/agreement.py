"""Compares a QONNX file, run by qonnx's executor, with its network."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from tf_lowbit.compat import keras, tf
from tf_lowbit.export import file_bytes
from tf_lowbit.export.lowering import requirements
from tf_lowbit.export.qonnx.layers import channels_first
from tf_lowbit.network import inspection
from tf_lowbit.network.observation import batches_for
from tf_lowbit.quantizers import ACTIVATION

# An output counts as constant if its deviation is below this share of its maximum.
_CONSTANT = 1e-3


@dataclasses.dataclass(frozen=True)
class QonnxAgreement:
    """The agreement of a QONNX file with the trained network.

    Floats are summed in another order, so a value near the middle of two codes can
    round to the other one. A different code can change codes in later layers.

    Attributes:
        codes: Number of compared activation codes and class numbers.
        different: Name of each activation quantizer -> number of its different codes;
            and of each output of class numbers (an argmax), which count as codes.
        error: Largest difference of other outputs, divided by the standard deviation of
            the output, or by a thousandth of its maximum if that is larger.
    """

    codes: int
    different: dict[str, int]
    error: float

    def __str__(self):
        lines = [
            f"{sum(self.different.values()):,} of {self.codes:,} activation codes "
            f"differ; outputs differ by at most {self.error:.1e} standard deviations."
        ]
        lines += [f"  {name}: {n:,}" for name, n in self.different.items() if n]
        return "\n".join(lines)


def compare_qonnx(
    file: str | os.PathLike[str] | bytes,
    model: keras.Model,
    x: np.ndarray | Sequence[np.ndarray],
) -> QonnxAgreement:
    """Runs a QONNX file in the executor of the package `qonnx`, which is slow.

    Args:
        file: Path of a file of `to_qonnx`, or its bytes.
        model: The network of the file.
        x: A batch for the network, channels last: an array, or a list of arrays for
            several inputs. Its size is a multiple of the file's batch size.

    Returns:
        The different activation codes, and the largest difference of outputs.

    Raises:
        ImportError: Without the extra `qonnx`.
        ValueError: If the file is no ONNX file, has other inputs, or lacks a tensor of
            the network; or if `x` does not fit the network, or is not finite.
        OSError: If the file cannot be read.
    """
    try:
        # Imported here, because the imports are slow and rarely needed.
        import onnx
        from google.protobuf.message import DecodeError
        from qonnx.core import modelwrapper, onnx_exec
    except ImportError as error:
        raise ImportError(
            "QONNX files run in the executor of the package qonnx: pip install "
            "'.[qonnx]'"
        ) from error
    model = requirements.single_network(model)
    content = file_bytes.content_of("file", file)
    try:
        wrapper = modelwrapper.ModelWrapper(onnx.load_from_string(content))
    except DecodeError as error:
        raise ValueError(
            "file must be one that to_qonnx wrote, whole. "
            f"Received: {len(content)} bytes ({error})"
        ) from error
    inputs = list(x) if isinstance(x, tuple) else x
    for _ in batches_for(model, [inputs], 1):
        pass  # It fits the network.
    x = [np.asarray(part, np.float32) for part in tf.nest.flatten(inputs)]
    if not all(np.isfinite(part).all() for part in x):
        raise ValueError("x must be finite. Received: NaN or infinity")
    quantizers = [
        tensor
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == ACTIVATION
    ]
    wanted = keras.Model(
        model.inputs, [*(t.layer.output for t in quantizers), *model.outputs]
    )
    wanted = [
        _channels_first(v.numpy()) for v in tf.nest.flatten(wanted(x, training=False))
    ]
    names = [*(t.layer.name for t in quantizers), *model.output_names]
    found = _run(
        onnx_exec.execute_onnx, wrapper, [_channels_first(part) for part in x], names
    )
    different, codes = {}, 0
    for tensor, want, have in zip(quantizers, wanted, found, strict=False):
        step = float(tensor.quantizer.step(None, tensor.variables))
        unequal = np.rint(want / step) != np.rint(have / step)
        different[tensor.layer.name] = int(unequal.sum())
        codes += unequal.size
    distance = 0.0
    ends = (part[len(quantizers) :] for part in (names, wanted, found))
    for name, want, have in zip(*ends, strict=True):
        if want.dtype.kind == "i":
            different[name] = int((want != have).sum())
            codes += want.size
        else:
            largest = float(np.abs(have - want).max() / _spread(want))
            distance = float(np.maximum(distance, largest))  # Keeps a NaN.
    return QonnxAgreement(codes, different, distance)


def _spread(values):
    # A smaller deviation is rounding noise of a constant output.
    return max(float(values.std()), _CONSTANT * float(np.abs(values).max())) or 1.0


def _channels_first(values):
    if values.dtype.kind == "i":
        return values  # Class numbers have no channels.
    return np.ascontiguousarray(values.transpose(channels_first(values.ndim)))


def _run(execute, wrapper, x, names) -> list[np.ndarray]:
    """The tensors of the given names, from as many runs as the batch needs."""
    inputs = list(wrapper.graph.input)
    shapes = [tuple(wrapper.get_tensor_shape(entry.name)) for entry in inputs]
    size = shapes[0][0]
    if [s[1:] for s in shapes] != [part.shape[1:] for part in x] or len(x[0]) % size:
        raise ValueError(
            f"x must have the shapes of the file's inputs, {shapes}, in channels-last "
            "order, with a multiple of their batch size. Received, in channels-first "
            f"order: {[part.shape for part in x]}"
        )
    tensors = wrapper.get_all_tensor_names()
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(
            "file must be made from model, with a tensor for each activation quantizer "
            f"and output. Received: a file without {missing}"
        )
    rows = []
    for start in range(0, len(x[0]), size):
        feeds = {
            entry.name: part[start : start + size]
            for entry, part in zip(inputs, x, strict=True)
        }
        context = execute(wrapper, feeds, return_full_exec_context=True)
        rows.append([context[name] for name in names])
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]
