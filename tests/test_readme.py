"""README is short, and its code runs as it stands there."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from tf_lowbit.network import inspection

README = Path(__file__).resolve().parent.parent / "README.md"


def test_is_read_in_a_minute():
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.slow
def test_its_lines_run_as_pasted(tmp_path):
    """They import, load and train by themselves, and end with a verified file."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    lines = [line for line in code.splitlines() if line]
    imports = [line for line in lines if re.match("import |from ", line)]
    assert len(lines) - len(imports) <= 12
    names, shown = {}, io.StringIO()
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(shown):
        exec(compile(code, str(README), "exec"), names)
    report, model = names["report"], names["model"]
    assert report.ok
    assert report.codes > 100_000
    assert "proved equal to its integer model" in shown.getvalue()
    assert (tmp_path / "digits.tflite").exists()
    found = [t.bits for t in inspection.quantized_tensors(model)]
    # Weights and inputs of four convolutions; of the stem and the head.
    assert sorted(found) == [2] * 8 + [8] * 4
    # It has learned: ten classes, so chance is a tenth.
    assert model.evaluate(names["data"].test, verbose=0)[1] > 0.6
