"""The bytes of an update's stored rows, and what happens if there are too many."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from hf_jd.gramian import Engine
from hf_jd.trainer.step.row_store import RowStore
from tests.trainer.runs import arguments, examples, flat, lora, relative, run

KINDS = {"instance": {}, "group": {"jd_objectives": "group", "jd_group_column": "task"}}
# Twelve examples of three tasks, in turn: each task is in each update.
DATA = examples(12)


@pytest.fixture
def kept(monkeypatch):
    """Record the bytes stored after each micro-batch, and how many Jacobians are alive then."""
    seen, alive = [], weakref.WeakSet()
    add, compute = RowStore.add, Engine.compute_jacobian

    def record(self, found):
        add(self, found)
        del found
        gc.collect()
        seen.append((self.nbytes, len(alive)))

    def computed(*args):
        jacobian = compute(*args)
        alive.add(jacobian)
        return jacobian

    monkeypatch.setattr(RowStore, "add", record)
    monkeypatch.setattr(Engine, "compute_jacobian", computed)
    return seen


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_bytes_follow_the_objectives(kind, accumulation, tmp_path, kept):
    flags = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    args = arguments(tmp_path, train_sampling_strategy="sequential", jd_check=False, **flags, **KINDS[kind])
    model = run(lora("gpt2", warm=True), args, DATA).model
    row = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for micro_batches, (size, jacobians) in enumerate(kept, start=1):
        assert size == 3 * row * (micro_batches if kind == "instance" else 1)
        # The caller that recorded the micro-batch still holds its rows.
        assert jacobians <= (micro_batches if kind == "instance" else 2)
    assert len(kept) == accumulation


def test_groups_fit_whatever_the_accumulation(tmp_path):
    row = sum(p.nbytes for p in lora("gpt2").parameters() if p.requires_grad)
    flags = {"gradient_accumulation_steps": 6, "jd_keep_rows": str(3 * row + 1), "max_steps": 1}
    run(lora("gpt2"), arguments(tmp_path, **flags, **KINDS["group"]), DATA)
    with pytest.raises(ValueError, match="rows of the 6 micro-batches .* GB: accumulate fewer"):
        run(lora("gpt2"), arguments(tmp_path, **flags), DATA)


def test_rows_that_do_not_fit_are_weighed_separately_on_request(tmp_path, caplog):
    flags = {"gradient_accumulation_steps": 3, "max_steps": 4}
    models = []
    for own in (
        {"jd_scope": "micro_batch"},
        {"jd_keep_rows": "100", "jd_when_full": "micro_batch"},
        {"jd_keep_rows": "1GB", "jd_when_full": "micro_batch"},
        {},
    ):
        models.append(flat(run(lora("gpt2", dropout=0.2), arguments(tmp_path, **flags, **own)).model))
        warned = caplog.text.count("each micro-batch is weighed separately from now on")
        assert warned == (len(models) > 1)
    assert torch.equal(models[1], models[0])
    assert torch.equal(models[2], models[3])
    assert relative(models[2], models[0]) > 1e-4
