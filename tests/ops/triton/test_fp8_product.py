"""The FP8 products in Triton beside the reference, and as code for Hopper's tensor cores."""

import re
from collections.abc import Callable

import pytest
import torch

from finback.ops.fp8 import quantize_1x128, quantize_128x128
from finback.ops.fp8_product import fp8_gemm as reference
from finback.ops.triton.fp8_product import fp8_gemm, grouped_fp8_gemm, masked_fp8_gemm
from tests.ops.triton.ahead import request


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """But for the order in which float32 adds within one tile."""
    return float((got - wanted).norm()) <= 1e-6 * float(wanted.norm())


@pytest.mark.parametrize(("rows", "columns", "depth"), [(5, 130, 300), (128, 128, 128), (200, 1, 257), (1, 40, 3)])
def test_it_is_the_reference(rows: int, columns: int, depth: int) -> None:
    torch.manual_seed(rows)
    a = quantize_1x128(torch.randn(rows, depth))
    weight, other = torch.randn(columns, depth), torch.randn(columns, depth)
    for b in (quantize_128x128(weight), quantize_1x128(other)):
        assert close(fp8_gemm(*a, *b), reference(*a, *b))
    assert fp8_gemm(*a, *b, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
def test_nan_and_infinity_stay_where_they_are() -> None:
    x = torch.randn(4, 256)
    x[1, 200] = float("nan")
    a, b = quantize_1x128(x), quantize_128x128(torch.randn(3, 256))
    a[1][2, 0] = float("inf")
    got, wanted = fp8_gemm(*a, *b), reference(*a, *b)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())


def experts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    pairs = [quantize_128x128(torch.randn(140, 200)) for _ in range(4)]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs]), torch.tensor([3, 0, 150, 1])


def test_groups_one_behind_another() -> None:
    b, b_scale, counts = experts()
    a, a_scale = quantize_1x128(torch.randn(int(counts.sum()), 200))
    parts = zip(a.split(counts.tolist()), a_scale.split(counts.tolist()), b, b_scale, strict=True)
    assert close(grouped_fp8_gemm(a, a_scale, b, b_scale, counts), torch.cat([reference(*part) for part in parts]))


def test_groups_with_room_are_zero_behind_their_rows() -> None:
    b, b_scale, counts = experts()
    a, a_scale = quantize_1x128(torch.randn(4, 160, 200))
    got = masked_fp8_gemm(a, a_scale, b, b_scale, counts)
    for group, count in enumerate(counts.tolist()):
        assert close(got[group, :count], reference(a[group, :count], a_scale[group, :count], b[group], b_scale[group]))
        assert not got[group, count:].any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    b, b_scale, counts = experts()
    a, a_scale = quantize_1x128(torch.randn(154, 200))
    with pytest.raises(ValueError, match="scales are one for each 128"):
        grouped_fp8_gemm(a, a_scale[:, :1], b, b_scale, counts)
    with pytest.raises(ValueError, match="it needs"):
        fp8_gemm(a, a_scale, b[0], b_scale[0, :1])


def test_for_hopper_they_multiply_e4m3_on_the_tensor_cores_and_promote(compile_for_hopper: Callable[..., list[str]]) -> None:
    pointers = {"a": "*fp8e4nv", "a_scale": "*fp32", "b": "*fp8e4nv", "b_scale": "*fp32", "out": "*bf16"}
    sizes = {"columns": "i32", "depth": "i32", "tiles_k": "i32"}
    blocks = {"block_m": 128, "block_n": 128, "tile": 128}
    groups = {"first_rows": "*i64", "group_rows": "*i64", "scale_rows": "i32"}
    asked = [
        request("fp8_product", "fp8_gemm_kernel", {**pointers, **sizes, "rows": "i32"},
                {**blocks, "group_m": 8, "b_by_rows": by_rows}, warps=8)
        for by_rows in (False, True)
    ] + [request("fp8_product", "grouped_fp8_gemm_kernel", {**pointers, **sizes, **groups}, blocks, warps=8)]  # fmt: skip
    for ptx in compile_for_hopper(asked):
        products = re.findall(r"wgmma\.mma_async\S*e4m3\.e4m3", ptx)
        assert len(products) >= 4, "four instructions of depth 32 to a tile of 128"
        assert re.search(r"cp\.async\S* \[[^\]]*\], \[[^\]]*\], (0x10|16)", ptx), "operands are copied 16 bytes at a time"
        assert "fma.rn.f32" in ptx
        assert "st.local" not in ptx, "nothing is spilled"
