"""The README's Python runs as printed: its blocks in order, in one session, in an empty folder."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not README.is_file(), reason="no README.md in this tree")
def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, "README.md shows no Python"
    session: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        # Blank lines in front make a traceback point at the README's own line.
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], str(README), "exec"), session)
