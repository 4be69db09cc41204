"""Call a module again, with other tensors in place of its parameters and buffers."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from hf_jd.gramian.layouts import DrawsError, UnmappedError
from hf_jd.gramian.random_streams import unchanged_streams
from hf_jd.gramian.taps import TapEvent


def call_again(
    module: nn.Module, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Call a module with `tensors` in place of its tensors of the same names, wherever the module uses them.

    Each place is replaced once: `torch.func.functional_call` on its own replaces the tensors of a module with two
    parents twice, and doesn't restore the original afterwards.
    """
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    wanted = {id(named[name]): tensor for name, tensor in tensors.items()}
    places = {}
    for path, owner in module.named_modules():
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and id(tensor) in wanted:
                places[f"{path}.{name}" if path else name] = wanted[id(tensor)]
    with torch.compiler.set_stance("force_eager"):  # A compiled module isn't compiled anew, for other tensors.
        return functional_call(module, places, tuple(args), dict(kwargs or {}), tie_weights=False)


@contextmanager
def without_traces(module: nn.Module, device: torch.device, replayed: bool = False) -> Generator[dict[str, Tensor]]:
    """Protect buffers and global random streams from calls of a module within the context.

    Args:
        module: The module.
        device: Where its random numbers come from, besides the CPU.
        replayed: Whether the calls get the random numbers of its forward.

    Yields:
        Copies of the module's buffers, for the calls to use.

    Raises:
        DrawsError: On exit, if the module has drawn random numbers other than those of its forward.
        RuntimeError: On exit, if the copies have changed: the forward has a memory.
    """
    copies = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with unchanged_streams(device) as has_drawn:
        yield copies
        if not replayed and has_drawn():
            raise DrawsError
    if any(not torch.equal(copies[name], buffer) for name, buffer in module.named_buffers()):
        raise RuntimeError("the module's forward changes its buffers, so another call computes something else")


def single_precision_gradients(
    event: TapEvent, names: Sequence[str], inputs: Sequence[Tensor], grad_output: Tensor
) -> dict[str, Tensor]:
    """Compute the vector-Jacobian product of a float32 copy of a module's first output, by parameter.

    Args:
        event: From the module's tap.
        names: The parameters of interest, by name below the module.
        inputs: The tensors to call it with.
        grad_output: The gradient of its output.
    """

    def single(tensor: Tensor) -> Tensor:
        return tensor.detach().float() if tensor.is_floating_point() else tensor

    module, device = event.tap.module, grad_output.device
    copies = {name: single(t).clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}
    with unchanged_streams(device), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        wanted = [copies[name].requires_grad_() for name in names]
        args, kwargs = event.call.arguments([single(t) for t in inputs])
        output = event.call.float_outputs(call_again(module, copies, args, kwargs))[0]
        gradients = torch.autograd.grad(output, wanted, grad_output.to(output.dtype))
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(names, gradients, strict=True)}


class RepeatedCall:
    """Another call of a module, with the same arguments as in its forward, to differentiate it.

    Args:
        event: From the module's tap; its targets are the parameters of interest.
        buffers: The buffers to call it with.

    Attributes:
        is_replayed: Whether the module gets the random numbers of its forward.
    """

    def __init__(self, event: TapEvent, buffers: Mapping[str, Tensor]):
        self.is_replayed = event.call.random_state is not None
        self._module, self._call, self._buffers = event.tap.module, event.call, buffers
        self._used = [g is not None for g in event.grad_outputs]
        self._device = next(iter(event.targets.values())).device
        self._parameters = {name: p.detach() for name, p in event.targets.items()}

    @staticmethod
    @contextmanager
    def of(event: TapEvent) -> "Generator[RepeatedCall]":
        """Open a context in which the module leaves no traces (`without_traces`), under the autocast of its call."""
        assert event.first is not None
        device, is_replayed = event.first.device, event.call.random_state is not None
        with event.call.context(), without_traces(event.tap.module, device, is_replayed) as buffers:
            yield RepeatedCall(event, buffers)

    def traced_row(self, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """Compute the vector-Jacobian product for output gradients, by parameter; inside `vmap`."""
        return vjp(lambda parameters: self.outputs(parameters, inputs), self._parameters)[1](tuple(gradients))[0]

    def row(self, inputs: list[Tensor], gradients: list[Tensor], expected: Sequence[Tensor]) -> dict[str, Tensor]:
        """Do the same by autograd, which allows custom functions; UnmappedError if outputs aren't as `expected`."""
        with torch.enable_grad():
            parameters = {name: p.clone().requires_grad_() for name, p in self._parameters.items()}
            outputs = self.outputs(parameters, inputs)
        if not all(_alike(output, wanted) for output, wanted in zip(outputs, expected, strict=False)):
            raise UnmappedError
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and o.numel()]
        if not pairs:
            return {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        rows = torch.autograd.grad(
            [o for o, _ in pairs],
            list(parameters.values()),
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        return {name: g.to_dense() if g.is_sparse else g for name, g in zip(parameters, rows, strict=True)}

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs that have a gradient, with `parameters` in place of the module's own."""
        every = self.all_outputs(inputs, parameters)
        return tuple(o for o, used in zip(every, self._used, strict=True) if used)

    def all_outputs(
        self, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Return all outputs that the tap wrapped."""
        args, kwargs = self._call.arguments(list(inputs))
        self._call.replay(self._device)
        return self._call.float_outputs(call_again(self._module, {**(parameters or {}), **self._buffers}, args, kwargs))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Return whether outputs come from the same random numbers: otherwise they differ by far more than rounding."""
    return bool((a - b).norm() <= math.sqrt(torch.finfo(b.dtype).eps) * b.norm())
