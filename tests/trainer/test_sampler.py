"""`--jd_sampler stratified`: every update has its share of every group, across micro-batches, processes and resumes."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hf_jd import JDTrainer
from hf_jd.sampler import StratifiedSampler, block_counts
from hf_jd.trainer.run.sampling import stratified_sampler
from tests.trainer.processes import KEYS, RARE, stratified
from tests.trainer.runs import arguments, collate, flat, lora

# Rare groups, one group that is most of the data, and groups of one example.
DATA_SETS = [(40, 9, 3, 1), (100,), (7, 7, 7), (1, 1, 1, 1, 1), (200, 2, 1, 1, 13, 5), (3, 30)]


def labels(counts) -> list[str]:
    return [f"group {k}" for k, n in enumerate(counts) for _ in range(n)]


def sampler(groups: list[str], update: int, batch: int, length: int | None = None, epoch: int = 0, seed: int = 0):
    return StratifiedSampler(groups, update, batch, length or len(groups), seed, lambda: epoch)


def is_stratified(parts: list[list[int]], groups: list[str]) -> bool:
    """Return whether each part has each group's share of all examples, to within one example."""
    for part in parts:
        for name in set(groups):
            share = len(part) * groups.count(name) / len(groups)
            if abs(sum(groups[i] == name for i in part) - share) >= 1:
                return False
    return True


def cut(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize("counts", DATA_SETS, ids=str)
@pytest.mark.parametrize("update", [1, 4, 6, 16])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_has_each_example_once_and_each_update_its_shares(counts, update, epoch):
    groups = labels(counts)
    order = list(sampler(groups, update, 2, epoch=epoch))
    assert sorted(order) == list(range(len(groups)))
    assert is_stratified(cut(order, update), groups)


def test_batches_share_the_groups_of_their_update():
    groups = labels((30, 9, 1))
    order = list(sampler(groups, 20, 5))
    for update in cut(order, 20):
        own = [groups[i] for i in update]
        assert is_stratified(cut(list(range(20)), 5), own)


def test_no_group_is_absent_for_long():
    groups = labels((300, 30, 8, 3, 3))
    order = list(sampler(groups, 8, 8))
    updates = cut(order, 8)
    for name in sorted(set(groups)):
        present = [-1, *(u for u, update in enumerate(updates) if any(groups[i] == name for i in update)), len(updates)]
        rate = min(8 * groups.count(name) / len(groups), 1)
        assert max(b - a for a, b in pairwise(present)) <= 3 / rate


def test_shares_round_correctly_for_any_length():
    pick = random.Random(0)
    for seed in range(300):
        counts = torch.tensor([pick.choice([1, 1, 2, 3, 7, 20, 100]) for _ in range(pick.randint(1, 12))])
        total, together = int(counts.sum()), pick.choice([1, 2, 3, 8])
        size = together * pick.randint(1, 5)
        for length in (total, -(-total // together) * together, total // together * together):
            table = block_counts(counts, length, size, torch.Generator().manual_seed(seed))
            sizes = torch.tensor([size] * (length // size) + [length % size] * (length % size > 0))
            assert torch.equal(table.sum(1), sizes)
            assert ((table - sizes[:, None].double() * counts / total).abs() < 1).all()
            assert ((table.sum(0) - length * counts.double() / total).abs() < 1).all()


def test_the_order_depends_on_seed_and_epoch():
    groups = labels((20, 5))
    first = list(sampler(groups, 4, 2))
    assert list(sampler(groups, 4, 2)) == first
    assert list(sampler(groups, 4, 2, epoch=1)) != first
    assert list(sampler(groups, 4, 2, seed=1)) != first


@pytest.mark.parametrize("n", [23, 24, 40])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("even", "drop"), [(True, False), (False, False), (True, True)])
def test_batches_from_accelerate_have_the_shares(n, split, even, drop):
    groups = ["rare" if i % 8 == 0 else "often" for i in range(n)]
    args = {"world_size": 2, "dataloader_drop_last": drop, "gradient_accumulation_steps": 3, "seed": 0}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**args, data_seed=None),
        accelerator=SimpleNamespace(split_batches=split, even_batches=even),
        jd_args=SimpleNamespace(jd_group_column="task"),
        state=SimpleNamespace(epoch=0.0),
        _train_batch_size=2,
    )
    order = stratified_sampler(trainer, [{"task": group} for group in groups])
    batches = BatchSampler(order, 2, drop)
    shards = [list(BatchSamplerShard(batches, 2, rank, split, even)) for rank in (0, 1)]
    updates = [
        [i for shard in shards for batch in shard[u : u + 3] for i in batch] for u in range(0, len(shards[0]), 3)
    ]
    assert is_stratified(updates, groups)
    met = [i for update in updates for i in update]
    whole = n - n % (2 if split else 4) if drop else n
    assert len(set(met)) == whole
    assert len(met) == (-(-n // (2 if split else 4)) * (2 if split else 4) if even and not drop else whole)


def test_a_trainers_updates_have_the_shares(tmp_path):
    assert len(KEYS) == len(RARE)
    trainer = stratified(tmp_path)
    updates = trainer.updates
    assert is_stratified(updates, [example["task"] for example in RARE])
    # Four updates per epoch, of 6, 6, 6 and 5 examples.
    assert sorted(sum(updates[:4], [])) == sorted(sum(updates[4:8], [])) == list(range(23))
    assert updates[:4] != updates[4:8]


@pytest.mark.parametrize("step", [3, 6, 8])
def test_a_resumed_run_sees_the_same_examples(step, tmp_path):
    whole = stratified(tmp_path, save_strategy="steps", save_steps=1)
    resumed = stratified(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.updates == whole.updates[step:]
    assert torch.equal(flat(resumed.model), flat(whole.model))


def test_without_skipping_data_the_shares_remain(tmp_path):
    stratified(tmp_path, max_steps=6, save_strategy="steps", save_steps=6)
    resumed = stratified(tmp_path, resume=True, ignore_data_skip=True)
    assert is_stratified(resumed.updates, [example["task"] for example in RARE])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--jd_sampler stratified needs --jd_group_column"),
        (
            {"jd_group_column": "task", "train_sampling_strategy": "group_by_length"},
            "--jd_sampler stratified and --(train_sampling_strategy )?group_by_length both order the examples",
        ),
    ],
)
def test_contradictory_flags_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, jd_sampler="stratified", **flags)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(RARE)


def test_a_stream_is_refused(tmp_path):
    args = arguments(tmp_path, jd_sampler="stratified", jd_group_column="task", jd_groups=["rare", "often"])
    trainer = JDTrainer(lora("gpt2"), args, train_dataset=Stream(), data_collator=collate)
    with pytest.raises(ValueError, match="a stream has its own order"):
        trainer.train()
