"""Running a network on batches to see what is within it."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tf_lowbit.compat import deep_graphs, keras, tf
from tf_lowbit.core import checks
from tf_lowbit.inspection import QuantizedTensor
from tf_lowbit.quantizers import ranges
from tf_lowbit.scheme import graph

# All of Keras's that draw in training: dropout, noise, augmentation.
RANDOM = keras.__internal__.layers.BaseRandomLayer


def validate_batches(batches: int) -> None:
    """Raises ValueError where a number of batches is no integer of at least 1."""
    checks.integer("batches", batches, at_least=1)


def batches_of(dataset) -> Iterator:
    """Iterates over batches.

    Raises:
        ValueError: if they are arrays, over whose examples it would go, also in a list
            `[x, y]`; or nothing that can be iterated over.
    """
    if isinstance(dataset, np.ndarray | tf.Tensor | tuple | dict):
        raise ValueError(
            "Data must be an iterable of batches; arrays become one by "
            "tf.data.Dataset.from_tensor_slices((x, y)).batch(32). "
            f"Received: {type(dataset).__name__}"
        )
    if _is_pair(dataset):
        raise ValueError(
            "Data must be a list of batches of one kind, x or (x, y); arrays [x, y] "
            "become one by tf.data.Dataset.from_tensor_slices((x, y)).batch(32). "
            f"Received: a list of arrays of shapes {[np.shape(a) for a in dataset]}"
        )
    if not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
        raise ValueError(
            "Data must be an iterable of batches, such as a tf.data.Dataset. "
            f"Received: {type(dataset).__name__}"
        )
    return iter(dataset)


def _is_pair(dataset) -> bool:
    """Whether a list holds inputs and labels: arrays that differ within an example."""
    if not isinstance(dataset, list) or len(dataset) not in (2, 3):
        return False
    if not all(isinstance(part, np.ndarray | tf.Tensor) for part in dataset):
        return False
    return len({np.ndim(part) for part in dataset}) > 1


def require_rereadable(dataset) -> None:
    """Refuses data that are used up when they were gone over once.

    Raises:
        ValueError: for a generator or another iterator, and for arrays.
    """
    if batches_of(dataset) is dataset:
        raise ValueError(
            "dataset must be one that can be read again from its start, such as a list "
            "of batches or a tf.data.Dataset; a generator can be read only once. "
            f"Received: {type(dataset).__name__}"
        )


def input_batches(dataset, batches: int) -> Iterator:
    """The inputs of a dataset's first batches: `x` of `x`, `(x, y)`, `(x, y, weight)`.

    Raises:
        ValueError: at the end, if there was none.
    """
    batch = None
    for batch in itertools.islice(batches_of(dataset), batches):
        yield batch[0] if isinstance(batch, tuple) else batch
    if batch is None:
        raise ValueError("dataset must hold at least one batch. Received: none")


def quantizer_inputs(
    model: keras.Model,
    tensors: Iterable[QuantizedTensor],
    dataset,
    batches: int,
    *,
    training: bool,
    keep: Callable = lambda name, values: values,
) -> dict[str, list]:
    """What activation quantizers read.

    Args:
        model: a network.
        tensors: its activation quantizers that are asked for.
        dataset: iterable of batches.
        batches: how many of them to use.
        training: whether normalisation uses each batch's own statistics, and random
            layers draw.
        keep: function (name, tensor) -> what is kept of it.

    Returns:
        Name -> what is kept, for each batch one of each call of the layer.

    Raises:
        ValueError: if the dataset is empty.
    """
    read = {t.name: graph.inputs_of(model, t.layer) for t in tensors}
    seen: dict[str, list] = {name: [] for name in read}
    if read:
        # Not `inputs`: a dict of them may have other names than its layers.
        with deep_graphs():
            observer = keras.Model(model.input, read)
        for inputs in input_batches(dataset, batches):
            for name, values in observer(inputs, training=training).items():
                seen[name].extend(keep(name, v) for v in tf.nest.flatten(values))
    return seen


def calibration_samples(model, tensors, batches: list) -> dict[str, list]:
    """Samples of what activation quantizers read in training.

    Raises:
        ValueError: if there is no batch, or a value is NaN or infinite.
    """

    def keep(name, values):
        try:
            return ranges.thinned([tf.cast(values, tf.float32).numpy()])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return quantizer_inputs(
        model, tensors, batches, len(batches), training=True, keep=keep
    )


@contextlib.contextmanager
def without_draws(model: keras.Model) -> Iterator[None]:
    """A context in which Keras's random layers do in training what they do else."""
    layers = [module for module in model.submodules if isinstance(module, RANDOM)]
    for layer in layers:
        layer.call = functools.partial(_at_rest, layer.call)
    try:
        yield
    finally:
        for layer in layers:
            del layer.call  # The class's is left.


def _at_rest(call, inputs, *args, **kwargs):
    del args, kwargs
    return call(inputs, training=False)


@contextlib.contextmanager
def changed_setting(model: keras.Model, kinds, name: str) -> Iterator[list]:
    """Yields the layers of some kinds; puts their setting `name` back afterwards."""
    layers = [module for module in model.submodules if isinstance(module, kinds)]
    values = [getattr(layer, name) for layer in layers]
    try:
        yield layers
    finally:
        for layer, value in zip(layers, values, strict=True):
            setattr(layer, name, value)
