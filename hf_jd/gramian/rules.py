"""Tier 1: rows in closed form, one short rule per kind of layer.

A rule is a pure function

    rule(module, input, grad_output, segments) -> {name of a parameter of the module: Rows}

of the layer's input [N, ...] (a list if it was called with several tensors) and output gradient [N, ...], batch first,
and of the segments that assign the N leading rows to objectives. It may leave out names: the next tier takes the
parameters that no rule covers. `RULES` maps exact types to rules; pass `Engine(model, rules={**RULES, MyLayer:
my_rule})` to add one. Other layers are recognised by behaviour (`recognise`): probing the layer decides, not its class
name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_jd.gramian.functional_call import call_again, without_traces
from hf_jd.gramian.layouts import Segments, UnsupportedError, shared_features
from hf_jd.gramian.rows import DenseRows, OuterRows, Rows, SparseRows, accumulation_dtype, narrow

Rule = Callable[[Any, Any, Tensor, Segments], dict[str, Rows]]


def outer(grad_output: Tensor, input: Tensor, segments: Segments, shape: torch.Size) -> Rows:
    """Form rows sum_t g_t x_t^T of a weight of `shape`; as factors if objectives are equal blocks of leading rows."""
    if input.dtype != grad_output.dtype:
        input = input.to(grad_output.dtype)
    if segments.ids is not None and narrow(shape):
        return DenseRows(segments.outer(input, grad_output).flatten(1), shape, transposed=True)
    if segments.ids is not None:
        return DenseRows(segments.outer(grad_output, input).flatten(1), shape)
    if segments.block == 1:
        return OuterRows(grad_output, input, shape)
    blocks = (segments.objectives, -1)
    return OuterRows(
        grad_output.reshape(*blocks, grad_output.shape[-1]), input.reshape(*blocks, input.shape[-1]), shape
    )


def _sum(values: Tensor, segments: Segments, parameter: Tensor) -> Rows:
    return DenseRows(segments.sum(values).to(parameter.dtype), parameter.shape)


def linear(module: nn.Linear, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """y = x W^T + b: rows sum_t g_t x_t^T and sum_t g_t."""
    g, rows = shared_features(grad_output), {}
    if module.weight.requires_grad:
        rows["weight"] = outer(g, shared_features(input), segments, module.weight.shape)
    if module.bias is not None and module.bias.requires_grad:
        rows["bias"] = _sum(g, segments, module.bias)
    return rows


def transposed_linear(module: Any, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """y = x W + b (transformers' Conv1D): rows sum_t x_t g_t^T and sum_t g_t."""
    g, rows = shared_features(grad_output), {}
    if module.weight.requires_grad:
        rows["weight"] = outer(shared_features(input).to(g.dtype), g, segments, module.weight.shape)
    if getattr(module, "bias", None) is not None and module.bias.requires_grad:
        rows["bias"] = _sum(g, segments, module.bias)
    return rows


def embedding(module: nn.Embedding, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """y = W[ids]: entry e of the table gets the gradients of the tokens with id e; none for `padding_idx`."""
    if module.scale_grad_by_freq:
        raise UnsupportedError(
            "nn.Embedding(scale_grad_by_freq=True) divides gradients by counts over the whole batch, so instances have "
            "no separate rows: set scale_grad_by_freq=False."
        )
    g = shared_features(grad_output)
    ids = input.reshape(g.shape[:2])
    owners = segments.token_ids(g.shape[:2]).to(ids.device)
    used = owners >= 0
    if module.padding_idx is not None:
        used = used & (ids != module.padding_idx)
    values = g[used].to(module.weight.dtype)
    return {"weight": SparseRows(owners[used], ids[used], values, segments.objectives, module.weight.shape)}


def layer_norm(module: nn.LayerNorm, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """y = x_hat w + b: rows sum_t g_t x_hat_t and sum_t g_t."""
    features, rows = len(module.normalized_shape), {}
    g = shared_features(grad_output, features)
    if module.weight is not None and module.weight.requires_grad:
        x_hat = F.layer_norm(input, module.normalized_shape, eps=module.eps)
        rows["weight"] = _sum(g * shared_features(x_hat, features), segments, module.weight)
    if module.bias is not None and module.bias.requires_grad:
        rows["bias"] = _sum(g, segments, module.bias)
    return rows


def rms_norm(module: nn.RMSNorm, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """y = x_hat w: rows sum_t g_t x_hat_t."""
    features = len(module.normalized_shape)
    x, g = shared_features(input, features), shared_features(grad_output, features)
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    return {"weight": _sum(_times_normalised(g, x, eps), segments, module.weight)}


def _times_normalised(g: Tensor, x: Tensor, eps: float) -> Tensor:
    """g x / sqrt(mean x^2 + eps) over the features [..., d], with fewer passes through memory than forming x_hat."""
    x = x.to(accumulation_dtype(x))
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return (g * x).mul_(torch.rsqrt(mean_square + eps))


def _channels(module: Any, x_hat: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of a scale and a shift per channel; tensors [N, C, *]."""
    rows = {}
    if module.weight is not None and module.weight.requires_grad:
        rows["weight"] = _sum(shared_features((grad_output * x_hat).movedim(1, -1)), segments, module.weight)
    if module.bias is not None and module.bias.requires_grad:
        rows["bias"] = _sum(shared_features(grad_output.movedim(1, -1)), segments, module.bias)
    return rows


def group_norm(module: nn.GroupNorm, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Like `layer_norm`, over groups of channels; input [N, C, *]."""
    return _channels(module, F.group_norm(input, module.num_groups, eps=module.eps), grad_output, segments)


def batch_norm(module: Any, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """With stored statistics (evaluation mode), a scale and a shift per channel; input [N, C, *]."""
    if module.training or module.running_mean is None:
        raise UnsupportedError(
            f"{type(module).__name__} in training mode normalises over the batch, so the loss of an instance depends "
            "on the others, and instances have no separate rows: use GroupNorm or LayerNorm, or put the norm in "
            "evaluation mode."
        )
    x_hat = F.batch_norm(input, module.running_mean, module.running_var, eps=module.eps)
    return _channels(module, x_hat, grad_output, segments)


def convolution(module: Any, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """nn.Conv1d/2d/3d: each objective's weight gradient, with all instances as groups of one convolution."""
    rows = {}
    if module.weight.requires_grad:
        if module.padding in ("same", "valid") or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            input, padding = F.pad(input, module._reversed_padding_repeated_twice, mode=mode), (0,)
        else:
            padding = module.padding
        input = input.to(grad_output.dtype)
        if segments.ids is None and segments.block == 1:
            n = segments.objectives
            batched = (1, -1, *input.shape[2:]), (1, -1, *grad_output.shape[2:])
            weights = _conv_weight(module, input.reshape(batched[0]), grad_output.reshape(batched[1]), padding, n)
        else:
            weights = torch.stack(
                [_conv_weight(module, input[i], grad_output[i], padding, 1) for i in segments.members()]
            )
        rows["weight"] = DenseRows(
            weights.reshape(segments.objectives, -1).to(module.weight.dtype), module.weight.shape
        )
    if module.bias is not None and module.bias.requires_grad:
        rows["bias"] = _sum(shared_features(grad_output.movedim(1, -1)), segments, module.bias)
    return rows


def _conv_weight(module: Any, input: Tensor, grad_output: Tensor, padding: tuple, copies: int) -> Tensor:
    shape = (copies * module.weight.shape[0], *module.weight.shape[1:])
    _, gradient, _ = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        input.new_empty(()).expand(shape),
        None,
        module.stride,
        padding,
        module.dilation,
        False,
        (0,),
        module.groups * copies,
        (False, True, False),
    )
    return gradient


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


def recognise(module: nn.Module, input: Tensor) -> Rule | None:
    """Find the rule of a layer that is not in `RULES`, by probing the layer on its own input.

    Recognises layers without children that compute x W^T + b, x W + b, c W[ids], or a scale per feature, y = a(x) +
    w * f(x) (the RMSNorms of transformers, including those with 1 + w; layer scales).

    Args:
        module: The layer.
        input: The only input that it was called with.
    """
    if input.is_floating_point():  # Under autocast, it may have fewer bits than the weights.
        input = input.to(torch.promote_types(input.dtype, next(module.parameters()).dtype))
    names = [name for name, _ in module.named_parameters()]
    if next(module.children(), None) is not None or "weight" not in names or not set(names) <= {"weight", "bias"}:
        return _scale_of(module, names[0], input) if len(names) == 1 and "." not in names[0] else None
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias") if "bias" in names else None
    try:
        with without_traces(module, input.device) as buffers:
            output = call_again(module, buffers, (input,))
        if weight.dim() == 2 and not input.is_floating_point():
            return _scaled_embedding(module, input, output)
        if weight.dim() == 2:
            if input.shape[-1] == weight.shape[1] and _same(output, F.linear(input, weight, bias)):
                return linear
            product = input @ weight if input.shape[-1] == weight.shape[0] else None
            if product is not None and _same(output, product if bias is None else product + bias):
                return transposed_linear
    except Exception:
        return None  # The layer can't be called on this input alone, for whatever reason: no closed form.
    return _scale_of(module, "weight", input) if bias is None else None


def _same(a: Tensor, b: Tensor, least: float = 1e-5) -> bool:
    tolerance = max(least, 10 * torch.finfo(b.dtype).eps)
    # An absolute tolerance must shrink with the outputs: in bfloat16, small outputs of a square matrix and of its
    # transpose would pass as equal.
    absolute = tolerance * min(1.0, float(b.abs().max())) if b.numel() else 0.0
    return a.shape == b.shape and bool(torch.allclose(a, b.to(a.dtype), rtol=tolerance, atol=absolute))


def _scaled_embedding(module: Any, ids: Tensor, output: Tensor) -> Rule | None:
    """c W[ids] (the scaled word embeddings of BART, Gemma, M2M): c times the rows of an embedding."""
    plain = F.embedding(ids, module.weight)
    if plain.shape != output.shape or not bool(plain.abs().sum() > 0):
        return None
    factor = float((output * plain).sum(dtype=torch.float64) / (plain * plain).sum(dtype=torch.float64))
    if not _same(output, plain * factor) or not isinstance(module, nn.Embedding):
        return None
    return lambda module, input, grad_output, segments: embedding(module, input, grad_output * factor, segments)


def _scale_of(module: nn.Module, name: str, input: Tensor) -> Rule | None:
    """A layer y = a(x) + w * f(x), w [features]: rows sum_t g_t f(x_t).

    f is the layer itself: with w = 1 if a = 0, with w = 0 if the layer computes (1 + w) f(x). A varied w verifies this.
    """
    weight = module.get_parameter(name)
    if weight.dim() != 1 or not input.is_floating_point():
        return None

    def at(value: Tensor, x: Tensor) -> Tensor:
        with without_traces(module, input.device) as buffers:
            return call_again(module, {name: value, **buffers}, (x,))

    try:
        zero, one = at(torch.zeros_like(weight), input), at(torch.ones_like(weight), input)
        probe = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)
        unit = 1.0 if _same(zero, torch.zeros_like(zero)) else 0.0
        f = one if unit else zero
        if zero.shape != input.shape or not _same(at(probe, input), zero + probe * f) or not _same(one, zero + f):
            return None
        eps = _rms_eps(lambda x: at(torch.full_like(weight, unit), x), input)
    except Exception:
        return None  # As above: no closed form.

    def scale(module: nn.Module, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
        parameter = module.get_parameter(name)
        if eps is None:
            values = shared_features(
                grad_output * call_again(module, {name: torch.full_like(parameter, unit)}, (input,))
            )
        else:
            values = _times_normalised(shared_features(grad_output), shared_features(input), eps)
        return {name: _sum(values, segments, parameter)}

    return scale


def _rms_eps(f: Callable[[Tensor], Tensor], input: Tensor) -> float | None:
    """Read the eps of f(x) = x / sqrt(mean x^2 + eps) from a small x; None if f is another function.

    Also None if f computes in float32 within a float64 model: its rounding is then part of the function.

    Args:
        f: A layer over the last dimension.
        input: One of its inputs: verified on it, and on a thousand times it.
    """
    small = 1e-3
    constant = torch.full_like(input[..., :1, :], small, dtype=accumulation_dtype(input))
    value = float(f(constant).double().mean())
    if not 0 < value < 1 + 1e-5:
        return None
    eps = max((small / value) ** 2 - small**2, 0.0)
    proved = all(_same(_times_normalised(torch.ones_like(x), x, eps), f(x), 1e-11) for x in (input, 1000 * input))
    return eps if proved else None
