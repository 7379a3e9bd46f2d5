"""Files appear whole or not at all."""

import gzip
import os

import pytest

from tf_lowbit.export import files

BEFORE, AFTER = b"before", bytes(range(256)) * 50


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.tflite"


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_new_file(path, kind):
    assert files.replace_file(kind(path), AFTER) == path
    assert path.read_bytes() == AFTER
    assert names(path.parent) == ["net.tflite"]


def test_a_file_that_is_there_is_replaced(path):
    path.write_bytes(BEFORE)
    files.replace_file(path, AFTER)
    assert path.read_bytes() == AFTER


def test_no_bytes_are_an_empty_file(path):
    files.replace_file(path, b"")
    assert path.read_bytes() == b""


def test_what_an_earlier_run_left_half_written_does_no_harm(path):
    path.with_name(".net.tflite.partial").write_bytes(b"half")
    files.replace_file(path, AFTER)
    assert path.read_bytes() == AFTER
    assert names(path.parent) == ["net.tflite"]


def test_the_old_file_is_there_until_the_new_one_is_whole(path, monkeypatch):
    path.write_bytes(BEFORE)
    seen = []
    replace = os.replace

    def watched(source, target):
        seen.append((path.read_bytes(), source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    files.replace_file(path, AFTER)
    assert seen == [(BEFORE, AFTER)]


def test_bytes_are_on_the_disk_before_the_rename(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, name=name, real=real):
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    files.replace_file(path, AFTER)
    assert calls == ["fsync", "replace"]


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    path.write_bytes(BEFORE)

    def fails(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(PermissionError, match=r"must be writable.*net\.tflite"):
        files.replace_file(path, AFTER)
    assert path.read_bytes() == BEFORE
    assert names(path.parent) == ["net.tflite"]


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be writable"):
        files.replace_file(tmp_path / "none" / "net.tflite", AFTER)
    assert names(tmp_path) == []


def test_a_folder_in_the_files_place(path):
    path.mkdir()
    with pytest.raises(OSError, match="must be writable"):
        files.replace_file(path, AFTER)
    assert names(path.parent) == ["net.tflite"]


def test_a_path_below_a_file(path):
    path.write_bytes(BEFORE)
    with pytest.raises(OSError, match="must be writable"):
        files.replace_file(path / "net.tflite", AFTER)
    assert path.read_bytes() == BEFORE


def test_an_interrupted_write_leaves_nothing(path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.replace_file(path, AFTER)
    assert names(path.parent) == []


def test_a_name_as_long_as_names_may_be(tmp_path):
    path = tmp_path / ("n" * 248 + ".tflite")
    assert len(path.name) == 255
    files.replace_file(path, AFTER)
    assert path.read_bytes() == AFTER


def test_gzip_bytes():
    assert files.gzip_bytes(AFTER) == len(gzip.compress(AFTER, 9))
    assert files.gzip_bytes(bytes(10_000)) < 100
    assert files.gzip_bytes(b"") == len(gzip.compress(b"", 9))
    assert files.gzip_bytes(AFTER) == files.gzip_bytes(AFTER)
