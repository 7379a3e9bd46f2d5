"""A packed archive: true k-bit weight codes and integer thresholds, for any machine.

An int8 file holds a 2-bit weight in a byte. This one holds it in 2 bits, next to the
integers at which a layer's accumulator moves from one output code to the next: what an
accelerator or a microcontroller needs, with neither scales nor rounding in between.

**File.** An `.npz`, that is, a ZIP of NumPy `.npy` files (deflated). `header.npy` is a
vector of uint8: a JSON object in UTF-8. The array `<array>` of layer number `<i>`, from
0 in the header's order, is `<i>.<array>.npy`. All arrays are little-endian and in C
order, last axis fastest. There are no pickled objects.

**Header.** `format` ("tf_lowbit archive"), `version` (1), `library` (version of
tf_lowbit), `options` (of the export), `notes` (what is not exactly what was trained),
`inputs` and `outputs` (names of layers), and `layers` in an order of execution. A layer
has `name`, `type`, `inputs` (names of the layers that it reads, in order), `shape` (of
its output, without the batch; null is any size), `input_grid` (of its first input) and
`grid` (of its output), `arrays` (name -> `[dtype, shape]`), and the settings of its
type. Tensors are (batch, height, width, channels), (batch, steps, channels) or
(batch, features).

**Grids.** A tensor with a grid holds integer codes `low..high`, 0 among them; the real
value is `code * step`. A grid of null is a tensor of float32. `scale`, `zero_point` and
`clamp` are how the int8 file holds the same codes: `code + zero_point` in a tensor of
that scale, and the fused activation that clamps at `low`.

**Integer layers** `integer_conv`, `integer_depthwise`, `integer_dense`,
`integer_scale`, `integer_transposed` add up `A = sum(input code * weight code)` and put
out

    low + (number of j with thresholds[channel, j] <= A).

Weights have the shape `weight_shape`: (height, width, inputs, channels) or (width,
inputs, channels) for conv; (height, width, inputs, multiplier) or (width, inputs,
multiplier) for depthwise, where output channel `i * multiplier + m` reads input channel
i; (inputs, channels) for dense, over the last axis; (channels,) for scale, one factor a
channel; (height, width, channels, inputs) for transposed. Convolutions correlate (no
flip), with `strides`, `dilation` and `padding`; padding is with code 0. Where a
conv's `inputs` are fewer than its input's channels, these are in consecutive groups of
that many, and each group makes the next, equal share of the output's. In each axis of a
transposed convolution output o reads input i by tap j wherever `i * stride + j = o +
before`, and there are `stride * inputs + excess` outputs (`before` and `excess` are its
settings, two numbers each). The arrays:

| array | type, shape | what |
|---|---|---|
| weights | uint8, (ceil(count * bits / 8),) | packed indices; or see "constant" |
| steps | float32, (channels,) | the trained weight is `code * step`, sign left out |
| signs | int8, (channels,) | -1, 0 or 1: multiplies the channel's weight codes |
| thresholds | int32, (channels, high - low) | decision points, ascending in each row |
| biases, weight_scales | int32, float32, (channels,) | for int8 kernels, see below |

`weight_grid` and `bits` say how an index becomes a code: "odd" is `2 index - (2^bits -
1)`; "signed" is `index + weight_low`, up to `weight_high`; "constant" weights (of
pooling and rescaling) are codes as they are, in int8 and `weight_shape`, without
`steps`. Index number i, in C order of the weights, occupies the bits `i * bits` to
`i * bits + bits - 1` of the byte stream, where bit b is bit `b % 8`, from the least
significant, of byte `b // 8`. A sign of -1 is a normalisation's negative factor; 0 is a
channel that puts out one code for every input, whose A is 0. A threshold below the
smallest A that the channel can have is always reached, one above the largest never.

An int8 kernel gets the same codes, a few near-ties of 8-bit outputs apart, as
`clip(round((upscale A + bias) * M), low, high)` with `M = input_grid.scale *
weight_scale / grid.scale`, from weights multiplied by sign and `upscale`; `kernel`
names the arithmetic ("xnnpack": float32, half to even; "builtin": 31-bit fixed point).
`storage` is how the int8 file holds the weights, and `represents` names the trained
network's tensor that comes out.

**Other layers.** They keep codes, and the grid, where their input has one.

| type | settings and arrays | what |
|---|---|---|
| input | | float32 |
| to_codes | | `round(clip(x * r, low, high))`, half to even; float32, r = 1 / step |
| to_values | | `code * step` |
| integer_add | ratios | `clip(round(a p/q + b r/s))` for [[p, q], [r, s]]; no ties |
| max_pool | pool_size, strides, padding | borders of "same" do not count |
| average_pool | pool_size, strides, padding | float; borders do not count |
| global_max_pool, global_average_pool | keepdims | steps, or height and width |
| zero_pad | padding | [before, after] of width, or of height and of width |
| edge_pad | padding | rows and columns at each border, mirrored: `b a a b b a` |
| crop | cropping | [before, after] of width, or of height and of width |
| upsample | size | values `size[0]` times in height, `size[1]` in width; steps `size` |
| interpolate | size | `upsample`, bilinear between the pixels' centres; float |
| flatten, reshape | | C order; to `shape` |
| permute | dims | output axis i is input axis dims[i]; the batch is axis 0 |
| concatenate | axis | |
| add, multiply | | float |
| affine | gain, offset | `gain x + offset` of each channel, float |
| conv, depthwise, dense | strides, padding, dilation_rate; kernel, bias | float |
| transposed | strides, before, excess; kernel, bias | float |
| relu | max_value | `min(max(x, 0), max_value)`; null for no upper bound |
| leaky_relu, prelu | alpha | `alpha x` below 0; a setting, or an array |
| layer_norm | epsilon; gamma, beta | over the last axis, variance + epsilon; float |
| activation | activation | gelu, linear, relu, relu6, sigmoid, softmax, swish or tanh |

"gelu" is the exact one, `x (1 + erf(x / sqrt(2))) / 2`.

**Padding** "valid" is none. "same" makes `ceil(size / stride)` outputs and pads
`max((outputs - 1) * stride + (window - 1) * dilation + 1 - size, 0)` in all, half of it
before, rounded down, and the rest behind.
"""

import dataclasses
import io
import json
import math
import zipfile

import numpy as np

from tf_lowbit.core import checks, packing
from tf_lowbit.core.files import require_plausible_zip
from tf_lowbit.export import archive_fields as fields
from tf_lowbit.export import files, twin
from tf_lowbit.export.grids import Grid

FORMAT = "tf_lowbit archive"
FORMAT_VERSION = 1
ODD = "odd"
SIGNED = "signed"
CONSTANT = "constant"

HEADER = "header"
_WINDOW = ("strides", "padding", "dilation_rate")
_POOL = ("pool_size", "strides", "padding")
# Type of a layer without weight codes -> its settings and its arrays.
FORMS = {
    "activation": (("activation",), ()),
    "add": ((), ()),
    "affine": ((), ("gain", "offset")),
    "average_pool": (_POOL, ()),
    "concatenate": (("axis",), ()),
    "conv": (_WINDOW, ("kernel", "bias")),
    "crop": (("cropping",), ()),
    "dense": ((), ("kernel", "bias")),
    "depthwise": (_WINDOW, ("kernel", "bias")),
    "edge_pad": (("padding",), ()),
    "flatten": ((), ()),
    "global_average_pool": (("keepdims",), ()),
    "global_max_pool": (("keepdims",), ()),
    "input": ((), ()),
    "integer_add": (("ratios",), ()),
    "interpolate": (("size",), ()),
    "layer_norm": (("epsilon",), ("gamma", "beta")),
    "leaky_relu": (("alpha",), ()),
    "max_pool": (_POOL, ()),
    "multiply": ((), ()),
    "permute": (("dims",), ()),
    "prelu": ((), ("alpha",)),
    "relu": (("max_value",), ()),
    "reshape": ((), ()),
    "to_codes": ((), ()),
    "to_values": ((), ()),
    "transposed": (("strides", "before", "excess"), ("kernel", "bias")),
    "upsample": (("size",), ()),
    "zero_pad": (("padding",), ()),
}
_INTEGER = (
    *("integer_conv", "integer_dense", "integer_depthwise", "integer_scale"),
    "integer_transposed",
)


@dataclasses.dataclass(frozen=True)
class ArchivedLayer:
    """One layer of an archive; the module says what the types compute.

    Attributes:
        name: unique.
        type: such as "integer_conv" or "max_pool".
        inputs: names of the layers that it reads.
        shape: of its output, without the batch; None is any size.
        input_grid: of its first input; None for floats.
        grid: of its output; None for floats.
        settings: the settings of its type.
        arrays: name -> array, as they are in the file.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    shape: tuple[int | None, ...]
    input_grid: Grid | None
    grid: Grid | None
    settings: dict
    arrays: dict[str, np.ndarray]

    @property
    def is_integer(self) -> bool:
        """Whether it has weight codes and thresholds."""
        return self.type in _INTEGER

    @property
    def weight_count(self) -> int:
        """How many weight codes there are; 0 for other layers."""
        return math.prod(self.settings["weight_shape"]) if self.is_integer else 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight codes, packed; 0 for other layers."""
        return self.arrays["weights"].nbytes if self.is_integer else 0

    def codes(self) -> np.ndarray:
        """The weight codes that add up to A: int32, as Keras shapes them, signs in.

        Raises:
            ValueError: if the layer has none.
        """
        if not self.is_integer:
            raise ValueError(
                f"codes() needs an integer layer. Received: {self.name!r} of type "
                f"{self.type!r}"
            )
        shape = tuple(self.settings["weight_shape"])
        signs = self.arrays["signs"].astype(np.int32)
        kind = self.type.removeprefix("integer_")
        signs = signs.reshape(twin.channel_shape(kind, shape))
        return _unpacked(self.settings, self.arrays["weights"]) * signs


@dataclasses.dataclass(frozen=True)
class Archive:
    """What an archive holds.

    Attributes:
        library: the version of tf_lowbit that wrote it.
        options: of the export.
        notes: what is not exactly what was trained, a line each.
        inputs: names of the network's inputs.
        outputs: names of the layers that it puts out.
        layers: in an order of execution.
    """

    library: str
    options: dict
    notes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[ArchivedLayer, ...]

    def layer(self, name: str) -> ArchivedLayer:
        """The layer of a name.

        Raises:
            ValueError: if there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = ", ".join(layer.name for layer in self.layers)
        raise ValueError(f"name must be one of {names}. Received: {name=}")

    @property
    def integer_layers(self) -> tuple[ArchivedLayer, ...]:
        """The layers that have weight codes and thresholds."""
        return tuple(layer for layer in self.layers if layer.is_integer)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed weight codes."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def array_bytes(self) -> int:
        """Bytes of all arrays, before the file is compressed."""
        return sum(a.nbytes for layer in self.layers for a in layer.arrays.values())


def load_archive(path) -> Archive:
    """Reads an archive, and checks that its parts fit together.

    Args:
        path: of a file that `save_archive` wrote.

    Returns:
        Its contents.

    Raises:
        ValueError: if the file is no archive, of another version, torn, or its parts
            contradict one another.
        OSError: if it cannot be read.
    """
    content = files.content_of("path", checks.path("path", path))
    try:
        header, arrays = _parts(content)
    except Exception as error:  # A torn file fails in many ways.
        raise ValueError(
            "path must be an archive that tf_lowbit.export.save_archive wrote, whole. "
            f"Received: {str(path)!r} ({error})"
        ) from error
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"The archive must be of version {FORMAT_VERSION}. "
            f"Received: version {header.get('version')!r} in {str(path)!r}"
        )
    try:
        return _archive(header, arrays)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            "The parts of an archive must fit together. "
            f"Received: {str(path)!r}, in which they do not "
            f"({type(error).__name__}: {error})"
        ) from error


def _parts(content: bytes):
    """The header and all other arrays of a file."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ValueError("no ZIP file, or torn")
    require_plausible_zip(io.BytesIO(content))
    with np.load(io.BytesIO(content), allow_pickle=False) as parts:
        arrays = {name: parts[name] for name in parts.files}
    header = json.loads(arrays.pop(HEADER).tobytes())
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"its header is not that of a {FORMAT}")
    return header, arrays


def _archive(header, arrays) -> Archive:
    layers: dict[str, ArchivedLayer] = {}
    for index, record in enumerate(header["layers"]):
        own = {
            name: _array(arrays, f"{index}.{name}", *form)
            for name, form in record["arrays"].items()
        }
        layer = _layer(record, own)
        unknown = [name for name in layer.inputs if name not in layers]
        if layer.name in layers or unknown:
            raise ValueError(f"layer {layer.name!r} is there twice, or reads {unknown}")
        if layer.inputs and layers[layer.inputs[0]].grid != layer.input_grid:
            raise ValueError(f"{layer.name} reads codes of another grid")
        layers[layer.name] = layer
    if arrays:
        raise ValueError(f"arrays {sorted(arrays)} belong to no layer")
    names = (*header["inputs"], *header["outputs"], *header["notes"])
    if not fields.are_texts([header["library"], *names]):
        raise ValueError("library, inputs, outputs and notes must be texts")
    result = Archive(
        header["library"],
        dict(header["options"]),
        tuple(header["notes"]),
        tuple(header["inputs"]),
        tuple(header["outputs"]),
        tuple(layers.values()),
    )
    for name in (*result.inputs, *result.outputs):
        if name not in layers:
            raise ValueError(f"there is no layer {name!r} to be an end of the network")
    return result


def _array(arrays, key, dtype, shape) -> np.ndarray:
    """Takes an array out, of the type and shape that the header says."""
    array = arrays.pop(key)
    if array.dtype.name != dtype or list(array.shape) != shape:
        raise ValueError(
            f"{key} is {array.dtype.name} {list(array.shape)}, but {dtype} {shape} in "
            "the header"
        )
    array.setflags(write=False)
    return array


def _layer(record, arrays) -> ArchivedLayer:
    fields.check_record(record)
    layer = ArchivedLayer(
        record["name"],
        record["type"],
        tuple(record["inputs"]),
        tuple(record["shape"]),
        fields.grid(record["input_grid"]),
        fields.grid(record["grid"]),
        {key: value for key, value in record.items() if key not in fields.COMMON},
        arrays,
    )
    if layer.is_integer:
        _check_integer_layer(layer)
    elif layer.type not in FORMS:
        raise ValueError(f"{layer.name} has the unknown type {layer.type!r}")
    elif (set(layer.settings), set(arrays)) != tuple(map(set, FORMS[layer.type])):
        raise ValueError(
            f"{layer.name} has {[*layer.settings, *arrays]}, which is not what layers "
            f"of type {layer.type!r} have"
        )
    return layer


def _check_integer_layer(layer) -> None:
    shape, arrays = layer.settings["weight_shape"], layer.arrays
    if layer.input_grid is None or layer.grid is None:
        raise ValueError(f"{layer.name} must read and put out codes")
    kind = layer.type.removeprefix("integer_")
    channels = math.prod(twin.channel_shape(kind, shape))
    expected = {
        "signs": ("int8", (channels,)),
        "thresholds": ("int32", (channels, layer.grid.high - layer.grid.low)),
        "biases": ("int32", (channels,)),
        "weight_scales": ("float32", (channels,)),
    }
    if layer.settings["weight_grid"] != CONSTANT:
        expected["steps"] = ("float32", (channels,))
    found = {n: (a.dtype.name, a.shape) for n, a in arrays.items() if n != "weights"}
    if found != expected:
        raise ValueError(f"{layer.name} has {found}, but must have {expected}")
    if not np.isin(arrays["signs"], (-1, 0, 1)).all():
        raise ValueError(f"{layer.name} has signs other than -1, 0 and 1")
    if (np.diff(arrays["thresholds"], axis=1) < 0).any():
        raise ValueError(f"{layer.name} has thresholds that descend")
    needed = {"strides", "padding", "dilation", "upscale"}
    if kind == twin.TRANSPOSED:
        needed |= {"before", "excess"}
    missing = needed - set(layer.settings)
    if missing:
        raise ValueError(f"{layer.name} lacks {sorted(missing)}")
    _unpacked(layer.settings, arrays["weights"])


def _unpacked(settings, weights) -> np.ndarray:
    """The weight codes without signs: int32, as Keras shapes them."""
    grid, shape = settings["weight_grid"], tuple(settings["weight_shape"])
    if grid == CONSTANT:
        if weights.dtype != np.int8 or weights.shape != shape:
            raise ValueError(
                f"constant weights must be int8 {shape}. "
                f"Received: {weights.dtype} {weights.shape}"
            )
        return weights.astype(np.int32)
    indices = packing.unpack(weights, settings["bits"], shape).astype(np.int32)
    if grid == ODD:
        return 2 * indices - (2 ** settings["bits"] - 1)
    if grid != SIGNED:
        raise ValueError(f"weight_grid must be known. Received: {grid!r}")
    codes = indices + settings["weight_low"]
    if codes.size and codes.max() > settings["weight_high"]:
        raise ValueError(
            f"codes must be at most {settings['weight_high']}. "
            f"Received: one of {codes.max()}"
        )
    return codes
