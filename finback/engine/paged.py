"""The model over a paged cache, in torch: what every back-end computes, on any device. The native decode step is tested against it."""

import torch
from torch import Tensor

from finback.engine.batch import SHORT, Group, Packed
from finback.model.gqa import GQA
from finback.model.mla import Rotary
from finback.model.transformer import Block, MTPModule, Transformer
from finback.ops.compressed import CompressedRows


@torch.no_grad()
def paged_forward(
    model: Transformer, cache: Tensor, rotary: Rotary, packed: Packed, chosen: list[Tensor] | None = None,
    layout: CompressedRows | None = None,
) -> Tensor:  # fmt: skip
    """Hidden states [T, D] after the final norm; each token's row is written to cache [layers, blocks, block_size, W] on the way.

    `rotary` holds cos and sin of all positions of the context. `chosen` is given the experts [T, K] of each MoE layer, in order.
    With `layout`, the cache holds its bytes: uint8, W = row_bytes.
    """
    x = model.embed(packed.input_ids.unsqueeze(0))
    for block, rows in zip(model.blocks, cache, strict=False):  # MTP layers follow those of the main model
        x, indices = _block(block, rows, x, rotary, packed, layout)
        if chosen is not None and indices is not None:
            chosen.append(indices)
    hidden: Tensor = model.model.norm(x)
    return hidden[0]


@torch.no_grad()
def paged_mtp_forward(
    model: Transformer, module: MTPModule, rows: Tensor, rotary: Rotary, packed: Packed, hidden: Tensor,
    layout: CompressedRows | None = None,
) -> Tensor:  # fmt: skip
    """One MTP module: `packed` holds, at the positions of `hidden` [T, D], the tokens that follow them; returns [T, D] after
    `shared_head.norm`, from which the head predicts the tokens after those."""
    combined = module.combine(hidden.unsqueeze(0), model.embed(packed.input_ids.unsqueeze(0)))
    normalised: Tensor = module.shared_head.norm(_block(module, rows, combined, rotary, packed, layout)[0])
    return normalised[0]


def _block(
    block: Block, rows: Tensor, x: Tensor, rotary: Rotary, packed: Packed, layout: CompressedRows | None
) -> tuple[Tensor, Tensor | None]:
    """One layer over x [1, T, D] and its cached rows [blocks, block_size, W]; also the experts [T, K], if it has any."""
    normalised = block.input_layernorm(x)
    at = Rotary(rotary.cos[packed.positions], rotary.sin[packed.positions])
    fresh = block.self_attn.cache_rows(normalised, at)[0]
    rows.view(-1, rows.shape[-1])[packed.slots] = fresh if layout is None else layout.encode(fresh)
    attended = torch.empty_like(x)
    for group in packed.groups:
        attended[:, group.first : group.end] = _attend(block, rows, normalised, rotary, group, layout)
    x, routing = block.feed_forward(x + attended)
    return x, None if routing is None else routing.indices


def _attend(
    block: Block, rows: Tensor, normalised: Tensor, rotary: Rotary, group: Group, layout: CompressedRows | None
) -> Tensor:
    x = normalised[0, group.first : group.end].view(group.chunks, -1, normalised.shape[-1])
    cached = rows[group.blocks].flatten(1, 2)[:, : group.length]
    if layout is not None:
        cached = layout.decode(cached, x.dtype)
    at = Rotary(rotary.cos[group.positions], rotary.sin[group.positions])
    attention, mask = block.self_attn, group.mask
    if isinstance(attention, GQA):
        output = attention.attend(x, cached, at, None if mask is None else mask.unsqueeze(1))
    elif mask is not None and x.shape[1] <= SHORT:
        output = attention.attend_absorbed(x, cached, at, mask.unsqueeze(2))
    else:
        output = attention.attend_expanded(x, cached, at, None if mask is None else mask.unsqueeze(1))
    return output.view(1, group.end - group.first, -1)
