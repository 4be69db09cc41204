"""Which module gives the rows of which trainable parameter, and the taps on these modules."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, methodcaller

import torch
from torch import nn

from hf_jd.gramian.sharding import is_partitioned, is_sharded, whole_parameters
from hf_jd.gramian.taps import InputTap, ModuleTap

_REQUIRES_GRAD = attrgetter("requires_grad")
_MODULES, _PARAMETERS = attrgetter("_modules"), attrgetter("_parameters")
_VALUES = methodcaller("values")


class Coverage:
    """The taps of one engine: one on every called module that holds a parameter that is, or has been, trainable.

    A parameter's holder is the module that owns it, or the nearest module above that is called: parameters in a
    `ParameterDict`, or that a parent reads directly, belong to the parent. `scan` reads which ones are trainable.

    The tap of a frozen parameter stays and does nothing. A reference model is often the policy with frozen adapters:
    its forward must not change the taps that the policy's recomputed forward goes through.

    Args:
        modules: The engine's modules.
        make_tap: Builds a module's hook.

    Attributes:
        names: Trainable parameters and their names, in the modules' order; the sharded parameters, if sharded.
            A new object whenever it is read again.
        inputs: The tap on the modules' inputs.
    """

    def __init__(self, modules: Sequence[nn.Module], make_tap: Callable[[nn.Module], ModuleTap]):
        self.names: dict[nn.Parameter, str] = {}
        self._ever_trainable: dict[nn.Parameter, str] = {}
        self._modules = modules
        self._make_tap = make_tap
        self._taps: dict[nn.Module, ModuleTap] = {}
        self._climbed: dict[nn.Parameter, int] = {}
        self._moved: set[nn.Parameter] = set()
        self._tree: list[nn.Module] = []
        self._scanned: list[int] | None = None
        self._sharded = False
        self._wanted: dict[nn.Module, dict[str, nn.Parameter]] | None = None
        self._fresh = False
        self._every: list[nn.Parameter] = []
        self._flags: list[bool] = []
        self.inputs = InputTap(self._before_forward)
        self._input_handles = [m.register_forward_pre_hook(self.inputs, with_kwargs=True) for m in modules]

    @property
    def taps(self) -> list[ModuleTap]:
        """The taps on modules that hold a trainable parameter."""
        return [tap for tap in self._taps.values() if tap.trainable()]

    @property
    def every_tap(self) -> Collection[ModuleTap]:
        """All taps, including those of frozen parameters."""
        return self._taps.values()

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """The (axis, size) pairs of the first two dimensions of all inputs to the modules since the last Gramian."""
        return self.inputs.sizes

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters of the modules, including frozen ones."""
        return [p for module in self._modules for p in module.parameters()]

    @property
    def sharded(self) -> bool:
        """Whether the parameters are sharded over processes."""
        return self._sharded or is_partitioned(self.names)

    def whole(self) -> dict[nn.Parameter, nn.Parameter]:
        """Map sharded parameters to the whole ones that forwards have used."""
        return whole_parameters(self._modules) if self._sharded else {}

    def shared(self) -> set[nn.Parameter]:
        """Return parameters with several taps, or with a tap that was called more than once."""
        uses: dict[nn.Parameter, int] = defaultdict(int)
        for tap in self.taps:
            for parameter in tap.targets.values():
                uses[parameter] += max(tap.calls, 1)
        return {p for p, count in uses.items() if count > 1}

    def scan(self) -> None:
        """Read what is trainable now, and set taps accordingly.

        Call it only before a forward or after a backward: in between, a recomputed forward has to go through the same
        taps. There may be other forwards in between, so freezing and unfreezing parameters for them changes no tap.
        """
        self.read()
        if self._wanted is None:
            return
        for module in self._taps.keys() - self._wanted.keys():
            self._taps.pop(module).remove()
        for module, targets in self._wanted.items():
            if module not in self._taps:
                self._taps[module] = self._make_tap(module)
            self._taps[module].targets = targets
        self._wanted = None

    def read(self) -> None:
        """Read what is trainable now: update the names, and the taps for the next `scan` to set."""
        flags = list(map(_REQUIRES_GRAD, self._every))
        if self._fresh and flags == self._flags:
            return  # The last forward has just read it.
        moved = self._state() != self._scanned and not self._replaced()
        if not moved and flags == self._flags:
            return
        ever = self._ever_trainable
        if moved or any(flag and p not in ever for p, flag in zip(self._every, flags, strict=True)):
            self._walk()
        self.names = {p: name for p, name in self._ever_trainable.items() if p.requires_grad}
        self._flags = list(map(_REQUIRES_GRAD, self._every))

    def _walk(self) -> None:
        """Find the holder of each parameter that is, or has been, trainable."""
        self._sharded = is_sharded(self._modules)
        sharded = {whole: p for p, whole in self.whole().items()}
        names: dict[nn.Parameter, str] = {}
        targets: dict[nn.Module, dict[str, nn.Parameter]] = defaultdict(dict)
        for i, root in enumerate(self._modules):
            prefix = f"{i}." if len(self._modules) > 1 else ""
            modules = dict(_all_paths(root))
            holders: dict[nn.Parameter, dict[str, str]] = defaultdict(dict)
            for path, module in modules.items():
                for name, parameter in module._parameters.items():
                    if parameter is None:
                        continue
                    parameter = sharded.get(parameter, parameter)
                    if not (parameter.requires_grad or parameter in self._ever_trainable):
                        continue
                    full = f"{path}.{name}" if path else name
                    names.setdefault(parameter, prefix + full)
                    if parameter.is_complex():
                        raise ValueError(
                            f"{full} is complex, but rows have to be real: store torch.view_as_real(value) as the "
                            "parameter, and read it through torch.view_as_complex."
                        )
                    holder = self._holder(modules, path, parameter)
                    if holder is not None:
                        holders[parameter][holder] = full[len(holder) + 1 :] if holder else full
            for parameter, places in holders.items():
                for path in _lowest(places):
                    targets[modules[path]][places[path]] = parameter
        self._wanted, self._ever_trainable = targets, names
        self._tree = [module for root in self._modules for module in root.modules()]
        self._every = self.parameters()
        self._scanned = self._state()

    def _state(self) -> list[int]:
        """Return the ids of each module's children and parameters; in C, this is far cheaper than walking the tree."""
        members = [*map(_MODULES, self._tree), *map(_PARAMETERS, self._tree)]
        return [*map(len, members), *map(id, chain.from_iterable(map(_VALUES, filter(None, members))))]

    def _replaced(self) -> bool:
        """Return whether `torch.func.functional_call` has replaced the parameters for one forward."""
        tensors = (p for module in self._tree for p in module._parameters.values())
        return any(not isinstance(p, nn.Parameter) for p in tensors if p is not None)

    def _before_forward(self) -> None:
        self._fresh = False
        self._moved.clear()
        self.scan()
        self._fresh = True

    def climb(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the taps of these parameters one module up: they have gradients, but their holders weren't called."""
        for parameter in set(parameters) - self._moved:
            self._scanned = None
            self._climbed[parameter] = self._climbed.get(parameter, 0) + 1
            self._moved.add(parameter)  # The next forward shows whether this is high enough.

    def finish_step(self) -> None:
        """Set the taps that the step turned out to need, and reset the counts of forwards."""
        if self._scanned is None or self._wanted is not None:
            self._fresh = False
            self.scan()
        self._fresh = False
        self.inputs.sizes.clear()
        for tap in self._taps.values():
            tap.forget()

    def remove(self) -> None:
        """Remove all taps."""
        for hook in [*self._input_handles, *self._taps.values()]:
            hook.remove()
        self._taps.clear()
        self._scanned = None

    def _holder(self, modules: dict[str, nn.Module], path: str, parameter: nn.Parameter) -> str | None:
        """Return the path of the module to tap; None above the root."""
        steps = self._climbed.get(parameter, 0)
        while True:
            if _takes_hooks(modules[path]):
                if steps == 0:
                    return path
                steps -= 1
            if not path:
                return None
            path = path.rpartition(".")[0]


def _all_paths(module: nn.Module, path: str = "", above: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield every path to every module: several modules may share, and read, one `ParameterDict`."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and child is not module and child not in above:
            yield from _all_paths(child, f"{path}.{name}" if path else name, (*above, module))


def _lowest(paths: Iterable[str]) -> list[str]:
    """Return the paths that have no other path below: tapping both would give the same rows twice."""
    return [path for path in paths if not any(p != path and (not path or p.startswith(path + ".")) for p in paths)]


def _takes_hooks(module: nn.Module) -> bool:
    """Return whether a forward hook can be set on the module and will run: containers are never called."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward
