"""What can't be trained is refused in one sentence, before any step."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForNextSentencePrediction,
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_jd import JDArguments, JDTrainer, JDTrainingArguments
from hf_jd.gramian import RULES
from tests.models import VOCABULARY, tiny_gpt2
from tests.trainer.runs import arguments, collate, examples, flat, lora, relative, run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"jd_weighting": "upgrat"}, "Unknown weighting 'upgrat'. Choose one of upgrad, .*mgda"),
        ({"jd_weighting_args": ["speed=3"]}, "Unknown argument 'speed'"),
        ({"jd_weighting_args": ["speed"]}, "`speed`; write each argument as `name=value`"),
        ({"jd_objectives": "task"}, "--jd_objectives is `task`; choose one of .*`instance`"),
        ({"jd_objectives": "group"}, "--jd_objectives group needs --jd_group_column"),
        ({"jd_group_reduction": "sum"}, "--jd_group_reduction is `sum`"),
        ({"jd_backward": "two"}, "--jd_backward is `two`; choose one of `two_pass`, `one_pass`"),
        ({"jd_scope": "batch"}, "--jd_scope is `batch`; choose one of `micro_batch`, `global`"),
        ({"jd_ascend": ["code"]}, "--jd_ascend needs --jd_group_column"),
        ({"jd_extra_losses": "drop"}, "--jd_extra_losses is `drop`; choose one of .*`mean`"),
        ({"jd_max_non_finite": 0}, "--jd_max_non_finite is 0; give 1 or more"),
        ({"jd_keep_rows": "lots"}, "--jd_keep_rows is `lots`; give `auto`, `true`, `false`, or a size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_flags_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **flags)


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("True", True), ("false", False), ("300", 300), ("1.5GiB", 1610612736)]
)
def test_keep_rows_is_parsed(text, value, tmp_path):
    assert arguments(tmp_path, jd_keep_rows=text).keep_rows() == value


def test_every_flag_is_parsed_and_documented():
    parser = HfArgumentParser(JDTrainingArguments)
    line = (
        "--output_dir x --jd_weighting mgda --jd_objectives group --jd_group_column task --jd_groups a b --no_jd_check"
    )
    (args,) = parser.parse_args_into_dataclasses([*line.split(), "--report_to", "none", "--use_cpu"])
    assert (args.jd_weighting, args.jd_groups, args.jd_check) == ("mgda", ["a", "b"], False)
    actions = [action for action in parser._actions if any("--jd_" in option for option in action.option_strings)]
    assert len(actions) == len(fields(JDArguments))
    assert all(action.help for action in actions)


def test_arguments_without_the_flags_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use JDTrainingArguments"):
        JDTrainer(lora("gpt2"), arguments(tmp_path, TrainingArguments))


def test_an_unknown_group_to_ascend_is_refused(tmp_path):
    args = arguments(tmp_path, jd_group_column="task", jd_ascend=["coed"])
    with pytest.raises(ValueError, match="--jd_ascend names `coed`.* its groups are `chat`, `code`, `docs`"):
        run(lora("gpt2"), args)


def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no trainable parameter"):
        run(lora("gpt2").requires_grad_(False), arguments(tmp_path))


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    trainer = JDTrainer(lora("gpt2"), args, train_dataset=examples(), data_collator=collate)
    with pytest.raises(ValueError, match="DataParallel .* `accelerate launch`"):
        trainer.train()


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_the_backward_are_refused(optimizer, tmp_path):
    with pytest.raises(ValueError, match=f"`{optimizer}` steps inside the backward"):
        run(lora("gpt2"), arguments(tmp_path, optim=optimizer))


def test_a_loss_function_for_the_batch_has_no_values(tmp_path):
    args = arguments(tmp_path, jd_normalize="loss")
    with pytest.raises(ValueError, match="--jd_normalize loss needs the value of each objective"):
        run(lora("gpt2"), args, compute_loss_func=lambda outputs, *args, **kwargs: outputs.logits.mean())


def test_a_batch_without_labels_is_refused(tmp_path):
    data = [{k: v for k, v in example.items() if k != "labels"} for example in examples()]
    with pytest.raises(ValueError, match="The batch has no `labels`"):
        run(lora("gpt2"), arguments(tmp_path), data)


def test_a_model_without_a_built_in_loss_has_no_values(tmp_path):
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="--jd_normalize loss needs the value of each objective"):
        run(BertForNextSentencePrediction(config), arguments(tmp_path, jd_normalize="loss"))


def test_a_model_without_named_outputs_has_no_values(tmp_path):
    def unnamed(module, args, output):
        return output.to_tuple()

    models = []
    for args in (arguments(tmp_path, jd_weighting="mean"), arguments(tmp_path, TrainingArguments)):
        model = lora("gpt2")
        model.register_forward_hook(unnamed)
        models.append(flat(run(model, args).model))
    assert relative(*models) < 1e-10


def test_a_part_without_a_token_is_refused_on_request(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        **sizes,
        num_key_value_heads=2,
        num_local_experts=2,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    with pytest.raises(ValueError, match="a part that belongs to no token"):
        run(MixtralForCausalLM(config), arguments(tmp_path, jd_extra_losses="error"))


def test_evaluation_refuses_nothing_that_trainer_evaluates(tmp_path):
    model = lora("gpt2").requires_grad_(False)
    data = [{k: v for k, v in example.items() if k != "task"} for example in examples(4)]
    losses = [
        cls(model, args, data_collator=collate).evaluate(data)["eval_loss"]
        for cls, args in ((Trainer, arguments(tmp_path, TrainingArguments)), (JDTrainer, arguments(tmp_path)))
    ]
    assert losses[0] == losses[1]


class Scale(nn.Module):
    """A layer that no built-in rule knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight


def scaled_gpt2():
    model = tiny_gpt2().requires_grad_(False)
    model.transformer.ln_f = nn.Sequential(model.transformer.ln_f, Scale())
    return model


def test_a_rule_reaches_the_engine(tmp_path):
    used = []

    def rule(module, x, grad_output, segments):
        used.append(type(module))
        return RULES[nn.LayerNorm](module, x, grad_output, segments)

    rules = {**RULES, nn.LayerNorm: rule}
    model = tiny_gpt2()
    trainer = JDTrainer(
        model,
        arguments(tmp_path, max_steps=1),
        train_dataset=examples(),
        data_collator=collate,
        engine_options={"rules": rules},
    )
    trainer.train()
    assert used


def test_a_rules_error_is_raised(tmp_path):
    def rule(module, x, grad_output, segments):
        raise RuntimeError("the rule's own error")

    with pytest.raises(RuntimeError, match="the rule's own error"):
        JDTrainer(
            scaled_gpt2(),
            arguments(tmp_path, max_steps=1),
            train_dataset=examples(),
            data_collator=collate,
            engine_options={"rules": {**RULES, Scale: rule}},
        ).train()
