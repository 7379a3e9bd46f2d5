"""The `tf_keras` counterpart of a single Keras 3 layer, and its weights."""

import inspect
import sys
from typing import Any

from tf_lowbit.compat import keras, tf
from tf_lowbit.network.keras3_activations import hard_sigmoid, hard_silu
from tf_lowbit.network.keras3_layers import RMSNormalization

# Renamed arguments: class -> {name in Keras 3: name in tf_keras}.
_RENAMED = {"LeakyReLU": {"negative_slope": "alpha"}}
_ACTIVATIONS = {"hard_sigmoid": hard_sigmoid, "hard_silu": hard_silu}
# Layers that `tf_keras` lacks.
_OWN_LAYERS = {"RMSNormalization": RMSNormalization}
# Attributes of other names than the arguments.
_HELD_AS = {("Bidirectional", "layer"): "forward_layer"}
# Their `from_config` needs shapes that `get_config` of Keras 3 lacks.
_BY_ARGUMENTS = (keras.layers.MultiHeadAttention,)
_MOST_EXPLAINED = 300


def short(error: Exception) -> str:
    """Returns the first characters of an error's text, in one line."""
    return " ".join(str(error).split())[:_MOST_EXPLAINED]


def counterpart(layer: Any, inner: dict[str, Any]) -> keras.layers.Layer:
    """Makes the layer of `tf_keras`, not built yet.

    Args:
        layer: A Keras 3 layer, no model.
        inner: Counterparts of `inner_layers`.

    Raises:
        ValueError: If there is none; the message names the layer and the reason.
    """
    name = type(layer).__name__
    kind = _OWN_LAYERS.get(name) or getattr(keras.layers, name, None)
    is_own = type(layer) is not getattr(sys.modules["keras"].layers, name, None)
    if kind is None or is_own:
        raise _no_counterpart(layer, "tf_keras has no such layer")
    config = layer.get_config()
    policy = layer.dtype_policy
    config["dtype"] = getattr(policy, "name", policy)
    config |= inner
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
            continue  # Such layers of tf_keras know no other.
        # An option that the signature does not show is off if it is False.
        if value is not None and value != defaults.get(key, False):
            raise _no_counterpart(layer, f"tf_keras has no {key}={value!r}")
    try:
        by_arguments = inner or kind in _BY_ARGUMENTS
        make = (lambda c: kind(**c)) if by_arguments else kind.from_config
        return make(_without_none(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _no_counterpart(layer, short(error)) from error


def inner_layers(layer: Any) -> dict[str, Any]:
    """Returns the layers among a layer's arguments: those of wrappers, and cells.

    Args:
        layer: A Keras 3 layer.

    Returns:
        Argument -> layer, or list of layers.
    """
    kind = sys.modules["keras"].layers.Layer
    found = {}
    for key in layer.get_config():
        part = getattr(layer, _held_as(layer, key), None)
        if isinstance(part, kind) or (
            isinstance(part, list) and part and isinstance(part[0], kind)
        ):
            found[key] = part
    return found


def _held_as(layer, key) -> str:
    """Returns the name of the attribute that holds an argument."""
    return _HELD_AS.get((type(layer).__name__, key), key)


def _without_none(config: dict) -> dict:
    """Drops the None arguments of initializers and other nested configurations."""
    return {
        name: {**value, "config": {k: v for k, v in inner.items() if v is not None}}
        if isinstance(value, dict) and isinstance(inner := value.get("config"), dict)
        else value
        for name, value in config.items()
    }


def _arguments(kind) -> set[str]:
    """Returns the arguments of a layer class and of its base classes."""
    names = {"name", "trainable", "dtype", "synchronized"}
    if issubclass(kind, keras.layers.RNN):
        names.add("zero_output_for_mask")  # One of its `**kwargs`.
    for base in kind.__mro__:
        if base is keras.layers.Layer:
            break
        names |= set(inspect.signature(base.__init__).parameters)
    return names - {"self", "kwargs", "args"}


def _no_counterpart(layer, reason: str) -> ValueError:
    return ValueError(
        "A Keras 3 layer must have a counterpart in tf_keras: replace it by layers "
        "that tf_keras has. Received: layer "
        f"{layer.name!r}, {type(layer).__name__}: {reason}"
    )


def copy_weights(source: Any, target: keras.layers.Layer) -> None:
    """Copies the weights of inner layers one by one, then those of the layer's own.

    Keras 3 and tf_keras list the weights of a wrapped layer in different orders. The
    layers of a model have their weights already.

    Args:
        source: A Keras 3 layer or model.
        target: Its counterpart, built.

    Raises:
        ValueError: If their weights have other shapes.
    """
    keras3 = sys.modules["keras"]
    if isinstance(source, keras3.Model):
        return
    pairs: list[tuple] = []
    for key, part in inner_layers(source).items():
        other = getattr(target, _held_as(source, key))
        pairs += zip(tf.nest.flatten(part), tf.nest.flatten(other), strict=True)
    for theirs, ours in pairs:
        copy_weights(theirs, ours)
    inner = {id(weight) for pair in pairs for each in pair for weight in each.weights}
    values, own = (
        [weight for weight in layer.weights if id(weight) not in inner]
        for layer in (source, target)
    )
    shapes = [[tuple(weight.shape) for weight in each] for each in (values, own)]
    if shapes[0] != shapes[1]:
        raise _no_counterpart(
            source, f"its weights are {shapes[0]}, in tf_keras {shapes[1]}"
        )
    for value, weight in zip(values, own, strict=True):
        weight.assign(keras3.ops.convert_to_numpy(value))
