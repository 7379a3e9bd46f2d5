"""Networks by name, for command-line programs."""

import functools
import re
from collections.abc import Callable
from typing import Any

from tf_lowbit.compat import keras
from tf_lowbit.models.alexnet import alexnet
from tf_lowbit.models.imagenet_resnet import preact_resnet18, resnet18, resnet50
from tf_lowbit.models.mobilenet_v2 import mobilenet_v2
from tf_lowbit.models.plain_cnn import plain_cnn
from tf_lowbit.models.postact_resnet import postact_resnet
from tf_lowbit.models.preact_resnet import preact_resnet

_CIFAR: dict[str, Callable[..., keras.Model]] = {
    "preact_resnet": preact_resnet,
    "postact_resnet": postact_resnet,
}
_NETWORKS: dict[str, Callable[..., keras.Model]] = {
    # Common depths; `get` builds any other too.
    **{
        f"preact_resnet{depth}": functools.partial(preact_resnet, depth)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    "postact_resnet20": functools.partial(postact_resnet, 20),
    "preact_resnet18": preact_resnet18,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "alexnet": alexnet,
    "plain_cnn": plain_cnn,
    "mobilenet_v2": mobilenet_v2,
}


def names() -> tuple[str, ...]:
    """Returns names that `get` takes.

    `get` also takes "preact_resnet<depth>" and "postact_resnet<depth>" for other
    depths.
    """
    return tuple(_NETWORKS)


def get(name: str, /, **kwargs: Any) -> keras.Model:
    """Builds a network by name.

    "preact_resnet<depth>" is the CIFAR network `preact_resnet(depth)` for every depth
    of 6n+2, and "postact_resnet<depth>" is `postact_resnet(depth)`. So
    "preact_resnet50" is a narrow CIFAR network, unrelated to "resnet50". The one
    exception is "preact_resnet18", the ImageNet network: 18 is not 6n+2.

    Args:
        name: One of `names()`, "preact_resnet<depth>" or "postact_resnet<depth>".
        **kwargs: Arguments of the function that builds the network.

    Returns:
        The model.

    Raises:
        ValueError: If the name is unknown, or an argument is refused.
        TypeError: If the function has no such argument.
    """
    if isinstance(name, str) and name in _NETWORKS:
        return _NETWORKS[name](**kwargs)
    match = re.fullmatch(rf"({'|'.join(_CIFAR)})([0-9]+)", str(name))
    if match:
        return _CIFAR[match[1]](int(match[2]), **kwargs)
    raise ValueError(
        f"name must be one of {', '.join(names())}, or preact_resnet<depth> or "
        f"postact_resnet<depth> with another depth of 6n+2. Received: name={name!r}"
    )
