from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest

from hf_jd.cli import main

TWO_SCREENS = 96


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


def test_an_unknown_flag_is_reported_before_a_missing_one(capsys):
    assert main(["finetune", "--output_dri", "runs/mine"]) == 2
    assert "Unknown flag `--output_dri`; the nearest is `--output_dir`" in capsys.readouterr().err


def test_warnings_that_users_cannot_fix_are_silenced(capsys, caplog):
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        main(["report", "no such folder"])
        for module in ("transformers.trainer", "my_rewards"):
            warnings.warn_explicit("renamed", FutureWarning, "file.py", 1, module)
            warnings.warn_explicit("wrong", UserWarning, "file.py", 1, module)
    assert [str(warning.message) for warning in shown] == ["wrong", "renamed", "wrong"]
    for text in ("Setting accelerator to CPU. If you have ...", "The loss is not finite."):
        logging.getLogger("DeepSpeed").warning(text)
    assert caplog.messages == ["The loss is not finite."]


def test_no_command(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-jd {version('hf-jd')}\n"


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*words])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["finetune", "compare", "estimate", "report", "doctor"])
def test_each_command_has_its_own_help_of_at_most_two_screens(command, capsys):
    text = help_of(capsys, command, "--help")
    assert text.startswith(f"usage: hf-jd {command} ")
    lines = text.splitlines()
    assert len(lines) <= TWO_SCREENS
    assert max(map(len, lines)) <= 120


def test_help_shows_jacobian_descent_first_and_everything_on_request(capsys):
    text = help_of(capsys, "finetune", "--help")
    first = text.index("--jd_weighting ")
    assert all(text.index(flag) > first for flag in ("--train_file ", "--lora_r ", "--learning_rate "))
    assert "--adam_beta1 " not in text
    everything = help_of(capsys, "finetune", "--help-all")
    assert "--adam_beta1 " in everything
    assert "or `lily`, stories about Lily" in " ".join(everything.split())
