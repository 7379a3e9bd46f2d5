import numpy as np
import pytest

from tests.datasets.test_augmentation import oracle
from tf_lowbit import datasets
from tf_lowbit.datasets import digits


@pytest.fixture(scope="module", name="source")
def _source():
    return digits.read()


def test_sizes(source):
    assert source.train.images.shape == (1437, 8, 8, 1)
    assert source.test.images.shape == (360, 8, 8, 1)
    assert source.classes == 10
    assert source.train.images.max() == source.test.images.max() == 16


def test_split_is_disjoint_and_complete(source):
    from sklearn.datasets import load_digits

    loaded = load_digits()
    stored = [
        *zip(map(bytes, source.train.images), source.train.labels, strict=True),
        *zip(map(bytes, source.test.images), source.test.labels, strict=True),
    ]
    expected = zip(
        map(bytes, loaded.images.astype(np.uint8)), loaded.target, strict=True
    )
    assert sorted(stored) == sorted(expected)
    # No two digits are alike, so the equality above leaves no room for overlap.
    assert len({image for image, _ in stored}) == 1797


def test_classes_are_balanced(source):
    train, test = (np.bincount(part.labels) for part in (source.train, source.test))
    assert (np.abs(test - (train + test) * 360 / 1797) < 1.0).all()


def test_training_images_have_mean_0_and_deviation_1():
    data = datasets.load("digits", batch_size=500, augment=False)
    batches = data.train.take(data.steps_per_epoch).as_numpy_iterator()
    images = np.concatenate([images for images, _ in batches])
    assert images.shape == (1437, 8, 8, 1)
    assert images.mean() == pytest.approx(0.0, abs=1e-5)
    assert images.std() == pytest.approx(1.0, abs=1e-5)


def test_training_images_are_shifted_by_at_most_a_pixel(source):
    data = datasets.load("digits", batch_size=40)
    images, labels = next(data.train.as_numpy_iterator())
    for image, label in zip(images, labels, strict=True):
        originals = source.train.images[source.train.labels == label]
        candidates = np.concatenate([oracle(each, 1, False) for each in originals])
        candidates = source.normalization(candidates).numpy()
        assert np.abs(candidates - image).max(axis=(1, 2, 3)).min() < 1e-6
