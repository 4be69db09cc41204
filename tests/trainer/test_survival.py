"""What a run survives: kills, half-written checkpoints, losses that aren't finite; and what it refuses beforehand."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from hf_jd import JDTrainer
from hf_jd.checkpoints import newest_whole
from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, run

ROOT = Path(__file__).parents[2]
FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    command = [sys.executable, "-m", "tests.trainer.survivor", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    logs = {path.parent.name: path.read_text() for path in tmp_path.glob("*/log.txt")}
    assert any(found.pop("killed"))
    found.pop("files")
    assert all(found.values()), (found, logs)
    assert "Skipping checkpoint-9, which is incomplete: its trainer_state.json is truncated" in logs["write-6"]
    assert "it has no trainer_state.json" in logs["write-1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    run(lora("gpt2"), arguments(directory, save_strategy="steps", save_steps=2))
    return directory


@pytest.mark.parametrize("name", [*FILES, "adapter_model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("how", ["gone", "cut off"])
def test_an_incomplete_checkpoint_is_skipped(name, how, finished):
    file = finished / "checkpoint-4" / name
    content = file.read_bytes()
    assert newest_whole(finished, FILES) == (finished / "checkpoint-4", {})
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2])
    found, skipped = newest_whole(finished, FILES)
    file.write_bytes(content)
    assert found == finished / "checkpoint-2"
    assert list(skipped) == ["checkpoint-4"]
    assert "weights" in skipped["checkpoint-4"] or name in skipped["checkpoint-4"]


def test_a_checkpoint_without_all_shards_is_incomplete(finished, tmp_path):
    shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    index = tmp_path / "checkpoint-4" / "model.safetensors.index.json"
    for text in ('{"weight_map": {"a": "model-1.safetensors"}}', '{"weight_map": {"a": "mod', "", "{}"):
        index.write_text(text)
        assert newest_whole(tmp_path, FILES)[1] == {"checkpoint-4": "its model.safetensors.index.json is incomplete"}
    index.write_text('{"weight_map": {"a": "adapter_model.safetensors"}}')
    assert newest_whole(tmp_path, FILES)[0] == tmp_path / "checkpoint-4"


def test_checkpoints_are_ordered_by_number(finished, tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best"):
        shutil.copytree(finished / "checkpoint-4", tmp_path / name)
    assert newest_whole(tmp_path, FILES)[0] == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    assert newest_whole(tmp_path, FILES)[0] == tmp_path / "checkpoint-9"


def test_without_a_complete_checkpoint_training_starts_over(tmp_path, caplog):
    (tmp_path / "checkpoint-2").mkdir()
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path), train_dataset=examples(), data_collator=collate)
    trainer.train(resume_from_checkpoint=True)
    assert "starts from the beginning" in caplog.text
    assert trainer.state.global_step == 4
    lines = (tmp_path / "jd_log.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["begins"] == "anew"


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path), train_dataset=examples())
    with pytest.raises(ValueError, match="holds no checkpoint to resume"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="There is no checkpoint `.*/checkpoint-7` to resume"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer_state.json", "optimizer.pt", "rng_state.pth"])
def test_a_named_truncated_checkpoint_is_refused(name, finished, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(finished / "checkpoint-2", checkpoint)
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path), train_dataset=examples())
    with pytest.raises(ValueError, match=f"can't be resumed: its {name} is .*resume_from_checkpoint=True"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_named_checkpoint_without_random_states_resumes_with_a_warning(finished, tmp_path, caplog):
    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "rng_state.pth").unlink()
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path), train_dataset=examples(), data_collator=collate)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "can't be resumed exactly: it has no rng_state.pth" in caplog.text
    assert trainer.state.global_step == 4


def test_an_overwritten_checkpoint_is_incomplete_until_its_end(tmp_path, monkeypatch):
    flags = {"save_strategy": "steps", "save_steps": 2}
    run(lora("gpt2"), arguments(tmp_path, **flags))

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(JDTrainer, "_save_rng_state", fail)
    with pytest.raises(OSError, match="no space left"):
        run(lora("gpt2"), arguments(tmp_path, **flags))
    assert newest_whole(tmp_path, FILES)[0] == tmp_path / "checkpoint-4"
    assert not (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_an_unwritable_output_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    args = arguments(tmp_path / "file" / "run", save_strategy="steps")
    with pytest.raises(ValueError, match=r"can't be written \(.*\): choose another one with --output_dir"):
        JDTrainer(lora("gpt2"), args)


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match="1e-06 GB left, but a checkpoint takes about"):
        run(lora("gpt2"), arguments(tmp_path, save_strategy="steps"))
    run(lora("gpt2"), arguments(tmp_path, max_steps=1))


class Broken(JDTrainer):
    """A JDTrainer in which instance 1 of some updates has a nonfinite loss."""

    steps: tuple[int, ...] = ()

    def compute_losses(self, model, inputs):
        losses, counted = super().compute_losses(model, inputs)
        if self.state.global_step in self.steps and len(losses) == 2:
            losses = losses * torch.tensor([[1.0], [torch.nan]])
        return losses, counted


def broken(*steps: int) -> type:
    return type("Broken", (Broken,), {"steps": steps})


def test_consecutive_nonfinite_updates_end_the_run(tmp_path, caplog):
    model = lora("gpt2")
    args = arguments(tmp_path, max_steps=9, jd_max_non_finite=3, jd_group_column="task")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match="3 updates in a row .* the last one being 7.*--jd_max_non_finite"),
    ):
        run(model, args, cls=broken(1, 2, 4, 5, 6))
    assert flat(model).isfinite().all()
    assert "Update 2: instance 1 (group `" in caplog.text


def test_occasional_nonfinite_updates_do_not_end_the_run(tmp_path):
    args = arguments(tmp_path, max_steps=7, jd_max_non_finite=3)
    trainer = run(lora("gpt2"), args, cls=broken(1, 2, 4, 5))
    assert logged(trainer, "jd/non_finite").tolist() == [0, 1, 1, 0, 1, 1, 0]
