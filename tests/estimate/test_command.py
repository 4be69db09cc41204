from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from hf_jd.cli import main
from hf_jd.estimate.cases import PARALLELISMS, Case
from hf_jd.estimate.hardware import HARDWARE
from hf_jd.estimate.shapes import build_on_meta, shape_of
from hf_jd.estimate.timing import Assumptions, plain_time, step_time
from hf_jd.estimate.traffic import plain_bytes, step_bytes
from tests.estimate.counted import CONFIGS
from tests.releases import needs


@pytest.fixture
def config(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_and_its_config_file_give_the_same(config, capsys):
    assert main(["estimate", "--model", str(config), "--lora", "4"]) == 0
    folder = capsys.readouterr().out
    assert main(["estimate", "--model", str(config / "config.json"), "--lora", "4"]) == 0
    assert capsys.readouterr().out == folder
    assert "LlamaForCausalLM" in folder
    assert "nothing: one process" in folder


def test_the_model_has_the_flag_of_other_commands(config, capsys):
    assert main(["estimate", "--model_name_or_path", str(config)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert main(["estimate"]) == 2
    assert "No model is given: name its configuration with --model." in capsys.readouterr().err
    assert main(["estimate", "--modle", str(config)]) == 2
    assert "Unknown flag `--modle`; the nearest is `--model`." in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora", "0"], "--lora is 0; give at least 1."),
        (["--processes", "0"], "--processes is 0; give at least 1."),
        (["--groups", "-1"], "--groups is -1; give the number of groups, or 0 for instances."),
        (["--hardware", "h20"], "--hardware is `h20`; choose one of h200, h100, a100."),
        (["--parallelism", "fsdp", "--processes", "2"], "--parallelism is `fsdp`; choose one of ddp, fsdp2"),
        (["--parallelism", "fsdp2"], "--parallelism fsdp2 needs --processes 2 or more."),
        (["--efficiency", "40"], "--efficiency is 40.0; give a share"),
        (["--dtype", "int4"], "--dtype is `int4`; choose one of"),
        (["--lora_r", "4"], "Unknown flag `--lora_r`; the nearest is `--lora`."),
        (["--per_device_train_batch_size", "4"], "the nearest is `--batch`."),
        (["--jd_backward", "two_pass"], "the nearest is `--two_pass`."),
        (["--procesess", "2"], "Unknown flag `--procesess`; the nearest is `--processes`."),
    ],
)
def test_bad_flags_are_refused(flags, message, config, capsys):
    assert main(["estimate", "--model", str(config), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no json", "[]", json.dumps({"hidden_size": 3}), json.dumps({"model_type": "x"})])
def test_a_file_that_is_no_configuration_is_refused(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert main(["estimate", "--model", str(tmp_path)]) == 2
    assert "is no transformers configuration" in capsys.readouterr().err


def test_a_missing_folder_is_refused(tmp_path, capsys):
    assert main(["estimate", "--model", str(tmp_path / "none")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["estimate", "--model", str(tmp_path / "empty")]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_a_model_is_required(capsys):
    assert main(["estimate"]) == 2
    assert "--model" in capsys.readouterr().err


def test_one_process_sends_nothing():
    shape = shape_of(build_on_meta(CONFIGS["llama"], 3))
    assert step_bytes(shape, Case(batch=4, tokens=8)) == plain_bytes(shape, Case(batch=4, tokens=8)) == 0


@pytest.mark.parametrize("parallelism", PARALLELISMS)
@pytest.mark.parametrize("groups", [None, 3])
def test_a_step_is_never_cheaper_than_a_plain_one(parallelism, groups):
    shape = shape_of(build_on_meta(CONFIGS["llama"], 3))
    two_pass = PARALLELISMS[parallelism].owns_backward
    case = Case(8, 64, processes=4, groups=groups, parallelism=parallelism, two_pass=two_pass)
    plain, step = (time(shape, case, HARDWARE["h200"], Assumptions()) for time in (plain_time, step_time))
    assert step.computing >= plain.computing
    assert step.total > plain.total
    assert step_bytes(shape, case) > plain_bytes(shape, case)


def test_zero_takes_two_passes(config, capsys):
    assert main(["estimate", "--model", str(config), "--parallelism", "zero2", "--processes", "2"]) == 0
    assert "two passes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["bert", "vit", "t5", "bart", "gemma3", "mixtral", "qwen2_moe", "gpt_oss", "mamba", "clip", "llava", "opt"]
)
def test_other_architectures_are_estimated(name, tmp_path, capsys):
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    assert main(["estimate", "--model", str(tmp_path), "--full", "--groups", "2", "--processes", "2"]) == 0
    assert "parameters, trained: all" in capsys.readouterr().out


@needs("peft", "0.20", "adapters of fused experts where all linear layers have one")
def test_the_cost_of_adapters_on_experts_is_stated(tmp_path, capsys):
    CONFIGS["mixtral"].save_pretrained(tmp_path)
    assert main(["estimate", "--model", str(tmp_path)]) == 0
    assert "experts' adapters take one backward pass per objective" in capsys.readouterr().out


def test_a_model_that_is_no_transformer_is_refused(tmp_path, capsys):
    AutoConfig.for_model("resnet").save_pretrained(tmp_path)
    assert main(["estimate", "--model", str(tmp_path), "--full"]) == 2
    assert "costs can only be estimated for transformers" in capsys.readouterr().err
    assert main(["estimate", "--model", str(tmp_path)]) == 2
    assert "LoRA can't be added" in capsys.readouterr().err
