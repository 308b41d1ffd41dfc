"""The C products of a layer of experts as Python calls on tensors: each group of rows times its own matrix, and sums over a group's
rows of outer products.

All tensors are on the CPU and of one dtype, float32 or bfloat16. Sums are in float32 and rounded once; no result depends on the number
of threads.
"""

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from finback.ops.native.training import SUFFIXES

_TILE_COLUMNS, _DEPTH_AT_ONCE, _HEIGHT_AT_ONCE, _WIDTH_AT_ONCE = (
    64,
    256,
    480,
    256,
)  # grouped.c's with vectors of 16, else fewer


class GroupedKernels:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.has_products.restype, library.has_products.argtypes = c_int64, [c_int64]
        self.dtypes = frozenset(dtype for dtype in SUFFIXES if library.has_products(dtype == torch.bfloat16))
        """What is multiplied here faster than elsewhere on this processor."""
        self._product: dict[torch.dtype, Any] = {}
        self._outer: dict[torch.dtype, Any] = {}
        for dtype, suffix in SUFFIXES.items():
            self._product[dtype] = product = getattr(library, f"grouped_product_{suffix}")
            self._outer[dtype] = outer = getattr(library, f"grouped_outer_{suffix}")
            product.restype, product.argtypes = None, [c_void_p] * 6 + [c_int64] * 5
            outer.restype, outer.argtypes = None, [c_void_p] * 9 + [c_int64] * 4

    def take(self, summed: int, dtype: torch.dtype) -> bool:
        """Whether sums of this many products can be had: bfloat16 is read two values at a time."""
        return dtype in self.dtypes and not (dtype == torch.bfloat16 and summed % 2)

    def product(self, rows: Tensor, matrices: Tensor, counts: Tensor, order: Tensor | None = None) -> Tensor:
        """The first counts[0] of rows [M, P] times matrices[0], and so on: matrices [E, P, Q], counts int64 [E] -> [M, Q].

        With `order`, int64 [M], the rows are rows[order], which is not built. In bfloat16 P must be even. Matrices may be transposed
        views.
        """
        assert rows.dtype == matrices.dtype
        assert rows.shape[1] == matrices.shape[1]
        per_word = 4 // rows.element_size()
        assert rows.shape[1] % per_word == 0
        rows = rows.contiguous()
        turned = matrices.stride(1) == 1
        if not (matrices if not turned else matrices.transpose(1, 2)).is_contiguous():
            matrices, turned = matrices.contiguous(), False
        depth, threads = rows.shape[1] // per_word, torch.get_num_threads()
        out = torch.empty(len(rows if order is None else order), matrices.shape[2], dtype=rows.dtype)
        panels = torch.empty(threads, depth, _TILE_COLUMNS, dtype=torch.int32)
        starts = _starts(counts)
        self._product[rows.dtype](
            rows.data_ptr(), _at(order), matrices.data_ptr(), out.data_ptr(), starts.data_ptr(), panels.data_ptr(), len(counts),
            depth, out.shape[1], turned, threads,
        )  # fmt: skip
        return out

    def outer(
        self,
        left: Tensor,
        right: Tensor,
        counts: Tensor,
        left_order: Tensor | None = None,
        right_order: Tensor | None = None,
    ) -> Tensor:
        """Sum over the rows of each group of left_i right_i^T: left [M, P], right [M, Q], counts int64 [E] -> [E, P, Q].

        With an order, int64 [M], the rows of that operand are those that it names.
        """
        assert left.dtype == right.dtype
        rows = len(left if left_order is None else left_order)
        assert rows == len(right if right_order is None else right_order)
        left, right = left.contiguous(), right.contiguous()
        height, width, threads = left.shape[1], right.shape[1], torch.get_num_threads()
        out = torch.empty(len(counts), height, width, dtype=left.dtype)
        strips = torch.empty(threads, _DEPTH_AT_ONCE, _HEIGHT_AT_ONCE, dtype=torch.int32)
        panels = torch.empty(threads, _DEPTH_AT_ONCE, _TILE_COLUMNS, dtype=torch.int32)
        sums = torch.empty(threads, _HEIGHT_AT_ONCE, _WIDTH_AT_ONCE, dtype=torch.float32)
        starts = _starts(counts)
        self._outer[left.dtype](
            left.data_ptr(), _at(left_order), right.data_ptr(), _at(right_order), out.data_ptr(), starts.data_ptr(),
            strips.data_ptr(), panels.data_ptr(), sums.data_ptr(), len(counts), height, width, threads,
        )  # fmt: skip
        return out


def _at(order: Tensor | None) -> int | None:
    assert order is None or (order.dtype == torch.int64 and order.is_contiguous())
    return None if order is None else order.data_ptr()


def _starts(counts: Tensor) -> Tensor:
    """The first row of each group, and the end of the last."""
    starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts
