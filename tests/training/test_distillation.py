"""The settings, distances and hints of joint distillation, against NumPy."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.scheme import nets
from tf_lowbit import JointDistillation, PrecisionRule, models, quantize
from tf_lowbit.compat import keras, tf
from tf_lowbit.training.hints import find_hints, hint_distance

layers = keras.layers
W2A2 = PrecisionRule(".*", 2, 2)
CASES = [{"temperature": t} for t in (1, 2, 5)] + [{"target": "logits"}]
WEIGHTS = (
    "task_weight",
    "distillation_weight",
    "teacher_task_weight",
    "teacher_distillation_weight",
    "hint_weight",
)


def softmax(logits):
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def numpy_distance(case, teacher, student):
    """D, and its gradients by the target's and by the other logits."""
    teacher, student = np.asarray(teacher, np.float64), np.asarray(student, np.float64)
    if "target" in case:
        slope = 2 * (student - teacher) / student.shape[-1]
        return np.mean((teacher - student) ** 2, -1), -slope, slope
    temperature = case["temperature"]
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    ratio = np.log(p) - np.log(q)
    divergence = np.sum(p * ratio, -1)
    by_target = temperature * p * (ratio - divergence[:, None])
    return temperature**2 * divergence, by_target, temperature * (q - p)


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


# --- settings


@pytest.mark.parametrize(
    ("target", "expected"),
    [("posteriors", (0.7, 0.7, 1.0, 0.5)), ("logits", (0.3, 0.1, 1.0, 0.1))],
)
def test_the_defaults_are_the_authors_constants(target, expected):
    losses = JointDistillation(target)
    assert tuple(getattr(losses, name) for name in WEIGHTS[:4]) == expected
    assert losses.temperature == (1.0 if target == "posteriors" else None)
    assert losses.teacher == "joint"
    assert losses.hints is None
    assert losses.trains_teacher
    assert JointDistillation().target == "posteriors"


def test_hints_start_with_weight_one_and_train_a_joint_teacher():
    losses = JointDistillation(hints=["relu1"])
    assert (losses.hint_weight, losses.hint_teacher_gradient) == (1.0, True)
    losses = JointDistillation(hints=["relu1"], teacher="frozen")
    assert (losses.hint_weight, losses.hint_teacher_gradient) == (1.0, None)


def test_what_has_no_effect_stays_none():
    losses = JointDistillation(teacher="frozen")
    assert losses.teacher_task_weight is None
    assert losses.teacher_distillation_weight is None
    assert losses.hint_weight is None
    assert losses.hint_teacher_gradient is None


@pytest.mark.parametrize(
    ("setting", "student", "teacher"),
    [
        ({}, {"task": 0.7, "distillation": 0.7}, {"task": 1, "distillation": 0.5}),
        ({"teacher": "task"}, {"task": 0.7, "distillation": 0.7}, {"task": 1}),
        ({"teacher": "frozen"}, {"task": 0.7, "distillation": 0.7}, {"task": 1}),
        (
            {"task_weight": 2, "teacher_task_weight": 3, "hints": "stages"},
            {"task": 2, "distillation": 0.7, "hint": 1},
            {"task": 3, "distillation": 0.5, "hint": 1},
        ),
        (
            {"hints": ["a"], "hint_weight": 4, "hint_teacher_gradient": False},
            {"task": 0.7, "distillation": 0.7, "hint": 4},
            {"task": 1, "distillation": 0.5},
        ),
        (
            {"hints": ["a"], "teacher": "task", "distillation_weight": 0},
            {"task": 0.7, "distillation": 0, "hint": 1},
            {"task": 1},
        ),
    ],
)
def test_the_parts_of_each_loss_and_their_weights(setting, student, teacher):
    losses = JointDistillation(**setting)
    assert losses.student_weights() == {f"{k}_loss": v for k, v in student.items()}
    assert losses.teacher_weights() == {f"{k}_loss": v for k, v in teacher.items()}
    assert losses.trains_teacher is (setting.get("teacher") != "frozen")


@pytest.mark.parametrize(
    "setting",
    [
        *[{n: v, "hints": ["a"]} for n in WEIGHTS for v in (-0.1, "1", True)],
        *[{"task_weight": v} for v in (float("nan"), float("inf"), 1j, [1])],
        *[{"temperature": v} for v in (0, -1, float("nan"), float("inf"), "2", True)],
        {"target": "logit"},
        {"teacher": "student"},
        {"hints": "stage"},
        {"hints": []},
        {"hints": 5},
        {"hints": ["a"], "hint_teacher_gradient": "no"},
    ],
    ids=str,
)
def test_a_bad_setting_is_refused(setting):
    with pytest.raises(ValueError, match="Received: "):
        JointDistillation(**setting)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("teacher_task_weight", {"teacher": "frozen"}),
        ("teacher_distillation_weight", {"teacher": "frozen"}),
        ("teacher_distillation_weight", {"teacher": "task"}),
        ("temperature", {"target": "logits"}),
        ("hint_weight", {}),
    ],
)
def test_a_setting_without_effect_is_refused(name, others, value):
    with pytest.raises(ValueError, match=f"{name}.*Received|Received.*{name}"):
        JointDistillation(**others, **{name: value})


@pytest.mark.parametrize(
    "others",
    [{}, {"teacher": "task", "hints": ["a"]}, {"teacher": "frozen", "hints": ["a"]}],
    ids=str,
)
def test_a_hint_gradient_that_reaches_no_teacher_is_refused(others):
    with pytest.raises(ValueError, match=r"Received.*hint_teacher_gradient"):
        JointDistillation(**others, hint_teacher_gradient=True)


def test_zero_weights_are_allowed():
    losses = JointDistillation(hints=["a"], **dict.fromkeys(WEIGHTS, 0))
    assert set(losses.student_weights().values()) == {0}
    assert set(losses.teacher_weights().values()) == {0}


def test_settings_are_frozen_and_can_be_replaced():
    losses = JointDistillation()
    with pytest.raises(dataclasses.FrozenInstanceError):
        losses.task_weight = 1.0
    changed = dataclasses.replace(losses, task_weight=1.0)
    assert changed == JointDistillation(task_weight=1.0)
    changed = dataclasses.replace(losses, hints=["a"])
    assert changed == JointDistillation(hints=["a"])


# --- distances


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_distance_and_gradients_equal_numpys(case, scale):
    target, logits = normal(6, 4, scale=scale), normal(6, 4, seed=1, scale=scale)
    expected, by_target, by_logits = numpy_distance(case, target, logits)
    target, logits = tf.constant(target), tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch([target, logits])
        distance = JointDistillation(**case).distance(target, logits)
    found = tape.gradient(distance, [target, logits])
    assert distance.dtype == tf.float32
    assert distance.shape == (6,)
    # Posteriors are rounded to 2^-24; T^2 of it stays.
    np.testing.assert_allclose(distance, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[0], by_target, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], by_logits, rtol=1e-4, atol=1e-5)


def test_distance_of_a_hand_worked_case():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log 3/2 - 1/4 log 2."""
    target, logits = [[np.log(3.0), 0.0]], [[7.0, 7.0]]
    expected = 0.75 * np.log(1.5) - 0.25 * np.log(2)
    found = JointDistillation().distance(target, logits)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    doubled = 2.0 * np.asarray(target, np.float32)
    found = JointDistillation(temperature=2).distance(doubled, logits)
    np.testing.assert_allclose(found, [4 * expected], rtol=1e-5)
    found = JointDistillation("logits").distance([[1.0, 2.0]], [[4.0, 2.0]])
    np.testing.assert_array_equal(found, [4.5])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_logits_have_no_distance(case):
    logits = normal(5, 7, scale=30)
    found = JointDistillation(**case).distance(logits, logits)
    np.testing.assert_array_equal(found, np.zeros(5))


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    pair=hnp.arrays(np.float32, (2, 1, 3), elements=st.floats(-50, 50, width=32)),
    nudge=st.floats(0, 1),
)
def test_distance_is_not_negative(case, pair, nudge):
    target = pair[0]
    logits = (target + nudge * (pair[1] - target)).astype(np.float32)
    distance = JointDistillation(**case).distance(target, logits).numpy()
    # Of nearly equal logits only the rounding of their posteriors is left.
    assert distance >= -1e-6 * case.get("temperature", 0) ** 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_large_logits_stay_finite(case):
    target = tf.constant([[1e4, -1e4, 0.0]])
    logits = tf.constant([[-1e4, 1e4, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch([target, logits])
        distance = JointDistillation(**case).distance(target, logits)
    # T^2 KL: p is all on the first class, where log q is -2e4 / T.
    expected = 8e8 / 3 if "target" in case else case["temperature"] * 2e4
    np.testing.assert_allclose(distance, [expected], rtol=1e-6)
    for gradient in tape.gradient(distance, [target, logits]):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sixteen_bit_logits_are_compared_in_float32(case, dtype):
    target = tf.cast(normal(4, 100, scale=3), dtype)
    logits = tf.cast(normal(4, 100, seed=1, scale=3), dtype)
    found = JointDistillation(**case).distance(target, logits)
    expected, *_ = numpy_distance(case, target, logits)
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 4, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_hint_distance_and_gradients(shape, dtype):
    target, feature = (tf.cast(normal(*shape, seed=s), dtype) for s in (0, 1))
    with tf.GradientTape() as tape:
        tape.watch([target, feature])
        distance = hint_distance(target, feature)
    found = tape.gradient(distance, [target, feature])
    t, f = (np.asarray(v, np.float64).reshape(3, -1) for v in (target, feature))
    assert distance.dtype == tf.float32
    np.testing.assert_allclose(distance, ((t - f) ** 2).mean(1) / 2, rtol=1e-5)
    slope = ((t - f) / t.shape[1]).reshape(shape)
    tolerance = 1e-6 if dtype == "float32" else 1e-3
    np.testing.assert_allclose(found[0], slope, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found[1], -slope, rtol=tolerance, atol=tolerance)


# --- hints


@pytest.fixture(scope="module")
def student():
    return quantize(nets.perceptron(), W2A2)


def perceptron_with(mid=6, activation=None):
    """in (with its ReLU, if it has one) - relu1 - mid - relu2 - head."""
    return keras.Sequential(
        [
            layers.Dense(6, activation=activation, name="in", input_shape=(5,)),
            layers.ReLU(name="relu1"),
            layers.Dense(mid, name="mid"),
            layers.ReLU(name="relu2"),
            layers.Dense(nets.CLASSES, name="head"),
        ],
        name="teacher",
    )


def test_no_hints(student):
    assert find_hints(None, student, nets.perceptron()) == []


def test_hints_by_name_and_by_pair(student):
    by_name, by_pair, float_pair = find_hints(
        ["relu1", ("relu1", "relu2"), ["relu2", "relu1"]], student, nets.perceptron()
    )
    quantizer = nets.by_name(student)["relu1/output"]
    assert by_name[:2] == ("relu1", "relu1")
    assert by_pair[:2] == ("relu1", "relu2")
    assert float_pair[:2] == ("relu2", "relu1")
    assert by_name.quantizer.variables is quantizer.variables
    # The ReLU in front of the float head is no quantizer: its features are as they are.
    assert float_pair.quantizer is None
    feature = tf.constant([[-0.2, 0.1, 0.6, 9.0]])
    np.testing.assert_array_equal(float_pair.quantized(feature), feature)
    np.testing.assert_allclose(by_name.quantized(feature), [[0, 0, 2 / 3, 1]])


def test_the_teachers_feature_follows_the_students_bits(student):
    (hint,) = find_hints(["relu1"], student, nets.perceptron())
    hint.quantizer.assign_bits(1)
    np.testing.assert_array_equal(hint.quantized(tf.constant([[0.4, 0.6]])), [[0, 1]])
    hint.quantizer.assign_bits(2)


def test_a_relu_inside_the_teachers_layer():
    def net():
        return keras.Sequential(
            [
                layers.Dense(6, activation="relu", name="first", input_shape=(5,)),
                layers.Dense(6, activation="relu", name="second"),
                layers.Dense(nets.CLASSES, name="head"),
            ]
        )

    student, teacher = quantize(net(), W2A2), net()
    hints = find_hints(["first_relu"], student, teacher)
    assert [hint[:2] for hint in hints] == [("first_relu", "first")]
    assert hints[0].quantizer.name == "first_relu/output"


def test_a_layer_without_a_relu_of_its_own_is_no_counterpart():
    student = quantize(
        keras.Sequential(
            [
                layers.Dense(6, activation="relu", name="first", input_shape=(5,)),
                layers.Dense(6, name="second"),
            ]
        ),
        PrecisionRule("second", 2, 2),
    )
    teacher = keras.Sequential(
        [
            layers.Dense(6, name="first", input_shape=(5,)),
            layers.ReLU(name="first_relu"),
            layers.Dense(6, name="second"),
        ]
    )
    (hint,) = find_hints(["first_relu"], student, teacher)
    assert hint[:2] == ("first_relu", "first_relu")


def test_stages_of_a_preactivation_resnet():
    """A stage's first ReLU stands in front of its stride, on the last resolution."""
    teacher = models.preact_resnet(8, width=2, input_shape=(8, 8, 3))
    student = quantize(teacher, W2A2)
    hints = find_hints("stages", student, teacher)
    expected = ["stage3_block1_relu1", "stage3_block1_relu2"]
    assert [hint[:2] for hint in hints] == [(name, name) for name in expected]
    assert [h.quantizer.name for h in hints] == [f"{name}/output" for name in expected]


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: models.preact_resnet(8, width=2, input_shape=(8, 8, 3)),
        nets.postactivation,
    ],
    ids=["pre-activation", "post-activation"],
)
def test_residual_quantizers_give_no_hints(build):
    teacher = build()
    plain, student = (quantize(teacher, W2A2, residual_bits=b) for b in (None, 8))
    expected = [hint[:2] for hint in find_hints("stages", plain, teacher)]
    assert [hint[:2] for hint in find_hints("stages", student, teacher)] == expected


def test_stages_of_a_network_with_one_resolution():
    teacher = nets.chain(batch_norm=False)
    student = quantize(teacher, W2A2)
    (hint,) = find_hints("stages", student, teacher)
    assert hint[:2] == ("relu2", "relu2")


def test_a_resolution_that_comes_back_counts_by_its_last_activation():
    x = image = keras.Input((8, 8, 1))
    for name in ("full", "half", "quarter"):
        x = layers.Conv2D(2, 1, activation="relu", name=name)(x)
        x = layers.MaxPooling2D(2)(x)
    x = layers.UpSampling2D(8)(x)
    x = layers.Conv2D(2, 1, activation="relu", name="again")(x)
    teacher = keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))
    student = quantize(teacher, PrecisionRule(".+", 2, 2))
    hints = find_hints("stages", student, teacher)
    assert [hint.teacher for hint in hints] == ["quarter", "again"]


def test_stages_need_images_of_a_fixed_size():
    image = keras.Input((None, None, 3))
    x = layers.ReLU(name="relu")(layers.Conv2D(4, 3, name="first")(image))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, name="second")(x))
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    quantized = quantize(model, W2A2)
    with pytest.raises(ValueError, match=r"fixed image size.*Received: 'relu' with"):
        find_hints("stages", quantized, model)


def test_stages_need_image_activations(student):
    with pytest.raises(ValueError, match=r"Received: 'perceptron'.*\['relu1'\]"):
        find_hints("stages", student, nets.perceptron())


def test_a_missing_layer_is_named_with_those_that_there_are(student):
    teacher = perceptron_with()
    with pytest.raises(ValueError, match=r"student.*Received: 'nope'.*'relu1', 'mid'"):
        find_hints(["nope"], student, teacher)
    with pytest.raises(ValueError, match=r"teacher.*'nope'.*\['in', 'relu1', 'mid'"):
        find_hints([("relu1", "nope")], student, teacher)


def test_layers_of_other_shapes_are_refused(student):
    with pytest.raises(ValueError, match=r"'relu2' \(None, 6\).*'relu2' \(None, 7\)"):
        find_hints(["relu2"], student, perceptron_with(mid=7))


@pytest.mark.parametrize("hint", [("relu1",), ("relu1", "relu1", "relu2"), 3])
def test_a_hint_that_is_no_name_and_no_pair_is_refused(hint):
    with pytest.raises(ValueError, match=r"list of layer names and of pairs.*Received"):
        JointDistillation(hints=[hint])
