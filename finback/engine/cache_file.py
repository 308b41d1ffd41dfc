"""The prefix cache in a file, so that it survives a restart: digests of blocks, and their rows of every layer.

A digest says which tokens stand in a block and before it, but not which model computed the rows. So the file carries the identity of
the model, a digest of its configuration and weights, and another model's file is not used.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from finback.config import InputError
from finback.data.files import write_atomic
from finback.model.layers import Linear
from finback.model.moe import Experts
from finback.model.transformer import Transformer
from finback.ops.packed import PackedWeight

_IDENTITY = "identity"


def model_identity(model: Transformer) -> str:
    """A digest of everything that decides what is cached, packed weights as they are. It reads all weights once."""
    digest = hashlib.sha256(repr(model.config).encode())

    def update(name: str, tensor: Tensor) -> None:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_meta:  # those stand for packed ones
            update(name, tensor)
    for name, module in model.named_modules():
        for number, weight in enumerate(_packed(module)):
            digest.update(f"{weight.shape} {weight.bits}".encode())
            for part in ("codes", "scales", "shifts"):
                tensor = getattr(weight, part)
                if tensor is not None:
                    update(f"{name} {number} {part}", tensor)
    return digest.hexdigest()


def _packed(module: nn.Module) -> tuple[PackedWeight, ...]:
    """What stands in the place of a module's weights. A rounded copy beside the plain weight, as of the head, decides nothing that is
    cached."""
    if isinstance(module, Experts):
        return module.packed or ()
    if isinstance(module, Linear) and module.packed is not None and module.weight.is_meta:
        return (module.packed,)
    return ()


def write_blocks(file: Path, identity: str, digests: Sequence[bytes], rows: Tensor) -> None:
    """Write `rows` [layers, blocks, block_size, W] of the blocks with `digests`, through a temporary file. Prompts could be told from
    them, so that only the owner may read it."""
    from safetensors.torch import save

    numbers = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8).reshape(len(digests), 32)
    tensors = {"digests": numbers, "rows": rows.cpu().contiguous()}
    write_atomic(file, save(tensors, metadata={_IDENTITY: identity}), mode=0o600)


def read_blocks(file: Path, identity: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[bytes], Tensor] | None:
    """What `write_blocks` wrote, for a cache of `shape` (layers, block_size, W); None if it is another model's, or another shape's.

    Raises InputError if it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get(_IDENTITY) != identity:
                return None
            digests, rows = opened.get_tensor("digests"), opened.get_tensor("rows")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read as a prefix cache: {error}; remove it") from None
    if (
        rows.dim() != 4
        or (rows.shape[0], *rows.shape[2:]) != shape
        or rows.dtype != dtype
        or digests.shape != (rows.shape[1], 32)
    ):
        return None
    return [bytes(digest) for digest in digests.tolist()], rows
