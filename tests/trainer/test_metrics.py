"""(G, w) -> metrics, compared with their definitions."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import rewrite_logs

from hf_jd.metrics import Averages, Key, Metrics, block_metrics, readable, step_metrics
from hf_jd.weighting import UPGradWeighting
from tests.trainer.runs import arguments, lora, run


def values(metrics: Metrics) -> dict[Key, float]:
    return dict(zip(metrics.keys, metrics.values.tolist(), strict=True))


def test_metrics_follow_their_definitions():
    torch.manual_seed(0)
    rows = torch.randn(5, 7, dtype=torch.float64)
    weights, means, counts = torch.rand(5).double(), torch.rand(5).double(), torch.tensor([3.0, 1, 4, 1, 5])
    groups, names = torch.tensor([0, 2, 0, 2, 2]), {0: "a", 2: "c"}
    actual = values(step_metrics((rows @ rows.T)[None], weights[None], means, counts, groups, names))
    update = weights @ rows
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)[
        tuple(torch.triu_indices(5, 5, 1))
    ]
    assert actual["jd/min_gw"] == pytest.approx((rows @ update).min().item())
    assert actual["jd/conflicts"] == pytest.approx((cosines < 0).double().mean().item())
    assert actual["jd/cosine"] == pytest.approx(cosines.mean().item())
    assert actual["jd/grad_norm"] == pytest.approx(rows.norm(dim=1).mean().item())
    assert actual["jd/weight_sum"] == pytest.approx(weights.sum().item())
    for k, name in names.items():
        member = groups == k
        row = rows[member].sum(0)
        assert actual[f"jd/weight/{name}"] == pytest.approx((weights[member].sum() / weights.sum()).item())
        assert actual[f"jd/against/{name}"] == float(row @ update < 0)
        assert actual[f"jd/grad_norm/{name}"] == pytest.approx(row.norm().item())
        tokens = counts[member].double()
        assert actual[f"jd/loss/{name}"] == pytest.approx((means[member] @ tokens / tokens.sum()).item())
    a, c = rows[groups == 0].sum(0), rows[groups == 2].sum(0)
    assert actual["a", "c"] == pytest.approx(torch.cosine_similarity(a, c, dim=0).item())


def test_against_ignores_rounding():
    # The second row's product with the mean is negative; with weights (1, 2), both products are 0 up to rounding.
    gramian = torch.tensor([[4.0, -2.0], [-2.0, 1.0]])
    against = []
    for weights in ([0.5, 0.5], [1.0, 2.0 - 1e-9]):
        metrics = step_metrics(
            gramian[None],
            torch.tensor([weights]).double(),
            torch.ones(2),
            torch.ones(2),
            torch.tensor([0, 1]),
            {0: "a", 1: "b"},
        )
        actual = values(metrics)
        against.append((actual["jd/against/a"], actual["jd/against/b"]))
    assert against == [(0, 1), (0, 0)]


def test_the_worst_block_goes_against_most_objectives():
    # The mean of the first block goes against neither of two rows; the mean of the second block goes against one.
    rows = torch.tensor([[[4.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [-1.0, 1.0]]]).double()
    gramians, weights = rows @ rows.mT, torch.full((2, 2), 0.5).double()
    assert values(block_metrics(gramians, weights)) == {"jd/against_in_worst_block": 0.5}
    assert values(block_metrics(gramians * 1e-16, weights)) == {"jd/against_in_worst_block": 0.5}
    assert values(block_metrics(gramians[:1], weights[:1])) == {"jd/against_in_worst_block": 0.0}
    mended = torch.stack([weights[0], UPGradWeighting()(gramians[1])])
    assert values(block_metrics(gramians, mended)) == {"jd/against_in_worst_block": 0.0}


def test_an_update_of_pure_rounding_goes_against_no_objective():
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))  # No update helps all these rows.
    gramian = rows @ rows.T
    weights = UPGradWeighting()(gramian.double())
    assert (gramian.double() @ weights).min() < 0
    assert values(block_metrics(gramian[None], weights[None])) == {"jd/against_in_worst_block": 0.0}


def test_products_are_summed_and_weights_averaged_over_blocks():
    torch.manual_seed(0)
    rows, weights = torch.randn(3, 4, 7, dtype=torch.float64), torch.rand(3, 4).double()
    ones, groups, names = torch.ones(4), torch.arange(4), {k: f"g{k}" for k in range(4)}
    actual = values(step_metrics(rows @ rows.mT, weights, ones, ones, groups, names))
    whole, update = torch.cat(list(rows), 1), torch.cat([w @ block for w, block in zip(weights, rows, strict=True)])
    assert actual["jd/min_gw"] == pytest.approx((whole @ update).min().item())
    assert actual["jd/weight_sum"] == pytest.approx(weights.mean(0).sum().item())
    for k in range(4):
        assert actual[f"jd/against/g{k}"] == float(whole[k] @ update < 0)
        assert actual[f"jd/grad_norm/g{k}"] == pytest.approx(whole[k].norm().item())
        assert actual[f"jd/weight/g{k}"] == pytest.approx((weights[:, k].sum() / weights.sum()).item())


def test_the_metrics_do_not_depend_on_the_scale():
    gramian = torch.tensor([[1.0, -0.5], [-0.5, 2.0]])
    arguments = torch.tensor([[0.5, 0.5]]), torch.ones(2), torch.ones(2), torch.tensor([0, 1]), {0: "a", 1: "b"}
    for scale in (1.0, 1e-16):
        actual = values(step_metrics(gramian[None] * scale, *arguments))
        assert actual["jd/conflicts"] == 1
        assert actual["jd/cosine"] == pytest.approx(-0.5 / 2**0.5)


def test_a_metric_is_averaged_over_the_steps_that_have_it():
    averages = Averages()
    averages.add(Metrics(("b", "a"), torch.tensor([1.0, 3.0])))
    averages.add(Metrics(("b",), torch.tensor([2.0])))
    averages.add(Metrics(("a", "b"), torch.tensor([5.0, 6.0])))
    averages.add(Metrics(("a", "b"), torch.tensor([7.0, 7.0])))
    assert averages.take() == {"a": 5.0, "b": 4.0}
    assert averages.take() == {}


def test_cosines_are_logged_for_few_groups_only():
    few = dict.fromkeys(combinations("abcdefgh", 2), 0.5) | {"jd/z": 1.0}
    assert len(readable(few)) == 29
    assert readable(few)["jd/cosine/a/b"] == 0.5
    assert readable(few | {("a", "i"): 0.5}) == {"jd/z": 1.0}


class Reporter(TrainerCallback):
    """A callback that records what reporting callbacks get, under the names that transformers' callbacks use."""

    def __init__(self):
        self.got: dict[str, float] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.got |= rewrite_logs(logs)


def test_reporters_get_numbers_by_name(tmp_path):
    reporter = Reporter()
    run(lora("gpt2"), arguments(tmp_path, jd_objectives="group", jd_group_column="task"), callbacks=[reporter])
    assert {"train/jd/weight/code", "train/jd/cosine/chat/code", "train/jd/min_gw"} <= set(reporter.got)
    assert {"train/jd/seconds/rows", "train/jd/seconds/weighing", "train/jd/megabytes/rows"} <= set(reporter.got)
    # TensorBoard's callback drops everything else.
    assert all(isinstance(value, int | float) for value in reporter.got.values())
