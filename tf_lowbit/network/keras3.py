"""Converts Keras 3 models to `tf_keras`, on which TF-MOT and this library work."""

import importlib
import inspect
import json
import os
import re
import sys
import types
import zipfile
from typing import Any

import h5py
import numpy as np

from tf_lowbit.compat import deep_graphs, is_keras3, keras, tf
from tf_lowbit.network import keras3_counterparts as counterparts
from tf_lowbit.network import keras3_operations

# Of TensorFlow's scopes.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Float32 sums may differ in their order.
_TOLERANCE = 1e-4
# Tried in turn until the network accepts one.
_SIZES_OF_OPEN_DIMENSIONS = (32, 64, 128, 256)


@deep_graphs()
def from_keras3(model: Any) -> keras.Model:
    """Converts a Keras 3 model to `tf_keras`, with its weights.

    `tf_lowbit.quantize` converts its model itself. Use this function for a teacher, or
    for a float network to compare with. Layers keep their names. Before the new model
    is returned, both models' outputs are compared on random inputs.

    Args:
        model: Built Sequential or Functional model of Keras 3, of any backend, or the
            path of a `.keras` or `.h5` file with one. It is not changed. Nested models
            are converted too.

    Returns:
        A Functional model of `tf_keras`, not compiled, that computes the same.

    Raises:
        ValueError: If the model is not of Keras 3, is not built or is subclassed; if a
            layer or operation has no counterpart in `tf_keras` (the message names it
            and the reason), or a name that TensorFlow refuses; or if the outputs
            differ.
    """
    if isinstance(model, str | os.PathLike) and is_keras3_file(model):
        model = load_file(model)
    if not is_keras3(model):
        raise ValueError(
            "model must be a model of Keras 3, or a .keras or .h5 file with one. "
            f"Received: {type(model).__module__}.{type(model).__name__}"
        )
    converted = _FromKeras3().of(model)
    _check_outputs(model, converted)
    return converted


def is_keras3_file(path: Any) -> bool:
    """Tells whether a path is a `.keras` or `.h5` file that Keras 3 wrote."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                version = json.loads(archive.read("metadata.json"))["keras_version"]
        elif os.path.isfile(path) and h5py.is_hdf5(path):
            with h5py.File(path) as file:
                version = file.attrs["keras_version"]
        else:
            return False
    except (zipfile.BadZipFile, OSError, KeyError, TypeError, ValueError):
        return False  # Damaged, or not a model: `tf_keras` reports what is missing.
    version = version.decode() if isinstance(version, bytes) else str(version)
    return version.partition(".")[0] == "3"


def load_file(path: str | os.PathLike[str], safe_mode: bool = True) -> Any:
    """Loads a Keras 3 model, not compiled, from a file that `is_keras3_file` accepts.

    `safe_mode` refuses a Python lambda.

    Raises:
        ValueError: If Keras 3 cannot load it.
    """
    saving = importlib.import_module("keras").saving
    try:
        return saving.load_model(path, compile=False, safe_mode=safe_mode)
    except Exception as error:  # Many kinds, with long configurations in the text.
        raise ValueError(
            "path must be a whole file of a Keras 3 model, made of Keras's own layers; "
            "register layers of your own with Keras 3 and load the model there. "
            f"Received: {os.fspath(path)!r} ({counterparts.short(error)})"
        ) from error


# Objects that `compile` may get: base class -> module of its subclasses.
_FAMILIES = {
    "optimizers.schedules.LearningRateSchedule": "optimizers.schedules",
    "optimizers.Optimizer": "optimizers",
    "losses.Loss": "losses",
    "metrics.Metric": "metrics",
}


def as_tf_keras(value: Any) -> Any:
    """Converts Keras 3 optimizers, losses, metrics and schedules to `tf_keras`.

    They are made from their configuration. State, such as moments, starts fresh.

    Args:
        value: One of them, or a list, tuple or dict. Other values stay as they are.

    Returns:
        The same structure.

    Raises:
        ValueError: If there is no counterpart in `tf_keras`.
    """
    if type(value) in (list, tuple, dict):
        return _map(as_tf_keras, value)
    for base, family in _FAMILIES.items():
        if is_keras3(value, base):
            return _made_anew(value, family)
    module = getattr(value, "__module__", None) or ""
    if isinstance(value, types.FunctionType) and module.startswith("keras."):
        name = value.__name__
        found = getattr(keras.losses, name, None) or getattr(keras.metrics, name, None)
        if found is None:
            raise ValueError(
                f"A function must be one of tf_keras: write it with TensorFlow's "
                f"operations. Received: {name} of Keras 3"
            )
        return found
    return value


def _made_anew(value, family: str):
    name = type(value).__name__
    source = _public(sys.modules["keras"], family, name)
    kind = _public(keras, family, name)

    def refusal(reason):
        return ValueError(
            "Optimizers, losses and metrics must be of tf_keras or have a counterpart "
            f"in it: use one of tf_keras.{family}. Received: {name} of Keras 3: "
            f"{reason}"
        )

    if kind is None or type(value) is not source:
        raise refusal("tf_keras has none of that class")
    config = value.get_config()
    if "learning_rate" in config and family == "optimizers":
        # The configuration of a schedule would be of Keras 3.
        rate = getattr(value, "_learning_rate", None)
        is_schedule = is_keras3(rate, "optimizers.schedules.LearningRateSchedule")
        config["learning_rate"] = (
            as_tf_keras(rate) if is_schedule else float(config["learning_rate"])
        )
    if config.get("dtype") is not None:
        config["dtype"] = str(value.dtype)
    known = set(inspect.signature(kind.__init__).parameters)
    defaults = inspect.signature(type(value).__init__).parameters
    for key in [key for key in config if key not in known]:
        setting = config.pop(key)
        default = defaults[key].default if key in defaults else None
        if setting is not None and setting not in (default, False, "float32"):
            raise refusal(f"tf_keras has no {key}={setting!r}")
    try:
        return kind(**config)
    except (TypeError, ValueError) as error:
        raise refusal(counterparts.short(error)) from error


def _public(module, family: str, name: str):
    for part in (*family.split("."), name):
        module = getattr(module, part, None)
    return module


def require_callbacks(callbacks: Any) -> None:
    """Refuses Keras 3 callbacks, which need the internals of a Keras 3 model."""
    for callback in tf.nest.flatten(callbacks or []):
        if is_keras3(callback, "callbacks.Callback"):
            name = type(callback).__name__
            own = name if hasattr(keras.callbacks, name) else "Callback"
            raise ValueError(
                f"callbacks must be of tf_keras: make it of tf_keras.callbacks.{own}. "
                f"Received: {name} of Keras 3"
            )


class _FromKeras3:
    """Converts a model; keeps converted layers, so that two calls share one layer."""

    def __init__(self):
        self._layers: dict[int, keras.layers.Layer] = {}

    def of(self, model) -> keras.Model:
        _require_name(model.name)
        graph = _graph_of(model)
        made: dict[int, object] = {}

        def new_input(tensor):
            layer = tensor._keras_history.operation
            _require_name(layer.name)
            made[id(tensor)] = keras.Input(
                batch_shape=tensor.shape, dtype=tensor.dtype, name=layer.name
            )
            return made[id(tensor)]

        inputs = _map(new_input, graph._inputs_struct)
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                args, kwargs = node.arguments.fill_in(made)
                results = self._called(node, args, kwargs)
                outputs = tf.nest.flatten(results)
                for old, new in zip(node.outputs, outputs, strict=True):
                    made[id(old)] = new
        outputs = _map(lambda tensor: made[id(tensor)], graph._outputs_struct)
        return keras.Model(inputs, outputs, name=model.name)

    def _called(self, node, args, kwargs):
        operation = node.operation
        if isinstance(operation, sys.modules["keras"].layers.Layer):
            # Some layers of tf_keras do not take all arguments that may be None. And
            # Keras 3 records the default of `training`, which would be fixed here.
            called = inspect.signature(operation.call).parameters.get("training")
            given = {
                name: v
                for name, v in kwargs.items()
                if v is not None and not (name == "training" and v is called.default)
            }
            return self._called_layer(operation, args, given)
        try:
            function = self._layers.get(id(operation)) or keras3_operations.layer(node)
            if function is not None:
                self._layers[id(operation)] = function  # It may be called again.
            else:
                function = keras3_operations.function(node)
            return function(*args, **kwargs)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise _no_operation(node, counterparts.short(error)) from error

    def _called_layer(self, layer, args, kwargs):
        is_new = id(layer) not in self._layers
        outputs = self._converted(layer)(*args, **kwargs)
        if is_new:
            counterparts.copy_weights(layer, self._layers[id(layer)])
        return outputs

    def _converted(self, layer):
        """Returns the counterpart of a layer or model, which is made once."""
        if id(layer) not in self._layers:
            _require_name(layer.name)
            if isinstance(layer, sys.modules["keras"].Model):
                converted = self.of(layer)
                if not layer.trainable:
                    converted.trainable = False
            else:
                inner = {
                    key: _map(self._converted, part)
                    for key, part in counterparts.inner_layers(layer).items()
                }
                converted = counterparts.counterpart(layer, inner)
            self._layers[id(layer)] = converted
        return self._layers[id(layer)]


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            "Names in a Keras 3 model must have only ASCII letters, digits and '_', "
            "'.' or '-', and begin with a letter or a digit, because tf_keras makes "
            "scopes of them: set `layer.name`, and quantize then. "
            f"Received: {name!r}"
        )


def _graph_of(model):
    """Returns the object that holds a Keras 3 model's graph, or raises ValueError."""
    # A built Sequential holds a Functional model.
    graph = getattr(model, "_functional", model)
    if graph is None or not hasattr(graph, "_nodes_by_depth"):
        kind = "unbuilt or subclassed" if graph is model else "unbuilt"
        raise ValueError(
            "model must be a built Sequential or Functional model, whose graph can be "
            f"read. Received: {kind} Keras 3 {type(model).__name__} {model.name!r}"
        )
    return graph


def _no_operation(node, reason: str) -> ValueError:
    read = [tensor._keras_history.operation.name for tensor in node.input_tensors]
    return ValueError(
        "A Keras 3 operation must have a counterpart in tf_keras: use a layer, or an "
        "operation of the list in docs/how_to/keras3.md. Received: operation "
        f"{node.operation.name!r}, {type(node.operation).__name__}, which reads the "
        f"output of {', '.join(map(repr, read))}: {reason}"
    )


def _map(function, structure):
    """`tf.nest.map_structure` for the lists, tuples and dicts of Keras 3."""
    if isinstance(structure, dict):
        return {name: _map(function, value) for name, value in structure.items()}
    if isinstance(structure, list | tuple):
        return type(structure)(_map(function, value) for value in structure)
    return function(structure)


def _check_outputs(model, converted) -> None:
    """Raises ValueError if outputs on random inputs differ beyond float arithmetic."""
    to_numpy = sys.modules["keras"].ops.convert_to_numpy
    for open_size in _SIZES_OF_OPEN_DIMENSIONS:
        inputs = _samples(model, open_size)
        try:
            outputs = model(inputs, training=False)
        except Exception:  # Each backend has its own error for an input too small.
            if open_size == _SIZES_OF_OPEN_DIMENSIONS[-1]:
                raise
        else:
            break
    expected = [to_numpy(value) for value in tf.nest.flatten(outputs)]
    found = [
        value.numpy() for value in tf.nest.flatten(converted(inputs, training=False))
    ]
    for theirs, ours in zip(expected, found, strict=True):
        theirs, ours = (value.astype(np.float64) for value in (theirs, ours))
        finite = theirs[np.isfinite(theirs)]
        allowed = _TOLERANCE * max(1.0, float(np.abs(finite).max(initial=0.0)))
        # Infinity and NaN must be at the same places in both.
        near = np.isclose(ours, theirs, rtol=0.0, atol=allowed, equal_nan=True)
        if not near.all():
            difference = float(np.abs(theirs - ours)[~near].max())
            raise ValueError(
                "The converted model must have the outputs of the Keras 3 model. "
                f"Received: {model.name!r}, outputs that differ by {difference:.3g}"
            )


def _samples(model, open_size: int):
    """Makes random inputs, two examples; 0 and 1 for integer inputs."""
    random = np.random.default_rng(0)

    def sample(tensor):
        shape = [2, *(size or open_size for size in tensor.shape[1:])]
        dtype = tf.as_dtype(tensor.dtype)
        if dtype.is_integer:
            return random.integers(2, size=shape, dtype=dtype.as_numpy_dtype)
        return random.normal(size=shape).astype(dtype.as_numpy_dtype)

    return _map(sample, _graph_of(model)._inputs_struct)
