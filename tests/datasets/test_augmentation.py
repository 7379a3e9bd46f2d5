import numpy as np
import pytest

from tf_lowbit.compat import tf
from tf_lowbit.datasets import augmentation

_IMAGES = np.random.RandomState(0).randint(1, 256, (400, 5, 6, 2), np.uint8)


def oracle(image: np.ndarray, padding: int, flip: bool) -> np.ndarray:
    """Returns all crops of a padded image, and their mirror images after them."""
    height, width, _ = image.shape
    padded = np.pad(image, [(padding, padding), (padding, padding), (0, 0)])
    crops = [
        padded[top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return np.stack(crops + [crop[:, ::-1] for crop in crops] if flip else crops)


def chosen(images, augmented, padding, flip) -> list[int]:
    """Returns which image of the oracle each augmented image is."""
    found = []
    for image, result in zip(images, augmented, strict=True):
        matches = (oracle(image, padding, flip) == result).all(axis=(1, 2, 3))
        assert matches.sum() == 1
        found.append(int(matches.argmax()))
    return found


@pytest.mark.parametrize("padding", [1, 2])
def test_crops_are_all_the_shifts_of_the_padded_image(padding):
    seed = tf.constant([3, 4], tf.int64)
    augmented = augmentation.crop(padding)(tf.constant(_IMAGES), seed)
    assert augmented.dtype == tf.uint8
    choices = chosen(_IMAGES, augmented.numpy(), padding, flip=False)
    shifts = (2 * padding + 1) ** 2
    assert set(choices) == set(range(shifts))
    # Equally often: chi square with shifts - 1 degrees of freedom.
    counts = np.bincount(choices, minlength=shifts)
    expected = len(_IMAGES) / shifts
    assert ((counts - expected) ** 2 / expected).sum() < 3 * shifts


def test_crops_and_flips_are_independent():
    seed = tf.constant([3, 4], tf.int64)
    augmented = augmentation.crop_and_flip(1)(tf.constant(_IMAGES), seed)
    choices = chosen(_IMAGES, augmented.numpy(), padding=1, flip=True)
    assert set(choices) == set(range(18))
    assert 160 < np.sum(np.array(choices) >= 9) < 240


def test_no_padding_leaves_images_alone():
    images = tf.constant(_IMAGES)
    cropped = augmentation.random_crop(images, tf.constant([1, 2]), padding=0)
    np.testing.assert_array_equal(cropped, _IMAGES)


@pytest.mark.parametrize(
    "augment", [augmentation.crop(1), augmentation.crop_and_flip(1)]
)
def test_is_a_function_of_the_seed(augment):
    images = tf.constant(_IMAGES)
    first = augment(images, tf.constant([5, 6], tf.int64))
    tf.random.uniform([3])
    again = augment(images, tf.constant([5, 6], tf.int64))
    other = augment(images, tf.constant([5, 7], tf.int64))
    np.testing.assert_array_equal(first, again)
    assert (first.numpy() != other.numpy()).any()


def test_shapes_are_static_except_the_batch():
    @tf.function(input_signature=[tf.TensorSpec([None, 5, 6, 2], tf.float32)])
    def augment(images):
        return augmentation.crop_and_flip(1)(images, tf.constant([1, 2], tf.int64))

    assert augment.get_concrete_function().output_shapes.as_list() == [None, 5, 6, 2]
