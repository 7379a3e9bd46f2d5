"""The 8x8 handwritten digits in scikit-learn: no download, no files."""

import numpy as np

from tf_lowbit.datasets import augmentation
from tf_lowbit.datasets.dataset import Normalization
from tf_lowbit.datasets.pipeline import Examples, InMemorySource
from tf_lowbit.datasets.splitting import stratified_split

# 1797 examples, of which 20 %, rounded up, are for testing.
_TEST_SIZE = 360
_LARGEST_PIXEL = 16


def read() -> InMemorySource:
    """Reads the digits: 1437 for training and 360 for testing, 8x8x1, 10 classes.

    The split is fixed and stratified by class. Augmentation shifts by at most one
    pixel, since the digits fill their image, and does not mirror.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets as sklearn_datasets
    except ImportError as error:
        raise ImportError(
            f"The digits need scikit-learn: pip install scikit-learn. Received: {error}"
        ) from error
    loaded = sklearn_datasets.load_digits()
    examples = Examples(
        images=loaded.images.astype(np.uint8)[..., np.newaxis],
        labels=loaded.target.astype(np.int64),
    )
    train, test = (
        examples.select(part) for part in stratified_split(examples.labels, _TEST_SIZE)
    )
    return InMemorySource(
        name="digits",
        train=train,
        test=test,
        classes=10,
        normalization=Normalization.of(train.images, scale=_LARGEST_PIXEL),
        augmentation=augmentation.crop(padding=1),
    )
