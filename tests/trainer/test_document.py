"""The page of the trainer names what there is."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from hf_jd.arguments import JDArguments

PAGE = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text("utf-8")


@pytest.mark.parametrize("field", fields(JDArguments), ids=lambda field: field.name)
def test_each_flag_is_on_the_page_as_its_help_has_it(field):
    assert f"| `--{field.name}` | `{field.default}` | {field.metadata['help']} |\n" in PAGE


def test_no_other_flag_is_on_the_page():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `--jd_")]
    assert len([row for row in rows if row.count("|") == 4]) == len(fields(JDArguments))
