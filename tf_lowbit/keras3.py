"""Keras 3 models as models of `tf_keras`, on which TF-MOT and this library work."""

import importlib
import inspect
import json
import operator
import os
import sys
import types
import zipfile

import h5py
import numpy as np

from tf_lowbit.compat import deep_graphs, is_keras3, keras, tf
from tf_lowbit.scheme.activations import hard_sigmoid, hard_silu

# What layers call otherwise there: class -> {name in Keras 3: name in tf_keras}.
_RENAMED = {"LeakyReLU": {"negative_slope": "alpha"}}


_ACTIVATIONS = {"hard_sigmoid": hard_sigmoid, "hard_silu": hard_silu}
# Operations that are no layers.
_OPERATORS = {
    "Add": operator.add,
    "Divide": operator.truediv,
    "Multiply": operator.mul,
    "Negative": operator.neg,
    "Subtract": operator.sub,
    "TrueDivide": operator.truediv,
}
_RELUS = {"Relu": None, "Relu6": 6.0}
# Float32 sums of another order.
_TOLERANCE = 1e-4
_MOST_EXPLAINED = 300
# Tried in turn, until the network takes one.
_SIZES_OF_OPEN_DIMENSIONS = (32, 64, 128, 256)


@deep_graphs()
def from_keras3(model) -> keras.Model:
    """Converts a Keras 3 model to one of `tf_keras`, weights included.

    `tf_lowbit.quantize` does so by itself; a teacher, or a float network to compare
    with, is converted by this. Layers keep their names. The two models' outputs are
    compared on random inputs before the new one is handed out.

    Args:
        model: built Sequential or Functional model of Keras 3, of any backend, or the
            path of a `.keras` or `.h5` file with one. It is not changed. Models among
            its layers are converted likewise.

    Returns:
        A Functional model of `tf_keras`, not compiled, of the same function.

    Raises:
        ValueError: if the model is none of Keras 3, not built or subclassed; if a layer
            or an operation has no counterpart in `tf_keras`, which is named with the
            reason; or if the outputs differ.
    """
    if isinstance(model, str | os.PathLike) and is_keras3_file(model):
        model = load_file(model)
    if not is_keras3(model):
        raise ValueError(
            "model must be a model of Keras 3, or a .keras or .h5 file with one. "
            f"Received: {type(model).__module__}.{type(model).__name__}"
        )
    converted = _Conversion().of(model)
    _check_outputs(model, converted)
    return converted


def is_keras3_file(path) -> bool:
    """Whether a path is a `.keras` or `.h5` file that Keras 3 wrote."""
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
        return False  # Damaged, or no model: `tf_keras` says what it misses.
    version = version.decode() if isinstance(version, bytes) else str(version)
    return version.partition(".")[0] == "3"


def load_file(path, safe_mode: bool = True):
    """Loads a Keras 3 model from a file that `is_keras3_file` knows.

    Args:
        path: of the file.
        safe_mode: whether to refuse a Python lambda.

    Returns:
        The model of Keras 3, not compiled.

    Raises:
        ValueError: if Keras 3 cannot load it.
    """
    saving = importlib.import_module("keras").saving
    try:
        return saving.load_model(path, compile=False, safe_mode=safe_mode)
    except Exception as error:  # Of many kinds, with whole configurations in them.
        raise ValueError(
            "path must be a whole file of a Keras 3 model, made of Keras's own layers; "
            "register layers of your own with Keras 3 and load the model there. "
            f"Received: {os.fspath(path)!r} ({_short(error)})"
        ) from error


# What a trainer may be given: its class, where its kinds are, and what to do instead.
_FAMILIES = {
    "optimizers.schedules.LearningRateSchedule": "optimizers.schedules",
    "optimizers.Optimizer": "optimizers",
    "losses.Loss": "losses",
    "metrics.Metric": "metrics",
}


def as_tf_keras(value):
    """Optimizers, losses, metrics and schedules of Keras 3 as those of `tf_keras`.

    They are made anew by their configuration: state, such as moments, starts anew.

    Args:
        value: one, or a list, tuple or dict of them. What is not of Keras 3 stays.

    Returns:
        The same structure.

    Raises:
        ValueError: if there is no counterpart in `tf_keras`.
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
            f"What trains a low-bit network must be of tf_keras, or have a counterpart "
            f"there: use one of tf_keras.{family}. Received: {name} of Keras 3: "
            f"{reason}"
        )

    if kind is None or type(value) is not source:
        raise refusal("tf_keras has none of that class")
    config = value.get_config()
    if "learning_rate" in config and family == "optimizers":
        # A schedule's configuration would be that of Keras 3.
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
        raise refusal(_short(error)) from error


def _public(module, family: str, name: str):
    for part in (*family.split("."), name):
        module = getattr(module, part, None)
    return module


def require_callbacks(callbacks) -> None:
    """Refuses Keras 3's callbacks, which reach for a Keras 3 model's insides.

    Raises:
        ValueError: if there is one.
    """
    for callback in tf.nest.flatten(callbacks or []):
        if is_keras3(callback, "callbacks.Callback"):
            name = type(callback).__name__
            own = name if hasattr(keras.callbacks, name) else "Callback"
            raise ValueError(
                f"callbacks must be of tf_keras: make it of tf_keras.callbacks.{own}. "
                f"Received: {name} of Keras 3"
            )


def _short(error) -> str:
    """An error's text in one line of fair length."""
    return " ".join(str(error).split())[:_MOST_EXPLAINED]


class _Conversion:
    """Layers that have been converted: one that is called twice is shared."""

    def __init__(self):
        self._layers: dict[int, keras.layers.Layer] = {}

    def of(self, model) -> keras.Model:
        graph = _graph_of(model)
        made: dict[int, object] = {}

        def new_input(tensor):
            layer = tensor._keras_history.operation
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
                results = self._called(node.operation, args, kwargs)
                outputs = tf.nest.flatten(results)
                for old, new in zip(node.outputs, outputs, strict=True):
                    made[id(old)] = new
        outputs = _map(lambda tensor: made[id(tensor)], graph._outputs_struct)
        return keras.Model(inputs, outputs, name=model.name)

    def _called(self, operation, args, kwargs):
        kind = type(operation).__name__
        if _is_layer(operation):
            # Some layers of tf_keras do not take all that may be None. And a default
            # of `training`, which Keras 3 writes down, would hold in inference here.
            called = inspect.signature(operation.call).parameters.get("training")
            given = {
                name: v
                for name, v in kwargs.items()
                if v is not None and not (name == "training" and v is called.default)
            }
            return self._called_layer(operation, args, given)
        if kind in _RELUS and not kwargs:
            return keras.layers.ReLU(_RELUS[kind], name=operation.name)(*args)
        if kind in _OPERATORS and not kwargs:
            return _OPERATORS[kind](*args)
        raise ValueError(
            "A Keras 3 operation must have a counterpart in tf_keras: use a layer "
            f"instead. Received: operation {operation.name!r}, {kind}"
        )

    def _called_layer(self, layer, args, kwargs):
        if id(layer) in self._layers:
            return self._layers[id(layer)](*args, **kwargs)
        is_model = isinstance(layer, sys.modules["keras"].Model)
        converted = self.of(layer) if is_model else _converted_layer(layer)
        if is_model and not layer.trainable:
            converted.trainable = False
        self._layers[id(layer)] = converted
        outputs = converted(*args, **kwargs)
        if not is_model:
            _copy_weights(layer, converted)
        return outputs


def _graph_of(model):
    """What holds a Keras 3 model's graph.

    Raises:
        ValueError: if there is none.
    """
    # A Sequential has it within, once it is built.
    graph = getattr(model, "_functional", model)
    if graph is None or not hasattr(graph, "_nodes_by_depth"):
        kind = "unbuilt or subclassed" if graph is model else "unbuilt"
        raise ValueError(
            "model must be a built Sequential or Functional model, whose graph can be "
            f"read. Received: {kind} Keras 3 {type(model).__name__} {model.name!r}"
        )
    return graph


def _is_layer(operation) -> bool:
    return isinstance(operation, sys.modules["keras"].layers.Layer)


def _converted_layer(layer) -> keras.layers.Layer:
    """The layer of `tf_keras`, of the same settings."""
    name = type(layer).__name__
    kind = getattr(keras.layers, name, None)
    is_own = type(layer) is not getattr(sys.modules["keras"].layers, name, None)
    if kind is None or is_own:
        raise _no_counterpart(layer, "tf_keras has no such layer")
    config = layer.get_config()
    policy = layer.dtype_policy
    config["dtype"] = getattr(policy, "name", policy)
    for key, value in config.items():
        if key.endswith("activation") and isinstance(value, str):
            config[key] = _ACTIVATIONS.get(value, value)
    for theirs, ours in _RENAMED.get(name, {}).items():
        config[ours] = config.pop(theirs)
    known = _arguments(kind)
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(type(layer).__init__).parameters.values()
    }
    for key in [key for key in config if key not in known]:
        value = config.pop(key)
        if (key, value) == ("data_format", "channels_last"):
            continue  # The only one that such layers of tf_keras have.
        # What the signature does not show is an option that is off if it is False.
        if value is not None and value != defaults.get(key, False):
            raise _no_counterpart(layer, f"tf_keras has no {key}={value!r}")
    try:
        return kind.from_config(_without_none(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _no_counterpart(layer, _short(error)) from error


def _without_none(config: dict) -> dict:
    """The settings, in which initializers and the like have no arguments of None."""
    return {
        name: {**value, "config": {k: v for k, v in inner.items() if v is not None}}
        if isinstance(value, dict) and isinstance(inner := value.get("config"), dict)
        else value
        for name, value in config.items()
    }


def _arguments(kind) -> set[str]:
    """The arguments of a layer's class, and of those that it hands others on to."""
    names = {"name", "trainable", "dtype", "synchronized"}
    for base in kind.__mro__:
        if base is keras.layers.Layer:
            break
        names |= set(inspect.signature(base.__init__).parameters)
    return names - {"self", "kwargs", "args"}


def _no_counterpart(layer, reason: str) -> ValueError:
    return ValueError(
        "A Keras 3 layer must have a counterpart in tf_keras: put layers in its place "
        "that tf_keras has. Received: layer "
        f"{layer.name!r}, {type(layer).__name__}: {reason}"
    )


def _copy_weights(source, target) -> None:
    values = source.get_weights()
    shapes = [value.shape for value in values]
    own = [tuple(weight.shape) for weight in target.weights]
    if own != shapes:
        raise _no_counterpart(source, f"its weights are {shapes}, in tf_keras {own}")
    target.set_weights(values)


def _map(function, structure):
    """`tf.nest.map_structure`, over lists, tuples and dicts as Keras 3 has them."""
    if isinstance(structure, dict):
        return {name: _map(function, value) for name, value in structure.items()}
    if isinstance(structure, list | tuple):
        return type(structure)(_map(function, value) for value in structure)
    return function(structure)


def _check_outputs(model, converted) -> None:
    """Compares the two on random inputs.

    Raises:
        ValueError: if they differ by more than float arithmetic does.
    """
    to_numpy = sys.modules["keras"].ops.convert_to_numpy
    for open_size in _SIZES_OF_OPEN_DIMENSIONS:
        inputs = _samples(model, open_size)
        try:
            outputs = model(inputs, training=False)
        except Exception:  # Whatever the backend has for one that is too small.
            if open_size == _SIZES_OF_OPEN_DIMENSIONS[-1]:
                raise
        else:
            break
    expected = [to_numpy(value) for value in tf.nest.flatten(outputs)]
    found = [
        value.numpy() for value in tf.nest.flatten(converted(inputs, training=False))
    ]
    for theirs, ours in zip(expected, found, strict=True):
        allowed = _TOLERANCE * max(1.0, float(np.abs(theirs).max(initial=0.0)))
        difference = float(np.abs(theirs - ours).max(initial=0.0))
        if not difference <= allowed:
            raise ValueError(
                "The converted model must put out what the Keras 3 model does. "
                f"Received: {model.name!r}, outputs that differ by {difference:.3g}"
            )


def _samples(model, open_size: int):
    """Random inputs, two examples; 0 and 1 where integers are wanted."""
    random = np.random.default_rng(0)

    def sample(tensor):
        shape = [2, *(size or open_size for size in tensor.shape[1:])]
        dtype = tf.as_dtype(tensor.dtype)
        if dtype.is_integer:
            return random.integers(2, size=shape, dtype=dtype.as_numpy_dtype)
        return random.normal(size=shape).astype(dtype.as_numpy_dtype)

    return _map(sample, _graph_of(model)._inputs_struct)
