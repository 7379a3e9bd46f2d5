"""The tuning of the accuracy sweep: learning rates, on held-out training images.

Like `sweep`, it is data and files alone.
"""

from pathlib import Path

from benchmarks.accuracy import plan as sweep

# Bits that the learning rates are tuned at; others take those of the nearer ones.
TUNED_AT = ((2, 2), (4, 4))
# The same seed on another processor may end up as far from itself: of rates that are
# no further from the best, the lowest is taken, where fewer lose their way.
AS_GOOD = 0.003
# The grid of learning rates. The tuning starts with two of them, and goes on in the
# direction of the better one until the best stands between two others.
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_FIRST_RATES = (0.03, 0.1)
# Methods and bits that are tuned each for itself.
_TUNED = (
    *((method, bits) for bits in TUNED_AT for method in sweep.METHODS),
    (sweep.FLOAT, None),
)


def tuned_at(bits: tuple[int, int] | None) -> tuple[int, int] | None:
    """The bits whose learning rates a run takes; None for a float one."""
    if bits is None:
        return None
    return TUNED_AT[0] if min(bits) <= 2 else TUNED_AT[1]


def all_scores(
    folder: Path, settings: sweep.Settings
) -> dict[tuple, dict[float, float | None]]:
    """`scores_of` of each method and its bits, on the small network."""
    return {
        key: scores_of(folder, runs_of("preact_resnet8", *key, settings))
        for key in _TUNED
    }


def scores_of(
    folder: Path, runs: dict[float, list[sweep.Run]]
) -> dict[float, float | None]:
    """Accuracy on the held-out images by learning rate, the mean over the seeds.

    Args:
        folder: Of the results.
        runs: Of one method, by learning rate, as `runs_of` gives them.

    Returns:
        None for a rate at which a run diverged; nothing of a rate whose runs are not
        all done.
    """
    scores = {}
    for rate, alike in runs.items():
        found = [sweep.read(folder, run) for run in alike]
        if None not in found:
            accuracies = [run["accuracy"] for run in found]
            is_lost = None in accuracies
            scores[rate] = None if is_lost else sum(accuracies) / len(accuracies)
    return scores


def runs_of(
    network: str, method: str, bits: tuple[int, int] | None, settings: sweep.Settings
) -> dict[float, list[sweep.Run]]:
    """A method's runs, one for each seed, by the learning rates of the grid.

    Args:
        network: As in `sweep.Run`.
        method: Likewise.
        bits: One of `TUNED_AT`, or None for a float network.
        settings: Of the sweep.
    """
    return {
        rate: [
            sweep.Run("tuning", network, method, bits, seed, settings.epochs, rate)
            for seed in sweep.TUNING_SEEDS
        ]
        for rate in RATES
    }


def left(folder: Path, settings: sweep.Settings) -> list[sweep.Run]:
    """The runs that the tuning still needs, as far as is known; none when it is done.

    For each method the first two rates, then the next one beyond the best, until the
    best is none of the outermost that were tried, or there is no rate beyond.
    """
    return [
        run
        for key in _TUNED
        for run in next_runs(folder, runs_of("preact_resnet8", *key, settings))
    ]


def next_runs(folder: Path, runs: dict[float, list[sweep.Run]]) -> list[sweep.Run]:
    """The runs that one method's tuning still needs, as far as is known.

    Args:
        folder: Of the results.
        runs: As `runs_of` gives them.
    """
    return [
        run
        for rate in next_rates(scores_of(folder, runs))
        for run in runs[rate]
        if sweep.read(folder, run) is None
    ]


def next_rates(scores: dict[float, float | None]) -> list[float]:
    """The learning rates to try after those that have been.

    Args:
        scores: Accuracy by rate, None where it diverged.
    """
    missing = [rate for rate in _FIRST_RATES if rate not in scores]
    if missing:
        return missing
    here = RATES.index(best_rate(scores))
    beside = RATES[max(0, here - 1) : here + 2]
    return [rate for rate in beside if rate not in scores]


def best_rate(scores: dict[float, float | None]) -> float:
    """The rate of the best accuracy; the smaller of equals, and never a diverged one.

    The least rate where all diverged.
    """
    return min(scores, key=lambda rate: (-(scores[rate] or 0.0), rate))


def chosen_rate(method: str, scores: dict[float, float | None]) -> float:
    """The lowest of the rates that are as good as the best, to `AS_GOOD`.

    The best itself of the float network, which the others are measured by.

    Args:
        method: As in `sweep.Run`.
        scores: Accuracy by rate, None where it diverged.
    """
    best = best_rate(scores)
    if method == sweep.FLOAT:
        return best
    least = (scores[best] or 0.0) - AS_GOOD
    return min(rate for rate, score in scores.items() if (score or 0.0) >= least)


def rates(folder: Path, settings: sweep.Settings) -> dict[tuple, float]:
    """The learning rates, by method or ablation and `tuned_at` of the bits.

    Raises:
        ValueError: If the tuning is not done.
    """
    missing = left(folder, settings)
    if missing:
        raise ValueError(
            "The learning rates must have been tuned. "
            f"Received: no result {missing[0].name!r} in {str(folder)!r}"
        )
    chosen = {
        key: chosen_rate(key[0], found)
        for key, found in all_scores(folder, settings).items()
    }
    return chosen | {
        (name, bits): changed.learning_rate or chosen[method, bits]
        for name, (method, changed) in sweep.VARIANTS.items()
        for bits in TUNED_AT
    }
