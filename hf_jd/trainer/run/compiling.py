"""`--torch_compile`: compile what the model calls, but not its own forward, where the loss is cut."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


class CompiledParts:
    """The modules that the model's own forward calls, compiled in place of accelerate, until `undo`.

    Accelerate compiles the whole model, so that its own loss and its outputs leave one compiled function together, and
    no gradient lies between them.

    Args:
        trainer: Its accelerator says whether, and how, to compile.
        whole: The modules whose outputs a loss may read: they run as they are.
    """

    def __init__(self, trainer: JDTrainerMixin, whole: Collection[nn.Module]):
        self._plugin: Any = trainer.accelerator.state.dynamo_plugin
        self._backend = self._plugin.backend
        self._parts: list[nn.Module] = []
        if self._backend == DynamoBackend.NO:
            return
        # The engine may retain a graph, whose buffers must not be donated.
        functorch_config.donated_buffer = False  # ty: ignore[invalid-assignment]
        # Code compiled for a model without the engine's hooks must not run for one with them: neither from now on, nor
        # what was compiled before.
        dynamo_config.skip_nnmodule_hook_guards = False  # ty: ignore[invalid-assignment]
        torch.compiler.reset()
        options = self._plugin.to_kwargs()
        self._plugin.backend = DynamoBackend.NO
        assert trainer.model is not None
        if isinstance(trainer.model_wrapped, OptimizedModule):  # by an evaluation before the run
            trainer.model_wrapped = trainer.model
        for part in _parts(trainer.model, set(whole)):
            if part._compiled_call_impl is None:
                part.compile(**options)
                self._parts.append(part)

    def undo(self) -> None:
        """Leave the model as it was, and compiling to accelerate."""
        self._plugin.backend = self._backend
        for part in self._parts:
            part._compiled_call_impl = None


def _parts(module: nn.Module, whole: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the topmost modules below that are called and hold none of `whole`."""
    for child in module.children():
        is_called = type(child).forward is not nn.Module.forward  # containers are not
        if is_called and whole.isdisjoint(child.modules()):
            yield child
        else:
            yield from _parts(child, whole)
