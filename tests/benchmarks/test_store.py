import json
import multiprocessing
import re

import numpy as np
import pytest

from benchmarks.common import store
from tests.examples import programs

RESULTS = programs.ROOT / "benchmarks" / "results"


def test_the_last_result_of_a_name_counts(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    assert store.read(path) == {}
    store.write(path, "a/1", {"accuracy": 0.5, "bits": [2, 2]})
    store.write(path, "b", {"accuracy": None})
    assert store.read(path)["a/1"] == {"accuracy": 0.5, "bits": [2, 2]}
    store.write(path, "a/1", {"accuracy": 0.6})
    assert store.read(path) == {"a/1": {"accuracy": 0.6}, "b": {"accuracy": None}}


@pytest.mark.parametrize("line", ['{"name": "a"', "[]", "{}", "7"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"name": "a"}) + f"\n{line}\n")
    with pytest.raises(ValueError, match=f"line 2 of {re.escape(repr(str(path)))}"):
        store.read(path)


def _write_some(path, weights, first):
    for index in range(first, first + 20):
        store.write(path, str(index), {"index": index})
        store.write_weights(weights, f"seed{index}", {"kernel": np.full(3, index)})


def test_several_processes_write_at_a_time(tmp_path):
    paths = tmp_path / "runs.jsonl", tmp_path / "starts.npz"
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_write_some, args=(*paths, first)) for first in (0, 20)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert store.read(paths[0]) == {str(i): {"index": i} for i in range(40)}
    for index in range(40):
        found = store.read_weights(paths[1], f"seed{index}")
        assert {name: w.tolist() for name, w in found.items()} == {
            "kernel": [index] * 3
        }
    # "seed1" is not the beginning of "seed10".
    assert store.read_weights(paths[1], "seed") is None
    assert store.read_weights(tmp_path / "absent.npz", "seed1") is None


def test_the_committed_results_are_few_files():
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert len(files) <= 40
    for path in RESULTS.rglob("*.jsonl"):
        assert store.read(path)
