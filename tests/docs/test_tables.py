"""The documents' tables of comparisons have the rows of the plans that they come from."""

from __future__ import annotations

import re
import runpy

import pytest

from hf_jd.finetune.comparison import Plan
from tests.docs.blocks import ROOT

SHOWN = {"demo": ("docs/demo.md", "compare.yaml"), "unlearn": ("docs/unlearning.md", "unlearn.yaml")}


@pytest.mark.parametrize("name", SHOWN)
def test_each_configuration_has_a_row(name):
    page, plan = SHOWN[name]
    table = re.search(rf"<!-- {name}\b.*?-->\n(.*?)<!-- /{name} -->", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert table is not None
    rows = {line.split("|")[1].strip() for line in table[1].splitlines()}
    assert set(Plan.read(ROOT / "examples" / plan).configurations) <= rows
    assert (ROOT / "docs" / "images" / f"{name}.png").exists()


def test_a_table_replaces_the_one_between_its_comments(tmp_path, monkeypatch):
    script = runpy.run_path(str(ROOT / "scripts" / "update_page.py"))
    update = script["update"]
    monkeypatch.setitem(update.__globals__, "IMAGES", tmp_path)
    (tmp_path / "mine").mkdir()
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- mine: by x -->\nold\n<!-- /mine -->\nb\n")
    with pytest.raises(ValueError, match="no finished comparison"):
        update(tmp_path / "mine", page)
    (tmp_path / "mine" / "table.md").write_text("| new |\n")
    (tmp_path / "mine" / "picture.png").write_bytes(b"png")
    update(tmp_path / "mine", page)
    assert page.read_text() == "a\n<!-- mine: by x -->\n| new |\n<!-- /mine -->\nb\n"
    assert (tmp_path / "mine.png").read_bytes() == b"png"
    (tmp_path / "mine").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="no place"):
        update(tmp_path / "other", page)


def test_troubleshooting_quotes_messages_of_the_code():
    """Each quoted message is in the code, except for placeholders: numbers, names and `...`."""
    code = "".join(path.read_text("utf-8") for path in (ROOT / "hf_jd").rglob("*.py"))
    code = " ".join(re.sub(r'"\s+f?"', "", code).split()).replace("{", "\0").replace("}", "\0")
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quotes = [
        quote for line in re.findall(r"^\*\*(.+?)\*\*", page, re.MULTILINE) for quote in re.findall("`(.+?)`", line)
    ]
    assert len(quotes) > 10
    for quote in quotes:
        for part in re.split(r"\bN\b|\bMODEL\b|\.\.\.", quote):
            assert part.strip() in code, quote
