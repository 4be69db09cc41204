"""jd_log.jsonl: what a run logs while it runs."""

from __future__ import annotations

import json

import pytest
import torch

from hf_jd import JDTrainer
from hf_jd.metrics import Averages, pairs, step_metrics
from hf_jd.report.history import current_lines, read_history
from hf_jd.trainer.run.run_log import RunLog
from tests.models import tiny_gpt2, with_lora
from tests.trainer.runs import arguments, collate, examples


def trainer(folder, **flags):
    saving = {"save_steps": 2, "save_strategy": "steps"}
    args = arguments(folder, jd_objectives="group", jd_group_column="task", **saving, **flags)
    return JDTrainer(with_lora(tiny_gpt2(), warm=True), args, train_dataset=examples(24), data_collator=collate)


def lines(folder):
    return current_lines((folder / "jd_log.jsonl").read_text())


def test_the_log_has_trainers_logs_and_group_cosines(tmp_path):
    run = trainer(tmp_path, max_steps=3)
    run.train()
    written = lines(tmp_path)
    assert [
        {k: v for k, v in one.items() if k not in ("pairs", "max_steps")} for one in written
    ] == run.state.log_history
    state = run.jd_state
    norms = state.gramian.diagonal().sqrt()
    cosines = state.gramian / norms.outer(norms)
    found = {(a, b): series[-1][1] for (a, b), series in read_history(tmp_path).pairs.items()}
    for i, a in enumerate(state.names):
        for j in range(i + 1, len(state.names)):
            assert found[tuple(sorted((a, state.names[j])))] == pytest.approx(float(cosines[i, j]), abs=1e-4)


def test_a_resumed_run_reads_like_an_uninterrupted_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer(whole, max_steps=4).train()
    stopped = trainer(cut, max_steps=4)
    log = stopped.log

    def killed(logs, *args):
        log(logs, *args)
        if stopped.state.global_step == 3:
            raise KeyboardInterrupt

    stopped.log = killed
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    with (cut / "jd_log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_history(cut).steps == 3
    trainer(cut, max_steps=4).train(resume_from_checkpoint=True)
    a, b = read_history(whole), read_history(cut)
    assert a.losses == b.losses
    assert a.pairs == b.pairs
    assert a.finished
    assert b.finished


def test_a_new_run_in_the_same_folder_is_read_alone(tmp_path):
    trainer(tmp_path, max_steps=3).train()
    trainer(tmp_path, max_steps=2).train()
    assert max(one["step"] for one in lines(tmp_path)) == 2


def test_pairs_are_averaged_over_the_steps_that_had_both(tmp_path):
    gramian = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 4.0]])
    averages, log = Averages(), RunLog()
    for ids, names in (([0, 0, 1], {0: "a", 1: "b"}), ([0, 2], {0: "a", 2: "c"}), ([2, 0], {0: "a", 2: "c"})):
        m = len(ids)
        averages.add(step_metrics(gramian[None, :m, :m], torch.ones(1, m), *torch.ones(2, m), torch.tensor(ids), names))
    log.write(tmp_path / "new", {"step": 1}, pairs(averages.take()))
    log.write(tmp_path / "new", {"step": 2}, pairs(averages.take()))
    first, second = (json.loads(line) for line in (tmp_path / "new" / "jd_log.jsonl").read_text().splitlines())
    assert first["pairs"] == {"names": ["a", "b", "c"], "cosines": [0.0, 0.5, None]}
    assert (first["begins"], "begins" in second, "pairs" in second) == ("anew", False, False)
