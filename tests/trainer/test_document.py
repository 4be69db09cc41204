"""The trainer's documents list exactly the flags and tests that exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from hf_jd.arguments import JDArguments

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trainer.md").read_text("utf-8")


@pytest.mark.parametrize("field", fields(JDArguments), ids=lambda field: field.name)
def test_the_page_has_each_flag_with_its_help(field):
    assert f"| `--{field.name}` | `{field.default}` | {field.metadata['help']} |\n" in PAGE


def test_no_other_flag_is_on_the_page():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `--jd_")]
    assert len([row for row in rows if row.count("|") == 4]) == len(fields(JDArguments))


def test_each_duty_names_existing_tests():
    _, table = (ROOT / "docs" / "design.md").read_text("utf-8").split("## What Trainer leaves")
    duties = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(duties) > 20
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    for duty in duties:
        names = re.findall(r"`(test_\w+)`", duty.split("|")[2])
        assert names
        assert set(names) <= defined, duty
