"""What the C kernels take: their structs as ctypes, field by field, and the groups of tensors that `calls` takes."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any, NamedTuple

from torch import Tensor

from finback.ops.compressed import CompressedRows
from finback.ops.packed import PackedWeight


def _fields(pointers: str = "", sizes: str = "", floats: str = "") -> list[tuple[str, Any]]:
    """Fields of a struct: pointers, then 64-bit integers, then floats; "x*3" is an array of three."""
    fields = []
    for names, kind in ((pointers, c_void_p), (sizes, c_int64), (floats, c_float)):
        for name, _, count in (word.partition("*") for word in names.split()):
            fields.append((name, kind * int(count) if count else kind))
    return fields


class Operation(ctypes.Structure):
    """As in kernels.c: a kernel, what lays out its memory, its arguments."""

    _fields_ = _fields("run take_memory arguments")


class MatrixArguments(ctypes.Structure):
    """As in packed.h."""

    _fields_ = _fields("plain codes scales shifts", "bits group")


class LinearArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = [
        *_fields("x norm biases*3 outputs*3 residual unrounded"),
        ("weights", MatrixArguments * 3),
        *_fields("", "rows*3 tokens inputs", "eps"),
    ]


class EmbeddingArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = _fields("table ids output", "tokens rows size")


class NormArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = _fields("x norm output", "tokens size", "eps")


class SwiGLUArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = _fields("gate up output", "count")


class RotaryArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = _fields("x cosine sine output", "tokens heads size")


class CacheArguments(ctypes.Structure):
    """As in rows.h."""

    _fields_ = _fields(
        "rows blocks positions cosine sine", "tokens width row_bytes blocks_per_sequence block_rows format coded tile kept"
    )


class LatentArguments(ctypes.Structure):
    """As in latent.h."""

    _fields_ = [
        *_fields("query key_up value_up output compressed norm"),
        ("cache", CacheArguments),
        *_fields("", "heads nope rope rank value_size head_stride", "scale eps"),
    ]


class GroupedArguments(ctypes.Structure):
    """As in grouped_query.h."""

    _fields_ = [
        *_fields("query key value query_norm key_norm output"),
        ("cache", CacheArguments),
        *_fields("", "heads key_heads size", "scale eps"),
    ]


class FeedForwardArguments(ctypes.Structure):
    """As in experts.h."""

    _fields_ = [
        *_fields("x norm residual output router bias scores indices values"),
        *((name, MatrixArguments) for name in ["gate", "up", "down", "shared_gate", "shared_up", "shared_down"]),
        *_fields(
            "",
            "tokens size experts choices groups kept_groups width shared_width softmax two_per_group normalise",
            "scaling eps",
        ),
    ]


# Each kernel's struct, and whether it needs working memory.
KERNELS: dict[str, tuple[type[ctypes.Structure], bool]] = {
    "linear": (LinearArguments, True),
    "embedding": (EmbeddingArguments, False),
    "rms_norm": (NormArguments, False),
    "swiglu": (SwiGLUArguments, False),
    "rotary": (RotaryArguments, False),
    "latent_attention": (LatentArguments, True),
    "grouped_query_attention": (GroupedArguments, True),
    "feed_forward": (FeedForwardArguments, True),
}


class Norm(NamedTuple):
    """An RMSNorm: weight [D] and epsilon."""

    weight: Tensor
    eps: float


class CachedRows(NamedTuple):
    """Where cached rows lie and which of them are seen: query token i looks at positions 0 to positions[i] of its sequence.

    Several tokens may be of one sequence: then their blocks are the same and their positions differ.
    """

    rows: Tensor  # [blocks, block_rows, width of a row], or with `layout` uint8 [blocks, block_rows, row_bytes]
    positions: Tensor  # int64 [B]
    blocks: Tensor | None = None  # int32 [B, n]: the blocks of each token's sequence; None: token i has block i and no other
    layout: CompressedRows | None = None


class RotaryTable(NamedTuple):
    """cos and sin by position, float32 [positions, R / 2]."""

    cosine: Tensor
    sine: Tensor


class Projected(NamedTuple):
    """What makes `latent_attention` start from projections, as they come: everything between them and `o_proj`."""

    compressed: Tensor  # [B, C + R], not normalised, not rotated: becomes the cached row of each new token
    norm: Norm  # of the latent
    rotary: RotaryTable
    up: Tensor  # kv_b_proj.weight [H (N + V), C]
    nope: int  # N


class Routing(NamedTuple):
    """A router, in the words of `ops.router`."""

    weight: Tensor  # [E, D]
    bias: Tensor | None  # float32 [E]
    scoring_func: str
    topk_method: str
    n_group: int
    topk_group: int
    normalise: bool
    scaling: float
    scores: Tensor  # float32 [B, E], an output


class Choice(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    indices: Tensor  # int64 [B, K]
    values: Tensor  # float32 [B, K]


Matrix = Tensor | PackedWeight


class Weights(NamedTuple):
    """Of routed experts [E, F, D], [E, F, D], [E, D, F]; of one dense feed-forward, or of shared experts, without the E. All three
    are plain, or all three packed."""

    gate: Matrix
    up: Matrix
    down: Matrix
