"""Keep the small tensors that outlive a backward together, away from its large temporaries."""

import torch
from torch import Tensor

BLOCK = 1024 * 1024  # elements allocated at once
SMALL = BLOCK // 4  # elements up to which a tensor is copied: the end of a block that stays empty is no larger


class SmallTensors:
    """Blocks of memory that hold copies of small tensors of a dtype side by side.

    A backward that retains its graph can't reuse activations: its temporaries take turns in the same few holes. A small
    tensor that stays in such a hole makes it too small for the next temporary, so the process grows by whole
    temporaries, not by the tensor's size. torch's allocators for accelerators keep small tensors apart by themselves.
    """

    def __init__(self) -> None:
        self._free: dict[torch.dtype, Tensor] = {}

    def store(self, tensor: Tensor) -> Tensor:
        """Return a copy of the tensor in a block; large and sparse ones, and those of accelerators, unchanged."""
        size = tensor.numel()
        if size > SMALL or tensor.is_sparse or tensor.device.type != "cpu":
            return tensor
        free = self._free.get(tensor.dtype)
        if free is None or len(free) < size:
            free = torch.empty(BLOCK, dtype=tensor.dtype)
        self._free[tensor.dtype] = free[size:]
        return free[:size].view(tensor.shape).copy_(tensor)
