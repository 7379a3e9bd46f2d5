"""What a quantizer does while a draw says "not rounded": scale and clip, no more."""

import threading

import numpy as np
import pytest

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import CASES, build, make, quantize
from tf_lowbit.compat import tf
from tf_lowbit.quantizers import sampling

QUANTIZED, UNROUNDED = tf.constant(True), tf.constant(False)
STEP, CLIP = 0.37, 3.0
SHAPE = (3, 3, 4, 8)
every_case = pytest.mark.parametrize("name", CASES)
# `test_standardize` compares the others with these.
every_plain_case = pytest.mark.parametrize(
    "name", [name for name in CASES if "standardized" not in name]
)
every_bits = pytest.mark.parametrize("bits", [1, 2, 3, 8])


def built(name, bits):
    """A quantizer, and its variables with a range of its own."""
    quantizer = make(name, bits)
    variables = build(quantizer, SHAPE)
    if "step" in variables:
        step = np.linspace(0.2, 0.6, 8) if "per channel" in name else STEP
        shape = variables["step"].shape
        variables["step"].assign(np.broadcast_to(step, shape))
    return quantizer, variables


def inputs_for(name, bits):
    """Values in and out of the range, at its ends and at zero."""
    reach = 1.5 * CLIP
    if "lsq" in name:
        reach = 1.5 * STEP * oracle.highest_unsigned(bits)
    x = np.random.default_rng(0).uniform(-reach, reach, SHAPE).astype(np.float32)
    x[0, 0, :, 0] = [0.0, 1.0, CLIP, -CLIP]
    return x


def limits(name, bits, x, variables):
    """(scale, lowest, highest): the range without rounding, by the papers."""
    if name.startswith("weight uniform"):
        axes = {"uniform": None, "uniform depthwise": (0, 1)}.get(
            name.removeprefix("weight "), (0, 1, 2)
        )
        scale, highest = (
            oracle.uniform_scale(x, bits, axes),
            oracle.signed_limits(bits, True)[1],
        )
        return scale, -highest * scale, highest * scale
    if "statsq" in name:
        axes = (0, 1) if "depthwise" in name else (0, 1, 2)
        scale = oracle.statsq_scale(x, axes)
        return scale, -scale, scale
    if "lsq" in name:
        step = variables["step"].numpy().astype(np.float64)
        if name == "activation lsq":
            return step, 0 * step, step * (2**bits - 1)
        negative, positive = oracle.signed_limits(bits, "narrow" in name)
        return step, -negative * step, positive * step
    clip = 1.0 if "dorefa" in name else CLIP
    return clip, -clip if "signed" in name else 0.0, clip


def unrounded(name, bits, x, variables):
    """Scaled and clipped, in float64; and how far float32 may be from it."""
    x = x.astype(np.float64)
    if name.startswith("weight dorefa"):
        return 2 * oracle.dorefa_unit(x) - 1, 1e-6
    scale, low, high = limits(name, bits, x, variables)
    # Signed grids keep 2^-16 of a step, the others 2^-24 of the range.
    is_signed = name.startswith("weight") or "signed" in name
    fineness = scale * 2.0**-17 if is_signed else 0.0
    return np.clip(x, low, high), fineness + 3e-7 * np.maximum(np.abs(low), high)


def learned(variables):
    return next((key for key in ("step", "alpha") if key in variables), None)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@every_bits
@every_plain_case
def test_an_unrounded_value_keeps_scale_and_clip(name, bits):
    x = inputs_for(name, bits)
    quantizer, variables = built(name, bits)
    with sampling.sampled([(variables, UNROUNDED)]):
        values = quantize(quantizer, variables, x)
    expected, tolerance = unrounded(name, bits, x, variables)
    assert (np.abs(values - expected) <= tolerance).all()
    # The test can tell: rounding moves values by more than that.
    rounded = quantize(quantizer, variables, x)
    assert np.abs(rounded - expected).max() > 10 * np.max(tolerance)


@every_bits
@every_plain_case
def test_the_gradient_is_that_of_the_clip(name, bits):
    x = inputs_for(name, bits)
    upstream = cases.random_upstream(SHAPE)
    quantizer, variables = built(name, bits)
    with sampling.sampled([(variables, UNROUNDED)]):
        found = cases.gradients(quantizer, variables, x, upstream, learned(variables))
    if name.startswith("weight dorefa"):
        expected = oracle.dorefa_gradient(
            x, upstream, max_gradient="without" not in name
        )
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5 * scale)
        return
    scale, low, high = limits(name, bits, x.astype(np.float64), variables)
    # The largest weight is at the end of its range, and in it.
    slack = 1e-7 * np.maximum(np.abs(low), high)
    inside = (x >= low - slack) & (x <= high + slack)
    # Of these weights nothing is held back.
    passes_all = name.startswith(("weight uniform", "weight statsq"))
    inside |= passes_all
    np.testing.assert_array_equal(found[0], np.where(inside, upstream, 0))
    assert not inside.all() or passes_all
    if learned(variables) is None:
        return
    # PACT: 1 above the clip. LSQ: the clipped code outside, nothing inside.
    code = np.where(x > high, high / scale, np.where(x < low, low / scale, 0.0))
    terms, factor = upstream * code, 1.0
    axes = None
    if learned(variables) == "step":
        per_step = x.size // variables["step"].shape.num_elements()
        sharing = per_step if name.startswith("weight") else x[0].size
        highest = round(float(np.max(high / scale)))
        factor = 1 / (np.sqrt(sharing) * highest)
        axes = (0, 1, 2) if "per channel" in name else None
    expected = terms.sum(axis=axes, keepdims=axes is not None) * factor
    tolerance = 3e-5 * np.abs(upstream * x / scale).sum() * factor
    np.testing.assert_allclose(found[1], expected, rtol=0, atol=tolerance)
    assert np.abs(expected).max() > 10 * tolerance


@pytest.mark.quick(20)
@every_bits
@every_case
def test_a_quantized_draw_changes_no_bit_of_values_and_gradients(name, bits):
    x = inputs_for(name, bits)
    upstream = cases.random_upstream(SHAPE)
    quantizer, variables = built(name, bits)

    def found():
        values = quantize(quantizer, variables, x)
        key = learned(variables)
        return values, *cases.gradients(quantizer, variables, x, upstream, key)

    plain = found()
    for raw_weights in (False, True):
        with sampling.sampled([(variables, QUANTIZED)], raw_weights):
            for one, other in zip(found(), plain, strict=True):
                np.testing.assert_array_equal(one, other)


@every_case
def test_a_draw_leaves_bits_codes_and_step_alone(name):
    x = tf.constant(inputs_for(name, 2))
    quantizer, variables = built(name, 2)
    before = {key: variable.numpy() for key, variable in variables.items()}
    codes, step = quantizer.codes(x, variables), quantizer.step(x, variables)
    with sampling.sampled([(variables, UNROUNDED)], raw_weights=True):
        quantizer(x, training=True, weights=variables)
        np.testing.assert_array_equal(quantizer.codes(x, variables), codes)
        np.testing.assert_array_equal(quantizer.step(x, variables), step)
    assert list(variables) == list(before)
    assert_same([v.numpy() for v in variables.values()], before.values())


@pytest.mark.quick(1)
@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "XLA"])
def test_one_traced_function_serves_both_draws(compiled):
    """Of all quantizers at once."""
    rows = {name: (*built(name, 2), tf.constant(inputs_for(name, 2))) for name in CASES}
    traces = []

    def call(is_quantized):
        traces.append(None)
        draws = [(variables, is_quantized) for _, variables, _ in rows.values()]
        with sampling.sampled(draws):
            return {
                name: quantizer(x, training=True, weights=variables)
                for name, (quantizer, variables, x) in rows.items()
            }

    quantized, unrounded = call(QUANTIZED), call(UNROUNDED)
    del traces[:]
    function = tf.function(call, jit_compile=compiled)
    for draw, expected in ((QUANTIZED, quantized), (UNROUNDED, unrounded)) * 2:
        for name, values in function(draw).items():
            # XLA's tanh differs in the last place, and its sums by more; no value is so
            # near a threshold.
            is_sum = "standardized" in name or "statsq" in name
            tolerance = (2e-5 if is_sum else 1e-6) if compiled else 0
            np.testing.assert_allclose(
                values, expected[name], rtol=0, atol=tolerance, err_msg=name
            )
    for name in CASES:
        assert (quantized[name] != unrounded[name]).numpy().any()
    assert len(traces) == 1


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("weight")])
def test_raw_weights_pass_as_they_are(name):
    x = inputs_for(name, 2)
    upstream = cases.random_upstream(SHAPE)
    quantizer, variables = built(name, 2)
    with sampling.sampled([(variables, UNROUNDED)], raw_weights=True):
        values = quantize(quantizer, variables, x)
        found = cases.gradients(quantizer, variables, x, upstream, learned(variables))
    np.testing.assert_array_equal(values, x)
    np.testing.assert_array_equal(found[0], upstream)
    if learned(variables):
        assert not found[1].any()
    if "standardized" in name:
        return  # What they scale and clip is not the raw weight.
    scaled, tolerance = unrounded(name, 2, x, variables)
    # At two bits and more the scales of these clip none of the weights.
    if not name.startswith(("weight uniform", "weight statsq")):
        assert np.abs(values - scaled).max() > 10 * np.max(tolerance)


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith("activation")]
)
def test_raw_weights_mean_no_activation(name):
    x = inputs_for(name, 2)
    quantizer, variables = built(name, 2)
    values = []
    for raw_weights in (False, True):
        with sampling.sampled([(variables, UNROUNDED)], raw_weights):
            values.append(quantize(quantizer, variables, x))
    np.testing.assert_array_equal(*values)


def test_each_quantizer_has_its_own_draw_and_others_round():
    x = cases.random_inputs()
    quantizer = make("activation dorefa", 2)
    first, second, third = (build(quantizer, SHAPE) for _ in range(3))
    with sampling.sampled([(first, UNROUNDED), (second, QUANTIZED)]):
        values = [quantize(quantizer, v, x) for v in (first, second, third)]
    rounded = oracle.unsigned_values(x, 1.0, 2)
    np.testing.assert_allclose(values[0], np.clip(x, 0, 1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(values[1], rounded, rtol=1e-6)
    np.testing.assert_allclose(values[2], rounded, rtol=1e-6)


def test_draws_may_be_any_iterable():
    variables = build(make("activation dorefa", 2), SHAPE)
    with sampling.sampled(iter([(variables, UNROUNDED)])):
        assert sampling.drawn(variables) is UNROUNDED
        assert sampling.drawn(variables) is UNROUNDED


def test_the_inner_context_holds_and_the_outer_one_comes_back():
    variables = build(make("activation dorefa", 2), SHAPE)

    def state():
        return sampling.drawn(variables), sampling.passes_raw_weights()

    assert state() == (None, False)
    with sampling.sampled([(variables, UNROUNDED)], raw_weights=True):
        outer = state()
        with sampling.sampled([(variables, QUANTIZED)]):
            inner = state()
            with sampling.sampled([]):
                assert state() == (None, False)
            assert state() == inner
        assert state() == outer
    assert outer == (UNROUNDED, True)
    assert inner == (QUANTIZED, False)
    assert state() == (None, False)


def test_an_error_ends_the_context():
    x = cases.random_inputs()
    quantizer, variables = built("activation dorefa", 2)
    rounded = quantize(quantizer, variables, x)
    with (
        pytest.raises(ZeroDivisionError),
        sampling.sampled([(variables, UNROUNDED)], raw_weights=True),
    ):
        raise ZeroDivisionError
    assert sampling.drawn(variables) is None
    assert not sampling.passes_raw_weights()
    np.testing.assert_array_equal(quantize(quantizer, variables, x), rounded)


def test_another_thread_does_not_see_the_context():
    x = cases.random_inputs()
    quantizer, variables = built("activation dorefa", 2)
    rounded, elsewhere = quantize(quantizer, variables, x), []
    with sampling.sampled([(variables, UNROUNDED)]):
        thread = threading.Thread(
            target=lambda: elsewhere.append(quantize(quantizer, variables, x))
        )
        thread.start()
        thread.join()
        here = quantize(quantizer, variables, x)
    np.testing.assert_array_equal(elsewhere[0], rounded)
    assert (here != rounded).any()


@pytest.mark.parametrize("bits", [16, 32])
@every_case
def test_bits_that_do_not_round_are_the_same_in_either_draw(name, bits):
    """A stage that leaves a quantizer unrounded leaves nothing to be drawn."""
    x = inputs_for(name, 8)
    quantizer, variables = built(name, 2)
    variables["bits"].assign(bits)
    plain = quantize(quantizer, variables, x)
    for draw in (QUANTIZED, UNROUNDED):
        with sampling.sampled([(variables, draw)]):
            np.testing.assert_array_equal(quantize(quantizer, variables, x), plain)


def test_half_precision_inputs_keep_their_dtype_in_either_draw():
    x = tf.cast(cases.random_inputs(), tf.bfloat16)
    quantizer, variables = built("weight lsq", 2)
    for raw_weights, expected in (
        (False, np.clip(tf.cast(x, tf.float32), -2 * STEP, STEP)),
        (True, tf.cast(x, tf.float32)),
    ):
        with sampling.sampled([(variables, UNROUNDED)], raw_weights):
            values = quantizer(x, training=True, weights=variables)
        assert values.dtype == tf.bfloat16
        found = tf.cast(values, tf.float32)
        np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=1e-6)


@every_case
def test_what_is_open_neither_rounds_nor_clips(name):
    quantizer, variables = built(name, 2)
    other, others = built(name, 2)
    x = inputs_for(name, 2)
    x[1, 1, 0] = 1e30, -1e30, 1e-30, -1e-30, 1e5, 3.3, -0.1, 0.0
    with sampling.opened([(variables, None)]):
        found = quantizer(tf.constant(x), True, variables).numpy()
        closed = other(tf.constant(x), True, others).numpy()
    np.testing.assert_array_equal(found, quantizer.exact(tf.constant(x), variables))
    np.testing.assert_array_equal(closed, quantize(other, others, x))
    # Past the context it is as before.
    np.testing.assert_array_equal(quantize(quantizer, variables, x), closed)
