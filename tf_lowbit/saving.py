"""Loading quantized models without scopes."""

import os
import zipfile
import zlib

from tf_lowbit import keras3
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
from tf_lowbit.scheme.wrapper import LowBitWrapper

# Keras saves these two layers of its ConvNeXt, and cannot load what it saved: they are
# neither public nor registered.
for _kind in (LayerScale, StochasticDepth):
    if keras.utils.get_registered_name(_kind) == _kind.__name__:
        keras.utils.register_keras_serializable(package="tf_keras")(_kind)


def load_model(path, **arguments) -> keras.Model:
    """Loads a quantized model from a file or folder that `model.save` wrote.

    Latent weights, learned ranges, bits and batch statistics come back exactly, in all
    three formats; so does the optimizer's state, which a SavedModel alone starts anew,
    as Keras has it; and so do the networks, optimizers and counters of a
    `LowBitTrainer`, which is saved as `.keras`. `model.save_weights` and
    `load_weights` work as ever on a model that `quantize` made from the same float
    model and the same rules.

    A file from a stranger: a Python lambda is code that loading would run; `.keras` and
    `.h5` files with one are refused. Keras still imports the modules of the classes
    that a file names. A SavedModel holds a TensorFlow graph, which can read and write
    files when it runs.

    A `.keras` or `.h5` file of Keras 3 is converted, as by `from_keras3`: what comes
    back is the float model, not compiled.

    Args:
        path: `.keras` file, `.h5` file or SavedModel folder.
        **arguments: of `keras.models.load_model`, such as `compile=False`.
            `safe_mode=False` lets lambdas in, for files that you trust.

    Returns:
        The network or the `LowBitTrainer`, compiled if it was.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none of these formats, a SavedModel of Keras 3, damaged,
            holds a lambda, or would unpack to far more than a file of its size should
            hold.
    """
    checks.path("path", path)
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
    _refuse_exported(path)
    # A network within another one is read without its package's name in HDF5.
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
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(
                "path must be a whole .keras file: save or copy it again. "
                f"Received: {os.fspath(path)!r} ({error})"
            ) from error


def _refuse_exported(path) -> None:
    """Refuses a SavedModel without what `tf_keras` writes beside the graph."""
    folder = os.fspath(path)
    has = {
        name: tf.io.gfile.exists(os.path.join(folder, name))
        for name in ("saved_model.pb", "keras_metadata.pb")
    }
    if has["saved_model.pb"] and not has["keras_metadata.pb"]:
        raise ValueError(
            "A SavedModel must be one that tf_keras wrote: one of Keras 3 holds a "
            "graph and no layers. Save the Keras 3 model as a .keras file. "
            f"Received: {folder!r}"
        )
