"""Run every Python block of the documents.

CONTEXTS gives a block that is a fragment the smallest context in which it runs. A fragment without a context fails.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Trainer,
)

from hf_jd.finetune.tokens import PLAIN_TEMPLATE
from tests.docs.blocks import Block, blocks
from tests.models import tiny_llama

BLOCKS = list(blocks("python", "diff"))
STORIES = str(Path(__file__).parents[2] / "examples" / "stories15m")


def training() -> dict[str, Any]:
    rows = [{"input_ids": [1, 2 + i, 3], "labels": [1, 2 + i, 3], "task": f"t{i % 2}"} for i in range(4)]
    return {"model": tiny_llama(), "data": Dataset.from_list(rows)}


def regression() -> dict[str, Any]:
    def per_instance_losses(outputs, targets):
        return (outputs - targets).square().mean(1)

    model = nn.Linear(3, 1)
    values = {"model": model, "inputs": torch.randn(4, 3), "targets": torch.randn(4, 1)}
    return values | {"per_instance_losses": per_instance_losses}


def gramian() -> dict[str, Any]:
    rows = torch.randn(3, 5)
    return {"gramian": rows @ rows.T}


def trainer_class() -> dict[str, Any]:
    from hf_jd import JDTrainer

    return {"JDTrainer": JDTrainer}


def classifying() -> dict[str, Any]:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_labels": 3}
    rows = [{"input_ids": [3 + i, 4, 5], "labels": i % 3} for i in range(8)]
    return {"model": BertForSequenceClassification(BertConfig(num_attention_heads=2, **sizes)), "data": rows}


def trainer_classes() -> dict[str, Any]:
    from hf_jd import JDTrainerMixin

    return {"JDTrainerMixin": JDTrainerMixin, "Trainer": Trainer}


def trl() -> dict[str, Any]:
    pytest.importorskip("trl")
    texts = ["Once upon a time, there was a girl.", "Tom went to the park."]
    data = Dataset.from_list([{"text": text, "task": f"t{i}"} for i, text in enumerate(texts)])
    return {
        "data": data,
        "lora": LoraConfig(r=2, target_modules=["q_proj"]),
        "replace": {"my-model": STORIES, 'out"': 'out", use_cpu=True'},
    }


@cache
def adapter_folder() -> str:
    """Return the folder of an adapter like those that `hf-jd finetune` saves."""
    folder = mkdtemp()
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def adapter() -> dict[str, Any]:
    return {"replace": {'"runs/mine"': repr(adapter_folder()), "max_new_tokens=20": "max_new_tokens=2"}}


def generating() -> dict[str, Any]:
    pytest.importorskip("trl")
    data = Dataset.from_list([{"prompt": "Once upon a time"}, {"prompt": "One day"}])
    short = 'out", use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=8, num_generations=4'
    return {
        "prompts": data,
        "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "replace": {"my-model": STORIES, 'out"': short, "length=32": "length=4"},
    }


def preferring() -> dict[str, Any]:
    pytest.importorskip("trl")
    pair = {"prompt": "Once upon a time", "chosen": ", there was a girl.", "rejected": " the cat."}
    return {
        "pairs": Dataset.from_list([{**pair, "kind": kind} for kind in "abab"]),
        "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "replace": {"my-model": STORIES, 'out"': 'out", use_cpu=True, bf16=False, max_steps=1'},
    }


def encoding() -> dict[str, Any]:
    pytest.importorskip("sentence_transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer, path = AutoTokenizer.from_pretrained(STORIES), tempfile.mkdtemp()
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return {"replace": {"my-encoder": path, '"out"': '"out", use_cpu=True, report_to="none", max_steps=2'}}


# By page, and by the beginning of one of the block's lines.
CONTEXTS: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
    ("README.md", "trainer = JDTrainer(model"): training,
    ("from_torchjd.md", "engine = Engine(model)  # once"): regression,
    ("tutorial.md", 'messages = [{"role": "user"'): adapter,
    ("use_the_result.md", "model = AutoPeftModelForCausalLM"): adapter,
    ("index.md", "trainer = JDTrainer(model"): training,
    ("trainer.md", "trainer = JDTrainer(model"): training,
    ("trainer.md", "class Mine(JDTrainer)"): trainer_class,
    ("trainer.md", 'trainer = JDSFTTrainer("my-model"'): trl,
    ("your_trainer.md", "import torch.nn.functional as F"): classifying,
    ("your_trainer.md", "class JDPairs(JDTrainerMixin, Trainer)"): trainer_classes,
    ("trl.md", 'trainer = JDDPOTrainer("my-model"'): preferring,
    ("rewards.md", 'trainer = JDGRPOTrainer("my-model"'): generating,
    ("embeddings.md", "model = SentenceTransformer("): encoding,
    ("weightings.md", "weights = UPGradWeighting()(gramian)"): gramian,
}


def context(block: Block) -> dict[str, Any]:
    matches = [
        make for (page, start), make in CONTEXTS.items() if page == block.page and f"\n{start}" in f"\n{block.code}"
    ]
    assert len(matches) <= 1
    return matches[0]() if matches else {}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.filterwarnings("ignore:.*pin_memory")  # Trainer's default, without a GPU
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
def test_a_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = context(block)
    code = block.code
    for old, new in names.pop("replace", {}).items():
        code = code.replace(old, new)
    torch.manual_seed(0)
    exec(compile(code, str(block), "exec", dont_inherit=True), {"__name__": "__main__", **names})


def test_every_context_has_its_block():
    for page, start in CONTEXTS:
        assert any(block.page == page and f"\n{start}" in f"\n{block.code}" for block in BLOCKS), (page, start)
