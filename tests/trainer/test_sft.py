"""With `mean`, JDSFTTrainer equals TRL's SFTTrainer: parameters and everything that is logged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, HfArgumentParser, MixtralConfig, MixtralForCausalLM

import hf_jd
from hf_jd import JDTrainingArguments
from tests.marks import slow
from tests.models import tiny_llama
from tests.trainer.runs import arguments, flat, logged, relative

trl = pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
SFTConfig, SFTTrainer = trl.SFTConfig, trl.SFTTrainer
JDSFTConfig, JDSFTTrainer = hf_jd.JDSFTConfig, hf_jd.JDSFTTrainer

ROOT = Path(__file__).parents[2]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "examples" / "stories15m")
TEXTS = [
    ("Once upon a time", ", there was a little girl."),
    ("Tom went to the park", " with his mom. He was happy."),
    ("1 + 2 =", " 3"),
    ("Lily was very sad.", " She wanted to play with her big red ball."),
    ("2 + 2 =", " 4"),
    ("The sun", " was hot, and the cat was big."),
    ("3 + 2 =", " 5, and 2 + 3 is too."),
]
DATA = Dataset.from_list([{"prompt": p, "completion": c, "task": f"t{i % 3}"} for i, (p, c) in enumerate(TEXTS)])
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


def llama(**config) -> nn.Module:
    return tiny_llama(vocab_size=len(TOKENIZER), max_position_embeddings=64, **config)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 3, "router_aux_loss_coef": 0.1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=len(TOKENIZER), **sizes, **experts))


def trained(cls: type, model: nn.Module, directory: Path, data: Dataset = DATA, **settings) -> SFTTrainer:
    config = JDSFTConfig if cls is JDSFTTrainer else SFTConfig
    common = {"gradient_accumulation_steps": 2, "max_steps": 10, "learning_rate": 1e-3, "max_length": 64}
    plain = {"gradient_checkpointing": False, "bf16": False}
    args = arguments(directory, config, **{**common, **plain, **settings})
    torch.manual_seed(0)
    trainer = cls(model, args, train_dataset=data, processing_class=TOKENIZER)
    trainer.train()
    return trainer


def is_sft(build, directory: Path, **settings) -> tuple[SFTTrainer, SFTTrainer]:
    jd_flags = {key: settings.pop(key) for key in list(settings) if key.startswith("jd_")}
    theirs = trained(SFTTrainer, build(), directory, **settings)
    ours = trained(JDSFTTrainer, build(), directory, jd_weighting="mean", **jd_flags, **settings)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(flat(theirs.model), flat(build())) > 1e-3
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, key).tolist() == pytest.approx(logged(theirs, key).tolist(), rel=1e-5, abs=1e-6), key
        assert len(logged(ours, key)) == 10
    return ours, theirs


KINDS = {"instance": {"jd_objectives": "instance"}, "group": {"jd_objectives": "group", "jd_group_column": "task"}}


def build_lora() -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(llama(), LORA)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_equals_sft_with_lora(kind, tmp_path):
    ours, _ = is_sft(build_lora, tmp_path, **KINDS[kind])
    assert len(ours.jd_state.gramian) > 1


@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor:FutureWarning")
@pytest.mark.parametrize(
    "flags",
    [
        {"completion_only_loss": False},
        {"label_smoothing_factor": 0.1},
        {"loss_type": "dft"},
        {"jd_backward": "two_pass"},
        {"gradient_checkpointing": True},
        {"optim": "sgd", "learning_rate": 1.0},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_mean_equals_sft_with_flags(flags, tmp_path):
    is_sft(build_lora, tmp_path, **flags)


def test_losses_of_dft_are_logged_by_group(tmp_path):
    ours, _ = is_sft(build_lora, tmp_path, loss_type="dft", **KINDS["group"])
    for entry in ours.state.log_history[:-1]:
        of_groups = [value for key, value in entry.items() if key.startswith("jd/loss/")]
        assert min(of_groups) <= entry["loss"] <= max(of_groups)


def test_metrics_count_once_if_rows_do_not_fit(tmp_path):
    is_sft(build_lora, tmp_path, jd_keep_rows="100", jd_when_full="micro_batch")


@pytest.mark.filterwarnings("ignore:.*further passes now")
@pytest.mark.parametrize("tied", [slow(False), True])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_equals_sft_with_a_trained_head(kind, tied, tmp_path, caplog):
    is_sft(lambda: llama(tie_word_embeddings=tied), tmp_path, **KINDS[kind], jd_check=False)
    assert caplog.text.count("one more forward pass without gradient") == 1


@pytest.mark.filterwarnings("ignore:.*further passes now")
def test_mean_equals_sft_with_a_trained_head_and_noise(tmp_path):
    is_sft(lambda: llama(attention_dropout=0.3), tmp_path, neftune_noise_alpha=5.0, jd_check=False)


def test_mean_equals_sft_with_a_saved_head(tmp_path):
    def build():
        torch.manual_seed(1)
        return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))

    ours, _ = is_sft(build, tmp_path)
    assert any(p in ours.engine()._coverage.names for n, p in ours.model.named_parameters() if "lm_head" in n)


def test_mean_equals_sft_with_a_prompt(tmp_path):
    def build():
        torch.manual_seed(1)
        return get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))

    with pytest.warns(UserWarning, match="further passes now"):
        is_sft(build, tmp_path)


@pytest.mark.filterwarnings("ignore:.*further passes now")
def test_mean_equals_sft_with_a_balancing_loss(tmp_path):
    # TRL averages it over the micro-batches, as JDTrainer does.
    ours, theirs = is_sft(mixtral, tmp_path)
    assert relative(logged(ours, "aux_loss"), logged(theirs, "aux_loss")) < 1e-5


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [slow("instance", "bfd"), ("instance", "wrapped"), slow("group", "bfd"), ("group", "bfd_split")],
)
def test_mean_equals_sft_with_packing(kind, strategy, tmp_path):
    flags = {"packing": True, "packing_strategy": strategy, "max_length": 16, "shuffle_dataset": kind == "group"}
    ours, theirs = is_sft(build_lora, tmp_path, **flags, **KINDS[kind])
    assert ours.train_dataset["input_ids"][:] == theirs.train_dataset["input_ids"][:]


def test_packed_documents_are_instances(tmp_path):
    settings = {"jd_weighting": "upgrad", "per_device_train_batch_size": len(DATA), "gradient_accumulation_steps": 1}
    padded = trained(JDSFTTrainer, build_lora(), tmp_path, max_steps=3, **settings)
    free = trained(JDSFTTrainer, build_lora(), tmp_path, max_steps=3, padding_free=True, max_length=None, **settings)
    assert free.jd_state.gramian.shape == (len(DATA), len(DATA))
    assert relative(flat(free.model), flat(padded.model)) < 1e-5
    packed = trained(JDSFTTrainer, build_lora(), tmp_path, max_steps=1, packing=True, jd_weighting="upgrad")
    assert len(packed.jd_state.gramian) == len(DATA)


def test_documents_without_padding_have_their_groups(tmp_path):
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 3, **KINDS["group"]}
    padded = trained(JDSFTTrainer, build_lora(), tmp_path, **settings)
    free = trained(JDSFTTrainer, build_lora(), tmp_path, padding_free=True, max_length=None, **settings)
    assert relative(flat(free.model), flat(padded.model)) < 1e-5


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.parametrize("accumulation", [slow(1), 2])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_equals_padding(kind, accumulation, strategy, tmp_path):
    # Every update has all documents, in some order.
    settings = {"jd_weighting": "upgrad", "max_steps": 3, **KINDS[kind], "jd_group_column": "task"}
    padded = trained(JDSFTTrainer, build_lora(), tmp_path, per_device_train_batch_size=len(DATA), **settings)
    packing = {"packing": True, "packing_strategy": strategy, "max_length": 24, "shuffle_dataset": True}
    rows = {"per_device_train_batch_size": 6 // accumulation, "gradient_accumulation_steps": accumulation}
    packed = trained(JDSFTTrainer, build_lora(), tmp_path, **packing, **rows, **settings)
    assert 3 < len(packed.train_dataset) <= 6
    assert len(packed.jd_state.gramian) == (3 if kind == "group" else len(DATA))
    assert relative(flat(packed.model), flat(padded.model)) < 1e-5
    for task in ("t0", "t1", "t2"):
        assert relative(logged(packed, f"jd/loss/{task}"), logged(padded, f"jd/loss/{task}")) < 1e-5


def test_truncated_packed_documents_keep_their_groups(tmp_path):
    settings = {"packing": True, "max_length": 12, "max_steps": 1, "per_device_train_batch_size": 50, **KINDS["group"]}
    for strategy, tokens in (("bfd", 12 * len(DATA)), ("bfd_split", None)):
        trainer = trained(JDSFTTrainer, build_lora(), tmp_path, packing_strategy=strategy, **settings)
        for row in trainer.train_dataset:
            assert len(row["task"]) == len(row["seq_lengths"])
        assert trainer.jd_state.names == ["t0", "t1", "t2"]
        assert tokens is None or sum(len(row["input_ids"]) for row in trainer.train_dataset) <= tokens


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"packing_strategy": "wrapped"}, "--packing_strategy wrapped cuts documents .*`task`: use bfd"),
        (
            {"jd_sampler": "stratified"},
            "--jd_sampler stratified orders the examples .* a row of --packing holds several",
        ),
        ({"jd_group_column": "topic"}, "no group column `topic`; its columns are .*`task`"),
    ],
    ids=["wrapped", "stratified", "missing"],
)
def test_packing_that_loses_groups_is_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(JDSFTTrainer, build_lora(), tmp_path, packing=True, **{**KINDS["group"], **flags})


def test_rows_are_instances(tmp_path):
    trainer = trained(JDSFTTrainer, build_lora(), tmp_path, jd_weighting="upgrad", max_steps=1)
    assert trainer.jd_state.gramian.shape == (4, 4)


@pytest.mark.filterwarnings(
    "ignore:.*label_smoothing_factor:FutureWarning", "ignore:`return_outputs=True`:FutureWarning"
)
@pytest.mark.parametrize("flags", [{}, {"label_smoothing_factor": 0.1}, {"prediction_loss_only": False}], ids=str)
def test_each_groups_loss_is_evaluated(flags, tmp_path):
    data = DATA.map(lambda example: {**example, "task": "all"})
    settings = {"jd_group_column": "task", "per_device_eval_batch_size": len(DATA), "prediction_loss_only": True}
    trainer = trained(JDSFTTrainer, build_lora(), tmp_path, data, max_steps=1, **{**settings, **flags})
    metrics = trainer.evaluate(data)
    assert metrics["eval_all_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert metrics["eval_mean_token_accuracy"] >= 0


def test_arguments_of_another_class_are_refused(tmp_path):
    args = JDTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="use JDSFTConfig"):
        JDSFTTrainer(llama(), args, train_dataset=DATA, processing_class=TOKENIZER)


def test_the_flags_are_parsed_and_documented(tmp_path):
    parser = HfArgumentParser(JDSFTConfig)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--jd_weighting", "mgda", "--packing", "--use_cpu", "--bf16", "false"]
        + ["--gradient_checkpointing", "false"]
    )
    assert (args.jd_weighting, args.packing) == ("mgda", True)
    assert "The method that weighs objectives from" in parser.format_help()


def test_without_trl_everything_else_works_and_the_error_says_what_to_install():
    code = "import sys; sys.modules['trl'] = None\nimport hf_jd; hf_jd.JDTrainer; print('works')\nhf_jd.JDSFTTrainer"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "works\n"
    assert "pip install 'hf-jd[trl]'" in done.stderr.splitlines()[-1]
