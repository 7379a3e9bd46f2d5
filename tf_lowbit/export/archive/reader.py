"""Reader of packed archives."""

import dataclasses
import io
import json
import math
import os
import zipfile

import numpy as np

from tf_lowbit.core import checks
from tf_lowbit.core.files import require_plausible_zip
from tf_lowbit.export import file_bytes, layer_table
from tf_lowbit.export.archive import bit_packing, fields
from tf_lowbit.export.integer import twin
from tf_lowbit.export.integer.int8_grids import Grid

FORMAT = "tf_lowbit archive"
FORMAT_VERSION = 1
ODD = "odd"
SIGNED = "signed"
CONSTANT = "constant"

HEADER = "header"
_WINDOW = ("strides", "padding", "dilation_rate")
_POOL = ("pool_size", "strides", "padding")
# Type of a layer without weight codes -> its settings, its arrays.
FORMS = {
    "activation": (("activation",), ()),
    "add": ((), ()),
    "affine": ((), ("gain", "offset")),
    "argmax": ((), ()),
    "average_pool": (_POOL, ()),
    "concatenate": (("axis",), ()),
    "conv": (_WINDOW, ("kernel", "bias")),
    "crop": (("cropping",), ()),
    "dense": ((), ("kernel", "bias")),
    "depthwise": (_WINDOW, ("kernel", "bias")),
    "dot": (("axes",), ()),
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


@dataclasses.dataclass(frozen=True)
class ArchivedLayer:
    """One layer of an archive. `tf_lowbit.export.archive` defines the types.

    Attributes:
        name: Unique name.
        type: Type, such as "integer_conv" or "max_pool".
        inputs: Names of the layers that it reads.
        shape: Shape of its output, without the batch; None is any size.
        input_grid: Grid of its first input; None for floats.
        grid: Grid of its output; None for floats.
        settings: The settings of its type.
        arrays: Name -> array in the file.
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
        return self.type in layer_table.INTEGER_KINDS

    @property
    def weight_count(self) -> int:
        """Number of weight codes; 0 for other layers."""
        return math.prod(self.settings["weight_shape"]) if self.is_integer else 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weight codes; 0 for other layers."""
        return self.arrays["weights"].nbytes if self.is_integer else 0

    def codes(self) -> np.ndarray:
        """The signed weight codes in the sum A: int32, in Keras's layout.

        Raises:
            ValueError: If the layer has no weight codes.
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
    """The contents of an archive.

    Attributes:
        library: Version of tf_lowbit that wrote it.
        options: Options of the export.
        notes: Differences from the trained network, a line each.
        inputs: Names of the network's inputs.
        outputs: Names of the layers whose outputs are the network's.
        layers: The layers in an order of execution.
    """

    library: str
    options: dict
    notes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[ArchivedLayer, ...]

    def layer(self, name: str) -> ArchivedLayer:
        """The layer with a name.

        Raises:
            ValueError: If there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = ", ".join(layer.name for layer in self.layers)
        raise ValueError(f"name must be one of {names}. Received: {name=}")

    @property
    def integer_layers(self) -> tuple[ArchivedLayer, ...]:
        """The layers with weight codes and thresholds."""
        return tuple(layer for layer in self.layers if layer.is_integer)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed weight codes."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def array_bytes(self) -> int:
        """Bytes of all arrays before compression."""
        return sum(a.nbytes for layer in self.layers for a in layer.arrays.values())


def load_archive(path: str | os.PathLike[str]) -> Archive:
    """Reads an archive, and checks that it is consistent.

    Args:
        path: Path of a file from `save_archive`.

    Returns:
        The contents of the archive.

    Raises:
        ValueError: If the file is not an archive, has another version, is damaged or
            inconsistent.
        OSError: If the file cannot be read.
    """
    content = file_bytes.content_of("path", checks.path("path", path))
    try:
        header, arrays = _parts(content)
    except Exception as error:  # A damaged file fails in many ways.
        raise ValueError(
            "path must be a complete archive from tf_lowbit.export.save_archive. "
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
            f"The parts of an archive must fit together. Received: {str(path)!r} "
            f"({type(error).__name__}: {error})"
        ) from error


def _parts(content: bytes):
    """The header and the other arrays of a file."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ValueError("not a ZIP file, or damaged")
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
            raise ValueError(f"layer {layer.name!r} occurs twice, or reads {unknown}")
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
            raise ValueError(f"an input or output of the network, {name!r}, is missing")
    return result


def _array(arrays, key, dtype, shape) -> np.ndarray:
    """Removes and returns an array, whose type and shape must match the header."""
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
            f"{layer.name} has {[*layer.settings, *arrays]}, unlike layers of type "
            f"{layer.type!r}"
        )
    return layer


def _check_integer_layer(layer) -> None:
    shape, arrays = layer.settings["weight_shape"], layer.arrays
    if layer.input_grid is None or layer.grid is None:
        raise ValueError(f"{layer.name} must read and output codes")
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
        raise ValueError(f"{layer.name} has descending thresholds")
    needed = {"strides", "padding", "dilation", "upscale"}
    if kind == twin.TRANSPOSED:
        needed |= {"before", "excess"}
    missing = needed - set(layer.settings)
    if missing:
        raise ValueError(f"{layer.name} lacks {sorted(missing)}")
    _unpacked(layer.settings, arrays["weights"])


def _unpacked(settings, weights) -> np.ndarray:
    """The weight codes without signs: int32, in Keras's layout."""
    grid, shape = settings["weight_grid"], tuple(settings["weight_shape"])
    if grid == CONSTANT:
        if weights.dtype != np.int8 or weights.shape != shape:
            raise ValueError(
                f"constant weights must be int8 {shape}. "
                f"Received: {weights.dtype} {weights.shape}"
            )
        return weights.astype(np.int32)
    indices = bit_packing.unpack(weights, settings["bits"], shape).astype(np.int32)
    if grid == ODD:
        return 2 * indices - (2 ** settings["bits"] - 1)
    if grid != SIGNED:
        raise ValueError(f"weight_grid must be known. Received: {grid!r}")
    codes = indices + settings["weight_low"]
    if codes.size and codes.max() > settings["weight_high"]:
        raise ValueError(
            f"codes must be at most {settings['weight_high']}. Received: {codes.max()}"
        )
    return codes
