"""Loading quantized models without custom-object scopes."""

import os
import zipfile
import zlib
from typing import Any

from tf_lowbit.compat import (
    LayerScale,
    StochasticDepth,
    deep_graphs,
    keras,
    keras_safe_mode,
    tf,
    tfmot,
    unpacked_archives,
)
from tf_lowbit.core import checks
from tf_lowbit.core.files import require_plausible_zip
from tf_lowbit.network import keras3
from tf_lowbit.scheme.wrapper import LowBitWrapper

# Keras saves these two layers of its ConvNeXt but cannot load them again: they are
# neither public nor registered.
for _kind in (LayerScale, StochasticDepth):
    if keras.utils.get_registered_name(_kind) == _kind.__name__:
        keras.utils.register_keras_serializable(package="tf_keras")(_kind)

_ARGUMENTS = ("compile", "custom_objects", "options", "safe_mode")
# Of a zip and of an HDF5 file.
_STARTS = (b"PK", b"\x89HDF")


def load_model(path: str | os.PathLike[str], **arguments: Any) -> keras.Model:
    """Loads a quantized model from a file or folder that `model.save` wrote.

    Latent weights, learned ranges, bits and batch statistics are restored exactly from
    all three formats. The optimizer's state is restored from `.keras` and `.h5`, but
    not from a SavedModel. A `LowBitTrainer` is saved as `.keras`, and is loaded with
    its networks, optimizers and counters. `model.save_weights` and `load_weights` also
    work, on a model that `quantize` made from the same float model and rules.

    Files from strangers: loading a Python lambda would run its code, so `.keras` and
    `.h5` files with one are refused. Keras still imports the modules of the classes
    that a file names. A SavedModel holds a TensorFlow graph, which can read and write
    files when it runs.

    A `.keras` or `.h5` file of Keras 3 is converted as by `from_keras3`: the result is
    the float model, not compiled.

    Args:
        path: `.keras` file, `.h5` file or SavedModel folder.
        **arguments: Arguments of `keras.models.load_model`, such as `compile=False`.
            `safe_mode=False` allows lambdas, for files that you trust.

    Returns:
        The network or the `LowBitTrainer`, compiled if it was.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has none of these formats, is a SavedModel of Keras 3, is
            damaged, holds a lambda, or would unpack to more than 64 MiB and 200 times
            its size; or if an argument is unknown or of the wrong type.
    """
    checks.path("path", path)
    _check_arguments(arguments)
    if not tf.io.gfile.exists(path):
        raise FileNotFoundError(
            "path must be a .keras or .h5 file or a SavedModel folder that exists. "
            f"Received: {os.fspath(path)!r}"
        )
    if keras3.is_keras3_file(path):
        if zipfile.is_zipfile(path):
            require_plausible_zip(path)
        safe_mode = arguments.get("safe_mode", True)
        return keras3.from_keras3(keras3.load_file(path, safe_mode))
    _require_model(path)
    _refuse_exported(path)
    # HDF5 names the wrapper of a nested network without its package.
    own = {LowBitWrapper.__name__: LowBitWrapper}
    if zipfile.is_zipfile(path):
        require_plausible_zip(path)
    with (
        keras_safe_mode(arguments.get("safe_mode", True)),
        tfmot.quantization.keras.quantize_scope(own),
        unpacked_archives(),
        deep_graphs(),
    ):
        try:
            return keras.models.load_model(path, **arguments)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            # h5py raises a plain OSError for a damaged file. Subclasses of OSError are
            # errors of the disk.
            if isinstance(error, OSError) and type(error) is not OSError:
                raise
            raise ValueError(
                "path must be a whole .keras or .h5 file: save or copy it again. "
                f"Received: {os.fspath(path)!r} ({error})"
            ) from error


def _check_arguments(arguments) -> None:
    """Refuses what `keras.models.load_model` does not take."""
    for name, value in arguments.items():
        checks.choice("argument", name, _ARGUMENTS)
        if name in ("compile", "safe_mode"):
            checks.flag(name, value)
        elif value is not None and name == "custom_objects":
            checks.instance(name, value, dict)


def _require_model(path) -> None:
    """Refuses what is neither a `.keras` nor an `.h5` file nor a SavedModel folder."""
    if tf.io.gfile.isdir(path):
        names = tf.io.gfile.listdir(path)
        is_model = any(name.startswith("saved_model.pb") for name in names)
    else:
        with tf.io.gfile.GFile(os.fspath(path), "rb") as file:
            is_model = file.read(8).startswith(_STARTS)
    if not is_model:
        raise ValueError(
            "path must be a .keras or .h5 file or a SavedModel folder. "
            f"Received: {os.fspath(path)!r}, which is none of them"
        )


def _refuse_exported(path) -> None:
    """Refuses a SavedModel without the layers that `tf_keras` writes into it."""
    folder = os.fspath(path)
    graph = os.path.join(folder, "saved_model.pb")
    if not tf.io.gfile.exists(graph):
        return
    if not tf.io.gfile.exists(os.path.join(folder, "keras_metadata.pb")):
        # TensorFlow before 2.5 wrote the layers' settings beside the graph's objects.
        with tf.io.gfile.GFile(graph, "rb") as file:
            if b"_tf_keras_" in file.read():
                return
        raise ValueError(
            "A SavedModel must be written by tf_keras, because one of Keras 3 holds a "
            "graph without layers: save the Keras 3 model as a .keras file. "
            f"Received: {folder!r}"
        )
