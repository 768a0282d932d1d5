"""The code on the pages of the documentation runs."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# Their code resembles that of the README and of the examples, which are tested; or it
# takes a minute to compile.
SLOW = ("faq", "index", "which_model")


def _pages():
    for page in sorted(DOCS.glob("*.md")):
        if "```python" in page.read_text("utf-8"):
            marks = [pytest.mark.slow] if page.stem in SLOW else []
            yield pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.parametrize("page", list(_pages()))
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    exec("\n".join(blocks), {"__name__": page.stem})
