"""CIFAR-10 and CIFAR-100, as prepared by TensorFlow Datasets.

Krizhevsky, Learning multiple layers of features from tiny images, 2009. `data_dir` and
errors are those of `tfds_source.prepared_builder`.
"""

from tf_lowbit.datasets import augmentation, tfds_source
from tf_lowbit.datasets.dataset import Normalization
from tf_lowbit.datasets.pipeline import InMemorySource

# Channel means and deviations of the 50,000 training images.
_CIFAR10 = Normalization(255.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = Normalization(255.0, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def read_cifar10(*, data_dir: str | None = None) -> InMemorySource:
    """Reads CIFAR-10: 50000 and 10000 images, 32x32x3, 10 classes."""
    return _read("cifar10", 10, _CIFAR10, data_dir)


def read_cifar100(*, data_dir: str | None = None) -> InMemorySource:
    """Reads CIFAR-100: 50000 and 10000 images, 32x32x3, 100 (fine) classes."""
    return _read("cifar100", 100, _CIFAR100, data_dir)


def _read(name, classes, normalization, data_dir) -> InMemorySource:
    train, test = tfds_source.read_train_and_test(name, data_dir)
    return InMemorySource(
        name=name,
        train=train,
        test=test,
        classes=classes,
        normalization=normalization,
        augmentation=augmentation.crop_and_flip(padding=4),
    )
