"""A split loss with the control flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_jd.weighting import UPGradWeighting
from tests.trainer import own_losses
from tests.trainer.own_losses import CASES, Case, ours_of, trainer_of
from tests.trainer.runs import flat, logged, relative
from tests.trainer.split_runs import (
    AVERAGED,
    GROUP,
    Recorded,
    brute,
    grouped,
)

# GPT-2's positions [1, T] belong to no instance; heads are used twice.
pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")


PLAIN = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def trained(case: Case, directory: Any, cls: Any = None, data: Any = None, **flags: Any) -> Any:
    """Train for four updates of 4 examples in order, with plain SGD."""
    common = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", **PLAIN}
    return own_losses.trained(case, directory, 16, cls, data, **{**common, **flags})


def by_hand(case: Case, weights_of: Callable[[int, Tensor], Tensor], factors: Any = None) -> Tensor:
    """Compute the parameters after four updates by group, by brute force.

    Args:
        case: The loss and the model.
        weights_of: Maps an update's number and Gramian to weights.
        factors: Maps the groups' sizes to factors of their shares of the loss; None for 1.
    """
    model = case.build()
    parameters = list(model.parameters())
    data = case.examples(16)
    for step in range(4):
        examples = data[4 * step : 4 * step + 4]
        names = [example["task"] for example in examples]
        batch = case.collate([{k: v for k, v in e.items() if k != "task"} for e in examples])
        rows, rest = brute(case, model, batch, 4)
        picked = [torch.tensor([name == group for name in names]) for group in sorted(set(names))]
        shares = torch.stack([rows[mine].sum(0) for mine in picked])
        objectives = len(shares) * shares
        if factors is not None:
            objectives = torch.stack([factors(int(mine.sum())) * s for mine, s in zip(picked, shares, strict=True)])
        change = PLAIN["learning_rate"] * (weights_of(step, objectives @ objectives.T) @ objectives + rest)
        with torch.no_grad():
            for p, part in zip(parameters, change.split([p.numel() for p in parameters]), strict=True):
                p -= part.view_as(p)
    return flat(model)


def mean_of(gramian: Tensor) -> Tensor:
    return torch.full((len(gramian),), 1 / len(gramian), dtype=torch.float64)


UPGRAD = UPGradWeighting()
CONTROL = [CASES["contrastive"], CASES["penalised"]]


@pytest.mark.parametrize("case", CONTROL, ids=["contrastive", "penalised"])
def test_upgrad_equals_brute_force(case, tmp_path):
    ours = trained(case, tmp_path, **GROUP)
    assert relative(flat(ours.model), by_hand(case, lambda step, gramian: UPGRAD(gramian))) < 1e-8


@pytest.mark.parametrize("case", CONTROL, ids=["contrastive", "penalised"])
def test_unmeasured_updates_use_the_last_weights(case, tmp_path):
    last = []

    def weights(step, gramian):
        if step % 2 == 0:
            last[:] = [UPGRAD(gramian)]
        return last[0]

    ours = trained(case, tmp_path, jd_every=2, **GROUP)
    assert relative(flat(ours.model), by_hand(case, weights)) < 1e-8
    assert relative(flat(trained(case, tmp_path, **GROUP).model), flat(ours.model)) > 1e-6


@pytest.mark.parametrize("case", CONTROL, ids=["contrastive", "penalised"])
def test_warmup_uses_the_mean(case, tmp_path):
    ours = trained(case, tmp_path, jd_warmup_steps=2, **GROUP)
    expected = by_hand(case, lambda step, gramian: mean_of(gramian) if step < 2 else UPGRAD(gramian))
    assert relative(flat(ours.model), expected) < 1e-8
    stock = trained(case, tmp_path, trainer_of(case.loss))
    for kind in ({}, GROUP):
        whole = trained(case, tmp_path, jd_warmup_steps=4, **kind)
        assert relative(flat(whole.model), flat(stock.model)) < 1e-10
        assert whole.jd_state is None
        assert logged(whole, "loss").tolist() == logged(stock, "loss").tolist()


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("case", CONTROL, ids=["contrastive", "penalised"])
def test_monitoring_changes_nothing(case, kind, tmp_path):
    stock = trained(case, tmp_path, trainer_of(case.loss))
    ours = trained(case, tmp_path, jd_weighting="mean", jd_monitor_every=2, **kind)
    assert relative(flat(ours.model), flat(stock.model)) < 1e-10
    assert ["jd/min_gw" in entry for entry in ours.state.log_history[:4]] == [True, False, True, False]


def test_group_means_over_instances(tmp_path):
    # If the loss is a mean over instances, a group's share, times B over its number of instances, is the group's mean.
    case = CASES["focal"]
    ours = trained(case, tmp_path, jd_group_reduction="mean", **GROUP)
    expected = by_hand(case, lambda step, gramian: UPGRAD(gramian), lambda size: 4 / size)
    assert relative(flat(ours.model), expected) < 1e-8


def test_group_means_over_tokens(tmp_path):
    case = CASES["next-tokens"]
    recorded = Recorded(case, tmp_path, jd_group_reduction="mean", **GROUP)
    rows, _ = brute(case, case.build(), recorded.inputs, 5)
    counts, groups = (recorded.inputs["labels"][:, 1:] != -100).sum(1).double(), recorded.batch["jd_group"]
    # The sum is not divided here, which acts like dividing by the batch's number of tokens.
    scale = torch.stack([counts.sum() / counts[groups == k].sum() for k in groups.unique()])
    objectives = scale[:, None] * grouped(rows, recorded)
    recorded.step(None)
    assert relative(recorded.gramian, objectives @ objectives.T) < 1e-10


def test_raised_groups_are_negated(tmp_path):
    case = CASES["focal"]
    recorded = Recorded(case, tmp_path, jd_ascend=["docs"], **GROUP)
    rows, _ = brute(case, case.build(), recorded.inputs, 5)
    names = recorded.trainer.jd_group_names
    signs = torch.tensor([-1.0 if name == "docs" else 1.0 for name in names]).double()
    assert relative(recorded.step(torch.ones(3).double()), 3 * signs @ grouped(rows, recorded)) < 1e-10


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_micro_batches_may_be_weighed_separately(kind, tmp_path):
    # With two equal micro-batches, the update is the same as with one of them.
    case = CASES["contrastive"]
    data = case.examples(4)
    one = trained(case, tmp_path, data=data * 4, **kind)
    flags = {"jd_scope": "micro_batch", "gradient_accumulation_steps": 2}
    two = trained(case, tmp_path, ours_of(case.loss, **AVERAGED), data=data * 8, **flags, **kind)
    assert relative(flat(two.model), flat(one.model)) < 1e-10


@pytest.mark.parametrize("case", ["R-Drop", "penalised"])
def test_rows_that_do_not_fit_are_weighed_separately_on_request(case, tmp_path, caplog):
    flags = {"gradient_accumulation_steps": 2, "max_steps": 3}
    with pytest.raises(ValueError, match="rows of the 2 micro-batches .* GB: accumulate fewer"):
        trained(CASES[case], tmp_path, jd_keep_rows="100", **flags)
    runs = []
    for own in (
        {"jd_scope": "micro_batch"},
        {"jd_keep_rows": "100", "jd_when_full": "micro_batch"},
        {"jd_keep_rows": "1GB", "jd_when_full": "micro_batch"},
        {},
    ):
        runs.append(flat(trained(CASES[case], tmp_path, **flags, **own).model))
        assert caplog.text.count("each micro-batch is weighed separately from now on") == (len(runs) > 1)
    assert relative(runs[1], runs[0]) < 1e-12
    assert torch.equal(runs[2], runs[3])
    assert relative(runs[2], runs[0]) > 1e-8
