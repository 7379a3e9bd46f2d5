"""Activation grids in QONNX: `Quant`, `BipolarQuant` and `MultiThreshold`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_lowbit.compat import Node, keras, tf
from tf_lowbit.export.types import refusal

QUANT, MULTI_THRESHOLD = "quant", "multithreshold"
ACTIVATIONS = (QUANT, MULTI_THRESHOLD)
# Domain of qonnx's operators.
DOMAIN = "qonnx.custom_op.general"
_LAYOUTS = {2: "NC", 3: "NCW", 4: "NCHW"}


def is_bipolar(levels: range) -> bool:
    """Whether the levels are -1 and 1."""
    return levels == range(-1, 2, 2)


def quant_of(levels: range) -> tuple[int, bool, bool]:
    """Bits, signed and narrow of the smallest `Quant` that has all levels."""
    low, high = levels[0], levels[-1]
    if low >= 0:
        return max(high.bit_length(), 1), False, False
    bits = max(high, -low - 1).bit_length() + 1
    return bits, True, low > -(2 ** (bits - 1))


def quantize(
    writer: Any, node: Node, layer: keras.layers.Layer, inputs: Sequence[str]
) -> str:
    """Writes an activation quantizer."""
    tensor = writer.activation_quantizer(node)
    levels = tensor.quantizer.level_codes(tensor.bits)
    step = np.float32(tensor.quantizer.step(None, tensor.variables))
    _require_uniform(tensor, layer, levels, step)
    shape = writer.shape(node.keras_inputs[0])
    if writer.activations == MULTI_THRESHOLD:
        return _multi_threshold(writer, tensor, levels, step, shape, inputs)
    if levels[0] == 0:
        # Quant clips at 0 itself, but tools recognize a quantized ReLU by the pair.
        inputs = [writer.add("Relu", inputs, shape)]
    return writer.quant(inputs[0], shape, "quant", step, levels)


def _require_uniform(tensor, layer, levels, step) -> None:
    """Refuses a quantizer that does not round to the nearest code of its `Quant`."""
    low, high = levels[0], levels[-1]
    _, signed, narrow = quant_of(levels)
    is_whole = levels.step == 1 and low == (-high - (not narrow) if signed else 0)
    is_whole &= (high + 1).bit_count() == 1
    # Not at the middles, where float32 rounding decides.
    points = np.arange(low - 1, high + 1.5)[:, np.newaxis] + (0.25, 0.75)
    wanted = np.clip(np.rint(points), low, high)
    if is_bipolar(levels):
        is_whole, wanted = True, np.where(points >= 0, 1, -1)
    values = tf.constant(points * step, tf.float32)
    found = tensor.quantizer.codes(values, tensor.variables).numpy()
    if not is_whole or (found != wanted).any():
        raise refusal(
            layer,
            "Activations must be rounded to the nearest of 2^k levels, or of 2^k - 1 "
            "levels around zero",
            "train with dorefa, lsq, pact or uniform activations",
            f"with {tensor.quantizer!r}",
        )


def _multi_threshold(writer, tensor, levels, step, shape, inputs):
    codes = np.asarray(levels)
    # The quantizer rounds in float32, half to even, so the smallest value of each code
    # is within a few floats of the middle.
    middles = ((codes[1:] + codes[:-1]) / 2 * step).astype(np.float32)
    candidates = [middles]
    for direction in (-np.inf, np.inf):
        value = middles
        for _ in range(4):
            value = np.nextafter(value, np.float32(direction))
            candidates.append(value)
    candidates = np.sort(np.stack(candidates), axis=0)
    found = tensor.quantizer.codes(tf.constant(candidates), tensor.variables).numpy()
    first = (found >= codes[1:]).argmax(axis=0)
    thresholds = candidates[first, np.arange(len(middles))]
    bits, signed, _ = quant_of(levels)
    datatype = f"{'INT' if signed else 'UINT'}{bits}"
    datatype = "BIPOLAR" if is_bipolar(levels) else datatype
    made = writer.add(
        "MultiThreshold",
        [inputs[0], writer.constant("thresholds", thresholds[np.newaxis])],
        shape,
        domain=DOMAIN,
        out_dtype=datatype,
        out_scale=float(levels.step),
        out_bias=float(levels[0]),
        data_layout=_LAYOUTS[len(shape)],
    )
    writer.annotate(made, datatype)
    return writer.add("Mul", [made, writer.constant("step", step)], shape, "values")
