"""What a rule is, and the two kinds of rows that most rules form: of a matrix, and of a vector.

A rule is a pure function

    rule(module, input, grad_output, segments) -> {name of a parameter of the module: Rows}

of the layer's input [N, ...] (a list if it was called with several tensors) and output gradient [N, ...], batch first,
and of the segments that assign the N leading rows to objectives. It may leave out names: the next tier takes the
parameters that no rule covers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_jd.gramian.layouts import Segments
from hf_jd.gramian.rows import DenseRows, OuterRows, Rows, narrow

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


def summed(values: Tensor, segments: Segments, parameter: Tensor) -> Rows:
    """Form rows sum_t v_t of a parameter with the shape of v_t."""
    return DenseRows(segments.sum(values).to(parameter.dtype), parameter.shape)
