"""Damaged files: none is taken that predicts otherwise, and none ends the process.

Every byte of a small file is flipped in three ways, and its fields are set to other
values. `TF_LOWBIT_FUZZ` takes all of them (`make fuzz`); the tests take a sample.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tf_lowbit as tfl
from tf_lowbit import export
from tf_lowbit.compat import keras
from tf_lowbit.export.tflite import flatbuffer, writer

ROOT = Path(__file__).resolve().parents[2]
IS_WHOLE = "TF_LOWBIT_FUZZ" in os.environ
EDITS = 4000 if IS_WHOLE else 60
FLIPS = None if IS_WHOLE else 60
DATA = np.random.default_rng(0).uniform(size=(8, 3)).astype(np.float32)
NUMBERS = (-1, 0, 1, 2, 127, 128, 255, 256, 2**15, 2**31 - 1, -(2**31))
FLOATS = (0.0, -1.0, 1e-38, 1e38, float("inf"), float("nan"))


def made():
    """A twin and its file: two integer layers and a head."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.layers.Dense(2, activation="relu", name="first", input_shape=(3,)),
            keras.layers.Dense(2, activation="relu", name="second"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    model = tfl.quantize(net, tfl.PrecisionRule(".*", 2, 2))
    snapped = export.snap(model, [DATA])
    return snapped, writer.to_bytes(snapped)


def flips(content):
    """(Name, file) of flipped bytes: the lowest bit, the highest one, all."""
    rng = np.random.default_rng(1)
    places = np.arange(len(content))
    if FLIPS is not None:
        places = np.sort(rng.choice(places, FLIPS, replace=False))
    for place in places:
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(content)
            changed[place] ^= mask
            yield f"byte {place} ^ {mask:#x}", bytes(changed)


def edits(content):
    """(Name, file) of fields that are set to other values."""
    rng = np.random.default_rng(2)
    for number in range(EDITS):
        model = flatbuffer.unpack(content)
        places = list(fields(model, "model"))
        holder, name, path = places[rng.integers(len(places))]
        value = other(vars(holder)[name], rng)
        setattr(holder, name, value)
        try:
            changed = flatbuffer.pack(model)
        except Exception:
            continue  # The schema's classes cannot write it.
        yield f"edit {number}: {path} = {value!r}"[:200].replace("\n", " "), changed


def fields(item, path):
    """(Object, attribute, path) of everything in a schema object."""
    for name, value in vars(item).items():
        yield item, name, f"{path}.{name}"
        for index, part in enumerate(value if isinstance(value, list) else [value]):
            if hasattr(part, "__dict__"):
                yield from fields(part, f"{path}.{name}[{index}]")


def other(value, rng):
    """Another value of a field."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | np.integer):
        return int(rng.choice(NUMBERS))
    if isinstance(value, float):
        return float(rng.choice(FLOATS))
    if isinstance(value, bytes):
        return value[:-1] + b"?"
    if isinstance(value, np.ndarray) and value.size:
        value = value.copy()
        if rng.random() < 0.3:
            return value[:-1]
        numbers = FLOATS if value.dtype.kind == "f" else NUMBERS
        new = np.array([rng.choice(numbers)])
        value.reshape(-1)[rng.integers(value.size)] = new.astype(value.dtype)[0]
        return value
    if isinstance(value, list) and value:
        return value[:-1] if rng.random() < 0.5 else [*value, value[0]]
    return None


def attempt(group: str) -> None:
    """Verifies each damaged file; prints each that is taken though it differs."""
    snapped, content = made()
    assert export.verify(content, snapped, [DATA], verbose=0).ok
    wanted = export.Runner(content)(DATA)
    met = {"refused": 0, "found": 0, "taken": 0}
    for name, changed in {"flips": flips, "edits": edits}[group](content):
        # The last one printed is the one that ended the process.
        print(f"> {name}", flush=True)
        try:
            report = export.verify(changed, snapped, [DATA], verbose=0)
        except ValueError:
            met["refused"] += 1
            continue
        if not report.ok:
            met["found"] += 1
            continue
        met["taken"] += 1
        found = export.Runner(changed)(DATA)
        for key, values in wanted.items():
            np.testing.assert_array_equal(found[key], values, err_msg=name)
    print(f"< {group}: {json.dumps(met)}")


@pytest.mark.parametrize("group", ["flips", "edits"])
def test_damaged_files(group):
    code = f"from tests.fuzz import test_files; test_files.attempt('{group}')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=7200,
    )
    lines = done.stdout.splitlines()
    last = [line for line in lines if line.startswith(">")][-1:]
    assert done.returncode == 0, (done.returncode, last, done.stderr[-2000:])
    (summary,) = (line for line in lines if line.startswith("<"))
    print(summary)
    counts = json.loads(summary.split(": ", 1)[1])
    assert counts["found"] + counts["refused"] > counts["taken"]
