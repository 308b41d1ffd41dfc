"""Dispatch order, permutation and its inverse in Triton beside the reference."""

from collections.abc import Callable

import pytest
import torch

from finback.ops import grouped as reference
from finback.ops.triton import grouped as kernels
from tests.ops.triton.ahead import has_wide_accesses, request


@pytest.mark.parametrize(("tokens", "choices", "experts"), [(1, 1, 1), (150, 2, 5), (33, 8, 256), (300, 1, 3), (0, 2, 4)])
def test_the_order_is_the_stable_sort_of_the_reference(tokens: int, choices: int, experts: int) -> None:
    torch.manual_seed(tokens)
    indices = torch.randint(0, experts, (tokens, choices))
    got, wanted = kernels.dispatch_order(indices, experts), reference.dispatch_order(indices, experts)
    for name in ("order", "token", "inverse", "rows"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_rows_are_copied_bit_for_bit(dtype: torch.dtype) -> None:
    x = (torch.randn(7, 48) * 50).to(dtype)
    token = torch.tensor([6, 0, 0, 3, 5])
    assert torch.equal(kernels.permute(x, token), x[token])
    assert kernels.permute(x, token[:0]).shape == (0, 48)
    with pytest.raises(ValueError, match="are copied 16 at a time"):
        kernels.permute(x[:, :3].contiguous(), token)


def test_nan_payloads_survive_the_copy() -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (4, 8), dtype=torch.int32).view(torch.float32)
    token = torch.tensor([3, 1])
    assert torch.equal(kernels.permute(x, token).view(torch.int32), x[token].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_within_the_rule_for_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, choices, size = 9, 4, 40
    y = torch.randn(tokens * choices, size).to(dtype)
    inverse = torch.randperm(tokens * choices)
    exact = y.double()[inverse].view(tokens, choices, size).sum(1)
    got = kernels.unpermute(y, inverse, tokens)
    plain = y[inverse].view(tokens, choices, size).sum(1)
    assert got.dtype == dtype
    assert float((got - exact).norm()) <= 2 * float((plain - exact).norm()) + 1e-9


def test_they_compile_for_hopper_past_the_first_cache(compile_for_hopper: Callable[..., list[str]]) -> None:
    asked = [
        request("grouped", "copy_rows_kernel", {"source": "*i32", "index": "*i64", "target": "*i32", "words": "i32"}, {"block": 512}),
        request("grouped", "sum_rows_kernel", {"rows": "*bf16", "inverse": "*i64", "out": "*bf16", "size": "i32"},
                {"choices": 8, "block": 1024}),
        request("grouped", "count_kernel", {"experts": "*i64", "counts": "*i32", "pairs": "i32", "n_experts": "i32"},
                {"width": 256, "block": 128}),
        request("grouped", "place_kernel", {"experts": "*i64", "starts": "*i32", "order": "*i64", "inverse": "*i64", "pairs": "i32",
                                            "n_experts": "i32"}, {"block": 128}),
    ]  # fmt: skip
    copies, sums, *_ = compile_for_hopper(asked)
    assert "ld.global.nc.L1::no_allocate.L2::128B.v4.b32" in copies
    assert "st.global.L1::no_allocate.v4.b32" in copies
    assert has_wide_accesses(sums)
