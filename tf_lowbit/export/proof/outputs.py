"""Comparison of a file's outputs with its twin, the trained network and labels."""

import math
from typing import Any

import numpy as np

from tf_lowbit.compat import keras
from tf_lowbit.export.proof.verification import (
    SIGMAS,
    Errors,
    Predictions,
    Report,
    Values,
)
from tf_lowbit.network import predictions as classifying

# Relative difference that the order of float32 sums may make.
_ROUNDINGS = 1e-4
# Significance level of "the agreement is too small".
_CHANCE = 0.01


class FirstOutput:
    """Measures a network's first output: predicted classes, or errors of numbers.

    It holds classes if all labels are some. Without labels, the network tells it.

    Args:
        network: The trained network, or the twin.
        head: As in `Numbers`.
    """

    def __init__(self, network: keras.Model, head: str | None):
        self._network = network
        self._classes = Classes(classifying.threshold(network))
        self._numbers = Numbers(head=head)
        self._are_classes: bool | None = None

    def add(self, scores: dict, labels: Any) -> None:
        """Adds one batch.

        Args:
            scores: "file", "twin" and perhaps "trained" -> [batch, ..., classes].
            labels: Labels of the batch as given, or None.
        """
        classes = None
        if labels is not None:
            classes = classifying.labels(labels, scores["file"], [""])
            self._are_classes = self._are_classes is not False and classes is not None
        self._classes.add(scores, classes)
        # A class number says nothing about each of several units.
        is_class = classes is not None and np.size(labels) != scores["file"].size
        self._numbers.add(scores, None if is_class else labels)

    def judge(self, report: Report, is_tainted: bool) -> None:
        """Adds the counts or the errors, and the failures, as `Classes.judge`."""
        are_classes = self._are_classes
        if are_classes is None:
            are_classes = classifying.are_classes(self._network)
        chosen = self._classes if are_classes else self._numbers
        chosen.judge(report, is_tainted)


class Classes:
    """Counts predicted classes.

    Args:
        limit: Threshold of class 1 for one unit, from `predictions.threshold`.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._found = Predictions()
        self._confusion: dict[str, np.ndarray] = {}

    def add(self, scores: dict, labels: np.ndarray | None) -> None:
        """Adds one batch.

        Args:
            scores: "file", "twin" and perhaps "trained" -> [batch, ..., classes].
            labels: Labels of the batch from `predictions.labels`, or None.
        """
        found = self._found
        chosen = {n: classifying.classes(s, self._limit) for n, s in scores.items()}
        found.examples += len(chosen["file"])
        same = chosen["file"] == chosen["twin"]
        same |= self._are_tied(chosen["file"], scores["twin"])
        found.twin_agrees += int(same.sum())
        if "trained" in chosen:
            agrees = int((chosen["file"] == chosen["trained"]).sum())
            found.trained_agrees = (found.trained_agrees or 0) + agrees
        if labels is None:
            return
        right = {name: classes == labels for name, classes in chosen.items()}
        found.labels += len(labels)
        for name, hits in right.items():
            found.right[name] = found.right.get(name, 0) + int(hits.sum())
        if "trained" in right:
            found.lost += int((right["trained"] & ~right["file"]).sum())
            found.gained += int((right["file"] & ~right["trained"]).sum())
        if scores["file"].ndim > 2:
            self._add_map(chosen, labels, max(scores["file"].shape[-1], 2))

    def _are_tied(self, file: np.ndarray, twin: np.ndarray) -> np.ndarray:
        """Whether the twin scores the file's class as its own, to float32's rounding.

        A float head sums in another order than the twin. Steps of an int8 head are far
        larger than this rounding.
        """
        twin = classifying.in_units(twin)
        if twin.shape[-1] == 1:
            behind = np.abs(twin - self._limit)
        else:
            own = np.take_along_axis(twin, file.reshape(*twin.shape[:-1], 1), axis=-1)
            behind = twin.max(axis=-1, keepdims=True) - own
        return (behind <= _ROUNDINGS * np.abs(twin).max(initial=0.0)).ravel()

    def _add_map(self, chosen, labels, count) -> None:
        known = (labels >= 0) & (labels < count)
        for name, classes in chosen.items():
            pairs = labels[known] * count + classes[known]
            table = np.bincount(pairs, minlength=count * count).reshape(count, count)
            self._confusion[name] = self._confusion.get(name, 0) + table

    def judge(self, report: Report, is_tainted: bool) -> None:
        """Adds the counts and the failures to the report.

        Args:
            report: Its predictions and failures are set.
            is_tainted: Whether an integer layer follows a float layer, so that
                predictions may differ from the twin's.
        """
        found = report.predictions = self._found
        for name, table in self._confusion.items():
            both = np.diag(table)
            either = table.sum(axis=0) + table.sum(axis=1) - both
            found.mean_iou[name] = float((both[either > 0] / either[either > 0]).mean())
        if found.twin_agrees != found.examples and not is_tainted:
            report.failures.append(
                f"{found.examples - found.twin_agrees} of {found.examples} predictions "
                "are not the twin's"
            )
        if found.drop is not None:
            if found.certain_drop > report.tolerance:
                report.failures.append(
                    f"the accuracy is {100 * found.drop:.2f} points below the trained "
                    f"network's, allowed {100 * report.tolerance:g} plus chance"
                )
        elif found.trained_agrees is not None:
            share = found.trained_agrees / found.examples
            wanted = report.agreement
            if _is_certainly_less(share, wanted, found.examples):
                report.failures.append(
                    f"{share:.1%} of the predictions are the trained network's, wanted "
                    f"{wanted:.0%} minus chance"
                )


class Numbers:
    """Measures the errors of an output that is not a score of classes.

    Args:
        output: Name of the output; None for the network's first one.
        head: "int8" or "float", of the export's options.
    """

    def __init__(self, output: str | None = None, head: str | None = "int8"):
        self._output = output
        self._head = head
        self._found = Values()
        # By unit: count, sum and sum of squares of the reference; sum of the errors.
        self._sums = np.zeros((4, 1))
        # Additional error by labelled example: count, sum, sum of squares.
        self._more = np.zeros(3)

    def add(self, scores: dict, labels: Any) -> None:
        """Adds one batch, as `FirstOutput.add`."""
        found, file = self._found, scores["file"].astype(np.float64)
        found.examples += len(file)
        reference = scores.get("trained", scores["twin"]).astype(np.float64)
        units = reference.reshape(-1, reference.shape[-1])
        errors = np.abs(file.reshape(units.shape) - units)
        parts = np.ones_like(units), units, units**2, errors
        self._sums = self._sums + np.stack([part.sum(axis=0) for part in parts])
        for name, values in scores.items():
            if name != "file":
                against = found.against.setdefault(name, Errors())
                _add_errors(against, np.abs(file - values))
        if labels is None:
            return
        labels = np.asarray(labels, np.float64)
        if labels.size != file.size:
            raise ValueError(
                "Labels must have one number for each output. "
                f"Received: labels of shape {labels.shape}, outputs of shape "
                f"{file.shape}"
            )
        labels = labels.reshape(file.shape)
        each = {}
        for name, values in scores.items():
            difference = np.abs(values - labels)
            _add_errors(found.to_labels.setdefault(name, Errors()), difference)
            each[name] = difference.reshape(len(file), -1).mean(axis=1)
        if "trained" in each:
            more = each["file"] - each["trained"]
            self._more += more.size, more.sum(), (more**2).sum()

    def judge(self, report: Report, is_tainted: bool) -> None:
        """Adds the errors, the failures and a note to the report."""
        del is_tainted
        found = self._found
        if self._output is None:
            report.values = found
        else:
            report.further[self._output] = found
        count, total, squares, _ = self._sums.sum(axis=1)
        found.spread = float(_deviation(count, total, squares))
        if "trained" not in found.against:
            return
        where = "" if self._output is None else f"{self._output}: "
        self._judge_units(report, where)
        least = _ROUNDINGS * math.sqrt(squares / count)
        if found.to_labels:
            examples, *sums = self._more
            mean, square = (total / examples for total in sums)
            noise = math.sqrt(max(square - mean**2, 0.0) / examples)
            found.more, found.certain_more = mean, mean - SIGMAS * noise
            allowed = report.tolerance * found.spread + least
            if not found.certain_more <= allowed:
                report.failures.append(
                    f"{where}the mean error is {mean:.4g} above the trained network's, "
                    f"allowed {allowed:.4g} plus chance"
                )
            return
        allowed = (1 - report.agreement) * found.spread + least
        error = found.against["trained"].mean
        if not error <= allowed:
            report.failures.append(
                f"{where}outputs differ from the trained network's by {error:.4g} on "
                f"average, allowed {allowed:.4g}"
            )

    def _judge_units(self, report, where) -> None:
        """Notes units that are lost beside larger ones.

        A note and no failure: of a unit that hardly varies every rounding is large
        beside its deviation. A constant unit has nothing to lose.
        """
        count, total, squares, errors = self._sums
        own = _deviation(count, total, squares)
        varies = own > _ROUNDINGS * np.sqrt(squares / count)
        shares = np.where(varies, errors / count / np.where(varies, own, 1.0), 0.0)
        worst = int(shares.argmax())
        self._found.worst_unit = worst
        self._found.worst_share = float(shares[worst])
        allowed = 1 - report.agreement
        if len(shares) > 1 and not shares[worst] <= allowed:
            remedy = (
                "All units of an int8 head share one step: head='float' keeps small "
                "ones, or train on targets of one range"
                if self._head == "int8"
                else "The head computes in float: layers in front of it differ"
            )
            report.notes.append(
                f"{where}{(~(shares <= allowed)).sum()} of {len(shares)} units of the "
                f"output differ from the trained network's by more than {allowed:.0%} "
                f"of their own standard deviation, unit {worst} by "
                f"{shares[worst]:.0%}. {remedy}"
            )


def _deviation(count, total, squares) -> np.ndarray:
    """Standard deviations, from the sums over `count` numbers and their squares."""
    return np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0.0))


def _is_certainly_less(share: float, wanted: float, count: int) -> bool:
    """Whether a measured share is significantly below the wanted one.

    By Chernoff's bound of the binomial distribution, which also holds for few examples.
    """
    if share >= wanted:
        return False
    if wanted == 1:
        return True
    parts = (share, wanted), (1 - share, 1 - wanted)
    divergence = sum(a * math.log(a / b) for a, b in parts if a)
    return math.exp(-count * divergence) < _CHANCE


def _add_errors(errors: Errors, differences) -> None:
    errors.count += differences.size
    errors.total += float(differences.sum())
    largest = float(differences.max(initial=0.0))
    errors.largest = float(np.maximum(errors.largest, largest))  # Keeps a NaN.
