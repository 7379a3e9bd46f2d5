import json
import re
import subprocess
import sys

from tests.examples import programs


def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.faults"),
            *("--kills=1", "--epochs=3", "--seed=1", "--output=new/fault_run.json"),
        ],
        cwd=tmp_path,
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^Kill 1: newest intact checkpoint \{'epoch'", done.stdout, re.M)
    result = json.loads((tmp_path / "new" / "fault_run.json").read_text())
    assert result["different"] == []
    # Networks, both optimizers' momenta and the counters.
    assert result["tensors"] > 100
    assert f"{result['tensors']} saved tensors, 0 different" in done.stdout
    (kill,) = result["kills"]
    assert 0 <= kill["epoch"] < 3
    assert result["settings"] == {"epochs": 3, "seed": 1}
    for flag in ("--method=sp", "--distill=joint", "--hints"):
        assert flag in result["training"]
    assert set(result) >= {"versions", "machine"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
