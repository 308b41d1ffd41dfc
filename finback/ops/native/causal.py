"""The C kernels of causal attention as Python calls on tensors, forward and gradients (V3 section 2.1.1, expanded).

All tensors are on the CPU and of one dtype, float32 or bfloat16. Scores, their softmax and sums are float32; no result depends on the
number of threads.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from finback.ops.native.training import SUFFIXES

_TILE_ROWS, _TILE_COLUMNS, _QUERIES_AT_ONCE = 6, 64, 96  # causal.c's with vectors of 16, else fewer columns
_BLOCK = 4 * _QUERIES_AT_ONCE  # queries of a task, where there are tasks enough


class CausalKernels:
    """The loaded library. Query heads [B, H, T, N + R], heads of keys and values [B, H / G, S, ...], as everywhere.

    `spans` int64 [B, 2] are how many keys of each sequence came before its queries, and its queries; what lies behind them is neither
    read nor written. Without them, queries and keys are the same T tokens.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        library.has_products.restype, library.has_products.argtypes = c_int64, [c_int64]
        self.dtypes = frozenset(dtype for dtype in SUFFIXES if library.has_products(dtype == torch.bfloat16))
        """In which this is faster than two products and a softmax on this processor."""
        self._forward: dict[torch.dtype, Any] = {}
        self._backward: dict[torch.dtype, Any] = {}
        for dtype, suffix in SUFFIXES.items():
            self._forward[dtype] = forward = getattr(library, f"causal_attention_{suffix}")
            self._backward[dtype] = backward = getattr(library, f"causal_attention_backward_{suffix}")
            forward.restype, forward.argtypes = None, [c_void_p] * 7 + [c_int64] * 10 + [c_float]
            backward.restype, backward.argtypes = None, [c_void_p] * 10 + [c_int64] * 8 + [c_float]

    def take(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether these can be multiplied here: bfloat16 is read two values at a time."""
        even = query.dtype != torch.bfloat16 or not (query.shape[-1] % 2 or value.shape[-1] % 2)
        return even and query.dtype in self.dtypes and query.dtype == key.dtype == value.dtype and query.numel() > 0

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Tensor | None = None) -> Tensor:
        """-> [B, H, T, V], which lies in memory as [B, T, H, V]."""
        query, key, value = (_readable(t) for t in (query, key, value))
        (batch, heads, tokens, size), width, threads = query.shape, value.shape[-1], torch.get_num_threads()
        shared, keys = heads // key.shape[1], key.shape[2]
        padded, spans = _padded(keys), _whole(query) if spans is None else spans
        output = _heads_last(batch, heads, tokens, width, query.dtype)
        block = _BLOCK if batch * key.shape[1] * tokens >= 4 * threads * _BLOCK else _QUERIES_AT_ONCE
        threads = min(threads, batch * key.shape[1] * -(-tokens // block))  # each has room of its own
        room = padded * (size + _padded(width) + 2 * _TILE_ROWS)
        scratch, strides = torch.empty(threads, room, dtype=torch.int32), _strides(query, key, value, output)
        self._forward[query.dtype](
            query.data_ptr(), key.data_ptr(), value.data_ptr(), output.data_ptr(), scratch.data_ptr(),
            strides.data_ptr(), spans.data_ptr(), batch, heads, shared, tokens, keys, size, width, block, room, threads, scale,
        )  # fmt: skip
        return output

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value from that of the output [B, H, T, V]; each lies in memory with its heads behind tokens."""
        grad, query, key, value = (_readable(t) for t in (grad, query, key, value))
        (batch, heads, tokens, size), width, threads = query.shape, value.shape[-1], torch.get_num_threads()
        (groups, keys), spans = key.shape[1:3], _whole(query) if spans is None else spans
        padded, wide, wide_values = _padded(keys), _padded(size), _padded(width)
        threads = min(threads, batch * groups)
        grads = (
            _heads_last(batch, heads, tokens, size, query.dtype),
            _heads_last(batch, groups, keys, size, query.dtype),
            _heads_last(batch, groups, keys, width, query.dtype),
        )
        # Keys and values packed, the sums of their gradients, strips; then a block of queries, its weights and their gradients.
        room = padded * (size + wide + width + wide + wide_values + 3 * _TILE_ROWS)
        room += _QUERIES_AT_ONCE * (wide + wide_values + 2 * padded)
        scratch, strides = torch.empty(threads, room, dtype=torch.int32), _strides(query, key, value, grad, *grads)
        self._backward[query.dtype](
            query.data_ptr(), key.data_ptr(), value.data_ptr(), grad.data_ptr(), *(t.data_ptr() for t in grads), scratch.data_ptr(),
            strides.data_ptr(), spans.data_ptr(), batch, heads, heads // groups, keys, size, width, room, threads, scale,
        )  # fmt: skip
        return grads


def _whole(query: Tensor) -> Tensor:
    return torch.tensor([[0, query.shape[2]]] * len(query), dtype=torch.int64)


def _padded(count: int) -> int:
    return -(-count // _TILE_COLUMNS) * _TILE_COLUMNS


def _heads_last(batch: int, heads: int, tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(batch, tokens, heads, size, dtype=dtype).transpose(1, 2)


def _readable(heads: Tensor) -> Tensor:
    """As it is where every row lies in one piece that starts with a whole word, else a copy."""
    even = heads.element_size() == 4 or not (any(stride % 2 for stride in heads.stride()[:3]) or heads.data_ptr() % 4)
    return heads if heads.stride(-1) == 1 and even else heads.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([t.stride()[:3] for t in tensors], dtype=torch.int64)
