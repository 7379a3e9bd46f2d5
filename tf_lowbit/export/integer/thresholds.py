"""Scales and biases with which an integer kernel outputs the trained network's codes.

A layer's accumulator `A` is a bounded integer, so a channel has finitely many decision
points: `A_j`, the smallest accumulator whose output code is j or above. A kernel
requantizes `acc = u A + b`, monotonically. If it is right at `A_j` and at `A_j - 1` for
every j, it is right for all inputs. Upscaling the weights by the integer `u` leaves
room for the integer bias `b` between two accumulators.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tf_lowbit.export.integer import kernels

# Number of biases to try on each side of the nominal one, within `_REACH` accumulators.
_CANDIDATES = 16
_REACH = 2
# XNNPACK requires multipliers below 256.
_LARGEST_MULTIPLIER = 255.0


@dataclasses.dataclass(frozen=True)
class Affine:
    """Constants of an integer layer's requantization, per channel.

    Attributes:
        weight_scales: float32 [channels], the scales of the file's weights.
        biases: int32 [channels], in units of the upscaled accumulator.
        constant: bool [channels], whether the channel's output is constant. Its weights
            must be zero, and the bias is its code.
        thresholds: int64 [channels, high - low], `A_j` for j = low + 1, ..., high. A
            value at or below the smallest accumulator is always reached; one above the
            largest never.
    """

    weight_scales: np.ndarray
    biases: np.ndarray
    constant: np.ndarray
    thresholds: np.ndarray


def ideal(
    gain: np.ndarray,
    offset: np.ndarray,
    low: int,
    high: int,
    smallest: np.ndarray,
    largest: np.ndarray,
) -> np.ndarray:
    """The decision points of `code = clip(round(gain A + offset), low, high)`.

    Computed in float64, half to even, like the trained network.

    Args:
        gain: float64 [channels], >= 0, output codes per unit of `A`.
        offset: float64 [channels], the unrounded code at `A = 0`.
        low: Lowest code.
        high: Highest code.
        smallest: int64 [channels], the smallest accumulator.
        largest: int64 [channels], the largest accumulator.

    Returns:
        Int64 [channels, high - low], clipped to [smallest, largest + 1].
    """
    codes = np.arange(low + 1, high + 1)
    gain, offset = np.asarray(gain)[:, None], np.asarray(offset)[:, None]
    smallest, largest = np.asarray(smallest)[:, None], np.asarray(largest)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        real = np.ceil((codes - 0.5 - offset) / gain)
    reached = np.broadcast_to(offset, real.shape)
    real = np.where(
        gain > 0, real, np.where(np.rint(reached) >= codes, -np.inf, np.inf)
    )
    points = np.clip(real, smallest, largest + 1).astype(np.int64)
    # Division and ceil can be off by one near a tie of gain A + offset.
    for _ in range(2):
        points = np.where(np.rint(gain * points + offset) < codes, points + 1, points)
        below = np.rint(gain * (points - 1) + offset) >= codes
        points = np.where(below, points - 1, points)
    return np.clip(points, smallest, largest + 1)


def place(
    gain: np.ndarray,
    offset: np.ndarray,
    *,
    low: int,
    high: int,
    smallest: np.ndarray,
    largest: np.ndarray,
    upscale: int,
    input_scale: float,
    output_scale: float,
    kernel_names: Sequence[str] = (kernels.XNNPACK,),
    away: np.ndarray | bool = False,
) -> Affine:
    """Finds float32 weight scales and integer biases with the fewest wrong decisions.

    With `w = 1 / M`, decision j is right if `w (j - 1/2)` lies between
    `u (A_j - 1) + b` and `u A_j + b`. For a bias `b` this is an interval of `w`. The
    search tries biases around the nominal one, each with the `w` that lies in most
    intervals. Among equal ones it takes the bias with the widest margin.

    Args:
        gain: As in `ideal`, like the next five arguments.
        offset: The unrounded code at `A = 0`.
        low: Lowest code.
        high: Highest code.
        smallest: The smallest accumulator.
        largest: The largest accumulator.
        upscale: u.
        input_scale: float32 scale of the file's input tensor.
        output_scale: float32 scale of the file's output tensor.
        kernel_names: Kernels under which the decisions must be right.
        away: From `kernels.rounds_away`; False for none.

    Returns:
        The constants of all channels.
    """
    gain, offset = np.asarray(gain, np.float64), np.asarray(offset, np.float64)
    smallest, largest = np.asarray(smallest, np.int64), np.asarray(largest, np.int64)
    points = ideal(gain, offset, low, high, smallest, largest)
    # Without a decision point inside, every accumulator gives the same code.
    inside = (points > smallest[:, None]) & (points <= largest[:, None])
    constant = np.asarray(~inside.any(axis=1))
    unit = float(output_scale) / float(input_scale)
    limit = kernels.INT32_MAX - upscale * np.maximum(abs(smallest), abs(largest)) - 1

    nominal = upscale / np.where(constant, 1.0, gain)
    # With one decision point, any scale will do that keeps the others out of reach. The
    # scale of a small gain would need a bias beyond int32.
    span = upscale * (largest - smallest + 1.0)
    nominal = np.where(inside.sum(axis=1) == 1, np.minimum(nominal, 2 * span), nominal)
    # The bias must fit int32 at the outermost decision, too.
    edges = np.abs(low + np.arange(points.shape[1]) + 0.5)
    outermost = np.where(inside, edges, 0.5).max(axis=1)
    nominal = np.clip(nominal, 1 / _LARGEST_MULTIPLIER, limit / outermost)

    def scales_of(widths):
        return (unit / widths).astype(np.float32)

    def bias_interval(scales):
        return _bias_interval(
            points, smallest, largest, low, upscale, input_scale, scales, output_scale
        )

    middle = np.rint(sum(bias_interval(scales_of(nominal))) / 2)
    best_scales, best_biases = scales_of(nominal), np.zeros(len(gain), np.int64)
    best = np.full((2, len(gain)), np.inf)  # violated decisions, minus the margin
    for shift in _shifts(upscale):
        biases = np.clip(middle + shift, -limit, limit).astype(np.int64)
        scales = scales_of(
            _widths(
                points, smallest, largest, low, upscale, biases, nominal, kernel_names
            )
        )
        bias_low, bias_high = bias_interval(scales)
        margin = np.minimum(biases - bias_low, bias_high - biases)
        multipliers = {
            name: kernels.multiplier(name, input_scale, scales, output_scale)
            for name in kernel_names
        }
        violated = _violated(
            points, smallest, largest, low, high, upscale, biases, multipliers, away
        )
        better = (violated < best[0]) | ((violated == best[0]) & (-margin < best[1]))
        best = np.where(better, np.stack([violated, -margin]), best)
        best_scales = np.where(better, scales, best_scales)
        best_biases = np.where(better, biases, best_biases)
        if not best[0].any() and (best[1] < -0.25 * upscale).all():
            break  # Nothing is violated, with a margin of a quarter accumulator.
    code = low + (points <= smallest[:, None]).sum(axis=1)
    return Affine(
        np.where(constant, np.float32(unit), best_scales).astype(np.float32),
        np.where(constant, code, best_biases).astype(np.int32),
        constant,
        points,
    )


def _shifts(upscale: int) -> np.ndarray:
    """Shifts of the nominal bias, in ascending magnitude."""
    reach = _REACH * upscale
    shifts = np.arange(-reach, reach + 1, max(1, reach // _CANDIDATES))
    shifts = np.union1d(shifts, [-1, 0, 1])
    return shifts[np.argsort(np.abs(shifts), kind="stable")]


def _widths(points, smallest, largest, low, upscale, biases, nominal, names):
    """The `w = 1 / M` with the most right decisions, for given biases."""
    edges = low + np.arange(points.shape[1]) + 0.5
    # Other kernels round twice if they shift right. After the first rounding they reach
    # a code early, by up to half a unit, of which 2^-shift make a code.
    early = np.zeros((len(nominal), 1))
    if set(names) != {kernels.XNNPACK}:
        mantissa, shift = np.frexp(1 / nominal)
        early[:, 0] = np.where(shift < 0, 0.5 / mantissa, 0.0)
    late = 0.0 if kernels.XNNPACK in names else early
    reached = (upscale * points + biases[:, None] + late) / edges
    missed = (upscale * (points - 1) + biases[:, None] + early) / edges
    least = np.maximum(nominal[:, None] * 0.5, 1 / _LARGEST_MULTIPLIER)
    # At a steep gain several codes lie between two accumulators. A gain of half a code
    # per accumulator then decides equally well, with a wide choice of biases.
    most = np.maximum(nominal[:, None] * 2.0, 2.0 * upscale)
    # A point that no accumulator reaches, or that all reach, bounds one side only.
    must_reach, must_miss = points <= largest[:, None], points > smallest[:, None]
    is_up = edges > 0
    start = np.where(
        is_up, np.where(must_miss, missed, least), np.where(must_reach, reached, least)
    )
    end = np.where(
        is_up, np.where(must_reach, reached, most), np.where(must_miss, missed, most)
    )
    start, end = np.clip(start, least, most), np.clip(end, least, most)
    is_open = (end > start).astype(np.int64)
    # The section that most intervals cover, and the widest of equal ones.
    ends = np.concatenate([least, start, end, most], axis=1)
    turns = np.concatenate([0 * is_open[:, :1], is_open, -is_open], axis=1)
    turns = np.pad(turns, ((0, 0), (0, 1)))
    order = np.argsort(ends, axis=1, kind="stable")
    ends = np.take_along_axis(ends, order, 1)
    depth = np.cumsum(np.take_along_axis(turns, order, 1), axis=1)[:, :-1]
    length = np.diff(ends, axis=1)
    score = np.where(length > 0, depth + length / (2 * most), -1.0)
    chosen = score.argmax(axis=1)[:, None]
    pairs = [np.take_along_axis(ends, chosen + side, 1)[:, 0] for side in (0, 1)]
    return (pairs[0] + pairs[1]) / 2


def _bias_interval(
    points, smallest, largest, low, upscale, input_scale, scales, output_scale
):
    """Bounds on the bias between which all decisions are right at the given scales."""
    m = kernels.multiplier(kernels.XNNPACK, input_scale, scales, output_scale)
    edges = (low + np.arange(points.shape[1]) + 0.5) / m.astype(np.float64)[:, None]
    smallest, largest = smallest[:, None], largest[:, None]
    needs_reached = points <= largest  # at max(A_j, smallest)
    needs_missed = points > smallest  # at min(A_j - 1, largest)
    bias_low = np.where(needs_reached, edges - upscale * points, -np.inf).max(axis=1)
    bias_high = np.where(needs_missed, edges - upscale * (points - 1), np.inf)
    bias_high = bias_high.min(axis=1)
    # One-sided only if the channel is constant: any bias beyond the edge will do.
    bias_low = np.where(np.isfinite(bias_low), bias_low, bias_high - 2 * upscale)
    bias_high = np.where(np.isfinite(bias_high), bias_high, bias_low + 2 * upscale)
    return bias_low, bias_high


def _violated(points, smallest, largest, low, high, upscale, biases, multipliers, away):
    """Counts the wrong decision points of each channel, over all kernels."""
    codes = np.arange(low + 1, high + 1)
    at = np.clip(points, smallest[:, None], largest[:, None])
    before = np.clip(points - 1, smallest[:, None], largest[:, None])
    wrong = np.zeros(len(points), np.int64)
    for name, m in multipliers.items():
        arguments = (m[:, None], low, high, np.reshape(away, (-1, 1)))
        reached = kernels.requantize(name, upscale * at + biases[:, None], *arguments)
        missed = kernels.requantize(
            name, upscale * before + biases[:, None], *arguments
        )
        wrong += ((points <= largest[:, None]) & (reached < codes)).sum(axis=1)
        wrong += ((points > smallest[:, None]) & (missed >= codes)).sum(axis=1)
        held = _is_held(name, m, biases, upscale, smallest, largest)
        wrong += np.where(held, 0, 2 * len(codes))
    return wrong


def _is_held(name, multipliers, biases, upscale, smallest, largest):
    """Whether no accumulator of a channel overflows in the kernel."""
    ends = np.abs(upscale * np.stack([smallest, largest]) + biases).max(axis=0)
    return ends <= kernels.largest_accumulator(name, multipliers)


def reached_by(
    kernel: str,
    multipliers: np.ndarray,
    biases: np.ndarray,
    upscale: int,
    low: int,
    high: int,
    smallest: np.ndarray,
    largest: np.ndarray,
    away: np.ndarray | bool = False,
) -> np.ndarray:
    """The decision points of a kernel, by bisection over all accumulators.

    Args:
        kernel: One of `kernels`.
        multipliers: From `kernels.multiplier`.
        biases: int [channels]; the other arguments are as in `place`.

    Returns:
        Int64 [channels, high - low] in [smallest, largest + 1], as `ideal`. If
        accumulators of a channel overflow in the kernel, no code counts as reached.
    """
    codes = np.arange(low + 1, high + 1)
    shape = (len(biases), len(codes))
    smallest, largest = np.asarray(smallest, np.int64), np.asarray(largest, np.int64)
    left = np.broadcast_to(smallest[:, None], shape).copy()
    right = np.broadcast_to(largest[:, None] + 1, shape).copy()
    biases = np.asarray(biases, np.int64)
    held = _is_held(kernel, multipliers, biases, upscale, smallest, largest)
    left = np.where(held[:, None], left, right)
    biases, away = biases[:, None], np.reshape(away, (-1, 1))
    while (left < right).any():
        middle = (left + right) >> 1
        got = kernels.requantize(
            kernel, upscale * middle + biases, multipliers[:, None], low, high, away
        )
        is_reached = got >= codes
        right = np.where(is_reached & (left < right), middle, right)
        left = np.where(~is_reached & (left < right), middle + 1, left)
    return left


def wrong_decisions(points: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Counts the accumulators with a wrong decision in each channel, over all codes.

    Args:
        points: The ideal decision points, [channels, codes].
        reached: The kernel's decision points, [channels, codes].

    Returns:
        Int64 [channels].
    """
    return np.abs(np.asarray(points, np.int64) - reached).sum(axis=1)
