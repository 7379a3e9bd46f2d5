"""Finds quantizers by name and serializes them."""

from typing import Any

from tf_lowbit.compat import keras
from tf_lowbit.core import checks
from tf_lowbit.quantizers.base import ACTIVATION, WEIGHT, LowBitQuantizer
from tf_lowbit.quantizers.dorefa import DoReFaActivationQuantizer, DoReFaWeightQuantizer
from tf_lowbit.quantizers.lsq import LSQActivationQuantizer, LSQWeightQuantizer
from tf_lowbit.quantizers.pact import PACTActivationQuantizer
from tf_lowbit.quantizers.statsq import StatsQWeightQuantizer
from tf_lowbit.quantizers.uniform import (
    UniformActivationQuantizer,
    UniformWeightQuantizer,
)

_BY_ROLE = {
    WEIGHT: {
        "dorefa": DoReFaWeightQuantizer,
        "lsq": LSQWeightQuantizer,
        "statsq": StatsQWeightQuantizer,
        "uniform": UniformWeightQuantizer,
    },
    ACTIVATION: {
        "dorefa": DoReFaActivationQuantizer,
        "lsq": LSQActivationQuantizer,
        "pact": PACTActivationQuantizer,
        "uniform": UniformActivationQuantizer,
    },
}


def names(role: str) -> tuple[str, ...]:
    """Returns the names that `get` takes, sorted.

    Args:
        role: "weight" or "activation".

    Returns:
        The names.

    Raises:
        ValueError: If the role is unknown.
    """
    return tuple(sorted(_role(role)))


def find(name: str, role: str) -> type[LowBitQuantizer]:
    """Finds a quantizer class by name.

    Args:
        name: Name such as "dorefa", "lsq", "pact" or "uniform".
        role: "weight" or "activation".

    Returns:
        The class.

    Raises:
        ValueError: If the role or the name is unknown. The message lists the names.
    """
    table = _role(role)
    if not isinstance(name, str) or name not in table:
        raise ValueError(
            f"{role} quantizer must be one of {names(role)}. Received: {name!r}"
        )
    return table[name]


def get(
    identifier: LowBitQuantizer | str | dict[str, Any], role: str, **arguments: Any
) -> LowBitQuantizer:
    """Returns a quantizer from a name, a quantizer or a dict.

    Args:
        identifier: A name, the result of `serialize`, or a quantizer. A quantizer is
            returned as it is, or as a copy with `arguments` replaced.
        role: "weight" or "activation".
        **arguments: Arguments of the constructor.

    Returns:
        The quantizer.

    Raises:
        ValueError: If the name or role is unknown, or the identifier is for another
            role or is not a quantizer.
        TypeError: If the quantizer does not take an argument.
    """
    _role(role)
    if isinstance(identifier, str):
        return find(identifier, role)(**arguments)
    if isinstance(identifier, dict):
        identifier = deserialize(identifier)
    if not isinstance(identifier, LowBitQuantizer):
        raise ValueError(
            f"A {role} quantizer must be a name in {names(role)}, a LowBitQuantizer "
            f"or its serialized dict. Received: {identifier!r}"
        )
    if identifier.role != role:
        raise ValueError(f"The quantizer must be for {role}s. Received: {identifier!r}")
    if not arguments:
        return identifier
    return type(identifier).from_config({**identifier.get_config(), **arguments})


def serialize(quantizer: LowBitQuantizer) -> dict:
    """Converts a quantizer to JSON-ready data.

    Args:
        quantizer: A quantizer of this library, or your own, registered with
            `keras.utils.register_keras_serializable`.

    Returns:
        Dict of class name and constructor arguments.
    """
    checks.instance("quantizer", quantizer, LowBitQuantizer)
    return keras.utils.legacy.serialize_keras_object(quantizer)


def deserialize(data: dict) -> LowBitQuantizer:
    """Makes a quantizer from data.

    Args:
        data: Result of `serialize`.

    Returns:
        A quantizer equal to the original.

    Raises:
        ValueError: If the class is unknown.
    """
    checks.instance("data", data, dict)
    try:
        return keras.utils.legacy.deserialize_keras_object(
            data, printable_module_name="quantizer"
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "data must be the result of `serialize`, and its class registered with "
            f"keras.utils.register_keras_serializable ({error}). "
            f"{checks.received('data', data)}"
        ) from error


def _role(role: str) -> dict:
    return _BY_ROLE[checks.choice("role", role, _BY_ROLE)]
