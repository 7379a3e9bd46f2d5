"""LSQ: learned steps, signed, narrow and unsigned, per tensor and per channel."""

import functools
import math

import numpy as np
import pytest

from tests import oracle
from tests.quantizers import cases
from tests.quantizers.cases import LSQActivation, LSQWeight, build, quantize
from tf_lowbit.compat import keras, tf

STEPS = (0.25, 0.37, 0.0123)


def with_step(quantizer, step, shape=(3, 3, 4, 8)):
    variables = build(quantizer, shape)
    variables["step"].assign(tf.broadcast_to(step, variables["step"].shape))
    return variables


def signed_inputs(bits, narrow, step):
    """Beside every threshold, and at it where a step of 1/4 makes it exact."""
    negative, positive = oracle.signed_limits(bits, narrow)
    ties = oracle.half_codes(-negative - 1, positive + 1)
    if bits == 1:
        ties = np.array([-2.0, -1.0, -1e-6, 0.0, 1e-6, 1.0, 2.0])
    ties = ties * np.float64(step)
    if step == 0.25:
        return np.concatenate([ties, oracle.around(ties, 1)]).astype(np.float32)
    return oracle.around(ties, 8)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_weight_codes_at_every_threshold(bits, narrow, step):
    step = np.float32(step)
    x = signed_inputs(bits, narrow, step)
    quantizer = LSQWeight(bits, narrow_range=narrow)
    variables = with_step(quantizer, step)
    expected = oracle.signed_codes(x, step, bits, narrow)
    codes = quantizer.codes(tf.constant(x), variables)
    assert codes.dtype == tf.int32
    np.testing.assert_array_equal(codes, expected)
    values = quantize(quantizer, variables, x)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, step))
    np.testing.assert_array_equal(quantizer.step(tf.constant(x), variables), step)
    assert len(np.unique(values)) == quantizer.level_count(bits)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_signed_activation_codes_at_every_threshold(bits, step):
    step = np.float32(step)
    x = signed_inputs(bits, False, step)
    quantizer = LSQActivation(bits, signed=True)
    variables = with_step(quantizer, step)
    codes = quantizer.codes(tf.constant(x), variables)
    np.testing.assert_array_equal(codes, oracle.signed_codes(x, step, bits, False))
    np.testing.assert_array_equal(
        quantize(quantizer, variables, x), cases.reconstruct(codes, step)
    )
    assert len(np.unique(codes)) == quantizer.level_count(bits) == 2**bits


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_unsigned_activation_codes_at_every_threshold(bits, step, implementation):
    n, step = 2**bits - 1, np.float32(step)
    ties = oracle.half_codes(0, n) * np.float64(step)
    x = oracle.around(ties, 8)
    if step == 0.25:
        x = np.concatenate([ties, oracle.around(ties, 1)]).astype(np.float32)
    x = np.concatenate([x, [-np.float32(9), np.float32(2 * n) * step]])
    quantizer = LSQActivation(bits, implementation=implementation)
    variables = with_step(quantizer, step)
    codes = quantizer.codes(tf.constant(x), variables)
    expected = oracle.unsigned_codes(x, n * np.float64(step), bits)
    np.testing.assert_array_equal(codes, expected)
    values = quantize(quantizer, variables, x)
    used = quantizer.step(tf.constant(x), variables).numpy()
    np.testing.assert_allclose(used, step, rtol=1e-6)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, used))
    assert len(np.unique(values)) == quantizer.level_count(bits) == 2**bits


@pytest.mark.parametrize("bits", cases.LOW_BITS)
def test_each_channel_has_its_own_step(bits):
    x = cases.random_inputs()
    quantizer = LSQWeight(bits, per_axis=True)
    variables = build(quantizer)
    assert variables["step"].shape == (1, 1, 1, 8)
    step = (2.0 ** np.arange(-6, 2)).reshape(1, 1, 1, 8)
    variables["step"].assign(step)
    codes = quantizer.codes(tf.constant(x), variables)
    np.testing.assert_array_equal(codes, oracle.signed_codes(x, step, bits, False))
    values = quantize(quantizer, variables, x)
    np.testing.assert_array_equal(values, cases.reconstruct(codes, step))


def test_a_depthwise_kernel_has_a_step_for_each_pair():
    variables = build(LSQWeight(2, per_axis=True, channel_axes=(2, 3)), (3, 3, 4, 2))
    assert variables["step"].shape == (1, 1, 4, 2)


@pytest.mark.parametrize("bits", [16, 32])
def test_unrounded_keeps_the_clip_of_8_bits(bits):
    x = np.linspace(-2, 2, 4001).astype(np.float32)
    step = np.float32(1 / 256)
    for quantizer, low, high in (
        (LSQWeight(bits), -128, 127),
        (LSQWeight(bits, narrow_range=True), -127, 127),
        (LSQActivation(bits, signed=True), -128, 127),
        (LSQActivation(bits), 0, 255),
    ):
        values = quantize(quantizer, with_step(quantizer, step), x)
        expected = np.clip(x, low * step, high * step)
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


def gradient_scale(sharing, highest, start):
    """`1 / sqrt(N Q_P)` in the paper; `1 / (Q_P sqrt(N))` with the start of ours."""
    return 1 / math.sqrt(sharing * highest * (1 if start == "paper" else highest))


@pytest.mark.quick(33)
@pytest.mark.parametrize("start", ["paper", "least_error"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", cases.ALL_BITS)
def test_weight_step_gradient_is_scaled(bits, narrow, start):
    x = cases.random_inputs(spread=5.0)
    upstream, step = cases.random_upstream(x.shape), np.float32(0.31)
    quantizer = LSQWeight(bits, narrow_range=narrow, initialization=start)
    variables = with_step(quantizer, step)
    d_x, d_step = cases.gradients(quantizer, variables, x, upstream, "step")
    expected = oracle.lsq_gradients(x, step, upstream, bits, signed=True, narrow=narrow)
    highest = 2 ** (min(bits, 8) - 1) - 1 if bits > 1 else 1
    scale = gradient_scale(3 * 3 * 4 * 8, highest, start)
    np.testing.assert_array_equal(d_x, expected[0])
    np.testing.assert_allclose(d_step, expected[1] * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["paper", "least_error"])
@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_channel_step_gradient_has_the_scale_of_the_weights_that_share_it(bits, start):
    x = cases.random_inputs(spread=5.0)
    upstream = cases.random_upstream(x.shape)
    quantizer = LSQWeight(bits, per_axis=True, initialization=start)
    variables = build(quantizer)
    step = np.linspace(0.2, 0.9, 8).astype(np.float32).reshape(1, 1, 1, 8)
    variables["step"].assign(step)
    d_x, d_step = cases.gradients(quantizer, variables, x, upstream, "step")
    expected = oracle.lsq_gradients(x, step, upstream, bits, signed=True)
    highest = 2 ** (min(bits, 8) - 1) - 1 if bits > 1 else 1
    scale = gradient_scale(3 * 3 * 4, highest, start)
    np.testing.assert_array_equal(d_x, expected[0])
    assert d_step.shape == (1, 1, 1, 8)
    np.testing.assert_allclose(d_step, expected[1] * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.quick(28)
@pytest.mark.parametrize("start", ["paper", "least_error"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", cases.ALL_BITS)
def test_activation_step_gradient_has_the_scale_of_one_example(bits, signed, start):
    x = cases.random_inputs((6, 5, 5, 4), spread=5.0)
    upstream, step = cases.random_upstream(x.shape), np.float32(0.31)
    quantizer = LSQActivation(bits, signed=signed, initialization=start)
    variables = with_step(quantizer, step)
    d_x, d_step = cases.gradients(quantizer, variables, x, upstream, "step")
    expected = oracle.lsq_gradients(x, step, upstream, bits, signed=signed)
    if signed:
        highest = 2 ** (min(bits, 8) - 1) - 1 if bits > 1 else 1
    else:
        highest = 2 ** min(bits, 8) - 1
    scale = gradient_scale(5 * 5 * 4, highest, start)
    np.testing.assert_array_equal(d_x, expected[0])
    np.testing.assert_allclose(d_step, expected[1] * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", cases.ALL_BITS)
def test_unsigned_fused_is_composed(bits):
    x = cases.random_inputs((6, 5, 5, 4), spread=5.0)
    upstream = cases.random_upstream(x.shape)
    found = []
    for implementation in ("fused", "composed"):
        quantizer = LSQActivation(bits, implementation=implementation)
        variables = with_step(quantizer, np.float32(0.31))
        found.append(
            [
                quantize(quantizer, variables, x),
                *cases.gradients(quantizer, variables, x, upstream, "step"),
            ]
        )
    for fused, plain in zip(*found, strict=True):
        np.testing.assert_array_equal(fused, plain)


def test_weights_by_hand():
    # s = 0.5, 2 bits: v = (-3, -1.4, 0.6, 1.0, 4).
    x, upstream = [-1.5, -0.7, 0.3, 0.5, 2.0], [1.0, 2.0, 5.0, 7.0, 4.0]
    quantizer = LSQWeight(2)
    variables = with_step(quantizer, np.float32(0.5))
    codes = quantizer.codes(tf.constant(x), variables)
    np.testing.assert_array_equal(codes, [-2, -1, 1, 1, 1])
    np.testing.assert_array_equal(
        quantize(quantizer, variables, x), [-1, -0.5, 0.5, 0.5, 0.5]
    )
    d_x, d_step = cases.gradients(quantizer, variables, x, upstream, "step")
    np.testing.assert_array_equal(d_x, [0, 2, 5, 7, 0])
    # (-2) 1 + (-1 + 1.4) 2 + (1 - 0.6) 5 + 0 + 1 * 4 = 4.8; N = 5, Q_P = 1.
    np.testing.assert_allclose(d_step, 4.8 / math.sqrt(5), rtol=1e-5)


# Steps stay positive.


@pytest.mark.parametrize("make", [LSQWeight, LSQActivation])
def test_an_update_never_turns_the_step_negative(make):
    quantizer = make(2)
    variables = with_step(quantizer, np.float32(0.01))
    x = tf.constant([[0.1, 3.0, 5.0]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(quantizer(x, training=True, weights=variables))
    keras.optimizers.SGD(1e4).minimize(loss, [variables["step"]], tape=tape)
    np.testing.assert_allclose(variables["step"], 1e-6)
    assert np.isfinite(quantize(quantizer, variables, x)).all()
    # It can come back: the floor still has a gradient.
    _, d_step = cases.gradients(quantizer, variables, x, np.ones((1, 3)), "step")
    assert d_step > 0


def test_each_channels_step_is_kept_positive():
    quantizer = LSQWeight(2, per_axis=True)
    variables = build(quantizer, (1, 2))
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.apply_gradients([(tf.constant([[5.0, 0.25]]), variables["step"])])
    np.testing.assert_allclose(variables["step"], [[1e-6, 0.75]])


@pytest.mark.parametrize("step", [0.0, -1.0])
@pytest.mark.parametrize(
    "quantizer", [LSQWeight(2), LSQActivation(2), LSQActivation(2, signed=True)]
)
def test_the_forward_is_finite_where_an_optimizer_ignores_the_constraint(
    quantizer, step
):
    variables = with_step(quantizer, np.float32(step))
    values = quantize(quantizer, variables, [[-1.0, 0.0, 1.0]])
    assert np.isfinite(values).all()
    assert (np.diff(values) >= 0).all()


# Starting and restarting the step.


def highest_code(bits, signed):
    return 2 ** (min(bits, 8) - 1) - 1 or 1 if signed else 2 ** min(bits, 8) - 1


@pytest.mark.parametrize("bits", cases.ALL_BITS)
def test_the_papers_start_per_tensor(bits):
    w = cases.random_inputs()
    quantizer = LSQWeight(bits, initialization="paper")
    variables = build(quantizer)
    quantizer.initialize(tf.Variable(w), variables)
    expected = 2 * np.abs(w.astype(np.float64)).mean()
    expected /= math.sqrt(highest_code(bits, signed=True))
    np.testing.assert_allclose(variables["step"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("channel_axes", "axes"), [((-1,), (0, 1, 2)), ((3,), (0, 1, 2)), ((2, 3), (0, 1))]
)
def test_the_papers_start_per_channel(channel_axes, axes):
    w = cases.random_inputs() * np.linspace(0.1, 5, 8, dtype=np.float32)
    quantizer = LSQWeight(
        3, per_axis=True, channel_axes=channel_axes, initialization="paper"
    )
    variables = build(quantizer)
    quantizer.initialize(tf.Variable(w), variables)
    expected = 2 * np.abs(w).mean(axis=axes, keepdims=True) / math.sqrt(3)
    np.testing.assert_allclose(variables["step"], expected, rtol=1e-5)


def test_initialize_of_zero_weights_is_positive():
    quantizer = LSQWeight(2)
    variables = build(quantizer)
    quantizer.initialize(tf.Variable(tf.zeros((3, 3, 4, 8))), variables)
    assert float(variables["step"]) >= 1e-6 * (1 - 1e-6)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", cases.ALL_BITS)
def test_the_papers_start_of_activations(bits, signed):
    batches = [cases.random_inputs((7, 5), seed=s) + 0.3 for s in range(3)]
    quantizer = LSQActivation(bits, signed=signed, initialization="paper")
    variables = build(quantizer)
    assert int(variables["calibrated"]) == 0
    quantizer.calibrate(batches, variables)
    x = np.concatenate(batches).astype(np.float64)
    mean = np.abs(x).mean() if signed else np.maximum(x, 0).mean()
    expected = 2 * mean / math.sqrt(highest_code(bits, signed))
    np.testing.assert_allclose(variables["step"], expected, rtol=1e-5)
    assert int(variables["calibrated"]) == 1


@pytest.mark.quick(9)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", cases.ALL_BITS)
def test_activations_start_at_the_least_error(bits, signed):
    batches = [cases.random_inputs((70, 5), seed=s) + 0.3 for s in range(3)]
    quantizer = LSQActivation(bits, signed=signed)
    variables = build(quantizer)
    quantizer.calibrate(batches, variables)
    x = np.concatenate(batches).astype(np.float64)
    target, k = x if signed else np.maximum(x, 0.0), min(bits, 8)

    def error(step):
        if signed:
            values = oracle.signed_codes(x, step, k, False) * step
        else:
            values = oracle.unsigned_values(x, step * highest_code(k, False), k)
        return np.square(values - target).mean()

    top = target.max() / highest_code(k, signed)
    best = min(error(share * top) for share in np.linspace(0.02, 1, 200))
    assert error(np.float64(variables["step"])) <= 1.25 * best
    assert int(variables["calibrated"]) == 1


@pytest.mark.quick(6)
@pytest.mark.parametrize("per_axis", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_start_at_the_least_error(bits, narrow, per_axis):
    w = cases.random_inputs((3, 3, 40, 3)) * [1.0, 4.0, 0.2]
    quantizer = LSQWeight(bits, per_axis=per_axis, narrow_range=narrow)
    variables = build(quantizer, w.shape)
    quantizer.initialize(tf.Variable(w, dtype=tf.float32), variables)
    axes = (0, 1, 2) if per_axis else (0, 1, 2, 3)

    def error(step):
        values = oracle.signed_codes(w, step, bits, narrow) * step
        return np.square(values - w).mean(axis=axes, keepdims=True)

    top = np.abs(w).max(axis=axes, keepdims=True) / highest_code(bits, True)
    best = np.min([error(share * top) for share in np.linspace(0.02, 1, 200)], axis=0)
    assert (error(np.asarray(variables["step"], np.float64)) <= 1.25 * best).all()


@pytest.mark.parametrize("seed", range(3))
def test_8_bits_are_used(seed):
    """The paper's start leaves most of the levels of 8 bits empty."""
    levels = {}
    for start in ("paper", "least_error"):
        quantizer = LSQWeight(8, initialization=start)
        variables = build(quantizer)
        w = tf.Variable(cases.random_inputs((3, 3, 64, 64), seed=seed))
        quantizer.initialize(w, variables)
        levels[start] = len(np.unique(quantizer.codes(w, variables)))
    assert levels["paper"] < 100
    assert levels["least_error"] > 200


@pytest.mark.parametrize("make", [LSQWeight, LSQActivation])
def test_an_unknown_initialization_is_refused(make):
    with pytest.raises(ValueError, match="Received: initialization='best'"):
        make(2, initialization="best")


def test_calibrate_starts_at_the_present_bits():
    quantizer = LSQActivation(2, initialization="paper")
    variables = build(quantizer)
    quantizer.assign_bits(variables, 4)
    quantizer.calibrate([np.full((2, 3), 1.5, np.float32)], variables)
    np.testing.assert_allclose(variables["step"], 3 / math.sqrt(15), rtol=1e-6)


@pytest.mark.parametrize("data", [[], [np.zeros((0, 3), np.float32)]])
def test_calibrate_refuses_empty_data(data):
    quantizer = LSQActivation(2)
    variables = build(quantizer)
    with pytest.raises(ValueError, match="at least one value"):
        quantizer.calibrate(data, variables)
    assert int(variables["calibrated"]) == 0
    assert float(variables["step"]) == 1.0


@pytest.mark.parametrize(
    ("old", "new"), [(8, 4), (4, 2), (2, 1), (32, 2), (16, 8), (1, 8), (3, 3)]
)
@pytest.mark.parametrize(
    ("quantizer", "signed"),
    [
        (LSQWeight, True),
        (LSQActivation, False),
        (functools.partial(LSQActivation, signed=True), True),
    ],
    ids=["weight", "activation", "signed activation"],
)
def test_assign_bits_with_the_papers_start_rescales_the_step(
    quantizer, signed, old, new
):
    quantizer = quantizer(old, initialization="paper")
    variables = with_step(quantizer, np.float32(0.3))
    quantizer.assign_bits(variables, new)
    ratio = highest_code(old, signed) / highest_code(new, signed)
    np.testing.assert_allclose(variables["step"], 0.3 * math.sqrt(ratio), rtol=1e-6)
    assert int(variables["bits"]) == new


def test_assign_bits_by_hand():
    quantizer = LSQWeight(8, per_axis=True, initialization="paper")
    variables = build(quantizer, (2, 2))
    variables["step"].assign([[0.1, 0.2]])
    quantizer.assign_bits(variables, 2)  # Q_P: 127 -> 1
    expected = [[0.1 * math.sqrt(127), 0.2 * math.sqrt(127)]]
    np.testing.assert_allclose(variables["step"], expected, rtol=1e-6)
    quantizer.assign_bits(variables, 8)
    np.testing.assert_allclose(variables["step"], [[0.1, 0.2]], rtol=1e-6)


def test_assign_bits_refuses_before_it_changes_anything():
    quantizer = LSQWeight(2)
    variables = with_step(quantizer, np.float32(0.3))
    with pytest.raises(ValueError, match="Received: bits=9"):
        quantizer.assign_bits(variables, 9)
    assert int(variables["bits"]) == 2
    assert float(variables["step"]) == np.float32(0.3)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="Received: implementation='fast'"):
        LSQActivation(2, implementation="fast")


@pytest.mark.parametrize("factor", [0.0, 0.25, 3.0])
@pytest.mark.parametrize("make", [LSQWeight, LSQActivation])
def test_the_gradient_factor_is_on_the_step_alone(make, factor):
    x = cases.random_inputs(spread=3.0)
    upstream, found = cases.random_upstream(x.shape), []
    for quantizer in (make(3), make(3, gradient_factor=factor)):
        variables = with_step(quantizer, np.float32(0.31))
        values = quantize(quantizer, variables, x)
        found.append(
            [values, *cases.gradients(quantizer, variables, x, upstream, "step")]
        )
    (values, d_x, d_step), other = found
    assert d_step != 0
    np.testing.assert_array_equal(other[0], values)
    np.testing.assert_array_equal(other[1], d_x)
    np.testing.assert_allclose(other[2], factor * d_step, rtol=1e-6)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize("make", [LSQWeight, LSQActivation, cases.PACT])
def test_a_gradient_factor_must_be_a_number_from_0(make, factor):
    with pytest.raises(ValueError, match="Received: gradient_factor="):
        make(2, gradient_factor=factor)
