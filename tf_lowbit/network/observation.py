"""Runs a network on batches to observe its tensors."""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tf_lowbit.compat import deep_graphs, keras, tf
from tf_lowbit.core import checks
from tf_lowbit.network import graph
from tf_lowbit.network.inspection import QuantizedTensor
from tf_lowbit.quantizers import ranges

# Base class of Keras layers that are random in training: dropout, noise, augmentation.
RANDOM = keras.__internal__.layers.BaseRandomLayer


def validate_batches(batches: int) -> None:
    """Raises ValueError if a number of batches is not an integer of at least 1."""
    checks.integer("batches", batches, at_least=1)


def batches_of(dataset: Any) -> Iterator:
    """Iterates over batches.

    Raises:
        ValueError: If the data are arrays, also in a list `[x, y]`, because iterating
            would yield single examples; or if they are not iterable.
    """
    if isinstance(dataset, np.ndarray | tf.Tensor | tuple | dict | str | bytes):
        raise ValueError(
            "Data must be an iterable of batches: make one from arrays with "
            "tf.data.Dataset.from_tensor_slices((x, y)).batch(32). "
            f"Received: {type(dataset).__name__}"
        )
    if _is_pair(dataset):
        raise ValueError(
            "Data must be a list of batches of one kind, x or (x, y): make one from "
            "arrays with tf.data.Dataset.from_tensor_slices((x, y)).batch(32). "
            f"Received: a list of arrays of shapes {[np.shape(a) for a in dataset]}"
        )
    if not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
        raise ValueError(
            "Data must be an iterable of batches, such as a tf.data.Dataset. "
            f"Received: {type(dataset).__name__}"
        )
    return iter(dataset)


def _is_pair(dataset) -> bool:
    """Guesses from shapes whether a list holds inputs and labels, not batches."""
    if not isinstance(dataset, list) or len(dataset) not in (2, 3):
        return False
    if not all(isinstance(part, np.ndarray | tf.Tensor) for part in dataset):
        return False
    if len({np.ndim(part) for part in dataset}) > 1:
        return True
    # Features and labels differ in width. Batches of images may differ in size.
    return np.ndim(dataset[0]) == 2 and len({np.shape(p)[1] for p in dataset}) > 1


def require_rereadable(dataset: Any) -> None:
    """Raises ValueError for data that can be read only once, and for arrays."""
    if batches_of(dataset) is dataset:
        raise ValueError(
            "dataset must be one that can be read again from its start, such as a list "
            "of batches or a tf.data.Dataset; a generator can be read only once. "
            f"Received: {type(dataset).__name__}"
        )


def batches_for(
    network: keras.Model, dataset: Iterable[Any], batches: int | None
) -> Iterator:
    """Yields a dataset's first batches, each checked against a network's inputs.

    Args:
        network: Network that will read them.
        dataset: Iterable of batches, `x` or `(x, y)` or `(x, y, weight)`.
        batches: Number of batches; None for all of a finite dataset.

    Raises:
        ValueError: As `batches_of`, or if `batches` is not at least 1, or is None for
            an endless dataset. While iterating: if a batch does not fit the network.
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


def inputs_in(batch: Any) -> Any:
    """Returns the inputs in a batch: `x` of `x`, `(x, y)` or `(x, y, weight)`."""
    return batch[0] if isinstance(batch, tuple) and batch else batch


def require_end(dataset: Any) -> None:
    """Raises ValueError for an endless `tf.data.Dataset`."""
    cardinality = getattr(dataset, "cardinality", None)
    if callable(cardinality) and cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "Data must be finite where all of it is read: use dataset.take(n), or "
            "batches=n if the function has it. Received: an endless dataset"
        )


def _require_fitting(network, inputs) -> None:
    """Raises ValueError, with the accepted shapes, if inputs do not fit a network."""
    if isinstance(inputs, dict):
        inputs = in_order(network, inputs)
    expected = [tuple(tensor.shape) for tensor in network.inputs]
    values = [_as_array(value) for value in tf.nest.flatten(inputs)]
    shapes = [tuple(value.shape) for value in values]
    are_numbers = all(map(_is_numeric, values))
    is_count = len(shapes) == len(expected)
    if not (are_numbers and is_count and all(map(_is_taken, shapes, expected))):
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


def in_order(network: keras.Model, inputs: Mapping[str, Any]) -> list:
    """Returns the parts of a dict that a network takes, in the order of its inputs.

    Raises:
        ValueError: If one is missing.
    """
    nested = network.input
    names = (
        sorted(nested)  # Keras's order of a dict.
        if isinstance(nested, dict)
        else [tensor._keras_history.layer.name for tensor in network.inputs]
    )
    missing = [name for name in names if name not in inputs]
    if missing:
        raise ValueError(
            f"A batch that is a dict must have an entry for each input, {names}. "
            f"Received: {list(inputs)}"
        )
    return [inputs[name] for name in names]


def _as_array(value):
    has_shape = hasattr(value, "shape") and hasattr(value, "dtype")
    return value if has_shape else np.asarray(value)


def _is_numeric(value) -> bool:
    if isinstance(value, tf.RaggedTensor | tf.SparseTensor):
        return False
    try:
        dtype = tf.as_dtype(value.dtype)
    except TypeError:  # NumPy objects and fixed-length strings.
        return False
    return dtype.is_floating or dtype.is_integer or dtype.is_bool


def _is_taken(shape, expected) -> bool:
    """Tells whether Keras accepts a shape: it adds or drops a last axis of size 1."""
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


def input_batches(
    network: keras.Model, dataset: Iterable[Any], batches: int
) -> Iterator:
    """Yields the inputs of a dataset's first batches, as `batches_for`.

    Raises:
        ValueError: At the end, if there was no batch.
    """
    batch = None
    for batch in batches_for(network, dataset, batches):
        yield inputs_in(batch)
    if batch is None:
        raise ValueError("dataset must hold at least one batch. Received: none")


def quantizer_inputs(
    model: keras.Model,
    tensors: Iterable[QuantizedTensor],
    dataset: Iterable[Any],
    batches: int,
    *,
    training: bool,
    keep: Callable = lambda name, values: values,
) -> dict[str, list]:
    """Records the inputs of activation quantizers.

    Args:
        model: A network.
        tensors: The activation quantizers to record.
        dataset: Iterable of batches.
        batches: Number of batches to use.
        training: Whether normalization uses each batch's statistics, and random layers
            are random.
        keep: Function (name, tensor) -> the record.

    Returns:
        Name -> list of records, for each batch one per call of the layer.
    """
    read = {t.name: graph.inputs_of(model, t.layer) for t in tensors}
    seen: dict[str, list] = {name: [] for name in read}
    if read:
        # Not `inputs`: a dict's keys may differ from the layers' names.
        with deep_graphs():
            observer = keras.Model(model.input, read)
        for inputs in input_batches(model, dataset, batches):
            for name, values in observer(inputs, training=training).items():
                seen[name].extend(keep(name, v) for v in tf.nest.flatten(values))
    return seen


def calibration_samples(
    model: keras.Model, tensors: Sequence[QuantizedTensor], batches: list
) -> dict[str, list]:
    """Records samples of the inputs of activation quantizers in training.

    If a quantizer replaced a ReLU6, samples are clipped at 6, as in the float network.

    Raises:
        ValueError: If there is no batch, or a value is NaN or infinite.
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
    """A context in which random layers are off in training, as in inference."""
    layers = [module for module in model.submodules if isinstance(module, RANDOM)]
    for layer in layers:
        layer.call = functools.partial(_at_rest, layer.call)
    try:
        yield
    finally:
        for layer in layers:
            del layer.call  # Uncovers the class's method.


def _at_rest(call, inputs, *args, **kwargs):
    given = inspect.signature(call).bind(inputs, *args, **kwargs)
    given.arguments["training"] = False
    return call(*given.args, **given.kwargs)


@contextlib.contextmanager
def changed_setting(
    model: keras.Model, kinds: type | tuple[type, ...], name: str
) -> Iterator[list]:
    """Yields the layers of some kinds; restores their attribute `name` afterwards."""
    layers = [module for module in model.submodules if isinstance(module, kinds)]
    values = [getattr(layer, name) for layer in layers]
    try:
        yield layers
    finally:
        for layer, value in zip(layers, values, strict=True):
            setattr(layer, name, value)
