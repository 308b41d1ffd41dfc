"""The C kernels as Python calls on tensors.

A method of `Kernels` checks its tensors and returns a *call* bound to them: `call()` runs the kernel, as often as wanted, each
time on what the tensors hold by then. Preparing takes a few microseconds, calling less than one. Nothing has gradients.

All tensors are on the CPU, contiguous and of one dtype, float32 or bfloat16, but for those that are documented as float32 or
integers. A call uses as many threads as torch did when it was prepared.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], Any]
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _fields(pointers: str, sizes: str, floats: str) -> list[tuple[str, Any]]:
    """Fields of a struct: pointers, then 64-bit integers, then floats; "x*3" is an array of three."""
    fields = []
    for names, kind in ((pointers, c_void_p), (sizes, c_int64), (floats, c_float)):
        for name, _, count in (word.partition("*") for word in names.split()):
            fields.append((name, kind * int(count) if count else kind))
    return fields


class LinearArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = _fields("x norm weights*3 outputs*3 residual", "rows*3 tokens inputs threads", "eps")


class NormArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = _fields("x norm output", "tokens size", "eps")


class SwiGLUArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = _fields("gate up output", "count", "")


class RotaryArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = _fields("x cosine sine output", "tokens heads size", "")


class AttentionArguments(ctypes.Structure):
    """As in operations.h."""

    _fields_ = _fields(
        "query key_up value_up output compressed norm rows blocks cosine sine positions",
        "sequences heads nope rope rank value_size head_stride blocks_per_sequence block_rows threads",
        "scale eps",
    )


class FeedForwardArguments(ctypes.Structure):
    """As in experts.h."""

    _fields_ = _fields(
        "x norm residual output router bias scores indices values gate up down shared_gate shared_up shared_down",
        "tokens size experts choices groups kept_groups width shared_width threads softmax two_per_group normalise",
        "scaling eps",
    )


_FUNCTIONS: dict[str, type[ctypes.Structure]] = {
    "linear": LinearArguments,
    "rms_norm": NormArguments,
    "swiglu": SwiGLUArguments,
    "rotary": RotaryArguments,
    "latent_attention": AttentionArguments,
    "feed_forward": FeedForwardArguments,
}


class Norm(NamedTuple):
    """An RMSNorm: weight [D] and epsilon."""

    weight: Tensor
    eps: float


class LatentRows(NamedTuple):
    """Where cached latents lie and which of them are seen: one query token per sequence looks at positions 0 to its own."""

    rows: Tensor  # [blocks, block_rows, C + R]
    positions: Tensor  # int64 [B]
    blocks: Tensor | None = None  # int32 [B, n]: each sequence's blocks; None: sequence i has block i and no other


class Projected(NamedTuple):
    """What makes `latent_attention` start from projections, as they come: everything between them and `o_proj`."""

    compressed: Tensor  # [B, C + R], not normalised, not rotated: becomes the cached row of each new token
    norm: Norm  # of the latent
    cosine: Tensor  # float32 [positions, R / 2]
    sine: Tensor
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


class Weights(NamedTuple):
    """Of routed experts [E, F, D], [E, F, D], [E, D, F]; of one dense feed-forward, or of shared experts, without the E."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Kernels:
    """The loaded library. B is the number of tokens, at most one per sequence in attention; other letters as everywhere."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {
            dtype: {name: _declared(library, f"{name}_{suffix}", types) for name, types in _FUNCTIONS.items()}
            for dtype, suffix in SUFFIXES.items()
        }

    def linear(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        outputs: Sequence[Tensor],
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Call:
        """outputs[i] [B, n_i] = weights[i] [n_i, D] x [B, D], for up to three matrices; with `norm`, x is normalised first.

        `residual` is added to the first output, and may be that output.
        """
        tokens, inputs = x.shape
        assert 1 <= len(weights) == len(outputs) <= 3
        for weight, output in zip(weights, outputs, strict=True):
            assert weight.shape == (output.shape[1], inputs), (weight.shape, x.shape, output.shape)
            assert output.shape[0] == tokens, (x.shape, output.shape)
        assert residual is None or residual.shape == outputs[0].shape
        assert norm is None or norm.weight.shape == (inputs,)
        return self._bind(
            "linear",
            (x, *weights, *outputs, residual, norm and norm.weight),
            LinearArguments(
                x=_at(x),
                norm=norm and _at(norm.weight),
                weights=(c_void_p * 3)(*map(_at, weights)),
                outputs=(c_void_p * 3)(*map(_at, outputs)),
                residual=_at(residual),
                rows=(c_int64 * 3)(*(len(weight) for weight in weights)),
                tokens=tokens,
                inputs=inputs,
                threads=torch.get_num_threads(),
                eps=norm.eps if norm else 0.0,
            ),
        )

    def rms_norm(self, x: Tensor, norm: Norm, output: Tensor) -> Call:
        """output [B, D] = norm(x [B, D])."""
        tokens, size = x.shape
        assert output.shape == x.shape
        assert norm.weight.shape == (size,)
        arguments = NormArguments(_at(x), _at(norm.weight), _at(output), tokens, size, norm.eps)
        return self._bind("rms_norm", (x, norm.weight, output), arguments)

    def swiglu(self, gate: Tensor, up: Tensor, output: Tensor) -> Call:
        """output = silu(gate) * up, all of one shape."""
        assert gate.shape == up.shape == output.shape
        arguments = SwiGLUArguments(_at(gate), _at(up), _at(output), gate.numel())
        return self._bind("swiglu", (gate, up, output), arguments)

    def rotary(self, x: Tensor, cosine: Tensor, sine: Tensor, output: Tensor) -> Call:
        """output [B, H, R] = x rotated by the angles of cosine, sine [B, R / 2] (float32), interleaved pairs."""
        tokens, heads, size = x.shape
        assert output.shape == x.shape
        assert cosine.shape == sine.shape == (tokens, size // 2)
        arguments = RotaryArguments(_at(x), _float32(cosine), _float32(sine), _at(output), tokens, heads, size)
        return self._bind("rotary", (x, output), arguments, (cosine, sine))

    def latent_attention(
        self,
        query: Tensor,
        latents: LatentRows,
        output: Tensor,
        rank: int,
        scale: float,
        projected: Projected | None = None,
    ) -> Call:
        """Absorbed attention of one new token per sequence to its cached rows, the token's own included.

        Without `projected`: query [B, H, C + R], absorbed and rotated, output [B, H, C]. With it: query [B, H, N + R] as it was
        projected, output [B, H, V], and the token's row is cached here.
        """
        sequences, heads, width = query.shape
        rows, positions, blocks = latents
        rope = rows.shape[-1] - rank
        assert rows.dim() == 3
        assert blocks is not None or rows.shape[0] == sequences
        arguments = AttentionArguments(
            query=_at(query),
            output=_at(output),
            rows=_at(rows),
            blocks=_integers(blocks, torch.int32),
            positions=_integers(positions, torch.int64),
            sequences=sequences,
            heads=heads,
            rope=rope,
            rank=rank,
            blocks_per_sequence=0 if blocks is None else blocks.shape[1],
            block_rows=rows.shape[1],
            threads=torch.get_num_threads(),
            scale=scale,
        )
        assert positions.shape == (sequences,)
        tensors: tuple[Tensor | None, ...] = (query, output, rows)
        if projected is None:
            assert width == rank + rope
            assert output.shape == (sequences, heads, rank)
            return self._bind("latent_attention", tensors, arguments, latents)
        value_size = output.shape[2]
        nope = projected.nope
        assert width == nope + rope
        assert output.shape[:2] == (sequences, heads)
        assert projected.up.shape == (heads * (nope + value_size), rank)
        assert projected.compressed.shape == (sequences, rank + rope)
        assert projected.norm.weight.shape == (rank,)
        assert projected.cosine.shape == projected.sine.shape
        assert projected.cosine.shape[1:] == (rope // 2,)
        arguments.key_up = _at(projected.up)
        arguments.value_up = projected.up.data_ptr() + nope * rank * projected.up.element_size()
        arguments.head_stride = (nope + value_size) * rank
        arguments.compressed = _at(projected.compressed)
        arguments.norm = _at(projected.norm.weight)
        arguments.eps = projected.norm.eps
        arguments.cosine, arguments.sine = _float32(projected.cosine), _float32(projected.sine)
        arguments.nope, arguments.value_size = nope, value_size
        tensors += (projected.up, projected.compressed, projected.norm.weight)
        return self._bind("latent_attention", tensors, arguments, (latents, projected))

    def feed_forward(
        self,
        x: Tensor,
        output: Tensor | None,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        routing: Routing | None = None,
        choice: Choice | None = None,
        experts: Weights | None = None,
        shared: Weights | None = None,
    ) -> Call:
        """output [B, D] = sum of chosen experts(x) + shared(x) + residual, of which each part may be missing.

        x [B, D] is normalised first with `norm`. `choice` is filled in where `routing` is given, and read where it is not; alone the
        two only route. `output` may be x or the residual. The call returns 0, or 1 if a given index is not that of an expert.
        """
        tokens, size = x.shape
        arguments = FeedForwardArguments(
            x=_at(x), output=_at(output), residual=_at(residual), tokens=tokens, size=size, threads=torch.get_num_threads()
        )
        tensors: list[Tensor | None] = [x, output, residual]
        assert output is None or output.shape == x.shape
        assert residual is None or residual.shape == x.shape
        assert (output is None) == (experts is None and shared is None)
        assert (choice is None) == (experts is None and routing is None)
        if norm is not None:
            assert norm.weight.shape == (size,)
            arguments.norm, arguments.eps = _at(norm.weight), norm.eps
            tensors.append(norm.weight)
        if choice is not None:
            assert choice.indices.shape == choice.values.shape == (tokens, choice.indices.shape[1])
            arguments.indices = _integers(choice.indices, torch.int64)
            arguments.values = _float32(choice.values)
            arguments.choices = choice.indices.shape[1]
        if routing is not None:
            tensors.append(routing.weight)
            _set_routing(arguments, routing)
        if experts is not None:
            count, arguments.width, _ = experts.gate.shape
            assert routing is None or count == arguments.experts
            arguments.experts = count
            assert experts.gate.shape == experts.up.shape == (count, arguments.width, size)
            assert experts.down.shape == (count, size, arguments.width)
            arguments.gate, arguments.up, arguments.down = map(_at, experts)
            tensors.extend(experts)
        if shared is not None:
            arguments.shared_width = len(shared.gate)
            assert shared.gate.shape == shared.up.shape == (arguments.shared_width, size)
            assert shared.down.shape == (size, arguments.shared_width)
            arguments.shared_gate, arguments.shared_up, arguments.shared_down = map(_at, shared)
            tensors.extend(shared)
        return self._bind("feed_forward", tensors, arguments, (choice, routing))

    def _bind(self, name: str, tensors: Sequence[Tensor | None], arguments: Any, others: object = None) -> Call:
        """The call, after the check that all `tensors` are of one dtype and as the kernels need them."""
        first = tensors[0]
        assert first is not None
        dtype = first.dtype
        for tensor in tensors:
            if tensor is not None:
                assert tensor.dtype == dtype, f"{tensor.dtype} beside {dtype}"
                assert tensor.is_contiguous(), f"strides {tensor.stride()} of shape {tuple(tensor.shape)}"
                assert tensor.device.type == "cpu", tensor.device
        arguments.tensors = (tensors, others)  # the memory behind the pointers lives as long as they do
        return partial(self._functions[dtype][name], ctypes.byref(arguments))


def _set_routing(arguments: Any, routing: Routing) -> None:
    count = len(routing.weight)
    limited = routing.topk_method != "greedy" and routing.topk_group < routing.n_group
    groups = routing.n_group if limited else 1
    kept = routing.topk_group if limited else 1
    assert routing.weight.shape == (count, arguments.size)
    assert routing.scores.shape == (arguments.tokens, count)
    assert count % groups == 0
    assert arguments.choices <= kept * (count // groups)
    assert routing.bias is None or routing.bias.shape == (count,)
    arguments.router = _at(routing.weight)
    arguments.bias = None if routing.bias is None else _float32(routing.bias)
    arguments.scores = _float32(routing.scores)
    arguments.experts, arguments.groups, arguments.kept_groups = count, groups, kept
    arguments.softmax = routing.scoring_func == "softmax"
    arguments.two_per_group = routing.topk_method == "noaux_tc"
    arguments.normalise, arguments.scaling = routing.normalise, routing.scaling


def _declared(library: ctypes.CDLL, name: str, arguments: type[ctypes.Structure]) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.POINTER(arguments)], ctypes.c_int
    return function


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _float32(tensor: Tensor) -> int:
    assert tensor.dtype == torch.float32, tensor.dtype
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _integers(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    assert tensor is None or (tensor.dtype == dtype and tensor.is_contiguous())
    return _at(tensor)
