"""The Python of methods' pages and of guides runs from top to bottom, and the site is whole."""

import re
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "methods").glob("*.md"))
GUIDES = [DOCS / f"{name}.md" for name in ("data", "long_context", "serving", "weights")]


@pytest.mark.parametrize("page", [*PAGES, *GUIDES], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
  blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
  assert blocks, "show three lines on one's own data"
  monkeypatch.chdir(tmp_path)
  scope = {}
  for block in blocks:
    exec(block, scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_when_not_to_use_the_method(page):
  text = page.read_text()
  assert "<!-- result -->" in text and "\n## When not to" in text
  assert all(len(line) <= 88 for block in re.findall(r"```python\n(.*?)```", text, re.S) for line in block.splitlines())
