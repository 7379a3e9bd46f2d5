import numpy as np
import pytest

from tf_lowbit import datasets
from tf_lowbit.datasets import synthetic


def test_is_deterministic():
    first, second = synthetic.generate(), synthetic.generate()
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)


def test_sizes_are_as_asked_for():
    data = datasets.load(
        "synthetic",
        batch_size=4,
        image_shape=(6, 10, 3),
        classes=5,
        train_size=13,
        test_size=7,
    )
    assert data.input_shape == (6, 10, 3)
    assert data.classes == 5
    assert (data.train_size, data.test_size, data.steps_per_epoch) == (13, 7, 4)
    images, labels = next(iter(data.train))
    assert images.shape == (4, 6, 10, 3)
    assert labels.shape == (4,)


def test_classes_take_turns():
    source = synthetic.generate(classes=7, train_size=100)
    assert set(np.bincount(source.train.labels)) == {14, 15}


def test_train_and_test_differ():
    source = synthetic.generate()
    assert not set(map(bytes, source.train.images)) & set(
        map(bytes, source.test.images)
    )


def test_training_images_have_mean_0_and_deviation_1():
    source = synthetic.generate(image_shape=(8, 8, 3))
    images = source.normalization(source.train.images).numpy()
    np.testing.assert_allclose(images.mean(axis=(0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(images.std(axis=(0, 1, 2)), 1.0, atol=1e-4)


def test_can_be_learned_but_not_without_effort():
    """The nearest class mean is right nearly always, on one pixel it is not."""
    source = synthetic.generate()

    def accuracy(train, test):
        means = np.stack(
            [train[source.train.labels == label].mean(axis=0) for label in range(10)]
        )
        distances = ((test[:, np.newaxis] - means) ** 2).sum(axis=-1)
        return np.mean(distances.argmin(axis=1) == source.test.labels)

    train, test = (
        part.images.reshape(len(part), -1).astype(np.float64)
        for part in (source.train, source.test)
    )
    assert accuracy(train, test) > 0.95
    assert accuracy(train[:, :1], test[:, :1]) < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (8, 8)}, "image_shape must"),
        ({"image_shape": (1, 1, 3)}, "image_shape must"),
        ({"image_shape": (8, 0, 3)}, "image_shape must"),
        ({"classes": 1}, "classes must be .* at least 2. Received: classes=1"),
        ({"train_size": 0}, "train_size must be .* at least 1. Received"),
        ({"test_size": 0}, "test_size must be .* at least 1. Received"),
        ({"noise": -0.5}, "noise must be .* at least 0. Received: noise=-0.5"),
    ],
)
def test_refuses_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic.generate(**arguments)
