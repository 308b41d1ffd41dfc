"""Causal attention over samples that begin alike: what they share, a prompt, stands once in the row and is multiplied once.

Of G samples of a prompt of P tokens (GRPO's group, R1 equation 1) all layers then see P + G T tokens instead of G (P + T).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finback.ops.attention import causal_attention
from finback.ops.native.build import causal_kernels_for
from finback.ops.native.causal import CausalKernels


class SharedPrefixes:
    """A row of N tokens in groups: a prefix, then the continuations that begin with it, one after the other. `groups` holds of each
    the tokens of its prefix and of its continuations, any of which may be 0.

    A prefix and each continuation is a sequence of its own, M in all; they are padded to the longest where attention is computed.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        sequences: list[tuple[range, range]] = []  # places of the tokens that came before, and of its own
        shared: list[tuple[slice, range]] = []
        positions, at = list[int](), 0
        for prefix_length, lengths in groups:
            prefix, first = range(at, at + prefix_length), len(sequences)
            at += prefix_length
            positions += range(prefix_length)
            if prefix:
                sequences.append((range(0), prefix))
            for length in lengths:
                if length:
                    sequences.append((prefix, range(at, at + length)))
                at += length
                positions += range(prefix_length, prefix_length + length)
            if prefix:
                shared.append((slice(first, len(sequences)), prefix))
        queries = _padded([[*own] for _, own in sequences])
        keys = _padded([[*before, *own] for before, own in sequences])
        query_at, key_at = np.zeros(at, dtype=np.int64), np.zeros(at, dtype=np.int64)
        for row, (before, own) in enumerate(sequences):
            query_at[own.start : own.stop] = row * queries.shape[1] + np.arange(len(own))
            key_at[own.start : own.stop] = row * keys.shape[1] + len(before) + np.arange(len(own))
        self.spans = torch.tensor([[len(before), len(own)] for before, own in sequences], dtype=torch.int64)
        """[M, 2], on the CPU: tokens that came before a sequence, and its own."""
        self.shared = shared
        """Of each prefix the sequences that see it, and its place in the row."""
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)
        """[N]: how many tokens stand before each in its sample."""
        self.queries, self.keys, self.query_at, self.key_at = (
            torch.from_numpy(array).to(device) for array in (queries, keys, query_at, key_at)
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """softmax(scale q k^T) v of each token over those before it in its sample: query [1, H, N, d], key [1, H / G, N, d], value
        [1, H / G, N, V] -> [1, H, N, V]."""
        kernels = causal_kernels_for(query, key, value)
        if kernels is None:  # what is spread out for a layer is not kept, but spread out again for its gradient
            spread: Tensor = checkpoint(
                shared_prefix_reference, query, key, value, scale, self, use_reentrant=False, preserve_rng_state=False
            )
            return spread
        result: Tensor = _NativeSharedPrefix.apply(query, key, value, scale, self, kernels)
        return result


def shared_prefix_reference(query: Tensor, key: Tensor, value: Tensor, scale: float, prefixes: SharedPrefixes) -> Tensor:
    """The same with a row for each sample and its prefix, for any device: attention needs no mask, and looks from a prefix once for
    each of its samples."""
    rows: list[Tensor] = [_Spread.apply(heads, prefixes) for heads in (query, key, value)]
    return _flat(causal_attention(rows[0], rows[1], rows[2], scale), prefixes.key_at)


class _Spread(torch.autograd.Function):
    """[1, H, N, d] -> [M, H, S, d]. What several rows hold has the sum of their gradients, in an order that does not change."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, prefixes: SharedPrefixes) -> Tensor:
        ctx.prefixes = prefixes
        return _rows(heads, prefixes.keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.prefixes), None


class _NativeSharedPrefix(torch.autograd.Function):
    """Keeps q, k and v only, each token once."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, prefixes: SharedPrefixes, kernels: CausalKernels
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.prefixes, ctx.kernels = scale, prefixes, kernels
        padded = (_rows(query, prefixes.queries), _rows(key, prefixes.keys), _rows(value, prefixes.keys))
        return _flat(kernels.attention(*padded, scale, prefixes.spans), prefixes.query_at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value = ctx.saved_tensors
        prefixes: SharedPrefixes = ctx.prefixes
        padded = (_rows(query, prefixes.queries), _rows(key, prefixes.keys), _rows(value, prefixes.keys))
        grads = ctx.kernels.backward(_rows(grad, prefixes.queries), *padded, ctx.scale, prefixes.spans)
        of_key, of_value = (_summed(heads, prefixes) for heads in grads[1:])
        return _flat(grads[0], prefixes.query_at), of_key, of_value, None, None, None


def _summed(grads: Tensor, prefixes: SharedPrefixes) -> Tensor:
    """What each token's key, or value, had from all sequences that see it: [M, h, S, d] -> [1, h, N, d]."""
    flat = _flat(grads, prefixes.key_at)
    for sequences, prefix in prefixes.shared:
        flat[0, :, prefix.start : prefix.stop] = grads[sequences, :, : len(prefix)].sum(0)
    return flat


def _padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """[M, longest], with 0 behind the end of each."""
    padded = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int64)
    for row, own in enumerate(rows):
        padded[row, : len(own)] = own
    return padded


def _rows(heads: Tensor, places: Tensor) -> Tensor:
    """[1, H, N, d] -> [M, H, T, d], in memory with its heads behind tokens."""
    tokens = heads[0].transpose(0, 1)
    return tokens.index_select(0, places.flatten()).view(*places.shape, *tokens.shape[1:]).transpose(1, 2)


def _flat(heads: Tensor, places: Tensor) -> Tensor:
    """[M, H, T, d] -> [1, H, N, d], likewise."""
    return heads.transpose(1, 2).flatten(0, 1).index_select(0, places).unsqueeze(0).transpose(1, 2)
