"""What users can set between G and w: preferences, normalisation, and at which updates to weigh."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from hf_jd import JDTrainer
from hf_jd.gramian import Engine
from hf_jd.trainer.step.control import Control
from hf_jd.weighting import MeanWeighting, SDMGradWeighting, UPGradWeighting
from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, relative, run, stock
from tests.trainer.tasks import TABLE, examples_of, model_of
from tests.trainer.tasks import collate as collate_task

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
NAMES = ["chat", "code", "docs"]


def gramian(m: int = 3, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(m, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ rows.T


def control(tmp_path, weighting=None, **flags) -> Control:
    args = arguments(tmp_path, **{**GROUP, **flags})
    return Control(args, weighting or args.build_weighting(), NAMES)


def test_preferences_are_shares_of_the_groups_present(tmp_path):
    steered = control(tmp_path, jd_preferences=["code=4", "docs=0"])
    losses = torch.ones(3).double()
    actual = steered.weights(gramian(), losses, NAMES, step=0)
    assert torch.allclose(actual, UPGradWeighting([0.2, 0.8, 0.0])(gramian()), rtol=1e-12, atol=0)
    actual = steered.weights(gramian(2), losses[:2], ["docs", "code"], step=0)
    assert torch.allclose(actual, UPGradWeighting([0.0, 1.0])(gramian(2)), rtol=1e-12, atol=0)
    assert steered.weights(gramian(1), losses[:1], ["docs"], step=0).tolist() == [0]


def test_preferences_keep_a_weightings_memory(tmp_path):
    few = ["n_iter=1", "lr=0.1"]
    steered = control(tmp_path, jd_weighting="sdmgrad", jd_weighting_args=few, jd_preferences=["code=4"])
    expected = SDMGradWeighting(n_iter=1, lr=0.1, pref_vector=[1 / 6, 4 / 6, 1 / 6])
    losses = torch.ones(3).double()
    for seed in range(3):
        actual = steered.weights(gramian(seed=seed), losses, NAMES, step=seed)
        assert torch.allclose(actual, expected(gramian(seed=seed), names=NAMES), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("how", "sizes"), [("rows", lambda g, _: g.diagonal().sqrt()), ("loss", lambda _, x: x)])
def test_normalised_rows_are_weighed_and_descended(how, sizes, tmp_path):
    losses = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
    actual = control(tmp_path, jd_normalize=how).weights(gramian(), losses, NAMES, step=0)
    d = 1 / sizes(gramian(), losses)
    expected = d * UPGradWeighting()(d[:, None] * gramian() * d)
    assert torch.allclose(actual, expected, rtol=1e-10, atol=0)


def test_rows_of_zeros_are_not_divided(tmp_path):
    g = torch.zeros(3, 3).double()
    g[0, 0] = 4.0
    actual = control(tmp_path, MeanWeighting(), jd_normalize="rows").weights(g, torch.ones(3).double(), NAMES, step=0)
    assert actual.tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 3])


@pytest.mark.parametrize("how", ["rows", "loss"])
def test_the_update_combines_the_normalised_rows(how, tmp_path):
    """One SGD step along the mean of normalised rows, compared with autograd."""
    data = examples(6)
    flags = {"per_device_train_batch_size": 6, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    args = arguments(tmp_path, jd_weighting="mean", jd_normalize=how, lr_scheduler_type="constant", **flags, **GROUP)
    before = lora("gpt2", warm=True)
    trainer = run(lora("gpt2", warm=True), args, data)
    parameters = [p for p in before.parameters() if p.requires_grad]
    tokens = sum(sum(label != -100 for label in example["labels"][1:]) for example in data)
    update = torch.zeros_like(flat(before))
    for task in NAMES:
        batch = collate([example for example in data if example["task"] == task])
        labels = batch.pop("labels")
        logits = before(**batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") * 3 / tokens
        row = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        update += row / (3 * (row.norm() if how == "rows" else loss.detach()))
    assert relative(flat(trainer.model) - flat(before), -args.learning_rate * update) < 1e-6


def test_warmup_steps_use_the_mean(tmp_path):
    flags = {"max_steps": 3, "per_device_train_batch_size": 6}
    theirs = stock(lora("gpt2"), tmp_path, **flags)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_warmup_steps=3, **flags, **GROUP))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert ours.jd_state is None
    ours = run(lora("gpt2"), arguments(tmp_path, jd_warmup_steps=2, **flags, **GROUP))
    assert relative(flat(ours.model), flat(theirs.model)) > 1e-6


@pytest.fixture
def jacobians(monkeypatch):
    """Record the Jacobians that are computed."""
    seen = []
    compute = Engine.compute_jacobian
    monkeypatch.setattr(Engine, "compute_jacobian", lambda *a, **k: seen.append(compute(*a, **k)) or seen[-1])
    return seen


@pytest.mark.parametrize("kind", [{}, {"jd_group_column": "task"}, GROUP, {"jd_scope": "micro_batch"}], ids=str)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_monitoring_equals_trainer(accumulation, kind, tmp_path, jacobians):
    flags = {"gradient_accumulation_steps": accumulation, "max_steps": 7, "max_grad_norm": 0.1}
    theirs = stock(lora("gpt2", dropout=0.1), tmp_path, **flags)
    args = arguments(tmp_path, jd_weighting="mean", jd_monitor_every=3, **flags, **kind)
    ours = run(lora("gpt2", dropout=0.1), args)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    for key in ("loss", "grad_norm"):
        assert relative(logged(ours, key), logged(theirs, key)) < 1e-6
    assert 3 <= len(jacobians) <= 3 * accumulation
    assert len(logged(ours, "jd/min_gw")) == 3  # At updates 1, 4 and 7.
    if "jd_group_column" in kind:
        assert all(any(key.startswith("jd/loss/") for key in entry) for entry in ours.state.log_history[:-1])


@pytest.mark.parametrize("name", ["single-label", "question-answering", "masked"])
def test_monitoring_equals_trainer_for_other_tasks(name, tmp_path):
    task = TABLE[name]
    data = examples_of(task, 12)
    settings = {"max_steps": 5, "per_device_train_batch_size": 4}
    runs = []
    for args in (
        arguments(tmp_path, TrainingArguments, **settings),
        arguments(tmp_path, jd_weighting="mean", jd_monitor_every=2, jd_group_column="task", **settings),
    ):
        runs.append(run(model_of(task, True), args, data, data_collator=collate_task))
    assert relative(flat(runs[1].model), flat(runs[0].model)) < 1e-6


class Held(UPGradWeighting):
    """UPGrad at every third update, its last weights in between: what `--jd_every 3` must give, computed from rows."""

    def __call__(self, gramian, /, *, names=None):
        calls, last = self.__dict__.setdefault("calls", []), self.__dict__.setdefault("last", {})
        calls.append(names)
        m = len(gramian)
        if len(calls) % 3 == 1:
            weights = super().__call__(gramian, names=names)
            last |= dict(zip(names, (m * weights).tolist(), strict=True))
            return weights
        return gramian.new_tensor([last.get(name, 1.0) / m for name in names])


@pytest.mark.parametrize("reduction", ["share", "mean"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_unmeasured_updates_use_the_last_weights(accumulation, reduction, tmp_path, jacobians):
    flags = {"gradient_accumulation_steps": accumulation, "max_steps": 8, "per_device_train_batch_size": 4}
    flags |= {"jd_group_reduction": reduction, **GROUP}
    data = examples(24, unlabelled=(4,))
    expected = run(lora("gpt2"), arguments(tmp_path, **flags), data, weighting=Held())
    measured = len(jacobians)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_every=3, **flags), data)
    assert len(jacobians) - measured < 0.6 * measured
    assert relative(flat(ours.model), flat(expected.model)) < 1e-6  # The weights multiply float32 losses.
    assert relative(logged(ours, "loss"), logged(expected, "loss")) < 1e-6


def test_unmeasured_updates_use_the_last_weights_for_instance_losses(tmp_path):
    """Heads that don't take the number of items: coefficients are only known once all micro-batches are counted."""
    task = TABLE["single-label"]
    flags = {"gradient_accumulation_steps": 2, "max_steps": 6, "per_device_train_batch_size": 4, **GROUP}
    runs = []
    for every, weighting in (({}, Held()), ({"jd_every": 3}, None)):
        args = arguments(tmp_path, **flags, **every)
        runs.append(
            run(model_of(task, True), args, examples_of(task, 24), data_collator=collate_task, weighting=weighting)
        )
    assert relative(flat(runs[1].model), flat(runs[0].model)) < 1e-9


def test_unmeasured_updates_raise_the_raised_loss(tmp_path):
    flags = {"max_steps": 5, "per_device_train_batch_size": 6, "jd_ascend": ["code"], **GROUP}
    expected = run(lora("gpt2"), arguments(tmp_path, **flags), weighting=Held())
    ours = run(lora("gpt2"), arguments(tmp_path, jd_every=3, **flags))
    assert relative(flat(ours.model), flat(expected.model)) < 1e-6


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_resumed_run_has_the_last_weights(step, tmp_path):
    flags = {"max_steps": 8, "per_device_train_batch_size": 6, "jd_every": 3, "save_strategy": "steps", "save_steps": 1}
    whole = run(lora("gpt2"), arguments(tmp_path, **flags, **GROUP))
    resumed = JDTrainer(
        lora("gpt2"), arguments(tmp_path, **flags, **GROUP), train_dataset=examples(), data_collator=collate
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert torch.equal(flat(resumed.model), flat(whole.model))


class Broken(JDTrainer):
    """One example's loss, or only its gradient, isn't finite."""

    how = "loss"

    def compute_losses(self, model, inputs):
        losses, counted = super().compute_losses(model, inputs)
        bad = inputs["input_ids"][:, :4].eq(torch.tensor(examples()[5]["input_ids"][:4])).all(1)
        if self.how == "loss":
            return losses.masked_fill(bad[:, None], torch.nan), counted
        # The square root's slope at 0 is infinite, and 0 times infinity is NaN: only the bad example may reach it.
        steep = (losses - losses.detach()).abs()[bad].sqrt()
        return losses.index_add(0, bad.nonzero()[:, 0], steep), counted


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_plain_steps_leave_out_nonfinite_instances(how, tmp_path, monkeypatch):
    monkeypatch.setattr(Broken, "how", how)
    flags = {"max_steps": 7, "per_device_train_batch_size": 4, "jd_weighting": "mean"}
    expected = run(lora("gpt2"), arguments(tmp_path, **flags), cls=Broken)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_monitor_every=7, **flags), cls=Broken)
    assert flat(ours.model).isfinite().all()
    assert logged(ours, "jd/non_finite").sum() > 0
    assert relative(flat(ours.model), flat(expected.model)) < 1e-9


@pytest.mark.parametrize("flags", [{}, GROUP], ids=str)
def test_two_passes_leave_out_nonfinite_rows(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(Broken, "how", "gradient")
    flags = {"max_steps": 4, "per_device_train_batch_size": 4, **flags}
    expected, ours = (
        run(lora("gpt2"), arguments(tmp_path, jd_backward=backward, **flags), cls=Broken)
        for backward in ("one_pass", "two_pass")
    )
    assert logged(ours, "jd/non_finite").sum() > 0
    assert flat(ours.model).isfinite().all()
    assert relative(flat(ours.model), flat(expected.model)) < 1e-6  # losses are computed in float32


def test_any_callable_may_weigh(tmp_path):
    seen = []

    def first(g):
        seen.append(g.shape)
        return torch.eye(len(g))[0]

    trainer = JDTrainer(
        lora("gpt2"), arguments(tmp_path, **GROUP), train_dataset=examples(), data_collator=collate, weighting=first
    )
    trainer.train()
    assert len(seen) >= 3
    assert trainer.jd_state.weights.tolist() == [1.0] + [0.0] * (len(trainer.jd_state.names) - 1)
    with pytest.raises(ValueError, match="needs a weighting that takes preferences, and `first` does not.*`upgrad`"):
        JDTrainer(
            lora("gpt2"),
            arguments(tmp_path, jd_preferences=["code=2"], **GROUP),
            train_dataset=examples(),
            weighting=first,
        )


def test_a_preference_for_an_unknown_group_lists_the_groups(tmp_path):
    args = arguments(tmp_path, jd_preferences=["cade=2"], **GROUP)
    with pytest.raises(ValueError, match="`cade`, which is no objective; the objectives are `chat`, `code`"):
        JDTrainer(lora("gpt2"), args, train_dataset=examples(), data_collator=collate)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({**GROUP, "jd_preferences": ["code"]}, "`code`; write each argument as `name=value`"),
        ({**GROUP, "jd_preferences": ["code=much"]}, "`much` for `code`; give a number of 0 or more"),
        ({**GROUP, "jd_preferences": ["code=-1"]}, "`-1` for `code`"),
        ({**GROUP, "jd_preferences": ["code=1", "code=2"]}, "two values for `code`"),
        ({**GROUP, "jd_preferences": ["code=0"], "jd_weighting": "mgda"}, "positive"),
        ({"jd_preferences": ["code=2"]}, "use --jd_objectives group"),
        ({**GROUP, "jd_preferences": ["code=2"], "jd_weighting": "mean"}, "`mean` does not: use one of `upgrad`"),
        (
            {**GROUP, "jd_preferences": ["code=2"], "jd_weighting_args": ["pref_vector=[1,2,3]"]},
            "say the same: leave one of them out",
        ),
        ({"jd_normalize": "row"}, "--jd_normalize is `row`; choose one of `rows`"),
        ({"jd_normalize": "rows", "jd_weighting": "dwa", **GROUP}, "`dwa` reads only losses"),
        ({"jd_normalize": "loss", "jd_ascend": ["code"], **GROUP}, "--jd_ascend negates some"),
        ({"jd_every": 0}, "--jd_every is 0; give 1 or more"),
        ({"jd_every": 2}, "reuses weights by name, and objectives `instance` have none"),
        ({"jd_every": 2, "jd_weighting": "mean", **GROUP}, "use --jd_monitor_every"),
        ({"jd_every": 2, "jd_scope": "micro_batch", **GROUP}, "leave --jd_scope at global"),
        ({"jd_warmup_steps": -1}, "--jd_warmup_steps is -1; give 0 or more"),
        ({"jd_warmup_steps": 3, "jd_weighting": "mean"}, "leave it at 0"),
        ({"jd_monitor_every": 5}, "only watches, but the weighting `upgrad` changes the steps"),
        ({"jd_monitor_every": 5, "jd_weighting": "mean", "jd_normalize": "rows"}, "--jd_normalize changes the steps"),
        ({"jd_weighting": "cagrad", "jd_weighting_args": ["cc=1"]}, "Unknown argument 'cc'.*takes c"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_contradictory_flags_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **flags)
