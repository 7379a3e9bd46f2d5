import numpy as np
import pytest

from tf_lowbit.datasets.splitting import stratified_split

_LABELS = np.random.RandomState(0).permutation(np.repeat([0, 1, 5], [50, 31, 9]))


@pytest.mark.parametrize("held_out", [0, 1, 17, 30, 89, 90])
def test_parts_are_disjoint_and_together_everything(held_out):
    kept, held = stratified_split(_LABELS, held_out)
    assert len(held) == held_out
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(90))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()


@pytest.mark.parametrize("held_out", [1, 17, 30, 89])
def test_each_class_gives_its_share(held_out):
    _, held = stratified_split(_LABELS, held_out)
    for label in (0, 1, 5):
        share = held_out * np.mean(_LABELS == label)
        assert abs(np.sum(_LABELS[held] == label) - share) < 1.0


def test_depends_on_its_arguments_only():
    np.random.seed(1)
    first = stratified_split(_LABELS, 30)[1]
    np.random.seed(2)
    np.testing.assert_array_equal(first, stratified_split(_LABELS, 30)[1])


def test_is_drawn_at_random_within_a_class():
    _, held = stratified_split(np.zeros(1000, np.int64), 500)
    assert 200 < np.sum(held < 500) < 300


@pytest.mark.parametrize("held_out", [-1, 91])
def test_refuses_impossible_sizes(held_out):
    with pytest.raises(ValueError, match=f"Received: held_out={held_out}"):
        stratified_split(_LABELS, held_out)


def test_nothing_to_split():
    kept, held = stratified_split(np.zeros(0, np.int64), 0)
    assert len(kept) == len(held) == 0
