"""Writing a twin as a packed archive: `tf_lowbit.export.archive` has the format."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np

from tf_lowbit.compat import keras
from tf_lowbit.core import checks, packing
from tf_lowbit.export import archive, files, transposed, twin
from tf_lowbit.export.grids import Grid
from tf_lowbit.export.snapping import ExportError, Snapped
from tf_lowbit.scheme import graph
from tf_lowbit.version import __version__

_layers = keras.layers
# Layers of a twin -> type in the archive.
_TYPES = {
    _layers.InputLayer: "input",
    twin.ToCodes: "to_codes",
    twin.ToValues: "to_values",
    twin.EdgePadding: "edge_pad",
    twin.IntegerAdd: "integer_add",
    twin.Affine: "affine",
    _layers.Activation: "activation",
    _layers.Add: "add",
    _layers.AveragePooling1D: "average_pool",
    _layers.AveragePooling2D: "average_pool",
    _layers.Concatenate: "concatenate",
    _layers.Conv1D: "conv",
    _layers.Conv2D: "conv",
    _layers.Conv2DTranspose: "transposed",
    _layers.Cropping1D: "crop",
    _layers.Cropping2D: "crop",
    _layers.Dense: "dense",
    _layers.DepthwiseConv1D: "depthwise",
    _layers.DepthwiseConv2D: "depthwise",
    _layers.Flatten: "flatten",
    _layers.GlobalAveragePooling1D: "global_average_pool",
    _layers.GlobalAveragePooling2D: "global_average_pool",
    _layers.GlobalMaxPooling1D: "global_max_pool",
    _layers.GlobalMaxPooling2D: "global_max_pool",
    _layers.LayerNormalization: "layer_norm",
    _layers.LeakyReLU: "leaky_relu",
    _layers.MaxPooling1D: "max_pool",
    _layers.MaxPooling2D: "max_pool",
    _layers.Multiply: "multiply",
    _layers.Permute: "permute",
    _layers.PReLU: "prelu",
    _layers.ReLU: "relu",
    _layers.Reshape: "reshape",
    _layers.UpSampling1D: "upsample",
    _layers.UpSampling2D: "upsample",
    _layers.ZeroPadding1D: "zero_pad",
    _layers.ZeroPadding2D: "zero_pad",
}


def save_archive(snapped: Snapped, path) -> Path:
    """Writes a twin as a packed archive, with the weights that it has now.

    The file is written under a temporary name, then renamed: it is whole or not there.

    Args:
        snapped: of `snap`; its twin may have been fine-tuned.
        path: where the file goes; `.npz` by custom.

    Returns:
        The path.

    Raises:
        ExportError: if a layer has no form in an archive.
        OSError: if the file cannot be written. One that is there stays.
    """
    checks.instance(
        "snapped", snapped, Snapped, remedy="what snap returns, or an Export's .snapped"
    )
    checks.path("path", path)
    records, arrays, written = [], {}, {}
    for index, node in enumerate(graph.nodes(snapped.twin)):
        inputs = [graph.producer(t).layer.name for t in node.keras_inputs]
        input_grid = written[inputs[0]] if inputs else None
        settings, own = _of_layer(node.layer)
        (output,) = graph.outputs_of(node)
        grid = _output_grid(node.layer, input_grid)
        written[node.layer.name] = grid
        own = {name: np.asarray(a, _little(a.dtype)) for name, a in own.items()}
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
        "format": archive.FORMAT,
        "version": archive.FORMAT_VERSION,
        "library": __version__,
        "options": dataclasses.asdict(snapped.options),
        "notes": [str(note) for note in snapped.notes],
        "inputs": [graph.producer(t).layer.name for t in snapped.twin.inputs],
        "outputs": [graph.producer(t).layer.name for t in snapped.twin.outputs],
        "layers": records,
    }
    text = json.dumps(header, indent=1).encode()
    content = io.BytesIO()
    np.savez_compressed(
        content, **{archive.HEADER: np.frombuffer(text, np.uint8)}, **arrays
    )
    return files.replace_file(path, content.getvalue())


def _little(dtype) -> np.dtype:
    return dtype.newbyteorder("<")


def _output_grid(layer, input_grid) -> Grid | None:
    if isinstance(layer, twin.ToValues):
        return None
    return getattr(layer, "grid", input_grid)


def _of_layer(layer):
    """Type and settings of a twin's layer, and its arrays by name."""
    if isinstance(layer, twin.IntegerLinear):
        return _of_integer_layer(layer)
    if type(layer) not in _TYPES:
        raise ExportError(
            "Every layer must have a form in an archive. "
            f"Received: {layer.name!r} of type {type(layer).__name__}"
        )
    kind = _TYPES[type(layer)]
    config = layer.get_config()
    if config.get("interpolation") == "bilinear":
        kind = "interpolate"
    keys, names = archive.FORMS[kind]
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
    """A setting as JSON has it; Keras holds some as arrays of one number."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _of_integer_layer(layer):
    """`_of_layer` of one with weight codes."""
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
        "type": f"integer_{layer.kind}",
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
    """The array of weights, what says how to read it, and the steps' array."""
    if layer.quantizer is None:
        codes = layer.latent.numpy()
        return codes.astype(np.int8), {"weight_grid": archive.CONSTANT}, {}
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
    step = 2 if grid["weight_grid"] == archive.ODD else 1
    packed = packing.pack((codes - levels[0]) // step, grid["bits"])
    return packed, grid, {"steps": steps}


def _weight_grid(levels: range) -> dict:
    """How an archive says which codes there are."""
    bits = len(levels).bit_length() - 1
    # At one bit the signed grid is {-1, +1}, the odd one.
    if levels == range(1 - 2**bits, 2**bits, 2):
        return {"weight_grid": archive.ODD, "bits": bits}
    low, high = levels[0], levels[-1]
    return {
        "weight_grid": archive.SIGNED,
        "bits": (high - low).bit_length(),
        "weight_low": low,
        "weight_high": high,
    }
