import pathlib

import numpy as np
import pytest

from tests.datasets import idx_files, tfds_files
from tf_lowbit import datasets
from tf_lowbit.datasets import fashion_mnist

_ABSENT = "install the Debian package dataset-fashion-mnist, .*--data_dir.*Received"


def _examples(size, seed):
    """Draws pixels with about the mean and the deviation of the real ones."""
    random = np.random.RandomState(seed)
    images = np.rint(255 * random.beta(0.183, 0.456, (size, 28, 28))).astype(np.uint8)
    return images, random.permutation(np.arange(size) % 10)


@pytest.fixture(name="small")
def _small(tmp_path):
    train, test = _examples(50, 0), _examples(20, 1)
    idx_files.write_fashion_mnist(tmp_path, train, test, compressed=True)
    return tmp_path


@pytest.fixture(scope="module", name="real")
def _real(tmp_path_factory):
    """The folder of the Debian package, else a stand-in; sizes and tolerance."""
    if pathlib.Path(fashion_mnist.DEBIAN_FOLDER).is_dir():
        return fashion_mnist.DEBIAN_FOLDER, 60000, 10000, 5e-5
    folder = tmp_path_factory.mktemp("fashion_mnist")
    train, test = _examples(2000, 0), _examples(500, 1)
    idx_files.write_fashion_mnist(folder, train, test, compressed=True)
    return str(folder), 2000, 500, 5e-3


def test_all_images(real):
    folder, train_size, test_size, tolerance = real
    source = fashion_mnist.read(data_dir=folder)
    assert source.train.images.shape == (train_size, 28, 28, 1)
    assert source.test.images.shape == (test_size, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(source.train.labels), train_size // 10)
    np.testing.assert_array_equal(np.bincount(source.test.labels), test_size // 10)
    counts = np.bincount(source.train.images.ravel(), minlength=256)
    levels = np.arange(256) / 255.0
    mean = np.average(levels, weights=counts)
    deviation = np.sqrt(np.average((levels - mean) ** 2, weights=counts))
    assert source.normalization.mean[0] == pytest.approx(mean, abs=tolerance)
    assert source.normalization.deviation[0] == pytest.approx(deviation, abs=tolerance)


@pytest.mark.parametrize("compressed", [False, True])
def test_reads_what_was_written(tmp_path, compressed):
    train, test = _examples(30, 0), _examples(20, 1)
    idx_files.write_fashion_mnist(tmp_path, train, test, compressed=compressed)
    data = datasets.load(
        "fashion_mnist", batch_size=16, augment=False, data_dir=str(tmp_path)
    )
    assert (data.train_size, data.test_size, data.classes) == (30, 20, 10)
    batches = list(data.test.as_numpy_iterator())
    images = np.concatenate([images for images, _ in batches])
    expected = (test[0][..., np.newaxis] / 255.0 - 0.2860) / 0.3530
    np.testing.assert_allclose(images, expected, atol=1e-5)
    np.testing.assert_array_equal(
        np.concatenate([labels for _, labels in batches]), test[1]
    )


def test_default_folder_is_that_of_the_debian_package(small, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", str(small))
    assert datasets.load("fashion_mnist", batch_size=16).train_size == 50


def test_a_missing_file_is_named(small):
    (small / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"without \['t10k-labels-idx1-ubyte'"):
        datasets.load("fashion_mnist", batch_size=16, data_dir=str(small))


def test_a_malformed_file_is_named(small):
    path = small / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="t10k-labels"):
        datasets.load("fashion_mnist", batch_size=16, data_dir=str(small))


def test_images_of_two_sizes_are_refused(tmp_path):
    images, labels = _examples(20, 1)
    wide = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    idx_files.write_fashion_mnist(
        tmp_path, _examples(50, 0), (wide, labels), compressed=False
    )
    with pytest.raises(
        ValueError, match=r"one size. Received: \(28, 28\) and \(32, 32\)"
    ):
        datasets.load("fashion_mnist", batch_size=16, data_dir=str(tmp_path))


def test_the_home_folder_may_be_a_tilde(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small.parent))
    data = datasets.load("fashion_mnist", batch_size=16, data_dir=f"~/{small.name}")
    assert data.train_size == 50


def test_absent_data_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=_ABSENT):
        datasets.load("fashion_mnist", batch_size=16, data_dir=str(tmp_path))


def test_absent_data_in_the_default_places(tmp_path, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", str(tmp_path / "debian"))
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    with pytest.raises(FileNotFoundError, match=_ABSENT):
        datasets.load("fashion_mnist", batch_size=16)


def test_reads_what_tensorflow_datasets_prepared(tmp_path):
    parts = {
        "train": tfds_files.images_with_labels(12, 10, (28, 28, 1), seed=0),
        "test": tfds_files.images_with_labels(10, 10, (28, 28, 1), seed=1),
    }
    tfds_files.write("fashion_mnist", tmp_path, parts)
    source = fashion_mnist.read(data_dir=str(tmp_path))
    assert (len(source.train), len(source.test)) == (12, 10)
    assert set(map(bytes, source.train.images)) == {
        bytes(example["image"]) for example in parts["train"]
    }
