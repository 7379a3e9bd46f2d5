"""The size of a compressed file."""

import gzip

from tf_lowbit.export import files

DATA = bytes(range(256)) * 50


def test_gzip_bytes():
    assert files.gzip_bytes(DATA) == len(gzip.compress(DATA, 9))
    assert files.gzip_bytes(bytes(10_000)) < 100
    assert files.gzip_bytes(b"") == len(gzip.compress(b"", 9))
    assert files.gzip_bytes(DATA) == files.gzip_bytes(DATA)
