from html.parser import HTMLParser

import pytest
import rich.box
import rich.table
import rich.text

from tf_lowbit.core import tables


def table(rows=2):
    made = rich.table.Table(title="of two", box=rich.box.SIMPLE)
    made.add_column("name")
    made.add_column("bytes", justify="right")
    for row in range(rows):
        made.add_row(rich.text.Text(f"<b>[v{row}]" + "x" * 200), str(10**row))
    return made


def text_of(source):
    """What a page shows, and the tags that it has."""
    found, tags = [], []
    parser = HTMLParser()
    parser.handle_data = found.append
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.feed(source)
    return "".join(found), set(tags)


@pytest.mark.parametrize("force", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_text_is_plain_and_as_wide_as_its_contents(monkeypatch, force):
    monkeypatch.setenv(force, "1")
    monkeypatch.setenv("COLUMNS", "20")
    lines = tables.as_text(table()).splitlines()
    assert "\x1b" not in "".join(lines)
    assert lines[0].strip() == "of two"
    assert [line.split()[-1] for line in lines if "[v" in line] == ["1", "10"]
    assert all("x" * 200 in line for line in lines if "[v" in line)


def test_html_shows_the_text_and_a_name_is_no_markup():
    source = tables.as_html(table())
    shown, tags = text_of(source)
    assert tags <= {"pre", "span"}
    expected = tables.as_text(table()).splitlines()
    found = [line.strip() for line in shown.strip().splitlines()]
    assert found == [line.strip() for line in expected]
    assert "&lt;b&gt;[v0]" in source


def test_html_may_have_a_width():
    shown, _ = text_of(tables.as_html(table(), 60))
    assert max(map(len, shown.splitlines())) <= 60
