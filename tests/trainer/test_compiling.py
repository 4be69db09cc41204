"""`--torch_compile`: a compiled model trains as it does without, and is a plain model afterwards."""

from __future__ import annotations

import pytest
from accelerate.utils import DynamoBackend

from hf_jd import JDTrainer
from tests.models import tiny_llama
from tests.trainer.runs import arguments, collate, examples, flat, lora, relative, run, stock
from tests.trainer.test_lifecycle import hooks


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"jd_objectives": "group", "jd_group_column": "task"}], ids=["instance", "group"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_like_a_plain_one(own, tmp_path):
    flags = {"max_steps": 2, "jd_weighting": "upgrad", **own}
    plain = run(lora("gpt2", warm=True), arguments(tmp_path, **flags))
    compiled = arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **flags)
    assert relative(flat(run(lora("gpt2", warm=True), compiled).model), flat(plain.model)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("build", [lambda: lora("llama", warm=True), tiny_llama], ids=["lora", "full"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_with_its_own_loss_is_split(build, tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1, "optim": "sgd"}
    theirs = stock(build(), tmp_path, **compiled)  # Its code must not run for a model with the engine's hooks.
    mean = run(build(), arguments(tmp_path, jd_weighting="mean", **compiled))
    assert relative(flat(mean.model), flat(theirs.model)) < 1e-6
    flags = {"jd_weighting": "upgrad", "jd_objectives": "group", "jd_group_column": "task"}
    eager = run(build(), arguments(tmp_path, max_steps=1, optim="sgd", **flags))
    trainer = run(build(), arguments(tmp_path, **compiled, **flags))
    assert relative(flat(trainer.model), flat(eager.model)) < 1e-6
    assert len(trainer.jd_state.gramian) > 1
    assert trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    assert not any(module._compiled_call_impl for module in trainer.model.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_trained_again(tmp_path):
    finals = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        args = arguments(tmp_path, max_steps=2, **compiled)
        trainer = JDTrainer(lora("gpt2", warm=True), args, train_dataset=examples(), data_collator=collate)
        losses = []
        for _ in range(2):
            trainer.train()
            assert not any(hooks(trainer.model).values())
            losses.append(trainer.evaluate(examples(4))["eval_loss"])
        stock(trainer.model, tmp_path, max_steps=1, **compiled)
        trainer.train()
        finals.append((flat(trainer.model), losses))
    assert relative(finals[1][0], finals[0][0]) < 1e-9
    assert finals[1][1] == pytest.approx(finals[0][1], rel=1e-6)
