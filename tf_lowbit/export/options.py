"""Options of an export, checked against its target."""

import dataclasses
from typing import Any

from tf_lowbit.core import checks
from tf_lowbit.export import targets
from tf_lowbit.export.integer import kernels, twin
from tf_lowbit.export.targets import TARGETS


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an export. None takes the target's default.

    Attributes:
        target: Where the file runs: a `Target`, or a name of `TARGETS`, which is
            replaced by its `Target`.
        storage: "int8"; "int4" for the low-bit weights that fit; or "packed": indices
            of 1 to 7 bits into tables.
        first_layer: "int8" or "float", for a first layer that was trained in float.
        head: "float" or "int8", for a last layer behind global pooling. None is "int8"
            if the file outputs codes.
        input_type: "float32"; "int8", codes of the first quantizer; or "uint8", pixels.
        output_type: "float32"; or "int8" or "uint8": codes, wherever the network ends.
            None stays None if the target's default is None.

    Raises:
        ValueError: For an unknown value, or one that the target does not allow.
    """

    target: Any = "xnnpack"  # A `Target` once it is made.
    storage: str | None = None
    first_layer: str | None = None
    head: str | None = None
    input_type: str | None = None
    output_type: str | None = None

    def __post_init__(self):
        target = targets.find(self.target)
        if target.interpreter == targets.QONNX:
            raise ValueError(
                "target must be one of TFLite files: tf_lowbit.export.to_qonnx writes "
                f"those of QONNX. Received: target={target.name!r}"
            )
        object.__setattr__(self, "target", target)
        for name, choices in targets.CHOICES.items():
            value, allowed = getattr(self, name), getattr(target, name)
            if value is not None:
                checks.choice(name, value, choices)
                if value not in allowed:
                    raise _not_allowed(target, name, value)
        if self.output_type is None:
            object.__setattr__(self, "output_type", target.output_type[0])
        if self.head is None and self.output_is_codes and "int8" in target.head:
            object.__setattr__(self, "head", "int8")
        for name in targets.CHOICES:
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(target, name)[0])

    @property
    def output_is_codes(self) -> bool:
        """Whether every output must be codes."""
        return self.output_type in ("int8", "uint8")

    def as_dict(self) -> dict:
        """The options as JSON-ready arguments of `Options`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "target": targets.described(self.target)}

    def kernels_of(self, kind: str, storage: str, inputs: int) -> tuple[str, ...]:
        """Kernels under which a layer must output the right codes; the first runs it.

        Args:
            kind: Kind of the layer, one of `twin`'s.
            storage: "int8" or "int4", the type of its weights.
            inputs: Number of input codes in the sum of one output.
        """
        # XNNPACK takes INT4 weights of dense layers only, and only in pairs.
        if storage == "int4" and (kind != twin.DENSE or inputs % 2):
            return (kernels.BUILTIN,)
        return self.target.kernels


def _not_allowed(target, name, value) -> ValueError:
    allowed = [repr(choice) for choice in getattr(target, name) if choice]
    others = [repr(t.name) for t in TARGETS.values() if value in getattr(t, name)]
    return ValueError(
        f"With target={target.name!r}, {name} must be {' or '.join(allowed)}; "
        f"{name}={value!r} needs target={' or '.join(others)}. Received: "
        f"{name}={value!r}"
    )
