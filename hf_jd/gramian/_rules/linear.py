"""Rules of linear layers."""

from typing import Any

from torch import Tensor, nn

from hf_jd.gramian._rules.rule import outer, summed
from hf_jd.gramian.layouts import Segments, shared_features
from hf_jd.gramian.rows import Rows


def linear(module: nn.Linear, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of y = x W^T + b: sum_t g_t x_t^T and sum_t g_t."""
    g, rows = shared_features(grad_output), {}
    if module.weight.requires_grad:
        rows["weight"] = outer(g, shared_features(input), segments, module.weight.shape)
    if module.bias is not None and module.bias.requires_grad:
        rows["bias"] = summed(g, segments, module.bias)
    return rows


def transposed_linear(module: Any, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of y = x W + b (transformers' Conv1D): sum_t x_t g_t^T and sum_t g_t."""
    g, rows = shared_features(grad_output), {}
    if module.weight.requires_grad:
        rows["weight"] = outer(shared_features(input).to(g.dtype), g, segments, module.weight.shape)
    if getattr(module, "bias", None) is not None and module.bias.requires_grad:
        rows["bias"] = summed(g, segments, module.bias)
    return rows
