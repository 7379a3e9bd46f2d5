"""Finds quantizers by name, and turns them into data and back."""

from tf_lowbit.compat import keras
from tf_lowbit.core import checks
from tf_lowbit.quantizers.base import ACTIVATION, WEIGHT, LowBitQuantizer
from tf_lowbit.quantizers.dorefa import (
    DoReFaActivationQuantizer,
    DoReFaWeightQuantizer,
)
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
    """The names that `get` takes.

    Args:
        role: "weight" or "activation".

    Returns:
        The names, sorted.

    Raises:
        ValueError: if there is no such role.
    """
    return tuple(sorted(_role(role)))


def find(name: str, role: str) -> type[LowBitQuantizer]:
    """The quantizer class of a name.

    Args:
        name: a name such as "dorefa", "lsq", "pact" or "uniform".
        role: "weight" or "activation".

    Returns:
        The class.

    Raises:
        ValueError: if the role or the name is unknown; the names are listed.
    """
    table = _role(role)
    if not isinstance(name, str) or name not in table:
        raise ValueError(
            f"{role} quantizer must be one of {names(role)}. Received: {name!r}"
        )
    return table[name]


def get(identifier, role: str, **arguments) -> LowBitQuantizer:
    """A quantizer from whatever names one.

    Args:
        identifier: a quantizer (returned as it is, or remade with `arguments` in
            place of its own), a name, or the dict of `serialize`.
        role: "weight" or "activation".
        **arguments: of the constructor.

    Returns:
        The quantizer.

    Raises:
        ValueError: if the name or role is unknown, or the identifier is of another
            role or no quantizer at all.
        TypeError: if the quantizer does not take an argument.
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
    """A quantizer as data.

    Args:
        quantizer: any of this library, or one of yours that is registered with
            `keras.utils.register_keras_serializable`.

    Returns:
        JSON-ready: class name and constructor arguments.
    """
    checks.instance("quantizer", quantizer, LowBitQuantizer)
    return keras.utils.legacy.serialize_keras_object(quantizer)


def deserialize(data: dict) -> LowBitQuantizer:
    """A quantizer from data.

    Args:
        data: what `serialize` returned.

    Returns:
        A quantizer equal to the one it was made of.

    Raises:
        ValueError: if the class is unknown.
    """
    checks.instance("data", data, dict)
    try:
        return keras.utils.legacy.deserialize_keras_object(
            data, printable_module_name="quantizer"
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "data must be what `serialize` returned, of a class that is registered: "
            f"{error}. {checks.received('data', data)}"
        ) from error


def _role(role: str) -> dict:
    return _BY_ROLE[checks.choice("role", role, _BY_ROLE)]
