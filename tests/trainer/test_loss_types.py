"""DPO's list of losses as objectives: rows compared with one backward pass per loss, and `mean` with TRL."""

from __future__ import annotations

import pytest
import torch

from tests.invariant.test_trl_trainers import GROUP, PAIRS, TOKENIZER, lora, measured
from tests.trainer.runs import DESCENT, arguments, flat, relative

pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from hf_jd import JDDPOConfig, JDDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
LOSS = {"jd_objectives": "loss"}


def trained(cls, config, directory, run=True, **flags):
    set_seed(0)
    args = arguments(directory, config, **{**DESCENT, **MPO, **flags})
    trainer = cls(model=lora(), args=args, train_dataset=PAIRS, processing_class=TOKENIZER)
    if run:
        trainer.train()
    return trainer


@pytest.mark.parametrize("watched", [{}, {"jd_monitor_every": 2}], ids=["weighed", "watched"])
def test_mean_equals_trls_trainer(watched, tmp_path):
    theirs = trained(DPOTrainer, DPOConfig, tmp_path)
    ours = trained(JDDPOTrainer, JDDPOConfig, tmp_path, **LOSS, jd_weighting="mean", **watched)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(flat(theirs.model), flat(lora())) > 1e-4
    assert ours.jd_state.names == MPO["loss_type"]
    assert ours.loss_weights == MPO["loss_weights"]
    for our, their in zip(measured(ours), measured(theirs), strict=True):
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-4, abs=1e-6)


def test_rows_equal_each_losss_gradient(tmp_path):
    trainer = trained(JDDPOTrainer, JDDPOConfig, tmp_path, **LOSS, jd_weighting="upgrad", max_steps=1)
    actual = trainer.jd_state.gramian
    rows = []
    for name, weight in zip(MPO["loss_type"], MPO["loss_weights"], strict=True):
        flags = {"loss_type": [name], "loss_weights": [weight], "max_steps": 1, "max_grad_norm": 0.0}
        rows.append((flat(lora()) - flat(trained(DPOTrainer, DPOConfig, tmp_path, **flags).model)).double() / 0.1)
    rows = torch.stack(rows)
    assert relative(actual, 9 * rows @ rows.T) < 1e-4  # The difference of float32 parameters.


def test_unmeasured_updates_use_the_last_weights_by_loss(tmp_path):
    trainer = trained(JDDPOTrainer, JDDPOConfig, tmp_path, **LOSS, jd_weighting="mgda", jd_every=2, max_steps=4)
    assert set(trainer.jd_control.last) == set(MPO["loss_type"])
    assert sum("jd/min_gw" in entry for entry in trainer.state.log_history) == 2


def test_groups_work_with_several_losses(tmp_path):
    trainer = trained(JDDPOTrainer, JDDPOConfig, tmp_path, **GROUP)
    assert trainer.jd_state.names == ["a", "b"]


@pytest.mark.parametrize("names", [["sigmoid"], ["sigmoid", "sft", "sigmoid"]])
def test_a_single_or_repeated_loss_is_refused(names, tmp_path):
    flags = {**LOSS, "loss_type": names, "loss_weights": None}
    with pytest.raises(ValueError, match="--loss_type is `sigmoid`.*: give each once, and several, or choose"):
        trained(JDDPOTrainer, JDDPOConfig, tmp_path, **flags)


def test_weightings_that_read_losses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the weighting `dwa` needs the value of each objective"):
        trained(JDDPOTrainer, JDDPOConfig, tmp_path, jd_objectives="loss", jd_weighting="dwa")
