"""`hf-jd sft | dpo | reward | kto | grpo` on local files; what can't work is refused in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils import is_bitsandbytes_available
from trl import ScriptArguments

from hf_jd.cli import main
from hf_jd.commands import common as common_parts
from hf_jd.report.history import read_history
from hf_jd.report.verdict import setup
from hf_jd.trainer.trl.sft import JDSFTConfig
from tests.cli.test_cli import TWO_SCREENS

STORIES = Path(__file__).parents[2] / "examples" / "stories15m"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]
TEXT = "One day, Tom went to the park."
PAIR = {"prompt": "Once upon a time", "chosen": ", there was a girl.", "rejected": " the cat sat.", "kind": "a"}
CHAT = {"messages": [{"role": "user", "content": "Tell a story."}, {"role": "assistant", "content": TEXT}]}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
EXAMPLES = {
    "sft": {**CHAT, "kind": "a"},
    "dpo": PAIR,
    "reward": PAIR,
    "kto": {"prompt": "Once upon a time", "completion": ", there was a girl.", "label": True},
    "grpo": {"prompt": "Once upon a time", "kind": "a"},
}
GROUPS = ["--jd_objectives", "group", "--jd_group_column", "kind"]
FLAGS = {
    "sft": GROUPS,
    "dpo": [*GROUPS, "--jd_weighting", "mgda"],
    "reward": GROUPS,
    "kto": ["--jd_objectives", "group", "--jd_group_column", "label"],
    "grpo": ["--jd_objectives", "reward", "--reward_funcs", "my_rewards.short", "my_rewards.happy"]
    + ["--max_completion_length", "4", "--num_generations", "2"],
}
NAMES = {
    "sft": {"a", "b"},
    "dpo": {"a", "b"},
    "reward": {"a", "b"},
    "kto": {"False", "True"},
    "grpo": {"short", "happy"},
}
REWARDS = """
def short(completions, **columns):
    return [-float(len(text)) for text in completions]

def happy(completions, **columns):
    return [float(i % 3) for i in range(len(completions))]
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return tiny models by command, each with a tokenizer that has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "dtype": "float32"}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, **sizes, **special)
    paths = {}
    for name, cls in (("causal", LlamaForCausalLM), ("judge", LlamaForSequenceClassification)):
        paths[name] = tmp_path_factory.mktemp(name)
        cls(config).save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


def written(name, directory):
    """Write a file of the command's examples, with two groups."""
    rows = []
    for i in range(4):
        row = {**EXAMPLES[name]}
        row |= {"label": bool(i % 2)} if name == "kto" else {"kind": "ab"[i % 2]}
        rows.append(row)
    path = directory / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def common(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARDS, "utf-8")
    flags = {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none"}
    flags |= {"output_dir": "out", "lora_r": 2}
    words = ["--use_cpu", "--bf16", "false", "--use_peft", "--disable_tqdm", "true"]
    words += ["--lora_target_modules", "q_proj", "v_proj"]  # PEFT reads a single name as a pattern for whole names.
    return [*words, *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_local_file_is_trained_on(name, models, common, tmp_path, capsys):
    model = models["judge" if name == "reward" else "causal"]
    data = written(name, tmp_path)
    assert main([name, "--model_name_or_path", str(model), "--dataset_name", data, *common, *FLAGS[name]]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "Saved in out." in capsys.readouterr().out
    (log,) = [json.loads(line) for line in (tmp_path / "out" / "jd_log.jsonl").read_text().splitlines()][:1]
    assert {key.rpartition("/")[2] for key in log if key.startswith("jd/weight/")} == NAMES[name]
    assert "(LoRA, r = 2) on data.jsonl; " in setup(read_history(tmp_path / "out").facts)


def test_a_config_file_may_set_the_environment_and_mix_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_VARIABLE", "")
    mixture = [{"path": "a"}, {"path": "b", "split": "test"}]
    file = {"env": {"MY_VARIABLE": 3}, "datasets": mixture, "learning_rate": "3e-3", "lora_r": 4}
    (tmp_path / "flags.yaml").write_text(json.dumps(file))
    argv = ["--config", str(tmp_path / "flags.yaml"), "--lora_r", "5", "--use_cpu", "--bf16", "false"]
    _, args, model, mixed = common_parts.parse("sft", argv, ScriptArguments, JDSFTConfig)
    assert (args.learning_rate, model.lora_r, os.environ["MY_VARIABLE"]) == (3e-3, 5, "3")
    assert [(dataset.path, dataset.split) for dataset in mixed.datasets] == [("a", "train"), ("b", "test")]


def test_a_machine_without_an_accelerator_needs_no_flags(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    _, args, _, _ = common_parts.parse("sft", ["--output_dir", "out"], ScriptArguments, JDSFTConfig)
    assert not args.bf16
    assert not args.dataloader_pin_memory


def test_a_run_resumes_from_its_last_checkpoint(models, common, tmp_path):
    words = ["dpo", "--model_name_or_path", str(models["causal"]), "--dataset_name", written("dpo", tmp_path), *common]
    assert main([*words, "--save_steps", "1"]) == 0
    assert main([*words, "--max_steps", "2", "--resume_from_checkpoint", "last"]) == 0
    logs = (tmp_path / "out" / "jd_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logs if '"loss"' in line] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_scripts_run_under_accelerate_with_two_processes(name, models, common, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    script = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    data = ["--model_name_or_path", models["causal"], "--dataset_name", written(name, tmp_path)]
    command = [sys.executable, *launch, "--main_process_port", "0", script, *data, *common, *FLAGS[name]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    log = json.loads((tmp_path / "out" / "jd_log.jsonl").read_text().splitlines()[0])
    assert {key.rpartition("/")[2] for key in log if key.startswith("jd/weight/")} == NAMES[name]


MISTAKES = {
    "model": (["dpo", "--dataset_name", "d.jsonl"], "No model is given: name it, or its folder"),
    "flag": (["dpo", "--jd_weigthing", "upgrad"], "Unknown flag `--jd_weigthing`; the nearest is `--jd_weighting`"),
    "abbreviation": (["dpo", "--jd_weight", "mgda"], "Unknown flag `--jd_weight`; the nearest is `--jd_weighting`"),
    "other tool": (["sft", "--lr", "1e-3"], "Unknown flag `--lr`; the nearest is `--learning_rate`"),
    "config": (["sft", "--config", "no.yaml"], "The file no.yaml can't be read: No such file or directory"),
    "flag in a file": (
        ["sft", "--config", "FILE"],
        "Unknown flag `jd_weigting` in the file; the nearest is `--jd_weighting`",
    ),
    "value": (
        ["sft", "--learning_rate", "fast"],
        "Argument --learning_rate/--learning-rate: invalid float value: 'fast'.",
    ),
    "group column": (
        ["dpo", "--model_name_or_path", "m", "--dataset_name", "DATA", "--jd_objectives", "group"]
        + ["--jd_group_column", "knd"],
        "The training set has no group column `knd`; its columns are `prompt`, `chosen`, `rejected`, `kind`: choose",
    ),
    "file": (["dpo", "--model_name_or_path", "m", "--dataset_name", "no.jsonl"], "no.jsonl can't be read"),
    "column": (
        ["kto", "--model_name_or_path", "m", "--dataset_name", "GRPO"],
        "The data has no column `completion`, `label`; hf-jd kto reads prompt + completion + label, or chosen",
    ),
    "data": (["dpo", "--model_name_or_path", "m"], "No data is given: set --dataset_name"),
    "kind": (["dpo", "--model_name_or_path", "m", "--dataset_name", "my_rewards.py"], "ends in `.py`"),
    "reward": (["grpo", "--model_name_or_path", "m", "--dataset_name", "DATA"], "No reward is given"),
    "import": (
        ["grpo", "--model_name_or_path", "m", "--dataset_name", "DATA", "--reward_funcs", "nowhere.f"],
        "No module named 'nowhere': give the import path",
    ),
    "function": (
        ["grpo", "--model_name_or_path", "m", "--dataset_name", "DATA", "--reward_funcs", "my_rewards.long"],
        "which is no function",
    ),
    "no callable": (
        ["grpo", "--model_name_or_path", "m", "--dataset_name", "DATA", "--reward_funcs", "my_rewards.__name__"],
        "`my_rewards.__name__`, which is no function",
    ),
    "judge": (
        ["grpo", "--model_name_or_path", "m", "--dataset_name", "DATA", "--reward_model_name_or_path", "./no"],
        "The reward model `./no` can't be loaded: ",
    ),
    "split": (
        ["dpo", "--model_name_or_path", "m", "--dataset_name", "DATA", "--dataset_train_split", "test"],
        "The data has no split `test`; its splits are train",
    ),
    "no such model": (["dpo", "--model_name_or_path", "./m", "--dataset_name", "DATA"], "There is no folder ./m."),
    "no tokenizer": (
        ["dpo", "--model_name_or_path", "EMPTY", "--dataset_name", "DATA"],
        "model` can't be loaded: ",
    ),
    "template": (
        ["sft", "--model_name_or_path", "MODEL", "--dataset_name", "CHATS"],
        "has no chat template: choose a chat model, name a template with --chat_template_path (SFT), or use",
    ),
    "weighting": (["dpo", "--jd_weighting", "upgrade"], "--jd_weighting is `upgrade`|Unknown weighting|upgrad"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained_in_one_sentence(name, common, tmp_path, capsys):
    words, expected = MISTAKES[name]
    data = written("grpo" if words[0] == "grpo" else "dpo", tmp_path)
    words = words + (["--num_generations", "2"] if words[0] == "grpo" else [])
    (tmp_path / "flags.yaml").write_text("jd_weigting: mgda\n")
    files = {"FILE": str(tmp_path / "flags.yaml"), "DATA": data}
    files["GRPO"] = written("grpo", tmp_path) if "GRPO" in words else ""
    files |= {"MODEL": str(STORIES), "CHATS": str(tmp_path / "chats.jsonl")}
    files["EMPTY"] = str(tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    assert main([files.get(word, word) for word in words] + common) == 2
    error = capsys.readouterr().err
    assert f"hf-jd {words[0]}: error: " in error
    assert any(part in error for part in expected.split("|"))


UNREADABLE = {
    "no rows": ("dpo", "", "it is empty."),
    "not JSON": ("dpo", "{no", "can't be read: JSON parse error"),
    "numbers": (
        "dpo",
        '{"chosen": 1, "rejected": "b"}',
        "The column `chosen` of the data has to hold a text or messages, and is of type int64.",
    ),
    "no value": (
        "reward",
        '{"chosen": "a", "rejected": "b"}\n{"chosen": "a", "rejected": null}',
        "Row 1 of the data has no value in the column `rejected`: fill it in",
    ),
    "labels": (
        "kto",
        '{"prompt": "a", "completion": "b", "label": "good"}',
        "The column `label` of the data has to hold true or false, and is of type string.",
    ),
    "no completion": (
        "sft",
        '{"prompt": "a", "text": "b"}',
        "has no column `completion`; hf-jd sft reads text, or messages, or conversations, or prompt + completion, and",
    ),
    "no text": ("sft", '{"txt": "a"}', "The data has no column `text`; hf-jd sft reads"),
}


VALUES = ("numbers", "no value", "labels")  # of a stream, they aren't read in advance


@pytest.mark.parametrize(
    ("name", "streaming"),
    [(name, streaming) for name in UNREADABLE for streaming in (False, True) if not (streaming and name in VALUES)],
)
def test_unreadable_data_is_explained_in_one_sentence(name, streaming, common, tmp_path, capsys):
    command, text, expected = UNREADABLE[name]
    (tmp_path / "data.jsonl").write_text(text)
    words = [command, "--model_name_or_path", "m", "--dataset_name", str(tmp_path / "data.jsonl")]
    assert main([*words, "--dataset_streaming", str(streaming), *common]) == 2
    error = capsys.readouterr().err
    assert f"hf-jd {command}: error: " in error
    assert expected in error or (streaming and "The data can't be read: JSON parse error" in error)


def test_errors_of_trl_are_shown_in_one_sentence(common, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"text": "a cat"}\n' * 4)
    words = ["sft", "--model_name_or_path", str(STORIES), "--dataset_name", str(tmp_path / "data.jsonl")]
    assert main([*words, "--assistant_only_loss", "true", *common]) == 2
    assert "hf-jd sft: error: You set `assistant_only_loss=True`, but the dataset" in capsys.readouterr().err


def test_a_list_of_one_in_a_file_needs_no_brackets(tmp_path):
    (tmp_path / "flags.yaml").write_text(f"output_dir: {tmp_path}\nlora_target_modules: q_proj\njd_groups: code\n")
    argv = ["--config", str(tmp_path / "flags.yaml")]
    _, args, model, _ = common_parts.parse("sft", argv, ScriptArguments, JDSFTConfig)
    assert (args.jd_groups, model.lora_target_modules) == (["code"], "q_proj")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_help_fits_on_two_screens(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: hf-jd {name} ")
    assert len(lines) <= TWO_SCREENS
    assert any(line.startswith("  --dataset_name ") for line in lines)


def test_a_preference_for_an_unknown_reward_is_refused(models, common, tmp_path, capsys):
    words = ["grpo", "--model_name_or_path", str(models["causal"]), "--dataset_name", written("grpo", tmp_path)]
    assert main([*words, *common, *FLAGS["grpo"], "--jd_preferences", "shrt=2"]) == 2
    assert "`shrt`, which is no objective; the objectives are `short`, `happy`" in capsys.readouterr().err


@pytest.mark.skipif(is_bitsandbytes_available(), reason="bitsandbytes is there")
def test_four_bits_need_bitsandbytes(models, common, tmp_path, capsys):
    words = ["sft", "--model_name_or_path", str(models["causal"]), "--dataset_name", written("sft", tmp_path)]
    assert main([*words, *common, "--load_in_4bit"]) == 2
    assert "--load_in_4bit needs bitsandbytes, which is not installed or can't run here" in capsys.readouterr().err
