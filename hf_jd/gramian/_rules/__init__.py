"""Tier 1: rows in closed form, one short rule per kind of layer, in a file per family.

`RULES` maps exact types to rules; pass `Engine(model, rules={**RULES, MyLayer: my_rule})` to add one. Other layers are
recognised by behaviour (`recognition.py`).
"""

from collections.abc import Mapping

from torch import nn

from hf_jd.gramian._rules.convolution import convolution
from hf_jd.gramian._rules.embedding import embedding
from hf_jd.gramian._rules.linear import linear
from hf_jd.gramian._rules.normalisation import batch_norm, group_norm, layer_norm, rms_norm
from hf_jd.gramian._rules.rule import Rule, outer

RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.SyncBatchNorm: batch_norm,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
}

__all__ = ["RULES", "Rule", "outer"]
