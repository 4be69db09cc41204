"""Blocks of parameters, each with a Gramian and weights of its own.

J J^T is a sum over parameters, so each block b has its own part G_b = J_b J_b^T, from which a weighting finds weights
w_b; the update of the block is J_b^T w_b. Where no objective is gone against in any block, it is gone against in none:
<row_i, update> is the sum over blocks of <row_ib, update_b>.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import nn

Blocks = Literal["layer", "module", "parameter"] | Callable[[str], str] | Mapping[str, str]

NUMBERED = re.compile(r"(?:^|\.)\d+(?=\.)")


def module_of(name: str) -> str:
    """The module that owns a parameter."""
    return name.rpartition(".")[0]


def layer_of(name: str) -> str:
    """The outermost numbered module around a parameter ("model.layers.3"); where there is none, its own module."""
    numbered = NUMBERED.search(name)
    return name[: numbered.end()] if numbered else module_of(name)


NAMED: Mapping[str, Callable[[str], str]] = {"layer": layer_of, "module": module_of, "parameter": str}


def check_blocks(blocks: Blocks | None) -> None:
    """Raises ValueError for what says nothing of blocks."""
    if blocks is None or callable(blocks) or isinstance(blocks, Mapping) or blocks in NAMED:
        return
    raise ValueError(
        f"blocks is {blocks!r}; allowed are {', '.join(map(repr, NAMED))}, None, a function of a parameter's name, and "
        "a mapping from names of parameters or modules to names of blocks."
    )


def blocks_of(blocks: Blocks, names: Iterable[str]) -> list[str]:
    """The block of each parameter.

    Args:
        blocks: How they are formed. In a mapping the longest name counts that is a parameter's or a module's above it.
        names: The parameters' names.

    Raises:
        ValueError: Parameters that a mapping leaves out.
    """
    if isinstance(blocks, Mapping):
        found = {name: next((blocks[path] for path in _paths(name) if path in blocks), None) for name in names}
        missing = [name for name, block in found.items() if block is None]
        if missing:
            raise ValueError(
                f"blocks leave out {len(missing)} trainable parameter(s) (first: {missing[0]}): name each one, or a "
                "module above it ('' is the model)."
            )
        return [block for block in found.values() if block is not None]
    function = blocks if callable(blocks) else NAMED[blocks]
    return [function(name) for name in names]


def places_of(blocks: Mapping[nn.Parameter, str] | None, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, int]:
    """The place of each parameter's block among all of them, in the order in which `blocks` first names them.

    Args:
        blocks: The name of each parameter's block; None: all are one.
        parameters: Whose places are wanted.
    """
    if blocks is None:
        return dict.fromkeys(parameters, 0)
    place = {name: i for i, name in enumerate(dict.fromkeys(blocks.values()))}
    return {p: place[blocks[p]] for p in parameters}


def _paths(name: str) -> Iterable[str]:
    """A parameter's name, and those of the modules above it, up to the model's ""."""
    while name:
        yield name
        name = module_of(name)
    yield ""
