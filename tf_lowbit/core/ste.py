"""Quantization with stated straight-through gradients (`tf.custom_gradient`).

Each forward pass lies exactly on a grid of `tf_lowbit.core.grid`. Each docstring states
the gradient. Inputs are float32 tensors of any shape; results have their shape and
dtype. `bits` is always a scalar int32 tensor, read from its variable *before* the call:
inside a `custom_gradient`, eager mode would ask for the variable's own gradient.
"""

from tf_lowbit.compat import in_xla_context, tf
from tf_lowbit.core import checks, grid

IMPLEMENTATIONS = ("auto", "fused", "composed")


def validate_implementation(implementation: str) -> str:
    """Checks the name of an implementation and returns it.

    Raises:
        ValueError: If it is not "auto", "fused" or "composed".
    """
    return checks.choice("implementation", implementation, IMPLEMENTATIONS)


def choose_implementation(
    implementation: str = "auto", limit: float | tf.Tensor = 1.0
) -> str:
    """Resolves "auto" to "fused" or "composed".

    "auto" is "composed" where the fused kernels do not exist (TPU), under XLA, which
    fuses by itself, and where there is a GPU and `limit` is a tensor: the fused kernels
    read it on the host, so each call would wait for a copy.

    Raises:
        ValueError: If it is none of the three.
    """
    validate_implementation(implementation)
    if implementation != "auto":
        return implementation
    kinds = {device.device_type for device in tf.config.list_logical_devices()}
    fused_on = {"CPU"} if tf.is_tensor(limit) else {"CPU", "GPU"}
    return "composed" if in_xla_context() or not kinds <= fused_on else "fused"


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


def unsigned_forward(
    inputs: tf.Tensor,
    limit: float | tf.Tensor,
    bits: tf.Tensor,
    implementation: str = "auto",
) -> tf.Tensor:
    """Returns values on the unsigned grid of [0, limit]; defines no gradient.

    Both implementations agree, except in the sign of 0.
    """
    if choose_implementation(implementation, limit) == "fused":
        return _fused_unsigned(inputs, limit, bits)
    return _composed_unsigned(inputs, limit, bits)


def _inside(inputs, low, high):
    return tf.logical_and(inputs >= low, inputs <= high)


def _in_unsigned_range(inputs, limit):
    """`0 <= x <= limit`, but False for -0: one comparison instead of three."""
    # Bit patterns as unsigned integers: floats from 0 keep their order; NaN and floats
    # with a sign lie above infinity.
    bits, highest = tf.bitcast(inputs, tf.uint32), tf.bitcast(limit, tf.uint32)
    return bits <= highest


def _passed(upstream, inside):
    """Returns `upstream` where `inside`, else 0.

    Only the mask is kept until the backward pass: one byte per element. A kernel that
    takes the activation itself would keep four.
    """
    # Without this, TensorFlow would cast the mask to float early and keep that.
    with tf.control_dependencies([upstream]):
        mask = tf.cast(inside, upstream.dtype)
    # Not a plain product: 0 * inf would be NaN. A select is slower on CPUs.
    return tf.math.multiply_no_nan(upstream, mask)


def _fused_passed(upstream, inputs, low, high):
    """Returns `upstream` where `low <= inputs <= high`, else 0; 0 * inf is NaN here."""
    # The op also returns gradients of its range, but they are zero (TF 2.21).
    return tf.raw_ops.QuantizeAndDequantizeV4Grad(
        gradients=upstream, input=inputs, input_min=low, input_max=high, axis=-1
    ).input_backprop


def clip_round(
    inputs: tf.Tensor, limit: float, bits: tf.Tensor, implementation: str = "auto"
) -> tf.Tensor:
    """A quantized ReLU with a fixed clip: `step * round(clip(x, 0, limit) / step)`.

    Gradient: `dy/dx = 1` where `0 <= x <= limit`, else 0; -0 counts as below 0. At
    `limit = 1` this is DoReFa's activation quantizer (Zhou et al., arXiv:1606.06160).

    Args:
        inputs: Float32 tensor. NaN stays NaN; +inf becomes `limit`.
        limit: The clip: positive Python float.
        bits: Bit-width.
        implementation: "fused" is one kernel forward. "composed" consists of plain ops,
            with the same values and gradients. "auto" chooses
            (`choose_implementation`).
    """
    fused = choose_implementation(implementation) == "fused"

    @tf.custom_gradient
    def quantize(x):
        def gradient(upstream):
            return _passed(upstream, _in_unsigned_range(x, limit))

        forward = _fused_unsigned if fused else _composed_unsigned
        return forward(x, limit, bits), gradient

    return quantize(inputs)


def learned_clip_round(
    inputs: tf.Tensor,
    limit: float | tf.Tensor,
    bits: tf.Tensor,
    implementation: str = "auto",
) -> tf.Tensor:
    """A quantized ReLU with a learned clip (Choi et al., PACT, arXiv:1805.06085).

    Gradients: `dy/dx = 1` where `0 <= x <= limit`, else 0 (-0 counts as below 0);
    `dy/dlimit = 1` where `x > limit`, else 0. `limit`, "alpha" in the paper, is a
    positive scalar float32 tensor.
    """
    fused = choose_implementation(implementation, limit) == "fused"

    @tf.custom_gradient
    def quantize(x, alpha):
        def gradient(upstream):
            d_alpha = tf.reduce_sum(_passed(upstream, x > alpha))
            return _passed(upstream, _in_unsigned_range(x, alpha)), d_alpha

        forward = _fused_unsigned if fused else _composed_unsigned
        return forward(x, alpha, bits), gradient

    return quantize(inputs, limit)


def normalized_round(
    weights: tf.Tensor, bits: tf.Tensor, max_gradient: bool = True
) -> tf.Tensor:
    """DoReFa's weight quantizer: tanh, division by the maximum, odd grid of [-1, 1].

    `t = tanh(w)`, `u = t / (2 max|t|) + 1/2`, `y = (2 round(n u) - n) / n`; the maximum
    is over the whole tensor. Zhou et al., arXiv:1606.06160, in the form that the code
    of arXiv:1908.04680 trains (no rescale by mean|w|).

    Gradient: rounding counts as the identity, so `dy/dw` is that of `t / max|t|`,
    including the maximum. With `m = max|t|` and `s = sign(t)`, `dL/dt = g / m - s [|t|
    = m] sum(g t) / m^2`, where tied maxima share the last term; `dL/dw = dL/dt (1 -
    t^2)`.

    Args:
        weights: Latent weights. One NaN or infinity makes the whole result NaN (under
            XLA only its own element). All zeros are allowed.
        bits: Bit-width.
        max_gradient: False leaves the maximum out of the gradient, as an ablation of
            the authors' code.
    """

    @tf.custom_gradient
    def quantize(w):
        # tanh would hide an infinite weight as 1.
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


def odd_unit(weights: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Returns `u = clip(w / s, -1, 1) / 2 + 1/2`, the argument of `grid.odd_codes`."""
    return tf.clip_by_value(weights / scale, -1.0, 1.0) * 0.5 + 0.5


def odd_round(weights: tf.Tensor, scale: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Rounds to the odd grid on [-s, s]: `s (2 round(n u) - n) / n` (`odd_unit`).

    Gradient: `dy/dw = 1` everywhere; none for `scale`.

    Args:
        weights: Float32 tensor. NaN stays NaN.
        scale: The `s`: positive float32 tensor, broadcastable to `weights`.
        bits: Bit-width.
    """
    scale = tf.stop_gradient(scale)

    @tf.custom_gradient
    def quantize(w):
        codes = grid.odd_codes(odd_unit(w, scale), bits)
        return codes * (scale * grid.odd_step(bits)), lambda upstream: upstream

    return quantize(weights)


def stepped_round(
    inputs: tf.Tensor,
    step: tf.Tensor,
    bits: tf.Tensor,
    *,
    signed: bool,
    narrow_range: bool = False,
    rounding_bits: tf.Tensor | None = None,
    gradient_scale: float | tf.Tensor = 1.0,
    implementation: str = "auto",
) -> tf.Tensor:
    """A quantizer with a learned step (LSQ): `step * round(clip(x / step))`.

    Gradients (Esser et al., LSQ, arXiv:1902.08153): `dy/dx = 1` inside the range, else
    0; `dy/dstep = round(x / step) - x / step` inside, the clipped code outside. The
    step's gradient is summed over the elements that share a step and multiplied by
    `gradient_scale`. With `y = step * code` the sum is `(sum(g y) - sum(g x [inside]))
    / step`.

    Args:
        inputs: Float32 tensor. An infinite value is clipped. It makes the step's
            gradient NaN, so that it stays visible.
        step: Positive float32 tensor, scalar or broadcastable to `inputs`.
        bits: Bit-width.
        signed: True for the signed grid, False for the unsigned one (then `step` is a
            scalar).
        narrow_range: Signed grid only: whether to drop the lowest code.
        rounding_bits: `bits` (the default), or 16 or 32 to keep the range of `bits`
            without rounding.
        gradient_scale: Scalar factor on the step's gradient, "g" in the paper.
        implementation: As in `clip_round`. The signed grid is always composed.
    """
    fused = not signed and choose_implementation(implementation, step) == "fused"

    @tf.custom_gradient
    def quantize(x, s):
        if signed:
            negative, positive = grid.signed_limits(bits, narrow_range)
            low, high = -negative * s, positive * s
            y = grid.signed_codes(x / s, bits, narrow_range, rounding_bits) * s
        else:
            low, high = 0.0, unsigned_range(s, bits)
            fineness = bits if rounding_bits is None else rounding_bits
            forward = _fused_unsigned if fused else _composed_unsigned
            y = forward(x, high, fineness)

        def gradient(upstream):
            # The step's gradient keeps `x` anyway, so a mask would be extra memory.
            d_x = (
                _fused_passed(upstream, x, low, high)
                if fused
                else _passed(upstream, _inside(x, low, high))
            )
            d_step = _sum_to_shape(upstream * y - d_x * x, s) / s
            return d_x, d_step * gradient_scale

        return y, gradient

    return quantize(inputs, step)


def unsigned_range(step: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Returns the clip `step * n` of an unsigned grid with a learned step.

    A scalar float32 tensor. "Not rounded" keeps the clip of 8 bits.
    """
    return step * grid.unsigned_limit(tf.minimum(bits, grid.MAX_BITS))


def scaled_round(
    inputs: tf.Tensor,
    scale: tf.Tensor,
    bits: tf.Tensor,
    *,
    narrow_range: bool,
    rounding_bits: tf.Tensor | None = None,
    clips_gradient: bool = True,
) -> tf.Tensor:
    """Signed rounding with a given scale: `scale * round(clip(x / scale))`.

    Gradient: `dy/dx = 1` inside the range, else 0; none for `scale`.

    Args:
        inputs: Float32 tensor.
        scale: Positive float32 tensor, scalar or broadcastable to `inputs`.
        bits: Bit-width.
        narrow_range: Whether to drop the lowest code.
        rounding_bits: As in `stepped_round`.
        clips_gradient: False for `dy/dx = 1` everywhere.
    """
    scale = tf.stop_gradient(scale)

    @tf.custom_gradient
    def quantize(x):
        negative, positive = grid.signed_limits(bits, narrow_range)
        y = grid.signed_codes(x / scale, bits, narrow_range, rounding_bits) * scale

        def gradient(upstream):
            if not clips_gradient:
                return upstream
            # The ends of the range count as inside, however `scale * Q` rounds.
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
