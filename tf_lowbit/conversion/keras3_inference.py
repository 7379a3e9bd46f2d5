"""Converts trained networks to plain Keras 3 models, for inference on any backend."""

import importlib
import inspect
from typing import Any

import numpy as np

from tf_lowbit.compat import deep_graphs, keras, tf
from tf_lowbit.conversion import tensorflow_operations
from tf_lowbit.core import grid
from tf_lowbit.network import (
    graph,
    inspection,
    keras3_activations,
    keras3_layers,
    layer_registry,
    passthrough,
)
from tf_lowbit.quantizers import ACTIVATION, WEIGHT

# Arguments that only training needs, or that a layer determines when it is built.
_NOT_FOR_INFERENCE = ("_initializer", "_regularizer", "_constraint")
_FOUND_AT_BUILD = ("batch_input_shape", "query_shape", "key_shape", "value_shape")
# Renamed arguments: class -> {name in tf_keras: name in Keras 3}.
_RENAMED = {"LeakyReLU": {"alpha": "negative_slope"}}
_DEPTHWISE = {"depthwise_kernel": "kernel"}
_RENAMED_WEIGHTS = {"DepthwiseConv1D": _DEPTHWISE, "DepthwiseConv2D": _DEPTHWISE}
_FUNCTIONS = {
    keras3_activations.hard_sigmoid: "hard_sigmoid",
    keras3_activations.hard_silu: "hard_silu",
    tf.nn.relu: "relu",
    tf.nn.relu6: "relu6",
    tf.nn.silu: "silu",
}
_MOST_EXPLAINED = 300
# For one layer on equal inputs: sums in another order, in float32 or 16 bits.
_TOLERANCE, _TOLERANCE_16_BIT = 1e-4, 5e-2
# Share of a quantizer's inputs that may lie on the edge between two codes.
_MOST_ON_EDGES = 1e-3
_SIZES_OF_OPEN_DIMENSIONS = (32, 64, 128, 256)


@deep_graphs()
def to_keras3(model: keras.Model) -> Any:
    """Makes a plain Keras 3 model from a trained network, for inference.

    The weights are the quantized ones, in ordinary Keras 3 layers. An activation
    quantizer, such as a quantized ReLU, becomes a small model with the layer's name,
    made of `keras.ops`: clip, scale, round, scale. So Keras 3 alone loads the file that
    `save` writes, on any backend, without this library, `tf_keras` or TensorFlow.
    Ranges are constants. Initializers, regularizers and constraints are left out.

    Before the model is returned, each layer is compared with the original layer on the
    same random inputs.

    Args:
        model: A model from `quantize`, a `LowBitTrainer` of one student, or a float
            Functional or Sequential model of `tf_keras`. It is not changed.

    Returns:
        A Functional model of Keras 3, not compiled, with the layers' names. Nested
        models are flattened.

    Raises:
        ValueError: If the model is not Functional; if a layer or operation has no
            counterpart in Keras 3 (the message names it); if an activation quantizer's
            levels are not evenly spaced; or if a layer's outputs differ.
    """
    network = graph.flatten(_functional(inspection.single_network(model)))
    conversion = _ToKeras3(network)
    made: dict[int, object] = {}

    def new_input(tensor):
        made[id(tensor)] = conversion.new_input(tensor)
        return made[id(tensor)]

    inputs = tf.nest.map_structure(new_input, network._nested_inputs)
    outputs = graph.run(
        network,
        made,
        conversion.call,
        lambda old, new: made.update({id(old): new}),
    )
    converted = _keras3().Model(inputs, outputs, name=network.name)
    conversion.check()
    return converted


def _keras3():
    return importlib.import_module("keras")


def _functional(model) -> keras.Model:
    if isinstance(model, keras.Sequential) and model.built:
        return keras.Model(model.inputs, model.outputs, name=model.name)
    if not getattr(model, "_is_graph_network", False):
        raise ValueError(
            "model must be a built Functional or Sequential model of tf_keras, whose "
            f"graph can be read. Received: {type(model).__name__} {model.name!r}"
        )
    return model


class _ToKeras3:
    """Converts the calls of a network, each layer once."""

    def __init__(self, network):
        self._network = network
        self._tensors = {(t.layer.name, t.role): t for t in _tensors(network)}
        self._operations = tensorflow_operations.of(_keras3().ops)
        self._layers: dict[str, object] = {}
        self._calls: list[tuple] = []

    def new_input(self, tensor):
        layer = tensor._keras_history.layer
        config = layer.get_config()
        if config.get("sparse") or config.get("ragged"):
            raise _no_counterpart(layer, "sparse and ragged inputs are not converted")
        return _keras3().Input(
            batch_shape=tuple(tensor.shape), dtype=tensor.dtype.name, name=_name(layer)
        )

    def call(self, node, args, kwargs):
        args, kwargs = tf.nest.map_structure(_constant, (args, kwargs))
        function = self._function(node)
        kwargs = {
            name: value
            for name, value in kwargs.items()
            # Options that are off are off by default, including `training`.
            if name != "name" and value is not None and value is not False
        }
        try:
            outputs = function(*args, **kwargs)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise _no_counterpart(node.layer, str(error)) from error
        if isinstance(function, _keras3().Layer):
            self._set_weights(node.layer, function)
        else:
            # A name that Keras generates may be that of a layer.
            (tensor,) = tf.nest.flatten(outputs)
            operation = tensor._keras_history.operation
            if not isinstance(operation, _keras3().Layer):
                operation.name = _name(node.layer)
        self._calls.append((node, function, kwargs))
        return outputs

    def _function(self, node):
        """Returns a layer's counterpart: a Keras 3 layer or a `keras.ops` function."""
        layer = node.layer
        if layer.name not in self._layers:
            operation = passthrough.operation(layer)
            if operation:
                converted = self._operations.get(operation)
                if converted is None:
                    raise _no_counterpart(layer, f"no operation {operation!r}")
            elif (layer.name, ACTIVATION) in self._tensors:
                tensor = self._tensors[layer.name, ACTIVATION]
                converted = _quantizer(tensor, node)
            else:
                converted = _converted_layer(inspection.wrapped_layer(layer))
            self._layers[layer.name] = converted
        return self._layers[layer.name]

    def _set_weights(self, source, target):
        """Sets weights by name, and in order where a name repeats; quantized if so."""
        values = {
            inspection.short_name(t.latent): t.quantized().numpy()
            for t in inspection.quantized_tensors(self._network)
            if t.role == WEIGHT and t.layer is source
        }
        own = inspection.wrapped_layer(source)
        waiting: dict[str, list] = {}
        for weight in own.weights:
            waiting.setdefault(inspection.short_name(weight), []).append(weight.numpy())
        if own is not source:
            # TF-MOT replaces the layer's own weights by tensors.
            for latent, _, _ in source._weight_vars:
                waiting[inspection.short_name(latent)] = [latent.numpy()]
        waiting |= {name: [value] for name, value in values.items()}
        renamed = _RENAMED_WEIGHTS.get(type(own).__name__, {})
        waiting = {renamed.get(n, n): values for n, values in waiting.items()}
        found = {name: [v.shape for v in values] for name, values in waiting.items()}
        wanted: dict[str, list] = {}
        for weight in target.weights:
            wanted.setdefault(weight.name, []).append(tuple(weight.shape))
        if found != wanted:
            raise _no_counterpart(own, f"its weights are {found}, in Keras 3 {wanted}")
        for weight in target.weights:
            weight.assign(waiting[weight.name].pop(0))
        if hasattr(target, "finalize_state"):
            target.finalize_state()  # Normalization computes with derived values.

    def check(self):
        """Compares each call on the inputs that it has in the network.

        One by one, because a different float rounding may change a code, and with it
        all later values.
        """
        values = _values(self._network)
        to_tensor = _keras3().ops.convert_to_tensor
        to_numpy = _keras3().ops.convert_to_numpy
        for node, function, kwargs in self._calls:
            read = {
                str(id(t)): [to_tensor(values[id(t)])] * len(node.keras_inputs)
                for t in node.keras_inputs
            }
            args, given = node.map_arguments(read)
            args, given = tf.nest.map_structure(_constant, (args, given))
            given = {name: given[name] for name in kwargs}
            outputs = tf.nest.flatten(function(*args, **given))
            for old, new in zip(graph.outputs_of(node), outputs, strict=True):
                expected = values[id(old)].astype(np.float64)
                self._compare(node, expected, to_numpy(new).astype(np.float64))

    def _compare(self, node, expected, found):
        is_16_bit = tf.as_dtype(node.layer.compute_dtype or "float32").size == 2
        tolerance = _TOLERANCE_16_BIT if is_16_bit else _TOLERANCE
        allowed = tolerance * max(1.0, float(np.abs(expected).max(initial=0.0)))
        differs = ~(np.abs(expected - found) <= allowed)
        is_quantizer = (node.layer.name, ACTIVATION) in self._tensors
        if differs.mean() > (_MOST_ON_EDGES if is_quantizer else 0.0):
            raise _no_counterpart(
                node.layer,
                "its outputs differ from those in Keras 3 by up to "
                f"{np.abs(expected - found).max():.3g}",
            )


def _tensors(network) -> list:
    return list(inspection.quantized_tensors(network))


def _name(layer) -> str:
    """Returns the layer's name; Keras 3 allows no slash in it."""
    return layer.name.replace("/", "_")


def _constant(value):
    return value.numpy() if isinstance(value, tf.Tensor | tf.Variable) else value


def _values(network) -> dict[int, np.ndarray]:
    """Maps the id of each tensor of a network to its value for two random examples."""
    tensors = {
        id(tensor): tensor
        for node in graph.nodes(network)
        for tensor in graph.outputs_of(node)
    }
    probe = keras.Model(network._nested_inputs, list(tensors.values()))
    for open_size in _SIZES_OF_OPEN_DIMENSIONS:
        try:
            outputs = probe(_samples(network, open_size), training=False)
        except Exception:  # TensorFlow has many errors for an input too small.
            if open_size == _SIZES_OF_OPEN_DIMENSIONS[-1]:
                raise
        else:
            break
    return {
        key: tf.cast(value, tf.float32).numpy()
        if value.dtype in (tf.bfloat16, tf.float16)
        else value.numpy()
        for key, value in zip(tensors, tf.nest.flatten(outputs), strict=True)
    }


def _samples(network, open_size: int):
    random = np.random.default_rng(0)

    def sample(tensor):
        shape = [tensor.shape[0] or 2, *(d or open_size for d in tensor.shape[1:])]
        if not tensor.dtype.is_floating:
            return tf.cast(random.integers(2, size=shape), tensor.dtype)
        return tf.cast(random.normal(size=shape), tensor.dtype)

    return tf.nest.map_structure(sample, network._nested_inputs)


def _no_counterpart(layer, reason: str) -> ValueError:
    reason = " ".join(reason.split())[:_MOST_EXPLAINED]
    return ValueError(
        "A layer must have a counterpart in Keras 3: replace it, or convert only the "
        "part of the network in front of it. Received: layer "
        f"{layer.name!r}, {type(inspection.wrapped_layer(layer)).__name__}: {reason}"
    )


def _converted_layer(layer):
    """Returns the Keras 3 layer with the settings that inference needs."""
    is_norm = isinstance(layer, layer_registry.BATCH_NORMS)
    name = "BatchNormalization" if is_norm else type(layer).__name__
    layers = _keras3().layers
    kind = getattr(layers, name, None)
    stock = getattr(keras.layers, name, getattr(keras3_layers, name, None))
    is_own = not is_norm and type(layer) is not stock
    if kind is None or is_own:
        raise _no_counterpart(layer, "Keras 3 has no such layer")
    config = {
        key: value
        for key, value in layer.get_config().items()
        if not key.endswith(_NOT_FOR_INFERENCE) and key not in _FOUND_AT_BUILD
    }
    config |= {"name": _name(layer), "dtype": layer.dtype_policy.name}
    for key in config:
        if key.endswith("activation"):
            config[key] = _activation(layer, getattr(layer, key, config[key]))
    if is_norm and len(layer.axis) == 1:
        (config["axis"],) = layer.axis
    for old, new in _RENAMED.get(name, {}).items():
        config[new] = float(config.pop(old))
    known = _arguments(kind, layers.Layer)
    defaults = _arguments(type(layer), keras.layers.Layer)
    for key in [key for key in config if key not in known]:
        value = config.pop(key)
        if value is not None and value != defaults.get(key, False):
            raise _no_counterpart(layer, f"Keras 3 has no {key}={value!r}")
    try:
        return kind.from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _no_counterpart(layer, str(error)) from error


def _activation(layer, function) -> str | None:
    if function is None:
        return None
    name = _FUNCTIONS.get(function) or keras.activations.serialize(function)
    is_same = function in _FUNCTIONS or function is getattr(
        keras.activations, str(name), None
    )
    if not is_same or function is keras.activations.hard_sigmoid:
        raise _no_counterpart(layer, f"Keras 3 has no activation {name!r}")
    return name


def _quantizer(tensor, node):
    """Makes a model of `keras.ops` that quantizes activations as a layer does."""
    library, quantizer = _keras3(), tensor.quantizer
    ops = library.ops
    shape = tuple(node.keras_inputs[0].shape)
    name = _name(node.layer)
    inputs = library.Input(batch_shape=shape, dtype="float32", name=f"{name}_input")
    if tensor.bits > grid.MAX_BITS:
        ends = quantizer.quantize(
            tf.constant([-np.finfo(np.float32).max, np.finfo(np.float32).max]),
            tensor.variables,
        )
        low, high = map(float, ends)
        outputs = ops.clip(inputs, low, high)
    else:
        step = np.asarray(quantizer.step(None, tensor.variables), np.float32)
        codes = quantizer.level_codes(tensor.bits)
        is_even = len(codes) == quantizer.level_count(tensor.bits)
        if step.size != 1 or not is_even or (codes.step != 1 and len(codes) != 2):
            raise _no_counterpart(
                node.layer, f"{quantizer} has levels that are not evenly spaced"
            )
        outputs = _rounded(ops, inputs, np.float32(step.item()), codes)
    dtype = tf.nest.flatten(node.outputs)[0].dtype.name
    if dtype != "float32":
        outputs = ops.cast(outputs, dtype)
    return library.Model(inputs, outputs, name=name)


def _rounded(ops, inputs, step, codes):
    """Rounds to a grid with the same float32 operations as `tf_lowbit.core.grid`."""
    low, high = codes[0], codes[-1]
    if codes.step != 1:
        is_high = ops.greater_equal(inputs, 0.0)
        return ops.where(is_high, float(step), -float(step))
    if low < 0:
        scaled = ops.clip(ops.divide(inputs, float(step)), float(low), float(high))
        return ops.multiply(ops.round(scaled), float(step))
    limit = step * np.float32(high)
    scaled = ops.multiply(
        ops.clip(inputs, 0.0, float(limit)), float(np.float32(high) / limit)
    )
    return ops.multiply(ops.round(scaled), float(limit / np.float32(high)))


def _arguments(kind, base) -> dict:
    """Maps the arguments of a layer class and of its base classes to their defaults."""
    found = {"name": None, "trainable": True, "dtype": None}
    for one in kind.__mro__:
        if one is base:
            break
        for parameter in inspect.signature(one.__init__).parameters.values():
            found.setdefault(parameter.name, parameter.default)
    return {n: d for n, d in found.items() if n not in ("self", "args", "kwargs")}
