import json
import subprocess
import sys

from tests.examples import programs
from tf_lowbit.compat import keras

sys.path.insert(0, str(programs.ROOT / "benchmarks"))

import applications_plan as plan


def test_all_networks_are_in_the_plan():
    public = {n: getattr(keras.applications, n) for n in dir(keras.applications)}
    functions = {n for n, f in public.items() if n[0].isupper() and callable(f)}
    assert set(plan.NAMES) == functions
    assert len(plan.NAMES) == len(functions)


def test_a_network_goes_through_everything(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(programs.ROOT / "benchmarks" / "applications.py"),
            "--network=MobileNet",
            f"--results_dir={tmp_path}",
        ],
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "MobileNet.json").read_text())
    assert found["steps"] == dict.fromkeys(["calibrate", *plan.STEPS], True)
    assert "refused" not in found
    # 28 convolutions of either kind; the outermost two stay float.
    assert found["quantized_weights"] == 26
    assert found["quantized_activations"] == 26
    lines = plan.table(tmp_path).splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["MobileNet", "91", "26", "26", *["yes"] * 6, ""]


def test_what_was_refused_is_told(tmp_path):
    found = {
        "name": "MobileNetV3Small",
        "layers": 229,
        "quantized_weights": 2,
        "quantized_activations": 1,
        "steps": {
            **{"split": True, "quantize": True, "train": True, "levels": True},
            "export": False,
        },
        "refused": "export: no form. Received: 'a|b'",
    }
    (tmp_path / "MobileNetV3Small.json").write_text(json.dumps(found))
    line = plan.table(tmp_path).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "MobileNetV3Small, split"
    assert cells[4:] == [
        *("yes", "yes", "yes", "—", "no", "—"),
        "export: no form. Received: 'a/b'",
    ]
    assert plan.table(tmp_path / "absent") == "Not run yet."
