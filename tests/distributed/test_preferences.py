"""In TRL's trainers, two processes give the result of one."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
CASES = {
    "dpo-instance": ("dpo", {}),
    "dpo-group": ("dpo", GROUP),
    "grpo-reward": ("grpo", {"jd_objectives": "reward"}),
    "grpo-reward-off-policy": ("grpo", {"jd_objectives": "reward", "num_iterations": 3, "jd_kl": "objective"}),
    "grpo-group": ("grpo", GROUP),
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name, pools):
    from tests.distributed.preferences import train

    trainer, flags = CASES[name]
    many = pools(2).run("preferences.train", name=trainer, **flags)
    one = train(trainer, **flags)
    assert (many[0]["parameters"] == many[1]["parameters"]).all()
    difference = np.linalg.norm(many[0]["parameters"] - one["parameters"]) / np.linalg.norm(one["parameters"])
    assert difference < 1e-6
    assert len(one["history"]) == 3
    for our, their in zip(many[0]["history"], one["history"], strict=True):
        ours = {key: our[key] for key in their if key.startswith("jd/")}
        assert ours == pytest.approx({key: their[key] for key in ours}, rel=1e-3, abs=1e-5)
        assert len(ours) > 5
