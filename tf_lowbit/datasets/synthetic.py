"""Generated images: a smooth pattern for each class, plus noise.

For tests and trials without any data.
"""

import numpy as np

from tf_lowbit.core import checks
from tf_lowbit.datasets import augmentation
from tf_lowbit.datasets.dataset import Normalization
from tf_lowbit.datasets.pipeline import Examples, InMemorySource

# The examples are data: the seed of a run does not change them.
_DATA_SEED = 20200102
_FREQUENCIES = 4
_GREY = 128.0
# Grey levels per deviation of the pattern. With noise as strong as the pattern, 2.5
# deviations of both together fit in the 128 levels on each side of grey.
_CONTRAST = 36.0


def generate(
    *,
    image_shape: tuple[int, int, int] = (8, 8, 1),
    classes: int = 10,
    train_size: int = 1024,
    test_size: int = 256,
    noise: float = 1.0,
) -> InMemorySource:
    """Generates a data set; the same arguments give the same examples.

    The pattern of a class is a random sum of the lowest cosines in both directions, so
    smooth that a shift by a pixel leaves it recognizable. Class sizes differ by at most
    one.

    Args:
        image_shape: (H, W, C), each at least 1, and H * W at least 2.
        classes: Number of classes, at least 2.
        train_size: Training examples, at least 1.
        test_size: Test examples, at least 1.
        noise: Deviation of the Gaussian noise on a pixel, in deviations of the pattern;
            at least 0.

    Raises:
        ValueError: If an argument is out of range.
    """
    is_shape = (
        isinstance(image_shape, list | tuple)
        and len(image_shape) == 3
        and all(map(checks.is_integer, image_shape))
    )
    if not is_shape or min(image_shape) < 1 or np.prod(image_shape[:2]) < 2:
        raise ValueError(
            "image_shape must be (H, W, C) with at least two pixels. "
            f"Received: image_shape={image_shape!r}"
        )
    checks.integer("classes", classes, at_least=2)
    checks.integer("train_size", train_size, at_least=1)
    checks.integer("test_size", test_size, at_least=1)
    checks.number("noise", noise, at_least=0)
    # NumPy keeps RandomState's streams fixed, so the data are the same everywhere.
    patterns = _patterns(np.random.RandomState(_DATA_SEED), classes, image_shape)
    train, test = (
        _draw(np.random.RandomState(_DATA_SEED + part), patterns, size, noise)
        for part, size in ((1, train_size), (2, test_size))
    )
    return InMemorySource(
        name="synthetic",
        train=train,
        test=test,
        classes=classes,
        normalization=Normalization.of(train.images, scale=255.0),
        augmentation=augmentation.crop(padding=1),
    )


def _patterns(random, classes: int, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Returns float64 [classes, H, W, C], each pattern with mean 0 and deviation 1."""
    height, width, channels = image_shape
    rows, columns = _cosines(height), _cosines(width)
    weights = random.normal(size=(classes, len(rows), len(columns), channels))
    # The constant term is the brightness, which is subtracted below anyway.
    weights[:, 0, 0] = 0.0
    patterns = np.einsum("nijc,ih,jw->nhwc", weights, rows, columns)
    patterns -= patterns.mean(axis=(1, 2, 3), keepdims=True)
    return patterns / patterns.std(axis=(1, 2, 3), keepdims=True)


def _cosines(length: int) -> np.ndarray:
    """Returns the lowest basis functions of the cosine transform, [K, length]."""
    frequencies = np.arange(min(_FREQUENCIES, length))[:, np.newaxis]
    return np.cos(np.pi * frequencies * (np.arange(length) + 0.5) / length)


def _draw(random, patterns: np.ndarray, size: int, noise: float) -> Examples:
    labels = random.permutation(np.arange(size, dtype=np.int64) % len(patterns))
    values = patterns[labels] + noise * random.normal(size=(size, *patterns.shape[1:]))
    images = np.clip(np.rint(_GREY + _CONTRAST * values), 0, 255).astype(np.uint8)
    return Examples(images, labels)
