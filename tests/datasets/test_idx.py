import gzip

import numpy as np
import pytest

from tests.datasets import idx_files
from tf_lowbit.datasets import idx

_IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
# Written by hand: magic number, three labels, and the labels 7, 0, 9.
_LABELS = bytes.fromhex("00000801 00000003 070009")


def test_reads_bytes_written_by_hand(tmp_path):
    (tmp_path / "labels").write_bytes(_LABELS)
    labels = idx.read_array(tmp_path / "labels", rank=1)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, [7, 0, 9])


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress])
def test_reads_raw_and_compressed_files(tmp_path, compress):
    (tmp_path / "images").write_bytes(compress(idx_files.content(_IMAGES)))
    np.testing.assert_array_equal(idx.read_array(tmp_path / "images", rank=3), _IMAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            b"\x00\x00\x09" + _LABELS[3:], r"magic .*Received: 0x00000901", id="type"
        ),
        pytest.param(
            idx_files.content(_IMAGES), r"magic .*Received: 0x00000803", id="rank"
        ),
        pytest.param(
            b"\x01" + _LABELS[1:], r"magic .*Received: 0x01000801", id="not idx"
        ),
        pytest.param(b"", r"header of 8 bytes. Received: 0 bytes", id="empty"),
        pytest.param(_LABELS[:3], r"header of 8 .*Received: 3 bytes", id="magic cut"),
        pytest.param(_LABELS[:7], r"header of 8 .*Received: 7 bytes", id="header cut"),
        pytest.param(
            _LABELS[:-1], r"11 bytes for shape \[3\]. Received: 10", id="values cut"
        ),
        pytest.param(
            _LABELS + b"\0", r"11 bytes for shape \[3\]. Received: 12", id="too long"
        ),
        pytest.param(gzip.compress(_LABELS)[:-9], "whole gzip file", id="gzip cut"),
        pytest.param(
            gzip.compress(_LABELS)[:-8] + bytes(8), "whole gzip file", id="checksum"
        ),
        pytest.param(b"\x1f\x8b" + bytes(20), "whole gzip file", id="not gzip"),
    ],
)
def test_refuses_malformed_files(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        idx.read_array(path, rank=1)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        idx.read_array(tmp_path / "nothing", rank=1)


def _write_pair(folder, labels):
    (folder / "images").write_bytes(idx_files.content(_IMAGES))
    (folder / "labels").write_bytes(idx_files.content(labels))
    return folder / "images", folder / "labels"


def test_reads_images_with_their_labels(tmp_path):
    images, labels = idx.read_pair(*_write_pair(tmp_path, [4, 2]), classes=5)
    np.testing.assert_array_equal(images, _IMAGES)
    np.testing.assert_array_equal(labels, [4, 2])


def test_refuses_another_count_of_labels(tmp_path):
    with pytest.raises(ValueError, match="Received: 2 images, 3 labels"):
        idx.read_pair(*_write_pair(tmp_path, [4, 2, 0]), classes=5)


def test_refuses_labels_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"\[0, 5\). Received: 5 at index 1"):
        idx.read_pair(*_write_pair(tmp_path, [4, 5]), classes=5)
