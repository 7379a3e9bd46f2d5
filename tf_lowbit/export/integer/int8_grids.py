"""The integer tensors of a file: k-bit grids inside int8."""

import dataclasses
import math

import numpy as np

from tf_lowbit.compat import keras

INT8 = (-128, 127)
# Fused activations of the schema, and the clamp that each is.
NO_CLAMP = "NONE"
CLAMP_AT_ZERO = "RELU"
CLAMP_AT_ONE = "RELU_N1_TO_1"
CLAMP_AT_SIX = "RELU6"
CLAMPS = (NO_CLAMP, CLAMP_AT_ZERO, CLAMP_AT_ONE, CLAMP_AT_SIX)


@keras.utils.register_keras_serializable(package="tf_lowbit")
@dataclasses.dataclass(frozen=True)
class Grid:
    """Codes `low..high` of an integer tensor, and how int8 holds them.

    `value = code * step`, and `code = q - zero_point` for the file's int8 `q`. The zero
    point puts `high` at 127, so that int8 itself clamps above; below, a fused
    activation does: RELU at code 0, or RELU_N1_TO_1 at `low` where the file's scale
    makes `low` minus one. Only the products of scales matter to a layer that reads
    codes, so the scale of the file need not be the step.

    Attributes:
        step: The real value of one code, > 0.
        low: Lowest code, <= 0.
        high: Highest code, >= 0.
        scale: The scale in the file, a float32.
        zero_point: Of the file's int8.
        clamp: The fused activation that clamps at `low`.
    """

    step: float
    low: int
    high: int
    scale: float
    zero_point: int
    clamp: str

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return self.high - self.low + 1

    def holds(self, other: "Grid") -> bool:
        """Whether the other's codes are this one's, at the same step."""
        return (
            self.step == other.step
            and self.low <= other.low
            and other.high <= self.high
        )

    def looks_like(self, other: "Grid") -> bool:
        """Whether the tensors of both are alike; what clamps them is their makers'."""
        return dataclasses.replace(self, clamp=other.clamp) == other

    def get_config(self) -> dict:
        """The attributes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict) -> "Grid":
        """The grid of a configuration."""
        return cls(**config)


def grid(step: float, low: int, high: int) -> Grid:
    """The grid that an integer operator puts out.

    Args:
        step: The real value of one code.
        low: Lowest code, <= 0.
        high: Highest code, >= 0.

    Raises:
        ValueError: If there are more than 256 codes, or zero is none of them.
    """
    made = float_grid(step, low, high)
    if low + made.zero_point == INT8[0]:
        return made
    if low == 0:
        return dataclasses.replace(made, clamp=CLAMP_AT_ZERO)
    return dataclasses.replace(made, scale=_float32(-1.0 / low), clamp=CLAMP_AT_ONE)


def float_grid(step: float, low: int, high: int) -> Grid:
    """The grid that floats are quantized to: its scale must be the step."""
    check(step, low, high)
    zero_point = INT8[1] - high
    return Grid(float(step), low, high, _float32(step), zero_point, NO_CLAMP)


def signed_step(low: float, high: float) -> float:
    """The step of signed 8 bits over a range of values; of zero alone, over -1..1."""
    return max(-low / 128, high / 127) or 1 / 127


def over(low: float, high: float, *, signed: bool) -> Grid:
    """The grid of 8 bits over a range of values; not `signed` for those from 0 on.

    A tensor that is zero on all data needs a fine step too: the biases of the layers
    that read it are multiples of it.
    """
    if signed:
        return grid(signed_step(low, high), *INT8)
    return grid(high / 255 or 1 / 255, 0, 255)


def behind_relu(present: Grid, relu: str, *, in_place: bool = False) -> Grid:
    """The grid of a layer that a ReLU or ReLU6 is fused into.

    Args:
        present: The grid without it.
        relu: "relu" or "relu6".
        in_place: Keep scale and zero point, which must be those of all of int8: the
            layer's output is joined with others of that grid.
    """
    low = max(present.low, 0)
    high = present.high
    if relu == "relu6":
        high = min(high, math.floor(6.0 / present.step + 0.5))
    if not in_place:
        return grid(present.step, low, high)
    clamp = CLAMP_AT_ZERO if high == present.high else CLAMP_AT_SIX
    return dataclasses.replace(present, low=low, high=high, clamp=clamp)


def _float32(value) -> float:
    return float(np.float32(value))


def check(step: float, low: int, high: int) -> None:
    """Refuses a grid that no int8 tensor has.

    Raises:
        ValueError: If there are more than 256 codes, zero is none of them, or the step
            is no positive float32.
    """
    is_step = step > 0 and 0 < np.float32(step) < np.inf
    if not (low <= 0 <= high and high - low < 256 and is_step):
        raise ValueError(
            "An int8 tensor needs at most 256 codes, zero among them, and a positive "
            f"step. Received: codes {low}..{high}, step {step}"
        )


# Pixels of 8 bits, as they are and divided by 255.
RAW_PIXELS = float_grid(1.0, 0, 255)
UNIT_PIXELS = float_grid(_float32(1 / 255), 0, 255)
PIXELS = (RAW_PIXELS, UNIT_PIXELS)
