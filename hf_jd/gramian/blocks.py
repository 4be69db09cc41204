"""Blocks of parameters, each with its own Gramian and weights.

J J^T is a sum over parameters, so each block b contributes G_b = J_b J_b^T. A weighting computes w_b from it, and the
update of the block is J_b^T w_b. If no block's update conflicts with an objective, neither does the whole update:
<row_i, update> is the sum over blocks of <row_ib, update_b>.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import nn

Blocks = Literal["layer", "module", "parameter"] | Callable[[str], str] | Mapping[str, str]

NUMBERED = re.compile(r"(?:^|\.)\d+(?=\.)")


def module_of(name: str) -> str:
    """Return the module that owns a parameter."""
    return name.rpartition(".")[0]


def layer_of(name: str) -> str:
    """Return the outermost numbered module around a parameter ("model.layers.3"), or else the module that owns it."""
    numbered = NUMBERED.search(name)
    return name[: numbered.end()] if numbered else module_of(name)


NAMED: Mapping[str, Callable[[str], str]] = {"layer": layer_of, "module": module_of, "parameter": str}


def check_blocks(blocks: Blocks | None) -> None:
    """Raise ValueError for a `blocks` argument that isn't valid."""
    if blocks is None or callable(blocks) or isinstance(blocks, Mapping) or blocks in NAMED:
        return
    raise ValueError(
        f"blocks is {blocks!r}; allowed are {', '.join(map(repr, NAMED))}, None, a function of a parameter's name, and "
        "a mapping from parameter or module names to block names."
    )


def blocks_of(blocks: Blocks, names: Iterable[str]) -> list[str]:
    """Return the block of each parameter.

    Args:
        blocks: How to form them. In a mapping, the longest key that names the parameter or a module above it counts.
        names: The parameters' names.

    Raises:
        ValueError: A mapping leaves out parameters.
    """
    if isinstance(blocks, Mapping):
        by_name = {name: next((blocks[path] for path in _paths(name) if path in blocks), None) for name in names}
        missing = [name for name, block in by_name.items() if block is None]
        if missing:
            raise ValueError(
                f"blocks leave out {len(missing)} trainable parameter(s) (first: {missing[0]}): name each one, or a "
                "module above it ('' is the model)."
            )
        return [block for block in by_name.values() if block is not None]
    function = blocks if callable(blocks) else NAMED[blocks]
    return [function(name) for name in names]


def places_of(blocks: Mapping[nn.Parameter, str] | None, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, int]:
    """Return the index of each parameter's block, counting blocks in the order in which `blocks` first names them.

    Args:
        blocks: The name of each parameter's block; None: all are one.
        parameters: The parameters to look up.
    """
    if blocks is None:
        return dict.fromkeys(parameters, 0)
    place = {name: i for i, name in enumerate(dict.fromkeys(blocks.values()))}
    return {p: place[blocks[p]] for p in parameters}


def _paths(name: str) -> Iterable[str]:
    """Yield a parameter's name, and the names of the modules above it, up to the model's ""."""
    while name:
        yield name
        name = module_of(name)
    yield ""
