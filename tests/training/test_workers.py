"""Two worker processes on this machine: equal to one process within float error."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.training import worker as program
from tf_lowbit.compat import tf

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WORKERS, TIMEOUT = 2, 120


def free_addresses():
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(WORKERS)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def start(index, addresses, result, log):
    task = {
        "cluster": {"worker": addresses},
        "task": {"type": "worker", "index": index},
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.worker", result],
        cwd=ROOT,
        env={**os.environ, "TF_CONFIG": json.dumps(task), "no_proxy": "127.0.0.1"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )


class Ended(NamedTuple):
    result: Path
    printed: str


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Workers that have ended, or were killed since one failed or time was over."""
    folder = tmp_path_factory.mktemp("workers")
    results = [folder / f"{index}.npz" for index in range(WORKERS)]
    logs = [folder / f"{index}.log" for index in range(WORKERS)]
    deadline, addresses, running = time.monotonic() + TIMEOUT, free_addresses(), []
    try:
        for index in range(WORKERS):
            with open(logs[index], "w") as log:
                running.append(start(index, addresses, results[index], log))
        # One that fails leaves the other waiting.
        while {process.poll() for process in running} in ({None}, {None, 0}):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [Ended(r, log.read_text()) for r, log in zip(results, logs, strict=True)]


@pytest.fixture(scope="module")
def results(workers):
    for worker in workers:
        assert worker.result.exists(), worker.printed[-2000:]
    return [dict(np.load(worker.result)) for worker in workers]


def test_methods_are_made_before_the_strategy(workers):
    """It sets TensorFlow up, which neither import nor method may have started."""
    for ended in workers:
        assert program.STARTED in ended.printed, ended.printed[-2000:]


def test_each_worker_gets_its_part_of_every_global_batch(results):
    first, second = results
    for step, (_, _, whole) in enumerate(program.data()):
        parts = [first[f"seen/{step}"], second[f"seen/{step}"]]
        assert [len(part) for part in parts] == ([1, 0] if step == 3 else [8, 8])
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_both_workers_hold_the_same(results):
    first, second = results
    assert first.keys() == second.keys()
    for name in first:
        if not name.startswith("seen"):
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_two_workers_learn_what_one_process_learns(results):
    alone = program.train(tf.distribute.get_strategy(), program.methods())
    assert alone.keys() == results[0].keys()
    assert len(alone["logs/teacher_hint_loss"]) == 20
    for name, value in alone.items():
        if not name.startswith("seen"):
            found = results[0][name]
            np.testing.assert_allclose(found, value, 1e-5, 1e-5, err_msg=name)
