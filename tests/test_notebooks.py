"""The notebooks are their pages, cell by cell, and run from top to bottom."""

import json
import re

import pytest

from tools import notebooks


def committed(page):
    return json.loads((notebooks.FOLDER / f"{page}.ipynb").read_text())


def printed(cell):
    return "".join("".join(output["text"]) for output in cell.get("outputs", ()))


@pytest.mark.parametrize("page", notebooks.PAGES)
def test_a_notebook_is_its_page(page):
    found = committed(page)
    cells = found["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert found == notebooks.notebook(page, [printed(cell) for cell in codes])
    # All that the page says is there, up to its links.
    text = (notebooks.DOCS / f"{page}.md").read_text()
    for cell in cells:
        source = "".join(cell["source"])
        assert source.replace("](../", "](") in text
    words = sum(len("".join(cell["source"]).split()) for cell in cells)
    assert words == len(re.sub("```(python)?\n", "", text).split())
    assert "proved equal to its integer model" in printed(codes[-1])


@pytest.mark.parametrize("page", notebooks.PAGES)
def test_links_lead_somewhere(page):
    text = "".join("".join(cell["source"]) for cell in committed(page)["cells"])
    targets = re.findall(r"\]\((\.\./[^)#\s]+)", text)
    assert targets
    for target in targets:
        assert (notebooks.FOLDER / target).exists(), target


def test_cells_share_names_and_show_what_they_print(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    bars = [
        "1/9 [>...] - ETA: 1s\b\b\b\r9/9 [===] - 1s 12ms/step - loss: 1",
        "9/9 - 41s - loss: 1 - 41s/epoch - 920ms/step",
    ]
    codes = ["a = 1\nprint(a)", "open('file', 'w').close()", "print(a + 1)"]
    codes += [f"print({bar!r})" for bar in bars]
    lines = ["9/9 [===] - loss: 1\n", "9/9 - loss: 1\n"]
    assert notebooks.run(codes) == ["1\n", "", "2\n", *lines]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_guide_runs_from_top_to_bottom():
    """As it stands there; `test_docs.py` does the same with the tutorial."""
    codes = [text for kind, text in notebooks.cells("guide") if kind == "code"]
    outputs = notebooks.run(codes)
    assert "Stage 2/2: weights at 2 bits, activations at 2 bits" in outputs[1]
    assert "proved equal to its integer model" in outputs[-1]
