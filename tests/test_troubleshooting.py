"""The messages on the page of troubles are those of the library."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
# What is no placeholder must be long enough to be found once only by what it says.
_LEAST = 20


def quoted():
    """Each quoted message in one line."""
    found = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    return [" ".join(text.split()) for text in found]


def texts_of_the_library():
    """String constants of the sources but for docstrings, concatenated ones whole."""
    for path in (ROOT / "tf_lowbit").rglob("*.py"):
        tree = ast.parse(path.read_text())
        documents = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and id(node) not in documents:
                yield " ".join(node.value.split())


def test_every_quoted_message_is_in_the_sources():
    texts = list(texts_of_the_library())
    messages = quoted()
    assert len(messages) >= 25
    for message in messages:
        parts = [part.strip() for part in message.split("…")]
        assert max(map(len, parts)) >= _LEAST, message
        for part in filter(None, parts):
            assert any(part in text for text in texts), part


def test_every_trouble_has_a_message_or_is_a_chapter():
    entries = re.split(r"^#{2,3} ", PAGE, flags=re.MULTILINE)[1:]
    of_messages = [e for e in entries if "**" in e]
    assert len(of_messages) >= 25
    for entry in of_messages:
        assert "```text" in entry, entry
        assert "**Fix.**" in entry or "**Where to look.**" in entry, entry
