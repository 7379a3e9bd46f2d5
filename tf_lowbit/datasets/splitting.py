"""Splits that are stratified by class."""

import numpy as np

# Fixed, not the seed of a run: runs that differ only in their seed must train and
# evaluate on the same examples.
_SPLIT_SEED = 20200101


def stratified_split(
    labels: np.ndarray, held_out: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples in two parts with the same share of each class.

    The split depends only on the arguments. Each class gives its share of `held_out`,
    rounded down or up.

    Args:
        labels: Integer array [N].
        held_out: Size of the second part, in [0, N].

    Returns:
        Two int64 arrays of indices into `labels`, [N - held_out] and [held_out], each
        increasing; together they are all indices.

    Raises:
        ValueError: If `held_out` is out of range.
    """
    size = len(labels)
    if not 0 <= held_out <= size:
        raise ValueError(
            f"held_out must be in [0, {size}]. Received: held_out={held_out}"
        )
    # NumPy keeps RandomState's streams fixed; a Generator's may change with the
    # version, and the split with it.
    random = np.random.RandomState(_SPLIT_SEED)
    classes, counts = np.unique(labels, return_counts=True)
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:take]
        for label, take in zip(
            classes, _apportion(counts, held_out) if size else [], strict=True
        )
    ]
    is_held_out = np.zeros(size, bool)
    if chosen:
        is_held_out[np.concatenate(chosen)] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _apportion(counts: np.ndarray, total: int) -> np.ndarray:
    """Divides `total` in proportion to `counts`, by largest remainder."""
    products = counts.astype(np.int64) * total
    shares, remainders = np.divmod(products, counts.sum())
    left = total - shares.sum()
    # The stable sort prefers the smaller label when remainders are equal.
    shares[np.argsort(-remainders, kind="stable")[:left]] += 1
    return shares
