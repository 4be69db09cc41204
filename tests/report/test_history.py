from __future__ import annotations

import json

import pytest

from hf_jd.report.figures import binned
from hf_jd.report.history import current_lines, read_history
from tests.report.runs import entry, write_log, write_run

GROUPS = ["b", "a/c"]


def text(*entries: dict) -> str:
    return "".join(json.dumps(one) + "\n" for one in entries)


def test_a_finished_run(tmp_path):
    history = read_history(write_run(tmp_path, GROUPS))
    assert history.groups == ["a/c", "b"]
    assert (history.steps, history.max_steps, history.finished) == (12, 100, True)
    assert history.losses["a/c"][3] == (4, 0.5)
    assert history.weights["b"][0] == (1, 0.5)
    assert history.evaluations["b"] == [(6, 0.5)]
    assert history.worst == ("a/c", 1.0)
    assert history.pairs["a/c", "b"][0] == (1, -1.0)
    assert history.totals["jd/conflicts"][-1] == (12, 0.25)


def test_a_run_under_way_whose_last_line_is_cut_off(tmp_path):
    folder = write_run(tmp_path, GROUPS, finished=False)
    log = folder / "jd_log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    history = read_history(folder)
    assert history.steps == 11
    assert not history.finished


def test_a_resumed_run_makes_steps_again():
    lines = [entry(step, []) for step in (5, 10, 15, 20)]
    again = [entry(15, [], begins="resumed", again=1), entry(20, [], again=1)]
    found = current_lines(text(*lines, *again))
    assert [one["step"] for one in found] == [5, 10, 15, 20]
    assert ["again" in one for one in found] == [False, False, True, True]


def test_a_resumed_run_that_evaluates_its_checkpoint_again_keeps_the_checkpoints_training_log():
    def trained(step):
        return {"step": step, "loss": 1.0}

    def evaluated(step, **more):
        return {"step": step, "eval_a_loss": 1.0, **more}

    before = [trained(4), evaluated(4), trained(5)]
    found = current_lines(text(*before, evaluated(4, begins="resumed", again=1), trained(5)))
    assert found == [trained(4), evaluated(4, again=1), trained(5)]


def test_a_new_run_in_the_same_folder():
    found = current_lines(text(entry(1, []), entry(2, []), entry(10, [], begins="anew"), entry(20, [])))
    assert [one["step"] for one in found] == [10, 20]


def test_a_line_that_a_kill_cut_off_amid_others():
    cut = text(entry(5, []))[:30] + "\n"
    assert [one["step"] for one in current_lines(text(entry(1, [])) + cut + text(entry(9, [])))] == [1, 9]


def write_state(folder, entries, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries, "max_steps": 50, **more}))


def test_without_a_log_the_state_that_trainer_saved_last(tmp_path):
    write_state(tmp_path / "checkpoint-9", [entry(9, GROUPS)])
    write_state(tmp_path / "checkpoint-10", [entry(10, GROUPS)])
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"log_hist')
    history = read_history(tmp_path)
    assert history.source == tmp_path / "checkpoint-10" / "trainer_state.json"
    assert (history.steps, history.max_steps) == (10, 50)
    write_state(tmp_path, [entry(12, GROUPS), {"step": 12, "train_runtime": 1.0}])
    assert read_history(tmp_path).finished


@pytest.mark.parametrize("prepare", ["nothing", "no entries", "a log without lines"])
def test_a_folder_without_logs(prepare, tmp_path):
    if prepare == "no entries":
        write_state(tmp_path, [])
    elif prepare == "a log without lines":
        write_log(tmp_path, [])
    with pytest.raises(ValueError, match=r"holds no logs of a run: it has no jd_log.jsonl, and no trainer_state.json"):
        read_history(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        read_history(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        read_history(tmp_path / "file")


def test_bins_hold_the_means_between_their_edges():
    found = binned([(1, 2.0), (2, 4.0), (3, float("nan")), (5, 7.0)], [0, 2, 3, 4, 5])
    assert found[0] == 3.0
    assert found[3] == 7.0
    assert all(value != value for value in found[1:3])
