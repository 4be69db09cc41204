"""Rules of normalisation layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_jd.gramian._rules.rule import summed
from hf_jd.gramian.layouts import Segments, UnsupportedError, shared_features
from hf_jd.gramian.rows import Rows, accumulation_dtype


def layer_norm(module: nn.LayerNorm, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of y = x_hat w + b: sum_t g_t x_hat_t and sum_t g_t."""
    features, rows = len(module.normalized_shape), {}
    g = shared_features(grad_output, features)
    if module.weight is not None and module.weight.requires_grad:
        x_hat = F.layer_norm(input, module.normalized_shape, eps=module.eps)
        rows["weight"] = summed(g * shared_features(x_hat, features), segments, module.weight)
    if module.bias is not None and module.bias.requires_grad:
        rows["bias"] = summed(g, segments, module.bias)
    return rows


def rms_norm(module: nn.RMSNorm, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of y = x_hat w: sum_t g_t x_hat_t."""
    features = len(module.normalized_shape)
    x, g = shared_features(input, features), shared_features(grad_output, features)
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    return {"weight": summed(times_normalised(g, x, eps), segments, module.weight)}


def times_normalised(g: Tensor, x: Tensor, eps: float) -> Tensor:
    """Compute g x / sqrt(mean x^2 + eps) over features [..., d], with fewer passes through memory than by x_hat."""
    x = x.to(accumulation_dtype(x))
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return (g * x).mul_(torch.rsqrt(mean_square + eps))


def _channels(module: Any, x_hat: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of a scale and a shift per channel; tensors [N, C, *]."""
    rows = {}
    if module.weight is not None and module.weight.requires_grad:
        rows["weight"] = summed(shared_features((grad_output * x_hat).movedim(1, -1)), segments, module.weight)
    if module.bias is not None and module.bias.requires_grad:
        rows["bias"] = summed(shared_features(grad_output.movedim(1, -1)), segments, module.bias)
    return rows


def group_norm(module: nn.GroupNorm, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form rows like `layer_norm`, over groups of channels; input [N, C, *]."""
    return _channels(module, F.group_norm(input, module.num_groups, eps=module.eps), grad_output, segments)


def batch_norm(module: Any, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of a scale and a shift per channel, with stored statistics (evaluation mode); input [N, C, *]."""
    if module.training or module.running_mean is None:
        raise UnsupportedError(
            f"{type(module).__name__} in training mode normalises over the batch, so the loss of an instance depends "
            "on the others, and instances have no separate rows: use GroupNorm or LayerNorm, or put the norm in "
            "evaluation mode."
        )
    x_hat = F.batch_norm(input, module.running_mean, module.running_var, eps=module.eps)
    return _channels(module, x_hat, grad_output, segments)
