import pytest

from tests.datasets import tfds_files
from tf_lowbit.datasets import tfds_source


def _examples(count):
    return tfds_files.images_with_labels(count, 10, (28, 28, 1), seed=0)


def test_finds_a_prepared_data_set(tmp_path):
    tfds_files.write("mnist", tmp_path, {"train": _examples(4), "test": _examples(2)})
    builder = tfds_source.prepared_builder("mnist", str(tmp_path))
    tfds_source.require_splits(builder, "train", "test")
    train, test = tfds_source.read_train_and_test("mnist", str(tmp_path))
    assert (len(train), len(test)) == (4, 2)


def test_a_missing_split_is_refused(tmp_path):
    tfds_files.write("mnist", tmp_path, {"train": _examples(4)})
    with pytest.raises(ValueError, match=r"\['train', 'test'\]. Received: {'train': 4"):
        tfds_source.read_train_and_test("mnist", str(tmp_path))


def test_an_absent_data_set_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="tfds build mnist"):
        tfds_source.prepared_builder("mnist", str(tmp_path))
