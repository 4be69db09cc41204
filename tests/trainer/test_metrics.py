"""(G, w) -> metrics, against the definitions."""

from __future__ import annotations

import pytest
import torch

from hf_jd.metrics import Averages, step_metrics


def test_definitions():
    torch.manual_seed(0)
    rows = torch.randn(5, 7, dtype=torch.float64)
    weights, means, counts = torch.rand(5).double(), torch.rand(5).double(), torch.tensor([3.0, 1, 4, 1, 5])
    groups, names = torch.tensor([0, 2, 0, 2, 2]), {0: "a", 2: "c"}
    found = step_metrics(rows @ rows.T, weights, means, counts, groups, names)
    found = {key: value.item() for key, value in found.items()}
    update = weights @ rows
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)[
        tuple(torch.triu_indices(5, 5, 1))
    ]
    assert found["jd/min_gw"] == pytest.approx((rows @ update).min().item())
    assert found["jd/conflicts"] == pytest.approx((cosines < 0).double().mean().item())
    assert found["jd/cosine"] == pytest.approx(cosines.mean().item())
    assert found["jd/grad_norm"] == pytest.approx(rows.norm(dim=1).mean().item())
    assert found["jd/weight_sum"] == pytest.approx(weights.sum().item())
    for k, name in names.items():
        member = groups == k
        row = rows[member].sum(0)
        assert found[f"jd/weight/{name}"] == pytest.approx((weights[member].sum() / weights.sum()).item())
        assert found[f"jd/against/{name}"] == float(row @ update < 0)
        assert found[f"jd/grad_norm/{name}"] == pytest.approx(row.norm().item())
        tokens = counts[member].double()
        assert found[f"jd/loss/{name}"] == pytest.approx((means[member] @ tokens / tokens.sum()).item())


def test_against_is_seen_and_rounding_is_not():
    # The second row's product with the mean is negative; with weights (1, 2) both are 0 but for rounding.
    gramian = torch.tensor([[4.0, -2.0], [-2.0, 1.0]])
    against = []
    for weights in ([0.5, 0.5], [1.0, 2.0 - 1e-9]):
        found = step_metrics(
            gramian,
            torch.tensor(weights).double(),
            torch.ones(2),
            torch.ones(2),
            torch.tensor([0, 1]),
            {0: "a", 1: "b"},
        )
        against.append((found["jd/against/a"].item(), found["jd/against/b"].item()))
    assert against == [(0, 1), (0, 0)]


def test_the_metrics_do_not_depend_on_the_scale():
    gramian = torch.tensor([[1.0, -0.5], [-0.5, 2.0]])
    arguments = torch.tensor([0.5, 0.5]), torch.ones(2), torch.ones(2), torch.tensor([0, 1]), {0: "a", 1: "b"}
    for scale in (1.0, 1e-16):
        found = step_metrics(gramian * scale, *arguments)
        assert found["jd/conflicts"] == 1
        assert found["jd/cosine"].item() == pytest.approx(-0.5 / 2**0.5)


def test_averages_are_over_the_steps_in_which_a_metric_was_there():
    averages = Averages()
    averages.add({"b": torch.tensor(1.0), "a": torch.tensor(3.0)})
    averages.add({"b": torch.tensor(2.0)})
    assert averages.take() == {"a": 3.0, "b": 1.5}
    assert averages.take() == {}
