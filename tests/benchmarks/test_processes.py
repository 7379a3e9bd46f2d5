import functools
import os
import sys

import pytest

from benchmarks.common import processes


@pytest.fixture
def program(tmp_path):
    """Writes a program that notes each of its starts, and then does something."""

    def write(then):
        path = tmp_path / "program.py"
        path.write_text(
            "import os, pickle, sys\n"
            "arguments = pickle.load(sys.stdin.buffer)\n"
            "open(arguments[0], 'a').write('started ')\n" + then
        )
        return path

    return write


def run(program, notes):
    variables = {**os.environ, "PYTHONPATH": str(program.parent)}
    processes.run(sys.executable, program.stem, [str(notes)], variables)


def test_a_process_gets_its_arguments(program, tmp_path):
    run(program(""), tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "started "


def test_an_error_is_told_and_not_tried_again(program, tmp_path):
    with pytest.raises(RuntimeError, match=r"exit status 1:(?s:.)*ValueError: no good"):
        run(program("raise ValueError('no good')"), tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "started "


def test_a_process_that_dies_is_tried_once_more(program, tmp_path):
    with pytest.raises(RuntimeError, match="exit status -9"):
        run(program("os.kill(os.getpid(), 9)"), tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "started started "


def test_the_first_error_ends_it(program, tmp_path, capsys):
    path = program("sys.exit(3)")
    tasks = {
        str(index): functools.partial(run, path, tmp_path / f"{index}")
        for index in range(3)
    }
    with pytest.raises(RuntimeError, match="exit status 3"):
        processes.perform(tasks, 1)
    assert not (tmp_path / "2").exists()
    done = []
    processes.perform({"first": lambda: done.append(1)}, 1)
    processes.perform({}, 1)
    assert done == [1]
    assert "first" in capsys.readouterr().out
