"""Chunks of tokens to hidden states and logits, over the paged cache: by the native kernels where there are any, else by torch."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from finback.config import InputError
from finback.engine.batch import Chunk, Packed, pack
from finback.engine.native import DTYPES, NativeDecoder
from finback.engine.paged import paged_forward, paged_mtp_forward
from finback.model.mla import Rotary
from finback.model.transformer import Transformer
from finback.ops.compressed import CompressedRows
from finback.ops.memory import zeros_in_large_pages
from finback.ops.native.build import kernels
from finback.ops.native.calls import Kernels
from finback.ops.rotary import rotary_table

Backend = Literal["auto", "native", "torch"]

logger = logging.getLogger("finback")


class Forward(NamedTuple):
    """What a step computed. Valid until the next one: the native back-end uses its memory again."""

    hidden: Tensor  # [T, D], after the final norm
    first_rows: list[int]  # of each chunk, as the chunks were given
    logits: Tensor  # [N, vocab]: of the wanted last rows of each chunk, as the chunks were given


class Runner:
    """One model over one cache [layers, num_blocks, block_size, W]; with `mtp`, the last layer is that of the MTP module.

    With `record_experts`, the experts that each token takes lie beside its cached row, and are shared with it: `experts` reads them.
    With `layout`, rows are its bytes. Steps have about `max_rows` tokens at most, and logits of about `max_head_rows`: what the native
    back-end makes room for.
    """

    @torch.inference_mode(False)  # what is made in that mode could not be written outside of it
    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        *,
        max_model_len: int,
        max_rows: int,
        max_head_rows: int,
        mtp: bool = False,
        backend: Backend = "auto",
        record_experts: bool = False,
        layout: CompressedRows | None = None,
    ) -> None:
        c, weight = model.config, model.lm_head.weight
        self.model, self.block_size = model, block_size
        layers = c.num_hidden_layers + int(mtp)
        width, dtype = (c.cache_row_width, weight.dtype) if layout is None else (layout.row_bytes, torch.uint8)
        rows = (layers, num_blocks, block_size, width)
        on_host = weight.device.type == "cpu"
        self.cache = zeros_in_large_pages(rows, dtype) if on_host else torch.zeros(*rows, dtype=dtype, device=weight.device)
        self._layout = layout
        self._experts: Tensor | None = None
        if record_experts:
            shape = (num_blocks * block_size, c.num_moe_layers, c.num_experts_per_tok)
            self._experts = torch.full(shape, -1, dtype=torch.int16, device=weight.device)
        self.expert_counts = torch.zeros(
            c.num_moe_layers if record_experts else 0, c.n_routed_experts, dtype=torch.int64, device=weight.device
        )
        """How many tokens each expert of the main model has had; no rows without `record_experts`."""
        self._rotary = Rotary(*rotary_table(c, torch.arange(max_model_len, device=weight.device)))
        self._native: NativeDecoder | None = None
        library = choose_kernels(backend, weight.device, weight.dtype)
        if library is not None:
            table_width = -(-max_model_len // block_size)
            self._native = NativeDecoder(
                library, model, self.cache, self._rotary, max_rows, max_head_rows, table_width, record_experts, layout
            )
        self.backend = "native" if self._native else "torch"

    def forward(self, chunks: Sequence[Chunk], wanted: Sequence[int]) -> Forward:
        """Compute `chunks`, caching their rows; logits for the last `wanted[i]` tokens of chunk i."""

        def by_torch(packed: Packed, numbers: list[int]) -> Tensor:
            chosen: list[Tensor] | None = None if self._experts is None else []
            hidden = paged_forward(self.model, self.cache, self._rotary, packed, chosen, self._layout)
            if self._experts is not None and chosen is not None:
                self._record(packed.slots, torch.stack(chosen, dim=1))
            return hidden

        def by_kernels(part: Sequence[Chunk], numbers: list[int]) -> Tensor:
            assert self._native is not None
            hidden = self._native.forward(part)
            if self._experts is not None:
                slots = [slot for chunk in part for slot in self._slots(chunk.block_table, chunk.start, len(chunk.token_ids))]
                self._record(torch.tensor(slots), self._native.chosen(len(slots)))
            return hidden

        return self._run(chunks, wanted, by_torch, by_kernels)

    def _record(self, slots: Tensor, chosen: Tensor) -> None:
        """Experts int64 [T, layers, K]: beside the cached rows, and counted."""
        assert self._experts is not None
        self._experts[slots] = chosen.to(torch.int16)
        layers, width = self.expert_counts.shape
        numbers = (chosen + torch.arange(layers, device=chosen.device).view(1, -1, 1) * width).flatten()
        self.expert_counts.view(-1).scatter_add_(0, numbers, torch.ones_like(numbers))

    def experts(self, block_table: Sequence[int], tokens: int) -> Tensor | None:
        """The experts int16 [tokens, layers, K] of a sequence's first tokens, on the CPU; None where they are not recorded."""
        if self._experts is None:
            return None
        slots = torch.tensor(self._slots(block_table, 0, tokens), device=self._experts.device)
        return self._experts[slots].cpu()

    def _slots(self, block_table: Sequence[int], start: int, tokens: int) -> list[int]:
        size = self.block_size
        return [block_table[position // size] * size + position % size for position in range(start, start + tokens)]

    def weights_changed(self) -> None:
        """To be told when parameters were replaced by others; changes in place need no word."""
        if self._native is not None:
            self._native.forget()

    def draft(self, chunks: Sequence[Chunk], wanted: Sequence[int], hidden: Tensor) -> Forward:
        """The MTP module over `chunks` that hold, at the positions of `hidden` [T, D], the tokens that follow them."""
        ends = _ends(chunks)

        def rows_of(numbers: list[int]) -> Tensor:
            if len(numbers) == len(chunks) and numbers == sorted(numbers):
                return hidden
            rows = [row for i in numbers for row in range(ends[i] - len(chunks[i].token_ids), ends[i])]
            return hidden[torch.tensor(rows, device=hidden.device)]

        def by_torch(packed: Packed, numbers: list[int]) -> Tensor:
            module = self.model.mtp_modules[0]
            return paged_mtp_forward(self.model, module, self.cache[-1], self._rotary, packed, rows_of(numbers), self._layout)

        def by_kernels(part: Sequence[Chunk], numbers: list[int]) -> Tensor:
            assert self._native is not None
            return self._native.draft(part, rows_of(numbers))

        return self._run(chunks, wanted, by_torch, by_kernels)

    def _run(
        self,
        chunks: Sequence[Chunk],
        wanted: Sequence[int],
        by_torch: Callable[[Packed, list[int]], Tensor],
        by_kernels: Callable[[Sequence[Chunk], list[int]], Tensor],
    ) -> Forward:
        ends = _ends(chunks)
        if self._native is not None and (not ends or ends[-1] <= self._native.max_rows):  # nothing is copied
            hidden = by_kernels(chunks, list(range(len(chunks))))
            first_rows = [end - len(chunk.token_ids) for end, chunk in zip(ends, chunks, strict=True)]
            return Forward(hidden, first_rows, self._logits(hidden, ends, wanted))
        numbers: list[int] = []  # of the chunks, in the order in which their rows come
        hidden_parts, logits_parts = [], []
        for part in self._parts(chunks):
            if self._native is not None:
                hidden = by_kernels([chunks[i] for i in part], part).clone()
            else:
                packed = pack([chunks[i] for i in part], self.block_size, self.cache.device)
                part = [part[i] for i in packed.order]
                hidden = by_torch(packed, part)
            part_ends = _ends([chunks[i] for i in part])
            hidden_parts.append(hidden)
            logits_parts.append(self._logits(hidden, part_ends, [wanted[i] for i in part]).clone())
            numbers += part
        return _in_order(chunks, wanted, numbers, torch.cat(hidden_parts), torch.cat(logits_parts))

    def _parts(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """The chunks' numbers, for torch all together, for the native kernels at most `max_rows` tokens at a time."""
        if self._native is None:
            return [list(range(len(chunks)))]
        parts: list[list[int]] = []
        room = 0
        for number, chunk in enumerate(chunks):
            tokens = len(chunk.token_ids)
            if tokens > room:
                parts.append([])
                room = self._native.max_rows
            parts[-1].append(number)
            room -= tokens
        return parts

    @torch.no_grad()
    def _logits(self, hidden: Tensor, ends: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Of the last `wanted[i]` of the rows that end at ends[i]."""
        rows = [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]
        if not rows:  # a packed head would be unpacked for nothing
            return hidden.new_empty(0, self.model.config.vocab_size)
        if len(rows) < len(hidden):
            hidden = hidden[torch.tensor(rows, dtype=torch.int64, device=hidden.device)]
        if self._native is not None and len(rows) <= self._native.max_head_rows:
            return self._native.logits(hidden)
        logits: Tensor = self.model.lm_head(hidden)
        return logits


def _ends(chunks: Sequence[Chunk]) -> list[int]:
    """The row after the last of each chunk, when they lie one after another."""
    ends, row = [], 0
    for chunk in chunks:
        row += len(chunk.token_ids)
        ends.append(row)
    return ends


def _in_order(chunks: Sequence[Chunk], wanted: Sequence[int], numbers: list[int], hidden: Tensor, logits: Tensor) -> Forward:
    """`hidden` and `logits` come chunk by chunk in the order of `numbers`; the result is for the order of `chunks`."""
    first_rows, first_logits = [0] * len(chunks), [0] * len(chunks)
    row = sample = 0
    for number in numbers:
        first_rows[number], first_logits[number] = row, sample
        row += len(chunks[number].token_ids)
        sample += wanted[number]
    order = [first + k for first, count in zip(first_logits, wanted, strict=True) for k in range(count)]
    if order != list(range(len(order))):
        logits = logits[torch.tensor(order, device=logits.device)]
    return Forward(hidden, first_rows, logits)


def choose_kernels(backend: Backend, device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The native kernels if they are to be used; InputError if they were asked for and cannot be."""
    reason = None
    if device.type != "cpu":
        reason = f"the model is on {device}"
    elif dtype not in DTYPES:
        reason = f"the weights are {dtype}"
    elif backend == "torch":
        return None
    else:
        library = kernels()
        if library is not None:
            return library
        reason = "they could not be compiled"
    if backend == "native":
        raise InputError(f"backend is 'native', but {reason}; use backend='torch'")
    return None
