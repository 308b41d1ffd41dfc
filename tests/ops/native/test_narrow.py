"""The tiles of grouped.c and causal.c in narrower vectors than this processor may have: what others get of the same source."""

import platform

import pytest
import torch

from finback.ops.native import build
from finback.ops.native.causal import CausalKernels
from finback.ops.native.grouped import GroupedKernels
from finback.ops.native.training import SUFFIXES
from tests.ops.native import test_causal, test_grouped
from tests.ops.native.rule import compiled, threads

# Vectors of 8 floats with fused multiplication, and of 4 without. Hardly optimised, because it takes seconds.
NARROWER = {"AVX2": "-mno-avx512f", "SSE": "-mno-avx"}
FLAGS = tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS)


@pytest.fixture(params=NARROWER, scope="module")
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GroupedKernels, CausalKernels]:
    if platform.machine() != "x86_64":
        pytest.skip("these flags are of x86 compilers")
    compiled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", (*FLAGS, "-ffp-contract=off", NARROWER[request.param]))
        patch.setattr(build, "cache_directory", lambda: tmp_path_factory.mktemp("kernels"))
        grouped = GroupedKernels(build._library(build.GROUPED_SOURCES))
        causal = CausalKernels(build._library(build.CAUSAL_SOURCES))
    grouped.dtypes = causal.dtypes = frozenset(SUFFIXES)  # right everywhere, fast where the library says so
    return grouped, causal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_they_compute_the_same(dtype: torch.dtype, narrow: tuple[GroupedKernels, CausalKernels]) -> None:
    grouped, causal = narrow
    for shape in test_grouped.SHAPES:
        test_grouped.test_they_are_the_products_of_each_group(shape, dtype, grouped)
    for drawn in test_causal.SHAPES:
        test_causal.test_they_are_attention_and_its_gradients(drawn, dtype, causal)


def test_no_result_depends_on_the_number_of_threads(narrow: tuple[GroupedKernels, CausalKernels]) -> None:
    grouped, causal = narrow
    rows, matrices, right, counts = test_grouped.operands(([70, 110, 30], 40, 50), torch.float32)
    tensors = test_causal.draw(test_causal.SHAPES[3], torch.float32)
    found = []
    for count in (1, 3):
        with threads(count):
            products = [grouped.product(rows, matrices, counts), grouped.outer(rows, right, counts)]
            found.append(products + test_causal.computed(causal, *tensors))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
