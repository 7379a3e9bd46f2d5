"""What is made of counted predictions."""

import numpy as np
import pytest

from tf_lowbit.compat import keras
from tf_lowbit.export.proof import outputs
from tf_lowbit.export.proof.verification import Report


def failures(equal, count, wanted=0.75):
    """Of a file whose classes are the trained network's `equal` times of `count`."""
    classes = outputs.Classes(0.5)
    file = np.zeros((count, 2))
    file[:, 0] = 1.0
    trained = file.copy()
    trained[equal:] = 0.0, 1.0
    classes.add({"file": file, "twin": file, "trained": trained}, None)
    report = Report("a file", "a runtime", agreement=wanted)
    classes.judge(report, is_tainted=False)
    return report.failures


@pytest.mark.parametrize(
    ("equal", "count", "is_enough"),
    [
        # Of 0.75 each: none of 3 in 1.6 % of all cases, none of 4 in 0.4 %.
        (0, 3, True),
        (0, 4, False),
        # By Chernoff's bound: exp(-100 (0.65 ln(0.65 / 0.75) + 0.35 ln(0.35 / 0.25))).
        (65, 100, True),
        (61, 100, False),
        (75, 100, True),
        (740, 1000, True),
        (700, 1000, False),
        (7000, 10_000, False),
    ],
)
def test_few_examples_prove_little(equal, count, is_enough):
    assert (failures(equal, count) == []) is is_enough


@pytest.mark.parametrize(("equal", "is_enough"), [(2, True), (1, False), (0, False)])
def test_all_of_them_are_wanted(equal, is_enough):
    assert (failures(equal, 2, wanted=1.0) == []) is is_enough


def test_nothing_is_wanted():
    assert failures(0, 1000, wanted=0.0) == []


@pytest.mark.parametrize(
    ("file", "twin", "is_tie"),
    [
        # Tied to 1e-4 of the largest score: an untrained float head puts out such.
        ([[1.0, 1.00001]], [[1.00001, 1.0]], True),
        ([[1.0, 1.001]], [[1.001, 1.0]], False),
        # One step of an int8 output is more.
        ([[126 / 127, 1.0]], [[1.0, 126 / 127]], False),
        ([[0.500001]], [[0.499999]], True),
        ([[0.51]], [[0.49]], False),
        # A map: the second position differs.
        ([[[2.0, 1.0], [1.0, 2.0]]], [[[2.0, 1.0], [2.0, 1.0]]], False),
        ([[[2.0, 1.0], [1.0, 1.00001]]], [[[2.0, 1.0], [1.0, 1.0]]], True),
    ],
)
def test_a_tie_of_floats_is_no_other_prediction(file, twin, is_tie):
    classes = outputs.Classes(0.5)
    classes.add({"file": np.array(file), "twin": np.array(twin)}, None)
    report = Report("a file", "a runtime")
    classes.judge(report, is_tainted=False)
    assert (report.failures == []) is is_tie


def judged(units, batches):
    """The report on batches of labels, of which the network says that they are 0."""
    network = keras.Sequential([keras.layers.Dense(units, input_shape=(2,))])
    first = outputs.FirstOutput(network, "int8")
    for labels in batches:
        scores = np.zeros((len(labels), units))
        first.add({"file": scores, "twin": scores, "trained": scores}, labels)
    report = Report("a file", "a runtime")
    first.judge(report, is_tainted=False)
    return report


CLASSES = np.array([[0.0], [1.0]])
ONE_HOT = np.eye(2)


@pytest.mark.parametrize(
    ("units", "batches", "error"),
    [
        (1, [CLASSES, np.array([[0.0], [3.5]])], 1.125),
        (1, [np.array([[0.0], [3.5]]), CLASSES], 1.125),
        (2, [ONE_HOT, np.array([[1.0, 1.0], [0.0, 0.0]])], 0.5),
        (2, [np.array([[1.0, 1.0], [0.0, 0.0]]), ONE_HOT], 0.5),
    ],
)
def test_numbers_of_which_a_batch_looks_like_classes(units, batches, error):
    report = judged(units, batches)
    assert report.predictions is None
    errors = report.values.to_labels["file"]
    assert errors.count == units * 4
    assert errors.mean == error


@pytest.mark.parametrize(
    ("units", "batches"),
    [
        (1, [CLASSES, CLASSES]),
        (2, [ONE_HOT, ONE_HOT]),
        (2, [np.array([0, 1]), np.array([1, 0])]),
    ],
)
def test_all_labels_are_classes(units, batches):
    report = judged(units, batches)
    assert report.values is None
    assert report.predictions.labels == 4
    assert report.predictions.right["file"] == 2
