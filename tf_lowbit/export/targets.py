"""Deployment targets: one row for each, with what it can run."""

import dataclasses
from typing import Any

from tf_lowbit.core import checks
from tf_lowbit.core import grid as core_grid
from tf_lowbit.export.integer import kernels as integer_kernels

STORAGES = ("int8", "int4", "packed")
PRECISIONS = ("int8", "float")
END_TYPES = ("float32", "int8", "uint8")
BITS = tuple(range(1, core_grid.MAX_BITS + 1))
# Interpreters that `verify` runs files in, and the executor of `compare_qonnx`.
TFLITE = "tflite"
TFLITE_MICRO = "tflite_micro"
QONNX = "qonnx"
_INTERPRETERS = (TFLITE, TFLITE_MICRO, QONNX)

_ROUNDING = {
    integer_kernels.XNNPACK: "float32 product, half to even",
    integer_kernels.BUILTIN: "31-bit fixed point, both roundings half up",
    integer_kernels.TFLM: (
        "31-bit fixed point, first rounding half up, second half away from zero"
    ),
}
_ALLOWED_BITS = {"weight_bits": BITS, "activation_bits": BITS}
# Options whose allowed values depend on the target -> their values.
CHOICES = {
    "storage": STORAGES,
    "first_layer": PRECISIONS,
    "head": PRECISIONS,
    "input_type": END_TYPES,
    "output_type": END_TYPES,
}
# Of TFLite files alone.
_ALLOWED = {
    "kernels": tuple(_ROUNDING),
    **CHOICES,
    "output_type": (*END_TYPES, None),
}


@dataclasses.dataclass(frozen=True, repr=False)
class Target:
    """A deployment target, and the rules of its files.

    For five options of `to_tflite` (`storage` to `output_type`), a target lists the
    values that it allows. The first value is the default. For a target of QONNX files
    these five and `kernels` are empty, and `operators` is None.

    Attributes:
        name: The name for `to_tflite(target=...)`.
        runs_on: What the target stands for, in words.
        checked: How its files are checked here, in words.
        kernels: Kernels under whose rounding every layer must output the right codes,
            one or more of "xnnpack", "builtin" and "tflm". The integer model rounds
            like the first one.
        interpreter: The interpreter in `verify`: "tflite" or "tflite_micro"; or "qonnx"
            for files of `to_qonnx`.
        storage: "int8", "int4", "packed".
        first_layer: "int8", "float", or both, for a first layer trained in float.
        head: "int8", "float", or both, for the last layer.
        input_type: "float32", "int8", "uint8".
        output_type: The same. None means codes for a quantized end of the network, and
            floats for another.
        weight_bits: Allowed bits of weight quantizers.
        activation_bits: Allowed bits of activation quantizers.
        operators: TFLite names of its operators; None for all that `to_tflite` writes.
        floats: Whether it can compute in float.
        open_sizes: Whether a file may leave sizes besides the batch open.
        zero_points: Its rule for scales and zero points, in words.

    Raises:
        ValueError: For an unknown value.
    """

    name: str
    runs_on: str
    checked: str
    kernels: tuple[str, ...]
    interpreter: str = TFLITE
    storage: tuple[str, ...] = ("int8", "int4")
    first_layer: tuple[str, ...] = ("int8", "float")
    head: tuple[str, ...] = ("float", "int8")
    input_type: tuple[str, ...] = END_TYPES
    output_type: tuple[str | None, ...] = END_TYPES
    weight_bits: tuple[int, ...] = BITS
    activation_bits: tuple[int, ...] = BITS
    operators: tuple[str, ...] | None = None
    floats: bool = True
    open_sizes: bool = True
    zero_points: str = (
        "weights: zero point 0, a scale for each channel; activations: any zero point, "
        "one scale"
    )

    def __post_init__(self):
        for name in ("name", "runs_on", "checked", "zero_points"):
            checks.instance(name, getattr(self, name), str)
        checks.choice("interpreter", self.interpreter, _INTERPRETERS)
        is_qonnx = self.interpreter == QONNX
        if is_qonnx:
            self._require_no_tflite()
        allowed = _ALLOWED_BITS if is_qonnx else _ALLOWED | _ALLOWED_BITS
        for name, known in allowed.items():
            values = getattr(self, name)
            is_list = isinstance(values, tuple) and all(v in known for v in values)
            if not is_list or not values:
                raise ValueError(
                    f"{name} must be a tuple of one or more of {known}. "
                    f"Received: {name}={values!r}"
                )
        is_list = isinstance(self.operators, tuple) and all(
            isinstance(name, str) for name in self.operators
        )
        if self.operators is not None and not is_list:
            raise ValueError(
                "operators must be a tuple of TFLite's names, or None. "
                f"Received: operators={self.operators!r}"
            )
        if "packed" in self.storage and self.interpreter != TFLITE_MICRO:
            raise ValueError(
                "storage='packed' needs interpreter='tflite_micro', which decodes it. "
                f"Received: interpreter={self.interpreter!r}"
            )
        checks.flag("floats", self.floats)
        checks.flag("open_sizes", self.open_sizes)

    def _require_no_tflite(self):
        """Refuses what QONNX files do not have, and open sizes, which they cannot."""
        wanted = {**dict.fromkeys(_ALLOWED, ()), "operators": None, "open_sizes": False}
        for name, value in {**wanted, "floats": True}.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value} with interpreter='qonnx', whose files "
                    f"are no TFLite files. Received: {name}={getattr(self, name)!r}"
                )

    def __repr__(self):
        return f"Target({self.name!r})"

    @property
    def rounding(self) -> str:
        """How its kernels round accumulators to codes, in words."""
        if self.interpreter == QONNX:
            return "float32, then `Quant` half to even"
        return "; ".join(_ROUNDING[kernel] for kernel in self.kernels)

    def has(self, operator: str) -> bool:
        """Whether it has the TFLite operator of this name."""
        return self.operators is None or operator in self.operators


# Operators of int8 files that Coral lists for its Edge TPU:
# https://coral.ai/docs/edgetpu/models-intro/#supported-operations. The list lacks
# ARG_MAX, DEPTH_TO_SPACE, DEQUANTIZE and MIRROR_PAD.
_INT8_OPERATORS = (
    "ADD",
    "CONCATENATION",
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "FULLY_CONNECTED",
    "MAX_POOL_2D",
    "PAD",
    "QUANTIZE",
    "RESHAPE",
    "RESIZE_NEAREST_NEIGHBOR",
    "STRIDED_SLICE",
    "TRANSPOSE",
)
_ROWS = (
    Target(
        name="xnnpack",
        runs_on="TFLite on x86 with XNNPACK, its default",
        checked="run in TFLite's interpreter, every code against the integer model",
        kernels=(integer_kernels.XNNPACK,),
    ),
    Target(
        name="portable",
        runs_on="TFLite on x86, with XNNPACK or its builtin kernels",
        checked=(
            "run with XNNPACK, every code against the integer model; decisions and "
            "sums under both kernels"
        ),
        kernels=(integer_kernels.XNNPACK, integer_kernels.BUILTIN),
    ),
    Target(
        name="int8",
        runs_on="an accelerator for int8 files, such as an Edge TPU",
        checked=(
            "the file has int8 operators only; run on the CPU as for `portable`. No "
            "accelerator and no vendor's compiler was run, so its rounding is unknown"
        ),
        kernels=(integer_kernels.XNNPACK, integer_kernels.BUILTIN),
        storage=("int8",),
        first_layer=("int8",),
        head=("int8",),
        input_type=("int8",),
        output_type=("int8",),
        operators=_INT8_OPERATORS,
        floats=False,
        open_sizes=False,
    ),
    Target(
        name="tflm",
        runs_on="TFLite Micro with its reference kernels",
        checked=(
            "run in TFLite Micro's interpreter on x86, every code against the integer "
            "model. CMSIS-NN and a microcontroller were not run"
        ),
        kernels=(integer_kernels.TFLM,),
        interpreter=TFLITE_MICRO,
        storage=("int8", "packed"),
        first_layer=("int8",),
        head=("int8",),
        input_type=("int8",),
        output_type=(None, "int8", "float32"),
        operators=(
            *_INT8_OPERATORS,
            "ARG_MAX",
            "AVERAGE_POOL_2D",
            "BATCH_MATMUL",
            "DEPTH_TO_SPACE",
            "DEQUANTIZE",
            "LEAKY_RELU",
            "LOGISTIC",
            "MAXIMUM",
            "MEAN",
            "MIRROR_PAD",
            "MUL",
            "PRELU",
            "RELU",
            "RELU6",
            "RESIZE_BILINEAR",
            "RSQRT",
            "SOFTMAX",
            "SUB",
            "TANH",
        ),
        open_sizes=False,
    ),
    Target(
        name="qonnx",
        runs_on="FPGA tools that read QONNX files, such as FINN and hls4ml",
        checked=(
            "run in qonnx's executor, every activation code against the trained "
            "network. finn-plus's first step and hls4ml's conversion took small "
            "networks. No synthesis was run"
        ),
        kernels=(),
        interpreter=QONNX,
        storage=(),
        first_layer=(),
        head=(),
        input_type=(),
        output_type=(),
        open_sizes=False,
        zero_points="all zero points are 0; a scale for each tensor or channel",
    ),
)
TARGETS = {target.name: target for target in _ROWS}


def find(target: str | dict[str, Any] | Target) -> Target:
    """Returns the target of a name or of the result of `described`, or itself.

    Args:
        target: A key of `TARGETS`, a `Target`, or a dict of its fields.

    Raises:
        ValueError: For another value.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, dict):
        fields: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in target.items()
        }
        try:
            return Target(**fields)
        except TypeError as error:
            raise ValueError(
                f"A target must have the fields of Target. Received: {error}"
            ) from error
    if not isinstance(target, str) or target not in TARGETS:
        raise ValueError(
            f"target must be one of {tuple(TARGETS)}, or a Target. "
            f"{checks.received('target', target)}"
        )
    return TARGETS[target]


def described(target: Target) -> str | dict:
    """A target in a file's metadata: the name of a row of `TARGETS`, or all fields."""
    if TARGETS.get(target.name) == target:
        return target.name
    return dataclasses.asdict(target)
