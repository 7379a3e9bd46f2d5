import numpy as np
import pytest

from tests.datasets import tfds_files
from tests.datasets.test_augmentation import oracle
from tf_lowbit import datasets
from tf_lowbit.datasets import cifar


def _write(name, folder, **features):
    """Writes examples that their labels tell apart, with the features of CIFAR."""
    parts = {
        split: [
            {**example, "id": f"{split}_{index}", **features}
            for index, example in enumerate(
                tfds_files.images_with_labels(10, 10, (32, 32, 3), seed)
            )
        ]
        for seed, split in enumerate(("train", "test"))
    }
    tfds_files.write(name, folder, parts)
    return parts


@pytest.mark.parametrize(
    ("name", "classes", "features"),
    [("cifar10", 10, {}), ("cifar100", 100, {"coarse_label": 3})],
)
def test_reads_what_was_prepared(tmp_path, name, classes, features):
    parts = _write(name, tmp_path, **features)
    data = datasets.load(name, batch_size=4, augment=False, data_dir=str(tmp_path))
    assert data.input_shape == (32, 32, 3)
    assert (data.classes, data.train_size, data.test_size) == (classes, 10, 10)
    mean, deviation = map(
        np.array, (data.normalization.mean, data.normalization.deviation)
    )
    for split, batches in (
        ("train", data.train.take(data.steps_per_epoch)),
        ("test", data.test),
    ):
        expected = {each["label"]: each["image"] for each in parts[split]}
        seen = 0
        for image, label in batches.unbatch().as_numpy_iterator():
            normalised = (expected[label] / 255.0 - mean) / deviation
            np.testing.assert_allclose(image, normalised, atol=1e-5)
            seen += 1
        assert seen == 10


def test_training_images_are_padded_cropped_and_mirrored(tmp_path):
    parts = _write("cifar10", tmp_path)
    source = cifar.read_cifar10(data_dir=str(tmp_path))
    data = datasets.load("cifar10", batch_size=10, data_dir=str(tmp_path))
    for image, label in data.train.take(2).unbatch().as_numpy_iterator():
        candidates = oracle(parts["train"][label]["image"], padding=4, flip=True)
        candidates = source.normalization(candidates).numpy()
        close = np.abs(candidates - image).max(axis=(1, 2, 3)) < 1e-5
        assert close.sum() == 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_absent_data_says_what_to_do(tmp_path, name):
    with pytest.raises(
        FileNotFoundError,
        match=f"`tfds build {name}`.*TFDS_DATA_DIR.*--data_dir. Received: data_dir=",
    ):
        datasets.load(name, batch_size=4, data_dir=str(tmp_path))
