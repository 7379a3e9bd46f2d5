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
    if isinstance(dataset, np.ndarray | tf.Tensor | tuple | dict | str | bytes):
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
    if len({np.ndim(part) for part in dataset}) > 1:
        return True
    # Rows of features and rows of labels; batches of images may differ in size.
    return np.ndim(dataset[0]) == 2 and len({np.shape(p)[1] for p in dataset}) > 1


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


def batches_for(network: keras.Model, dataset, batches: int | None) -> Iterator:
    """A dataset's first batches, each of them checked against a network's inputs.

    Args:
        network: which is to read them.
        dataset: iterable of batches, `x` or `(x, y)` or `(x, y, weight)`.
        batches: how many of them; None for all, of data that end.

    Returns:
        An iterator over the batches.

    Raises:
        ValueError: if `batches` is no count, or the data are endless and all of them
            are asked for, or as `batches_of` says; and, when it gets there, for a batch
            that the network does not take.
    """
    if batches is None:
        require_end(dataset)
    else:
        validate_batches(batches)
    return _fitting(network, itertools.islice(batches_of(dataset), batches))


def _fitting(network, batches) -> Iterator:
    for batch in batches:
        _require_fitting(network, inputs_in(batch))
        yield batch


def inputs_in(batch):
    """The inputs in a batch: `x` of `x`, `(x, y)` or `(x, y, weight)`."""
    return batch[0] if isinstance(batch, tuple) and batch else batch


def require_end(dataset) -> None:
    """Refuses a `tf.data.Dataset` without an end, where all of it is to be read.

    Raises:
        ValueError: if its cardinality is infinite.
    """
    cardinality = getattr(dataset, "cardinality", None)
    if callable(cardinality) and cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "Data must end where all of them are read: use dataset.take(n), or "
            "batches=n where the function has it. Received: an endless dataset"
        )


def _require_fitting(network, inputs) -> None:
    """Refuses inputs that a network does not take.

    Raises:
        ValueError: naming the shapes that it takes.
    """
    expected = [tuple(tensor.shape) for tensor in network.inputs]
    values = [_as_array(value) for value in tf.nest.flatten(inputs)]
    shapes = [tuple(value.shape) for value in values]
    are_numbers = all(_is_numeric(value.dtype) for value in values)
    # Of a dict Keras takes what it needs, by name.
    is_count = isinstance(inputs, dict) or len(shapes) == len(expected)
    fit = isinstance(inputs, dict) or all(map(_is_taken, shapes, expected))
    if not (are_numbers and is_count and fit):
        kinds = ", ".join(
            f"{value.dtype} {list(shape)}"
            for value, shape in zip(values, shapes, strict=True)
        )
        raise ValueError(
            "A batch must be x, (x, y) or (x, y, weight) as tuples, with numbers x of "
            f"shape {', '.join(map(str, expected))}; several inputs without labels are "
            f"((x1, x2),). Received: x of {kinds}"
        )
    if any(shape[:1] == (0,) for shape in shapes):
        raise ValueError(
            f"A batch must hold at least one example. Received: x of shapes {shapes}"
        )


def _as_array(value):
    has_shape = hasattr(value, "shape") and hasattr(value, "dtype")
    return value if has_shape else np.asarray(value)


def _is_numeric(dtype) -> bool:
    try:
        dtype = tf.as_dtype(dtype)
    except TypeError:  # NumPy's objects and texts of a fixed length.
        return False
    return dtype.is_floating or dtype.is_integer or dtype.is_bool


def _is_taken(shape, expected) -> bool:
    """Whether Keras takes a shape: it adds or leaves out a last axis of size 1."""
    if None in shape:
        return True
    forms = [shape, (*shape, 1)] + ([shape[:-1]] if shape[-1:] == (1,) else [])
    return any(
        len(form) == len(expected)
        and all(
            e in (None, size) for size, e in zip(form[1:], expected[1:], strict=True)
        )
        for form in forms
    )


def input_batches(network: keras.Model, dataset, batches: int) -> Iterator:
    """The inputs of a dataset's first batches, as `batches_for`.

    Raises:
        ValueError: at the end, if there was none.
    """
    batch = None
    for batch in batches_for(network, dataset, batches):
        yield inputs_in(batch)
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
        for inputs in input_batches(model, dataset, batches):
            for name, values in observer(inputs, training=training).items():
                seen[name].extend(keep(name, v) for v in tf.nest.flatten(values))
    return seen


def calibration_samples(model, tensors, batches: list) -> dict[str, list]:
    """Samples of what activation quantizers read in training.

    Where a quantizer stands in a ReLU6's place they are clipped at 6, as the network
    clipped them.

    Raises:
        ValueError: if there is no batch, or a value is NaN or infinite.
    """

    ceilings = {tensor.name: tensor.ceiling for tensor in tensors}

    def keep(name, values):
        try:
            found = ranges.thinned([tf.cast(values, tf.float32).numpy()])
            top = ceilings[name]
            return found if top is None else np.minimum(found, np.float32(top))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return quantizer_inputs(
        model, tensors, batches, max(len(batches), 1), training=True, keep=keep
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
