"""`--jd_blocks`: each block of parameters is weighed separately; checked against each block's brute-force Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from hf_jd import JDTrainer
from hf_jd.weighting import WEIGHTINGS, build_weighting
from tests.marks import in_turn
from tests.models import tiny_gpt2
from tests.trainer.runs import TASKS, arguments, collate, examples, flat, logged, lora, relative, run

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
INSTANCE = {"jd_objectives": "instance"}
KINDS = {"instance": INSTANCE, "group": GROUP}
FORMS: dict[str, Callable[[str], str]] = {
    "layer": lambda name: name.split(".h.")[1][0] if ".h." in name else name.rpartition(".")[0],
    "module": lambda name: name.rpartition(".")[0],
    "parameter": str,
}
PLAIN = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
STEPS, BATCH = 3, 4


def token_losses(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> tuple[Tensor, Tensor]:
    """Compute the losses in float64, like the model."""
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    losses = F.cross_entropy(outputs.logits.transpose(1, 2), shifted, reduction="none", ignore_index=-100)
    return losses, shifted != -100


def reduced(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return token_losses(outputs, labels)[0].sum() / num_items_in_batch


def trained(directory: Any, model: nn.Module, **flags: Any) -> Any:
    settings = {"per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential", "max_steps": STEPS}
    args = arguments(directory, **{**settings, **PLAIN, **flags})
    return run(model, args, examples(BATCH * STEPS), compute_loss_func=token_losses)


def objectives_of(model: nn.Module, data: list[dict[str, Any]], kind: str) -> tuple[Tensor, list[str] | None]:
    """Return the objectives [m] of an update, whose mean is Trainer's loss, and their names if they are fixed."""
    batch = collate(data)
    losses, counted = token_losses(model(batch["input_ids"], attention_mask=batch["attention_mask"]), batch["labels"])
    # Trainer's number of tokens: for GPT-2, it includes the first token, which is never predicted.
    shares = losses.masked_fill(~counted, 0).sum(1) / (batch["labels"] != -100).sum()
    if kind == "instance":
        return len(shares) * shares, None
    names = sorted({example["task"] for example in data}, key=sorted(TASKS).index)
    mine = torch.tensor([[example["task"] == name for example in data] for name in names])
    return len(names) * (mine.double() @ shares), names


def by_hand(model: nn.Module, kind: str, form: Callable[[str], str], build: Callable[[], Any]) -> nn.Module:
    """Return the model after some updates, with a separate weighting in each block."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, p in named.items():
        blocks.setdefault(form(name), []).append(p)
    assert len(blocks) > 1
    weightings = {block: build() for block in blocks}
    data = examples(BATCH * STEPS)
    for step in range(STEPS):
        objectives, names = objectives_of(model, data[BATCH * step : BATCH * (step + 1)], kind)
        rows = [torch.autograd.grad(x, list(named.values()), retain_graph=True) for x in objectives]
        rows = {p: torch.stack([row[i].flatten() for row in rows]) for i, p in enumerate(named.values())}
        for block, parameters in blocks.items():
            jacobian = torch.cat([rows[p] for p in parameters], 1)
            weighting = weightings[block]
            read = objectives.detach() if weighting.reads == "losses" else jacobian @ jacobian.T
            change = 0.1 * weighting(read, names=names) @ jacobian
            for p, part in zip(parameters, change.split([p.numel() for p in parameters]), strict=True):
                p.data -= part.view_as(p)
    return model


@pytest.mark.parametrize(("name", "kind"), in_turn(WEIGHTINGS, KINDS))
def test_each_block_has_its_own_weighting(name, kind, tmp_path):
    """This includes weightings that remember or draw: each block has a separate state."""
    if name == "krum":
        kind = INSTANCE  # This weighting needs 4 objectives, but an update has at most 3 groups.
    kind = kind["jd_objectives"]
    weights = {"weights": [0.4, 0.3, 0.2, 0.1][: 4 if kind == "instance" else 3]} if name == "constant" else {}
    given = [f"{key}={value}" for key, value in weights.items()]
    ours = trained(
        tmp_path, lora("gpt2", warm=True), jd_weighting=name, jd_weighting_args=given, jd_blocks="module", **KINDS[kind]
    )
    theirs = by_hand(lora("gpt2", warm=True), kind, FORMS["module"], lambda: build_weighting(name, **weights))
    assert relative(flat(ours.model), flat(theirs)) < 1e-8


@pytest.mark.parametrize("model", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", FORMS)
def test_blocks_equal_brute_force(blocks, kind, model, tmp_path):
    def build() -> nn.Module:
        return lora("gpt2", warm=True) if model == "lora" else tiny_gpt2()

    ours = trained(tmp_path, build(), jd_blocks=blocks, **KINDS[kind])
    theirs = by_hand(build(), kind, FORMS[blocks], lambda: build_weighting("upgrad"))
    assert relative(flat(ours.model), flat(theirs)) < 1e-8
    assert relative(flat(ours.model), flat(trained(tmp_path, build(), **KINDS[kind]).model)) > 1e-6
    assert logged(ours, "jd/against_in_worst_block").tolist() == [0.0] * STEPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", ["auto", "false"])
def test_one_block_equals_no_blocks(keep, kind, tmp_path):
    flags = {"jd_keep_rows": keep, **KINDS[kind]}
    none = trained(tmp_path, lora("gpt2", warm=True), **flags)
    args = {"per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential", "max_steps": STEPS}
    one = run(
        lora("gpt2", warm=True),
        arguments(tmp_path, **{**args, **PLAIN, **flags}),
        examples(BATCH * STEPS),
        compute_loss_func=token_losses,
        engine_options={"blocks": lambda name: "all"},
    )
    assert relative(flat(one.model), flat(none.model)) < 1e-12
    assert list(one.jd_state.blocks) == ["all"]
    assert relative(one.jd_state.gramian, none.jd_state.gramian) < 1e-12
    assert not none.jd_state.blocks
    for key in ("jd/min_gw", "jd/weight_sum", "jd/conflicts"):
        assert logged(one, key).tolist() == pytest.approx(logged(none, key).tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", FORMS)
def test_mean_by_block_equals_trainer(blocks, kind, tmp_path):
    flags = {"gradient_accumulation_steps": 3, "max_steps": 3}
    stock = run(lora("gpt2"), arguments(tmp_path, TrainingArguments, **flags), compute_loss_func=reduced)
    args = arguments(tmp_path, jd_weighting="mean", jd_blocks=blocks, **KINDS[kind], **flags)
    ours = run(lora("gpt2"), args, compute_loss_func=token_losses)
    assert relative(flat(ours.model), flat(stock.model)) < 1e-10
    assert relative(logged(ours, "loss"), logged(stock, "loss")) < 1e-6
    assert len(logged(ours, "jd/against_in_worst_block")) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_equals_one_big_batch(kind, tmp_path):
    flags = {"jd_blocks": "module", "max_steps": 3, **PLAIN, **KINDS[kind]}
    one, three = (
        run(
            lora("gpt2", warm=True),
            arguments(
                tmp_path,
                per_device_train_batch_size=6 // n,
                gradient_accumulation_steps=n,
                train_sampling_strategy="sequential",
                **flags,
            ),
            examples(18),
            compute_loss_func=token_losses,
        )
        for n in (1, 3)
    )
    assert relative(flat(three.model), flat(one.model)) < 1e-10
    assert list(three.jd_state.blocks) == list(one.jd_state.blocks)


class Two(JDTrainer):
    """Two losses (with `loss`, the second one is of the whole batch), and a part that belongs to no instance."""

    def compute_losses(self, model, inputs):
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        return {"nll": token_losses(outputs, inputs["labels"]), "size": outputs.logits.square().mean((1, 2))}


@pytest.mark.parametrize("kind", ["loss", "instance_loss", "batch"])
def test_blocks_work_with_other_kinds_of_objectives(kind, tmp_path):
    """With the mean, the update is the same as without blocks; with UPGrad, no block goes against an objective."""
    flags = {"jd_objectives": kind, "gradient_accumulation_steps": 2, "max_steps": 3}
    cls = JDTrainer if kind == "batch" else Two
    runs = [
        run(lora("gpt2", warm=True), arguments(tmp_path, jd_weighting=name, jd_blocks=blocks, **flags), cls=cls)
        for name, blocks in (("mean", "none"), ("mean", "module"), ("upgrad", "module"))
    ]
    assert relative(flat(runs[1].model), flat(runs[0].model)) < 1e-10
    assert relative(flat(runs[2].model), flat(runs[0].model)) > 1e-6
    assert logged(runs[2], "jd/against_in_worst_block").tolist() == [0.0] * 3


def test_callbacks_see_the_blocks(tmp_path):
    trainer = trained(tmp_path, lora("gpt2", warm=True), jd_blocks="layer", **GROUP)
    state, m = trainer.jd_state, len(trainer.jd_state.names)
    assert [name.rpartition(".")[2] for name in state.blocks] == ["0", "1"]
    assert state.weights.shape == (2, m)
    assert relative(sum(state.blocks.values()), state.gramian) < 1e-12
    assert all((gramian @ w).min() > -1e-12 for gramian, w in zip(state.blocks.values(), state.weights, strict=True))


def test_warmup_uses_the_mean(tmp_path):
    flags = {"jd_blocks": "layer", **GROUP}
    warm = trained(tmp_path, lora("gpt2", warm=True), jd_warmup_steps=STEPS, **flags)
    mean = trained(tmp_path, lora("gpt2", warm=True), jd_weighting="mean", **flags)
    assert relative(flat(warm.model), flat(mean.model)) < 1e-10
    assert warm.jd_state is None


def test_control_flags_act_in_each_block(tmp_path):
    """The control flags act in each block as they do without blocks."""
    flags = {"jd_blocks": "module", "jd_ascend": ["code"], "jd_normalize": "rows", "jd_preferences": ["docs=3"]}
    state = trained(tmp_path, lora("gpt2", warm=True), **flags, **GROUP).jd_state
    wanted = torch.tensor([3.0 if name == "docs" else 1.0 for name in state.names]).double()
    for gramian, weights in zip(state.blocks.values(), state.weights, strict=True):
        d = 1 / gramian.diagonal().sqrt()
        expected = d * build_weighting("upgrad", pref_vector=wanted / wanted.sum())(d.outer(d) * gramian)
        assert relative(weights, expected) < 1e-8


@pytest.mark.parametrize("weighting", ["gradvac", "pcgrad", "sdmgrad"])
def test_a_resumed_run_remembers_each_block(weighting, tmp_path):
    flags = {
        "jd_blocks": "module",
        "jd_weighting": weighting,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    whole = run(lora("gpt2", warm=True), arguments(tmp_path / "a", **flags, **GROUP), compute_loss_func=token_losses)
    args = arguments(tmp_path / "a", **flags, **GROUP)
    again = JDTrainer(
        lora("gpt2", warm=True),
        args,
        train_dataset=examples(),
        data_collator=collate,
        compute_loss_func=token_losses,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.state.global_step == 4
    assert (flat(again.model) == flat(whole.model)).all()


def test_a_run_resumed_without_blocks_warns_that_it_forgets(tmp_path, caplog):
    flags = {"jd_weighting": "gradvac", "save_strategy": "steps", "save_steps": 2, "max_steps": 2, **GROUP}
    run(lora("gpt2", warm=True), arguments(tmp_path, jd_blocks="layer", **flags))
    args = arguments(tmp_path, **{**flags, "max_steps": 3})
    trainer = JDTrainer(lora("gpt2", warm=True), args, train_dataset=examples(), data_collator=collate)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "which starts over" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"jd_blocks": "layers"}, "--jd_blocks is `layers`; choose one of `layer`"),
        ({"jd_blocks": "layer", "jd_backward": "two_pass"}, "two_pass descends weighted losses, each with one weight"),
        ({"jd_blocks": "layer", "jd_every": 2, **GROUP}, "--jd_every 2 descends weighted losses"),
    ],
)
def test_unsupported_flags_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **flags)


def test_custom_blocks_refuse_the_same_flags(tmp_path):
    args = arguments(tmp_path, jd_backward="two_pass")
    with pytest.raises(ValueError, match="two_pass descends weighted losses"):
        run(lora("gpt2"), args, engine_options={"blocks": lambda name: "all"})
