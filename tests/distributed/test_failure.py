"""Processes that end, and processes that train differently."""

from __future__ import annotations

import pytest

from hf_jd.checkpoints import newest_whole
from tests.distributed.pool import SECONDS, Pool
from tests.marks import slow


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("seed", "`seed`"),
        ("flags", "`jd_backward`"),
        ("examples", "`examples`"),
        ("order", "`examples`"),
        ("checkpoint", "`resume_from_checkpoint`"),
    ],
)
def test_all_processes_name_what_differs(what, name, pools):
    for failed, answer in pools(2).answers_of("differ", what=what):
        assert failed
        assert f"The processes differ in {name} (here: " in answer


def test_differing_weights_are_found(pools):
    for failed, answer in pools(2).answers_of("differ", what="weights"):
        assert failed
        assert "After 2 updates, 1 of 8 parameters are not the same on all processes (first: `" in answer


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, pools):
    """Return the parameters of uninterrupted runs."""
    return {
        sharded: pools(2).run("survive", directory=str(tmp_path_factory.mktemp("whole")), sharded=sharded)[0]
        for sharded in (False, True)
    }


@pytest.mark.parametrize(("sharded", "kill"), [slow(False, 1), (False, 4), slow(True, 6)])
def test_a_killed_process_ends_all_and_the_run_resumes_from_its_checkpoint(sharded, kill, tmp_path, unharmed):
    pool = Pool(2)
    pool.ask("survive", directory=str(tmp_path), sharded=sharded, kill=kill)
    answered = pool.answer(SECONDS)
    pool.end()
    assert answered is not None
    rank, (failed, answer) = answered
    assert rank == 0
    assert failed
    assert "because another one has ended or didn't answer in time" in answer
    checkpoint, _ = newest_whole(tmp_path, ["scheduler.pt"])
    assert checkpoint is not None
    assert f"The last complete checkpoint is `{checkpoint}`" in answer
    pool = Pool(2)
    try:
        resumed = pool.run("survive", directory=str(tmp_path), sharded=sharded)
    finally:
        pool.end()
    assert resumed[0]["parameters"] == unharmed[sharded]["parameters"]


# For each checkpoint, the first process writes arguments, optimizer, scheduler, weighting, random numbers and state.
@pytest.mark.parametrize(
    ("sharded", "rank", "file", "missing"),
    [
        slow(False, 0, 2, "it has no trainer_state.json"),
        (False, 0, 6, "its trainer_state.json is truncated"),
        (False, 1, 1, "rng_state_1.pth"),
        slow(True, 1, 1, "rng_state_1.pth"),
    ],
)
def test_a_run_survives_a_kill_while_several_processes_write_a_checkpoint(
    sharded, rank, file, missing, tmp_path, unharmed
):
    pool = Pool(2)
    pool.ask("survive", directory=str(tmp_path), sharded=sharded, kill_in_write=(rank, file))
    answered = pool.answer(SECONDS)
    pool.end()
    assert answered is not None
    survivor, (failed, answer) = answered
    assert survivor == 1 - rank
    assert failed
    assert f"The last complete checkpoint is `{tmp_path / 'checkpoint-6'}`" in answer
    pool = Pool(2)
    try:
        resumed = pool.run("survive", directory=str(tmp_path), sharded=sharded)
    finally:
        pool.end()
    for result in resumed:
        assert result["parameters"] == unharmed[sharded]["parameters"]
        (skipped,) = result["said"]
        assert "Skipping checkpoint-9, which is incomplete" in skipped
        assert missing in skipped
