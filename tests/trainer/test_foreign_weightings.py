"""Weightings from outside hf_jd: any callable, and TorchJD's objects, some of which take a Jacobian."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("qpsolvers", reason="TorchJD's projections need qpsolvers")
from torchjd import aggregation as torchjd

from hf_jd import JDTrainer
from hf_jd.trainer.step.foreign_weightings import as_weighting
from hf_jd.weighting import GradVacWeighting, MeanWeighting, UPGradWeighting
from tests.trainer.runs import arguments, collate, examples, flat, lora, relative, run

ROWS = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

OF_GRAMIANS = [
    torchjd.UPGrad(),
    torchjd.UPGrad(torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)),
    torchjd.DualProj(),
    torchjd.MGDA(),
    torchjd.IMTLG(),
    torchjd.AlignedMTL(),
    torchjd.CAGrad(c=0.3),
    torchjd.Krum(1, 1),
]


@pytest.mark.parametrize("aggregator", OF_GRAMIANS, ids=str)
@pytest.mark.parametrize(
    "wrapped", [lambda a: a, lambda a: a.forward, lambda a: a.__call__, partial, lambda a: a.weighting]
)
def test_an_aggregator_of_torchjd_weighs_as_it_aggregates(aggregator, wrapped):
    weighting = as_weighting(wrapped(aggregator))
    expected = aggregator(ROWS)
    torch.testing.assert_close(weighting(ROWS @ ROWS.T) @ ROWS, expected, rtol=1e-6, atol=1e-8)


def test_an_aggregator_of_early_versions_weighs_as_it_aggregates():
    # They have no attribute for a weighting of the Gramian.
    aggregator = torchjd.UPGrad()
    weighting = aggregator.gramian_weighting
    del aggregator.gramian_weighting
    assert as_weighting(aggregator) is weighting


class Clipped(torchjd.UPGrad):
    def forward(self, matrix):
        return super().forward(matrix).clamp(max=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torchjd.Mean(),
            "aggregator `Mean`, which takes a Jacobian .*`hf_jd.weighting.MeanWeighting`.*--jd_weighting mean",
        ),
        (torchjd.ConFIG(), "aggregator `ConFIG`.*--jd_weighting config"),
        (torchjd.Random(), "aggregator `Random`.*--jd_weighting random"),
        (torchjd.Constant(torch.ones(2)).forward, "aggregator `Constant`.*--jd_weighting constant"),
        (partial(torchjd.GradDrop()), "aggregator `GradDrop`.*no weighting matches it.*upgrad, "),
        (torchjd.TrimmedMean(1), "aggregator `TrimmedMean`.*no weighting matches it"),
        (Clipped(), "aggregator `Clipped`.*no weighting matches it"),
        (torchjd.MoDoWeighting(), "weighting `MoDoWeighting`, which takes a Jacobian"),
        (torchjd.SDMGradWeighting(), "weighting `SDMGradWeighting`, which takes a Jacobian"),
        (torchjd.UPGradWeighting, "the class `UPGradWeighting`, but has to be an object"),
        (UPGradWeighting, "the class `UPGradWeighting`, but has to be an object"),
        ("mgda", "is 'mgda', but has to be an object .*--jd_weighting"),
        (torch.ones(2), r"is tensor\(\[1., 1.\]\), but has to be an object"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_anything_but_a_callable_of_a_gramian_is_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(lora("gpt2"), arguments(tmp_path), weighting=given)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.5))

    def forward(self, gramian):
        return self.value.expand(len(gramian))

    def with_names(self, gramian, half=0.5):
        return gramian.new_full((len(gramian),), half)


class Empty(list):
    def __call__(self, gramian):
        return gramian.new_full((len(gramian),), 0.5)


@pytest.mark.parametrize(
    "halves",
    [
        Halves(),
        Halves().with_names,
        partial(Halves().with_names, half=0.5),
        Empty(),
        nn.Sequential(Halves()),
        torchjd.MeanWeighting(),
        torchjd.ConstantWeighting(torch.tensor([0.5, 0.5])),
        lambda gramian: np.full(len(gramian), 0.5),
        lambda gramian: np.full(len(gramian), 0.5, dtype=np.float16)[::-1],
        lambda gramian: np.broadcast_to(0.5, len(gramian)),
        lambda gramian: np.frombuffer(np.full(len(gramian), 0.5).tobytes()),
        lambda gramian: np.linalg.solve(2 * np.eye(len(gramian)), np.ones(len(gramian), dtype=np.int64)),
        lambda gramian: torch.full((len(gramian),), 0.5, dtype=torch.bfloat16),
    ],
)
def test_any_callable_weighs(halves, tmp_path):
    ours = run(lora("gpt2"), arguments(tmp_path, max_steps=2), weighting=halves)
    theirs = run(lora("gpt2"), arguments(tmp_path, max_steps=2, jd_weighting="mean"))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert ours.jd_state.weights.dtype == torch.float64
    assert not ours.jd_state.weights.requires_grad


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), r"a tensor of shape \[2\] and dtype torch.complex64"),
        (torch.ones(2, 1), r"a tensor of shape \[2, 1\] and dtype torch.float32"),
        (torch.ones(2).to_sparse(), r"a tensor of shape \[2\]"),
        (torch.tensor(0.5), r"a tensor of shape \[\] and dtype torch.float32: 0.5"),
        (np.array([1.0, np.inf]), r"a NumPy array of shape \[2\] and dtype float64: \[1.0, inf\]"),
        (np.array([1, 2j]), "a NumPy array of shape .* dtype complex128"),
        (np.array(["a", "b"]), "a NumPy array"),
        (0.5, r"0.5 \(float\)"),
        (None, r"None \(NoneType\)"),
        ({"code": 1.0, "docs": 1.0}, r"\(dict\)"),
        (MeanWeighting(), r"MeanWeighting\(\) \(MeanWeighting\)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_anything_but_a_vector_of_weights_is_refused(returned, message, tmp_path):
    def mine(gramian):
        return returned

    with pytest.raises(ValueError, match=rf"The weighting `mine` has to return 2 finite weights \[2\].*{message}"):
        run(lora("gpt2"), arguments(tmp_path), weighting=mine)


def test_torchjds_aggregator_trains_as_its_weighting(tmp_path):
    models = [
        run(lora("gpt2"), arguments(tmp_path, max_steps=3), weighting=weighting).model
        for weighting in (torchjd.UPGrad(), torchjd.UPGradWeighting())
    ]
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_preferences_are_refused_by_other_callables(tmp_path):
    flags = {"jd_objectives": "group", "jd_group_column": "task", "jd_preferences": ["code=2"]}
    with pytest.raises(ValueError, match="--jd_preferences needs a weighting that takes preferences"):
        run(lora("gpt2"), arguments(tmp_path, **flags), weighting=torchjd.UPGradWeighting())
    assert run(lora("gpt2"), arguments(tmp_path, max_steps=1), weighting=GradVacWeighting()).jd_state is not None


class Averaging(nn.Module):
    """A weighting with a buffer of weights that doesn't exist before the first step, and a number that does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", None)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, gramian):
        weights = torch.softmax(-100 * gramian.diagonal(), 0)
        self.average = weights if self.average is None else (self.average + weights) / 2
        self.steps += 1
        return self.average / self.steps


class Counting:
    """A weighting that remembers a number, and saves it with its own methods."""

    def __init__(self):
        self.steps = 0

    def __call__(self, gramian):
        self.steps += 1
        return torch.full((len(gramian),), 1 / self.steps)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def resumed(weighting, directory):
    args = arguments(directory, save_strategy="steps", save_steps=2)
    whole = run(lora("gpt2"), args, weighting=weighting())
    again = JDTrainer(lora("gpt2"), args, train_dataset=examples(), data_collator=collate, weighting=weighting())
    again.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    return relative(flat(again.model), flat(whole.model))


@pytest.mark.parametrize("weighting", [Averaging, Counting, lambda: nn.Sequential(Averaging())])
def test_a_weightings_state_dict_is_resumed(weighting, tmp_path):
    assert resumed(weighting, tmp_path) == 0


class Forgetful:
    """A weighting that remembers the steps, but doesn't save them to checkpoints."""

    def reset(self):
        self.steps = 0

    def __call__(self, gramian):
        self.steps += 1
        return torch.full((len(gramian),), 1 / self.steps)


def test_a_weighting_without_state_dict_starts_over_with_a_warning(tmp_path, caplog):
    assert resumed(Forgetful, tmp_path) > 1e-5
    assert "has no memory of past steps for the weighting `Forgetful`" in caplog.text
    caplog.clear()
    assert resumed(torchjd.UPGrad, tmp_path) == 0
    assert "remembers" not in caplog.text
