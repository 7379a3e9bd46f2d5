"""The quantizers once more: NumPy, float64, written from the papers.

Nothing here imports the library. Codes are integers in float64 arrays; `k` above 8
means "not rounded", with the range of 8 bits where the range depends on k. NumPy's
`round` is half to even.
"""

import numpy as np


def highest_unsigned(k: int) -> int:
    """`n = 2^k - 1`, at most that of 8 bits."""
    return 2 ** min(k, 8) - 1


def signed_limits(k: int, narrow: bool) -> tuple[int, int]:
    """(Q_N, Q_P): 2^(k-1) and 2^(k-1) - 1; (1, 1) at one bit."""
    if k == 1:
        return 1, 1
    highest = 2 ** (min(k, 8) - 1) - 1
    return (highest if narrow else highest + 1), highest


def unsigned_codes(x, limit: float, k: int) -> np.ndarray:
    """`round(n clip(x, 0, limit) / limit)`."""
    return np.round(_unit(x, limit) * (2**k - 1))


def unsigned_values(x, limit: float, k: int) -> np.ndarray:
    """`limit / n * codes`, or the clip alone above 8 bits."""
    if k > 8:
        return _unit(x, limit) * limit
    return unsigned_codes(x, limit, k) * limit / (2**k - 1)


def _unit(x, limit):
    return np.clip(np.asarray(x, np.float64) / limit, 0.0, 1.0)


def unsigned_gradients(x, limit: float, upstream):
    """(dL/dx, dL/dlimit): 1 in [0, limit]; 1 above it (PACT)."""
    x, upstream = np.asarray(x, np.float64), np.asarray(upstream, np.float64)
    inside = ~np.signbit(x) & (x <= limit)  # -0 is below 0.
    return np.where(inside, upstream, 0.0), upstream[x > limit].sum()


def signed_codes(x, step, k: int, narrow: bool) -> np.ndarray:
    """`round(clip(x / s, -Q_N, Q_P))`, the sign (+1 at zero) at one bit."""
    scaled = np.asarray(x, np.float64) / np.asarray(step, np.float64)
    if k == 1:
        return np.where(scaled >= 0, 1.0, -1.0)
    negative, positive = signed_limits(k, narrow)
    clipped = np.clip(scaled, -negative, positive)
    return clipped if k > 8 else np.round(clipped)


def lsq_gradients(x, step, upstream, k: int, *, signed: bool, narrow: bool = False):
    """LSQ's (dL/dx, dL/dstep), the latter summed to the shape of `step`.

    dy/dstep is `round(v) - v` in range and the clipped code outside.
    """
    x, upstream = np.asarray(x, np.float64), np.asarray(upstream, np.float64)
    step = np.asarray(step, np.float64)
    scaled = x / step
    if signed:
        negative, high = signed_limits(k, narrow)
        low = -negative
        codes = signed_codes(x, step, k, narrow)
    else:
        low, high = 0, highest_unsigned(k)
        clipped = np.clip(scaled, low, high)
        codes = clipped if k > 8 else np.round(clipped)
    inside = (scaled >= low) & (scaled <= high)
    d_step = upstream * np.where(inside, codes - scaled, codes)
    axes = tuple(i for i in range(x.ndim) if step.ndim == 0 or step.shape[i] == 1)
    d_step = d_step.sum(axis=axes, keepdims=True).reshape(step.shape)
    return np.where(inside, upstream, 0.0), d_step


def dorefa_unit(w) -> np.ndarray:
    """`u = tanh(w) / (2 max|tanh(w)|) + 1/2`, 1/2 where all weights are zero."""
    t = np.tanh(np.asarray(w, np.float64))
    largest = np.abs(t).max()
    return t / (2 * largest) + 0.5 if largest else np.full_like(t, 0.5)


def dorefa_codes(w, k: int) -> np.ndarray:
    """`2 round(n u) - n`: odd integers."""
    n = 2**k - 1
    return 2 * np.round(n * dorefa_unit(w)) - n


def dorefa_gradient(w, upstream, *, max_gradient: bool = True) -> np.ndarray:
    """The gradient of `t / max|t|`, written out as a Jacobian.

    d(t_i / m) / dt_j = delta_ij / m - t_i / m^2 * dm/dt_j, where dm/dt_j is the
    sign of t_j at the maximum, shared where several are tied.
    """
    shape = np.shape(w)
    t = np.tanh(np.asarray(w, np.float64)).ravel()
    upstream = np.asarray(upstream, np.float64).ravel()
    largest = np.abs(t).max()
    tied = np.abs(t) == largest
    d_max = np.where(tied, np.sign(t), 0.0) / tied.sum()
    jacobian = np.eye(t.size) / largest
    if max_gradient:
        jacobian -= np.outer(t, d_max) / largest**2
    return ((upstream @ jacobian) * (1 - t**2)).reshape(shape)


def uniform_scale(w, k: int, axes=None) -> np.ndarray:
    """`max|w| / Q`, or `mean|w|` at one bit, over `axes`."""
    magnitude = np.abs(np.asarray(w, np.float64))
    if k == 1:
        return magnitude.mean(axis=axes, keepdims=axes is not None)
    highest = signed_limits(k, narrow=True)[1]
    return magnitude.max(axis=axes, keepdims=axes is not None) / highest


def statsq_scale(w, axes) -> np.ndarray:
    """`2 mean|w|` over `axes`."""
    return 2 * np.abs(np.asarray(w, np.float64)).mean(axis=axes, keepdims=True)


def statsq_codes(w, k: int, axes) -> np.ndarray:
    """`2 round(n u) - n` with `u = clip(w / s, -1, 1) / 2 + 1/2`: odd integers."""
    n, scaled = 2**k - 1, np.asarray(w, np.float64) / statsq_scale(w, axes)
    return 2 * np.round(n * (np.clip(scaled, -1, 1) / 2 + 0.5)) - n


def standardized(w) -> np.ndarray:
    """`(w - mean) / std`, the biased deviation of the whole tensor."""
    w = np.asarray(w, np.float64)
    return (w - w.mean()) / w.std()


def standardized_gradient(w, upstream) -> np.ndarray:
    """Of `(w - mean) / std`, written out as a Jacobian.

    d z_i / d w_j = (delta_ij - 1/N - z_i z_j / N) / std.
    """
    z, g = standardized(w).ravel(), np.asarray(upstream, np.float64).ravel()
    jacobian = (np.eye(z.size) - 1 / z.size - np.outer(z, z) / z.size) / np.std(w)
    return (g @ jacobian).reshape(np.shape(w))


def half_codes(lowest: int, highest: int) -> np.ndarray:
    """The decision thresholds in units of the step: -1.5, -0.5, 0.5, ..."""
    return np.arange(lowest, highest) + 0.5


def shifted(values, ulps: int) -> np.ndarray:
    """Float32 values moved by so many units in the last place (zero stays)."""
    values = np.asarray(values, np.float32)
    toward = np.float32(np.copysign(np.inf, ulps))
    for _ in range(abs(ulps)):
        values = np.where(values == 0, values, np.nextafter(values, toward))
    return values


def around(values, ulps: int) -> np.ndarray:
    """Just below and just above each value, by so many units in the last place."""
    return np.concatenate([shifted(values, -ulps), shifted(values, ulps)])
