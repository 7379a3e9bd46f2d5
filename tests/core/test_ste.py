"""Straight-through quantizers: values, stated gradients, and fused against composed.

Upstream gradients are eighths of small integers, so that sums of them are exact in
float32 in any order and may be compared bit for bit.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import oracle
from tf_lowbit.compat import tf
from tf_lowbit.core import ste

LOW_BITS = range(1, 9)
ALL_BITS = (*LOW_BITS, 16, 32)
# 255 * (1.9931453 / 255) is below 1.9931453 in float32: a kernel that takes the
# clip from its own step misses the end of the range.
LIMITS = (1.0, 6.0, 0.37, 3.1234567, 1.9931453)


def samples(limit, size=4000, seed=0):
    """Values in and out of [0, limit], its ends among them."""
    rng = np.random.default_rng(seed)
    ends = [0.0, -0.0, 1e-30, -1e-30, limit]
    x = np.concatenate([rng.uniform(-limit, 2 * limit, size), ends]).astype(np.float32)
    return np.concatenate([x, oracle.around([limit], 1)])


def upstream_for(x, seed=1):
    rng = np.random.default_rng(seed)
    return (rng.integers(-16, 17, np.shape(x)) / 8).astype(np.float32)


def run(function, *inputs, upstream=None):
    """The outputs and the gradients to each of the inputs, as NumPy arrays."""
    inputs = [tf.constant(value, tf.float32) for value in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = function(*inputs)
    if upstream is None:
        upstream = np.ones(outputs.shape)
    gradients = tape.gradient(outputs, inputs, tf.constant(upstream, tf.float32))
    return outputs.numpy(), *(None if g is None else g.numpy() for g in gradients)


def assert_same(first, second):
    """Equal to the last bit; NaN equals NaN, and 0 equals -0."""
    np.testing.assert_array_equal(first, second, strict=True)


def round_through(x):
    return x + tf.stop_gradient(tf.round(x) - x)


# Which form runs.


def test_auto_is_fused_on_this_device_and_composed_under_xla():
    assert ste.choose_implementation() == "fused"
    chosen = []

    def trace(x):
        chosen.append(ste.choose_implementation("auto"))
        return x

    tf.function(trace)(tf.constant(1.0))
    tf.function(trace, jit_compile=True)(tf.constant(1.0))
    assert chosen == ["fused", "composed"]


def test_a_gpu_reads_no_limit_on_the_host(monkeypatch):
    devices = [tf.config.LogicalDevice("/device:GPU:0", "GPU")]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda: devices)
    assert ste.choose_implementation("auto", 1.0) == "fused"
    assert ste.choose_implementation("auto", tf.constant(1.0)) == "composed"


@pytest.mark.parametrize("implementation", ["fused", "composed"])
def test_a_named_implementation_is_kept(implementation):
    assert ste.choose_implementation(implementation) == implementation


@pytest.mark.parametrize("implementation", ["fast", "", None, True, "Fused"])
def test_an_unknown_implementation_is_refused(implementation):
    with pytest.raises(ValueError, match="Received: implementation="):
        ste.choose_implementation(implementation)


# Fixed and learned clips.


@pytest.mark.parametrize("implementation", ["fused", "composed"])
@pytest.mark.parametrize("bits", LOW_BITS)
def test_unsigned_values_are_levels_of_the_oracle(bits, implementation):
    for limit in LIMITS:
        n, exact = 2**bits - 1, np.float64(np.float32(limit))
        x = oracle.around(oracle.half_codes(0, n) * exact / n, 8)
        x = np.concatenate([x, samples(limit, 200)])
        distance = np.abs(np.clip(x / exact, 0, 1) * n % 1 - 0.5)
        x = x[distance > 1e-6 * n]
        y = ste.unsigned_forward(
            tf.constant(x), limit, tf.constant(bits), implementation
        )
        expected = oracle.unsigned_values(x, exact, bits)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_fixed_clip_fused_is_composed_bit_for_bit(bits, limit):
    x = np.concatenate([samples(limit), [np.nan, np.inf, -np.inf]]).astype(np.float32)
    upstream, k = upstream_for(x), tf.constant(bits)
    fused = run(lambda v: ste.clip_round(v, limit, k, "fused"), x, upstream=upstream)
    plain = run(lambda v: ste.clip_round(v, limit, k, "composed"), x, upstream=upstream)
    assert_same(fused[0], plain[0])
    np.testing.assert_array_equal(fused[1], plain[1])


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_learned_clip_fused_is_composed_bit_for_bit(bits, limit):
    x = np.concatenate([samples(limit), [np.nan, np.inf, -np.inf]]).astype(np.float32)
    upstream, k = upstream_for(x), tf.constant(bits)

    def gradients(implementation):
        return run(
            lambda v, a: ste.learned_clip_round(v, a, k, implementation),
            *(x, limit),
            upstream=upstream,
        )

    fused, plain = gradients("fused"), gradients("composed")
    assert_same(fused[0], plain[0])
    np.testing.assert_array_equal(fused[1], plain[1])
    assert fused[2] == plain[2]


@pytest.mark.parametrize("implementation", ["fused", "composed"])
@pytest.mark.parametrize("limit", LIMITS)
def test_clip_gradients_are_those_of_the_oracle(limit, implementation):
    x, limit, bits = samples(limit), np.float32(limit), tf.constant(2)
    upstream = upstream_for(x)
    d_x, d_limit = oracle.unsigned_gradients(x, limit, upstream)
    _, fixed = run(
        lambda v: ste.clip_round(v, float(limit), bits, implementation),
        x,
        upstream=upstream,
    )
    np.testing.assert_array_equal(fixed, d_x)
    _, learned, found = run(
        lambda v, a: ste.learned_clip_round(v, a, bits, implementation),
        *(x, limit),
        upstream=upstream,
    )
    np.testing.assert_array_equal(learned, d_x)
    assert d_limit != 0
    assert found == d_limit


@pytest.mark.parametrize("implementation", ["fused", "composed"])
def test_learned_clip_by_hand(implementation):
    # alpha = 3 at 2 bits: levels 0, 1, 2, 3.
    y, d_x, d_alpha = run(
        lambda v, a: ste.learned_clip_round(v, a, tf.constant(2), implementation),
        *([-1.0, 0.0, 0.6, 2.4, 3.0, 3.1, 9.0], 3.0),
        upstream=[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
    )
    np.testing.assert_array_equal(y, [0, 0, 1, 2, 3, 3, 3])
    np.testing.assert_array_equal(d_x, [0, 2, 4, 8, 16, 0, 0])
    assert d_alpha == 96


def test_learned_clip_gradient_is_autodiff_of_the_papers_formula():
    limit, n = 1.7, 7.0
    x = np.random.default_rng(2).uniform(-1, 4, 500).astype(np.float32)
    upstream = upstream_for(x)

    def paper(v, alpha):
        # Equation 1 of the paper; the scale of the rounding is not differentiated.
        y = 0.5 * (tf.abs(v) - tf.abs(v - alpha) + alpha)
        rounded = tf.round(y * n / alpha) * alpha / n
        return y + tf.stop_gradient(rounded - y)

    expected = run(paper, x, limit, upstream=upstream)
    for implementation in ("fused", "composed"):
        found = run(
            lambda v, a, i=implementation: ste.learned_clip_round(
                v, a, tf.constant(3), i
            ),
            *(x, limit),
            upstream=upstream,
        )
        for result, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["fused", "composed"])
def test_infinite_upstream_gradient_stays_out_of_what_is_clipped(implementation):
    _, d_x = run(
        lambda v: ste.clip_round(v, 1.0, tf.constant(2), implementation),
        [-1.0, 0.5, 2.0],
        upstream=[np.inf, np.inf, np.inf],
    )
    np.testing.assert_array_equal(d_x, [0, np.inf, 0])


@pytest.mark.parametrize("is_learned", [False, True])
def test_only_masks_wait_for_the_backward_pass(is_learned):
    """What takes the activation itself there would hold four bytes an element."""

    @tf.function
    def gradient(x, limit):
        with tf.GradientTape() as tape:
            tape.watch(x)
            if is_learned:
                y = ste.learned_clip_round(x, limit, tf.constant(2))
            else:
                y = ste.clip_round(x, 1.0, tf.constant(2))
        return tape.gradient(y, x, y)

    graph = gradient.get_concrete_function(tf.TensorSpec([8]), tf.TensorSpec([])).graph
    takers = graph.inputs[0].consumers()
    forward = {"QuantizeAndDequantizeV3", "IdentityN"}
    assert forward < {taker.type for taker in takers}
    backward = [taker for taker in takers if taker.type not in forward]
    masks = [
        end
        for taker in backward
        for end in (
            taker.outputs[0].consumers() if taker.type == "Bitcast" else [taker]
        )
    ]
    assert {mask.outputs[0].dtype for mask in masks} == {tf.bool}
    # A mask as a float would be made as soon as the mask is, and held.
    casts = [use for mask in masks for use in mask.outputs[0].consumers()]
    assert all(cast.type == "Cast" and cast.control_inputs for cast in casts)


@pytest.mark.parametrize("implementation", ["fused", "composed"])
@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_activations_keep_nan_and_saturate_at_infinity(bits, implementation):
    x = tf.constant([np.nan, np.inf, -np.inf])
    y = ste.unsigned_forward(x, 6.0, tf.constant(bits), implementation)
    np.testing.assert_array_equal(y, [np.nan, 6.0, 0.0])


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("implementation", ["fused", "composed"])
def test_unrounded_activations_are_clipped_only(bits, implementation):
    x = np.linspace(-1, 2, 3001).astype(np.float32)
    y = ste.clip_round(tf.constant(x), 1.0, tf.constant(bits), implementation)
    np.testing.assert_allclose(y, np.clip(x, 0, 1), rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.float32, 24, elements=st.floats(-20, 20, width=32)),
    st.floats(2**-10, 100, width=32),
    st.sampled_from(LOW_BITS),
    st.sampled_from(["fused", "composed"]),
)
def test_clip_round_is_idempotent_monotone_and_on_the_grid(x, limit, bits, form):
    bits = tf.constant(bits)
    x = np.sort(x)
    y = ste.clip_round(tf.constant(x), limit, bits, form).numpy()
    np.testing.assert_array_equal(ste.clip_round(tf.constant(y), limit, bits, form), y)
    assert (np.diff(y) >= 0).all()
    codes = y.astype(np.float64) * (2 ** int(bits) - 1) / limit
    np.testing.assert_allclose(codes, np.round(codes), rtol=0, atol=1e-4)
    assert (y >= 0).all()
    assert (y <= np.nextafter(np.float32(limit), np.float32(np.inf))).all()


# DoReFa's weights.


def naive_dorefa(bits):
    """The composed formula, differentiated by TensorFlow itself."""
    n = 2.0**bits - 1.0

    def quantize(w):
        t = tf.tanh(w)
        unit = t / (2.0 * tf.reduce_max(tf.abs(t))) + 0.5
        return 2.0 * round_through(n * unit) / n - 1.0

    return quantize


@pytest.mark.parametrize(
    "w",
    [
        np.random.default_rng(3).normal(0, 0.5, (3, 3, 4, 8)),
        np.random.default_rng(4).normal(0, 3.0, (64, 10)),
        [0.5, -0.5, 0.5, 0.1, -0.2],
        [-1.5, -1.5, 0.0, 0.3],
        [0.7],
    ],
    ids=["conv", "wide", "tied with both signs", "tied", "one"],
)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_dorefa_gradient_is_autodiff_and_the_jacobian(w, bits):
    w = np.asarray(w, np.float32)
    upstream = upstream_for(w)
    y, d_w = run(
        lambda v: ste.normalized_round(v, tf.constant(bits)), w, upstream=upstream
    )
    naive_y, naive = run(naive_dorefa(bits), w, upstream=upstream)
    jacobian = oracle.dorefa_gradient(w, upstream)
    scale = np.abs(jacobian).max() + 1.0
    np.testing.assert_allclose(y, naive_y, rtol=0, atol=1e-6)
    np.testing.assert_allclose(d_w, naive, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(d_w, jacobian, rtol=1e-4, atol=1e-5 * scale)


def test_dorefa_gradient_by_hand():
    # atanh(0.8), atanh(-0.4): t = (0.8, -0.4), m = 0.8, 1 - t^2 = (0.36, 0.84).
    w = np.arctanh([0.8, -0.4]).astype(np.float32)
    y, d_w = run(
        lambda v: ste.normalized_round(v, tf.constant(2)), w, upstream=[1.0, 2.0]
    )
    # u = (1, 0.25): 3u = (3, 0.75), codes (3, -1).
    np.testing.assert_allclose(y, [1, -1 / 3], rtol=1e-6)
    # g / m = (1.25, 2.5); sum(g t) / m^2 = (0.8 - 0.8) / 0.64 = 0.
    np.testing.assert_allclose(d_w, [1.25 * 0.36, 2.5 * 0.84], rtol=1e-5)
    _, d_w = run(
        lambda v: ste.normalized_round(v, tf.constant(2)), w, upstream=[1.0, 0.0]
    )
    # Only the maximum is asked for, and it is 1 whatever w is.
    np.testing.assert_allclose(d_w, [0, 0], atol=1e-6)


def test_dorefa_gradient_without_the_maximum():
    w = np.random.default_rng(5).normal(size=(5, 7)).astype(np.float32)
    upstream = upstream_for(w)
    _, d_w = run(
        lambda v: ste.normalized_round(v, tf.constant(2), max_gradient=False),
        w,
        upstream=upstream,
    )
    expected = oracle.dorefa_gradient(w, upstream, max_gradient=False)
    np.testing.assert_allclose(d_w, expected, rtol=1e-5, atol=1e-6)
    with_max = oracle.dorefa_gradient(w, upstream)
    assert np.abs(expected - with_max).max() > 1e-3


@pytest.mark.parametrize("max_gradient", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_dorefa_is_finite_for_all_zero_weights(bits, max_gradient):
    y, d_w = run(
        lambda v: ste.normalized_round(v, tf.constant(bits), max_gradient),
        np.zeros((3, 4)),
    )
    n = 2.0**bits - 1
    # u = 1/2 is a tie: the code is +1, at one bit -1, and about 0 unrounded.
    expected = {1: -1.0, 32: 0.0}.get(bits, 1 / n)
    np.testing.assert_allclose(y, np.full((3, 4), expected), rtol=1e-6, atol=1e-6)
    assert np.isfinite(d_w).all()


@pytest.mark.parametrize("size", [1e-10, 1e-18, 1e-22, 1e-25])
def test_dorefa_gradient_of_tiny_weights(size):
    w = (np.array([1.0, -0.5, 0.25, 0.8]) * size).astype(np.float32)
    upstream = np.float32([1.0, 2.0, -1.0, 0.5])
    y, d_w = run(
        lambda v: ste.normalized_round(v, tf.constant(2)), w, upstream=upstream
    )
    np.testing.assert_allclose(y, [1, -1 / 3, 1 / 3, 1], rtol=1e-6)
    expected = oracle.dorefa_gradient(w, upstream)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(d_w, expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_one_nan_weight_makes_the_whole_tensor_nan(bits):
    y, d_w = run(
        lambda v: ste.normalized_round(v, tf.constant(bits)), [0.5, np.nan, -2.0]
    )
    assert np.isnan(y).all()
    assert np.isnan(d_w).any()


@pytest.mark.parametrize("compiled", [False, True])
def test_an_infinite_weight_stays_visible(compiled):
    """tanh(inf) = 1 would hide it; graph rewriting must not remove what shows it."""
    quantize = tf.function(
        lambda v: ste.normalized_round(v, tf.constant(2)), jit_compile=compiled
    )
    y = quantize(tf.constant([np.inf, -np.inf, 0.1])).numpy()
    # XLA's maximum passes over a NaN, so there the finite weight stays finite.
    assert np.isnan(y if not compiled else y[:2]).all()


# Learned steps.


@pytest.mark.parametrize(
    ("signed", "narrow"), [(False, False), (True, False), (True, True)]
)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_learned_step_gradients_are_those_of_the_oracle(bits, signed, narrow):
    rng = np.random.default_rng(6)
    step = np.float32(0.37)
    reach = 1.5 * oracle.highest_unsigned(bits) * step
    x = rng.uniform(-reach, reach, (20, 30)).astype(np.float32)
    upstream = upstream_for(x)
    y, d_x, d_step = run(
        lambda v, s: ste.stepped_round(
            v,
            *(s, tf.constant(bits)),
            signed=signed,
            narrow_range=narrow,
            gradient_scale=0.25,
        ),
        *(x, step),
        upstream=upstream,
    )
    expected = oracle.lsq_gradients(
        x, step, upstream, bits, signed=signed, narrow=narrow
    )
    np.testing.assert_array_equal(d_x, expected[0])
    tolerance = 1e-5 * np.abs(upstream * x / step).sum()
    np.testing.assert_allclose(d_step, expected[1] / 4, rtol=1e-5, atol=tolerance)
    if signed:
        values = oracle.signed_codes(x, step, bits, narrow) * np.float64(step)
    else:
        limit = oracle.highest_unsigned(bits) * np.float64(step)
        values = oracle.unsigned_values(x, limit, bits)
    np.testing.assert_allclose(y, values, rtol=1e-5, atol=1e-5)


def test_learned_step_by_hand():
    # s = 0.5, 2 bits: v = (-3, -1.5, 0.6, 1.0, 4), codes (-2, -2, 1, 1, 1).
    # d/ds: outside the code, inside code - v: (-2, -0.5, 0.4, 0, 1).
    y, d_x, d_step = run(
        lambda v, s: ste.stepped_round(v, s, tf.constant(2), signed=True),
        *([-1.5, -0.75, 0.3, 0.5, 2.0], 0.5),
        upstream=[1.0, 2.0, 5.0, 7.0, 4.0],
    )
    np.testing.assert_array_equal(y, [-1, -1, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(d_x, [0, 2, 5, 7, 0])
    np.testing.assert_allclose(d_step, -2 - 1 + 2 + 0 + 4, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (1, 1, 3, 4), (3, 1, 1, 1), (4,)])
def test_a_step_for_each_channel_gets_its_own_gradient(shape):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    step = rng.uniform(0.2, 0.6, shape).astype(np.float32)
    upstream = upstream_for(x)
    y, d_x, d_step = run(
        lambda v, s: ste.stepped_round(v, s, tf.constant(3), signed=True),
        *(x, step),
        upstream=upstream,
    )
    full = step.reshape((1,) * (4 - step.ndim) + step.shape)
    expected = oracle.lsq_gradients(x, full, upstream, 3, signed=True)
    np.testing.assert_allclose(
        y, oracle.signed_codes(x, full, 3, False) * full, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(d_x, expected[0])
    assert d_step.shape == shape
    np.testing.assert_allclose(d_step, expected[1].reshape(shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("signed", [False, True])
def test_learned_step_gradient_is_autodiff_of_the_papers_code(signed):
    low, high = (-4.0, 3.0) if signed else (0.0, 7.0)
    x = np.random.default_rng(8).normal(0, 3, 600).astype(np.float32)
    upstream, scale = upstream_for(x), 0.02

    def paper(v, s):
        # Appendix A of the paper: gradscale, clip, roundpass.
        s = s * scale + tf.stop_gradient(s - s * scale)
        return round_through(tf.clip_by_value(v / s, low, high)) * s

    expected = run(paper, x, 0.8, upstream=upstream)
    found = run(
        lambda v, s: ste.stepped_round(
            v, s, tf.constant(3), signed=signed, gradient_scale=scale
        ),
        *(x, 0.8),
        upstream=upstream,
    )
    for result, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_learned_step_fused_is_composed_bit_for_bit(bits):
    x = samples(0.37 * oracle.highest_unsigned(bits), 1000)
    upstream = upstream_for(x)
    fused, plain = (
        run(
            lambda v, s, i=implementation: ste.stepped_round(
                v, s, tf.constant(bits), signed=False, implementation=i
            ),
            *(x, 0.37),
            upstream=upstream,
        )
        for implementation in ("fused", "composed")
    )
    for first, second in zip(fused, plain, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_signed_values_keep_nan(bits, narrow):
    y, _, d_step = run(
        lambda v, s: ste.stepped_round(
            v, s, tf.constant(bits), signed=True, narrow_range=narrow
        ),
        *([np.nan, 0.2], 0.5),
    )
    np.testing.assert_array_equal(np.isnan(y), [True, False])
    assert np.isnan(d_step)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2])
def test_an_infinite_input_saturates_and_shows_in_the_step_gradient(bits, signed):
    y, d_x, d_step = run(
        lambda v, s: ste.stepped_round(v, s, tf.constant(bits), signed=signed),
        *([np.inf], 0.5),
    )
    top = oracle.signed_limits(bits, False)[1] if signed else 2**bits - 1
    np.testing.assert_array_equal(y, [0.5 * top])
    np.testing.assert_array_equal(d_x, [0])
    assert np.isnan(d_step)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.float32, 24, elements=st.floats(-200, 200, width=32)),
    st.floats(2**-10, 10, width=32),
    st.sampled_from(LOW_BITS),
    st.booleans(),
)
def test_stepped_round_is_idempotent_and_monotone(x, step, bits, signed):
    x = np.sort(x)

    def quantize(v):
        return ste.stepped_round(
            tf.constant(v), tf.constant(step), tf.constant(bits), signed=signed
        ).numpy()

    y = quantize(x)
    np.testing.assert_array_equal(quantize(y), y)
    assert (np.diff(y) >= 0).all()


def test_scaled_round_has_no_gradient_to_its_scale():
    y, d_x, d_scale = run(
        lambda v, s: ste.scaled_round(v, s, tf.constant(3), narrow_range=True),
        *([-2.1, -0.3, 0.2, 0.9, 5.0], 0.5),
    )
    np.testing.assert_array_equal(y, [-1.5, -0.5, 0, 1, 1.5])
    np.testing.assert_array_equal(d_x, [0, 1, 1, 1, 0])
    assert d_scale is None


# The range of some bits, without rounding in it.


def test_an_unrounded_learned_step_by_hand():
    # s = 0.5, 2 bits: v = (-3, -1.5, 0.6, 1.0, 4), clipped (-2, -1.5, 0.6, 1, 1).
    # d/ds: outside the code (-2 and 1), inside nothing.
    y, d_x, d_step = run(
        lambda v, s: ste.stepped_round(
            v, s, tf.constant(2), signed=True, rounding_bits=tf.constant(32)
        ),
        *([-1.5, -0.75, 0.3, 0.5, 2.0], 0.5),
        upstream=[1.0, 2.0, 5.0, 7.0, 4.0],
    )
    np.testing.assert_allclose(y, [-1, -0.75, 0.3, 0.5, 0.5], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(d_x, [0, 2, 5, 7, 0])
    np.testing.assert_allclose(d_step, -2 + 4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["fused", "composed"])
@pytest.mark.parametrize(
    ("signed", "narrow"), [(False, False), (True, False), (True, True)]
)
@pytest.mark.parametrize("bits", LOW_BITS)
def test_unrounded_learned_steps_clip_at_the_range_of_their_bits(
    bits, signed, narrow, implementation
):
    step = np.float32(0.37)
    low, high = 0, 2**bits - 1
    if signed:
        low, high = oracle.signed_limits(bits, narrow)
        low = -low
    x = np.random.default_rng(9).uniform(-1.5 * high, 1.5 * high, 500) * step
    x = x.astype(np.float32)
    upstream = upstream_for(x)
    y, d_x, d_step = run(
        lambda v, s: ste.stepped_round(
            *(v, s, tf.constant(bits)),
            signed=signed,
            narrow_range=narrow,
            rounding_bits=tf.constant(32),
            gradient_scale=0.25,
            implementation=implementation,
        ),
        *(x, step),
        upstream=upstream,
    )
    scaled = x / np.float64(step)
    inside = (scaled >= low) & (scaled <= high)
    fineness = step * (2.0**-17 if signed else high * 2.0**-24)
    values = np.clip(scaled, low, high) * step
    np.testing.assert_allclose(y, values, rtol=3e-7, atol=fineness)
    np.testing.assert_array_equal(d_x, np.where(inside, upstream, 0))
    expected = (upstream * np.where(inside, 0, np.clip(scaled, low, high))).sum()
    tolerance = 1e-5 * np.abs(upstream * scaled).sum()
    np.testing.assert_allclose(d_step, expected / 4, rtol=0, atol=tolerance)
    assert np.abs(expected) > 10 * tolerance


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_rounding_bits_of_the_bits_themselves_change_nothing(bits, signed):
    x = np.random.default_rng(10).normal(0, 3, 500).astype(np.float32)
    upstream, k = upstream_for(x), tf.constant(bits)
    plain, same = (
        run(
            lambda v, s, o=options: ste.stepped_round(v, s, k, signed=signed, **o),
            *(x, 0.37),
            upstream=upstream,
        )
        for options in ({}, {"rounding_bits": k})
    )
    for first, second in zip(plain, same, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_an_unrounded_scaled_round_only_clips(bits):
    highest = oracle.signed_limits(bits, narrow=True)[1]
    x = np.linspace(-2 * highest, 2 * highest, 401).astype(np.float32) * 0.5
    y, d_x, d_scale = run(
        lambda v, s: ste.scaled_round(
            v, s, tf.constant(bits), narrow_range=True, rounding_bits=tf.constant(32)
        ),
        *(x, 0.5),
    )
    limit = 0.5 * highest
    np.testing.assert_allclose(y, np.clip(x, -limit, limit), rtol=2e-7, atol=2.0**-18)
    np.testing.assert_array_equal(d_x, np.abs(x) <= limit)
    assert d_scale is None
