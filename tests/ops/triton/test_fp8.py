"""The FP8 casts in Triton, bit for bit beside the reference, and as code for Hopper."""

from collections.abc import Callable

import pytest
import torch

from finback.ops import fp8 as reference
from finback.ops.triton import fp8 as kernels
from tests.ops.triton.ahead import has_wide_accesses, request

SHAPES = [(1, 128), (37, 300), (130, 129), (64, 256), (3, 1)]


def same(got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
    nan = torch.isnan(wanted[0].float())
    assert torch.equal(torch.isnan(got[0].float()), nan)
    assert torch.equal(got[0].view(torch.uint8)[~nan], wanted[0].view(torch.uint8)[~nan])
    assert torch.equal(got[1].nan_to_num(nan=-1), wanted[1].nan_to_num(nan=-1))


def values(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    spread = torch.logspace(-9, 3, shape[0]).unsqueeze(1)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_payloads_and_scales_are_those_of_the_reference(shape: tuple[int, int], ue8m0: bool, dtype: torch.dtype) -> None:
    x = values(shape, dtype)
    same(kernels.quantize_1x128(x, ue8m0=ue8m0), reference.quantize_1x128(x, ue8m0=ue8m0))
    same(kernels.quantize_128x128(x, ue8m0=ue8m0), reference.quantize_128x128(x, ue8m0=ue8m0))
    for bound in (0.0, 1e-4):
        wanted = reference.quantize_1x128(x.T, ue8m0=ue8m0, smallest_amax=bound)
        same(kernels.quantize_over_rows(x, ue8m0=ue8m0, smallest_amax=bound), wanted)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
def test_more_dimensions_zeros_infinities_and_nans() -> None:
    x = torch.randn(2, 5, 260)
    x[0, 0], x[0, 1, 3], x[1, 2, 200], x[1, 4, 130] = 0, float("inf"), float("nan"), -float("inf")
    same(kernels.quantize_1x128(x), reference.quantize_1x128(x))
    flat = x.flatten(0, 1)
    same(kernels.quantize_128x128(flat), reference.quantize_128x128(flat))
    same(kernels.quantize_128x128(torch.zeros(130, 5)), reference.quantize_128x128(torch.zeros(130, 5)))
    same(kernels.quantize_over_rows(flat), reference.quantize_1x128(flat.T))
    empty = torch.empty(0, 128)
    same(kernels.quantize_1x128(empty), reference.quantize_1x128(empty))


def test_every_code_and_every_border_between_codes_rounds_alike() -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((codes, middles, torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(448.0))))
    x = torch.cat((near, -near, torch.full((128 * 8 - 2 * len(near),), 448.0))).view(8, 128)
    x[:, 0] = 448.0  # scale 1
    same(kernels.quantize_1x128(x), reference.quantize_1x128(x))


def test_they_compile_for_hopper_and_read_sixteen_bytes_at_once(compile_for_hopper: Callable[..., list[str]]) -> None:
    types = {"x": "*bf16", "payload": "*fp8e4nv", "scale": "*fp32", "rows": "i32", "columns": "i32", "tiles": "i32"}
    rows = types | {"smallest_amax": "fp32"}
    asked = [
        request("fp8", "quantize_rows_kernel", rows, {"ue8m0": False, "block_rows": 32, "tile": 128}),
        request("fp8", "quantize_over_rows_kernel", rows, {"ue8m0": True, "block_columns": 64, "tile": 128}),
        request("fp8", "quantize_blocks_kernel", types, {"ue8m0": False, "tile": 128}),
    ]
    for asked_for, ptx in zip(asked, compile_for_hopper(asked), strict=True):
        assert ".target sm_90" in ptx
        assert has_wide_accesses(ptx), asked_for["kernel"]
        assert "div.rn.f32" in ptx
        assert "e4m3x2" in ptx
