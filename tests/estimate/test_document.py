"""The numbers in docs/scale.md are those that its commands print."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from hf_jd.estimate.command import parse, report

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")
COMMANDS = dict(re.findall(r"^([A-Z])  hf-jd estimate (.*)$", PAGE, re.M))
CELLS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
ROWS = {cells[0]: cells for cells in CELLS if cells[0] in COMMANDS}


@cache
def printed(letter: str) -> str:
    arguments = parse(shlex.split(COMMANDS[letter]))
    arguments.model = str(ROOT / arguments.model)
    return report(arguments)


@pytest.mark.parametrize("letter", COMMANDS)
def test_a_row_of_the_table_matches_its_command(letter):
    lines = dict(line.split(maxsplit=1) for line in printed(letter).splitlines())
    rows, sent, times, time = ROWS[letter][5:]
    assert lines["rows"].startswith(f"{rows} per process")
    assert lines["sent"].startswith(f"{sent} per process, {times} of" if sent else "nothing")
    fits = lines["one-pass"].startswith("fits")
    assert lines["time"].startswith(f"{time} of") if fits else time == "does not fit"


def test_every_row_has_a_command():
    assert list(ROWS) == list(COMMANDS)
    assert len(COMMANDS) >= 8


def test_the_page_has_the_whole_output_of_one_command():
    assert f"What B prints:\n\n```text\n{printed('B')}\n```\n" in PAGE


def test_the_page_states_the_commands_assumptions():
    assumed = printed("D").splitlines()[-1]
    assert "40% of 989 TFLOP/s" in assumed
    assert "80% of the network's 50 GB/s" in assumed
    assert "40 % of the data sheet's" in PAGE
    assert "80 % of their bytes" in PAGE
