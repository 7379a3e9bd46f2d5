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
END_TYPES = ("float32", "int8", "uint8")


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
            None for "float"; for "int8" where `target` is "tflm" or the file puts out
            codes.
        input_type: "float32"; "int8", codes of the first quantizer; or "uint8", pixels.
            None for "float32", or "int8" for "tflm".
        output_type: "float32"; or "int8", "uint8": codes, wherever the network ends.
            None for "float32"; for "tflm" it stays None: codes where an end is
            quantized, floats behind a softmax or the like.

    Raises:
        ValueError: for any other choice.
    """

    target: str = "xnnpack"
    storage: str = "int8"
    first_layer: str = "int8"
    head: str | None = None
    input_type: str | None = None
    output_type: str | None = None

    def __post_init__(self):
        allowed = {
            "target": tuple(TARGETS),
            "storage": STORAGES,
            "first_layer": PRECISIONS,
            "head": PRECISIONS,
            "input_type": END_TYPES,
            "output_type": END_TYPES,
        }
        optional = ("head", "input_type", "output_type")
        for name, choices in allowed.items():
            if name not in optional or getattr(self, name) is not None:
                checks.choice(name, getattr(self, name), choices)
        is_micro = self.target == "tflm"
        defaults = {
            "head": "int8" if is_micro or self.output_is_codes else "float",
            "input_type": "int8" if is_micro else "float32",
            "output_type": None if is_micro else "float32",
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not is_micro:
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
        for name in ("first_layer", "head", "input_type"):
            if getattr(self, name) != "int8":
                raise ValueError(
                    f"target='tflm' computes in int8: {name} must be 'int8'. "
                    f"Received: {name}={getattr(self, name)!r}"
                )
        if self.output_type == "uint8":
            raise ValueError(
                "target='tflm' computes in int8: output_type must be 'int8' or "
                "'float32'. Received: output_type='uint8'"
            )

    @property
    def output_is_codes(self) -> bool:
        """Whether every output must be codes."""
        return self.output_type in ("int8", "uint8")

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
