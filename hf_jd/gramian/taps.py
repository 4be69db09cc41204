"""Observe a layer's input and output gradient together, with a forward hook and an autograd node.

The hook passes a module's outputs through `Tap`, an identity whose backward sees the output gradient and, through
`save_for_backward`, the input: activation checkpointing can drop and recompute it, and no memory is added. Every tap
depends on the engine's `sentinel`, a 0-d tensor that requires grad: a backward to the sentinel alone runs all taps and
prunes every weight gradient that rules replace.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_jd.gramian.random_streams import RandomState, random_state, set_random_state

MOST_FORWARDS = 8  # forwards that a tap remembers at most: a thousand forwards without a Gramian must not fill memory
NO_AUTOCAST = ("cpu", torch.bfloat16, False)


@dataclass
class Call:
    """How a module was called, apart from its tensors, and under which autocast: enough to call it again.

    Attributes:
        modes: Whether the module and each of its submodules was in training mode.
        random_state: The state of the random streams before the call; None if the module isn't known to draw.
    """

    modes: tuple[bool, ...]
    spec: pytree.TreeSpec | None = None  # None: one positional tensor
    leaves: list[Any] = field(default_factory=list)
    outputs: list[int] = field(default_factory=lambda: [0])
    autocast: tuple[str, torch.dtype, bool] = NO_AUTOCAST
    random_state: RandomState | None = None

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments of the call, with `tensors` in place of the original ones."""
        if self.spec is None:
            return tuple(tensors), {}
        iterator = iter(tensors)
        leaves = [next(iterator) if leaf is Tensor else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)

    def context(self) -> AbstractContextManager:
        """Return the autocast context of the call."""
        kind, dtype, enabled = self.autocast
        return torch.autocast(kind, dtype=dtype, enabled=enabled)

    def replay(self, device: torch.device) -> None:
        """Restore the random streams to their state before the call, if known."""
        if self.random_state is not None:
            set_random_state(self.random_state, device)

    @contextmanager
    def modes_of(self, module: nn.Module) -> Generator[None]:
        """Put the module and its submodules in the modes of the call: `eval()` may have been called since."""
        now = {m: m.training for m in module.modules()}
        try:
            for m, mode in zip(now, self.modes, strict=False):
                m.training = mode
            yield
        finally:
            for m, mode in now.items():
                m.training = mode

    def float_outputs(self, output: Any) -> tuple[Tensor, ...]:
        """Select the outputs that the tap wrapped from the result of another call."""
        leaves = pytree.tree_leaves(output)
        return tuple(leaves[i] for i in self.outputs)


@lru_cache
def leaf_call(training: bool, autocast: tuple[str, torch.dtype, bool] | None) -> Call:
    """Return the call of a module without submodules, with one positional tensor; equal calls share one object."""
    return Call((training,)) if autocast is None else Call((training,), autocast=autocast)


class TapEvent(NamedTuple):
    """What a tap observes in a backward.

    Attributes:
        tap: The tap.
        targets: The parameters whose rows its module gives, by name.
        call: How the module was called.
        inputs: The tensors it was called with; None if the model has changed them in place since.
        grad_outputs: The gradients of its outputs.
    """

    tap: "ModuleTap"
    targets: Mapping[str, nn.Parameter]
    call: Call
    inputs: Sequence[Tensor] | None
    grad_outputs: Sequence[Tensor | None]

    @property
    def first(self) -> Tensor | None:
        """The first gradient of an output."""
        for g in self.grad_outputs:
            if g is not None:
                return g
        return None


class Recorder(Protocol):
    """A receiver of the events of one backward."""

    def record(self, event: TapEvent) -> None:
        """Record one event."""


@dataclass(eq=False)
class Switch:
    """The state that all taps of one engine share.

    Attributes:
        sentinel: A 0-d tensor that requires grad, on which every tap depends.
        recorder: Receives the events of the current backward; None ignores them.
        is_paused: Whether taps are disabled.
    """

    sentinel: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    recorder: Recorder | None = None
    is_paused: bool = False


class Forward(NamedTuple):
    """A forward with gradient that a tap has observed.

    Attributes:
        call: How the module was called.
        shape: Of its first output.
        place: The sequence number of the tap's node in autograd.
    """

    call: Call
    shape: torch.Size
    place: int


class Tap(torch.autograd.Function):
    """The identity on a module's outputs; in a backward it reports a `TapEvent`.

    Outputs are returned detached, neither as views nor marked dirty, so models can go on to change them in place.
    """

    @staticmethod
    def forward(ctx: Any, sentinel: Tensor, place: tuple, *outputs: Tensor) -> Any:
        ctx.tap, ctx.targets, ctx.call, inputs = place
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        first = outputs[0].shape
        ctx.tap.note(Forward(ctx.call, first, ctx._sequence_nr()))
        if len(outputs) == 1:
            ctx.shapes = (first,)
            return outputs[0].detach()
        ctx.shapes = [output.shape for output in outputs]
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        tap, call = ctx.tap, ctx.call
        recorder = tap.switch.recorder
        if recorder is not None:
            event = TapEvent(tap, ctx.targets, call, _saved(ctx), grad_outputs)
            if len(call.modes) == 1 and tap.module.training == call.modes[0]:
                recorder.record(event)
            else:
                with call.modes_of(tap.module):
                    recorder.record(event)
        return None, None, *grad_outputs


def _apply(*args: Any) -> Any:
    """Call `Tap.apply`, skipping its handling of torch.func transforms if none is active: a third of the time."""
    plain: Any = super(torch.autograd.Function, Tap)
    return Tap.apply(*args) if torch._C._are_functorch_transforms_active() else plain.apply(*args)


class ModuleTap:
    """The forward hook of one module.

    Args:
        switch: Of the tap's engine.
        module: The module to hook.

    Attributes:
        targets: The parameters whose rows this module gives while they are trainable, by their name below the module.
        calls: The number of forwards with gradient since the last Gramian.
        forwards: The first of these forwards.
        elements: The number of elements of their inputs and outputs, which factors would hold.
        look_away: For all engines: whether a module is being called again to form rows.
    """

    look_away: ClassVar[bool] = False

    def __init__(self, switch: Switch, module: nn.Module):
        self.switch = switch
        self.module = module
        self.targets: Mapping[str, nn.Parameter] = {}
        self.calls = 0
        self.forwards: list[Forward] = []
        self.elements = 0
        self._met_forward = False
        self._states: StateTap | None = None
        self._handles = [module.register_forward_hook(self, with_kwargs=True, prepend=True)]

    def remove(self) -> None:
        """Remove the tap."""
        for handle in self._handles:
            handle.remove()

    def note_states(self, device: torch.device) -> None:
        """Make the module's forwards note the state of the random streams, since it draws from them."""
        if self._states is None:
            self._states = StateTap(device)
            self._handles.append(self.module.register_forward_pre_hook(self._states))

    def __reduce__(self) -> tuple:
        # A copy or a pickle of the model must not report to this engine.
        return NoTap, ()

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Return the targets that are trainable now."""
        for parameter in self.targets.values():
            if not parameter.requires_grad:
                return {name: p for name, p in self.targets.items() if p.requires_grad}
        return self.targets

    def note(self, forward: Forward) -> None:
        """Note a forward with gradient."""
        self.calls += 1
        if self.calls <= MOST_FORWARDS:
            self.forwards.append(forward)

    def forget(self) -> None:
        """Reset the count of forwards."""
        self.calls = self.elements = 0
        self.forwards = []

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Tap the outputs of a forward with gradient."""
        if torch.compiler.is_compiling():
            # The backward reports to the engine, so a compiled graph has to break here.
            return torch.compiler.disable(self.tap)(args, kwargs, output)
        return self.tap(args, kwargs, output)

    def tap(self, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Return the tapped outputs; None leaves them unchanged."""
        if torch._C._current_graph_task_id() == -1:
            self._met_forward = True
        elif not self._met_forward:
            return None  # A recomputation has to save what its forward saved, before this tap was set.
        switch = self.switch
        if switch.is_paused or ModuleTap.look_away or not torch.is_grad_enabled():
            return None
        # Autograd itself requires the same parameters to be trainable in a recomputation as in its forward.
        targets = self.trainable()
        if not targets:
            return None
        if isinstance(output, Tensor) and not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            if not output.requires_grad:
                return None
            self.elements += output.numel() + args[0].numel()
            kind = output.device.type
            autocast = _autocast(kind) if torch.is_autocast_enabled(kind) else None
            if self._states is None and not self.module._modules:
                call = leaf_call(self.module.training, autocast)
            else:
                call = Call(self._modes(), autocast=autocast or NO_AUTOCAST, random_state=self._state())
            return _apply(switch.sentinel, (self, targets, call, (args[0].detach(),)), output)
        return self._tap_structure(targets, args, kwargs, output)

    def _tap_structure(
        self, targets: Mapping[str, nn.Parameter], args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        outputs, output_spec = pytree.tree_flatten(output)
        tapped = [i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not tapped:
            return None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        skeleton = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        call = Call(self._modes(), spec, skeleton, tapped, _autocast(outputs[tapped[0]].device.type), self._state())
        wrapped = _apply(self.switch.sentinel, (self, targets, call, tensors), *[outputs[i] for i in tapped])
        for i, leaf in zip(tapped, wrapped if len(tapped) > 1 else [wrapped], strict=True):
            outputs[i] = leaf
            self.elements += leaf.numel()
        self.elements += sum(t.numel() for t in tensors)
        return pytree.tree_unflatten(outputs, output_spec)

    def _modes(self) -> tuple[bool, ...]:
        return tuple(m.training for m in self.module.modules())

    def _state(self) -> RandomState | None:
        return None if self._states is None else self._states.state


class StateTap:
    """A forward pre-hook of a module that draws random numbers: notes the streams' state before each forward.

    Args:
        device: The module's.
    """

    def __init__(self, device: torch.device):
        self.state: RandomState | None = None
        self._device = device

    def __reduce__(self) -> tuple:
        return NoTap, ()

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            torch.compiler.disable(self._note)()
        else:
            self._note()

    def _note(self) -> None:
        if not ModuleTap.look_away:
            self.state = random_state(self._device)


class InputTap:
    """A forward pre-hook of the engine's root modules: notes the first two dimensions of their input tensors.

    Args:
        before_forward: Called before each forward, except recomputations in a backward.
    """

    def __init__(self, before_forward: Callable[[], None]):
        self.sizes: set[tuple[int, int]] = set()
        self.is_paused = False
        self._before_forward = before_forward

    def __reduce__(self) -> tuple:
        return NoTap, ()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.is_paused or torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        self._before_forward()
        if torch.is_grad_enabled():
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.sizes.update(enumerate(leaf.shape[:2]))


class NoTap:
    """A hook that does nothing: what a tap turns into in a copy of the model."""

    def __call__(self, *args: Any) -> None:
        return None


def _saved(ctx: Any) -> tuple[Tensor, ...] | None:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return None  # The model changed an input in place, which autograd itself allows if it doesn't need it.


def _autocast(kind: str) -> tuple[str, torch.dtype, bool]:
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
