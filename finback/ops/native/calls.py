"""The C kernels as Python calls on tensors.

A method of `Kernels` checks its tensors and returns a *call* bound to them: `call()` runs the kernel, as often as wanted, each
time on what the tensors hold by then. Preparing takes some microseconds, calling less than one. `Kernels.program` makes one call
of many, so that a whole decode step crosses from Python to C once. Nothing has gradients.

All tensors are on the CPU, contiguous and of one dtype, float32 or bfloat16, but for those that are documented as float32 or
integers. A call uses as many threads as torch did when it was prepared; results do not depend on that number.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from finback.ops.native.arguments import (
    KERNELS,
    CacheArguments,
    CachedRows,
    Choice,
    EmbeddingArguments,
    FeedForwardArguments,
    GroupedArguments,
    LatentArguments,
    LinearArguments,
    Matrix,
    MatrixArguments,
    Norm,
    NormArguments,
    Operation,
    Projected,
    RotaryArguments,
    RotaryTable,
    Routing,
    SwiGLUArguments,
    Weights,
)

SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Call:
    """Kernels that run one after the other. Calling it returns 0, or 1 if one was given an index that is out of range.

    The kernels behind that one do not run. Two threads may not run calls at once that write to the same tensors.
    """

    def __init__(self, run: Any, operations: list[tuple[Operation, object]]) -> None:
        self.operations = operations  # each with what keeps the memory behind its pointers alive
        array = (Operation * len(operations))(*(operation for operation, _ in operations))
        self._run = partial(run, array, len(operations), torch.get_num_threads())

    def __call__(self) -> int:
        status: int = self._run()
        return status


class Kernels:
    """The loaded library. B is the number of tokens; other letters as everywhere."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {
            (name, dtype): (
                _address(library, f"{name}_{suffix}"),
                _address(library, f"{name}_memory_of_{suffix}") if needs_memory else None,
            )
            for name, (_, needs_memory) in KERNELS.items()
            for dtype, suffix in SUFFIXES.items()
        }
        self._run = library.run_program
        self._run.argtypes, self._run.restype = [ctypes.POINTER(Operation), c_int64, c_int64], ctypes.c_int

    def program(self, calls: Sequence[Call]) -> Call:
        """All of `calls` as one, in their order."""
        assert calls
        return Call(self._run, [operation for call in calls for operation in call.operations])

    def linear(
        self,
        x: Tensor,
        weights: Sequence[Matrix],
        outputs: Sequence[Tensor],
        norm: Norm | None = None,
        residual: Tensor | None = None,
        biases: Sequence[Tensor | None] = (),
    ) -> Call:
        """outputs[i] [B, n_i] = weights[i] [n_i, D] x [B, D] + biases[i] [n_i], for up to three matrices, plain or packed.

        With `norm`, x is normalised first. `residual` is added to the first output, and may be that output. The first output may be
        float32 where the rest is bfloat16: logits that differ by less than bfloat16 can tell keep their order.
        """
        tokens, inputs = x.shape
        assert 1 <= len(weights) == len(outputs) <= 3
        for weight, output in zip(weights, outputs, strict=True):
            assert weight.shape == (output.shape[1], inputs), (weight.shape, x.shape, output.shape)
            assert output.shape[0] == tokens, (x.shape, output.shape)
        for weight, bias in zip(weights, biases, strict=bool(biases)):
            assert bias is None or bias.shape == weight.shape[:1]
        assert residual is None or residual.shape == outputs[0].shape
        assert norm is None or norm.weight.shape == (inputs,)
        unrounded = outputs[0] if outputs[0].dtype == torch.float32 != x.dtype else None
        assert unrounded is None or unrounded.is_contiguous()
        rounded = outputs if unrounded is None else outputs[1:]
        return self._bind(
            "linear",
            (x, *filter(_is_plain, weights), *rounded, *biases, residual, norm and norm.weight),
            LinearArguments(
                x=_at(x),
                norm=norm and _at(norm.weight),
                biases=(c_void_p * 3)(*map(_at, biases)),
                outputs=(c_void_p * 3)(*map(_at, outputs)),
                residual=_at(residual),
                unrounded=_at(unrounded),
                weights=(MatrixArguments * 3)(*map(_matrix, weights)),
                rows=(c_int64 * 3)(*(weight.shape[0] for weight in weights)),
                tokens=tokens,
                inputs=inputs,
                eps=norm.eps if norm else 0.0,
            ),
            (outputs, weights),
        )

    def embedding(self, ids: Tensor, table: Tensor, output: Tensor) -> Call:
        """output [B, D] = table [n, D] at the rows ids (int64 [B]). The call returns 1 if an id is not that of a row."""
        assert ids.dim() == 1
        assert output.shape == (len(ids), table.shape[1])
        address = _integers(ids, torch.int64)
        arguments = EmbeddingArguments(_at(table), address, _at(output), len(ids), *table.shape)
        return self._bind("embedding", (table, output), arguments, ids)

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

    def rotary(self, x: Tensor, angles: RotaryTable, output: Tensor) -> Call:
        """output [B, H, R] = x rotated by angles that are given for each token [B, R / 2], interleaved pairs."""
        tokens, heads, size = x.shape
        assert output.shape == x.shape
        assert angles.cosine.shape == angles.sine.shape == (tokens, size // 2)
        arguments = RotaryArguments(_at(x), *map(_float32, angles), _at(output), tokens, heads, size)
        return self._bind("rotary", (x, output), arguments, angles)

    def latent_attention(
        self,
        query: Tensor,
        cached: CachedRows,
        output: Tensor,
        rank: int,
        scale: float,
        projected: Projected | None = None,
    ) -> Call:
        """Absorbed attention of new tokens to cached latents [blocks, block_rows, C + R], each token's own included.

        Compressed rows (`cached.layout`) are decoded piece by piece as a token looks at them; new ones are encoded.

        Without `projected`: query [B, H, C + R], absorbed and rotated, output [B, H, C]. With it: query [B, H, N + R] as it was
        projected, output [B, H, V], and every token's row is cached here, before any token looks.
        """
        tokens, heads, width = query.shape
        rope = _width(cached) - rank
        assert cached.layout is None or (cached.layout.coded, cached.layout.kept) == (rank, rope)
        arguments = LatentArguments(query=_at(query), output=_at(output), heads=heads, rope=rope, rank=rank, scale=scale)
        arguments.cache = _cache(cached, query.dtype, tokens, projected and projected.rotary, rope)
        assert output.shape[:2] == (tokens, heads)
        if projected is None:
            assert width == rank + rope
            assert output.shape[2] == rank
            return self._bind("latent_attention", (query, output), arguments, cached)
        value_size, nope = output.shape[2], projected.nope
        assert width == nope + rope
        assert projected.up.shape == (heads * (nope + value_size), rank)
        assert projected.compressed.shape == (tokens, rank + rope)
        assert projected.norm.weight.shape == (rank,)
        arguments.key_up = _at(projected.up)
        arguments.value_up = projected.up.data_ptr() + nope * rank * projected.up.element_size()
        arguments.head_stride = (nope + value_size) * rank
        arguments.compressed = _at(projected.compressed)
        arguments.norm, arguments.eps = _at(projected.norm.weight), projected.norm.eps
        arguments.nope, arguments.value_size = nope, value_size
        tensors = (query, output, projected.up, projected.compressed, projected.norm.weight)
        return self._bind("latent_attention", tensors, arguments, (cached, projected))

    def grouped_query_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cached: CachedRows,
        rotary: RotaryTable,
        output: Tensor,
        scale: float,
        query_norm: Norm | None = None,
        key_norm: Norm | None = None,
    ) -> Call:
        """Everything between the projections and `o_proj`: query [B, H d], key and value [B, KV d] -> output [B, H d].

        Heads are normalised if norms (of weight [d]) are given, rotated (value i turns with value i + d / 2), and cached as rows
        [blocks, block_rows, 2 KV d], keys before values, before any token looks. `rotary` is [positions, d / 2].
        """
        tokens, key_width = key.shape
        size = 2 * rotary.cosine.shape[1]
        norms = [norm for norm in (query_norm, key_norm) if norm is not None]
        assert value.shape == key.shape
        assert query.shape == output.shape == (tokens, query.shape[1])
        assert _width(cached) == 2 * key_width
        assert key_width % size == 0
        assert query.shape[1] % key_width == 0
        assert all(norm.weight.shape == (size,) for norm in norms)
        assert len({norm.eps for norm in norms}) <= 1, "one epsilon for both norms"
        arguments = GroupedArguments(
            *map(_at, (query, key, value, query_norm and query_norm.weight, key_norm and key_norm.weight, output)),
            cache=_cache(cached, query.dtype, tokens, rotary, size),
            heads=query.shape[1] // size,
            key_heads=key_width // size,
            size=size,
            scale=scale,
            eps=norms[0].eps if norms else 0.0,
        )
        tensors = (query, key, value, output, *(norm.weight for norm in norms))
        return self._bind("grouped_query_attention", tensors, arguments, (cached, rotary))

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
        two only route. `output` may be x or the residual. The call returns 1 if a given index is not that of an expert.
        """
        tokens, size = x.shape
        arguments = FeedForwardArguments(x=_at(x), output=_at(output), residual=_at(residual), tokens=tokens, size=size)
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
            arguments.gate, arguments.up, arguments.down = map(_matrix, experts)
            tensors.extend(filter(_is_plain, experts))
        if shared is not None:
            arguments.shared_width = shared.gate.shape[0]
            assert shared.gate.shape == shared.up.shape == (arguments.shared_width, size)
            assert shared.down.shape == (size, arguments.shared_width)
            arguments.shared_gate, arguments.shared_up, arguments.shared_down = map(_matrix, shared)
            tensors.extend(filter(_is_plain, shared))
        for weights in (experts, shared):
            assert weights is None or len({_is_plain(weight) for weight in weights}) == 1
        return self._bind("feed_forward", tensors, arguments, (choice, routing, experts, shared))

    def _bind(self, name: str, tensors: Sequence[Tensor | None], arguments: ctypes.Structure, others: object = None) -> Call:
        """The call, after the check that all `tensors` are of one dtype and as the kernels need them."""
        first = tensors[0]
        assert first is not None
        dtype = first.dtype
        for tensor in tensors:
            if tensor is not None:
                assert tensor.dtype == dtype, f"{tensor.dtype} beside {dtype}"
                assert tensor.is_contiguous(), f"strides {tensor.stride()} of shape {tuple(tensor.shape)}"
                assert tensor.device.type == "cpu", tensor.device
        operation = Operation(*self._functions[name, dtype], ctypes.addressof(arguments))
        return Call(self._run, [(operation, (arguments, tensors, others))])


def _width(cached: CachedRows) -> int:
    """How many values a row stands for."""
    return cached.rows.shape[-1] if cached.layout is None else cached.layout.coded + cached.layout.kept


def _cache(cached: CachedRows, dtype: torch.dtype, tokens: int, rotary: RotaryTable | None, rotated: int) -> CacheArguments:
    """`rotary` turns `rotated` values; None where nothing is rotated."""
    rows, positions, blocks, layout = cached
    assert rows.dim() == 3
    assert rows.is_contiguous()
    assert rows.device.type == "cpu", rows.device
    assert rows.dtype == (dtype if layout is None else torch.uint8), rows.dtype
    assert layout is None or rows.shape[2] == layout.row_bytes
    assert positions.shape == (tokens,)
    assert rows.shape[0] == tokens if blocks is None else blocks.shape == (tokens, blocks.shape[1])
    cache = CacheArguments(
        rows=_at(rows),
        blocks=_integers(blocks, torch.int32),
        positions=_integers(positions, torch.int64),
        tokens=tokens,
        width=_width(cached),
        row_bytes=rows.shape[2] * rows.element_size(),
        blocks_per_sequence=0 if blocks is None else blocks.shape[1],
        block_rows=rows.shape[1],
    )
    if rotary is not None:
        assert rotary.cosine.shape == rotary.sine.shape
        assert rotary.cosine.shape[1:] == (rotated // 2,)
        cache.cosine, cache.sine = map(_float32, rotary)
    if layout is not None:
        cache.format = {"int8": 1, "fp8": 2}[layout.format]  # as in codes.h
        cache.coded, cache.tile, cache.kept = layout.coded, layout.tile, layout.kept
    return cache


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


def _address(library: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(library, name), c_void_p).value


def _is_plain(weight: Matrix) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor)


def _matrix(weight: Matrix) -> MatrixArguments:
    if isinstance(weight, Tensor):
        return MatrixArguments(plain=_at(weight))
    assert weight.codes.dtype == torch.int32
    assert weight.scales.dtype == torch.float16
    assert weight.shifts is None or (weight.shifts.dtype == torch.float16 and weight.shifts.shape == weight.scales.shape)
    assert all(part is None or part.is_contiguous() for part in (weight.codes, weight.scales, weight.shifts))
    return MatrixArguments(None, *map(_at, (weight.codes, weight.scales, weight.shifts)), weight.bits, weight.group_size)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _float32(tensor: Tensor) -> int:
    assert tensor.dtype == torch.float32, tensor.dtype
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _integers(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    assert tensor is None or (tensor.dtype == dtype and tensor.is_contiguous())
    return _at(tensor)
