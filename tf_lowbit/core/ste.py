"""Quantization with stated straight-through gradients (`tf.custom_gradient`).

Each function here has a forward that lies exactly on a grid of
`tf_lowbit.core.grid` and a gradient that its docstring states. `bits` is always a
scalar int32 tensor, read from its variable *before* the call: inside a
`custom_gradient`, eager mode would ask for the variable's own gradient.
"""

from tf_lowbit.compat import in_xla_context, tf
from tf_lowbit.core import grid

IMPLEMENTATIONS = ("auto", "fused", "composed")


def validate_implementation(implementation: str) -> str:
    """Returns `implementation`, or raises an error that says what is allowed.

    Raises:
        ValueError: if it is not "auto", "fused" or "composed".
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS}. "
            f"Received: implementation={implementation!r}"
        )
    return implementation


def choose_implementation(implementation: str = "auto") -> str:
    """Resolves "auto" to "fused" or "composed".

    The fused kernels exist for CPU and GPU. XLA fuses the composed form by itself,
    and other devices (TPU) have no kernel: there "auto" is "composed".

    Args:
        implementation: "auto", "fused" or "composed".

    Raises:
        ValueError: for any other value.
    """
    validate_implementation(implementation)
    if implementation != "auto":
        return implementation
    kinds = {device.device_type for device in tf.config.list_logical_devices()}
    if in_xla_context() or not kinds <= {"CPU", "GPU"}:
        return "composed"
    return "fused"


def _fused_unsigned(inputs, limit, bits):
    return tf.raw_ops.QuantizeAndDequantizeV3(
        input=inputs,
        input_min=0.0,
        input_max=limit,
        num_bits=grid.effective_bits(bits),
        signed_input=False,
        range_given=True,
        narrow_range=False,
        axis=-1,
    )


def _composed_unsigned(inputs, limit, bits):
    codes = grid.unsigned_codes(inputs, limit, bits)
    return codes * grid.unsigned_step(limit, bits)


def unsigned_forward(inputs, limit, bits, implementation: str = "auto"):
    """Values of the unsigned grid on [0, limit], without a gradient of its own.

    Args:
        inputs: float32 tensor of any shape.
        limit: scalar, positive.
        bits: scalar int32 tensor.
        implementation: as in `choose_implementation`.

    Returns:
        Float32 tensor of the same shape; equal in both forms, but for the sign of 0.
    """
    if choose_implementation(implementation) == "fused":
        return _fused_unsigned(inputs, limit, bits)
    return _composed_unsigned(inputs, limit, bits)


def _inside(inputs, low, high):
    return tf.logical_and(inputs >= low, inputs <= high)


def _in_unsigned_range(inputs, limit):
    """Whether `0 <= x <= limit`, but False for -0: one comparison in place of three."""
    # Read as unsigned integers, floats from 0 rise with their values, and those with a
    # sign and NaN lie above infinity.
    bits, highest = tf.bitcast(inputs, tf.uint32), tf.bitcast(limit, tf.uint32)
    return bits <= highest


def _passed(upstream, inside):
    """`upstream` where `inside`, else 0.

    Until the backward pass only the mask is held: a byte for each element, where a
    kernel that takes the activation itself would hold four.
    """
    # As a float the mask would be made, and held, as soon as it can be.
    with tf.control_dependencies([upstream]):
        mask = tf.cast(inside, upstream.dtype)
    # Not a plain product: 0 * inf would be NaN. A select takes longer on CPUs.
    return tf.math.multiply_no_nan(upstream, mask)


def _fused_passed(upstream, inputs, low, high):
    """`upstream` where `low <= inputs <= high`, else 0; 0 * inf is NaN here."""
    # The op promises gradients for its range too; they come back as zero (TF 2.21).
    return tf.raw_ops.QuantizeAndDequantizeV4Grad(
        gradients=upstream, input=inputs, input_min=low, input_max=high, axis=-1
    ).input_backprop


def clip_round(inputs, limit: float, bits, implementation: str = "auto"):
    """A quantized ReLU with a fixed clip: `step * round(clip(x, 0, limit) / step)`.

    Gradient: `dy/dx = 1` where `0 <= x <= limit`, else 0; -0 counts as below 0. This is
    DoReFa's activation quantizer (Zhou et al., arXiv:1606.06160) at `limit = 1`.

    Args:
        inputs: float32 tensor of any shape. NaN stays NaN; +inf becomes `limit`.
        limit: Python float, positive: the clip.
        bits: scalar int32 tensor.
        implementation: "fused" is one kernel forward; "composed" is made of plain
            ops and gives the same values and gradients; "auto" picks.

    Returns:
        Float32 tensor of the same shape, on the unsigned grid of [0, limit].
    """
    fused = choose_implementation(implementation) == "fused"

    @tf.custom_gradient
    def quantize(x):
        def gradient(upstream):
            return _passed(upstream, _in_unsigned_range(x, limit))

        forward = _fused_unsigned if fused else _composed_unsigned
        return forward(x, limit, bits), gradient

    return quantize(inputs)


def learned_clip_round(inputs, limit, bits, implementation: str = "auto"):
    """A quantized ReLU with a learned clip (PACT).

    Gradients: `dy/dx = 1` where `0 <= x <= limit`, else 0 (-0 counts as below 0);
    `dy/dlimit = 1` where `x > limit`, else 0. Choi et al., PACT, arXiv:1805.06085.

    Args:
        inputs: float32 tensor of any shape.
        limit: scalar float32 tensor, positive: the clip, "alpha" in the paper.
        bits: scalar int32 tensor.
        implementation: as in `clip_round`.

    Returns:
        Float32 tensor of the same shape, on the unsigned grid of [0, limit].
    """
    fused = choose_implementation(implementation) == "fused"

    @tf.custom_gradient
    def quantize(x, alpha):
        def gradient(upstream):
            d_alpha = tf.reduce_sum(_passed(upstream, x > alpha))
            return _passed(upstream, _in_unsigned_range(x, alpha)), d_alpha

        forward = _fused_unsigned if fused else _composed_unsigned
        return forward(x, alpha, bits), gradient

    return quantize(inputs, limit)


def normalized_round(weights, bits, max_gradient: bool = True):
    """DoReFa's weight quantizer: tanh, division by the largest, odd grid.

    `t = tanh(w)`, `u = t / (2 max|t|) + 1/2`, `y = (2 round(n u) - n) / n`; the
    maximum is over the whole tensor. Zhou et al., arXiv:1606.06160, as the code of
    arXiv:1908.04680 trains it (no rescale by mean|w|).

    Gradient: rounding counts as the identity, so `dy/dw` is that of `t / max|t|`,
    the maximum included: with `m = max|t|`,
    `dL/dt = g / m - s [|t| = m] sum(g t) / m^2`, where `s = sign(t)` and tied maxima
    share; then `dL/dw = dL/dt (1 - t^2)`.

    Args:
        weights: float32 tensor of any shape: the latent weights. One NaN or infinity
            makes the whole result NaN (under XLA only its own element). All zeros
            are allowed.
        bits: scalar int32 tensor.
        max_gradient: False leaves the maximum out of the gradient (ours; an
            ablation of what the authors' code does).

    Returns:
        Float32 tensor of the same shape, on the odd grid of [-1, 1].
    """

    @tf.custom_gradient
    def quantize(w):
        # tanh would turn an infinite weight into an innocent 1.
        t = tf.where(tf.math.is_finite(w), tf.tanh(w), float("nan"))
        magnitude = tf.abs(t)
        # An all-zero tensor has no scale: u = 1/2 everywhere.
        largest = tf.reduce_max(magnitude)
        largest = tf.where(tf.equal(largest, 0.0), 1.0, largest)
        codes = grid.odd_codes(t / (2.0 * largest) + 0.5, bits)

        def gradient(upstream):
            d_t = upstream / largest
            if max_gradient:
                at_max = tf.cast(tf.equal(magnitude, largest), t.dtype)
                share = at_max * tf.sign(t) / tf.maximum(tf.reduce_sum(at_max), 1.0)
                d_t -= share * (tf.reduce_sum(upstream * t / largest) / largest)
            return tf.raw_ops.TanhGrad(y=t, dy=d_t)

        return codes * grid.odd_step(bits), gradient

    return quantize(weights)


def odd_unit(weights, scale):
    """`u = clip(w / s, -1, 1) / 2 + 1/2`, which `grid.odd_codes` takes."""
    return tf.clip_by_value(weights / scale, -1.0, 1.0) * 0.5 + 0.5


def odd_round(weights, scale, bits):
    """The odd grid of a given scale: `s (2 round(n u) - n) / n` (`odd_unit`).

    Gradient: `dy/dw = 1` everywhere; none for `scale`.

    Args:
        weights: float32 tensor of any shape. NaN stays NaN.
        scale: float32 tensor, positive, broadcastable to `weights`.
        bits: scalar int32 tensor.

    Returns:
        Float32 tensor of the same shape, on the odd grid of [-scale, scale].
    """
    scale = tf.stop_gradient(scale)

    @tf.custom_gradient
    def quantize(w):
        codes = grid.odd_codes(odd_unit(w, scale), bits)
        return codes * (scale * grid.odd_step(bits)), lambda upstream: upstream

    return quantize(weights)


def stepped_round(
    inputs,
    step,
    bits,
    *,
    signed: bool,
    narrow_range: bool = False,
    rounding_bits=None,
    gradient_scale=1.0,
    implementation: str = "auto",
):
    """A quantizer with a learned step (LSQ): `step * round(clip(x / step))`.

    Gradients (Esser et al., LSQ, arXiv:1902.08153): `dy/dx = 1` inside the range,
    else 0; `dy/dstep = round(x / step) - x / step` inside, the clipped code outside,
    summed over the elements that share a step and times `gradient_scale`. With
    `y = step * code` that sum is `(sum(g y) - sum(g x [inside])) / step`.

    Args:
        inputs: float32 tensor of any shape. An infinite one is clipped, and makes the
            step's gradient NaN, so that it stays visible.
        step: float32 tensor, positive, scalar or broadcastable to `inputs`.
        bits: scalar int32 tensor.
        signed: the signed grid; False for the unsigned one (then scalar `step`).
        narrow_range: signed grid only: leave the lowest code out.
        rounding_bits: scalar int32 tensor: `bits` (also where None), or 16 or 32 to
            keep the range of `bits` and not round in it.
        gradient_scale: scalar factor on the step's gradient, "g" in the paper.
        implementation: as in `clip_round`; the signed grid is always composed.

    Returns:
        Float32 tensor of the same shape as `inputs`.
    """
    fused = not signed and choose_implementation(implementation) == "fused"

    @tf.custom_gradient
    def quantize(x, s):
        if signed:
            negative, positive = grid.signed_limits(bits, narrow_range)
            low, high = -negative * s, positive * s
            y = grid.signed_codes(x / s, bits, narrow_range, rounding_bits) * s
        else:
            low, high = 0.0, unsigned_range(s, bits)
            fineness = bits if rounding_bits is None else rounding_bits
            y = unsigned_forward(x, high, fineness, implementation)

        def gradient(upstream):
            # The step's gradient needs `x` itself: a mask would wait besides.
            d_x = (
                _fused_passed(upstream, x, low, high)
                if fused
                else _passed(upstream, _inside(x, low, high))
            )
            d_step = _sum_to_shape(upstream * y - d_x * x, s) / s
            return d_x, d_step * gradient_scale

        return y, gradient

    return quantize(inputs, step)


def unsigned_range(step, bits):
    """The clip `step * n` of an unsigned grid with a learned step.

    Args:
        step: scalar float32 tensor.
        bits: scalar int32 tensor. "Not rounded" keeps the range of 8 bits: the clip
            stays and only the rounding goes.

    Returns:
        Scalar float32 tensor.
    """
    return step * grid.unsigned_limit(tf.minimum(bits, grid.MAX_BITS))


def scaled_round(
    inputs,
    scale,
    bits,
    *,
    narrow_range: bool,
    rounding_bits=None,
    clips_gradient: bool = True,
):
    """Signed rounding with a given scale: `scale * round(clip(x / scale))`.

    Gradient: `dy/dx = 1` inside the range, else 0; none for `scale`. Without
    `clips_gradient` it is 1 everywhere.

    Args:
        inputs: float32 tensor of any shape.
        scale: float32 tensor, positive, scalar or broadcastable to `inputs`.
        bits: scalar int32 tensor.
        narrow_range: leave the lowest code out.
        rounding_bits: as in `stepped_round`.
        clips_gradient: whether nothing is passed on to what is out of range.

    Returns:
        Float32 tensor of the same shape.
    """
    scale = tf.stop_gradient(scale)

    @tf.custom_gradient
    def quantize(x):
        negative, positive = grid.signed_limits(bits, narrow_range)
        y = grid.signed_codes(x / scale, bits, narrow_range, rounding_bits) * scale

        def gradient(upstream):
            if not clips_gradient:
                return upstream
            # What is as large as the range is in it, however `scale * Q` is rounded.
            reach = scale * (1.0 + 2.0**-22)
            return _passed(upstream, _inside(x, -negative * reach, positive * reach))

        return y, gradient

    return quantize(inputs)


def _sum_to_shape(values, like):
    """Sums `values` over the axes along which `like` was broadcast."""
    extra = values.shape.rank - like.shape.rank
    stretched = [extra + i for i, size in enumerate(like.shape) if size == 1]
    total = tf.reduce_sum(values, axis=[*range(extra), *stretched])
    return tf.reshape(total, like.shape)
