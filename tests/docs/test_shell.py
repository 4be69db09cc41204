"""Every command in the documents exists, and so do its flags."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest

from hf_jd.cli import COMMANDS, main
from hf_jd.finetune import compare
from hf_jd.finetune.comparison import Plan
from hf_jd.finetune.parser import read_settings, split_settings
from hf_jd.finetune.run import parse
from tests.docs.blocks import ROOT, blocks, commands

COMMAND_LINES = [(str(block), words) for block in blocks("bash", "sh") for words in commands(block)]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
# Well-known programs that aren't ours.
OTHERS = {"git", "cd", "pip", "hf", "tensorboard", "tail", "cat", "mkdir", "export"}


@pytest.mark.parametrize("page, words", COMMAND_LINES, ids=lambda value: value if isinstance(value, str) else None)
def test_a_command_and_its_flags_exist(page, words):
    check(words)


def check(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        assert rest[0] in TARGETS
    elif program == "hf-jd":
        check_ours(*rest)
    elif program in ("python", "python3"):
        check_python(rest)
    elif program == "accelerate":
        check_launched(launcher_of_accelerate(), rest[1:])
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        check_launched(get_args_parser(), rest)
    else:
        assert program in OTHERS, f"unknown program {program}: is it ours?"


def check_ours(command: str, *flags: str) -> None:
    assert command in COMMANDS
    if COMMANDS[command][0].startswith("hf_jd.commands."):
        check_by_trl(command, flags)
        return
    rest, file = split_settings(flags)
    if file is not None and not str(file).isupper() and "/" in str(file):
        assert (ROOT / file).exists()
    if command == "compare":
        known, rest = compare._parser().parse_known_args(rest)
        plan = Plan.read(ROOT / file) if file is not None and (ROOT / file).exists() else None
        settings = plan.runs(Path("runs"), 1)[0].settings if plan else {"output_dir": "out"}
        parse(rest, settings)
    elif command in ("finetune", "doctor"):
        settings = read_settings(ROOT / file) if file is not None and (ROOT / file).exists() else {}
        parse(rest, {"output_dir": "out"} | settings)
    else:
        check_by_its_parser(command, rest)


class ParsedError(Exception):
    """The flags were parsed, and training would begin."""


def check_by_trl(command: str, flags: Sequence[str]) -> None:
    """Check the flags of a command that TRL's parser reads."""
    pytest.importorskip("trl")
    with patch("hf_jd.commands.common.load", side_effect=ParsedError), pytest.raises(ParsedError):
        main([command, *flags, "--use_cpu", "--bf16", "false"])


def check_by_its_parser(command: str, flags: list[str]) -> None:
    """Check that the flags of a command with its own parser are among those that its help lists."""
    spec = find_spec(COMMANDS[command][0])
    assert spec is not None
    assert spec.origin is not None
    source = "".join(path.read_text("utf-8") for path in Path(spec.origin).parent.glob("*.py"))
    for flag in flags:
        if flag.startswith("--"):
            assert f'"{flag}"' in source or f" {flag[2:]}:" in source, f"hf-jd {command} has no {flag}"


def check_python(words: list[str]) -> None:
    script, *flags = words
    if script == "-m":
        return
    assert (ROOT / script).exists()
    if script == "scripts/finetune.py":
        check_ours("finetune", *flags)


def launcher_of_accelerate():
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def check_launched(parser, words: list[str]) -> None:
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    known, unknown = parser.parse_known_args([*words[:place], words[place]])
    assert not unknown
    if getattr(known, "config_file", None):
        assert (ROOT / known.config_file).exists()
    check_python(words[place:])


def test_a_wrong_flag_fails():
    with pytest.raises(ValueError, match="Unknown flag"):
        check(["hf-jd", "finetune", "--jd_wheighting", "upgrad", "--output_dir", "x"])
    with pytest.raises(AssertionError):
        check(["make", "dmeo"])


@pytest.mark.parametrize("block", list(blocks("yaml", "json")), ids=str)
def test_data_blocks_are_well_formed(block, tmp_path):
    if block.language == "json":
        assert all(json.loads(line) for line in block.text.splitlines())
    else:
        (tmp_path / "plan.yaml").write_text(block.text)
        for run in Plan.read(tmp_path / "plan.yaml").runs(tmp_path, 1):
            parse([], run.settings)
