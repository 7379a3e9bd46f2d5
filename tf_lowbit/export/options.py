"""What a user may choose about an export, checked."""

import dataclasses

from tf_lowbit.core import checks
from tf_lowbit.export import kernels, twin

TARGETS = {
    # The kernels that a layer's decisions must be right under.
    "xnnpack": (kernels.XNNPACK,),
    "portable": (kernels.XNNPACK, kernels.BUILTIN),
    "tflm": (kernels.TFLM,),
}
STORAGES = ("int8", "int4", "packed")
PRECISIONS = ("int8", "float")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a network becomes integers.

    Attributes:
        target: "xnnpack", what TFLite delegates int8 layers to; or "portable":
            decisions are to be right under TFLite's builtin kernels as well; or "tflm",
            TFLite Micro: right under its reference kernels, int8 from end to end.
        storage: "int8"; "int4" for the low-bit weights that fit, not for "tflm"; or
            "packed", for "tflm" alone: indices of 1 to 7 bits into tables.
        first_layer: what becomes of a first layer that was trained in float: "int8", or
            "float".
        head: what becomes of a last layer behind global pooling: "float", or "int8".

    Raises:
        ValueError: for any other choice.
    """

    target: str = "xnnpack"
    storage: str = "int8"
    first_layer: str = "int8"
    head: str = "float"

    def __post_init__(self):
        allowed = {
            "target": tuple(TARGETS),
            "storage": STORAGES,
            "first_layer": PRECISIONS,
            "head": PRECISIONS,
        }
        for name, choices in allowed.items():
            checks.choice(name, getattr(self, name), choices)
        if self.target != "tflm":
            if self.storage == "packed":
                raise ValueError(
                    "storage='packed' needs target='tflm': only TFLite Micro decodes "
                    f"it. Received: target={self.target!r}"
                )
            return
        if self.storage == "int4":
            raise ValueError(
                "target='tflm' takes storage='int8' or 'packed', which holds 4 bits as "
                "well. Received: storage='int4'"
            )
        for name in ("first_layer", "head"):
            if getattr(self, name) != "int8":
                raise ValueError(
                    f"target='tflm' computes in int8: {name} must be 'int8'. "
                    f"Received: {name}={getattr(self, name)!r}"
                )

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that int8 layers are to decide right under."""
        return TARGETS[self.target]

    def kernels_of(self, kind: str, storage: str, inputs: int) -> tuple[str, ...]:
        """The kernels that a layer is to decide right under; the first one runs it.

        Args:
            kind: of the layer, one of `twin`.
            storage: "int8" or "int4", how its weights are held.
            inputs: how many codes one of its outputs is summed over.
        """
        # XNNPACK takes INT4 weights of dense layers alone, and these by pairs.
        if storage == "int4" and (kind != twin.DENSE or inputs % 2):
            return (kernels.BUILTIN,)
        return self.kernels
