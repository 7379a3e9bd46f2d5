"""Scales and biases that make an integer kernel decide as the trained network does.

A layer's accumulator `A` is a bounded integer, so a channel has finitely many decision
points: `A_j`, the smallest accumulator whose output code is j or above. A kernel sees
`acc = u A + b` and is monotone in it. If it is right at `A_j` and at `A_j - 1` for
every j, it is right for all inputs. Upscaling the weights by the integer `u` leaves
room between two accumulators for the integer bias `b` to be placed in (ours).
"""

import dataclasses

import numpy as np

from tf_lowbit.export import kernels

# Biases that are tried on each side of the nominal one, over `_REACH` accumulators.
_CANDIDATES = 16
_REACH = 2
# XNNPACK takes multipliers below 256.
_LARGEST_MULTIPLIER = 255.0


@dataclasses.dataclass(frozen=True)
class Affine:
    """What an integer layer computes behind its accumulator, channel by channel.

    Attributes:
        weight_scales: float32: the scales of the file's weights.
        biases: int32, in units of the upscaled accumulator.
        constant: bool: channels whose output cannot change. Their weights are to be
            zero, and the bias is their code.
        thresholds: int64, channels x (high - low): the `A_j` of j = low + 1, ..., high.
            Below the smallest accumulator: always reached; above the largest: never.
    """

    weight_scales: np.ndarray
    biases: np.ndarray
    constant: np.ndarray
    thresholds: np.ndarray


def ideal(gain, offset, low: int, high: int, smallest, largest) -> np.ndarray:
    """The decision points of `code = clip(round(gain A + offset), low, high)`.

    Half to even, as the trained network rounds; in float64.

    Args:
        gain: float64, one for each channel, >= 0: output codes for one of `A`.
        offset: float64, likewise: the code at `A = 0`, not rounded.
        low: lowest code.
        high: highest code.
        smallest: int64, likewise: the smallest accumulator.
        largest: the largest one.

    Returns:
        Int64, channels x (high - low), clipped to [smallest, largest + 1].
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
    # Division and ceil are off by one where gain A + offset is near a tie.
    for _ in range(2):
        points = np.where(np.rint(gain * points + offset) < codes, points + 1, points)
        below = np.rint(gain * (points - 1) + offset) >= codes
        points = np.where(below, points - 1, points)
    return np.clip(points, smallest, largest + 1)


def place(
    gain,
    offset,
    *,
    low: int,
    high: int,
    smallest,
    largest,
    upscale: int,
    input_scale: float,
    output_scale: float,
    kernel_names=(kernels.XNNPACK,),
    away=False,
) -> Affine:
    """Finds float32 weight scales and integer biases with the fewest wrong decisions.

    With `w = 1 / M`, decision j is right where `w (j - 1/2)` lies between
    `u (A_j - 1) + b` and `u A_j + b`: for a bias `b`, an interval of `w`. Biases
    around the nominal one are tried; each takes the scale in most of its intervals,
    and of equals that is taken whose bias could move farthest.

    Args:
        gain: as in `ideal`.
        offset: as in `ideal`.
        low: lowest code.
        high: highest code.
        smallest: as in `ideal`.
        largest: as in `ideal`.
        upscale: u.
        input_scale: float32, of the file's input tensor.
        output_scale: float32, of the file's output tensor.
        kernel_names: kernels that are to decide right.
        away: from `kernels.rounds_away`; False for none.

    Returns:
        The affine, one entry for each channel.
    """
    gain, offset = np.asarray(gain, np.float64), np.asarray(offset, np.float64)
    smallest, largest = np.asarray(smallest, np.int64), np.asarray(largest, np.int64)
    points = ideal(gain, offset, low, high, smallest, largest)
    # Where no decision point lies inside, the code is the same for every accumulator.
    inside = (points > smallest[:, None]) & (points <= largest[:, None])
    constant = ~inside.any(axis=1)
    unit = float(output_scale) / float(input_scale)
    limit = kernels.INT32_MAX - upscale * np.maximum(abs(smallest), abs(largest)) - 1

    nominal = upscale / np.where(constant, 1.0, gain)
    # With one decision point any scale serves that keeps the others out of reach; a
    # small gain would ask for a bias beyond int32.
    span = upscale * (largest - smallest + 1.0)
    nominal = np.where(inside.sum(axis=1) == 1, np.minimum(nominal, 2 * span), nominal)
    # What the bias has to be at the outermost decision must fit in any case.
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
            break  # Nothing is violated, and no bias is near an edge.
    code = low + (points <= smallest[:, None]).sum(axis=1)
    return Affine(
        np.where(constant, np.float32(unit), best_scales).astype(np.float32),
        np.where(constant, code, best_biases).astype(np.int32),
        constant,
        points,
    )


def _shifts(upscale: int) -> np.ndarray:
    """By how much the nominal bias is moved, the least first."""
    reach = _REACH * upscale
    shifts = np.arange(-reach, reach + 1, max(1, reach // _CANDIDATES))
    shifts = np.union1d(shifts, [-1, 0, 1])
    return shifts[np.argsort(np.abs(shifts), kind="stable")]


def _widths(points, smallest, largest, low, upscale, biases, nominal, names):
    """`w = 1 / M` at which most decisions are right, for given biases."""
    edges = low + np.arange(points.shape[1]) + 0.5
    # Other kernels round twice if they shift to the right. The first time makes them
    # reach a code early, by half a unit of their own, of which 2^-shift make a code.
    early = np.zeros((len(nominal), 1))
    if set(names) != {kernels.XNNPACK}:
        mantissa, shift = np.frexp(1 / nominal)
        early[:, 0] = np.where(shift < 0, 0.5 / mantissa, 0.0)
    late = 0.0 if kernels.XNNPACK in names else early
    reached = (upscale * points + biases[:, None] + late) / edges
    missed = (upscale * (points - 1) + biases[:, None] + early) / edges
    least = np.maximum(nominal[:, None] * 0.5, 1 / _LARGEST_MULTIPLIER)
    # At a steep gain several codes lie between two accumulators; a gain of half a code
    # an accumulator then decides as well, with a wide choice of biases.
    most = np.maximum(nominal[:, None] * 2.0, 2.0 * upscale)
    # A point that no accumulator reaches, or all do, bounds on one side only.
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
    # The stretch that most intervals cover, and of equals the widest.
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
    """Real biases between which all decisions are right at the given scales."""
    m = kernels.multiplier(kernels.XNNPACK, input_scale, scales, output_scale)
    edges = (low + np.arange(points.shape[1]) + 0.5) / m.astype(np.float64)[:, None]
    smallest, largest = smallest[:, None], largest[:, None]
    needs_reached = points <= largest  # at max(A_j, smallest)
    needs_missed = points > smallest  # at min(A_j - 1, largest)
    bias_low = np.where(needs_reached, edges - upscale * points, -np.inf).max(axis=1)
    bias_high = np.where(needs_missed, edges - upscale * (points - 1), np.inf)
    bias_high = bias_high.min(axis=1)
    # One-sided only where the channel is constant; any bias beyond the edge serves.
    bias_low = np.where(np.isfinite(bias_low), bias_low, bias_high - 2 * upscale)
    bias_high = np.where(np.isfinite(bias_high), bias_high, bias_low + 2 * upscale)
    return bias_low, bias_high


def _violated(points, smallest, largest, low, high, upscale, biases, multipliers, away):
    """How many decision points each channel gets wrong, over all kernels."""
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
    """Whether the kernel computes every accumulator of a channel without overflow."""
    ends = np.abs(upscale * np.stack([smallest, largest]) + biases).max(axis=0)
    return ends <= kernels.largest_accumulator(name, multipliers)


def reached_by(
    kernel: str,
    multipliers,
    biases,
    upscale: int,
    low: int,
    high: int,
    smallest,
    largest,
    away=False,
) -> np.ndarray:
    """The decision points that a kernel has, by bisection over all accumulators.

    Args:
        kernel: one of `kernels`.
        multipliers: from `kernels.multiplier`.
        biases: int, one for each channel.
        upscale: u.
        low: lowest code.
        high: highest code.
        smallest: the smallest accumulator, before upscaling.
        largest: the largest one.
        away: from `kernels.rounds_away`; False for none.

    Returns:
        Int64, channels x (high - low), in [smallest, largest + 1], as `ideal`. In a
        channel whose accumulators overflow in the kernel, which computes anything
        then, no code is reached.
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


def wrong_decisions(points, reached) -> np.ndarray:
    """How many accumulators each channel decides wrongly, over all codes.

    Args:
        points: the wanted decision points, channels x codes.
        reached: those of the kernel.

    Returns:
        Int64, one for each channel.
    """
    return np.abs(np.asarray(points, np.int64) - reached).sum(axis=1)
