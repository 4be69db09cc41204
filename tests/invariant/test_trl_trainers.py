"""With the mixin, `mean` equals each of TRL's own trainers: parameters, and everything that is logged."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, TrainerCallback, set_seed

from hf_jd import JDTrainerMixin
from hf_jd.arguments import JDArguments
from tests.marks import slow
from tests.models import tiny_llama
from tests.trainer.runs import DESCENT, arguments, flat, relative

pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "stories15m")
WORDS = "the cat was big and happy with her red ball in a park one day when mom said hello to tom"
SIZES = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 64, "pad_token_id": TOKENIZER.pad_token_id}
GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
# TRL switches activation checkpointing on and off with names that transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
# Micro-batches of 4, 4 and 3: the second update has only one.
EXAMPLES, STEPS = 11, 2


def words(seed: int, n: int) -> str:
    known = WORDS.split()
    picked = torch.randint(len(known), (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(known[i] for i in picked.tolist())


def dataset(example: Callable[[int], dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{"prompt": words(i, 4), "task": "ab"[i % 2], **example(i)} for i in range(EXAMPLES)])


PROMPTS = dataset(lambda i: {})
TEXTS = dataset(lambda i: {"completion": " " + words(100 + i, 3 + i % 3)})
JUDGED = dataset(lambda i: {"completion": " " + words(100 + i, 3 + i % 3), "label": bool(i % 3)})
PAIRS = dataset(lambda i: {"chosen": " " + words(100 + i, 3 + i % 3), "rejected": " " + words(200 + i, 2 + i % 4)})


TARGETS = ("q_proj", "v_proj", "down_proj")


def adapted(model: nn.Module, task: str = "CAUSAL_LM", targets: Sequence[str] = TARGETS) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=[*targets], init_lora_weights=False, task_type=task))


def full() -> nn.Module:
    return tiny_llama(**SIZES).float()


def lora() -> nn.Module:
    return adapted(full())


def judge() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), **SIZES, "num_labels": 1, "dtype": "float32"})
    return adapted(LlamaForSequenceClassification(config), "SEQ_CLS")


def by_length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def by_position(completions: list[str], **columns: Any) -> list[float]:
    """Give a prompt's completions different rewards, since a completion with an advantage of 0 is no objective."""
    return [100.0 * (i % 5) for i in range(len(completions))]


class Case(NamedTuple):
    """One of TRL's trainers.

    Attributes:
        trainer: Its class.
        config: The class of its arguments.
        data: Its training set.
        flags: Its arguments.
        objectives: The number of instances that each update weighs.
        build: Builds the model.
        settings: Further arguments of the trainer.
        groups: Whether batches hold the examples' groups.
    """

    trainer: type
    config: type
    data: Dataset
    flags: dict[str, Any] = {}
    objectives: tuple[int, ...] = (8, 3)
    build: Callable[[], nn.Module] = lora
    settings: dict[str, Any] = {}
    groups: bool = True


REWARDED = {"reward_funcs": [by_length, by_position]}
GENERATED = {"num_generations": 2, "max_completion_length": 6}
OFF_POLICY = {**GENERATED, "num_iterations": 2, "steps_per_generation": 4, "beta": 0.1, "max_steps": 6}
PACKED = {"packing": True, "max_length": 24, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
CASES = {
    "SFT": Case(SFTTrainer, SFTConfig, TEXTS),
    "SFT-full": Case(SFTTrainer, SFTConfig, TEXTS, build=full),
    "SFT-packed": Case(SFTTrainer, SFTConfig, TEXTS, PACKED, groups=False),
    "DPO": Case(DPOTrainer, DPOConfig, PAIRS),
    "DPO-full": Case(DPOTrainer, DPOConfig, PAIRS, build=full, settings={"ref_model": full()}),
    "DPO-two-losses": Case(DPOTrainer, DPOConfig, PAIRS, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "Reward": Case(RewardTrainer, RewardConfig, PAIRS, build=judge),
    "KTO": Case(KTOTrainer, KTOConfig, JUDGED),
    "GRPO": Case(GRPOTrainer, GRPOConfig, PROMPTS, GENERATED, (8, 8), settings=REWARDED, groups=False),
    "GRPO-off-policy": Case(GRPOTrainer, GRPOConfig, PROMPTS, OFF_POLICY, (8,) * 6, settings=REWARDED, groups=False),
    "RLOO": Case(RLOOTrainer, RLOOConfig, PROMPTS, GENERATED, (8, 8), settings=REWARDED, groups=False),
    "ORPO": Case(ORPOTrainer, ORPOConfig, PAIRS),
    "CPO": Case(CPOTrainer, CPOConfig, PAIRS),
}
KINDS = {"instance": {}, "group": GROUP, "batch": {"jd_objectives": "batch"}}
CHOICES = [
    (pytest.param if kind == ("group" if case.groups else "instance") else slow)(name, kind, id=f"{name}-{kind}")
    for name, case in CASES.items()
    for kind in KINDS
    if kind != "group" or case.groups
]


@dataclass
class Watch(TrainerCallback):
    """A callback that records how many objectives each update weighed."""

    trainer: Any

    def __post_init__(self):
        self.objectives = []

    def on_step_end(self, args, state, control, **kwargs):
        self.objectives.append(len(self.trainer.jd_state.weights))


def trained(case: Case, directory: Path, ours: bool, **flags: Any) -> tuple[Any, list[int]]:
    cls, config = case.trainer, case.config
    if ours:
        cls = type(f"JD{cls.__name__}", (JDTrainerMixin, cls), {})
        config = make_dataclass(f"JD{config.__name__}", [], bases=(JDArguments, config))
        flags = {"jd_weighting": "mean", **flags}
    set_seed(0)
    args = arguments(directory, config, **{**DESCENT, "max_steps": STEPS, **case.flags, **flags})
    trainer = cls(model=case.build(), args=args, train_dataset=case.data, processing_class=TOKENIZER, **case.settings)
    watch = Watch(trainer)
    if ours:
        trainer.add_callback(watch)
    trainer.train()
    return trainer, watch.objectives


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Train a case with TRL's own trainer, once."""
    runs: dict[str, Any] = {}

    def train(name: str) -> Any:
        if name not in runs:
            runs[name] = trained(CASES[name], tmp_path_factory.mktemp("stock"), ours=False)[0]
        return runs[name]

    return train


def measured(trainer: Any) -> list[dict[str, Any]]:
    """Return the logs, without times."""
    return [
        {key: value for key, value in entry.items() if "time" not in key and not key.endswith("per_second")}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize(("name", "kind"), CHOICES)
def test_mean_equals_trls_trainer(name, kind, stock, tmp_path):
    case, theirs = CASES[name], stock(name)
    ours, objectives = trained(case, tmp_path, ours=True, **KINDS[kind])
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(flat(theirs.model), flat(case.build())) > 1e-4
    assert len(measured(ours)) == len(measured(theirs)) > STEPS
    for our, their in zip(measured(ours), measured(theirs), strict=True):
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-4, abs=1e-6)
    micro_batches = [2 if instances == 8 else 1 for instances in case.objectives]
    expected = {"instance": list(case.objectives), "group": [2, 2], "batch": micro_batches}[kind]
    if name == "SFT-packed":
        rows = len(ours.train_dataset)
        assert 4 <= rows <= 6
        assert sum(objectives) == (EXAMPLES if kind == "instance" else rows)
    else:
        assert objectives == expected


@pytest.mark.parametrize("flags", [GROUP, {"jd_group_column": "task"}], ids=["group", "grouped"])
def test_list_batches_have_no_groups(flags, tmp_path):
    with pytest.raises(ValueError, match="returned a list, which can't hold the group ids of --jd_group_column"):
        trained(CASES["GRPO"], tmp_path, ours=True, **flags)


@pytest.mark.parametrize("name", ["GRPO", "DPO", "Reward"])
def test_evaluation_equals_trls(name, tmp_path):
    case = CASES[name]
    settings = {**case.settings, "eval_dataset": case.data}
    case = case._replace(settings=settings, flags={**case.flags, "eval_strategy": "steps", "eval_steps": 1})
    theirs, _ = trained(case, tmp_path, ours=False, per_device_eval_batch_size=2)
    grouped = {"jd_group_column": "task"} if case.groups else {}
    ours, _ = trained(case, tmp_path, ours=True, per_device_eval_batch_size=2, **grouped)
    assert sum("eval_loss" in entry for entry in measured(theirs)) == STEPS
    for our, their in zip(measured(ours), measured(theirs), strict=True):
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-4, abs=1e-6)
