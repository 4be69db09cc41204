"""The part of a loss that belongs to no token is never dropped, such as the router's loss in a mixture of experts."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.models import VOCABULARY
from tests.trainer.runs import arguments, flat, logged, relative, run, stock

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*further passes now"),
    pytest.mark.filterwarnings("ignore:.*backward pass"),
]
GROUP = {"jd_objectives": "group", "jd_group_column": "task"}


def mixtral(coefficient: float = 0.5) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": coefficient > 0}
    config = MixtralConfig(vocab_size=VOCABULARY, **sizes, **experts, router_aux_loss_coef=coefficient)
    config._experts_implementation = "eager"  # The grouped implementation doesn't support float64.
    return MixtralForCausalLM(config).double()


@pytest.mark.parametrize("options", [{}, GROUP, {"jd_backward": "two_pass"}], ids=["instance", "group", "two-pass"])
def test_mean_equals_trainer_with_experts(options, tmp_path):
    flags = {"per_device_train_batch_size": 4, "max_steps": 3}
    theirs = stock(mixtral(), tmp_path, **flags)
    ours = run(mixtral(), arguments(tmp_path, jd_weighting="mean", **flags, **options))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    without = stock(mixtral(0.0), tmp_path, **flags)
    assert relative(flat(without.model), flat(theirs.model)) > 1e-3


def test_a_small_extra_loss_is_not_mistaken_for_rounding(tmp_path):
    theirs = stock(mixtral(1e-7), tmp_path, max_steps=1)
    ours = run(mixtral(1e-7), arguments(tmp_path, jd_weighting="mean", max_steps=1))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6


def test_extra_losses_are_summed_over_micro_batches(tmp_path):
    """Trainer adds up the balancing losses of micro-batches, but divides other losses by the number of all tokens."""
    flags = {"max_steps": 2, "optim": "sgd", "gradient_accumulation_steps": 3}
    theirs = stock(mixtral(), tmp_path, **flags)
    ours = run(mixtral(), arguments(tmp_path, jd_weighting="mean", **flags))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6


def test_no_weighting_sees_the_extra_loss(tmp_path):
    states = [run(mixtral(c), arguments(tmp_path, max_steps=1)).jd_state for c in (0.5, 0.0)]
    assert relative(states[0].gramian, states[1].gramian) < 1e-6
