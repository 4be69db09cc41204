from __future__ import annotations

import subprocess
import sys

import pytest

from hf_jd.cli import main


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from hf_jd.cli import main; main(['--help']); assert not {'torch', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "finetune" in done.stdout
    assert "compare" in done.stdout


def test_unknown_command(capsys):
    assert main(["finetun"]) == 2
    error = capsys.readouterr().err
    commands = "finetune, sft, report, estimate, kto, reward, doctor, compare, grpo, dpo"
    assert error == f"hf-jd: error: Unknown command `finetun`; the commands are {commands}.\n"


def test_no_command(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_help_of_a_command_lists_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--train_file", "--lora_r", "--jd_weighting", "--learning_rate"))
