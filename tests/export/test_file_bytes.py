"""The size of a compressed file."""

import gzip

from tf_lowbit.export import file_bytes

DATA = bytes(range(256)) * 50


def test_gzip_bytes():
    assert file_bytes.gzip_bytes(DATA) == len(gzip.compress(DATA, 9))
    assert file_bytes.gzip_bytes(bytes(10_000)) < 100
    assert file_bytes.gzip_bytes(b"") == len(gzip.compress(b"", 9))
    assert file_bytes.gzip_bytes(DATA) == file_bytes.gzip_bytes(DATA)
