"""Find the rule of a layer that is not in `RULES` by its behaviour: probing the layer decides, not its class name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_jd.gramian._rules.embedding import embedding
from hf_jd.gramian._rules.linear import linear, transposed_linear
from hf_jd.gramian._rules.normalisation import times_normalised
from hf_jd.gramian._rules.rule import Rule, summed
from hf_jd.gramian.functional_call import call_again, without_traces
from hf_jd.gramian.layouts import Segments, shared_features
from hf_jd.gramian.rows import Rows, accumulation_dtype


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
    """Return the rule of c W[ids] (scaled word embeddings of BART, Gemma, M2M): c times the rows of an embedding."""
    plain = F.embedding(ids, module.weight)
    if plain.shape != output.shape or not bool(plain.abs().sum() > 0):
        return None
    factor = float((output * plain).sum(dtype=torch.float64) / (plain * plain).sum(dtype=torch.float64))
    if not _same(output, plain * factor) or not isinstance(module, nn.Embedding):
        return None
    return lambda module, input, grad_output, segments: embedding(module, input, grad_output * factor, segments)


def _scale_of(module: nn.Module, name: str, input: Tensor) -> Rule | None:
    """Return the rule of a layer y = a(x) + w * f(x), w [features]: rows sum_t g_t f(x_t).

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
            values = times_normalised(shared_features(grad_output), shared_features(input), eps)
        return {name: summed(values, segments, parameter)}

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
    proved = all(_same(times_normalised(torch.ones_like(x), x, eps), f(x), 1e-11) for x in (input, 1000 * input))
    return eps if proved else None
