"""Rebuild saved activations in the backward pass instead of keeping them (V3 section 3.2.3).

A linear layer keeps its input for the weight gradient, attention keeps q, k and v. `rebuilt` marks some of those tensors as cheap to
make again: autograd then keeps a note in their place, and the first backward node that asks calls the given function. Values are
recomputed by the same code from the same inputs, so gradients are bitwise those of the run that keeps everything.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class _Note(NamedTuple):
    which: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def rebuilt(
    tensors: tuple[Tensor, ...], build: Callable[[], tuple[Tensor, ...]], enabled: bool
) -> AbstractContextManager[object]:
    """A context in which autograd does not keep `tensors` (or views of them) but calls `build()` for them in backward."""
    if not enabled or not torch.is_grad_enabled():
        return nullcontext()
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    strides = [(tensor.stride(), tensor.storage_offset()) for tensor in tensors]
    cache: list[tuple[Tensor, ...]] = []
    # Backward runs outside autocast: build again under what the forward pass ran under.
    device = tensors[0].device.type
    enabled_then, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def pack(tensor: Tensor) -> Tensor | _Note:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in storages:
            return tensor
        return _Note(storages.index(pointer), tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(saved: Tensor | _Note) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if not cache:
            with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled_then):
                cache.append(build())
        whole = cache[0][saved.which]
        assert (whole.stride(), whole.storage_offset()) == strides[saved.which], "rebuilt tensor has another layout"
        return whole.as_strided(saved.size, saved.stride, saved.offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
