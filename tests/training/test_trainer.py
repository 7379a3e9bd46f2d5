"""`LowBitTrainer` against steps written out in NumPy, and against Keras itself."""

import csv
import functools
import warnings

import numpy as np
import pytest

import tf_lowbit as tfl
from tests import oracle
from tests.scheme import nets
from tf_lowbit.callbacks import StagedPrecision
from tf_lowbit.callbacks.optimizer_state import reset_optimizer
from tf_lowbit.compat import keras, tf

layers = keras.layers

L2, ALPHA_DECAY = 0.01, 0.02
X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
Y = np.array([0, 1, 2, 3, 0, 1, 2, 2])
WEIGHTS = np.array([1, 2, 0, 0.5, 1, 1, 3, 0.25], np.float32)
CLASS_WEIGHT = {0: 0.5, 1: 2.0, 2: 1.0, 3: 0.0}
RATE = 2.0**-6  # Plain SGD's: so that no learned step falls to its floor.
HINTS = ["relu1", "relu2"]  # Quantized in the student, and not.
SPARSE = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam


# --- networks: built once, with the same weights for each test


def net(seed, *, norm=True, inputs=5, outputs=nets.CLASSES, head=None):
    """in - bn - relu1 - mid - relu2 - head."""
    penalty = keras.regularizers.L2(L2)
    dense = functools.partial(layers.Dense, kernel_regularizer=penalty)
    x = image = keras.Input((inputs,), name="image")
    x = dense(6, use_bias=not norm, name="in")(x)
    if norm:
        x = layers.BatchNormalization(name="bn")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.ReLU(name="relu2")(dense(6, name="mid")(x))
    x = dense(outputs, activation=head, name="head")(x)
    return nets.randomize(keras.Model(image, x, name=f"net{seed}"), seed)


def fresh_student(kind):
    """ "learned" and "other", quantized unlike each other; "plain" has no BN."""
    if kind == "learned":
        quantizer = tfl.quantizers.PACTActivationQuantizer(
            alpha=0.5, alpha_decay=ALPHA_DECAY
        )
        rule = tfl.PrecisionRule(
            ".*", 2, 2, weight_quantizer="lsq", activation_quantizer=quantizer
        )
        return tfl.quantize(net(1), rule)
    if kind == "plain":
        return tfl.quantize(net(4, norm=False), tfl.PrecisionRule(".*", 2, 2))
    model = tfl.quantize(
        net(2), tfl.PrecisionRule(".*", 4, 4, activation_quantizer="lsq")
    )
    nets.by_name(model)["relu1/output"].variables["step"].assign(0.05)
    return model


@functools.cache
def _cached(make, *arguments):
    model = make(*arguments)
    return model, model.get_weights()


def _again(make, *arguments):
    model, weights = _cached(make, *arguments)
    model.set_weights(weights)
    return model


def student(kind="learned"):
    return _again(fresh_student, kind)


def teacher():
    return _again(net, 3)


def trainer(*networks, eager=True, compiled=None, **losses):
    """A compiled trainer; `losses` are settings of the distillation."""
    networks = networks or (student(), teacher())
    model = tfl.LowBitTrainer(
        *networks, distillation=tfl.JointDistillation(**losses) if losses else None
    )
    options = {"optimizer": SGD(0.1, momentum=0.9), "loss": SPARSE()}
    if len(networks) == 2 and losses.get("teacher") != "frozen":
        options["teacher_optimizer"] = SGD(0.1, momentum=0.9)
    if "jit_compile" not in (compiled or {}):
        options["run_eagerly"] = eager
    model.compile(**options | (compiled or {}))
    return model


def values(*networks):
    return [nets.snapshot(network.weights) for network in networks]


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        nets.assert_all_equal(a, e)


# --- one step by hand


DEFAULTS = {
    "posteriors": (0.7, 0.7, 1.0, 0.5),
    "logits": (0.3, 0.1, 1.0, 0.1),
}
NAMES = (
    "task_weight",
    "distillation_weight",
    "teacher_task_weight",
    "teacher_distillation_weight",
)


def softmax(logits):
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def distance(target, t, towards, logits):
    """D to `towards` for each example, and its gradient by `logits`."""
    if target == "logits":
        slope = 2 * (logits - towards) / logits.shape[1]
        return np.mean((logits - towards) ** 2, 1), slope
    p, q = softmax(towards / t), softmax(logits / t)
    return t**2 * np.sum(p * np.log(p / q), 1), t * (q - p)


def passed(network, names, training):
    """Outputs and features, and a function from their gradients to the weights'."""
    read = {n: network.get_layer(n).output for n in names} | {"": network.output}
    with tf.GradientTape() as tape:
        seen = keras.Model(network.inputs, read)(X, training=training)
    tensors = [seen[""], *(seen[n] for n in names)]

    def pull(upstream):
        gradients = tape.gradient(
            tensors,
            network.trainable_variables,
            output_gradients=[tf.constant(u, tf.float32) for u in upstream],
        )
        return [
            g.numpy() + decay(v)[1]
            for g, v in zip(gradients, network.trainable_variables, strict=True)
        ]

    return [t.numpy().astype(np.float64) for t in tensors], pull


def decay(variable):
    """A variable's own regularisation loss and its gradient."""
    factor = {"kernel:0": L2, "output_alpha:0": ALPHA_DECAY}.get(
        variable.name.split("/")[-1], 0.0
    )
    value = variable.numpy()
    return factor * np.sum(value**2), 2 * factor * value


def quantized(network, name, feature):
    """The student's quantizer on a teacher's feature, and where gradients pass."""
    tensor = nets.by_name(network).get(f"{name}/output")
    if tensor is None:
        return feature, np.ones_like(feature)
    n = 2**tensor.bits - 1
    known = tensor.variables
    clip = float(known["alpha"] if "alpha" in known else known["step"] * n)
    inside = (feature >= 0) & (feature <= clip)
    assert (feature > clip).any()  # Else nothing is seen of the clip's gradient.
    return oracle.unsigned_values(feature, clip, tensor.bits), inside


def by_hand(students, teacher, weights, case):
    """Gradients of each student and of the teacher, and the logs, of one step.

    All gradients with respect to outputs and features are NumPy's; a tape only takes
    them back through a network.
    """
    target, t = case.get("target", "posteriors"), case.get("temperature", 1)
    numbers = dict(zip(NAMES, DEFAULTS[target], strict=True)) | case
    ls, ms, lt, mt = (numbers[name] for name in NAMES)
    hints, mode = case.get("hints", []), case.get("teacher", "joint")
    mt = mt if mode == "joint" else 0
    hw = case.get("hint_weight", 1.0)
    hints_teach = hints and case.get("hint_teacher_gradient", mode == "joint")
    hw_back = hw if hints_teach else 0
    share = weights / len(X)
    before = [n.get_weights() for n in (*students.values(), teacher)]
    (t_logits, *t_features), t_pull = passed(teacher, hints, mode != "frozen")
    truth = np.eye(nets.CLASSES)[Y]

    def task(logits):
        return share @ -np.log(softmax(logits)[np.arange(len(Y)), Y])

    def regularisation(network):
        return sum(decay(v)[0] for v in network.trainable_variables)

    gradients, logs, shared = [], {}, {"distillation_loss": 0.0, "hint_loss": 0.0}
    t_upstream = [lt * share[:, None] * (softmax(t_logits) - truth)]
    t_upstream += [np.zeros_like(f) for f in t_features]
    for index, (name, network) in enumerate(students.items()):
        (logits, *features), pull = passed(network, hints, True)
        to_teacher, slope = distance(target, t, t_logits, logits)
        back, t_slope = distance(target, t, logits, t_logits)
        slope = ls * (softmax(logits) - truth) + ms * slope
        upstream, hint_loss = [share[:, None] * slope], 0.0
        t_upstream[0] += mt / len(students) * share[:, None] * t_slope
        for i, hint in enumerate(hints):
            q, inside = quantized(network, hint, t_features[i])
            difference = (features[i] - q) * share[:, None] / q.shape[1]
            hint_loss += share @ np.mean((features[i] - q) ** 2, 1) / 2
            upstream.append(hw * difference)
            t_upstream[1 + i] -= hw_back / len(students) * inside * difference
        parts = {"task_loss": task(logits), "distillation_loss": share @ to_teacher}
        total = ls * parts["task_loss"] + ms * parts["distillation_loss"]
        if hints:
            parts["hint_loss"] = hint_loss
            total += hw * hint_loss
        parts["loss"] = total + regularisation(network)
        shared["distillation_loss"] += share @ back / len(students)
        shared["hint_loss"] += hint_loss / len(students)
        logs |= {f"{name}_" * (index > 0) + k: v for k, v in parts.items()}
        gradients.append(pull(upstream))
    total = lt * task(t_logits) + regularisation(teacher)
    if mode == "joint":
        logs["teacher_task_loss"] = task(t_logits)
        logs["teacher_distillation_loss"] = shared["distillation_loss"]
    if hints_teach:
        logs["teacher_hint_loss"] = shared["hint_loss"]
    total += mt * shared["distillation_loss"] + hw_back * shared["hint_loss"]
    logs["teacher_loss"] = total
    gradients.append(t_pull(t_upstream) if mode != "frozen" else None)
    for network, kept in zip((*students.values(), teacher), before, strict=True):
        network.set_weights(kept)  # The moving statistics.
    return gradients, logs


STEPS = {
    "posteriors": {},
    "temperature": {"temperature": 2},
    "logits": {"target": "logits"},
    "no-task": {"task_weight": 0},
    "no-distillation": {"distillation_weight": 0},
    "teacher-no-task": {"teacher_task_weight": 0},
    "teacher-no-distillation": {"teacher_distillation_weight": 0},
    "hints": {"hints": HINTS},
    "hints-by-weight": {"hints": HINTS[:1], "hint_weight": 5, "temperature": 2},
    "hints-not-to-the-teacher": {"hints": HINTS, "hint_teacher_gradient": False},
    "no-hints": {"hints": HINTS, "hint_weight": 0},
    "task": {"teacher": "task"},
    "task-hints": {"teacher": "task", "hints": HINTS},
    "frozen": {"teacher": "frozen"},
    "frozen-hints": {"teacher": "frozen", "hints": HINTS, "target": "logits"},
    "two": {"students": 2},
    "two-hints": {"students": 2, "hints": HINTS, "temperature": 2},
    "two-task": {"students": 2, "teacher": "task"},
    "graph": {"students": 2, "hints": HINTS, "eager": False},
    "class-weight": {"class_weight": CLASS_WEIGHT},
    "unweighted": {"hints": HINTS, "unweighted": True},
    "legacy": {"hints": HINTS, "optimizer": keras.optimizers.legacy.SGD},
}


@pytest.mark.quick(8)
@pytest.mark.parametrize("name", STEPS)
def test_a_joint_step_equals_the_one_by_hand(name):
    case = dict(STEPS[name])
    count, eager = case.pop("students", 1), case.pop("eager", True)
    optimizer = case.pop("optimizer", SGD)
    weights = {"sample_weight": WEIGHTS}
    used = WEIGHTS
    if "class_weight" in case:
        weights = {"class_weight": case.pop("class_weight")}
        used = np.array([CLASS_WEIGHT[y] for y in Y])
    elif case.pop("unweighted", False):
        weights, used = {}, np.ones(len(Y))
    students = {"a": student(), "b": student("other")}
    students = {k: students[k] for k in list(students)[:count]}
    everyone = [*students.values(), teacher()]
    gradients, logs = by_hand(students, teacher(), used, case)
    compiled = {"optimizer": optimizer(RATE)}
    if case.get("teacher") != "frozen":
        compiled["teacher_optimizer"] = optimizer(RATE)
    model = trainer(students, teacher(), eager=eager, compiled=compiled, **case)
    before = [nets.snapshot(n.trainable_variables) for n in everyone]
    frozen = teacher().get_weights()
    found = model.train_on_batch(X, Y, return_dict=True, **weights)
    for network, old, gradient in zip(everyone, before, gradients, strict=True):
        if gradient is None:
            nets.assert_all_equal(network.get_weights(), frozen)
            continue
        assert max(np.abs(g).max() for g in gradient) > 1e-3
        for v, o, g in zip(network.trainable_variables, old, gradient, strict=True):
            moved = (o - v.numpy()) / RATE
            np.testing.assert_allclose(moved, g, rtol=1e-4, atol=2e-5, err_msg=v.name)
    assert set(found) == set(logs)
    for key, value in logs.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


def test_a_plain_step_equals_the_one_by_hand():
    network = student()
    (logits,), pull = passed(network, [], True)
    upstream = WEIGHTS[:, None] / len(X) * (softmax(logits) - np.eye(4)[Y])
    gradients = pull([upstream])
    network = student()
    before = nets.snapshot(network.trainable_variables)
    model = trainer(network, compiled={"optimizer": SGD(RATE)})
    model.train_on_batch(X, Y, sample_weight=WEIGHTS)
    for v, o, g in zip(network.trainable_variables, before, gradients, strict=True):
        moved = (o - v.numpy()) / RATE
        np.testing.assert_allclose(moved, g, rtol=1e-4, atol=2e-5, err_msg=v.name)


def test_the_teacher_learns_from_the_students_as_they_were_before_the_step():
    after = []
    for rate in (0.0, 1e3):
        compiled = {"optimizer": SGD(rate)}
        trainer(compiled=compiled, hints=HINTS).train_on_batch(X, Y)
        after.append(values(_cached(net, 3)[0]))
    assert_same(*after)


def test_the_students_step_does_not_depend_on_how_the_teacher_is_trained():
    after = []
    for losses in ({}, {"hint_teacher_gradient": False}, {"teacher": "task"}):
        trainer(hints=HINTS, **losses).train_on_batch(X, Y)
        after.append(values(_cached(fresh_student, "learned")[0]))
    assert_same(after[0], after[1])
    assert_same(after[0], after[2])


def test_losses_that_a_teacher_adds_count_and_go_without_hints():
    same, tutor = net(3), net(3)
    tutor.add_loss(tf.reduce_mean(tutor.get_layer("relu1").output))
    losses = [  # The student is the same one, put back each time.
        trainer(student(), network).train_on_batch(X, Y, return_dict=True)
        for network in (tutor, net(3))
    ]
    feature = keras.Model(same.input, same.get_layer("relu1").output)
    added = float(tf.reduce_mean(feature(X, training=True)))
    difference = losses[0]["teacher_loss"] - losses[1]["teacher_loss"]
    assert difference == pytest.approx(added, rel=1e-4)
    with pytest.raises(ValueError, match=r"all lead to its output.*Received: 'net3'"):
        trainer(student(), tutor, hints=HINTS)


# --- what moves


@pytest.mark.parametrize("mode", ["joint", "task", "frozen"])
def test_what_moves_in_training(mode):
    model = trainer(hints=HINTS, teacher=mode)
    quantizers = nets.by_name(model.student)
    before = [values(n)[0] for n in (model.student, model.teacher)]
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    after = [values(n)[0] for n in (model.student, model.teacher)]
    moved = [
        [not np.array_equal(a, b) for a, b in zip(*pair, strict=True)]
        for pair in zip(before, after, strict=True)
    ]
    state = [v.ref() for t in quantizers.values() for v in t.variables.values()]
    for weight, has_moved in zip(model.student.weights, moved[0], strict=True):
        learned = weight.trainable or "moving" in weight.name
        assert has_moved == learned, weight.name
        assert learned or weight.ref() in state or "optimizer_step" in weight.name
    assert [t.bits for t in quantizers.values()] == [2, 2]
    assert set(moved[1]) == {mode != "frozen"}


# --- without a teacher: Keras


def batches(weights=True, size=3):
    columns = (X, np.eye(4, dtype=np.float32)[Y], WEIGHTS)[: 3 if weights else 2]
    return tf.data.Dataset.from_tensor_slices(columns).batch(size)


def fitted(wrap, compiled, fit):
    """Weights, optimizer state and history after a `fit`."""
    network = student()
    model = wrap(network)
    model.compile(**compiled())
    history = model.fit(**{"epochs": 2, "verbose": 0, "shuffle": False} | fit())
    state = model.optimizer.variables
    state = nets.snapshot(state() if callable(state) else state)
    return values(network), state, history.history


def arrays(**options):
    return lambda: {"x": X, "y": Y, "batch_size": 3} | options


def eager(optimizer, *arguments, **options):
    return lambda: {
        "optimizer": optimizer(*arguments, **options),
        "loss": SPARSE(),
        "run_eagerly": True,
    }


def with_metrics():
    accuracy = keras.metrics.SparseCategoricalAccuracy
    return eager(Adam, 0.02)() | {
        "metrics": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)],
        "weighted_metrics": [accuracy(name="weighted_accuracy")],
    }


def in_graph():
    return {
        "optimizer": SGD(0.1, momentum=0.9, nesterov=True),
        "loss": "mse",
        "metrics": ["mae"],
        "steps_per_execution": 3,
    }


PLAIN = {
    "sample weights": (with_metrics, arrays(sample_weight=WEIGHTS)),
    "dataset, validation, graph": (
        in_graph,
        lambda: {"x": batches(), "validation_data": batches(weights=False)},
    ),
    "class weights, validation": (
        with_metrics,
        arrays(class_weight=CLASS_WEIGHT, validation_data=(X[:5], Y[:5], WEIGHTS[:5])),
    ),
    "clipnorm": (eager(SGD, 0.5, clipnorm=0.01), arrays()),
    "global_clipnorm": (eager(Adam, 0.05, global_clipnorm=0.01), arrays()),
    "clipvalue": (eager(SGD, 0.5, clipvalue=0.002), arrays()),
    "sum": (
        lambda: eager(SGD, 0.01)() | {"loss": SPARSE(reduction="sum")},
        arrays(sample_weight=WEIGHTS),
    ),
    "loss_weights": (lambda: eager(SGD, 0.1)() | {"loss_weights": 3.0}, arrays()),
    "legacy": (eager(keras.optimizers.legacy.SGD, 0.1), arrays()),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", PLAIN)
def test_without_a_teacher_it_is_keras_bit_for_bit(name):
    *expected, log = fitted(lambda network: network, *PLAIN[name])
    *found, other_log = fitted(tfl.LowBitTrainer, *PLAIN[name])
    assert_same(found[0], expected[0])
    nets.assert_all_equal(found[1], expected[1])
    assert not np.array_equal(found[0][0][0], student().get_weights()[0])
    assert list(other_log) == list(log)
    for key, value in log.items():
        np.testing.assert_allclose(other_log[key], value, rtol=1e-6, err_msg=key)


def two_outputs():
    model = net(5)
    x = model.get_layer("relu2").output
    side = layers.Dense(1, name="side")(x)
    return tfl.quantize(
        keras.Model(model.input, [model.output, side]), tfl.PrecisionRule(".*", 2, 2)
    )


@pytest.mark.parametrize("named", [True, False])
def test_a_student_with_two_outputs_trains_as_with_keras(named):
    def pair(head, side):
        return {"head": head, "side": side} if named else [head, side]

    found = []
    for wrap in (lambda network: network, tfl.LowBitTrainer):
        network = _again(two_outputs)
        model = wrap(network)
        model.compile(
            SGD(0.1),
            pair(SPARSE(), "mse"),
            pair(["accuracy"], ["mae"]),
            loss_weights=pair(1.0, 0.5),
            run_eagerly=True,
        )
        targets = pair(Y, X[:, :1])
        history = model.fit(X, targets, epochs=2, shuffle=False, verbose=0).history
        found.append((values(network), history))
    (weights, log), (expected, expected_log) = found[1], found[0]
    assert_same(weights, expected)
    assert list(log) == list(expected_log)
    for key, value in expected_log.items():
        np.testing.assert_allclose(log[key], value, rtol=1e-6, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("losses", [{}, {"hints": HINTS, "temperature": 2}])
def test_xla_trains_alike(losses):
    """Plain, and jointly with hints."""
    after = []
    for jit in (True, False):
        networks = [student("plain"), *([teacher()] if losses else [])]
        model = trainer(*networks, compiled={"jit_compile": jit}, **losses)
        history = model.fit(X, Y, epochs=3, verbose=0, shuffle=False).history
        after.append(([w for n in networks for w in n.get_weights()], history))
    (weights, log), (expected, expected_log) = after
    for actual, weight in zip(weights, expected, strict=True):
        np.testing.assert_allclose(actual, weight, rtol=1e-4, atol=1e-6)
    for key, value in expected_log.items():
        np.testing.assert_allclose(log[key], value, rtol=1e-4)


# --- logs, evaluation, prediction


def measured(**options):
    metrics = {
        "metrics": ["accuracy"],
        "weighted_metrics": [keras.metrics.SparseCategoricalAccuracy("weighted")],
    }
    students = {"a": student(), "b": student("other")}
    return trainer(students, teacher(), compiled=metrics | options, hints=HINTS)


def test_each_network_has_metrics_of_its_own():
    model = measured()
    networks = {"": model.student, "b_": model.students[1], "teacher_": model.teacher}
    hits = {}
    for prefix, network in networks.items():
        (logits,), _ = passed(network, [], True)
        hits[prefix] = logits.argmax(1) == Y
    student(), student("other"), teacher()  # The moving statistics as they were.
    # All different, so that none can stand for another.
    assert len({tuple(hit) for hit in hits.values()}) == 3
    found = model.train_on_batch(X, Y, sample_weight=WEIGHTS, return_dict=True)
    for prefix, hit in hits.items():
        np.testing.assert_allclose(found[f"{prefix}accuracy"], hit.mean(), rtol=1e-6)
        weighted = WEIGHTS @ hit / WEIGHTS.sum()
        np.testing.assert_allclose(found[f"{prefix}weighted"], weighted, rtol=1e-6)


@pytest.mark.slow
def test_logs_of_fit_and_evaluate():
    model = measured()
    log = model.fit(X, Y, epochs=2, validation_data=(X, Y), verbose=0).history
    parts = ["task_loss", "distillation_loss", "hint_loss"]
    own = ["loss", "accuracy", "weighted"]
    evaluated = [p + name for p in ("", "b_") for name in own]
    assert set(log) == {
        *(p + name for p in ("", "b_", "teacher_") for name in own + parts),
        *(f"val_{name}" for name in evaluated),
    }
    found = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert set(found) == set(evaluated)
    for name, value in found.items():
        np.testing.assert_allclose(value, log[f"val_{name}"][-1], rtol=1e-6)
    for prefix, network in (("", model.student), ("b_", model.students[1])):
        network.compile(loss=SPARSE(), metrics=["accuracy"], run_eagerly=True)
        alone = network.evaluate(X, Y, verbose=0, return_dict=True)
        for name, value in alone.items():
            np.testing.assert_allclose(found[prefix + name], value, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_evaluate_gives_a_list_in_the_order_of_metrics_names(count):
    students = {"a": student(), "b": student("other")}
    students = {k: students[k] for k in list(students)[:count]}
    model = trainer(students, teacher(), compiled={"metrics": ["accuracy"]})
    model.train_on_batch(X, Y)
    as_dict = model.evaluate(X, Y, verbose=0, return_dict=True)
    as_list = model.evaluate(X, Y, verbose=0)
    assert as_list == list(as_dict.values())
    # Keras's idiom.
    assert dict(zip(model.metrics_names, as_list, strict=False)) == as_dict


def test_predictions_are_the_first_students():
    model = measured()
    model.train_on_batch(X, Y)
    expected = model.student.predict(X, verbose=0)
    np.testing.assert_array_equal(model.predict(X, verbose=0), expected)
    np.testing.assert_array_equal(model(X), model.student(X))
    assert not np.array_equal(expected, model.students[1].predict(X, verbose=0))


def test_means_of_an_epoch_weigh_batches_by_their_examples():
    # Nothing moves, and without BN an example does not depend on its batch.
    model = trainer(
        student("plain"),
        _again(functools.partial(net, norm=False), 6),
        compiled={"optimizer": SGD(0.0), "teacher_optimizer": SGD(0.0)},
        hints=HINTS,
    )
    whole = model.train_on_batch(X, Y, return_dict=True)
    model.reset_metrics()
    log = model.fit(X, Y, batch_size=5, shuffle=False, verbose=0).history
    for name, value in whole.items():
        np.testing.assert_allclose(log[name], [value], rtol=1e-5, err_msg=name)


def test_nan_in_the_data_shows_in_every_loss():
    model = trainer(hints=HINTS, teacher="frozen")
    spoilt = X.copy()
    spoilt[3, 1] = np.nan
    log = model.fit(spoilt, Y, verbose=0).history
    assert set(log) == {
        "loss",
        "task_loss",
        "distillation_loss",
        "hint_loss",
        "teacher_loss",
    }
    assert all(np.isnan(value[0]) for value in log.values()), log


# --- callbacks, checkpoints, files


class Recorder(keras.callbacks.Callback):
    """Bits and step counts at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.bits, self.iterations = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.bits.append([t.bits for t in tfl.inspection.quantized_tensors(self.model)])
        optimizers = self.model.optimizer, self.model.teacher_optimizer
        self.iterations.append([int(o.iterations) for o in optimizers])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::tf_lowbit.QuantizationWarning")
def test_stages_reset_the_students_optimizer_and_not_the_teachers():
    students = {"a": student("plain"), "b": student("other")}
    model, seen = trainer(students, teacher()), Recorder()
    staged = StagedPrecision(tfl.two_stage(2, (2, 1), learning_rate=(0.2, 0.02)))
    model.fit(X, Y, batch_size=4, epochs=3, verbose=0, callbacks=[staged, seen])
    # In the layers' order: relu1, mid, of each student; "b" is meant for 4 bits.
    assert seen.bits == [[32, 2, 32, 4], [32, 2, 32, 4], [2, 2, 4, 4]]
    assert seen.iterations == [[2, 2], [4, 4], [2, 6]]
    np.testing.assert_allclose(model.optimizer.learning_rate, 0.02)
    np.testing.assert_allclose(model.teacher_optimizer.learning_rate, 0.1)
    assert int(model.progress.step) == 6


def test_a_reset_reaches_all_students_and_no_teacher():
    students = {"a": student("plain"), "b": student("other")}
    model = trainer(students, teacher())
    model.train_on_batch(X, Y)
    kept = nets.snapshot(model.teacher_optimizer.variables)
    slots = [v for v in model.optimizer.variables if v.shape.rank == 2]
    assert len(slots) == 6
    assert all(np.abs(slot).max() > 0 for slot in slots)
    reset_optimizer(model)
    fresh = SGD(0.1, momentum=0.9)
    fresh.build([v for n in model.students for v in n.trainable_variables])
    nets.assert_all_equal(
        nets.snapshot(model.optimizer.variables), nets.snapshot(fresh.variables)
    )
    nets.assert_all_equal(nets.snapshot(model.teacher_optimizer.variables), kept)


@pytest.mark.slow
def test_neither_stages_nor_a_second_fit_trace_anew():
    traces = []

    def loss(y, p):
        traces.append(1)
        return keras.losses.sparse_categorical_crossentropy(y, p, from_logits=True)

    networks = student("plain"), teacher()
    model = trainer(*networks, eager=False, compiled={"loss": loss}, hints=HINTS)

    def fit(stages):
        epochs = sum(stage.epochs for stage in stages)
        staged = StagedPrecision(stages)
        model.fit(X, Y, batch_size=4, epochs=epochs, verbose=0, callbacks=[staged])
        return len(traces)

    first = fit([tfl.Stage(1, 32, 32)])
    assert first > 0
    assert fit(tfl.two_stage_progressive(2, 1, (8, 2))) == first


@pytest.mark.slow
def test_kerass_callbacks_work(tmp_path):
    model = trainer(compiled={"metrics": ["accuracy"]})
    kinds = keras.callbacks
    log = model.fit(
        X,
        Y,
        epochs=3,
        verbose=0,
        validation_data=(X, Y),
        callbacks=[
            kinds.TensorBoard(tmp_path / "board", histogram_freq=1),
            kinds.CSVLogger(tmp_path / "log.csv"),
            kinds.EarlyStopping("val_loss", min_delta=100, patience=1),
            kinds.ModelCheckpoint(tmp_path / "{epoch}.h5", save_weights_only=True),
            kinds.ReduceLROnPlateau("val_loss", factor=0.5, min_delta=100, patience=1),
        ],
    ).history
    assert len(log["loss"]) == 2
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"epoch", *log} - {"lr"}
    np.testing.assert_allclose(float(rows[1]["teacher_loss"]), log["teacher_loss"][1])
    assert list((tmp_path / "board").rglob("*tfevents*"))
    np.testing.assert_allclose(model.optimizer.learning_rate, 0.05)
    expected = values(model.student, model.teacher)
    student(), teacher()
    model.load_weights(tmp_path / "2.h5")
    assert_same(values(model.student, model.teacher), expected)


def test_a_callback_list_is_taken_as_with_keras():
    def callback_list(model):
        return keras.callbacks.CallbackList(
            [Recorder()], add_history=True, model=model, epochs=1, steps=1, verbose=0
        )

    model = trainer()
    assert "loss" in model.fit(X, Y, verbose=0, callbacks=callback_list(model)).history


def complete(model):
    """All that a checkpoint of a trainer must bring back."""
    state = [*model.optimizer.variables, *model.teacher_optimizer.variables]
    state += [model.progress.step, model.progress.total_steps]
    return [*values(model.student, model.teacher), nets.snapshot(state)]


def fresh_trainer(seed):
    """Of networks that no other test uses, with weights by the seed."""
    networks = fresh_student("learned"), net(3)
    for network in networks:
        nets.randomize(network, seed)
    return trainer(*networks, compiled={"optimizer": Adam(0.01)}, hints=HINTS)


@pytest.mark.slow
def test_a_checkpoint_brings_all_back_and_training_goes_on(tmp_path):
    def fit(model, initial_epoch, epochs):
        model.fit(
            X[initial_epoch:],
            Y[initial_epoch:],
            initial_epoch=initial_epoch,
            epochs=epochs,
            batch_size=4,
            shuffle=False,
            verbose=0,
        )

    model = fresh_trainer(1)
    nets.by_name(model.student)["mid/kernel"].assign_bits(3)
    fit(model, 0, 1)
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    model.save_weights(tmp_path / "net.weights.h5")
    other = fresh_trainer(2)
    tf.train.Checkpoint(model=other).read(path).assert_existing_objects_matched()
    assert_same(complete(other), complete(model))
    assert int(other.progress.step) == 2
    for each in (model, other):
        fit(each, 1, 2)
    assert_same(complete(other), complete(model))
    assert int(other.progress.step) == 4
    # The file of weights, into networks that have trained on.
    other.load_weights(tmp_path / "net.weights.h5")
    stopped = fresh_trainer(3)
    tf.train.Checkpoint(model=stopped).read(path).assert_existing_objects_matched()
    networks = [[m.student, m.teacher] for m in (other, stopped)]
    assert_same(values(*networks[0]), values(*networks[1]))


def compiled_like(model):
    """What a trainer was compiled with, but for networks."""
    optimizers = [model.optimizer, model.teacher_optimizer]
    return [o and o.get_config() for o in optimizers] + [model.get_compile_config()]


def test_a_keras_file_brings_a_trainer_back_and_training_goes_on(tmp_path):
    model = fresh_trainer(1)
    nets.by_name(model.student)["mid/kernel"].assign_bits(3)
    model.fit(X, Y, epochs=1, batch_size=4, shuffle=False, verbose=0)
    model.save(tmp_path / "trainer.keras")
    again = tfl.load_model(tmp_path / "trainer.keras")
    assert isinstance(again, tfl.LowBitTrainer)
    assert again.name == model.name
    assert again._distiller.settings == model._distiller.settings
    assert again._distiller.hints[0][0].student == model._distiller.hints[0][0].student
    assert compiled_like(again) == compiled_like(model)
    assert_same(complete(again), complete(model))
    assert int(again.progress.step) == 2
    for each in (model, again):
        each.fit(
            X, Y, initial_epoch=1, epochs=2, batch_size=4, shuffle=False, verbose=0
        )
    assert_same(complete(again), complete(model))
    assert int(again.progress.step) == 4


def falling(progress):
    return 1.0 - progress


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule", [None, keras.saving.register_keras_serializable("tests")(falling)]
)
def test_a_keras_file_has_several_students_and_stochastic_precision(schedule, tmp_path):
    precision = tfl.StochasticPrecision(
        None if schedule else 0.3, schedule=schedule, unit=["mid"], seed=7
    )
    students = {"low": fresh_student("dorefa"), "four": fresh_student("learned")}
    model = tfl.LowBitTrainer(students, stochastic_precision=precision, name="both")
    model.compile(SGD(0.1), SPARSE(), metrics=["accuracy"], run_eagerly=True)
    model.fit(X, Y, epochs=1, batch_size=4, verbose=0)
    model.save(tmp_path / "trainer.keras")
    again = tfl.load_model(tmp_path / "trainer.keras")
    assert again.get_config()["stochastic_precision"]["config"] == (
        precision.get_config()
    )
    assert again.teacher is None
    assert_same(values(*again.students), values(*model.students))
    logs = [
        each.fit(X, Y, epochs=1, batch_size=4, shuffle=False, verbose=0).history
        for each in (model, again)
    ]
    assert logs[0] == logs[1]
    assert "four_accuracy" in logs[0]


@pytest.mark.slow
def test_a_trainer_that_was_not_compiled_comes_back(tmp_path):
    losses = tfl.JointDistillation(teacher="frozen", hints=[("relu2", "relu2")])
    model = tfl.LowBitTrainer(fresh_student("learned"), net(3), distillation=losses)
    model.save(tmp_path / "trainer.keras")
    again = tfl.load_model(tmp_path / "trainer.keras")
    assert again._distiller.settings == losses
    assert again.optimizer is None
    assert_same(
        values(again.student, again.teacher), values(model.student, model.teacher)
    )


@pytest.mark.parametrize("name", ["trainer.h5", "trainer"])
def test_a_trainer_is_saved_to_no_other_file(name, tmp_path):
    model = trainer()
    with pytest.raises(ValueError, match=rf"trainer\.student.*Received: .*{name}'"):
        model.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_student_is_saved_by_itself(tmp_path):
    model = trainer(hints=HINTS)
    model.train_on_batch(X, Y)
    model.student.save(tmp_path / "student.h5")
    again = tfl.load_model(tmp_path / "student.h5")
    np.testing.assert_array_equal(again(X), model.predict(X, verbose=0))


# --- 16-bit arithmetic


@pytest.fixture
def policy(request):
    keras.mixed_precision.set_global_policy(request.param)
    yield request.param
    keras.mixed_precision.set_global_policy("float32")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"], indirect=True)
def test_sixteen_bit_training(policy):
    low_bit = tfl.quantize(net(4), tfl.PrecisionRule(".*", 2, 2))
    model = tfl.LowBitTrainer(
        low_bit, net(3), distillation=tfl.JointDistillation(hints=HINTS)
    )
    optimizers = SGD(0.2, momentum=0.9), SGD(0.2)
    model.compile(
        optimizers[0], SPARSE(), teacher_optimizer=optimizers[1], run_eagerly=True
    )
    scaled = [model.optimizer, model.teacher_optimizer]
    kind = keras.mixed_precision.LossScaleOptimizer
    is_float16 = policy == "mixed_float16"
    assert [isinstance(o, kind) for o in scaled] == [is_float16] * 2
    before = values(model.student, model.teacher)
    log = model.fit(X, Y, epochs=8, verbose=0).history
    for name in ("loss", "teacher_loss"):
        assert np.isfinite(log[name]).all()
        assert log[name][-1] < log[name][0]
    for old, network in zip(before, (model.student, model.teacher), strict=True):
        assert not np.array_equal(old[0], network.get_weights()[0])
    used = nets.used_weights(low_bit, X)["mid/kernel"]
    dtype = tf.as_dtype(policy.removeprefix("mixed_"))
    grid = tf.cast(np.float32([-3, -1, 1, 3]) / np.float32(3), dtype)
    assert used.dtype == dtype
    assert set(np.unique(used.astype("f"))) <= set(tf.cast(grid, tf.float32).numpy())


@pytest.mark.quick(1)
@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
@pytest.mark.parametrize("overflowing", ["student", "teacher"])
def test_an_overflow_of_one_network_does_not_stop_the_other(policy, overflowing):
    scale = keras.mixed_precision.LossScaleOptimizer
    networks = tfl.quantize(net(4), tfl.PrecisionRule(".*", 2, 2)), net(3)
    start = values(*networks)
    model = tfl.LowBitTrainer(*networks)

    def step(scales):
        for network, weights in zip(networks, start, strict=True):
            network.set_weights(weights)
        optimizers = [scale(SGD(0.1), initial_scale=s) for s in scales]
        model.compile(
            optimizers[0], SPARSE(), teacher_optimizer=optimizers[1], run_eagerly=True
        )
        model.train_on_batch(X, Y)
        trained = [nets.snapshot(n.trainable_variables) for n in networks]
        return trained, [float(o.loss_scale) for o in optimizers]

    lost = ["student", "teacher"].index(overflowing)
    scales = [2.0**10, 2.0**10]
    expected, kept = step(scales)
    assert kept == scales
    scales[lost] = 2.0**100
    found, reached = step(scales)
    nets.assert_all_equal(found[1 - lost], expected[1 - lost])
    for network, weights in zip(networks, start, strict=True):
        network.set_weights(weights)
    nets.assert_all_equal(
        found[lost], nets.snapshot(networks[lost].trainable_variables)
    )
    assert reached[1 - lost] == 2.0**10
    assert reached[lost] == 2.0**99


# --- the library's other functions on a trainer


def test_calibration_sets_the_students_ranges():
    students = {"a": student(), "b": student("other")}
    model = tfl.LowBitTrainer(students, teacher())
    before = values(model.teacher)
    assert tfl.calibrate(model, [X]) == ["relu1/output"] * 2
    found = values(*model.students)
    for tensor in tfl.inspection.quantized_tensors(model):
        assert tensor.is_calibrated
    assert_same(values(model.teacher), before)
    for index, kind in enumerate(["learned", "other"]):
        alone = student(kind)
        tfl.calibrate(alone, [X])
        assert_same(values(alone), found[index : index + 1])


def test_calibration_of_two_students_from_data_that_can_be_read_once():
    students = {"a": student(), "b": student("other")}
    model = tfl.LowBitTrainer(students, teacher())
    assert len(tfl.calibrate(model, (batch for batch in [X, X]))) == 2


@pytest.mark.slow
def test_a_residual_network_with_everything():
    """Teacher, hints, draws and stages; residual quantizers stay tied and at 8 bits."""
    teacher = nets.randomize(nets.preactivation(), 1)
    rule = tfl.PrecisionRule(".*", 2, 2, weight_quantizer="lsq")
    low_bit = tfl.quantize(nets.randomize(nets.preactivation()), rule, residual_bits=8)
    model = tfl.LowBitTrainer(
        low_bit,
        teacher,
        distillation=tfl.JointDistillation(hints="stages"),
        stochastic_precision=tfl.StochasticPrecision(start=0.5, unit="block"),
    )
    images, labels = nets.images(8), nets.labels(8)
    tfl.calibrate(model, [images])
    residual = [t for t in tfl.inspection.quantized_tensors(model) if t.is_residual]
    steps = [float(t.variables["step"]) for t in residual]
    model.compile(SGD(0.05), SPARSE(), teacher_optimizer=SGD(0.05))
    staged, seen = StagedPrecision(tfl.progressive(2, 1, (32, 4, 2))), Recorder()
    log = model.fit(
        images, labels, batch_size=4, epochs=3, verbose=0, callbacks=[staged, seen]
    ).history
    assert all(np.isfinite(value).all() for value in log.values())
    names = [t.name for t in tfl.inspection.quantized_tensors(model)]
    for epoch, bits in enumerate([32, 8, 8]):
        at = dict(zip(names, seen.bits[epoch], strict=True))
        assert {at[t.name] for t in residual} == {bits}
    assert log["activation_bits"] == [32, 4, 2]
    assert [float(t.variables["step"]) for t in residual] == steps
    assert len(tfl.cost(model).layers) > len(residual)
    assert "three_add_residual" in str(tfl.summary(low_bit))


# --- what is refused


def softmax_layer():
    model = net(3)
    return keras.Model(model.input, layers.Softmax()(model.output))


def subclassed():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = layers.Dense(nets.CLASSES)

        def call(self, inputs):
            return self.head(inputs)

    model = Own()
    model(X)
    return model


def sharing():
    """A teacher that holds a layer of the student."""
    x = student().get_layer("in")(keras.Input((5,)))
    return keras.Model(x.node.keras_inputs, layers.Dense(nets.CLASSES)(x))


TEACHERS = {
    "other outputs": (lambda: net(3, outputs=5), r"\(None, 5\).*\(None, 4\)"),
    "other inputs": (lambda: net(3, inputs=6), r"\(None, 6\).*\(None, 5\)"),
    "two outputs": (two_outputs, "must have one output, of logits.*Received"),
    "softmax": (
        lambda: net(3, head="softmax"),
        "must output logits.*Received.*'head'",
    ),
    "tf.nn.softmax": (lambda: net(3, head=tf.nn.softmax), "logits.*Received.*'head'"),
    "softmax layer": (softmax_layer, "must output logits.*Received.*'softmax'"),
    "a shared layer": (sharing, "must not share variables.*Received"),
    "the student": (student, "must not share variables.*Received"),
    "no model": (lambda: "resnet", "must be a built Sequential.*Received: str"),
    "a layer": (lambda: layers.Dense(4), "must be a built Seq.*Received: Dense"),
    "subclassed": (subclassed, "Received"),
    "not built": (lambda: keras.Sequential([layers.Dense(4)]), "Received"),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_an_unfit_teacher_is_refused(name):
    make, message = TEACHERS[name]
    with pytest.raises(ValueError, match=message):
        tfl.LowBitTrainer(student(), make())


STUDENTS = {
    "a float one": (teacher, "tf_lowbit.quantize made. Received: 'net3'"),
    "one float": (lambda: {"a": student(), "b": teacher()}, "Received: 'net3'"),
    "no model": (lambda: "resnet", "must be a tf_keras Model. Received: str"),
    "one twice": (lambda: {"a": student(), "b": student()}, "not share variables"),
    "none": (dict, "Received"),
    # Their logs would have the names of the teacher's, and of the first one's parts.
    "called teacher": (lambda: two("teacher"), "Received.*teacher"),
    "called task": (lambda: two("task"), "Received.*task"),
    "two outputs": (two_outputs, "must have one output, of logits.*Received"),
    "softmax": (lambda: tfl.quantize(net(4, head="softmax")), "student.*logits"),
}


def two(name):
    return {"a": student(), name: student("other")}


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", STUDENTS)
def test_an_unfit_student_is_refused(name):
    make, message = STUDENTS[name]
    with pytest.raises(ValueError, match=message):
        tfl.LowBitTrainer(make(), net(6))


def test_losses_of_distillation_need_a_teacher():
    with pytest.raises(ValueError, match=r"needs a teacher\. Received"):
        tfl.LowBitTrainer(student(), distillation=tfl.JointDistillation())


def test_the_teachers_optimizer_is_asked_for():
    model = tfl.LowBitTrainer(student(), teacher())
    with pytest.raises(ValueError, match=r"teacher_optimizer.*Received: None"):
        model.compile(SGD(0.1), SPARSE())
    optimizer = SGD(0.1)
    with pytest.raises(ValueError, match=r"another object.*Received"):
        model.compile(optimizer, SPARSE(), teacher_optimizer=optimizer)


def test_two_optimizers_of_one_name_are_two_objects():
    model = tfl.LowBitTrainer(student(), teacher())
    model.compile("sgd", SPARSE(), teacher_optimizer="sgd", run_eagerly=True)
    model.train_on_batch(X, Y)
    assert model.optimizer is not model.teacher_optimizer
    assert int(model.optimizer.iterations) == int(model.teacher_optimizer.iterations)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_teachers_optimizer_without_use_is_refused(frozen):
    networks = [student(), teacher()][: 1 + frozen]
    losses = tfl.JointDistillation(teacher="frozen") if frozen else None
    model = tfl.LowBitTrainer(*networks, distillation=losses)
    with pytest.raises(ValueError, match=r"where no teacher is trained\. Received"):
        model.compile(SGD(0.1), SPARSE(), teacher_optimizer=Adam())


@pytest.mark.parametrize(
    ("compiled", "data"), [({"loss": None}, (X, Y)), ({}, (X,))], ids=["loss", "target"]
)
def test_a_loss_and_targets_are_asked_for(compiled, data):
    message = r"given a loss, and the data must have targets\. Received"
    model = trainer(compiled=compiled)
    with pytest.raises(ValueError, match=message):
        model.fit(*data, verbose=0)
    with pytest.raises(ValueError, match=message):
        model.evaluate(*data, verbose=0)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("which", ["optimizer", "teacher_optimizer"])
def test_averaged_weights_are_refused_beside_a_teacher(which, policy):
    averaging = SGD(RATE, use_ema=True)
    if policy == "mixed_float16":
        averaging = keras.mixed_precision.LossScaleOptimizer(averaging)
    model = tfl.LowBitTrainer(student(), teacher())
    optimizers = {"optimizer": SGD(RATE), "teacher_optimizer": SGD(RATE)}
    with pytest.raises(ValueError, match=r"must not average weights.*Received"):
        model.compile(loss=SPARSE(), **optimizers | {which: averaging})


@pytest.mark.slow
def test_averaged_weights_are_put_in_place_without_a_teacher():
    found = []
    for wrap in (lambda network: network, tfl.LowBitTrainer):
        network = student()
        model = wrap(network)
        model.compile(SGD(RATE, use_ema=True, ema_momentum=0.5), SPARSE())
        model.fit(X, Y, epochs=2, shuffle=False, verbose=0)
        found.append(nets.snapshot(network.variables))
    nets.assert_all_equal(*found)


@pytest.mark.slow
def test_a_name_that_begins_a_metric_is_no_clash():
    model = tfl.LowBitTrainer({"a": student(), "sparse": student("other")}, teacher())
    metric = "sparse_categorical_accuracy"
    model.compile(SGD(0.0), SPARSE(), [metric], teacher_optimizer=SGD(0.0))
    log = model.evaluate(X, Y, return_dict=True, verbose=0)
    for name, network in zip(("", "sparse_"), model.students, strict=True):
        hits = network(X).numpy().argmax(1) == Y
        assert log[f"{name}{metric}"] == pytest.approx(hits.mean())
    history = model.fit(X, Y, verbose=0).history
    names = {f"{start}{metric}" for start in ("", "sparse_", "teacher_")}
    assert names <= set(history)


def test_augmentation_within_the_networks_is_warned_of():
    def network(layer):
        image = keras.Input((6, 6, 1))
        x = layers.Conv2D(2, 3, name="conv")(layer(image))
        x = layers.Flatten()(layers.ReLU(name="relu")(x))
        x = layers.ReLU(name="last")(layers.Dense(3, name="dense")(x))
        return keras.Model(image, layers.Dense(3, name="head")(x))

    low_bit = tfl.quantize(network(layers.Dropout(0.5)), tfl.PrecisionRule(".*", 2, 2))
    flipping = network(layers.RandomFlip(name="flip"))
    with pytest.warns(
        UserWarning, match=r"augment the data instead\. Received: \['flip'\]"
    ):
        tfl.LowBitTrainer(low_bit, flipping)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tfl.LowBitTrainer(low_bit, network(layers.Dropout(0.5)))


@pytest.mark.parametrize("name", ["w.h5", "w.hdf5", "w.keras"])
def test_weights_are_saved_to_no_older_file(name, tmp_path):
    low_bit = student()
    model = tfl.LowBitTrainer(low_bit, keras.models.clone_model(teacher()))
    model.teacher._name = low_bit.name  # As of a clone.
    with pytest.raises(ValueError, match=rf"\.weights\.h5 file\. Rec.*{name}' of"):
        model.save_weights(str(tmp_path / name))
    assert not list(tmp_path.iterdir())
    model.save_weights(tmp_path / "w.weights.h5")
    assert (tmp_path / "w.weights.h5").exists()


def test_a_loss_that_is_not_reduced_is_refused():
    trainer = tfl.LowBitTrainer(student())
    trainer.compile("sgd", SPARSE(reduction="none"))
    with pytest.raises(ValueError, match=r"one number.*\n?.*a loss of shape"):
        trainer.fit(X, Y, verbose=0)


def test_stages_refuse_a_trainer_with_a_legacy_optimizer():
    legacy = keras.optimizers.legacy.SGD
    model = trainer(
        compiled={"optimizer": legacy(0.1), "teacher_optimizer": legacy(0.1)}
    )
    with pytest.raises(ValueError, match="legacy one"):
        model.fit(X, Y, verbose=0, callbacks=[StagedPrecision([tfl.Stage(1)])])


class Odd(keras.metrics.Metric):
    """One whose configuration does not make it again."""

    def __init__(self):
        super().__init__(name="odd")
        self.total = self.add_weight("total", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(1.0)

    def result(self):
        return self.total


def test_a_metric_that_cannot_be_copied_is_named():
    model = tfl.LowBitTrainer(student(), teacher())
    with pytest.raises(ValueError, match=r"must have a get_config.*Received: Odd"):
        model.compile("sgd", "mse", metrics=[Odd()], teacher_optimizer="sgd")
