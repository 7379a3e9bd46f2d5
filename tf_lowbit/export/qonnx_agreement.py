"""Runs a QONNX file in qonnx's executor, against the network that it was made of."""

import dataclasses

import numpy as np

from tf_lowbit import inspection
from tf_lowbit.compat import keras, tf
from tf_lowbit.export import checks, files
from tf_lowbit.export.qonnx_layers import channels_first
from tf_lowbit.quantizers import ACTIVATION


@dataclasses.dataclass(frozen=True)
class QonnxAgreement:
    """How a QONNX file agrees with the trained network.

    Floats are added up in another order, so that a value beside the middle of two codes
    may fall to the other one; and one code that differs changes codes behind it.

    Attributes:
        codes: activation codes that were compared.
        different: name of each activation quantizer -> how many of its codes differ.
        error: the largest difference of outputs, divided by the standard deviation of
            the output.
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


def compare_qonnx(file, model, x) -> QonnxAgreement:
    """Runs a QONNX file in the executor of the package `qonnx`, which is slow.

    Args:
        file: path of a file of `to_qonnx`, or its bytes.
        model: the network that it was made of.
        x: one batch as the network takes it, channels last: an array, or a list of them
            for several inputs. As many examples as the file takes at a time, or a
            multiple.

    Returns:
        The activation codes that differ, and how far outputs are apart.

    Raises:
        ImportError: without the extra `qonnx`.
        ValueError: if the file has other inputs, or lacks a tensor of the network.
        OSError: if the file cannot be read.
    """
    try:
        # Here, for importing them takes its time and few need it.
        import onnx
        from qonnx.core import modelwrapper, onnx_exec
    except ImportError as error:
        raise ImportError(
            "QONNX files run in the executor of the package qonnx: pip install "
            "'.[qonnx]'"
        ) from error
    model = checks.single_network(model)
    wrapper = modelwrapper.ModelWrapper(
        onnx.load_from_string(files.content_of("file", file))
    )
    quantizers = [
        tensor
        for tensor in inspection.quantized_tensors(model)
        if tensor.role == ACTIVATION
    ]
    wanted = keras.Model(
        model.inputs, [*(t.layer.output for t in quantizers), *model.outputs]
    )
    x = [np.asarray(part, np.float32) for part in tf.nest.flatten(x)]
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
    ends = zip(wanted[len(quantizers) :], found[len(quantizers) :], strict=True)
    error = max(float(np.abs(h - w).max() / (w.std() or 1.0)) for w, h in ends)
    return QonnxAgreement(codes, different, error)


def _channels_first(values):
    return np.ascontiguousarray(values.transpose(channels_first(values.ndim)))


def _run(execute, wrapper, x, names) -> list[np.ndarray]:
    """The tensors of the names, from as many runs as the batch needs."""
    inputs = list(wrapper.graph.input)
    shapes = [tuple(wrapper.get_tensor_shape(entry.name)) for entry in inputs]
    size = shapes[0][0]
    if [s[1:] for s in shapes] != [part.shape[1:] for part in x] or len(x[0]) % size:
        raise ValueError(
            f"x must have the shapes of the file's inputs, {shapes}, channels last, or "
            f"a multiple of their examples. Received: {[part.shape for part in x]}, "
            "channels first"
        )
    tensors = wrapper.get_all_tensor_names()
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(
            "file must be of this network, with a tensor for each activation quantizer "
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
