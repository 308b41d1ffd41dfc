"""MLA's decode and prefill kernels beside their references by the rule for low precision, and as code for Hopper."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from finback.ops.attention import attention_reference, latent_attention
from finback.ops.fp8 import dequantize_1x128, quantize_1x128
from finback.ops.triton import attention as kernels
from finback.ops.triton.causal_attention import causal_attention
from tests.ops.triton.ahead import has_wide_accesses, request


def obeys(got: Tensor, plain: Tensor, exact: Tensor, terms: float = 0.0) -> bool:
    """Error against float64 at most twice PyTorch's own at this precision. Float32's rounding is of `exact`, or of what it is the
    difference of."""
    return bool((got.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-6 * max(exact.norm(), terms))


def pages(lengths: list[int], block_size: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A cache whose blocks lie in any order, with nan in every row that belongs to nobody."""
    torch.manual_seed(sum(lengths))
    per_row = -(-max(lengths) // block_size)
    table = torch.randperm(per_row * len(lengths) + 3)[: per_row * len(lengths)].view(len(lengths), per_row).to(torch.int32)
    cache = torch.full((per_row * len(lengths) + 3, block_size, width), float("nan"), dtype=dtype)
    for sequence, length in enumerate(lengths):
        for place in range(length):
            cache[table[sequence, place // block_size], place % block_size] = torch.randn(width).to(dtype)
    return cache, table, torch.tensor(lengths, dtype=torch.int32)


def rows_of(cache: Tensor, table: Tensor, length: int) -> Tensor:
    return cache[table.long()].flatten(0, 1)[:length]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "rank", "rope", "block_size", "splits"), [(3, 32, 16, 16, 1), (16, 64, 16, 64, 3), (20, 128, 32, 64, 5)]
)
def test_decode_is_attention_over_each_sequences_rows(
    heads: int, rank: int, rope: int, block_size: int, splits: int, dtype: torch.dtype
) -> None:
    lengths = [1, 70, 200]
    cache, table, counts = pages(lengths, block_size, rank + rope, dtype)
    query = torch.randn(3, heads, rank + rope).to(dtype)
    got = kernels.latent_decode(query, cache, table, counts, rank, 0.2, splits)
    assert got.shape == (3, heads, rank)
    for sequence, length in enumerate(lengths):
        rows = rows_of(cache, table[sequence], length)
        arguments = query[sequence].view(1, 1, heads, -1), rows.unsqueeze(0)
        plain = latent_attention(*arguments, rank, 0.2)[0, 0]
        exact = latent_attention(*(t.double() for t in arguments), rank, 0.2)[0, 0]
        assert obeys(got[sequence], plain, exact)


def test_decode_over_a_compressed_cache_is_that_over_what_it_stands_for() -> None:
    lengths, rank, rope = [5, 130], 256, 32
    cache, table, counts = pages(lengths, 64, rank + rope, torch.bfloat16)
    latents, scales = quantize_1x128(cache[..., :rank].nan_to_num())
    keys = cache[..., rank:].contiguous()
    query = torch.randn(2, 16, rank + rope).bfloat16()
    got = kernels.latent_decode_fp8(query, latents, scales, keys, table, counts, 0.1, 2)
    restored = torch.cat((dequantize_1x128(latents, scales, torch.bfloat16), keys), dim=-1)
    wanted = kernels.latent_decode(query, restored, table, counts, rank, 0.1, 2)
    assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="needs 2 scales a row, not 1"):
        kernels.latent_decode_fp8(query, latents, scales[..., :1], keys, table, counts, 0.1)


def test_a_compressed_row_of_v3_takes_656_bytes() -> None:
    """44% less than the 1,152 of bfloat16; the tensors are those that the kernel takes."""
    cache, table, counts = pages([3], 64, 512 + 64, torch.bfloat16)
    latents, scales = quantize_1x128(cache[..., :512].nan_to_num())
    keys = cache[..., 512:].contiguous()
    assert (
        kernels.latent_decode_fp8(torch.randn(1, 16, 576).bfloat16(), latents, scales, keys, table, counts, 0.1).isfinite().all()
    )
    assert sum(part[0, 0].nbytes for part in (latents, scales, keys)) == 656
    assert cache[0, 0].nbytes == 1152


def test_sizes_that_the_kernels_do_not_take_are_refused() -> None:
    cache, table, counts = pages([3], 16, 40, torch.float32)
    with pytest.raises(ValueError, match="a rotary part of a power of two of at least 16 values, not 8"):
        kernels.latent_decode(torch.randn(1, 2, 40), cache, table, counts, 32, 1.0)
    with pytest.raises(ValueError, match="powers of two"):
        causal_attention(torch.randn(1, 1, 4, 40), torch.randn(1, 1, 4, 40), torch.randn(1, 1, 4, 32), 1.0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "tokens"), [(2, 1, 1), (4, 2, 100), (1, 1, 130)])
def test_prefill_is_causal_attention_with_heads_of_unequal_size(heads: int, groups: int, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    query = torch.randn(2, heads, tokens, 48).to(dtype)
    key, value = torch.randn(2, heads // groups, tokens, 48).to(dtype), torch.randn(2, heads // groups, tokens, 64).to(dtype)
    got = causal_attention(query, key, value, 0.3, 16)
    plain = attention_reference(query, key, value, 0.3)
    assert obeys(got, plain, attention_reference(query.double(), key.double(), value.double(), 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "tokens"), [(2, 1, 1), (4, 2, 100), (1, 1, 130)])
def test_the_gradients_of_prefill_are_those_of_causal_attention(heads: int, groups: int, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    shapes = (heads, 48), (heads // groups, 48), (heads // groups, 64)
    inputs = [torch.randn(2, count, tokens, width).to(dtype) for count, width in shapes]
    grad = torch.randn(2, heads, tokens, 64).to(dtype)

    def gradients(function: Callable[..., Tensor], kind: torch.dtype, *rest: int) -> tuple[Tensor, ...]:
        leaves = [one.to(kind).requires_grad_() for one in inputs]
        return torch.autograd.grad(function(*leaves, 0.3, *rest), leaves, grad.to(kind))

    got, plain = gradients(causal_attention, dtype, 16), gradients(attention_reference, dtype)
    for one, usual, exact in zip(got, plain, gradients(attention_reference, torch.float64), strict=True):
        assert one.dtype == dtype
        assert obeys(one, usual, exact, float(grad.norm()))  # a single token's scores have no gradient, a difference of equals


def test_a_gradient_that_is_not_finite_reaches_what_the_output_came_from() -> None:
    """The third query's gradient is nan: it saw the first three keys."""
    query, key, value = (torch.randn(1, 1, 70, width, requires_grad=True) for width in (48, 48, 32))
    grad = torch.zeros(1, 1, 70, 32)
    grad[..., 2, :] = float("nan")
    grads = torch.autograd.grad(causal_attention(query, key, value, 0.3, 16), (query, key, value), grad)
    of_query, of_key, of_value = (one.isnan().any(-1).flatten().nonzero().flatten().tolist() for one in grads)
    assert of_query == [2]
    assert of_key[:3] == of_value[:3] == [0, 1, 2]


def test_for_hopper_they_multiply_on_the_tensor_cores(compile_for_hopper: Callable[..., list[str]]) -> None:
    types = {
        "query": "*bf16",
        "latents": "*bf16",
        "rope_keys": "*bf16",
        "scales": "*fp32",
        "block_table": "*i32",
        "lengths": "*i32",
    }
    types |= {"part": "*fp32", "log_weight": "*fp32", "heads": "i32", "blocks_per_row": "i32", "latent_stride": "i32"}
    types |= {"rope_stride": "i32", "scale": "fp32", "splits": "i32"}
    sizes = {"rank": 512, "rope": 64, "block_size": 64, "block_s": 64, "tile": 128}
    prefill = {"nope": 128, "rope": 64, "width": 128, "block_m": 64, "block_n": 64}
    inputs = {"query": "*bf16", "key": "*bf16", "value": "*bf16", "log_sum": "*fp32"}
    inputs |= {"tokens": "i32", "heads": "i32", "heads_per_key": "i32", "scale": "fp32"}
    forward_types = inputs | {"out": "*bf16"}
    backward_types = inputs | {"grad": "*bf16", "row_sum": "*fp32"}
    query_types = backward_types | {"out": "*bf16", "grad_query": "*bf16"}
    key_types = backward_types | {"grad_key": "*bf16", "grad_value": "*bf16"}
    asked = [
        request("attention", "latent_decode_kernel", types, sizes | {"block_h": 64, "compressed": False}, warps=8, stages=2),
        request("attention", "latent_decode_kernel", types | {"latents": "*fp8e4nv"},
                sizes | {"block_h": 16, "compressed": True}, stages=2),
        request("attention", "join_kernel", {"part": "*fp32", "log_weight": "*fp32", "out": "*bf16", "splits": "i32"},
                {"rank": 512, "width": 32}),
        request("causal_attention", "forward_kernel", forward_types, prefill, stages=2),
        request("causal_attention", "query_gradient_kernel", query_types, prefill, warps=8, stages=2),
        request("causal_attention", "key_gradient_kernel", key_types, prefill, warps=8, stages=1),
    ]  # fmt: skip
    decode, compressed, join, *causal = compile_for_hopper(asked)
    for ptx in (decode, *causal):
        assert re.search(r"wgmma\.mma_async\S*bf16\.bf16", ptx)
    assert re.search(r"mma\S*\.f32\.bf16\.bf16\.f32", compressed), "16 heads are too few rows for wgmma"
    assert all(has_wide_accesses(ptx) for ptx in (decode, compressed, join, *causal))
