import time

import pytest

from tf_lowbit.core import progress


@pytest.fixture
def _terminal(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")


def shown(capfd, **options):
    with progress.bar("Counting", **options) as update:
        for done in (1, 2):
            update(done, 2)
    return capfd.readouterr().err


@pytest.mark.usefixtures("_terminal")
def test_a_bar_comes_when_the_work_takes_long(capfd, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.05)
    with progress.bar("Counting") as update:
        update(1, 4)
        assert capfd.readouterr().err == ""
        time.sleep(0.06)
        update(2, 4)
        assert "Counting" in capfd.readouterr().err
    # It goes when the work is done.
    assert capfd.readouterr().err.endswith("\x1b[2K")


@pytest.mark.usefixtures("_terminal")
def test_short_work_and_silence_show_nothing(capfd, monkeypatch):
    assert shown(capfd) == ""
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    assert "Counting" in shown(capfd)
    assert shown(capfd, verbose=0) == ""


def test_a_file_gets_no_bar(capfd, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    assert shown(capfd) == ""


def test_a_tracked_list_is_a_list_that_tells_how_far_one_has_come():
    told = []
    items = progress.Tracked("abc", lambda done, total: told.append((done, total)))
    assert items == ["a", "b", "c"]
    assert (len(items), told) == (3, [])
    assert [*items] == ["a", "b", "c"]
    assert told == [(1, 3), (2, 3), (3, 3)]
