"""Residual blocks, pre- and post-activation, over one plan of convolutions.

The convolutions of a block (`basic`, `bottleneck`) are separate from its order of
normalization and activation (`preact_block`, `postact_block`).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tf_lowbit.compat import KerasTensor, keras
from tf_lowbit.core import checks
from tf_lowbit.models import layers


class Conv(NamedTuple):
    """One convolution of a block."""

    filters: int
    kernel_size: int
    strides: int


class Block(NamedTuple):
    """The position of a block in its network.

    Attributes:
        name: "stage<s>_block<b>", both counted from 1.
        filters: Width of its stage.
        strides: 2 in the first block of every stage but the first, else 1.
        first: Whether it is the first block of its stage.
        last: Whether it is the last block of the network.
    """

    name: str
    filters: int
    strides: int
    first: bool
    last: bool


def cifar_counts(depth: int) -> list[int]:
    """Returns the blocks per stage of a CIFAR ResNet of `6 n + 2` layers: n, 3 times.

    Raises:
        ValueError: If `depth` is not 6n+2 with n >= 1.
    """
    if not checks.is_integer(depth) or depth < 8 or depth % 6 != 2:
        raise ValueError(
            "depth must be 6n+2 with n >= 1 (8, 14, 20, ...). "
            f"Received: depth={depth!r}"
        )
    return [(depth - 2) // 6] * 3


def layout(counts: Sequence[int], width: int) -> Iterator[Block]:
    """Yields the blocks in forward order; each later stage halves size, doubles width.

    Args:
        counts: Number of blocks of each stage.
        width: Filters of the first stage.
    """
    for stage, count in enumerate(counts):
        for index in range(count):
            yield Block(
                name=f"stage{stage + 1}_block{index + 1}",
                filters=width * 2**stage,
                strides=2 if stage > 0 and index == 0 else 1,
                first=index == 0,
                last=stage == len(counts) - 1 and index == count - 1,
            )


def basic(filters: int, strides: int) -> tuple[Conv, ...]:
    """Two 3x3 convolutions, the first one strided (arXiv:1512.03385)."""
    return Conv(filters, 3, strides), Conv(filters, 3, 1)


def bottleneck(filters: int, strides: int) -> tuple[Conv, ...]:
    """1x1, 3x3 and 1x1 convolutions; the last has 4 times the filters.

    The 3x3 convolution has the stride, as in torchvision ("v1.5"). In arXiv:1512.03385
    the first 1x1 has it, and skips three of four pixels.
    """
    return Conv(filters, 1, 1), Conv(filters, 3, strides), Conv(4 * filters, 1, 1)


def _projection(x, plan: tuple[Conv, ...], *, weight_decay: float, name: str):
    """Returns a 1x1 convolution of `x`, or None if the shapes already agree."""
    strides = math.prod(conv.strides for conv in plan)
    filters = plan[-1].filters
    if strides == 1 and x.shape[-1] == filters:
        return None
    return layers.conv(
        x,
        filters,
        1,
        strides=strides,
        name=f"{name}_shortcut",
        weight_decay=weight_decay,
    )


def preact_block(
    x: KerasTensor,
    plan: tuple[Conv, ...],
    *,
    first: bool,
    activated: bool = False,
    weight_decay: float,
    name: str,
) -> KerasTensor:
    """BN-ReLU before each convolution (He et al., arXiv:1603.05027).

    In the first block of a stage the shortcut starts after the first BN-ReLU, so that
    it reads low-bit values once that activation is quantized. In other blocks it is the
    identity of the block's input. A shortcut that must change the shape is a 1x1
    convolution, `<name>_shortcut`, without BN.

    Args:
        x: Float tensor of shape (batch, height, width, channels).
        plan: The convolutions.
        first: Whether this is the first block of its stage.
        activated: Whether `x` is already an activation, so that the first BN-ReLU is
            left out.
        weight_decay: Coupled weight decay, as in torch.
        name: Prefix of all layer names: `<name>_bn1`, `<name>_relu1`, `<name>_conv1`
            and so on, `<name>_shortcut`, `<name>_add`.

    Returns:
        Float tensor of shape (batch, ceil(height / s), ceil(width / s), filters): s is
        the product of the strides, filters those of the last convolution.
    """
    shortcut = y = x
    for i, conv in enumerate(plan, start=1):
        if i > 1 or not activated:
            y = layers.batch_norm(y, name=f"{name}_bn{i}", weight_decay=weight_decay)
            y = layers.relu(y, name=f"{name}_relu{i}")
        if i == 1 and first:
            shortcut = y
        y = layers.conv(
            y,
            conv.filters,
            conv.kernel_size,
            strides=conv.strides,
            name=f"{name}_conv{i}",
            weight_decay=weight_decay,
        )
    projected = _projection(shortcut, plan, weight_decay=weight_decay, name=name)
    if projected is not None:
        shortcut = projected
    return keras.layers.Add(name=f"{name}_add")([y, shortcut])


def postact_block(
    x: KerasTensor,
    plan: tuple[Conv, ...],
    *,
    weight_decay: float,
    name: str,
    output_name: str | None = None,
) -> KerasTensor:
    """BN after each convolution, and a ReLU after the sum (arXiv:1512.03385).

    A shortcut that must change the shape is a 1x1 convolution with BN,
    `<name>_shortcut` and `<name>_shortcut_bn`; any other is the identity.

    Args:
        x: Float tensor of shape (batch, height, width, channels).
        plan: The convolutions.
        weight_decay: Coupled weight decay, as in torch.
        name: Prefix of all layer names: `<name>_conv1`, `<name>_bn1`, `<name>_relu1`
            and so on. The ReLU after the sum has the last number.
        output_name: Another name for the ReLU after the sum, or None.

    Returns:
        Float tensor, shaped as in `preact_block`.
    """
    y = x
    for i, conv in enumerate(plan, start=1):
        y = layers.conv(
            y,
            conv.filters,
            conv.kernel_size,
            strides=conv.strides,
            name=f"{name}_conv{i}",
            weight_decay=weight_decay,
        )
        y = layers.batch_norm(y, name=f"{name}_bn{i}", weight_decay=weight_decay)
        if i < len(plan):
            y = layers.relu(y, name=f"{name}_relu{i}")
    shortcut = _projection(x, plan, weight_decay=weight_decay, name=name)
    if shortcut is None:
        shortcut = x
    else:
        shortcut = layers.batch_norm(
            shortcut, name=f"{name}_shortcut_bn", weight_decay=weight_decay
        )
    y = keras.layers.Add(name=f"{name}_add")([y, shortcut])
    return layers.relu(y, name=output_name or f"{name}_relu{len(plan)}")
