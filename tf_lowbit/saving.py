"""Loading quantized models without scopes."""

import os

from tf_lowbit.compat import keras, tfmot


def load_model(path, **arguments) -> keras.Model:
    """Loads a quantized model from an HDF5 file or a SavedModel folder.

    Latent weights, learned ranges, bits and batch statistics come back exactly.
    `model.save_weights` and `load_weights` work as ever on a model that `quantize`
    made from the same float model and the same rules.

    Args:
        path: `.h5` file or SavedModel folder, as `model.save` wrote it. The `.keras`
            format is refused: TF-MOT's wrapper does not reload from it.
        **arguments: of `keras.models.load_model`, such as `compile=False`.

    Raises:
        ValueError: if the path ends in `.keras`.
        OSError: if there is no such file.
    """
    if os.fspath(path).endswith(".keras"):
        raise ValueError(
            "path must be an .h5 file or a SavedModel folder: TF-MOT's wrapped layers "
            f"do not reload from .keras. Received: path={os.fspath(path)!r}"
        )
    with tfmot.quantization.keras.quantize_scope():
        return keras.models.load_model(path, **arguments)
