"""A model that is called with one input per instance, and again with several, like encoders of queries and passages."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_jd.gramian import Engine


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (1, 3, 2)])
def test_rows_are_those_of_each_instance(order):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertModel(BertConfig(vocab_size=30, max_position_embeddings=16, **sizes, **dropout)).double()
    model.pooler = None
    engine, instances = Engine(model), 4
    for length in (5, 7):
        calls = [torch.randint(30, (k * instances, length + k)) for k in order]
        outputs = [model(ids).last_hidden_state.mean(1).view(-1, instances, 16) for ids in calls]
        anchors = outputs[0].sum(0)
        losses = sum((anchors.sin() * other.sum(0)).sum(1) for other in outputs[1:]) + anchors.sum(1)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        rows = torch.stack([torch.cat([g.flatten() for g in each]) for each in gradients])
        gramian = engine.compute_gramian(losses)
        assert torch.allclose(gramian, rows @ rows.T, rtol=1e-9, atol=1e-12)
        assert set(engine.tiers().values()) == {1}
