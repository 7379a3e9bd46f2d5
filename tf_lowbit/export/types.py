"""Types that all export rooms share: notes, problems and `ExportError`."""

import dataclasses

from tf_lowbit.compat import keras


@dataclasses.dataclass(frozen=True)
class Note:
    """A difference between a layer of the file and the trained layer.

    Attributes:
        layer: The layer's name.
        text: One or two sentences.
    """

    layer: str
    text: str

    def __str__(self):
        return f"{self.layer}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer that cannot be exported.

    Attributes:
        layer: The layer's name.
        type: Name of its class.
        reason: The requirement that it does not meet.
        remedy: What to do.
        received: What the layer is instead.
    """

    layer: str
    type: str
    reason: str
    remedy: str
    received: str

    def __str__(self):
        return f"{self.reason}: {self.remedy}. Received: {self.layer!r} {self.received}"


class ExportError(ValueError):
    """A network, or a layer of it, that cannot be exported.

    Args:
        message: Text, or the `Problem` of one layer.

    Attributes:
        problem: The layer's `Problem`, or None if the error is not about one layer.
    """

    def __init__(self, message: str | Problem):
        super().__init__(str(message))
        self.problem = message if isinstance(message, Problem) else None


def refusal(
    layer: keras.layers.Layer, reason: str, remedy: str, received: str = ""
) -> ExportError:
    """The `ExportError` for one layer.

    Args:
        layer: Unwrapped layer of the trained network.
        reason: The requirement, as the start of a sentence.
        remedy: What to do, as its end.
        received: What the layer is instead; its type by default.
    """
    kind = type(layer).__name__
    received = received or f"of type {kind}"
    return ExportError(Problem(layer.name, kind, reason, remedy, received))
