"""Files appear whole or not at all."""

import os
import stat
import subprocess
import sys
import zipfile

import pytest

from tf_lowbit.core import files

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


def test_a_text_is_written_in_utf8(path):
    files.replace_file(path, "5 µs\n")
    assert path.read_bytes() == b"5 \xc2\xb5s\n"
    with pytest.raises(UnicodeEncodeError):
        files.replace_file(path, "half a text, then \ud800")
    assert path.read_text(encoding="utf-8") == "5 µs\n"
    assert names(path.parent) == ["net.tflite"]


def test_what_an_earlier_run_left_half_written_does_no_harm(path):
    left = path.with_name(".partial-left")
    left.mkdir()
    (left / path.name).write_bytes(b"half")
    files.replace_file(path, AFTER)
    assert path.read_bytes() == AFTER
    assert names(path.parent) == [".partial-left", "net.tflite"]


def test_a_file_may_be_read_by_those_that_the_user_lets_read(path):
    before = os.umask(0o027)
    try:
        files.replace_file(path, AFTER)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_place_to_write_is_new_private_and_of_the_files_name(path):
    with files.replaced(path) as first, files.replaced(path) as second:
        assert first != second
        for temporary in (first, second):
            assert temporary.name == path.name
            assert not temporary.exists()
            folder = temporary.parent
            assert folder.parent == path.parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        first.write_bytes(BEFORE)
        second.write_bytes(AFTER)
    assert path.read_bytes() == BEFORE  # Of the last to end.
    assert names(path.parent) == ["net.tflite"]


@pytest.mark.parametrize(
    "name", [".net.tflite.partial", "net.tflite.partial", "net.tflite"]
)
def test_a_planted_link_is_not_followed(path, name):
    victim = path.with_name("victim")
    victim.write_bytes(BEFORE)
    path.with_name(name).symlink_to(victim)
    files.replace_file(path, AFTER)
    assert victim.read_bytes() == BEFORE
    assert path.read_bytes() == AFTER
    assert not path.is_symlink()


# What does not import TensorFlow is read from its file.
WRITER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
for turn in range(50):
    files.replace_file(sys.argv[2], sys.argv[3].encode() * (20_000 + turn))
"""


@pytest.mark.slow
def test_several_processes_may_write_one_file(path):
    path.write_bytes(b"0" * 20_000)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, files.__file__, path, mark])
        for mark in "1234"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        found = path.read_bytes()
        assert len(found) >= 20_000  # Not torn, and of one writer alone.
        assert len(set(found)) == 1
        seen.add(found[:1])
    assert [writer.returncode for writer in writers] == [0, 0, 0, 0]
    assert len(seen) > 1
    assert len(path.read_bytes()) == 20_049
    assert names(path.parent) == ["net.tflite"]


@pytest.mark.parametrize("writes", ["bytes", "a place"])
def test_a_disk_without_room_leaves_the_old_file_and_nothing_else(path, writes):
    """A limit on a file's size stands in for the disk's."""
    program = f"""
import importlib.util, resource, signal, sys
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    if {writes!r} == "bytes":
        files.replace_file({str(path)!r}, bytes(10_000))
    else:
        with files.replaced({str(path)!r}) as place:
            place.write_bytes(bytes(10_000))
except OSError as error:
    print(error)
"""
    path.write_bytes(BEFORE)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "must be writable (File too large). Received: " in done.stdout
    assert path.read_bytes() == BEFORE
    assert names(path.parent) == ["net.tflite"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(path):
    path.write_bytes(BEFORE)
    path.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="must be writable"):
            files.replace_file(path, AFTER)
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == BEFORE
    assert names(path.parent) == ["net.tflite"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(path, error):
    path.write_bytes(BEFORE)

    def write():
        with files.replaced(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == BEFORE
    assert names(path.parent) == ["net.tflite"]


def test_a_writer_that_writes_nothing_is_an_error(path):
    path.write_bytes(BEFORE)
    with pytest.raises(FileNotFoundError, match="must be writable"):
        with files.replaced(path):
            pass
    assert path.read_bytes() == BEFORE


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


@pytest.mark.parametrize("parts", [1, 8])
def test_a_zip_that_would_fill_the_disk_is_refused(tmp_path, parts):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for part in range(parts):
            archive.writestr(f"{part}", bytes(2**27 // parts))
    with pytest.raises(ValueError, match=r"200 times.*Received: \d+ bytes.*134217728"):
        files.require_plausible_zip(bomb)
    with open(bomb, "rb") as file, pytest.raises(ValueError, match="200 times"):
        files.require_plausible_zip(file)


def test_other_zips_are_plausible(tmp_path):
    for name, data in {"zeros": bytes(2**20), "noise": os.urandom(2**20)}.items():
        path = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("part", data)
        files.require_plausible_zip(path)
    path.write_bytes(b"no such format")
    with pytest.raises(ValueError, match=r"whole ZIP file\. Received"):
        files.require_plausible_zip(path)
