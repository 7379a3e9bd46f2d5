"""Writer of packed archives; `tf_lowbit.export.archive` defines the format."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tf_lowbit.core import checks
from tf_lowbit.core.files import replace_file
from tf_lowbit.export import layer_table
from tf_lowbit.export.archive import bit_packing, reader
from tf_lowbit.export.integer import plain_layers, transposed, twin
from tf_lowbit.export.integer.int8_grids import Grid
from tf_lowbit.export.lowering.walk import Snapped
from tf_lowbit.export.types import ExportError
from tf_lowbit.network import graph
from tf_lowbit.version import __version__


def save_archive(snapped: Snapped, path: str | os.PathLike[str]) -> Path:
    """Writes an integer model (twin) with its present weights as a packed archive.

    The file is written under a temporary name, then renamed, so it is never partial.

    Args:
        snapped: Result of `snap`; its twin may have been fine-tuned.
        path: Path of the file, usually `.npz`.

    Returns:
        The path.

    Raises:
        ExportError: If an archive cannot hold a layer.
        OSError: If the file cannot be written. An existing file stays.
    """
    checks.instance(
        "snapped", snapped, Snapped, remedy="a result of snap, or an Export's .snapped"
    )
    checks.path("path", path)
    records: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    written: dict[str, Grid | None] = {}
    for index, node in enumerate(graph.nodes(snapped.twin)):
        inputs = [graph.producer(t).layer.name for t in node.keras_inputs]
        input_grid = written[inputs[0]] if inputs else None
        settings, own = _of_layer(node.layer)
        (output,) = graph.outputs_of(node)
        grid = _output_grid(node.layer, input_grid)
        written[node.layer.name] = grid
        own = {
            name: np.asarray(a, a.dtype.newbyteorder("<")) for name, a in own.items()
        }
        records.append(
            {
                "name": node.layer.name,
                "inputs": inputs,
                "shape": list(output.shape[1:]),
                "input_grid": input_grid and input_grid.get_config(),
                "grid": grid and grid.get_config(),
                "arrays": {n: [a.dtype.name, list(a.shape)] for n, a in own.items()},
                **settings,
            }
        )
        arrays |= {f"{index}.{name}": array for name, array in own.items()}
    header = {
        "format": reader.FORMAT,
        "version": reader.FORMAT_VERSION,
        "library": __version__,
        "options": snapped.options.as_dict(),
        "notes": [str(note) for note in snapped.notes],
        "inputs": [graph.producer(t).layer.name for t in snapped.twin.inputs],
        "outputs": [graph.producer(t).layer.name for t in snapped.twin.outputs],
        "layers": records,
    }
    text = json.dumps(header, indent=1).encode()
    content = io.BytesIO()
    parts: dict[str, Any] = {reader.HEADER: np.frombuffer(text, np.uint8), **arrays}
    np.savez_compressed(content, **parts)
    return replace_file(path, content.getvalue())


def _output_grid(layer, input_grid) -> Grid | None:
    if isinstance(layer, twin.ToValues | plain_layers.ArgMax):
        return None
    return getattr(layer, "grid", input_grid)


def _of_layer(layer):
    """Type and settings of a twin's layer; name -> array."""
    if isinstance(layer, twin.IntegerLinear):
        return _of_integer_layer(layer)
    row = layer_table.row_of(layer)
    if row is None:
        raise ExportError(
            "Every layer must be of a type that archives have. "
            f"Received: {layer.name!r} of type {type(layer).__name__}"
        )
    kind, config = row.kind, layer.get_config()
    keys, names = reader.FORMS[kind]
    if config.get("data_format") == "channels_first":
        raise ExportError(
            "Layers must be channels_last. "
            f"Received: {layer.name!r} with data_format='channels_first'"
        )
    arrays = dict(zip(names, layer.get_weights(), strict=True))
    if kind == "transposed":
        config |= transposed.placement(layer)
    settings = {key: _plain(config[key]) for key in keys}
    return {"type": kind, **settings}, arrays


def _plain(value):
    """A JSON-ready setting; Keras holds some as arrays of one number."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _of_integer_layer(layer):
    """`_of_layer` for a layer with weight codes."""
    weights, grid, steps = _packed_weights(layer)
    arrays = {
        "weights": weights,
        **steps,
        "signs": layer.signs.numpy().astype(np.int8),
        "thresholds": layer.thresholds.numpy(),
        "biases": layer.biases.numpy(),
        "weight_scales": layer.weight_scales.numpy(),
    }
    settings = {
        "type": layer_table.row_of(layer).kind,
        "weight_shape": list(layer.kernel_shape),
        **grid,
        "strides": list(layer.strides),
        "padding": layer.padding,
        "dilation": list(layer.dilation),
        "upscale": layer.upscale,
        "kernel": layer.kernel,
        "storage": layer.storage,
        "represents": layer.represents,
    }
    if layer.kind == twin.TRANSPOSED:
        settings |= {"before": list(layer.before), "excess": list(layer.excess)}
    return settings, arrays


def _packed_weights(layer):
    """The array of weights, the settings of its grid, and the array of steps."""
    if layer.quantizer is None:
        codes = layer.latent.numpy()
        return codes.astype(np.int8), {"weight_grid": reader.CONSTANT}, {}
    variables = layer.quantizer_variables
    codes = layer.quantizer.codes(layer.latent, variables).numpy()
    step = np.asarray(layer.quantizer.step(layer.latent, variables), np.float32)
    steps = np.broadcast_to(np.ravel(step), (layer.channels,))
    levels = layer.quantizer.level_codes(int(variables["bits"].numpy()))
    if not np.isin(codes, levels).all():
        raise ExportError(
            "Weight codes must be among the quantizer's level_codes. "
            f"Received: {layer.name!r} with codes from {codes.min()} to {codes.max()}, "
            f"{levels}"
        )
    grid = _weight_grid(levels)
    step = 2 if grid["weight_grid"] == reader.ODD else 1
    packed = bit_packing.pack((codes - levels[0]) // step, grid["bits"])
    return packed, grid, {"steps": steps}


def _weight_grid(levels: range) -> dict:
    """The settings of a grid of weight codes."""
    bits = len(levels).bit_length() - 1
    # At one bit the signed grid is {-1, +1}, the odd one.
    if levels == range(1 - 2**bits, 2**bits, 2):
        return {"weight_grid": reader.ODD, "bits": bits}
    low, high = levels[0], levels[-1]
    return {
        "weight_grid": reader.SIGNED,
        "bits": (high - low).bit_length(),
        "weight_low": low,
        "weight_high": high,
    }
