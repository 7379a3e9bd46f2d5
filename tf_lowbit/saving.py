"""Loading quantized models without scopes."""

from tf_lowbit.compat import (
    LayerScale,
    StochasticDepth,
    deep_graphs,
    keras,
    tfmot,
    unpacked_archives,
)
from tf_lowbit.scheme.output_names import NamedOutputs
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

    Args:
        path: `.keras` file, `.h5` file or SavedModel folder.
        **arguments: of `keras.models.load_model`, such as `compile=False`.

    Returns:
        The network or the `LowBitTrainer`, compiled if it was.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is none of these formats, or damaged.
    """
    # A network within another one is read without its package's name in HDF5.
    own = {kind.__name__: kind for kind in (LowBitWrapper, NamedOutputs)}
    with (
        tfmot.quantization.keras.quantize_scope(own),
        unpacked_archives(),
        deep_graphs(),
    ):
        return keras.models.load_model(path, **arguments)
