"""The rule of convolutions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_jd.gramian._rules.rule import summed
from hf_jd.gramian.layouts import Segments, shared_features
from hf_jd.gramian.rows import DenseRows, Rows


def convolution(module: Any, input: Tensor, grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of nn.Conv1d/2d/3d: the weight gradients, with all instances as groups of one convolution."""
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
        rows["bias"] = summed(shared_features(grad_output.movedim(1, -1)), segments, module.bias)
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
