"""Chunks of tokens to hidden states and logits, over the paged cache: short chunks by the native kernels where there are any, all
others by torch."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from finback.config import InputError
from finback.engine.batch import SHORT, Chunk, Packed, pack
from finback.engine.native import DTYPES, NativeDecoder, Step
from finback.engine.paged import paged_forward, paged_mtp_forward
from finback.model.mla import Rotary
from finback.model.transformer import Transformer
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
    """One model over one cache [layers, num_blocks, block_size, W]; with `mtp`, the last layer is that of the MTP module."""

    @torch.inference_mode(False)  # what is made in that mode could not be written outside of it
    def __init__(
        self, model: Transformer, num_blocks: int, block_size: int, max_model_len: int, max_rows: int, mtp: bool, backend: Backend
    ) -> None:
        c, weight = model.config, model.lm_head.weight
        self.model, self.block_size = model, block_size
        layers = c.num_hidden_layers + int(mtp)
        self.cache = torch.zeros(layers, num_blocks, block_size, c.cache_row_width, dtype=weight.dtype, device=weight.device)
        self._rotary = Rotary(*rotary_table(c, torch.arange(max_model_len, device=weight.device)))
        self._native: NativeDecoder | None = None
        library = _choose(backend, model)
        if library is not None:
            table_width = -(-max_model_len // block_size)
            rows = max(max_rows, SHORT)  # a chunk is never split
            self._native = NativeDecoder(library, model, self.cache, self._rotary, rows, table_width)
        self.backend = "native" if self._native else "torch"

    def forward(self, chunks: Sequence[Chunk], wanted: Sequence[int]) -> Forward:
        """Compute `chunks`, caching their rows; logits for the last `wanted[i]` tokens of chunk i."""

        def by_torch(packed: Packed, numbers: list[int]) -> Tensor:
            return paged_forward(self.model, self.cache, self._rotary, packed)

        def by_kernels(part: Sequence[Chunk], numbers: list[int]) -> Step:
            assert self._native is not None
            return self._native.forward(part)

        return self._run(chunks, wanted, by_torch, by_kernels)

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
            return paged_mtp_forward(self.model, module, self.cache[-1], self._rotary, packed, rows_of(numbers))

        def by_kernels(part: Sequence[Chunk], numbers: list[int]) -> Step:
            assert self._native is not None
            return self._native.draft(part, rows_of(numbers))

        return self._run(chunks, wanted, by_torch, by_kernels)

    def _run(
        self,
        chunks: Sequence[Chunk],
        wanted: Sequence[int],
        by_torch: Callable[[Packed, list[int]], Tensor],
        by_kernels: Callable[[Sequence[Chunk], list[int]], Step],
    ) -> Forward:
        native, rest = self._split(chunks)
        ends = _ends(chunks)
        if len(native) == 1 and not rest:  # the decode step: nothing is copied
            step = by_kernels(chunks, native[0])
            logits = step.logits
            if sum(wanted) < len(logits):
                logits = logits[self._wanted_rows(ends, wanted)]
            return Forward(step.hidden, [end - len(c.token_ids) for end, c in zip(ends, chunks, strict=True)], logits)
        numbers: list[int] = []  # of the chunks, in the order in which their rows come
        hidden_parts, logits_parts = [], []
        for part in native:
            step = by_kernels([chunks[i] for i in part], part)
            part_ends = _ends([chunks[i] for i in part])
            rows = self._wanted_rows(part_ends, [wanted[i] for i in part])
            hidden_parts.append(step.hidden.clone())
            logits_parts.append(step.logits[rows])
            numbers += part
        if rest:
            packed = pack([chunks[i] for i in rest], self.block_size, self.cache.device)
            part = [rest[i] for i in packed.order]
            hidden = by_torch(packed, part)
            part_ends = _ends([chunks[i] for i in part])
            rows = self._wanted_rows(part_ends, [wanted[i] for i in part])
            hidden_parts.append(hidden)
            logits_parts.append(self._logits(hidden[rows]))
            numbers += part
        return _in_order(chunks, wanted, numbers, torch.cat(hidden_parts), torch.cat(logits_parts))

    def _split(self, chunks: Sequence[Chunk]) -> tuple[list[list[int]], list[int]]:
        """Numbers of the chunks for the native kernels, in batches of at most `max_rows` tokens, and of those for torch."""
        if self._native is None:
            return [], list(range(len(chunks)))
        native: list[list[int]] = []
        rest, room = [], 0
        for number, chunk in enumerate(chunks):
            tokens = len(chunk.token_ids)
            if tokens > SHORT:
                rest.append(number)
                continue
            if tokens > room:
                native.append([])
                room = self._native.max_rows
            native[-1].append(number)
            room -= tokens
        return native, rest

    def _wanted_rows(self, ends: Sequence[int], wanted: Sequence[int]) -> Tensor:
        rows = [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]
        return torch.tensor(rows, dtype=torch.int64, device=self.cache.device)

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
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


def _choose(backend: Backend, model: Transformer) -> Kernels | None:
    """The native kernels if they are to be used; InputError if they were asked for and cannot be."""
    weight = model.lm_head.weight
    reason = None
    if weight.device.type != "cpu":
        reason = f"the model is on {weight.device}"
    elif weight.dtype not in DTYPES:
        reason = f"the weights are {weight.dtype}"
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
